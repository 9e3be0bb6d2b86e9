"""Tables 1 and 2 of the paper in miniature: every objective on the tiny world, tuned and repeated.

    python -m notebooks.table                 17 minutes on two cores; resumable
    python -m notebooks.table --out DIR       where the runs, table.md, table.json and table.png go

Each row gets the same tuning budget: four learning rates, one seed, judged on the validation
scenes (the mean of coverage and 100 - CHAIR, greedy). The best rate then trains with three other
seeds, and only those runs see the test scenes. Everything goes through train.py and benchmarks/.
"""

import contextlib
import json
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from support.cli import new_parser

BUILT = Path(__file__).resolve().parent.parent / "tiny" / "built"
ROWS = {  # what differs from the tiny world's preset; None: not trained
    "base": None,
    "SFT": {"objective": "sft"},
    "DPO": {"objective": "dpo"},
    "DPO + AncPO": {"objective": "dpo", "eta": 1.0},
    "mDPO": {"objective": "mdpo"},
    "SymMPO": {},
    "w/o Pair": {"lam": 0.0},
    "w/o Margin": {"gamma": 0.0},
    "w/o AncPO": {"eta": 0.0},
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


class Task(NamedTuple):
    row: str
    rate: float
    seed: int
    split: str  # "tune" on the validation scenes, or "test"
    out: str

    def name(self):
        plain = self.row.replace("/", "").replace(" ", "")
        return f"{plain}-{self.rate:g}-{self.seed}-{self.split}"


def job(task):
    """One run: train (unless it is the base row), then measure; the result is kept as JSON."""
    kept = Path(task.out, f"{task.name()}.json")
    if not kept.exists():
        os.environ["TQDM_DISABLE"] = "1"  # one bar for all runs is enough
        kept.write_text(json.dumps(train_and_measure(task)))
    return json.loads(kept.read_text())


def train_and_measure(task):
    """{benchmark: metrics} of the task's model."""
    from benchmarks.answers import measure
    from benchmarks.common import Settings
    from train import read_options, train

    options = read_options([])  # the tiny world's preset
    for name, value in (ROWS[task.row] or {}).items():
        setattr(options, name, value)
    options.lr, options.seed = task.rate, task.seed
    if ROWS[task.row] is None:
        options.steps, options.lr = 1, 1e-12
    folder = Path(task.out, task.name())
    options.out, options.cache = str(folder), str(Path(task.out, "reference"))
    options.sample_every = 10_000
    options.resume = (folder / "metrics.jsonl").exists()
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        run, _ = train(options)
    run.policy.eval()

    captions = Settings(dimension="g")
    if task.split == "tune":
        found = measure(run.policy, run.prompts, BUILT / "amber_val", settings=captions)
        return {"amber": found["metrics"]}
    result = {}
    for name in ("amber", "hallusionbench", "objhal", "mmstar"):
        result[name] = measure(run.policy, run.prompts, BUILT / name, name)["metrics"]
    sampled = {"settings": captions, "temperature": 1.0, "seed": task.seed}
    found = measure(run.policy, run.prompts, BUILT / "amber", **sampled)
    result["amber T=1"] = found["metrics"]
    result["val"] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return result


def goodness(result):
    """What tuning maximises: coverage and freedom from hallucination, equally (percent)."""
    found = result["amber"]["generative"]
    return (found["Cover"] + 100 - found["CHAIR"]) / 2


def cell(results, column):
    """(mean, spread) of a column over the seeds; the spread is the standard deviation, n - 1."""
    benchmark, keys, _ = COLUMNS[column]
    values = []
    for result in results:
        value = result[benchmark]
        for key in keys:
            value = value[key]
        values.append(value)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), spread


def markdown(table, rates):
    """The table as Markdown, a row for each objective."""
    arrows = {"up": "↑", "down": "↓"}
    headings = [f"{column} {arrows[way]}" for column, (_, _, way) in COLUMNS.items()]
    lines = [f"| | lr | {' | '.join(headings)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row, cells in table.items():
        texts = []
        for mean, spread in cells.values():
            texts.append(f"{mean:.1f} ± {spread:.1f}" if row in rates else f"{mean:.1f}")
        lines.append(f"| {row} | {rates.get(row, '–')} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def draw(table, path):
    """CHAIR against coverage, greedy and at temperature 1: mean and spread of each row."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    colors, axes = colormaps["tab10"], figure.subplots(1, 2)
    for axis, suffix, title in zip(axes, ("", " T=1"), ("greedy decoding", "temperature 1")):
        for i, (row, cells) in enumerate(table.items()):
            (x, dx), (y, dy) = cells["Cover" + suffix], cells["CHAIR" + suffix]
            style = {"fmt": "osDv^*<>P"[i], "ms": 9, "capsize": 3, "color": colors(i)}
            axis.errorbar(x, y, xerr=dx, yerr=dy, label=row, **style)
        axis.set(title=title, xlabel="AMBER coverage (%), more is better")
        axis.set(ylabel="AMBER CHAIR (%), less is better")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--out", default="runs/table", help="folder (default %(default)s)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time")
    args = parser.parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    trained = [row for row in ROWS if ROWS[row] is not None]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        tasks = []
        for row in trained:
            tasks += [Task(row, rate, TUNING_SEED, "tune", args.out) for rate in RATES]
        scores = {}
        for task, result in zip(tasks, tqdm(pool.imap(job, tasks), "tuning", len(tasks))):
            scores[task] = goodness(result)
        rates = {}
        for row in trained:
            rates[row] = max((t for t in tasks if t.row == row), key=scores.get).rate

        tasks = [Task("base", 0.0, SEEDS[0], "test", args.out)]
        for row in trained:
            tasks += [Task(row, rates[row], seed, "test", args.out) for seed in SEEDS]
        results = {row: [] for row in ROWS}
        for task, result in zip(tasks, tqdm(pool.imap(job, tasks), "testing", len(tasks))):
            results[task.row].append(result)

    table = {}
    for row in ROWS:
        table[row] = {column: cell(results[row], column) for column in COLUMNS}
    text = markdown(table, rates)
    (out / "table.md").write_text(text)
    tuning = {f"{task.row} {task.rate:g}": score for task, score in scores.items()}
    found = {"rates": rates, "tuning": tuning, "table": table}
    (out / "table.json").write_text(json.dumps(found, indent=1))
    draw(table, out / "table.png")
    print(text)


if __name__ == "__main__":
    main()
