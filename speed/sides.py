"""The sides that are compared: ways to take a step on the same weights and records."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import symmpo
import train
from data import build_rows
from speed.measure import Result, peak_of
from speed.world import SIZES, write_world
from support.reference import key_of
from vlm.load import adapter_off, mixed_precision
from vlm.logprobs import add_image_features, logp_table

LR = 2e-4  # at 1e-3 the mid-size losses explode within six steps, and rounding with them
RECORDS = 3


def prepare(folder, size, objective, device):
    """The run that train.py makes of a world, which is written into the folder if it has none."""
    if not Path(folder, "prefs.jsonl").exists():
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


def rows_of_records(run):
    """For each record its rows, in which every response has RESPONSE tokens."""
    cells, records = run.objective.cells, run.examples.records
    return [build_rows(records[i], run.prompts, cells) for i in range(RECORDS)]


class Side:
    """A copy of a run's policy with its own optimiser, and a way to compute the tables."""

    def __init__(self, run, rung, records):
        frozen = {id(p): p for p in run.policy.parameters() if not p.requires_grad}  # not copied
        self.run = replace(run, policy=copy.deepcopy(run.policy, frozen))
        self.rung, self.records = rung, records
        self.keys = [key_of(rows) for rows in records]
        self.trained = [p for p in self.run.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)
        if rung.cached:
            for number in range(len(records)):
                self.reference_table(self.fresh_rows(number), number)

    def fresh_rows(self, number):
        """A record's rows without the image features of the last time."""
        return [replace(row, features=None) for row in self.records[number]]

    def reference_table(self, rows, number):
        return train.reference_table(self.run, rows, [self.keys[number]], self.rung.cached)

    def tables(self, number):
        """The policy's and the reference's."""
        run, plain, rows = self.run, self.rung.plain, self.fresh_rows(number)
        if plain is None:
            add_image_features(run.policy, rows)
            return train.policy_table(run, rows, 1), self.reference_table(rows, number)
        with mixed_precision(run.policy, run.options.device != "cpu"):
            with torch.no_grad(), adapter_off(run.policy):
                reference = logp_table(run.policy, rows, 1, **plain)
            return logp_table(run.policy, rows, 1, **plain), reference

    def take_step(self, number):
        """One optimiser step on a record: a `Result`."""
        run = self.run
        policy, reference = self.tables(number % len(self.records))
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
    side = Side(run, rung, rows_of_records(run))
    run.policy = None
    return two_steps(side, device)


def two_steps(side, device):
    def work():
        side.take_step(0)
        side.take_step(1)

    return peak_of(work, device)
