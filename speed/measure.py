"""Timings that one can trust, memory, and the proof that two sides compute the same."""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from support.cli import UserError


class Spent(NamedTuple):
    wall: float  # seconds
    processor: float


class Result(NamedTuple):
    """What a side computed in one step, before it changed the weights."""

    policy: torch.Tensor  # (3, 3, 1) log-probs in nats
    reference: torch.Tensor
    loss: float


def timed(work):
    """(Spent, what work returned)"""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return Spent(time.perf_counter() - wall, time.process_time() - processor), result


def undisturbed(rounds):
    """[{side: Spent}] -> ([{side: seconds}] of the rounds to keep, a note on them).

    A round in which another job took the core is dropped; when more than half would be, processor
    time is used instead.
    """
    if len(rounds) > 2:
        rounds = rounds[1:]  # the first one warms up
    kept = []
    for times in rounds:
        if all(spent.processor >= 0.9 * spent.wall for spent in times.values()):
            kept.append({name: spent.wall for name, spent in times.items()})
    note = f"{len(kept)} of {len(rounds)} rounds undisturbed"
    if 2 * len(kept) >= len(rounds):
        return kept, f"{note}: wall time"
    seconds = [{name: spent.processor for name, spent in times.items()} for times in rounds]
    return seconds, f"{note}: processor time"


def spread(values):
    """[median, lower quartile, upper quartile]"""
    values = sorted(values)
    if len(values) == 1:
        values = values * 2
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [float(f"{value:.4g}") for value in (middle, low, high)]


def proof(history):
    """Do all sides compute the same? history: for each step a list of `Result`, one a side.

    Returns the largest differences over all steps, how far the loss moved, and how far the swap of
    images moved the reference's log-probs on the side where it did least (records 0 and 2 of
    `write_world`). Raises UserError when the sides differ.
    """
    if len(history) < 3:
        raise UserError("too few steps to compare the sides: --rounds must be 2 or more")
    logp, loss = 0.0, 0.0
    for first, *others in history:
        for other in others:
            logp = max(logp, apart(other.policy, first.policy))
            logp = max(logp, apart(other.reference, first.reference))
            loss = max(loss, abs(other.loss - first.loss))
    losses = [step[0].loss for step in history]
    moved = [apart(a.reference, b.reference) for a, b in zip(history[0], history[2])]
    found = {
        "steps": len(history),
        "max_logp_diff": logp,
        "max_loss_diff": loss,
        "loss_range": [min(losses), max(losses)],
        "image_swap_moves": min(moved),
    }
    same = logp < 0.01 and loss < 1e-3
    sees_the_image = min(moved) > 10 * logp
    trains = max(losses) - min(losses) > 0.01
    if not (same and sees_the_image and trains):
        raise UserError(f"the sides do not compute the same numbers (nats): {found}")
    return found


def apart(a, b):
    """The largest difference; cells that nobody asked for are NaN."""
    return (a - b).nan_to_num().abs().max().item()


def matmul_rate(m, k, n, device="cpu", dtype=None, repeats=6):
    """FLOP/s of one (m, k) x (k, n) product, the median of some; processor time on the CPU."""
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(n, k, device=device, dtype=dtype)

    def work():
        a @ b.T
        synchronise(device)

    work()
    spent = [timed(work)[0] for _ in range(repeats)]
    seconds = [s.processor if device == "cpu" else s.wall for s in spent]
    return 2 * m * k * n / statistics.median(seconds)


def synchronise(device):
    if device != "cpu":
        torch.cuda.synchronize()


# --- memory ---------------------------------------------------------------------------------------


def memory(field):
    """MiB of this process: VmRSS is in memory now, VmHWM was at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 1024


def peak_of(work):
    """MiB that work adds to what is resident, at its highest point."""
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest point so far
    work()
    return round(memory("VmHWM") - before, 1)


def in_new_process(kind, size):
    """MiB of `python -m speed --inside KIND`: a fresh process, in which every freed block of more
    than 128 KiB goes back to the system, so that what is resident is what is in use."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "speed", "--inside", kind, "--size", size]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, env=environment, text=True, capture_output=True, cwd=root)
    if done.returncode:
        raise UserError(f"{kind} in a fresh process: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- results --------------------------------------------------------------------------------------


def machine(command):
    """Where and when figures were measured."""
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": names[0] if names else "",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load": os.getloadavg()[0],
        "command": command,
    }


def markdown(found):
    """The results as Markdown: rows as a table, and a line for each of the rest."""
    lines = []
    for name, part in found.items():
        lines.append(f"\n## {name}\n")
        rows = part.get("rows", [])
        if rows:
            heads = list(rows[0])
            lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for row in rows:
            lines.append("| " + " | ".join(cell(row.get(head, "")) for head in heads) + " |")
        lines.append("")
        lines += [f"- {key}: {json.dumps(value)}" for key, value in part.items() if key != "rows"]
    return "\n".join(lines) + "\n"


def cell(value):
    """[median, quartiles] as "1.0 (0.9-1.1)"."""
    if isinstance(value, list):
        return "{} ({}-{})".format(*value)
    return str(value)
