"""Train a vision-language model with SymMPO or a baseline: LoRA, frozen reference, one loop.

    python train.py                                                   the bundled tiny world
    python train.py --model llava-hf/llava-1.5-7b-hf --data prefs.jsonl        your own data
    torchrun --nproc_per_node=2 train.py --model M --data prefs.jsonl          more processes

How this departs from the paper and from the code published with it:
- LoRA instead of tuning the whole language model (the paper's main run); the published LoRA
  script uses dropout 0.05 and a rate of 5e-7, here dropout is 0 (dropout in the policy and not in
  the reference is noise in every log-ratio) and the rate is the paper's 5e-6.
- The reference is the same weights with the adapter off; its log-probs are computed once per
  response and kept on disk under a hash of what the model saw.
- Responses share their prefix and image (symmpo.packed_logps); --no-share-prefix is the plain way.
- Records that do not fit --max-length are refused, not cut.
"""
import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import sys
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import data
from data import TINY, Later, Problem, need, problem_at, within
from tqdm import tqdm

evaluate, peft, respond, symmpo, torch = map(
    Later, ("evaluate", "peft", "respond", "symmpo", "torch"))

warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's use of it

PACKABLE = ("llava", "llava_next", "llava_onevision", "idefics3", "smolvlm", "internvl")

TINY_PRESET = dict(model=f"{TINY}/model", data=f"{TINY}/prefs.jsonl", eval_data=f"{TINY}/val.jsonl",
                   steps=100, batch_size=16, lr=5e-4, lora_r=16, lora_alpha=32, warmup=0.1)
# What a resumed run may set anew (and processes differ in); other options make it another run.
MAY_CHANGE = ("resume", "out", "save_every", "sample_every", "workers", "tensorboard", "cache",
              "device")


def add(group, name, value, text):
    """One option; value: its default, its choices (the default first), or its type."""
    if value is False:
        group.add_argument(f"--{name}", action="store_true", help=text)
    elif callable(value):
        group.add_argument(f"--{name}", type=value, help=text)
    else:
        first, choices = (value[0], value) if isinstance(value, tuple) else (value, None)
        kind = str if isinstance(first, str) else within(0, kind=type(first))
        group.add_argument(f"--{name}", default=first, type=kind, choices=choices,
                           help=f"{text} (default {first})")


