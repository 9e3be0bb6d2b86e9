"""Command lines: one kind of error for the user's mistakes, and options from a dataclass."""

import argparse
import dataclasses
import math
import re
import sys
import typing


class UserError(Exception):
    """Something that the person at the keyboard can mend: what is wrong, where, and what to do."""


class Unreadable(UserError):
    """Not a record is bad but the disk, the network, or a permission."""


def run_command(function, *args):
    """function(*args); what its user can mend ends in one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # texts that a terminal may not show
    try:
        return function(*args)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
    sys.exit(2)


def places(sources):
    """The first few of many: "prefs.jsonl:1, 2, 3 and 397 more"."""
    more = f" and {len(sources) - 3:,} more" if len(sources) > 3 else ""
    first, *others = sources[:3]
    return ", ".join([first, *(source.rpartition(":")[2].strip() for source in others)]) + more


def kind_of(message):
    """A message without what differs from record to record: numbers, paths, quoted text."""
    return re.sub(r"'[^']*'|\S*[\d/\\]\S*", "...", message)


def check_numbers(options, above_0, any_sign=()):
    """Refuse numbers of an options dataclass that are infinite or NaN, 0 (those in above_0), or
    negative (but those in any_sign)."""
    for name, value in vars(options).items():
        if not isinstance(value, (int, float)) or name in any_sign:
            continue
        if not 0 <= value < math.inf or (name in above_0 and value == 0):
            least = "above" if name in above_0 else "at least"
            raise UserError(f"{flag_of(name)} {value}: must be {least} 0")


def flag_of(name):
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


NEEDED = "needed"  # the default of an option that has to be given


def parse(options_class, description, argv, notes=(), **defaults):
    """The command line as an instance of a dataclass.

    A field `batch_size: int` is --batch-size N, a bool is a switch, a Literal has choices, and a
    field without a default is no option but an argument (a list: any number of them). A field's
    help is its own or its line in the docstring of a class. notes: {field: text} beside the help.
    """
    parser = new_parser(description)
    help_of = {}
    for owner in options_class.__mro__:
        help_of |= re.findall(r"(?m)^    (\w+) {2,}(.+)$", owner.__doc__)
    weights = parser.add_argument_group("loss; without them, the objective's own")
    for field in dataclasses.fields(options_class):
        group = weights if "help" in field.metadata else parser
        text = field.metadata.get("help") or help_of[field.name]
        choices = typing.get_args(field.type) or None
        kind = str if choices else field.type
        flag = flag_of(field.name)
        default = field.default
        if default is dataclasses.MISSING:
            number = "*" if kind is list else None
            group.add_argument(field.name, nargs=number, choices=choices, help=text)
        elif kind is bool:
            group.add_argument(flag, action="store_true", help=text)
        else:
            note = dict(notes).get(field.name, default)
            needed = default is NEEDED
            if note is not None:
                text = f"{text} ({note})"
            group.add_argument(
                flag, type=kind, default=default, choices=choices, required=needed, help=text
            )
    parser.set_defaults(**defaults)
    return options_class(**vars(parser.parse_args(argv)))


def new_parser(description):
    """An argparse parser that shows a module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
