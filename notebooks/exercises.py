"""Copies of the notebooks for a class, and badges for who publishes them.

    python -m notebooks.exercises --out DIR
    python -m notebooks.exercises --badges https://github.com/OWNER/REPO

--out writes blank copies: where a line ends in "# yours" its right side becomes "...", and what
would tell the answer goes: folded solutions and results, outputs, assertions about what comes out.
The assertions of an exercise stay (in its cell, or with "# checks" behind them): they say whether
what a student writes is right.

--badges writes "Open in Colab" and "Open in Kaggle" under each title, and the address into the
first cell, which clones it there. Run again with another address, it replaces them.
"""

import ast
import json
import re
from pathlib import Path

from support.cli import UserError, new_parser, run_command

HERE = Path(__file__).parent
BLANK = re.compile(r'^(\s*(?:"[^"]*":|[^=#]*[^=<>!]=) )(.*?)(,?)(  # yours.*)$', re.MULTILINE)
FOLDED = re.compile(r"<details>.*?</details>\n*", re.DOTALL)
GITHUB = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?")
ADDRESS = re.compile(r'"SYMMPO_REPOSITORY", "[^"]*"')
COLAB = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
KAGGLE = "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"


def blank(source):
    """A code cell's text without what a student is to write or to find out."""
    lines = source.split("\n")
    asserts = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    for node in sorted(asserts, key=lambda node: -node.lineno):
        kept, line = [], lines[node.lineno - 1]
        if "# yours" in source or "# checks" in line:
            test = ast.get_source_segment(source, node.test)
            _, mark, which = line.partition("  # checks")
            kept = [" " * node.col_offset + f"assert {test}{mark}{which}"]
        lines[node.lineno - 1 : node.end_lineno] = kept
    return BLANK.sub(r"\1...\3\4", "\n".join(lines)).rstrip("\n")


def write_blanks(out):
    """A blank copy of each notebook in the folder out, with none in it yet: a copy is work."""
    out.mkdir(parents=True, exist_ok=True)
    if list(out.glob("*.ipynb")):
        raise UserError(f"{out}: there are notebooks in it already; give another folder")
    for path in notebooks():
        notebook = read(path)
        for cell in notebook["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                cell["source"] = FOLDED.sub("\n", text).strip()
            else:
                cell["source"] = blank(text)
                cell["outputs"], cell["execution_count"] = [], None
        notebook["cells"] = [cell for cell in notebook["cells"] if cell["source"]]
        notebook["metadata"].pop("widgets", None)  # they hold what was printed
        write(out / path.name, notebook)
    print(f"{out}: blank copies; they are run inside a checkout, whose files they use")


def write_badges(address, branch):
    """Badges and the repository's address, in all notebooks, in place."""
    match = GITHUB.fullmatch(address)
    if match is None:
        raise UserError(f"--badges {address}: Colab and Kaggle open https://github.com/OWNER/REPO")
    for path in notebooks():
        notebook = read(path)
        title, setup = notebook["cells"][:2]
        place = f"github.com/{match[1]}/blob/{branch}/notebooks/{path.name}"
        colab = f"{COLAB}(https://colab.research.google.com/{place.replace('.com', '', 1)})"
        kaggle = f"{KAGGLE}(https://kaggle.com/kernels/welcome?src=https://{place})"
        lines = [line for line in title["source"] if not line.startswith(COLAB)]
        title["source"] = [*lines[:1], f"{colab} {kaggle}\n", *lines[1:]]
        known = f'"SYMMPO_REPOSITORY", "https://github.com/{match[1]}"'
        text = ADDRESS.sub(known, "".join(setup["source"]))
        setup["source"] = text.splitlines(keepends=True)
        write(path, notebook)
    print(f"badges for {address}, branch {branch}: commit the notebooks")


def notebooks():
    return sorted(HERE.glob("*.ipynb"))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, notebook):
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv=None):
    parser = new_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder for the blank copies")
    what.add_argument("--badges", metavar="ADDRESS", help="where the project is published")
    parser.add_argument("--branch", help="what the badges open (main)")
    args = parser.parse_args(argv)
    if args.badges:
        write_badges(args.badges, args.branch or "main")
    elif args.branch:
        raise UserError("--branch: only badges name a branch; give it with --badges ADDRESS")
    else:
        write_blanks(args.out)


if __name__ == "__main__":
    run_command(main)
