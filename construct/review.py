"""A page on which a person can look at preference records, before paying for training on them.

    python -m construct.review prefs.jsonl --out report.html

One self-contained file: images, responses with the words marked in which they differ, lengths.
"""

import difflib
import functools
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import RESPONSES
from support.chat import image_url
from support.cli import NEEDED, check_numbers, parse, run_command
from support.images import open_image
from support.records import DataOptions, Records, need_other


@functools.cache
def template(name):
    """A text of prompts/; .render(fields) fills it in."""
    import jinja2

    text = Path(__file__).with_name("prompts").joinpath(name).read_text(encoding="utf-8")
    return jinja2.Template(text, autoescape=name.endswith(".html"), trim_blocks=True)


def words(text):
    return re.findall(r"[\w'-]+", text.lower())


def figures(records):
    """{what: its values} over the records, as far as they have the fields. Word overlap: the share
    of the words of a response and of chosen that the other has, too."""
    found = defaultdict(list)
    for record in records:
        chosen = Counter(words(record["chosen"]))
        length = chosen.total()
        found["chosen: words"].append(length)
        for name in RESPONSES[1:]:
            if name in record:
                other = Counter(words(record[name]))
                ratio = other.total() / max(1, length)
                found[f"{name}: length ratio"].append(ratio)
                shared = 2 * (chosen & other).total()
                overlap = shared / max(1, length + other.total())
                found[f"{name}: word overlap"].append(overlap)
    return found


def spread(values):
    """What the tables show of a figure: min, 5 %, median, 95 %, max."""
    return [f"{value:.3g}" for value in np.quantile(values, (0, 0.05, 0.5, 0.95, 1))]


def marked(text, other):
    """The text in parts: (words, whether the other text has others there)."""
    a = text.split()
    b = other.split()
    # Repetitive words make exact matching cubic: above this length words that come often are left
    # out of the search, which is what difflib does by default.
    is_long = len(a) + len(b) > 2000
    moves = difflib.SequenceMatcher(None, a, b, autojunk=is_long).get_opcodes()
    return [(" ".join(a[i:j]), tag != "equal") for tag, i, j, _, _ in moves if i < j]


def review(args):
    """Write the page, with at most `limit` records, evenly spread over the file."""
    check_numbers(args, above_0=("limit",))
    source = Records(args.data, args.image_root, args.fields)
    need_other(args.out, source)
    records = [{**source.raw(i), **source[i]} for i in range(len(source))]
    step = math.ceil(len(records) / args.limit)
    shown = list(enumerate(records, 1))[::step]
    what = f"{len(shown):,} of {len(records):,} records"

    def picture(record, name):
        image = open_image(record[name], record["root"], args.allow_outside)
        return image_url(image, max_side=480)

    page = template("report.html").render(
        title=f"{Path(args.data).name}: {what}",
        figures=figures,
        spread=spread,
        marked=marked,
        everything=records,
        records=tqdm(shown, desc="report"),
        picture=picture,
    )
    Path(args.out).write_text(page, encoding="utf-8")
    print(f"{args.out}: {what}")


@dataclass
class Options(DataOptions):
    """What is typed.

    out                 the page (.html)
    limit               records shown
    """

    out: str = NEEDED
    limit: int = 100


def main(argv=None):
    run_command(review, parse(Options, __doc__, argv))


if __name__ == "__main__":
    main()