def options():
    """Every knob on its line: default (the paper's unless the text says so), unit, reason."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    g = parser.add_argument_group("what")
    add(g, "model", str, "model folder or hub name; without it, the bundled tiny world")
    add(g, "data", str, "prefs.jsonl or parquet (`python data.py --help` has the form)")
    add(g, "objective", ("symmpo", "dpo", "copo", "mdpo", "sft"), "the loss")
    add(g, "out", Path, "folder for this run (default runs/OBJECTIVE-DATE-TIME)")
    add(g, "no-image", False, "dpo, sft: remove the image from every prompt (mDPO Fig. 1)")
    g = parser.add_argument_group("loop")
    add(g, "epochs", 2.0, "passes over the data")
    add(g, "steps", 0, "optimiser steps; 0: as many as --epochs needs")
    add(g, "batch-size", 64, "records per optimiser step, over all processes")
    add(g, "micro-batch", 1, "records per forward and backward pass; memory grows with it")
    add(g, "lr", 5e-6, "peak learning rate; cosine decay to 0")
    add(g, "warmup", 0.05, "share of the steps with a linearly rising rate")
    add(g, "weight-decay", 0.01, "AdamW's decoupled decay of the adapter weights")
    add(g, "clip", 1.0, "largest norm of the gradient")
    add(g, "seed", 0, "of data order, adapter initialisation and crops")
    g, weight = parser.add_argument_group("loss", "defaults go by objective"), within(0, kind=float)
    add(g, "beta", weight, "scale of the log-ratios, 1/nats (0.1)")
    add(g, "lam", weight, "weight of Pair (symmpo 0.5) or of CoPO (mdpo 1)")
    add(g, "gamma", weight, "weight of Margin (symmpo 1e-4)")
    add(g, "eta", weight, "weight of the anchors (symmpo and mdpo 1, others 0)")
    add(g, "delta", float, "threshold that anchors hold beta * rho above (0)")
    add(g, "anchors", str, "comma-separated cells among yw, yl, ml, yw' (mDPO Table 4)")
    g = parser.add_argument_group("model")
    add(g, "lora-r", 128, "rank of the adapters")
    add(g, "lora-alpha", 256, "the adapters' output is scaled by alpha / r")
    add(g, "lora-dropout", 0.0, "0 since the reference has none (published script: 0.05)")
    add(g, "max-length", 2048, "tokens of image, prompt and longest response")
    add(g, "prompt-format", ("auto", "vicuna", "chat"), "auto: vicuna for LLaVA-1.5, else chat")
    add(g, "dtype", ("auto", "bfloat16", "float32"), "of the frozen weights; auto: bf16 on CUDA")
    add(g, "load-4bit", False, "NF4 base weights (CUDA, bitsandbytes): for cards of 24 GB")
    add(g, "device", ("auto", "cuda", "cpu"), "auto: CUDA when there is one")
    add(g, "grad-checkpointing", False, "recompute activations: less memory, a third slower")
    add(g, "no-share-prefix", False, "plain padded sequences, for models that cannot pack")
    g = parser.add_argument_group("run")
    add(g, "eval-data", str, "held-out records: loss, accuracy and samples while training")
    add(g, "sample-every", 50, "steps between held-out evaluations")
    add(g, "save-every", 50, "steps between checkpoints; the last step is always saved")
    add(g, "resume", False, "go on with the run in --out from its last checkpoint")
    add(g, "skip-bad", False, "leave unusable records out and list them at the end")
    add(g, "allow-outside", False, "permit image paths that leave the data file's folder")
    add(g, "cache", "~/.cache/symmpo", "folder of the reference's log-probs")
    add(g, "workers", within(0), "processes that read images ahead of the step (CUDA 2, CPU 0)")
    add(g, "tensorboard", False, "also write TensorBoard events, if it is installed")
    return parser


def parse_args(argv=None):
    """The command line as a namespace; without --model the tiny preset fills what is not given."""
    parser = options()
    if not parser.parse_known_args(argv)[0].model:
        parser.set_defaults(**TINY_PRESET)
    args = parser.parse_args(argv)
    for key in ("epochs", "batch_size", "micro_batch", "lr", "clip", "lora_r", "max_length",
                "sample_every", "save_every"):
        need(getattr(args, key), f"--{key.replace('_', '-')} must be above 0")
    need(max(args.warmup, args.lora_dropout) < 1, "--warmup and --lora-dropout must be below 1")
    need(args.data, "--data is missing: the preference records to train on")
    need(args.out or not args.resume, "--resume needs --out, the folder of the run to go on with")
    need(not args.no_image or args.objective in ("dpo", "sft"),
         "--no-image goes with --objective dpo or sft: the others contrast images")
    args.out = args.out or Path(f"runs/{args.objective}-{time.strftime('%Y%m%d-%H%M%S')}")
    return args


def loss_weights(args):
    """The objective's default weights, each overridden by its flag."""
    w = symmpo.OBJECTIVES[args.objective][1]
    w = {key: w[key] if getattr(args, key) is None else getattr(args, key) for key in w}
    w["anchors"] = w["anchors"].split(",") if isinstance(w["anchors"], str) else list(w["anchors"])
    need(set(w["anchors"]) <= set(symmpo.ANCHORS),
         f"--anchors: the known cells are {', '.join(symmpo.ANCHORS)}")
    return w


# --- policy and reference ------------------------------------------------------------------------


