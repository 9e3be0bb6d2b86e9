"""Command lines: one kind of error for the user's mistakes, and options from a dataclass."""

import argparse
import dataclasses
import math
import re
import sys


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


def option(default, text, choices=None, above_0=False):
    """A field of an options dataclass: its default, what --help says, and whether 0 is refused."""
    about = {"help": text, "choices": choices, "above_0": above_0}
    return dataclasses.field(default=default, metadata=about)


def check_numbers(options, any_sign=()):
    """Refuse numbers of an options dataclass that are negative, infinite, NaN, or 0 where that has
    no meaning. any_sign: names of those that may be negative."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not isinstance(value, (int, float)) or field.name in any_sign:
            continue
        above_0 = field.metadata.get("above_0", False)
        if not 0 <= value < math.inf or (above_0 and value == 0):
            least = "above" if above_0 else "at least"
            raise UserError(f"{flag_of(field.name)} {value}: must be {least} 0")


def flag_of(name):
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


def parse(options_class, description, argv, notes, **defaults):
    """The command line as an instance of a dataclass whose fields are made with `option`.

    A field `batch_size: int` is --batch-size N, and a field of type bool is a switch. Inherited
    fields are shown in a group of their own. notes: {field: text} for its help, beside its own.
    """
    parser = new_parser(description)
    own = parser.add_argument_group("run")
    inherited = parser.add_argument_group("loss", "without them, the objective's own")
    for field in dataclasses.fields(options_class):
        group = own if field.name in options_class.__annotations__ else inherited
        flag, text = flag_of(field.name), field.metadata["help"]
        if field.type is bool:
            group.add_argument(flag, action="store_true", help=text)
            continue
        note = notes.get(field.name, field.default)
        if note is not None:
            text = f"{text} ({note})"
        choices = field.metadata.get("choices")
        group.add_argument(flag, type=field.type, default=field.default, choices=choices, help=text)
    parser.set_defaults(**defaults)
    return options_class(**vars(parser.parse_args(argv)))


def new_parser(description):
    """An argparse parser that shows a module's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def within(low, high=math.inf, kind=int):
    """A type for argparse: a finite number of this kind, from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number
