"""torchrun's processes, and signals. One process is the case world = 1."""

import os
import signal
import threading
from collections import Counter

import torch

from support.cli import UserError


def start(device):
    """(rank, number of processes, this process's device), able to communicate from here on."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)  # where NCCL gathers what is no tensor
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    return rank, world, device


def rank_0s(value):
    """The value of process 0, for all."""
    return gather(value)[0]


def gather(value):
    """[the value of each process]"""
    if not torch.distributed.is_initialized():
        return [value]
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def add_up(sums):
    """{name: number} added up over all processes."""
    total = Counter()
    for part in gather(sums):
        total.update(part)  # not +, which drops what is not positive
    return total


def merged(found):
    """One dict of all processes' dicts."""
    whole = {}
    for part in gather(found):
        whole.update(part)
    return whole


class Shared(UserError):
    """An error that all processes know of: one of them says it."""


def together(function, *args):
    """function(*args) in every process; an error in one ends all, with its message."""
    result, failure = None, None
    try:
        result = function(*args)
    except Exception as error:
        failure = error
    for text in gather(None if failure is None else str(failure)):
        if text is not None and isinstance(failure, UserError | None):
            raise Shared(text) from failure
    if failure is not None:
        raise failure  # nobody's mistake at the keyboard: with its traceback
    return result


def add_up_gradients(parameters):
    for p in parameters:
        if p.grad is None:  # this process had no usable record
            p.grad = torch.zeros_like(p)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(p.grad)


class StopRequest:
    """Inside the with block, Ctrl-C, SIGTERM and a closed terminal (SIGHUP) only set `.received`:
    the loop ends by itself."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __enter__(self):
        self.received, self.before = False, {}
        for number in self.SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        self.received = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def outlive_a_signal(worker):
    """For data loading workers. A signal to the whole process group ends the run only after the
    micro-batch at hand, and they have to live until then; but not longer than three seconds, or a
    parent that fails would wait for them for ever."""

    def end_soon(number, frame):
        timer = threading.Timer(3, os._exit, [0])
        timer.daemon = True  # a worker that ends by itself does not wait for it
        timer.start()

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_soon)