def prepare(args):
    """Load and check everything that the loop needs; raises Problem before any step is paid for."""
    torch.manual_seed(args.seed)
    if args.model == TINY_PRESET["model"]:
        torch.set_num_threads(1)  # its matrices are too small to be shared between threads
    cuda = torch.cuda.is_available() and args.device != "cpu"
    need(cuda or args.device != "cuda", "--device cuda: PyTorch finds no CUDA GPU here")
    args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(args.device)  # where NCCL gathers what is no tensor
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    args.workers = 2 * cuda if args.workers is None else args.workers
    if args.dtype == "auto":
        args.dtype = "bfloat16" if cuda else "float32"
    run = SimpleNamespace(args=args, w=loss_weights(args), skipped={},
                          cells=symmpo.OBJECTIVES[args.objective][0])
    run.records = data.Records(args.data)
    per_epoch = math.ceil(len(run.records) / args.batch_size)
    args.steps = args.steps or math.ceil(per_epoch * args.epochs)
    need(cuda or not args.load_4bit, "--load-4bit needs a CUDA GPU (and pip install bitsandbytes)")
    model, run.processor = data.load_model(args.model, args.device, getattr(torch, args.dtype),
                                           four_bit=args.load_4bit)
    need(args.no_share_prefix or model.config.model_type in PACKABLE,
         f"{args.model}: sharing the prefix is not exact for {model.config.model_type} models "
         "(their attention or positions); add --no-share-prefix")
    run.fmt = data.prompt_format(model, args.prompt_format)
    held_out = data.Records(args.eval_data) if args.eval_data else []
    run.held_out = [held_out[i] for i in range(len(held_out))
                    if merge([load(run, held_out, i)], args, run.skipped)[0]]
    base = data.fingerprint(model)
    run.policy = add_adapter(model.requires_grad_(False), args)
    run.identity = {**{k: v for k, v in vars(args).items() if k not in MAY_CHANGE}, **run.w,
                    "base": base, "format": run.fmt, "records": len(run.records)}
    config = hashlib.blake2b(model.config.to_json_string().encode(), digest_size=4).hexdigest()
    name = f"{base}-{config}-{args.dtype}-{'cuda' if cuda else 'cpu'}.sqlite"
    run.cache = open_cache(Path(args.cache).expanduser() / name)
    return run


