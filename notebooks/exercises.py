"""Blank copies of the notebooks, for a class.

    python -m notebooks.exercises --out DIR

Where a line ends in "# yours" its right side becomes "...", folded solutions and outputs go. An
assertion below each blank says whether what a student writes is right.
"""

import json
import re
from pathlib import Path

from support.cli import new_parser

HERE = Path(__file__).parent
BLANK = re.compile(r'^(\s*(?:"[^"]*":|[^=#]*[^=<>!]=) )(.*?)(,?)(  # yours.*)$', re.MULTILINE)
SOLUTION = re.compile(r"<details>.*?</details>", re.DOTALL)


def blank(source):
    """A cell's text without what a student is to write."""
    return SOLUTION.sub("", BLANK.sub(r"\1...\3\4", source))


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for the copies")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            cell["source"] = blank("".join(cell["source"]))
            if cell["cell_type"] == "code":
                cell["outputs"], cell["execution_count"] = [], None
        (out / path.name).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    print(f"{out}: blank copies; they are run inside a checkout, whose files they use")


if __name__ == "__main__":
    main()
