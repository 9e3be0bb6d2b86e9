"""A run that goes on does so as it was begun."""

from support.cli import UserError


def need_same(where, old, new):
    """Refuse what was begun with other settings, both {name: value as in JSON}."""
    for name, value in new.items():
        if old.get(name) != value:
            raise UserError(
                f"{where}: made with other settings ({name} was {old.get(name)!r}, is {value!r}); "
                "give the same, or choose another --out"
            )