def open_cache(path):
    """The reference's log-probs on disk, shared by all processes and runs: a table key -> nats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cache = sqlite3.connect(path, timeout=60)  # seconds to wait for the other processes
    cache.execute("PRAGMA synchronous = OFF")  # no flush per write; a killed process loses nothing
    cache.execute("CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, nats BLOB)")
    return cache


def add_adapter(model, args):
    """LoRA on every linear layer of the language model, by full path, and on nothing else:
    suffixes alone (q_proj) would also match the vision tower."""
    decoder = symmpo.language_model(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    leaves = sorted({name.rpartition(".")[2] for name, module in decoder.named_modules()
                     if isinstance(module, torch.nn.Linear)})
    policy = peft.get_peft_model(model, peft.LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
        target_modules=rf"{prefix}\..*\.({'|'.join(leaves)})", task_type="CAUSAL_LM"))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all(f"{prefix}." in name for name in trained), "adapters in a wrong place"
    if args.grad_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    return policy.train()  # checkpointing is off in eval mode; dropout is 0 unless asked for


def policy_table(run, rows, records):
    """(records, 2, 3) log-probs in nats of whatever the adapter makes of the model now."""
    args, cuda = run.args, run.args.device.startswith("cuda")
    mixed = cuda and args.dtype == "bfloat16"  # autocast brings the adapters' inputs to bf16; PEFT
    keep = mixed and not args.grad_checkpointing  # would save a copy of each in fp32 before that
    with (problem_at(rows[0]["source"], ValueError),
          torch.autocast("cuda", torch.bfloat16, enabled=mixed),
          peft.helpers.disable_input_dtype_casting(run.policy, active=keep)):
        return symmpo.logp_table(run.policy, rows, records, not args.no_share_prefix,
                                 tokens_per_forward=2048 if cuda else 0)


def reference_table(run, rows, keys, fresh=False):
    """The same of the frozen reference (adapter off): from the cache, computed where it is new.

    keys: one per record, a hash of everything the model sees of it. fresh: compute all the same
    and raise Problem where the cache says something else.
    """
    marks = ",".join("?" * len(keys))
    found = run.cache.execute(f"SELECT key, nats FROM logps WHERE key IN ({marks})", keys)
    known = {key: torch.frombuffer(bytearray(nats), dtype=torch.float32) for key, nats in found}
    unknown = torch.full((6,), math.nan)
    table = torch.stack([known.get(key, unknown) for key in keys]).view(-1, 2, 3)
    todo = [row for row in rows if fresh or keys[row["cells"][0][0]] not in known]
    if todo:
        with torch.no_grad(), run.policy.disable_adapter():
            new = policy_table(run, todo, len(keys)).cpu()
        off = (new - table).abs()  # NaN, which compares false, where the table knows nothing
        need(not (off > 0.5 + 0.02 * new.abs()).any(), f"the reference cache {run.args.cache} was "
             f"made differently: off by {off.nan_to_num().max():.2f} nats; delete that folder")
        table = torch.where(table.isnan(), new, table)
        with run.cache:  # one transaction: all or nothing
            run.cache.executemany("INSERT OR IGNORE INTO logps VALUES (?, ?)", [
                (key, row.numpy().tobytes()) for key, row in zip(keys, table)])
    return table.to(run.args.device)


def compute(run, rows, keys, fresh=False, start=False):
    """What to minimise, (records,), and what to log of it: {name: (records,)}.

    fresh, start: is this the first forward pass of this process, of the run?"""
    reference = reference_table(run, rows, keys, fresh)
    policy = policy_table(run, rows, len(keys))
    terms = symmpo.loss_terms(run.args.objective, policy, reference, run.w)
    loss = sum(terms.values())
    if start:
        verify_start(run, (policy - reference).abs().nan_to_num().max().item(), loss.mean().item())
    return loss, {"loss": loss, **{f"loss/{name}": term for name, term in terms.items()},
                  **symmpo.metrics(policy, reference, run.w["beta"])}


def verify_start(run, rho, loss):
    """Step 0: the adapter is zero, so rho must be 0 and the loss its closed form; else Problem."""
    expected = symmpo.loss_at_start(run.args.objective, run.w)
    tolerance = 1e-3 if run.args.dtype == "float32" else 0.5  # nats; bf16 sums of ~150 tokens
    need(rho <= tolerance and not abs(loss - expected) > tolerance,
         f"policy and reference differ by {rho:.3g} nats before the first step, and the loss is "
         f"{loss:.5f} instead of {expected:.5f}; they are the same weights: dropout, another dtype "
         "or another template does this")
    print(f"step 0      rho = 0 within {rho:.1g} nats, loss {loss:.6f}, closed form {expected:.6f}")


# --- batches -------------------------------------------------------------------------------------


def load(run, records, i):
    """Record i as (number, key, rows), or (number, None, Problem). Runs in the workers.

    The key is a hash of all that the model sees: tokens, pixels, cells. Template, tokenizer,
    image processing and data are in it without being named.
    """
    args = run.args
    try:
        rows = data.build_rows(records[i], run.processor, run.fmt, run.cells, seed=args.seed,
                               max_length=args.max_length, no_image=args.no_image,
                               allow_outside=args.allow_outside)
    except Problem as e:
        return i, None, e
    seen = hashlib.blake2b(digest_size=16)
    for row in rows:
        for name, value in [*sorted(row["inputs"].items()), *zip(row["cells"], row["responses"])]:
            seen.update(f"{name} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return i, seen.digest(), rows


def batch_of(step, n, args):
    """Record numbers of one optimiser step: a new seeded order each epoch, its last batch short."""
    epoch, place = divmod(step, math.ceil(n / args.batch_size))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(args.seed * 1000 + epoch))
    return order[place * args.batch_size:(place + 1) * args.batch_size].tolist()


def micro_batches(start, n, args, rank, world):
    """This process's record numbers from step `start` on, a list per forward pass."""
    for step in range(start, args.steps):
        mine = batch_of(step, n, args)[rank::world]
        yield from (mine[k:k + args.micro_batch] for k in range(0, len(mine), args.micro_batch))


def merge(items, args, skipped):
    """A micro-batch as (rows, keys), rows numbered by their record's place in it.

    Raises the Problem of an unusable record, or with --skip-bad notes it in `skipped`.
    """
    rows, keys = [], []
    for number, key, item in items:
        if key is None:
            need(args.skip_bad, f"{item}\n--skip-bad goes on without such records; `python data.py "
                 f"check {args.data}` lists them all")
            skipped[str(item)] = number
            continue
        rows += [{**row, "cells": [(len(keys), *cell[1:]) for cell in row["cells"]]}
                 for row in item]
        keys.append(key)
    return rows, keys


# --- checkpoints and logs ------------------------------------------------------------------------


def claim_folder(args, rank=0):
    """(lock, checkpoint): the run's folder is rank 0's until the lock is closed or forgotten; the
    checkpoint to go on from is None for a new run. Raises Problem when the folder is in use or
    holds a run that --resume was not given for."""
    args.out.mkdir(parents=True, exist_ok=True)
    found = sorted(args.out.glob("checkpoint-*[0-9]"), key=lambda p: int(p.name.split("-")[1]))
    need(rank or args.resume or not (found or (args.out / "metrics.jsonl").exists()),
         f"{args.out}: holds another run; choose another --out, or --resume it")
    return data.lock(args.out) if rank == 0 else None, (found[-1] if found else None)


