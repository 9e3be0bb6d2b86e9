"""results.json, results.md and results.png of a table's rows so far; rows.sh calls it.

    python -m papers.collect OUT NAME finished|unfinished PAPER "OPTIONS"

Rows called "LABEL @ X" are points of a line: their figure has X below, a line for each LABEL, and
coverage beside false objects. The others get the report's bars.
"""

import datetime
import os
import platform
import statistics
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.common import read
from support.files import write_atomically, write_json


def collect(out, name, state, paper, options):
    files = list(dict.fromkeys(Path(out, "rows.part").read_text(encoding="utf-8").splitlines()))
    untrained = name == "calibrate"
    report.write(files, out, paper, differences=untrained)
    rows = {}  # label: {column: [a value of each seed]}
    for file in files:
        result = read(file)
        row = rows.setdefault(result["row"], {})
        for column, value in report.row_of(result).items():
            row.setdefault(column, []).append(value)
    facts = {
        "state": state,
        "command": f"python -m papers {name} {options}".strip(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "rates": "each of 1e-4, 3e-4, 1e-3 with seed 100 on validation scenes: the highest "
        "mean of coverage and 100 - CHAIR (tiny world)",
    }
    write_json(Path(out, "results.json"), {**facts, "rows": rows})
    text = Path(out, "report.md").read_text(encoding="utf-8")
    head = "".join(f"- {key}: {value}\n" for key, value in facts.items())
    write_atomically(Path(out, "results.md"), f"# {name}\n\n{head}\n{text}")
    if any(" @ " in label for label in rows):
        draw_lines(rows, Path(out, "report.png"))


def lines_of(rows, sampled):
    """{label: {x: row}} of the rows called "label @ x, lr ..."."""
    lines = {}
    for title, row in rows.items():
        label, at, rest = title.partition(" @ ")
        if at and title.endswith("sampled") == sampled:
            lines.setdefault(label, {})[rest.split(",")[0]] = row
    return lines


def draw_lines(rows, path):
    """CHAIR and coverage over X, greedy above and sampled below: mean and standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for panels, sampled in zip(axes, (False, True)):
        how = "temperature 1" if sampled else "greedy"
        for axis, column in zip(panels, ("amber CHAIR↓", "amber Cover↑")):
            for mark, (label, points) in zip("osD^vP*X", lines_of(rows, sampled).items()):
                means = [statistics.mean(row[column]) for row in points.values()]
                spread = [statistics.pstdev(row[column]) for row in points.values()]
                axis.errorbar(list(points), means, spread, marker=mark, capsize=3, label=label)
            axis.set_title(f"{column}, {how}")
    axes[0, 0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    collect(*sys.argv[1:])
