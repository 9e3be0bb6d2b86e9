"""Reading, writing and locking files so that a crash or a second process spoils nothing."""

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
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def drop_torn_line(path):
    """Cut off what a killed process left of a last line; returns how many whole lines remain."""
    if not path.exists():
        return 0
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        os.truncate(path, len(whole))
    return whole.count(b"\n")


def lock(folder):
    """The folder's open .lock, ours until it is closed."""
    file = open(Path(folder, ".lock"), "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"{folder}: another process is writing into this folder") from error
    return file
