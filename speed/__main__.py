"""Speed and memory of the SymMPO step, side by side with its published layout.

    python -m speed --quick --json        small model, about a minute on two cores; JSON at the end
    python -m speed                       the mid-size model: the tables of docs/speed.md
    python -m speed --cuda --size 7b      the same at full size in bf16 on a GPU

What is compared, at LLaVA-1.5's token counts:
- ladder: the SymMPO step against its published layout (five padded sequences, logits at every
  position, the vision tower for each sequence, the reference in each step), one saving at a time;
- memory: what a step adds to the resident set of a fresh process.

On a GPU also what tests/on_gpu.py has: the card's rates, attention in segments against the mask,
lengths that change, TRL's DPOTrainer where it is installed.

How: one thread, random weights, the sides take turns in one process. Seconds are processor time (on
a GPU, time on the wall). Ratios are medians over rounds with their quartiles, and stand beside the
proof that both sides compute the same numbers.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from speed import measure
from speed.measure import spread
from speed.sides import RUNGS, Rung, Side, prepare, rows_of_records, step_memory
from speed.world import SIZES
from support.cli import UserError, parse, run_command

EPOCHS = 4  # over which the cost of the cached reference is spread


def compare(sides, rounds, device):
    """The sides take turns, once more than rounds, since the first call is not like the others:
    their seconds in each, and the proof that they compute the same."""
    times, history = [], []
    for number in range(rounds + 1):
        seconds, results = {}, []
        for name, side in sides.items():
            start = measure.now(device)
            results.append(side.take_step(number))
            seconds[name] = measure.now(device) - start
            print(f"{name}: {seconds[name]:.4g} s", file=sys.stderr)  # if a later one fails
        times.append(seconds)
        history.append(results)
    return times, measure.proof(history, exact=device == "cpu")


def ratios(times):
    """A row for each side: the seconds of its first call and of the later ones, and how many times
    faster these are than the first side's."""
    rows = []
    warm, *later = times
    first, *_ = warm
    for name in warm:
        seconds = [t[name] for t in later]
        faster = [t[first] / t[name] for t in later]
        rows.append(
            {
                "step": name,
                "first call": warm[name],
                "seconds": spread(seconds),
                "ratio": spread(faster),
            }
        )
    return rows


def ladder(size, folder, rounds, device):
    """The SymMPO step, one saving at a time."""
    run = prepare(folder, size, "symmpo", device)
    records = rows_of_records(run)
    sides = {rung.name: Side(run, rung, records) for rung in RUNGS}
    times, proof = compare(sides, rounds, device)
    *_, shared, cached = sides
    for seconds in times:  # the cached reference costs one forward pass in EPOCHS epochs
        seconds[cached] += (seconds[shared] - seconds[cached]) / EPOCHS
    rows = ratios(times)
    figures = {
        "five_sequence_time_ratio": rows[-1]["ratio"][0],
        "max_logp_diff": proof["max_logp_diff"],
    }
    return [*rows, proof], figures


def memory(size, folder, rounds, device):
    """What the sides' steps add to the memory of a fresh process, MiB."""
    rows = []
    for rung in (RUNGS[0], Rung("ours")):
        mib = measure.in_new_process(step_memory, rung, folder, size, device)
        rows.append({"step": rung.name, "MiB": mib})
    published, ours = rows
    return rows, {"five_sequence_memory_ratio": published["MiB"] / ours["MiB"]}


# --- command line ---------------------------------------------------------------------------------

SUMMARY = "five_sequence_time_ratio five_sequence_memory_ratio max_logp_diff"
PARTS = {"ladder": ladder, "memory": memory}


@dataclass
class Options:
    """What is typed.

    quick               small model, few rounds
    json                the summary as the last line
    only                some parts: ladder, memory
    cuda                on a GPU, in bf16
    size                if not given, quick with --quick, else mid
    rounds              timed rounds; if not given, 3 with --quick, else 9
    """

    quick: bool = False
    json: bool = False
    only: str.split = "ladder memory"
    cuda: bool = False
    size: Literal[*SIZES] = None
    rounds: int = None


def main(argv=None):
    args = parse(Options, __doc__, argv)
    size, rounds = ("quick", 3) if args.quick else ("mid", 9)
    if args.size:
        size = args.size
    if args.rounds is not None:
        rounds = args.rounds
    if not set(args.only) <= PARTS.keys():
        raise UserError(f"--only: the parts are {', '.join(PARTS)}")
    if rounds < 2:
        raise UserError(f"--rounds {rounds}: two are needed for a spread")
    if args.cuda and not torch.cuda.is_available():
        raise UserError("--cuda: PyTorch finds no CUDA GPU here")
    torch.set_num_threads(1)
    device = "cuda" if args.cuda else "cpu"
    parts = {name: PARTS[name] for name in args.only}
    if args.cuda:
        from tests import on_gpu

        parts |= on_gpu.PARTS
    processor = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].split("\n")[0]
    print(f"{time.ctime()}, torch {torch.__version__}, {processor}", *sys.argv[1:])
    summary = dict.fromkeys(SUMMARY.split())  # null where a part did not run
    with tempfile.TemporaryDirectory() as folder:
        for name, part in parts.items():
            print(f"\n## {name}\n", flush=True)
            rows, figures = part(size, folder, rounds, device)
            summary |= figures
            for row in rows:
                print("-", json.dumps(row), flush=True)
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    run_command(main)
