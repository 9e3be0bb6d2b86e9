"""The sides that are compared: ways to take a step on the same weights and records."""

import copy
from dataclasses import replace
from typing import NamedTuple

import torch

import symmpo
import train
from data import build_rows
from speed.measure import Result, peak_of
from speed.world import SIZES, write_world
from vlm.logprobs import logp_table

LR = 2e-4  # at 1e-3 the mid-size losses explode within six steps, and rounding with them
RECORDS = 3


def prepare(folder, size, objective, device):
    """The run that train.py makes of a world in a folder."""
    write_world(folder, size, device)
    options = train.Options(model=str(folder), data=f"{folder}/prefs.jsonl", device=device)
    options.objective = objective
    options.lora_r = SIZES[size]["lora_rank"]
    options.lora_alpha = 2 * options.lora_r
    options.cache, options.out = f"{folder}/cache", f"{folder}/out"
    return train.prepare(options)


# --- ours, and the published layout ---------------------------------------------------------------


class Rung(NamedTuple):
    """A rung of the ladder; each keeps the savings above it."""

    name: str
    plain: dict | None = None  # options of logp_table; None: train.py's own way
    cached: bool = False  # is the reference on disk already?


RUNGS = [
    Rung("published: five sequences", {"packed": False, "all_logits": True}),
    Rung("+ logits where needed", {"packed": False}),
    Rung("+ image and prompt once"),
    Rung("+ reference cached", cached=True),
]


class Side:
    """A copy of a run's policy with its own optimiser, and a way to compute the tables."""

    def __init__(self, run, rung):
        frozen = {id(p): p for p in run.policy.parameters() if not p.requires_grad}  # not copied
        self.run = replace(run, policy=copy.deepcopy(run.policy, frozen))
        self.rung = rung
        self.trained = [p for p in self.run.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)
        cells, records = run.objective.cells, run.examples.records
        self.rows = [build_rows(records[i], run.prompts, cells) for i in range(RECORDS)]
        if rung.cached:
            for number in range(RECORDS):
                self.reference_table(number)

    def fresh_rows(self, number):
        """A record's rows without the image features of the last time."""
        return [replace(row, features=None) for row in self.rows[number]]

    def reference_table(self, number):
        rows, keys = self.fresh_rows(number), [b"%d" % number]
        return train.reference_table(self.run, rows, keys, use_cache=self.rung.cached)

    def tables(self, number):
        """The policy's and the reference's."""
        run, rows = self.run, self.fresh_rows(number)
        if self.rung.plain is None:
            return train.policy_table(run, rows, 1), self.reference_table(number)
        with torch.autocast("cuda", torch.bfloat16, enabled=run.options.device != "cpu"):
            with torch.no_grad(), run.policy.disable_adapter():
                reference = logp_table(run.policy, rows, 1, **self.rung.plain)
            return logp_table(run.policy, rows, 1, **self.rung.plain), reference

    def take_step(self, number):
        """One optimiser step on a record: a `Result`."""
        run = self.run
        policy, reference = self.tables(number)
        table = symmpo.Table(policy - reference, policy, None)
        terms = symmpo.loss_terms(run.options.objective, table, run.weights)
        loss = sum(terms.values()).mean()
        loss.backward()
        descend(self.trained, self.optimizer)
        symmpo.metrics(table, run.weights)
        return Result(policy.detach(), reference, loss.item())


def descend(trained, optimizer):
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


# --- memory ---------------------------------------------------------------------------------------


def step_memory(rung, folder, size, device):
    """Peak MiB of two SymMPO steps; to be called in a fresh process."""
    run = prepare(folder, size, "symmpo", device)
    side = Side(run, rung)
    run.policy = None
    return two_steps(side, device)


def two_steps(side, device):
    def work():
        side.take_step(0)
        side.take_step(1)

    return peak_of(work, device)
