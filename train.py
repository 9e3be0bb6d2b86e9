"""Train a vision-language model with SymMPO or a baseline: LoRA, frozen reference, one loop.

    python train.py                                                   the bundled tiny world
    python train.py --model llava-hf/llava-1.5-7b-hf --data prefs.jsonl        your own data

To fork it for a new objective, write the objective in symmpo.py; nothing here has to change. The
order of this file is the order of time: options, policy and reference, verify, the loop.

Departures from the paper and its published code: LoRA instead of the whole language model; no
dropout, since dropout in the policy and not in the reference is noise in every log-ratio (published
LoRA script: 0.05, at a rate of 5e-7); a record that does not fit --max-length is refused, not cut.
"""

import dataclasses
import json
import math
import os
import shlex
import sqlite3
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import symmpo
from data import Example, Examples, held_out, look_at_pairs, read_ahead
from support.checkpoint import RunFolder, means
from support.cli import UserError, check_numbers, parse, run_command
from support.reference import ReferenceCache
from support.signals import StopRequest
from vlm.exact import need_packable, need_same
from vlm.generate import generate
from vlm.load import adapter_off, add_lora, config_hash, fingerprint, load_model, mixed_precision
from vlm.logprobs import add_image_features, logp_table, response_lengths
from vlm.prompts import Prompts, prompts_for

TINY = Path(__file__).resolve().parent / "tiny"

# --- options --------------------------------------------------------------------------------------


ABOVE_0 = "epochs batch_size micro_batch lr clip lora_r max_length sample_every save_every".split()