def save_checkpoint(run, step, optimizer):
    """checkpoint-STEP: adapter in PEFT's format, optimiser, options. It is written under
    another name, flushed and renamed; older checkpoints go only after that. Raises Problem when it
    cannot be written, and leaves the older ones."""
    final = run.args.out / f"checkpoint-{step}"
    temporary = run.args.out / f"unfinished-{os.environ.get('RANK', 0)}"
    try:
        with problem_at(f"{final}: cannot be written, earlier checkpoints are as they were and "
                        "--resume goes on from the last", Exception):  # disks have several kinds
            if not final.exists():
                run.policy.save_pretrained(temporary)
                torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
                (temporary / "run.json").write_text(json.dumps(run.identity, indent=1))
                for path in [*temporary.iterdir(), temporary]:
                    handle = os.open(path, os.O_RDONLY)
                    os.fsync(handle)
                    os.close(handle)
                temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in run.args.out.glob("checkpoint-*[0-9]"):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(run, folder, optimizer):
    """Put adapter and optimiser back and return the step to go on with.

    Raises Problem for another run's checkpoint or a damaged one."""
    with problem_at(f"{folder}: damaged, cannot resume from it", Exception):
        old = json.loads((folder / "run.json").read_text())
        adapter = peft.load_peft_weights(folder, "cpu")
        state = torch.load(folder / "optimizer.pt", weights_only=True, map_location="cpu")
    changed = [f"{k} was {old.get(k)!r}, is {v!r}" for k, v in run.identity.items()
               if old.get(k) != v]
    need(not changed, f"{folder}: cannot resume, this is another run: {'; '.join(changed)}")
    peft.set_peft_model_state_dict(run.policy, adapter)
    optimizer.load_state_dict(state)
    return int(folder.name.split("-")[1])


