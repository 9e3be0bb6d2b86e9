"""Tables of the papers: rows trained and evaluated by the commands that you would type yourself.

    python -m papers                                   lists them
    python -m papers symmpo-table2                     on the tiny world, three seeds
    python -m papers symmpo-table2 --model llava-hf/llava-1.5-7b-hf --data prefs.jsonl \\
        --benchmarks DIR                               at full size; DIR has a folder a benchmark
    python -m papers calibrate --model M --benchmarks DIR      is the evaluation as published?

A table is an entry of tables.json: what the paper claims, rows (a label and the options of
train.py, null for the base model), what is evaluated, the published rows, which are subtracted from
ours, and perhaps a recipe: options for full size. What is finished is not run again, so a killed table goes on. On the tiny world each row
has the same budget of learning rates, tried with one seed and judged on validation scenes by the
mean of coverage and 100 - CHAIR; other seeds see the test scenes. At full size it is --lr or the
row's own.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import report
from benchmarks.common import HERE, read
from support.cli import UserError, new_parser, run_command, within
from support.files import write_atomically, write_json

ROOT = Path(__file__).resolve().parent.parent
TABLES = json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))
BUILT = ROOT / "tiny" / "built"
RATES, TUNING_SEED = ("1e-4", "2e-4", "5e-4", "1e-3"), 100  # of the tiny world
VALIDATION = {"amber_val": "--benchmark amber --dimension g"}


def do(args, command, product):
    """Run one of our commands, unless its product is there; --dry-run prints it."""
    command = [str(part) for part in command]
    if product.exists():
        return
    print("python", *command, flush=True)
    if not args.dry_run:
        product.parent.mkdir(parents=True, exist_ok=True)
        with open(product.parent / "log.txt", "a") as log:
            script = ROOT / command.pop(0)
            subprocess.run([sys.executable, script, *command], stdout=log, stderr=log)
        if not product.exists():
            raise UserError(f"it failed: python {script} {shlex.join(command)}; see {log.name}")


def measure(args, label, seed, rate, evaluations):
    """One run of a row, trained and evaluated: {heading: value}."""
    name = f"{label}-{seed}-{rate or 'own'}".replace(" ", "-").replace("/", "")
    out = args.out / name
    model, adapter = args.same, []
    options = args.table["rows"][label]
    if options is not None:
        train = ["train.py", *model, *args.train, *options.split(), "--seed", seed, "--out", out]
        if rate:
            train += ["--lr", rate]
        if (out / "metrics.jsonl").exists():
            train.append("--resume")
        do(args, train, out / "curves.png")
        adapter = ["--adapter", *(sorted(out.glob("checkpoint-*")) or [out / "checkpoint-*"])]
    values = {}
    for name, options in evaluations.items():
        folder, data = out / name, args.benchmarks / name.partition("@")[0]
        if not data.is_dir() or (name == "mmhal" and not args.judge):
            continue  # the table has no such columns
        command = ["evaluate.py", "run", *options.split(), *model, *adapter, *args.judge]
        do(args, [*command, "--data", data, "--out", folder], folder / "metrics.json")
        if not args.dry_run:
            result = read(folder / "metrics.json")
            for heading, value in report.row_of(result).items():
                values[heading.replace(result["benchmark"], name, 1)] = value
    return values


def finish(args, label):
    """{"label", "tuning": {rate: score}, "rate", "runs": [{heading: value} for each seed]}"""
    is_base = args.table["rows"][label] is None
    tuning = {}
    for rate in () if is_base or args.same else RATES:
        found = measure(args, label, TUNING_SEED, rate, VALIDATION)
        if found:
            tuning[rate] = (found["amber_val Cover↑"] + 100 - found["amber_val CHAIR↓"]) / 2
    rate = None if is_base else max(tuning, key=tuning.get, default=args.lr)
    seeds = range(1 if is_base else args.seeds)
    runs = [measure(args, label, seed, rate, args.table["evaluate"]) for seed in seeds]
    return {"label": label, "tuning": tuning, "rate": rate, "runs": runs}


def table_of(args, finished):
    """(lines of Markdown, {row: {heading: mean}}); our rows, the published ones, and differences."""
    means, cells = {}, {label: {"lr": "not done yet"} for label in args.table["rows"]}
    for row in finished:
        label, runs = row["label"], row["runs"]
        means[label], cells[label] = {}, {"lr": row["rate"] or "own"}
        for heading in runs[0]:
            values = [run[heading] for run in runs]
            means[label][heading] = statistics.mean(values)
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells[label][heading] = f"{means[label][heading]:.1f}{spread}"
    for label, name in args.table["published"].items():
        means[name] = read(HERE / "paper.json")[args.table.get("paper", args.paper)][name]
        cells[name] = {heading: f"{value}" for heading, value in means[name].items()}
        ours = means.get(label, {})
        both = ours.keys() & means[name].keys()
        cells[f"{label} - {name}"] = {h: f"{ours[h] - means[name][h]:+.1f}" for h in both}
    headings = list(dict.fromkeys(heading for row in cells.values() for heading in row))
    lines = [f"| | {' | '.join(headings)} |", "|---" * (len(headings) + 1) + "|"]
    for label, row in cells.items():
        lines.append(f"| {label} | {' | '.join(row.get(heading, '') for heading in headings)} |")
    return lines, means


def run(args):
    """Finish one row after the other, and show the table as far as it is."""
    finished = []
    with ThreadPoolExecutor(1 if args.same else os.cpu_count()) as pool:
        for row in pool.map(lambda label: finish(args, label), args.table["rows"]):
            finished.append(row)
            if not args.dry_run:
                lines, means = table_of(args, finished)
                about = f"`python -m papers {shlex.join(args.typed)}`, {time.strftime('%Y-%m-%d')}"
                text = "\n".join([args.table["claim"], "", *lines, "", about, ""])
                write_atomically(args.out / "table.md", text)
                write_json(args.out / "table.json", finished)
                headings = list(row["runs"][0])
                report.draw(means, headings, args.out / "table.png")
    if not args.dry_run:
        print(text)


def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("name", nargs="?", choices=TABLES)
    add("--model", help="model folder or hub name (default: the tiny world's)")
    add("--data", help="preference records, as train.py takes them")
    add("--benchmarks", type=Path, default=BUILT, help="folder with a folder for each benchmark")
    add("--lr", help="at full size: of all rows (default: the row's own)")
    add("--seeds", type=within(1), default=3, help="runs of each row (default 3)")
    add("--paper", choices=("7b", "13b"), default="7b", help="base model of the published rows")
    add("--judge-url", help="as of evaluate.py")
    add("--judge-model")
    add("--out", type=Path, help="default runs/papers/NAME")
    add("--dry-run", action="store_true", help="print the commands alone")
    args = parser.parse_args(argv)
    if args.name is None:
        for name, table in TABLES.items():
            print(f"{name:16} {table['claim']}")
        return
    args.table, args.typed = TABLES[args.name], sys.argv[1:] if argv is None else argv
    args.out = (args.out or Path("runs/papers", args.name)).resolve()
    args.same = ["--model", args.model] if args.model else []
    args.train = ["--data", args.data] if args.data else []
    if args.same:
        args.train += args.table.get("recipe", "").split()
    args.judge = []
    if args.judge_url:
        args.judge = ["--judge-url", args.judge_url, "--judge-model", args.judge_model]
    run_command(run, args)


if __name__ == "__main__":
    main()
