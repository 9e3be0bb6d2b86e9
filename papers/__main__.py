"""Tables of the papers: rows trained and evaluated by the commands that you would type yourself.

    python -m papers                                   lists them
    python -m papers symmpo-table2                     on the tiny world, three seeds
    python -m papers symmpo-table2 --model llava-hf/llava-1.5-7b-hf --data prefs.jsonl \\
        --benchmarks DIR                               at full size; DIR has a folder a benchmark
    python -m papers calibrate --model M --benchmarks DIR      is the evaluation as published?

A table is an entry of tables.json: what the paper claims, rows (a label and the options of
train.py, null for the base model), what is evaluated, the published rows, which are subtracted from
ours, and perhaps a recipe, options for full size. What is finished is not run again, so a killed
table goes on. On the tiny world each row has the same budget of learning rates, tried with one seed
and judged on validation scenes by the mean of coverage and 100 - CHAIR; other seeds see the test
scenes. At full size it is --lr or the row's own.
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
from benchmarks.common import read
from support.cli import UserError, new_parser, run_command, within
from support.files import write_json

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
    """One run of a row, trained and evaluated: {heading: [value]}."""
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
    """{"label", "tuning": {rate: score}, "rate", "runs": [a dict for each seed]}"""
    is_base = args.table["rows"][label] is None
    tuning = {}
    for rate in () if is_base or args.same else RATES:
        found = measure(args, label, TUNING_SEED, rate, VALIDATION)
        if found:
            cover, chair = found["amber_val Cover↑"][0], found["amber_val CHAIR↓"][0]
            tuning[rate] = (cover + 100 - chair) / 2
    rate = None if is_base else max(tuning, key=tuning.get, default=args.lr)
    seeds = range(1 if is_base else args.seeds)
    runs = [measure(args, label, seed, rate, args.table["evaluate"]) for seed in seeds]
    return {"label": label, "tuning": tuning, "rate": rate, "runs": runs}


def rows_of(args, finished):
    """(our rows and the published ones, their differences): {name: {heading: values}}."""
    rows, differences = {}, {}
    for row in finished:
        name = f"{row['label']}, lr {row['rate']}" if row["rate"] else row["label"]
        rows[name] = {}
        for heading in row["runs"][0]:
            rows[name][heading] = [value for run in row["runs"] for value in run[heading]]
        theirs = args.table["published"].get(row["label"])
        if theirs:
            known = report.published(args.table.get("paper", args.paper))[theirs]
            both = rows[name].keys() & known.keys()
            rows[theirs] = known
            differences[f"{row['label']} - {theirs}"] = {
                heading: [statistics.mean(rows[name][heading]) - known[heading][0]]
                for heading in both
            }
    return rows, differences


def run(args):
    """Finish one row after the other, and show the table as far as it is."""
    finished, labels = [], list(args.table["rows"])
    with ThreadPoolExecutor(1 if args.same else os.cpu_count()) as pool:
        for row in pool.map(lambda label: finish(args, label), labels):
            finished.append(row)
            if args.dry_run:
                continue
            missing = labels[len(finished) :]
            notes = [args.table["claim"]]
            if missing:
                notes.append(f"HALF DONE, without {', '.join(missing)}")
            notes.append(
                f"`python -m papers {shlex.join(args.typed)}`, {time.strftime('%Y-%m-%d')}"
            )
            report.show(*rows_of(args, finished), notes, args.out / "table")
            write_json(args.out / "table.json", finished)


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
