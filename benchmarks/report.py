"""report.md and report.png: the rows of metrics.json files beside the paper's rows.

(!) marks rows of which more than 2 % of the answers or judgements are empty, cut or unclear.

paper.json has the tables of the SymMPO and mDPO papers, and LLaVA-1.5's POPE. (AMBER's captions
are in the mDPO paper alone, whose MMHal rates are written in percent.)
"""

import math
import statistics
from pathlib import Path

from benchmarks import BENCHMARKS
from benchmarks.common import HERE, read
from support.cli import UserError
from support.files import write_atomically


def write(files, folder, paper=None, differences=False):
    """files: metrics.json files. paper: "7b", "13b", "none", or by the first row's model.
    differences: also how far we are from each published row; for results of one model."""
    results = [read(file) for file in files]
    own = {}
    ours = {}
    models = {result.get("row") or result["name"] for result in results}
    if differences and len(models) > 1:
        raise UserError(f"--differences: for one model, and these are {', '.join(sorted(models))}")
    for result in results:
        name = result.get("row") or result["name"]
        if result["reading"].startswith("no judge"):
            name += " (no judge)"
        if result.get("doubtful"):
            name += " (!)"
        found = row_of(result)
        if not result.get("row") and own.get(name, {}).keys() & found.keys():
            name += f" ({len(own) + 1})"  # another model of this name
        row = own.setdefault(name, {})
        for heading, value in found.items():
            row.setdefault(heading, []).append(value)
        if differences:
            ours |= row
    known = published(paper, results[0].get("model", ""))
    rows = own | known
    headings = {}  # in the order in which they come
    for row in rows.values():
        headings |= dict.fromkeys(row)
    lines = [*table(rows, known, headings, ours), "", *map(made, results)]
    if differences:
        lines += ["", *other_settings(results)]
    text = "\n".join(lines)
    print(text)
    write_atomically(Path(folder, "report.md"), text + "\n")
    if headings:
        draw(rows, headings, Path(folder, "report.png"))


def row_of(result):
    """{"amber CHAIR↓": 7.9, ...} of one metrics.json."""
    row = {}
    for heading, place in BENCHMARKS[result["benchmark"]].COLUMNS.items():
        value = result["metrics"]
        for key in place.split("."):
            value = value.get(key, {})
        if value != {}:
            row[f"{result['benchmark']} {heading}"] = value
    return row


def published(size, model):
    """The paper's rows of a size, or those of the same base model."""
    sizes = read(HERE / "paper.json")
    for known in sizes:
        if size is None and f"llava-1.5-{known}" in model.lower():
            size = known
    return sizes.get(size, {})


def table(rows, known, headings, ours):
    """Lines of Markdown; behind a published value what ours is more than it."""
    lines = [f"| model | {' | '.join(headings)} |", "| --- " + "| ---: " * len(headings) + "|"]
    for name, row in rows.items():
        line = f"| {name} |"
        for heading in headings:
            values = row.get(heading, [])
            line += f" {with_spread(values)}"
            if name in known and heading in ours and values:
                line += f" ({statistics.mean(ours[heading]) - values[0]:+.4g})"
            line += " |"
        lines.append(line)
    return lines


def other_settings(results):
    """Lines: where our answers came about in another way than the published ones."""
    settings = read(HERE / "paper_settings.json")
    lines = []
    for result in results:
        benchmark = result["benchmark"]
        own = {**result, **result.get("decoding", {})}
        expected = settings["all"] | settings.get(benchmark, {})
        for name, published in expected.items():
            value = own.get(name)
            if value != published:
                lines.append(f"- {benchmark}, {name}: ours {value}, published {published}")
    return lines


def with_spread(values):
    """The value, or the mean and the standard deviation (n - 1) of several."""
    if len(values) > 1:
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    return f"{values[0]:.4g}" if values else ""


def made(result):
    """A line: how a row came about."""
    facts = [f"{name}: {value}" for name, value in result.items() if name != "metrics"]
    return "- " + "; ".join(facts)


def draw(rows, headings, path):
    """A panel of bars for each column; a row without a value there has no bar."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot, whose state belongs to a notebook

    colors = colormaps["viridis"].resampled(len(rows)).colors  # readable without colour vision
    figure = Figure(figsize=(1.6 * len(headings) + 4, 3.2), layout="constrained")
    panels = figure.subplots(1, len(headings), squeeze=False)[0]
    for panel, heading in zip(panels, headings):
        heights = [statistics.mean(row.get(heading, [math.nan])) for row in rows.values()]
        panel.bar(range(len(rows)), heights, color=colors, label=list(rows))
        panel.set(title=heading.replace(" ", "\n"), xticks=[], xlim=(-0.6, len(rows) - 0.4))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right")
    figure.savefig(path, dpi=110)
