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
from vlm.logprobs import add_image_features, decoder

LR = 2e-4  # at 1e-3 the mid-size losses explode within six steps, and rounding with them
RECORDS = 3


def prepare(folder, size, objective, device):
    """The run that train.py makes of a world, which is written into the folder if it has none."""
    if not Path(folder, "prefs.jsonl").exists():
        write_world(folder, size, device)
    rank = SIZES[size]["lora_rank"]
    options = train.Options(
        model=str(folder),
        data=f"{folder}/prefs.jsonl",
        device=device,
        objective=objective,
        lora_r=rank,
        lora_alpha=2 * rank,
        cache=f"{folder}/cache",
        out=f"{folder}/out",
    )
    run = train.prepare(options)
    for weights in run.policy.parameters():
        weights.detach().sum()  # mapped from their file: what was never read is not resident yet
    return run


# --- ours, and the published layout ---------------------------------------------------------------


class Rung(NamedTuple):
    """A rung of the ladder; each keeps the savings above it."""

    name: str
    plain: bool = False  # padded sequences, each with a prefix and an image of its own
    all_logits: bool = False  # those of the prompt as well
    cached: bool = False  # is the reference on disk already?


RUNGS = [
    Rung("published: five sequences", plain=True, all_logits=True),
    Rung("+ logits where needed", plain=True),
    Rung("+ image and prompt once"),
    Rung("+ reference cached", cached=True),
]


def rows_of_records(run):
    """For each record its rows, in which every response has RESPONSE tokens."""
    cells, records = run.objective.cells, run.examples.records
    return [build_rows(records[i], run.prompts, cells) for i in range(RECORDS)]


def keep_all(policy):
    """Its MLPs as transformers has them, which keep the gate's activations."""
    for layer in decoder(policy).layers:
        del layer.mlp.forward


def ask_for_all_logits(model, args, inputs):
    return args, inputs | {"logits_to_keep": 0}


class Side:
    """A copy of a run's policy with its own optimiser, and a way to compute the tables."""

    def __init__(self, run, rung, records):
        frozen = {id(p): p for p in run.policy.parameters() if not p.requires_grad}  # not copied
        policy = copy.deepcopy(run.policy, frozen)
        if rung.plain:
            keep_all(policy)
        if rung.all_logits:
            policy.register_forward_pre_hook(ask_for_all_logits, with_kwargs=True)
        options = replace(run.options, no_share_prefix=rung.plain)
        self.run = replace(run, policy=policy, options=options)
        self.rung, self.records = rung, records
        self.keys = [key_of(rows) for rows in records]
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)
        if rung.cached:
            for number in range(len(records)):
                self.tables(number)

    def tables(self, number):
        """The policy's and the reference's; image features of the last time are not kept."""
        rows = [replace(row, features=None) for row in self.records[number]]
        if not self.rung.plain:
            add_image_features(self.run.policy, rows)
        policy = train.policy_table(self.run, rows, 1)
        key = self.keys[number]
        return policy, train.reference_table(self.run, rows, [key], self.rung.cached)

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
