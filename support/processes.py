"""torchrun's processes, and signals. One process is the case world = 1."""

import os
import signal
from collections import Counter

import torch


def start(device):
    """(rank, number of processes, this process's device), able to communicate from here on."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)  # where NCCL gathers what is no tensor
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    return rank, world, device


def add_up(sums):
    """{name: number} added up over all processes."""
    if not torch.distributed.is_initialized():
        return sums
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, sums)
    total = Counter()
    for part in everyone:
        total.update(part)  # not +, which drops what is not positive
    return total


def add_up_gradients(parameters):
    for p in parameters:
        if p.grad is None:  # this process had no usable record
            p.grad = torch.zeros_like(p)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(p.grad)


class StopRequest:
    """Inside the with block, Ctrl-C and SIGTERM only set `.received`: the loop ends by itself."""

    def __enter__(self):
        self.received = False
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.received = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_signals_to_the_parent(worker):
    """For data loading workers, which a signal to the process group would kill."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
