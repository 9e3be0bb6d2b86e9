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
from importlib.metadata import version
from pathlib import Path

from benchmarks import report
from benchmarks.common import read
from support.files import write_atomically, write_json

LINES = ["amber CHAIR↓", "amber Cover↑", "amber sampled CHAIR↓", "amber sampled Cover↑"]


def collect(out, name, state, paper, options):
    lines = Path(out, "rows.part").read_text(encoding="utf-8").splitlines()
    titles, files = zip(*[line.split("\t") for line in lines])
    results = [read(file) for file in files]
    rows = rows_of(titles, results)
    facts = {
        "state": state,
        "command": f"python -m papers {name} {options}".strip(),
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join(
            f"{name} {version(name)}" for name in ("torch", "transformers", "peft")
        ),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "rates": "of 1e-4, 3e-4, 1e-3 with seed 100 on validation scenes, the one with the fewest "
        "false objects that keeps four fifths of the coverage (tiny world)",
    }
    write_json(Path(out, "results.json"), {**facts, "rows": rows})
    if name == "calibrate":
        report.write(files, out, paper, differences=True)
        return
    known = report.published(paper, results[0]["model"])
    headings = {}
    for row in rows.values():
        headings |= dict.fromkeys(row)
    known = {name: row for name, row in known.items() if row.keys() & headings}
    table = "\n".join(report.table(rows | known, known, headings, {}))
    text = f"# {name}\n\n"
    for key, value in facts.items():
        text += f"- {key}: {value}\n"
    write_atomically(Path(out, "results.md"), f"{text}\n{table}\n")
    if any(" @ " in label for label in rows):
        draw_lines(rows, Path(out, "results.png"))
    else:
        # Beside rows of the tiny world no other is comparable.
        own = results[0]["model"].endswith("tiny/built/model")
        report.draw(rows if own else rows | known, headings, Path(out, "results.png"))
    if state == "finished":
        print(table)


def rows_of(titles, results):
    """{row: {column: [a value of each seed]}}; sampled captions are columns of their own."""
    rows = {}
    for title, result in zip(titles, results):
        label, sampled, _ = title.partition(", sampled")
        row = rows.setdefault(label, {})
        found = report.row_of(result)
        for kind, value in result["metrics"].get("types", {}).items():
            found[f"mmhal {kind}↑"] = value  # mDPO's Table 5
        for column, value in found.items():
            if sampled:
                column = column.replace("amber", "amber sampled")
            row.setdefault(column, []).append(value)
    return rows


def draw_lines(rows, path):
    """CHAIR and coverage over X, greedy above and sampled below: mean and standard deviation."""
    from matplotlib.figure import Figure

    lines = {}  # label: {x: row}
    for title, row in rows.items():
        label, at, rest = title.partition(" @ ")
        if at:
            lines.setdefault(label, {})[rest.partition(",")[0]] = row
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True).flat
    for axis, column in zip(panels, LINES):
        for mark, (label, points) in zip("osD^vP*X", lines.items()):
            means = [statistics.mean(row[column]) for row in points.values()]
            spread = [deviation(row[column]) for row in points.values()]
            axis.errorbar(list(points), means, spread, marker=mark, capsize=3, label=label)
        if "base" in rows:
            axis.axhline(statistics.mean(rows["base"][column]), color="black", ls=":", label="base")
        axis.set_title(column)
    axis.legend()
    figure.savefig(path, dpi=110)


def deviation(values):
    return statistics.stdev(values) if len(values) > 1 else 0


if __name__ == "__main__":
    collect(*sys.argv[1:])
