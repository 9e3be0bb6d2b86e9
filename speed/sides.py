"""The sides that are compared: ways to take a DPO or SymMPO step on the same weights and records."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import symmpo
import train
from data import build_rows
from speed.measure import Result
from speed.world import write_world
from support.cli import UserError
from vlm.logprobs import image_features

LR = 2e-4  # at 1e-3 the mid-size losses explode within six steps, and rounding with them


def five_sequences(policy, rows, few_logits=False, vision_once=False):
    """(3, 3, 1) log-probs from full padded sequences, as published: the model's own forward on
    [image, prompt, response] five times. few_logits: only where responses are predicted.
    vision_once: image features are computed once an image."""
    row_of, responses, cells = [], [], []
    for row in rows:
        row_of += [row] * len(row.responses)
        responses += row.responses
        cells += row.cells
    prefixes = torch.cat([row.inputs["input_ids"] for row in row_of])
    labels = torch.nn.utils.rnn.pad_sequence(responses, True, padding_value=-100)
    labels = labels.to(policy.device)
    prefixes = prefixes.to(policy.device)
    ids = torch.cat([prefixes, labels.clamp(min=0)], dim=1)
    mask = torch.cat([torch.ones_like(prefixes), (labels >= 0).long()], dim=1)
    if vision_once:
        features = {id(row): image_features(policy, row) for row in rows}
        embeds = policy.get_input_embeddings()(ids).clone()
        embeds[ids == policy.config.image_token_id] = torch.cat([features[id(r)] for r in row_of])
        inputs = {"inputs_embeds": embeds}
    else:
        pixels = torch.cat([row.inputs["pixel_values"] for row in row_of])
        inputs = {"input_ids": ids, "pixel_values": pixels.to(policy.device, policy.dtype)}
    keep = labels.shape[1] + 1 if few_logits else 0
    output = policy(**inputs, attention_mask=mask, use_cache=False, logits_to_keep=keep)
    logits = output.logits[:, :-1]
    labels = torch.nn.functional.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)
    logps = logits.float().log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    sums = (logps * (labels >= 0)).sum(1)
    image, response = torch.tensor(cells, device=sums.device).T
    table = torch.full((3, 3, 1), torch.nan, device=sums.device)
    return table.index_put((image, response, torch.zeros_like(image)), sums)


@dataclass
class Rung:
    """A rung of the ladder; each keeps the savings above it."""

    name: str
    table: Callable | None = None  # (policy, rows) -> log-probs; None: train.py's own
    cached: bool = False  # is the reference on disk already?


RUNGS = [
    Rung("published: five sequences", five_sequences),
    Rung("+ logits where needed", lambda policy, rows: five_sequences(policy, rows, True)),
    Rung("+ vision once an image", lambda policy, rows: five_sequences(policy, rows, True, True)),
    Rung("+ prefix shared"),
    Rung("+ reference cached", cached=True),
]


def prepare(folder, size, objective="symmpo"):
    """The run that train.py makes of a world in a folder."""
    write_world(folder, size)
    options = train.Options(
        model=str(folder),
        data=str(Path(folder, "prefs.jsonl")),
        objective=objective,
        lora_r=size.rank,
        lora_alpha=2 * size.rank,
        device="cpu",
        cache=str(Path(folder, "cache")),
        out=str(Path(folder, "out")),
    )
    return train.prepare(options)


class Side:
    """A copy of a run's policy with its own optimiser, and a way to compute the tables."""

    def __init__(self, run, rung):
        frozen = {id(p): p for p in run.policy.parameters() if not p.requires_grad}  # not copied
        self.run = replace(run, policy=copy.deepcopy(run.policy, frozen))
        self.rung = rung
        records = run.examples.records
        self.rows = [build_rows(record, run.prompts, run.objective.cells) for record in records]
        self.trained = [p for p in self.run.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)
        if rung.cached:
            for number in range(len(self.rows)):
                train.reference_table(self.run, self.fresh_rows(number), [b"%d" % number])

    def fresh_rows(self, number):
        """A record's rows without the image features of the last time."""
        return [replace(row, features=None) for row in self.rows[number]]

    def take_step(self, number):
        """One optimiser step on a record: a `Result`."""
        run, rows = self.run, self.fresh_rows(number)
        if self.rung.table is not None:
            with torch.no_grad(), run.policy.disable_adapter():
                reference = self.rung.table(run.policy, rows)
            policy = self.rung.table(run.policy, rows)
        else:
            keys = [b"%d" % number]
            reference = train.reference_table(run, rows, keys, use_cache=self.rung.cached)
            policy = train.policy_table(run, rows, 1)
        table = symmpo.Table(policy - reference, policy, None)
        terms = symmpo.loss_terms(run.options.objective, table, run.weights)
        loss = sum(terms.values()).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        symmpo.metrics(table, run.weights)
        return Result(policy.detach(), reference, loss.item())


def make_trl(run, folder, steps, callback=None, on_gpu=False):
    """TRL's DPOTrainer on the same weights, adapters, records and tokens; UserError without TRL.

    It skips logits that no label needs on a GPU alone: here it does so on the CPU, too. It seeds
    anew before it makes adapters, so ours are copied over, and it adds no end token to records
    with images, so it stands in their text.
    """
    try:
        import datasets
        import trl.trainer.utils
        from transformers import PrinterCallback
    except ImportError as error:
        raise UserError('the comparison with TRL needs it: pip install "trl==1.16.*"') from error
    trl.trainer.utils._use_triton = lambda device: True  # asked there for "skip logits?" alone
    vocabulary = run.policy.config.text_config.vocab_size
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(32768, vocabulary)  # its buffer's width
    prompts = run.prompts
    end = prompts.tokenizer.convert_ids_to_tokens(prompts.end_token)
    lines = []
    for step in range(steps):
        record = run.examples.records[step % 3]
        line = {"images": [str(record["root"] / record["image"])]}
        line["prompt"] = prompts.render(record["prompt"])
        for name in ("chosen", "rejected"):
            line[name] = prompts.separator + record[name] + end
        lines.append(line)
    dataset = datasets.Dataset.from_list(lines)
    options = trl.DPOConfig(
        str(folder),
        per_device_train_batch_size=1,
        max_steps=steps,
        learning_rate=LR,
        weight_decay=0.0,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        beta=run.weights.beta,
        max_length=None,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    policy, run.policy = run.policy, None
    ours = {name: p.clone() for name, p in policy.state_dict().items() if "lora_" in name}
    trainer = trl.DPOTrainer(
        policy.unload(),
        args=options,
        processing_class=prompts.processor,
        train_dataset=dataset.cast_column("images", datasets.List(datasets.Image())),
        peft_config=policy.peft_config["default"],
        callbacks=[callback] if callback else [],
    )
    trainer.remove_callback(PrinterCallback)
    found = trainer.model.load_state_dict(ours, strict=False)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert not found.unexpected_keys and len(trained) == len(ours), "other adapters than ours"
    return trainer
