"""Time, memory, and the proof that two sides compute the same."""

import gc
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from support.cli import UserError


class Result(NamedTuple):
    """What a side computed in one step, before it changed the weights."""

    policy: torch.Tensor  # (3, 3, 1) log-probs in nats
    reference: torch.Tensor
    loss: float


def now(device):
    """Seconds. On a CPU the processor time of our one thread, to which other jobs of the machine do
    not add; on a GPU the time on the wall when the GPU is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def spread(values):
    """[median, lower quartile, upper quartile]"""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [float(f"{value:.4g}") for value in (middle, low, high)]


def proof(history, exact=True):
    """Do all sides compute the same? history: for each step a list of `Result`, one a side.

    Returns the largest differences over all steps, how far the loss moved, and how far the swap of
    images moved the reference's log-probs (records 0 and 2 of `write_world`). Raises UserError when
    the sides differ; exact=False leaves that to the reader, since sums in bf16 differ by more.
    """
    logp, loss = 0.0, 0.0
    for first, *others in history:
        for other in others:
            logp = max(logp, apart(other.policy, first.policy))
            logp = max(logp, apart(other.reference, first.reference))
            loss = max(loss, abs(other.loss - first.loss))
    losses = [step[0].loss for step in history]
    moved = min(apart(a.reference, b.reference) for a, b in zip(history[0], history[2]))
    found = {
        "steps": len(history),
        "max_logp_diff": logp,
        "max_loss_diff": loss,
        "loss_range": [min(losses), max(losses)],
        "image_swap_moves": moved,
    }
    same = logp < 0.01 and loss < 1e-3
    trains = max(losses) - min(losses) > 0.01
    if exact and not (same and trains and moved > 10 * logp):
        raise UserError(f"the sides do not compute the same numbers (nats): {found}")
    return found


def apart(a, b):
    """The largest difference; cells that nobody asked for are NaN."""
    return (a - b).nan_to_num().abs().max().item()


# --- memory ---------------------------------------------------------------------------------------


def resident(field):
    """MiB of this process: VmRSS is in memory now, VmHWM was at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 1024


def peak_of(work, device="cpu"):
    """MiB that work adds at its highest point: to what is resident, or on the GPU to what is
    allocated."""
    gc.collect()
    if device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest point so far
    work()
    return round(resident("VmHWM") - before, 1)


def in_new_process(function, *args):
    """What function(*args) returns in a fresh process, in which every freed block of more than
    128 KiB goes back to the system, so that what is resident is what is in use."""
    os.environ.update(MALLOC_MMAP_THRESHOLD_="131072", OMP_NUM_THREADS="1")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()
