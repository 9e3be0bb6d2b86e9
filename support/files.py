"""Reading, writing and locking files so that a crash, a second process or a run that goes on with
other settings spoils nothing."""

import fcntl
import json
import os
from pathlib import Path

from support.cli import UserError


def write_atomically(path, text):
    """A reader never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


def write_json(path, value):
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(path, values):
    write_atomically(path, "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values))


def whole_lines(path):
    """The lines of a JSONL file that an append may have torn: all but an unfinished last one."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("}\n")]


def drop_torn_line(path):
    """Cut off what a killed process left of a last line; returns how many whole lines remain."""
    if not path.exists():
        return 0
    raw = path.read_bytes()
    os.truncate(path, raw.rfind(b"\n") + 1)
    return raw.count(b"\n")


def lock(folder):
    """The folder's open .lock, ours until it is closed."""
    file = open(Path(folder, ".lock"), "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"{folder}: another process is writing into this folder") from error
    return file


def need_same(where, old, new):
    """Refuse what was begun with other settings, both {name: value as in JSON}."""
    for name, value in new.items():
        if old.get(name) != value:
            raise UserError(
                f"{where}: made with other settings ({name} was {old.get(name)!r}, is {value!r}); "
                "give the same, or choose another --out"
            )
