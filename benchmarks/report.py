"""report.md and report.png: the rows of metrics.json files beside the paper's rows.

(!) marks rows of which more than 2 % of the answers or judgements are empty, cut or unclear.

paper.json has the tables of the SymMPO and mDPO papers, and LLaVA-1.5's POPE. (AMBER's captions
are in the mDPO paper alone, whose MMHal rates are written in percent.)
"""

import statistics
from pathlib import Path

from benchmarks import BENCHMARKS
from benchmarks.common import HERE, read
from support.files import write_atomically


def write(files, folder, paper=None, differences=False):
    """files: metrics.json files. paper: "7b", "13b", "none", or by the first row's model.
    differences: also how far we are from each published row; for results of one model."""
    results, rows = [read(file) for file in files], {}
    for result in results:
        name, row = result.get("row") or result["name"], row_of(result)
        if result["reading"].startswith("no judge"):
            name += " (no judge)"
        if result.get("doubtful"):
            name += " (!)"
        if not result.get("row") and rows.get(name, {}).keys() & row.keys():
            name += f" ({len(rows) + 1})"  # another model of this name
        for heading, values in row.items():
            rows.setdefault(name, {}).setdefault(heading, []).extend(values)
    known = published(paper, results[0].get("model", ""))
    own, rows = rows, rows | known
    headings = list(dict.fromkeys(heading for row in rows.values() for heading in row))
    lines = table(rows, headings) + [""] + made(results)
    if differences:
        lines += [""] + calibration(own, known) + [""] + other_settings(results)
    text = "\n".join(lines)
    print(text)
    write_atomically(Path(folder, "report.md"), text + "\n")
    draw(rows, headings, Path(folder, "report.png"))


def row_of(result):
    """{"amber CHAIR↓": [7.9], ...} of one metrics.json."""
    row = {}
    for heading, keys in BENCHMARKS[result["benchmark"]].COLUMNS.items():
        value = result["metrics"]
        for key in keys:
            value = value.get(key, {})
        if value != {}:
            row[f"{result['benchmark']} {heading}"] = [value]
    return row


def published(size, model):
    """The paper's rows of a size, or those of the same base model."""
    sizes = read(HERE / "paper.json")
    for known in sizes:
        if size is None and f"llava-1.5-{known}" in model.lower():
            size = known
    return sizes.get(size, {})


def table(rows, headings):
    """Lines of Markdown."""
    lines = [f"| model | {' | '.join(headings)} |", "| --- " + "| ---: " * len(headings) + "|"]
    for name, row in rows.items():
        cells = [with_spread(row.get(heading, [])) for heading in headings]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def calibration(own, known):
    """Lines of Markdown: our numbers and, of each published row, its own and ours minus it."""
    names = "".join(f" | {name}" for name in known)
    lines = [f"| column | ours{names} |", "| --- | ---: " + "| ---: " * len(known) + "|"]
    for row in own.values():
        for heading, (value, *_) in row.items():
            line = f"| {heading} | {value:.4g}"
            for other in known.values():
                published = other.get(heading, [])
                gap = f" ({value - published[0]:+.4g})" if published else ""
                line += f" | {with_spread(published)}{gap}"
            lines.append(line + " |")
    return lines


def other_settings(results):
    """Lines: where our answers came about in another way than the published ones."""
    settings, lines = read(HERE / "paper_settings.json"), []
    for result in results:
        expected = settings["all"] | settings.get(result["benchmark"], {})
        for name, published in expected.items():
            value = result.get(name, result.get("decoding", {}).get(name))
            if value != published:
                lines.append(
                    f"- {result['benchmark']}, {name}: ours {value}, published {published}"
                )
    return lines


def with_spread(values):
    """The value, or the mean and the standard deviation (n - 1) of several."""
    if len(values) > 1:
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
    return f"{values[0]:.4g}" if values else ""


def made(results):
    """A line for each row: how it came about."""
    lines = []
    for result in results:
        facts = [f"{name}: {value}" for name, value in result.items() if name != "metrics"]
        lines.append("- " + "; ".join(facts))
    return lines


def draw(rows, headings, path):
    """A panel of bars for each column."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colors = colormaps["viridis"].resampled(len(rows)).colors  # readable without colour vision
    figure = Figure(figsize=(1.6 * len(headings) + 4, 3.2), layout="constrained")
    for axis, heading in zip(figure.subplots(1, len(headings), squeeze=False)[0], headings):
        heights = [statistics.mean(row.get(heading, [0])) for row in rows.values()]
        axis.bar(range(len(rows)), heights, color=colors, label=list(rows))
        axis.set(title=heading.replace(" ", "\n"), xticks=[])
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right")
    figure.savefig(path, dpi=110)