def read_metrics(out):
    """The whole lines of metrics.jsonl; a crash may have torn the last one."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def plot_curves(out):
    """curves.png: loss, preference accuracy, margins and chosen log-prob over the steps."""
    from matplotlib.figure import Figure  # not pyplot, whose state belongs to a notebook's reader
    rows, panels = read_metrics(out), {
        "loss (nats)": ["loss"], "preference accuracy": ["rewards/accuracies", "pair/accuracy_m"],
        "reward margin": ["rewards/margins"], "log p(chosen) (nats)": ["logps/chosen"]}
    figure = Figure(figsize=(16, 3.6))
    figure.subplots_adjust(left=0.04, bottom=0.14, right=0.99, top=0.91, wspace=0.2)
    for axis, (title, names) in zip(figure.subplots(1, 4), panels.items()):
        for name in names + [f"eval/{name}" for name in names]:
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points), "o--" if "eval" in name else "-", ms=4, label=name)
                axis.legend(fontsize=8)
        axis.set(title=title, xlabel="optimiser step")
    figure.savefig(out / "curves.png", dpi=110)


# --- the run -------------------------------------------------------------------------------------


def print_facts(run, rows):
    """What this run is, before it starts: every number printed is the one that is used."""
    args, count = run.args, run.policy.num_parameters
    parts = {name.split(".layers.")[0] for name, p in run.policy.named_parameters()
             if p.requires_grad}
    print(f"model       {args.model}, {count():,} parameters, {args.dtype} on {args.device}",
          f"trained     {count(only_trainable=True):,} parameters in {', '.join(parts)}; LoRA rank "
          f"{args.lora_r}, alpha {args.lora_alpha}, dropout {args.lora_dropout:g}",
          f"data        {args.data}, {len(run.records):,} records",
          f"objective   {args.objective}, {', '.join(f'{k} {v}' for k, v in run.w.items())}",
          f"steps       {args.steps} of {args.batch_size} records in micro-batches of "
          f"{args.micro_batch}, {args.steps * args.batch_size / len(run.records):.2f} epochs, "
          f"lr {args.lr:g}, warm-up {args.warmup:g}, seed {args.seed}",
          f"output      {args.out}", data.describe(run.processor, run.fmt, rows[0]), sep="\n")


def held_out(run, rank, world):
    """{eval/name: mean} over the held-out records of all processes, and two greedy samples."""
    sums = Counter()
    run.policy.eval()
    with torch.no_grad():
        for i in range(rank, len(run.held_out), world):
            rows, keys = merge([load(run, run.held_out, i)], run.args, {})
            found = compute(run, rows, keys)[1]
            sums.update({"records": 1, **{k: v.item() for k, v in found.items()}})
    records = run.held_out[:2]
    images = [data.open_image(r["image"], r["root"]) for r in records]
    prompts = [record["prompt"] for record in records]
    samples = respond.generate_batch(run.policy, run.processor, run.fmt, prompts, images, 128)
    run.policy.train()
    sums = over_processes(sums)
    means = {f"eval/{name}": value / sums["records"] for name, value in sums.items()}
    return {**means, "samples": [f"{p} -> {y}" for p, y in zip(prompts, samples)]}


def over_processes(sums):
    """Add up {name: number} over all processes of torchrun."""
    if torch.distributed.is_initialized():
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, sums)
        sums = Counter()
        for part in everyone:  # not with +, which drops what is not positive
            sums.update(part)
    return sums


def train(args):
    """The loop: lr, micro-batches, clip, step, log, evaluate, save. Returns the run and its end."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    lock, checkpoint = claim_folder(args, rank)
    board = None
    if args.tensorboard and rank == 0:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(args.out)
    run = prepare(args)
    weights = [p for p in run.policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=args.weight_decay)
    start = load_checkpoint(run, checkpoint, optimizer) if checkpoint else 0
    kept = [line for line in read_metrics(args.out) if line["step"] <= start]
    if rank == 0:  # what was logged after the checkpoint will be logged again
        (args.out / "metrics.tmp").write_text("".join(json.dumps(k) + "\n" for k in kept))
        os.replace(args.out / "metrics.tmp", args.out / "metrics.jsonl")
    n, done, stopped = len(run.records), start, []
    handlers = {name: signal.signal(name, lambda number, _: stopped.append(number))
                for name in (signal.SIGINT, signal.SIGTERM)}  # leave the step undone, and save
    batches = iter(torch.utils.data.DataLoader(
        range(n), batch_sampler=micro_batches(start, n, args, rank, world),
        collate_fn=lambda numbers: [load(run, run.records, i) for i in numbers],
        num_workers=args.workers, multiprocessing_context="fork" if args.workers else None,
        pin_memory=args.device != "cpu",  # by a thread, which also takes over from the workers
        worker_init_fn=lambda _: signal.signal(signal.SIGTERM, signal.SIG_IGN)))  # ours to act on
    bar = tqdm(total=args.steps, initial=start, unit="step", disable=rank > 0 or None)
    for step in range(start, args.steps):
        # Randomness (of LoRA's dropout) by step and process: a resumed run needs no other state.
        torch.manual_seed(random.Random(f"{args.seed} {step} {rank}").getrandbits(63))

        # Learning rate: linear warm-up, then half a cosine down to 0.
        warm = max(1, round(args.warmup * args.steps))
        decay = (1 + math.cos(math.pi * (step - warm) / max(1, args.steps - warm))) / 2
        lr = args.lr * ((step + 1) / warm if step < warm else decay)
        optimizer.param_groups[0]["lr"] = lr

        # Micro-batches: gradients of the summed loss pile up; the mean is taken once, below, by
        # the number of records there really were in all processes.
        began, sums, numbers = time.time(), Counter(), []
        share = len(batch_of(step, n, args)[rank::world])
        for _ in range(math.ceil(share / args.micro_batch)):
            if stopped:
                break
            asked = time.time()
            items = next(batches)
            sums["waited"] += time.time() - asked
            try:
                rows, keys = merge(items, args, run.skipped)
            except Problem:
                save_checkpoint(run, step, optimizer)  # bad input never costs finished work
                raise
            if not rows:
                continue
            first = not numbers and step == start
            if first and rank == 0:
                print_facts(run, rows)
            loss, found = compute(run, rows, keys, first, start=first and step == 0)
            loss.sum().backward()
            numbers += [number for number, *_ in items]
            sums.update({name: value.sum().item() for name, value in found.items()})
            sums.update({"records": len(keys), "tokens": sum(
                row["inputs"]["input_ids"].numel() + sum(map(len, row["responses"]))
                for row in rows)})

        # One gradient for all processes, its norm clipped, one step of AdamW.
        sums.update(stopped=len(stopped))
        sums = over_processes(sums)
        if sums.pop("stopped"):
            break  # a resumed run takes this step from its start
        done = step + 1
        if not sums["records"]:
            continue  # every record of this batch was left out (--skip-bad)
        for p in weights:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if world > 1:
                torch.distributed.all_reduce(p.grad)
            p.grad /= sums["records"]
        norm = torch.nn.utils.clip_grad_norm_(weights, args.clip).item()
        if not math.isfinite(sums["loss"] + norm):
            if rank == 0:
                save_checkpoint(run, step, optimizer)
            raise Problem(f"step {step}: loss {sums['loss']:g}, gradient norm {norm:g}, at record "
                          f"numbers {sorted(numbers)} (from 0); the state before this step is in "
                          f"{args.out / f'checkpoint-{step}'}")
        optimizer.step()
        optimizer.zero_grad()

        # Log, look at held-out records, save. The means are over the whole optimiser step.
        records, tokens, waited = map(sums.pop, ("records", "tokens", "waited"))
        seconds = time.time() - began
        line = {"step": done, **{name: value / records for name, value in sums.items()},
                "lr": lr, "grad_norm": norm, "records": records,
                "tokens_per_second": tokens / seconds, "data_wait": waited / world / seconds}
        if run.held_out and (done % args.sample_every == 0 or done == args.steps):
            line.update(held_out(run, rank, world))
        if rank == 0:
            for sample in line.get("samples", ()):
                bar.write(f"step {done}: {sample}")
            for name in [k for k, v in line.items() if board and isinstance(v, float)]:
                board.add_scalar(name, line[name], done)
            with open(args.out / "metrics.jsonl", "a") as f:
                f.write(json.dumps(line) + "\n")
            if done % args.save_every == 0:
                save_checkpoint(run, done, optimizer)
        bar.update()
        bar.set_postfix({k.rpartition("/")[2]: f"{line[k]:.3g}" for k in (
            "loss", "rewards/accuracies", "rewards/margins", "tokens_per_second") if k in line})
    bar.close()
    if rank == 0:
        save_checkpoint(run, done, optimizer)
        plot_curves(args.out)
    for name, handler in handlers.items():
        signal.signal(name, handler)
    return run, done


