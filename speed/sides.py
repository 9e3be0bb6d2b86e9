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


# --- TRL ------------------------------------------------------------------------------------------


class TRLSide:
    """TRL's DPOTrainer, step by step, with the weights, adapters, records and tokens of a run that
    it takes over.

    It skips logits that no label needs on a GPU alone: here it does so on the CPU, too. It seeds
    anew before it makes adapters, so ours are copied over, and it adds no end token to records
    with images, so it stands in their text.
    """

    def __init__(self, run, folder):
        import datasets
        import trl.trainer.utils

        trl.trainer.utils._use_triton = lambda device: True  # asked there for "skip logits?" alone
        vocabulary = run.policy.config.text_config.vocab_size
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(32768, vocabulary)  # its buffer's width
        prompts = run.prompts
        end = prompts.tokenizer.convert_ids_to_tokens(prompts.end_token)
        lines = []
        for i in range(RECORDS):
            record = run.examples.records[i]
            line = {"images": [str(record["root"] / record["image"])]}
            line["prompt"] = prompts.render(record["prompt"])
            for name in ("chosen", "rejected"):
                line[name] = prompts.separator + record[name] + end
            lines.append(line)
        dataset = datasets.Dataset.from_list(lines)
        dataset = dataset.cast_column("images", datasets.List(datasets.Image()))

        on_cpu = run.options.device == "cpu"
        settings = {"use_cpu": on_cpu, "bf16": not on_cpu, "gradient_checkpointing": False}
        settings |= {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
        settings |= {"beta": run.weights.beta, "max_length": None, "report_to": "none"}
        policy, run.policy = run.policy, None
        ours = {name: p.clone() for name, p in policy.state_dict().items() if "lora_" in name}
        self.trainer = trl.DPOTrainer(
            policy.unload(),
            args=trl.DPOConfig(str(folder), **settings),
            processing_class=prompts.processor,
            train_dataset=dataset,
            peft_config=policy.peft_config["default"],
        )
        found = self.trainer.model.load_state_dict(ours, strict=False)
        self.trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        same_adapters = not found.unexpected_keys and len(self.trained) == len(ours)
        assert same_adapters, "other adapters than ours"
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)
        self.trainer.current_gradient_accumulation_steps = 1
        self.batches = list(self.trainer.get_train_dataloader())
        self.beta, self.run = run.weights.beta, run

    def take_step(self, number):
        loss = self.trainer.training_step(self.trainer.model, self.batches[number])
        descend(self.trained, self.optimizer)
        logged = self.trainer._metrics["train"]
        policy = torch.full((3, 3, 1), torch.nan)
        rho = policy.clone()
        for response, name in ((symmpo.W, "chosen"), (symmpo.L, "rejected")):
            policy[symmpo.M, response] = logged[f"logps/{name}"][-1]
            rho[symmpo.M, response] = logged[f"rewards/{name}"][-1] / self.beta
        return Result(policy, policy - rho, loss.item())


# --- memory ---------------------------------------------------------------------------------------

MEMORY = ("SymMPO, published", "SymMPO, ours", "DPO, TRL", "DPO, ours")


def step_memory(kind, folder, size, device):
    """Peak MiB of two steps; to be called in a fresh process."""
    run = prepare(folder, size, "dpo" if "DPO" in kind else "symmpo", device)
    if kind == "DPO, TRL":
        side = TRLSide(run, folder)
    else:
        side = Side(run, RUNGS[0] if kind == "SymMPO, published" else Rung("ours"))
    run.policy = None

    def two_steps():
        side.take_step(0)
        side.take_step(1)

    return peak_of(two_steps, device)