@dataclasses.dataclass
class Options(symmpo.Weights):
    """Every knob. The weights of the loss (beta, lam, ...) are inherited; one that is not given is
    the objective's own. Where each default comes from: docs/design.md.

    Each field is an option of the command line, its line here the help. From a notebook:
    `train(Options(model=..., data=..., steps=100))`.

    model               model folder or hub name; without it, the bundled tiny world
    data                record file, folder of them, or quoted glob (docs/data.md)
    image_root          folder where image paths start, if not the data file's
    fields              names in the file: prompt=instruction,chosen=good,image=img_path
    objective           the loss
    out                 folder for this run; if not given, runs/OBJECTIVE-DATE-TIME
    epochs              passes over the data
    steps               optimiser steps; 0: as many as --epochs needs
    batch_size          records per optimiser step
    micro_batch         records per forward pass; memory grows with it
    lr                  peak learning rate; cosine decay to 0
    warmup              share of the steps with a linearly rising rate
    weight_decay        AdamW's decoupled decay of the adapter weights
    clip                largest norm of the gradient
    seed                of data order, adapter initialisation and crops
    lora_r              rank of the adapters
    lora_alpha          the adapters' output is scaled by alpha / r
    lora_dropout        0, since the reference has none
    max_length          tokens of image, prompt and response
    prompt_format       auto: vicuna for LLaVA-1.5
    square              pictures, for vlm.convert's models
    dtype               of the base; auto: bf16 on CUDA
    load_4bit           NF4 base weights (CUDA, bitsandbytes): for cards of 24 GB
    device              auto: CUDA when there is one
    grad_checkpointing  less memory, a third slower
    no_share_prefix     plain padded sequences, for models that cannot pack
    eval_data           held-out records: loss, accuracy and samples while training
    sample_every        steps between held-out evaluations
    save_every          steps between checkpoints; the last is saved
    resume              go on with the run in --out from its last checkpoint
    skip_bad            leave unusable records out and list them at the end
    allow_outside       permit image paths that leave the data file's folder
    cache               folder of the reference's log-probs
    workers             processes that read ahead of the step; if not given, 2 on CUDA
    """

    # what
    model: str = None
    data: str = None
    image_root: str = None
    fields: str = None
    objective: Literal[*symmpo.OBJECTIVES] = "symmpo"
    out: str = None
    # loop
    epochs: float = 2.0
    steps: int = 0
    batch_size: int = 64
    micro_batch: int = 1
    lr: float = 5e-6
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    # model
    lora_r: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.0
    max_length: int = 2048
    prompt_format: Literal["auto", "vicuna", "chat"] = "auto"
    square: Literal["auto", "pad", "crop"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    load_4bit: bool = False
    device: Literal["auto", "cuda", "cpu"] = "auto"
    grad_checkpointing: bool = False
    no_share_prefix: bool = False
    # run
    eval_data: str = None
    sample_every: int = 50
    save_every: int = 50
    resume: bool = False
    skip_bad: bool = False
    allow_outside: bool = False
    cache: str = "~/.cache/symmpo"
    workers: int = None

    def check(self):
        """Refuse values without a meaning, and settle those that were not given."""
        check_numbers(self, ABOVE_0, any_sign=("delta", "seed"))
        if self.warmup >= 1 or self.lora_dropout >= 1:
            raise UserError("--warmup and --lora-dropout must be below 1")
        if not self.data:
            raise UserError("--data is missing: the preference records to train on")
        if not self.model:
            raise UserError("--model is missing: the bundled one knows only its own tiny world")
        if self.resume and not self.out:
            raise UserError("--resume needs --out, the folder of the run to go on with")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise UserError("one process trains, on one GPU; give each GPU a run of its own")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no CUDA GPU here")
        self.weights()  # refuses those that the objective does not read

        # What was left open is settled here, once, so that what is printed is what is used.

        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.load_4bit and self.device == "cpu":
            raise UserError("--load-4bit needs a CUDA GPU (and pip install bitsandbytes)")
        if self.dtype == "auto":
            self.dtype = "float32" if self.device == "cpu" else "bfloat16"
        if self.workers is None:
            self.workers = 0 if self.device == "cpu" else 2
        self.out = self.out or f"runs/{self.objective}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.cache = os.path.expanduser(self.cache)
        if self.cache.startswith("~"):
            raise UserError(f"--cache {self.cache}: there is no home folder; name a folder")

    def weights(self):
        """The objective's weights, each replaced by its option where one is given."""
        names = [weight.name for weight in dataclasses.fields(symmpo.Weights)]
        try:
            return symmpo.weights_of(self.objective, {name: getattr(self, name) for name in names})
        except ValueError as error:
            raise UserError(f"--{error}") from error


# What a resumed run may set anew; any other option is another run.
MAY_CHANGE = "resume out save_every sample_every workers cache device".split()
MAY_CHANGE += ["skip_bad", "max_length", "allow_outside"]  # what messages advise

# --- policy and reference -------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What the loop works with. Policy and reference are the same weights: LoRA on and off."""

    options: Options
    objective: symmpo.Objective
    weights: symmpo.Weights
    policy: torch.nn.Module
    prompts: Prompts
    cache: ReferenceCache
    examples: Examples
    held_out: list  # of Example
    samples: list  # held-out (prompt, image), answered now and then for people to see
    identity: dict  # what makes it this run and no other
    left_out: dict = dataclasses.field(default_factory=dict)  # {why: record number}


def prepare(options):
    """Load and check everything, so that what is wrong is said before a step is paid for."""
    options.check()
    torch.manual_seed(options.seed)
    examples = Examples(options.data, None, options)  # opened only: records are read when needed
    if options.steps == 0:
        steps_per_epoch = math.ceil(len(examples) / options.batch_size)
        options.steps = math.ceil(steps_per_epoch * options.epochs)

    dtype = getattr(torch, options.dtype)
    model, processor = load_model(options.model, options.device, dtype, options.load_4bit)
    if model.num_parameters() < 10e6:
        torch.set_num_threads(1)  # matrices too small to be shared between threads
    if not options.no_share_prefix:
        need_packable(model, options.max_length)
    examples.prompts = prompts_for(model.config, processor, options.prompt_format, options.square)

    left_out = {}
    held, samples = held_out(options.eval_data, examples.prompts, options, left_out)

    # A reference cache belongs to weights, architecture, precision and device: log-probs of equal
    # tokens differ a little between devices, and rho must be 0 at the start.
    base, weights = fingerprint(options.model), options.weights()
    kind = f"{options.dtype}{'-nf4' if options.load_4bit else ''}-{options.device.split(':')[0]}"
    cache = f"{base}-{config_hash(model)}-{kind}.sqlite"

    # What a checkpoint is checked against: resuming with another rate would be another run.
    identity = dataclasses.asdict(options) | dataclasses.asdict(weights)
    for name in MAY_CHANGE:
        del identity[name]
    identity |= {"base": base, "format": examples.prompts.form, "records": len(examples)}

    # The adapter's output starts at 0 (its B is 0), so the policy starts as the reference.
    lora = options.lora_r, options.lora_alpha, options.lora_dropout
    policy = add_lora(model, *lora, options.grad_checkpointing)
    return Run(
        options=options,
        objective=symmpo.OBJECTIVES[options.objective],
        weights=weights,
        policy=policy,
        prompts=examples.prompts,
        cache=ReferenceCache(Path(options.cache, cache)),
        examples=examples,
        held_out=held,
        samples=samples,
        identity=identity,
        left_out=left_out,
    )


def policy_table(run, rows, records):
    """(3, 3, records) log-probs, nats, of whatever the adapter makes of the model now.

    With the adapter on this is log pi_theta, with gradients; `reference_table` calls it with the
    adapter off. One function for both, so that they cannot differ in anything else.
    """
    options = run.options
    # On a GPU the adapters (fp32) run in bf16. Rows are packed into one sequence until it is long
    # enough to be worth a forward pass: of a LLaVA-1.5 on a CPU, each row is.
    on_cuda = options.device != "cpu"
    tokens_per_forward = 4096 if on_cuda else 512
    mixed = on_cuda and options.dtype == "bfloat16"
    with mixed_precision(run.policy, mixed, options.grad_checkpointing):
        packed = not options.no_share_prefix
        return logp_table(run.policy, rows, records, packed, tokens_per_forward)


def reference_table(run, rows, keys, use_cache=True):
    """The same with the adapter off: the frozen reference. Each record is computed once, ever.

    keys: for each record a hash of all that the model sees of it.
    """
    tables = {}  # key: (3, 3) log-probs, NaN in the cells that the objective does not read
    if use_cache:
        tables = {key: run.cache.get(key) for key in keys}
    new = [row for row in rows if tables.get(keys[row.record]) is None]
    if new:
        with torch.no_grad(), adapter_off(run.policy):
            computed = policy_table(run, new, len(keys)).cpu()  # (3, 3, records)
        for record in {row.record for row in new}:
            tables[keys[record]] = computed[:, :, record]
        if use_cache:
            run.cache.put({key: tables[key] for key in keys})
    table = torch.stack([tables[key] for key in keys], dim=-1)
    return table.to(run.options.device, non_blocking=True)


def loss_table(run, examples, use_cache=True):
    """All that the loss sees of a micro-batch: a symmpo.Table.

    This is where rho comes from: log pi_theta - log pi_ref, cell by cell. An objective without a
    reference (SFT) gets NaN for rho, and would notice if it read any.
    """
    rows, keys = rows_of(examples)
    if not run.options.no_share_prefix:
        add_image_features(run.policy, rows)  # of the frozen tower: once for both tables
    policy = policy_table(run, rows, len(keys))  # (3, 3, records)
    reference = torch.full_like(policy, math.nan)
    if run.objective.reference:
        reference = reference_table(run, rows, keys, use_cache)
    lengths = response_lengths(rows, len(keys)).to(policy.device, non_blocking=True)
    return symmpo.Table(policy - reference, policy, lengths)


def rows_of(examples):
    """All rows of a micro-batch, each with its record's place in it, and the records' keys."""
    rows = []
    for place, example in enumerate(examples):
        rows += [dataclasses.replace(row, record=place) for row in example.rows]
    return rows, [example.key for example in examples]


def compute_loss(run, examples, use_cache=True):
    """A micro-batch's losses, (records,) in nats, and the table that they are of.

    Nothing is averaged yet: the loop sums over micro-batches, and divides once.
    """
    table = loss_table(run, examples, use_cache)
    terms = symmpo.loss_terms(run.options.objective, table, run.weights)
    return sum(terms.values()), table


@torch.no_grad()
def sums_of_metrics(run, tables):
    """{name: sum over all records of the tables}.

    Computed on the host, and once a step: whoever looks at a number on a GPU waits until all that
    was asked of the GPU is done.
    """
    table = symmpo.Table(*[torch.cat(parts, dim=-1).cpu() for parts in zip(*tables)])
    terms = symmpo.loss_terms(run.options.objective, table, run.weights)
    metrics = symmpo.metrics(table, run.weights)
    metrics |= {f"loss/{name}": term for name, term in terms.items()}
    metrics["loss"] = sum(terms.values())
    return {name: values.double().sum().item() for name, values in metrics.items()}


# --- verify ---------------------------------------------------------------------------------------


def verify(run, example, start):
    """Before the loop, on one record: at the very start, where the adapter is zero, policy =
    reference and the loss is its closed form; sharing the prefix changes nothing; and the cache
    holds what this model computes. That comes last, since nothing wrong must get into it."""
    if not run.objective.reference:
        print(f"step {start:<7}{run.options.objective} reads no reference: nothing to compare")
    elif start == 0:
        verify_start(run, example)
    if not run.options.no_share_prefix:
        verify_sharing(run, example, start)
    if run.objective.reference:
        verify_cache(run, example)


def verify_sharing(run, example, start):
    rows, keys = rows_of([example])
    apart = dataclasses.replace(run, options=dataclasses.replace(run.options, no_share_prefix=True))
    # Of the reference: the adapter's dropout is not what this is about.
    shared = reference_table(run, rows, keys, use_cache=False)
    plain = reference_table(apart, rows, keys, use_cache=False)
    what = "with a shared prefix and without it, log-probs"
    off = need_same(shared, plain, rows, run.options.dtype, what)
    print(f"step {start:<7}sharing the prefix changes log-probs by {off:.1g} nats")


def verify_start(run, example):
    loss, table = compute_loss(run, [example], use_cache=False)  # as the loop does
    what = "before the first step, policy and reference"
    zero = torch.zeros_like(table.rho)
    rho = need_same(table.rho, zero, example.rows, run.options.dtype, what)
    expected = symmpo.loss_at_start(run.options.objective, run.weights)
    if loss.isnan():
        raise UserError(f"{run.options.objective} reads cells of the table that it does not list")
    closed_form = "no closed form" if expected is None else f"closed form {expected:.6f}"
    print(f"step 0      rho = 0 within {rho:.1g} nats, loss {loss.item():.6f}, {closed_form}")


def verify_cache(run, example):
    """Refuses a cache that has other log-probs for this record than are computed now."""
    rows, keys = rows_of([example])
    fresh = reference_table(run, rows, keys, use_cache=False)
    cached = reference_table(run, rows, keys)
    what = f"the reference and its cache (delete {run.options.cache})"
    need_same(fresh, cached, rows, run.options.dtype, what)


def say_hello(run, start):
    """What this run is, before it starts: every number printed is the one that is used.

    A prompt and its labels are shown as the model reads them, since a wrong template or a missing
    end token ruins a run without a word. The record is the first step's one with the longest
    responses: in single words a response that sees another one would not be noticed.
    """
    options, count = run.options, run.policy.num_parameters
    weights = ", ".join(f"{name} {getattr(run.weights, name)}" for name in run.objective.weights)
    epochs = options.steps * options.batch_size / len(run.examples)
    parts = {n.split(".layers.")[0] for n, p in run.policy.named_parameters() if p.requires_grad}
    lines = [
        f"model       {options.model}, {count():,} parameters, {options.dtype} on {options.device}",
        f"trained     {count(only_trainable=True):,} parameters in {', '.join(parts)}; LoRA rank "
        f"{options.lora_r}, alpha {options.lora_alpha}, dropout {options.lora_dropout:g}",
        f"data        {options.data}, {len(run.examples):,} records",
        f"objective   {options.objective}, {weights or 'no weights'}",
        f"steps       {options.steps} of {options.batch_size} records in micro-batches of "
        f"{options.micro_batch}, {epochs:.2f} epochs, lr {options.lr:g}, warm-up "
        f"{options.warmup:g}, seed {options.seed}",
        f"output      {options.out}",
    ]
    print("\n".join([*lines, *look_at_pairs(run.examples.records)]))
    longest = Example(number=-1)
    for number in run.examples.of_step(start):
        example = run.examples[number]
        if example.response_tokens() > longest.response_tokens():
            longest = example
    if longest.rows:
        print(run.prompts.describe(longest.rows[0]))
        verify(run, longest, start)


# --- the loop -------------------------------------------------------------------------------------


def train(options):
    """Train; returns the run and how many steps are done.

    One step: gradients of its records, summed over micro-batches; the mean; clip; AdamW. Everything
    random in it comes from the seed and the step, so that a run that was stopped goes on to the
    same numbers.
    """
    run = prepare(options)
    folder = RunFolder(options.out, options.resume)
    parameters = [p for p in run.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    done = start = folder.load(run, optimizer)
    used, whole = 0, True  # records of this run; is the adapter that of a whole step?
    say_hello(run, start)
    batches = read_ahead(run.examples, start)
    bar = tqdm(total=options.steps, initial=start, unit="step", disable=None)

    with StopRequest() as stop, bar:
        try:
            for step in range(start, options.steps):
                began = time.time()
                # Randomness (LoRA's dropout) by step: resuming needs no other state.
                torch.manual_seed(options.seed * 10**9 + step * 10**4)
                lr = learning_rate(step, options)
                optimizer.param_groups[0]["lr"] = lr

                # Gradients of the sum of the losses, micro-batch after micro-batch.
                totals, numbers, tables = forward_and_backward(run, batches, step, stop)
                if totals["stop"]:
                    break  # a resumed run takes this step from its beginning
                used += totals["records"]
                if not totals["records"]:
                    done = step + 1
                    continue  # all were left out

                # The mean over the records that there really were; clip; one step of AdamW.
                for p in parameters:
                    p.grad /= totals["records"]
                norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip)
                totals.update(sums_of_metrics(run, tables))
                norm = norm.item()
                # A NaN would spread into the adapter with this step: stop while it is still whole.
                if not math.isfinite(totals["loss"] + norm):
                    raise UserError(
                        f"step {step}: loss {totals['loss']:g}, gradient norm {norm:g}, at record "
                        f"numbers {sorted(numbers)} (from 0); the state before this step is in "
                        f"{folder.path / f'checkpoint-{step}'}"
                    )
                whole = False  # until all weights have taken the step
                optimizer.step()
                optimizer.zero_grad()
                done, whole = step + 1, True

                # Log, look at held-out records, save.
                line = {"step": done, "lr": lr, "grad_norm": norm}
                line |= means(totals, time.time() - began)
                if done % options.sample_every == 0 or done == options.steps:
                    line |= evaluate_held_out(run)
                folder.log(line)
                if done % options.save_every == 0:
                    folder.save(done, run, optimizer)
                show(bar, line)
        except Exception:  # a bad record, no memory, a dead worker: costs no finished work
            if used and whole:
                folder.save(done, run, optimizer)
            raise
    if run.left_out and not used:
        raise UserError(f"no usable record; look with `python data.py check {options.data}`")
    folder.save(done, run, optimizer)
    folder.plot()
    return run, done


def learning_rate(step, options):
    """Linear warm-up, then half a cosine down to 0.

    A function of the step alone: a resumed run needs no scheduler's state.
    """
    warm = max(1, round(options.warmup * options.steps))
    if step < warm:
        return options.lr * (step + 1) / warm
    progress = (step - warm) / max(1, options.steps - warm)
    return options.lr * (1 + math.cos(math.pi * progress)) / 2


def forward_and_backward(run, batches, step, stop):
    """One step's gradients: (counts, record numbers, the micro-batches' tables).

    The loss is a sum over records, so that gradients add up over micro-batches; the mean is taken
    once, in the loop, by the number of records there really were.
    """
    totals, numbers, tables = Counter(), [], []
    steps_per_epoch = math.ceil(len(run.examples) / run.options.batch_size)
    is_new_epoch = step > 0 and step % steps_per_epoch == 0
    records = run.examples.of_step(step)
    for _ in range(math.ceil(len(records) / run.options.micro_batch)):
        if stop.received:
            totals["stop"] = 1
            break
        asked = time.time()
        examples = run.examples.usable(next(batches), run.left_out)
        totals["waited"] += time.time() - asked
        if not examples:
            continue
        if not numbers and is_new_epoch and run.objective.reference:
            verify_cache(run, examples[0])
        loss, table = compute_loss(run, examples)
        loss.sum().backward()  # adds to .grad; the graph is freed, and with it the memory
        numbers += [example.number for example in examples]
        tables.append([part.detach() for part in table])
        totals["records"] += len(examples)
        for example in examples:
            totals["tokens"] += sum(row.tokens() for row in example.rows)
    return totals, numbers, tables


def evaluate_held_out(run):
    """{"eval/name": mean} over the held-out records, and two greedy samples.

    The samples are for a person: a falling loss with answers that get worse is seen here first.
    """
    if not run.held_out:
        return {}
    run.policy.eval()  # dropout off, where there is any
    with torch.no_grad():
        tables = [loss_table(run, [example]) for example in run.held_out]
    sums = sums_of_metrics(run, tables)
    found = {f"eval/{name}": value / len(tables) for name, value in sums.items()}

    texts = [text for text, _ in run.samples]
    images = [image for _, image in run.samples]
    answers = generate(run.policy, run.prompts, texts, images, max_new_tokens=128)
    found["samples"] = [f"{text} -> {answer}" for text, answer in zip(texts, answers)]
    run.policy.train()
    return found


def show(bar, line):
    """One step on the terminal: the progress bar, and samples above it."""
    bar.update()
    names = ("loss", "rewards/accuracies", "rewards/margins", "tokens_per_second")
    bar.set_postfix({name.split("/")[-1]: f"{line[name]:.3g}" for name in names if name in line})
    for sample in line.get("samples", ()):
        bar.write(f"step {line['step']}: {sample}")


# --- command line ---------------------------------------------------------------------------------


def read_options(argv):
    """The command line as Options; without --model and --data, those of the bundled tiny world."""
    notes = symmpo.weight_defaults()
    options = parse(Options, __doc__, argv, notes)
    if options.model is None and options.data is None:
        preset = json.loads((TINY / "options.json").read_text())
        for name in ("model", "data", "eval_data"):
            preset[name] = str(TINY / "built" / preset[name])
        options = parse(Options, __doc__, argv, notes, **preset)
    return options


def main(argv=None):
    run_command(command, sys.argv[1:] if argv is None else argv)


def command(argv):
    """python train.py ARGV"""
    options = read_options(argv)
    try:
        run, done = train(options)
    except (OSError, sqlite3.Error) as error:  # perhaps a full disk
        raise UserError(f"{error}; this run writes to {options.out} and {options.cache}") from error
    except torch.OutOfMemoryError as error:
        less = "--micro-batch 1, --grad-checkpointing, --load-4bit"
        raise UserError(f"out of memory, less at a time: {less} ({error})") from error
    # Without data of one's own, the run ends with what it was for: less hallucination.
    if done == options.steps and not any(word.startswith("--data") for word in argv):
        from benchmarks.answers import before_and_after

        before_and_after(run.policy, run.prompts, TINY / "built" / "amber")
    for reason in run.left_out:
        print(f"left out: {reason}")
    print(f"adapter     {options.out}/checkpoint-{done} (PEFT), curves {options.out}/curves.png")
    if done < options.steps:
        again = f"python train.py {shlex.join([*argv, '--out', options.out, '--resume'])}"
        print(f"stopped after step {done}; go on with: {again}")
        sys.exit(130)


if __name__ == "__main__":
    main()