def tiny_report(run):
    """Hallucination on the tiny world's held-out AMBER files, adapter off and on."""
    print(f"{'held-out scenes (%)':20}   CHAIR   cover     hal  yes/no")
    run.policy.eval()
    for name, adapter in (("before", run.policy.disable_adapter()), ("after", nullcontext())):
        with adapter:
            found = evaluate.measure(run.policy, run.processor, run.fmt, TINY / "amber")["metrics"]
        made, asked = found["generative"], found["discriminative"]
        print(f"{name:20}" + "".join(f"{value:8.1f}" for value in (
            made["CHAIR"], made["Cover"], made["Hal"], asked["Accuracy"])))


def main(argv=None):
    try:
        args = parse_args(argv)
        run, done = train(args)
        skipped = over_processes(run.skipped)
        if os.environ.get("RANK", "0") != "0":
            return  # rank 0 speaks for all
        if args.model == TINY_PRESET["model"] and done == args.steps:
            tiny_report(run)
    except (Problem, ImportError, OSError, sqlite3.Error) as e:
        hint = f": pip install {e.name}" if isinstance(e, ImportError) else ""
        if isinstance(e, (OSError, sqlite3.Error)):  # perhaps a full disk
            hint = f"; this run writes to {args.out} and {args.cache}"
        print(f"error: {e}{hint}", file=sys.stderr)
        sys.exit(2)
    for reason in skipped:
        print(f"left out: {reason}")
    print(f"adapter     {args.out / f'checkpoint-{done}'} (PEFT), curves {args.out / 'curves.png'}")
    if done < args.steps:
        again = " ".join(argv or sys.argv[1:])
        print(f"stopped after step {done}; go on with: python train.py {again} --out {args.out} "
              "--resume")
        sys.exit(130)


if __name__ == "__main__":
    main()
