"""Tables 1 and 2 of the paper in miniature: every objective on the tiny world, tuned and repeated.

    python tiny/table.py                 17 minutes on two cores; resumable
    python tiny/table.py --out DIR       where the runs, table.md, table.json and table.png go

Each row gets the same tuning budget: four learning rates, one seed, judged on the validation
scenes (the mean of coverage and 100 - CHAIR, greedy). The best rate then trains with three other
seeds, and only those runs see the test scenes. Everything goes through train.py and evaluate.py.
"""
import argparse
import contextlib
import json
import multiprocessing
import os
import sys
from pathlib import Path

TINY = Path(__file__).resolve().parent
sys.path.insert(0, str(TINY.parent))
ROWS = {
    "base": None,
    "SFT": ["--objective", "sft"],
    "DPO": ["--objective", "dpo"],
    "DPO + AncPO": ["--objective", "dpo", "--eta", "1"],
    "mDPO": ["--objective", "mdpo"],
    "SymMPO": [],
    "w/o Pair": ["--lam", "0"],
    "w/o Margin": ["--gamma", "0"],
    "w/o AncPO": ["--eta", "0"],
}
RATES, TUNING_SEED, SEEDS = (1e-4, 2e-4, 5e-4, 1e-3), 100, (0, 1, 2)
COLUMNS = {  # heading: (benchmark, keys of its metrics, which way is better)
    "Hallusion qAcc": ("hallusionbench", ("qAcc",), "up"),
    "fAcc": ("hallusionbench", ("fAcc",), "up"),
    "aAcc": ("hallusionbench", ("aAcc",), "up"),
    "ObjHal Resp.": ("objhal", ("response_hallucination",), "down"),
    "Ment.": ("objhal", ("mention_hallucination",), "down"),
    "AMBER Acc": ("amber", ("discriminative", "Accuracy"), "up"),
    "F1": ("amber", ("discriminative", "F1"), "up"),
    "CHAIR": ("amber", ("generative", "CHAIR"), "down"),
    "Cover": ("amber", ("generative", "Cover"), "up"),
    "CHAIR T=1": ("amber T=1", ("generative", "CHAIR"), "down"),
    "Cover T=1": ("amber T=1", ("generative", "Cover"), "up"),
    "MMStar": ("mmstar", ("overall",), "up"),
    "log p(y_w)": ("val", ("eval/logps/chosen",), "up"),
}


def job(task):
    """One run: train (unless it is the base row), then measure; the result is kept as JSON."""
    row, rate, seed, split, out = task
    name = f"{row}-{rate:g}-{seed}-{split}".replace("/", "").replace(" ", "")
    kept = Path(out) / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    os.environ["TQDM_DISABLE"] = "1"  # one bar for all runs is enough
    import train
    from evaluate import measure
    folder = Path(out) / name
    base = ["--steps", "1", "--lr", "1e-12"] if ROWS[row] is None else ["--lr", str(rate)]
    args = train.parse_args([*base, *(ROWS[row] or []), "--seed", str(seed), "--out", str(folder),
                             "--cache", str(Path(out) / "reference"), "--sample-every", "10000"])
    if (folder / "metrics.jsonl").exists():
        args.resume = True
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        run, _ = train.train(args)
    run.policy.eval()
    ask = (run.policy, run.processor, run.fmt)
    if split == "tune":
        result = {"amber": measure(*ask, TINY / "amber_val", dimension="g")["metrics"]}
    else:
        result = {b: measure(*ask, TINY / b, b)["metrics"]
                  for b in ("amber", "hallusionbench", "objhal", "mmstar")}
        result["amber T=1"] = measure(*ask, TINY / "amber", dimension="g", temperature=1.0,
                                      seed=seed)["metrics"]
        result["val"] = train.read_metrics(folder)[-1]
    kept.write_text(json.dumps(result))
    return result


def goodness(result):
    """What tuning maximises: coverage and freedom from hallucination, equally (percent)."""
    found = result["amber"]["generative"]
    return (found["Cover"] + 100 - found["CHAIR"]) / 2


def cell(results, column):
    """(mean, spread) of a column over the seeds; the spread is the standard deviation, n - 1."""
    import statistics
    benchmark, keys, _ = COLUMNS[column]
    values = []
    for result in results:
        value = result[benchmark]
        for key in keys:
            value = value[key]
        values.append(value)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(table, rates):
    """The table as Markdown, a row per objective."""
    arrows = {"up": "↑", "down": "↓"}
    lines = ["| | lr | " + " | ".join(f"{c} {arrows[COLUMNS[c][2]]}" for c in COLUMNS) + " |",
             "|---" * (len(COLUMNS) + 2) + "|"]
    for row, cells in table.items():
        texts = [f"{mean:.1f} ± {spread:.1f}" if rates.get(row) else f"{mean:.1f}"
                 for mean, spread in cells.values()]
        lines.append(f"| {row} | {rates.get(row) or '–'} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def draw(table, path):
    """CHAIR against coverage, greedy and at temperature 1: mean and spread of each row."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors = plt.get_cmap("tab10")
    for axis, suffix, title in zip(axes, ("", " T=1"), ("greedy decoding", "temperature 1")):
        for i, (row, cells) in enumerate(table.items()):
            (x, dx), (y, dy) = cells["Cover" + suffix], cells["CHAIR" + suffix]
            axis.errorbar(x, y, xerr=dx, yerr=dy, fmt="osDv^*<>P"[i], ms=9, capsize=3,
                          color=colors(i), label=row)
        axis.set(title=title, xlabel="AMBER coverage (%), more is better",
                 ylabel="AMBER CHAIR (%), less is better")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main(argv=None):
    from tqdm import tqdm
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/table", help="folder (default %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time")
    args = parser.parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    trained = [row for row, options in ROWS.items() if options is not None]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        tasks = [(row, rate, TUNING_SEED, "tune", args.out) for row in trained for rate in RATES]
        tuned = tqdm(pool.imap(job, tasks), "tuning", len(tasks), unit=" runs")
        scores = dict(zip(tasks, map(goodness, tuned)))
        rates = {row: max((t for t in tasks if t[0] == row), key=scores.get)[1] for row in trained}
        tasks = [(row, rates.get(row, 0.0), seed, "test", args.out) for row in ROWS
                 for seed in (SEEDS if row in rates else SEEDS[:1])]
        results = dict(zip(tasks, tqdm(pool.imap(job, tasks), "testing", len(tasks),
                                       unit=" runs")))
    table = {row: {column: cell([r for t, r in results.items() if t[0] == row], column)
                   for column in COLUMNS} for row in ROWS}
    text = markdown(table, rates)
    Path(args.out, "table.md").write_text(text)
    Path(args.out, "table.json").write_text(json.dumps(
        {"rates": rates, "tuning": {f"{t[0]} {t[1]:g}": v for t, v in scores.items()},
         "table": table}, indent=1))
    draw(table, Path(args.out, "table.png"))
    print(text)


if __name__ == "__main__":
    main()
