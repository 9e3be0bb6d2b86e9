"""Speed and memory, side by side with other ways to do the same work.

    python bench.py --quick --json     small model, two minutes on two cores; JSON on the last line
    python bench.py                    the mid-size model: the tables of the README (20 minutes)
    python bench.py --only scale       against records, responses per prefix, image tokens, batch
    python bench.py --only cuda --size 7b      (or 13b) on a GPU; without one, what to expect

What is compared, at LLaVA-1.5's counts (576 image, 60 prompt, 100 response tokens a sequence):
- ladder: the SymMPO step against its published layout (five padded sequences, logits at every
  position, the vision tower for each sequence, the reference in each step), one saving at a time;
- trl: the DPO step against TRL's DPOTrainer (pip install "trl==1.16.*"; nothing else needs it);
- floor: the packed step against its matrix products alone, at the rate measured here;
- scale and cuda: how time and memory grow, and full-size models.

How: one thread, random weights, the sides take turns in one process (A B C A B C). A round in which
another job took the core (cpu/wall < 0.9) is dropped; when more than half would be, processor time
is used instead, and the result says so. Ratios are medians over rounds with their quartiles. Memory
is the peak resident set of a fresh process during two steps, less what was resident before them.
A ratio stands beside the proof that both sides compute the same numbers: log-probs over several
optimiser steps, and the same change of them when the image is swapped.
"""
import argparse
import copy
import gc
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import data
import train
from data import Problem

SIZES = {  # width, layers, inner width of the decoder; vocabulary; LoRA rank; vision tower; pixels
    "tiny": dict(h=64, layers=2, inner=128, vocab=512, rank=4, v=32, v_layers=2, px=56),
    "quick": dict(h=256, layers=4, inner=704, vocab=8192, rank=8, v=64, v_layers=4, px=336),
    "small": dict(h=384, layers=4, inner=1024, vocab=12000, rank=16, v=96, v_layers=4, px=336),
    "mid": dict(h=1024, layers=8, inner=2752, vocab=32064, rank=32, v=256, v_layers=6, px=336),
    "wide": dict(h=4096, layers=2, inner=11008, vocab=2048, rank=128, v=256, v_layers=6, px=336),
    "7b": dict(h=4096, layers=32, inner=11008, vocab=32064, rank=128, v=1024, v_layers=24, px=336),
    "13b": dict(h=5120, layers=40, inner=13824, vocab=32064, rank=128, v=1024, v_layers=24, px=336),
}
PROMPT, RESPONSE = 60, 100  # tokens
EPOCHS = 4  # over which the cost of the cached reference is spread
LR = 2e-4  # at 1e-3 the mid-size losses explode within six steps, and rounding with them


# --- a random LLaVA and records for it -----------------------------------------------------------


def config_of(s):
    import transformers as tf
    text = tf.LlamaConfig(vocab_size=s["vocab"], hidden_size=s["h"], intermediate_size=s["inner"],
                          num_hidden_layers=s["layers"], num_attention_heads=max(2, s["h"] // 128),
                          initializer_range=0.05, max_position_embeddings=8192, pad_token_id=4)
    vision = tf.CLIPVisionConfig(hidden_size=s["v"], intermediate_size=4 * s["v"],
                                 num_hidden_layers=s["v_layers"], image_size=s["px"],
                                 num_attention_heads=max(2, s["v"] // 64), patch_size=14)
    return tf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)


def make_processor(s):
    """A processor whose tokens are words, so that a text has exactly the tokens asked for."""
    import tokenizers
    import transformers as tf
    words = ["<unk>", "<s>", "</s>", "<image>", "<pad>", *(f"w{i}" for i in range(5, s["vocab"]))]
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", additional_special_tokens=["<image>"])
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": s["px"]},
                                      crop_size={"height": s["px"], "width": s["px"]})
    return tf.LlavaProcessor(images, tokenizer, patch_size=14, image_token="<image>",
                             vision_feature_select_strategy="default",
                             num_additional_image_tokens=1)


def make_world(folder, s, objective="symmpo"):
    """A checkpoint and three records in a folder; returns the run that train.py makes of them.

    The third record is the first with the second's images.
    """
    import numpy as np
    import torch
    import transformers as tf
    from PIL import Image
    folder, pick, rng = Path(folder), random.Random(0), np.random.default_rng(0)
    processor = make_processor(s)
    torch.manual_seed(0)
    tf.LlavaForConditionalGeneration(config_of(s)).save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in ("m0", "m1", "c0", "c1"):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((s["px"], s["px"])).save(folder / f"{name}.png")

    def text(n):
        return " ".join(f"w{pick.randrange(5, s['vocab'])}" for _ in range(n))

    frame = len(processor.tokenizer(data.render(processor, "vicuna", "w5", False)).input_ids) - 1
    lines = [{"prompt": text(PROMPT - frame), **{k: text(RESPONSE - 1) for k in data.RESPONSES},
              "image": f"m{i}.png", "contrast_image": f"c{i}.png"} for i in range(2)]
    lines.append({**lines[0], "image": "m1.png", "contrast_image": "c1.png"})
    (folder / "prefs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = train.prepare(train.parse_args([
        "--model", str(folder), "--data", str(folder / "prefs.jsonl"), "--objective", objective,
        "--lora-r", str(s["rank"]), "--lora-alpha", str(2 * s["rank"]), "--device", "cpu",
        "--cache", str(folder / "cache"), "--out", str(folder / "out")]))
    run.rows = [data.build_rows(record, run.processor, run.fmt, run.cells)
                for record in run.records]
    return run


# --- sides: ways to make a step ------------------------------------------------------------------


def five_sequences(policy, rows, few_logits=False, vision_once=False):
    """(1, 2, 3) log-probs from full padded sequences, as published: the model's own forward on
    [image, prompt, response] five times. few_logits: only where responses are predicted.
    vision_once: image features are computed once an image."""
    import torch
    from symmpo import image_features
    pairs = [(row, response) for row in rows for response in row["responses"]]
    prefixes = torch.cat([row["inputs"]["input_ids"] for row, _ in pairs])
    labels = torch.nn.utils.rnn.pad_sequence([r for _, r in pairs], True, padding_value=-100)
    ids = torch.cat([prefixes, labels.clamp(min=0)], dim=1)
    mask = torch.cat([torch.ones_like(prefixes), (labels >= 0).long()], dim=1)
    if vision_once:
        embeds = policy.get_input_embeddings()(ids).clone()
        embeds[ids == policy.config.image_token_id] = torch.cat(
            [image_features(policy, row) for row, _ in pairs])
        inputs = {"inputs_embeds": embeds}
    else:
        pixels = torch.cat([row["inputs"]["pixel_values"] for row, _ in pairs])
        inputs = {"input_ids": ids, "pixel_values": pixels}
    logits = policy(**inputs, attention_mask=mask, use_cache=False,
                    logits_to_keep=labels.shape[1] + 1 if few_logits else 0).logits[:, :-1]
    labels = torch.nn.functional.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)
    logps = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    cells = torch.tensor([cell for row in rows for cell in row["cells"]]).T
    return torch.full((1, 2, 3), torch.nan).index_put(tuple(cells), (logps * (labels >= 0)).sum(1))


RUNGS = [  # name, way to make the table (None: train.py's), cached; each keeps the savings above it
    ("published: five sequences", five_sequences, False),
    ("+ logits where needed", lambda p, rows: five_sequences(p, rows, True), False),
    ("+ vision once an image", lambda p, rows: five_sequences(p, rows, True, True), False),
    ("+ prefix shared", None, False),
    ("+ reference cached", None, True),
]


def new_side(run, table=None, cached=False):
    """A copy of the policy with its own optimiser. cached: the reference is on disk already."""
    import torch
    frozen = {id(p): p for p in run.policy.parameters() if not p.requires_grad}  # not copied
    run = SimpleNamespace(**{**vars(run), "policy": copy.deepcopy(run.policy, frozen)})
    if cached:
        for number, rows in enumerate(run.rows):
            train.reference_table(run, [dict(row) for row in rows], [b"%d" % number])
    weights = [p for p in run.policy.parameters() if p.requires_grad]
    return SimpleNamespace(run=run, table=table, cached=cached, weights=weights,
                           optimizer=torch.optim.AdamW(weights, lr=LR, weight_decay=0.0))


def take_step(side, number):
    """One optimiser step on a record: (policy table, reference table, loss), all before it."""
    import torch
    from symmpo import loss_terms, metrics
    run = side.run
    rows = [dict(row) for row in run.rows[number]]  # without image features of the last time
    if side.table:
        with torch.no_grad(), run.policy.disable_adapter():
            reference = side.table(run.policy, rows)
        policy = side.table(run.policy, rows)
    else:
        reference = train.reference_table(run, rows, [b"%d" % number], fresh=not side.cached)
        policy = train.policy_table(run, rows, 1)
    loss = sum(loss_terms(run.args.objective, policy, reference, run.w).values()).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(side.weights, 1.0)
    side.optimizer.step()
    side.optimizer.zero_grad()
    metrics(policy, reference, run.w["beta"])
    return policy.detach(), reference, loss.item()


# --- measuring -----------------------------------------------------------------------------------


def since(began=(0, 0)):
    """(wall, processor) seconds"""
    return time.perf_counter() - began[0], time.process_time() - began[1]


def timed(work):
    """((wall, processor) seconds, what work returned)"""
    began = since()
    result = work()
    return since(began), result


def clean(rounds):
    """[{name: (wall, processor)}] -> ([{name: seconds}] of the rounds to keep, a note on them)."""
    rounds = rounds[1:] if len(rounds) > 2 else rounds  # the first one warms up
    kept = [r for r in rounds if all(cpu >= 0.9 * wall for wall, cpu in r.values())]
    wall = 2 * len(kept) >= len(rounds)
    note = f"{len(kept)} of {len(rounds)} rounds undisturbed: "
    return ([{k: t[not wall] for k, t in r.items()} for r in (kept if wall else rounds)],
            note + ("wall time" if wall else "processor time"))


def spread(values):
    """[median, lower quartile, upper quartile]"""
    values = sorted(values) * (1 + (len(values) == 1))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [float(f"{value:.4g}") for value in (middle, low, high)]


def proof(history):
    """Do all sides compute the same? history: for each step, (policy, reference, loss) a side.

    Returns the largest differences over all steps, how far the loss moved, and how far the swap
    of images moved the reference's log-probs on the side where it did least (records 0 and 2 of
    make_world). Raises Problem when the sides differ.
    """
    def apart(a, b):
        return (a - b).nan_to_num().abs().max().item()

    if len(history) < 3:
        raise Problem("too few steps to compare the sides: --rounds must be 2 or more")
    logp = max(apart(a, step[0][k]) for step in history for side in step
               for k, a in enumerate(side[:2]))
    loss = max(abs(side[2] - step[0][2]) for step in history for side in step)
    first = [step[0][2] for step in history]
    swap = min(apart(a[1], b[1]) for a, b in zip(history[0], history[2]))
    found = {"steps": len(history), "max_logp_diff": logp, "max_loss_diff": loss,
             "loss_range": [min(first), max(first)], "image_swap_moves": swap}
    if not (logp < 0.01 and loss < 1e-3 and swap > 10 * logp and max(first) - min(first) > 0.01):
        raise Problem(f"the sides do not compute the same numbers (nats): {found}")
    return found


def memory(field):
    """MiB of this process: VmRSS is in memory now, VmHWM was at most."""
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) / 1024


def peak_of(work):
    """MiB that work adds to what is resident, at its highest point."""
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest point so far
    work()
    return round(memory("VmHWM") - before, 1)


def in_new_process(function, *args):
    """What a function of INSIDE returns in a fresh process, in which every freed block of more than
    128 KiB goes back to the system: what is resident is what is in use."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, "--inside", function, json.dumps(args)],
                          env=env, text=True, capture_output=True)
    if done.returncode:
        raise Problem(f"{function}{args} in a fresh process: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- matrix products -----------------------------------------------------------------------------


def step_flops(s, rows, kept, images, reference):
    """Floating-point operations of a step's matrix products, by part; a product of (m, k) and
    (k, n) counts 2mkn.

    rows: (prefix length, [lengths behind it]) a row; kept: positions that get logits; images:
    passes of the vision tower; reference: is its forward pass in the step? The backward pass is
    that of frozen weights, once more the forward, and of trained adapters, twice; attention counts
    the pairs that the mask lets see each other. The first layer needs no gradient of its input.
    """
    h, inner, layers, v = s["h"], s["inner"], s["layers"], s["v"]
    tokens = sum(prefix + sum(branches) for prefix, branches in rows)
    pairs = sum(prefix * (prefix + 1) / 2 + sum(b * prefix + b * (b + 1) / 2 for b in branches)
                for prefix, branches in rows)
    linear = 2 * tokens * layers * (4 * h * h + 3 * h * inner)
    lora = 2 * tokens * layers * s["rank"] * (8 * h + 3 * (h + inner))
    patches = (s["px"] // 14) ** 2
    tower = s["v_layers"] * (24 * (patches + 1) * v * v + 4 * (patches + 1) ** 2 * v)
    return {"decoder": linear * (2 + reference) - 6 * tokens * h * h, "lora": 3 * lora,
            "attention": 4 * h * layers * pairs * (3 + reference),
            "head": 2 * kept * h * s["vocab"] * (2 + reference),
            "vision": images * (tower + 2 * patches * h * (v + h))}


def layouts(s, responses=(3, 2)):
    """step_flops' arguments for the rungs of the ladder; responses behind each image."""
    prefix, n = (s["px"] // 14) ** 2 + PROMPT, sum(responses)
    separate = [(prefix + RESPONSE, [])] * n
    shared = [(prefix, [RESPONSE - 1] * k) for k in responses]
    kept, images = n * RESPONSE, len(responses)
    return [(separate, n * (prefix + RESPONSE), 2 * n, 1), (separate, kept + n, 2 * n, 1),
            (separate, kept + n, images, 1), (shared, kept, images, 1),
            (shared, kept, images, 1 / EPOCHS)]


def matmul_rate(m, k, n, device="cpu", dtype=None, repeats=6):
    """FLOP/s of one (m, k) x (k, n) product, the median of some; processor time on the CPU."""
    import torch
    a, b = (torch.randn(rows, k, device=device, dtype=dtype) for rows in (m, n))

    def work():
        a @ b.T
        if device != "cpu":
            torch.cuda.synchronize()

    work()
    clock = int(device == "cpu")
    return 2 * m * k * n / statistics.median(timed(work)[0][clock] for _ in range(repeats))


# --- the comparisons -----------------------------------------------------------------------------


def ladder(size, rounds):
    """The SymMPO step, one saving at a time: seconds, ratios, predicted ratios, the proof."""
    s = SIZES[size]
    with tempfile.TemporaryDirectory() as folder:
        run = make_world(folder, s)
        sides = {name: new_side(run, table, cached) for name, table, cached in RUNGS}
        times, history = [], []
        for number in range(rounds + 1):
            turn = {name: timed(lambda: take_step(side, number % 3))
                    for name, side in sides.items()}
            times.append({name: t for name, (t, _) in turn.items()})
            history.append([result for _, result in turn.values()])
    times, note = clean(times)
    names = list(sides)
    for t in times:  # the cached reference costs one forward pass in EPOCHS epochs
        t[names[4]] += (t[names[3]] - t[names[4]]) / EPOCHS
    flop = [sum(step_flops(s, *layout).values()) for layout in layouts(s)]
    rows = [{"step": name, "seconds": spread([t[name] for t in times]),
             "ratio": spread([t[names[0]] / t[name] for t in times]),
             "predicted ratio": round(flop[0] / f, 2), "GFLOP": round(f / 1e9, 1)}
            for name, f in zip(names, flop)]
    return {"rows": rows, "timing": note, "proof": proof(history)}


def make_trl(run, folder, steps, callback=None):
    """TRL's DPOTrainer on the same weights, adapters, records and tokens; Raises Problem without.

    It skips logits that no label needs on a GPU alone: here it does so on the CPU, too. It seeds
    anew before it makes adapters, so ours are copied over, and it adds no end token to records
    with images, so it stands in their text.
    """
    try:
        import datasets
        import trl.trainer.utils
        from transformers import PrinterCallback
    except ImportError as e:
        raise Problem('the comparison with TRL needs it: pip install "trl==1.16.*"') from e
    trl.trainer.utils._use_triton = lambda device: True  # asked there for "skip logits?" alone
    vocab = run.policy.config.text_config.vocab_size
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(32768, vocab)  # its buffer's width
    separator, end = data.response_frame(run.processor, run.fmt)
    end = run.processor.tokenizer.convert_ids_to_tokens(end)
    records = [run.records[number % 3] for number in range(steps)]
    dataset = datasets.Dataset.from_list([{
        "images": [str(record["root"] / record["image"])],
        "prompt": data.render(run.processor, run.fmt, record["prompt"]),
        **{k: separator + record[k] + end for k in ("chosen", "rejected")}} for record in records])
    options = trl.DPOConfig(
        folder, per_device_train_batch_size=1, max_steps=steps, learning_rate=LR, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=1.0, beta=run.w["beta"], max_length=None,
        bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", logging_steps=1,
        save_strategy="no", train_sampling_strategy="sequential", disable_tqdm=True,
        dataloader_pin_memory=False)
    policy, run.policy = run.policy, None
    ours = {k: v.clone() for k, v in policy.state_dict().items() if "lora_" in k}
    trainer = trl.DPOTrainer(
        policy.unload(), args=options, processing_class=run.processor,
        train_dataset=dataset.cast_column("images", datasets.List(datasets.Image())),
        peft_config=policy.peft_config["default"], callbacks=[callback] * bool(callback))
    trainer.remove_callback(PrinterCallback)
    found = trainer.model.load_state_dict(ours, strict=False)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert not found.unexpected_keys and len(trained) == len(ours), "other adapters than ours"
    return trainer


def against_trl(size, rounds):
    """The DPO step against TRL's, which keeps its own loop: after each of its steps ours follow."""
    import torch
    from transformers import TrainerCallback
    times, history = [], []

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = since()

        def on_step_end(self, *_, **__):
            times.append({"TRL DPOTrainer": since(self.began)})

        def on_log(self, args, state, control, logs, **_):
            if "logps/chosen" not in logs:  # the summary at the end
                return
            table = torch.full((2, 1, 2, 3), torch.nan)  # policy, reference
            for y, name in enumerate(("chosen", "rejected")):
                table[0, 0, 0, y] = logs[f"logps/{name}"]
                table[1, 0, 0, y] = logs[f"logps/{name}"] - logs[f"rewards/{name}"] / beta
            turn = {name: timed(lambda: take_step(side, len(history) % 3))
                    for name, side in sides.items()}
            times[-1].update({name: t for name, (t, _) in turn.items()})
            history.append([(*table, logs["loss"]), *(result for _, result in turn.values())])

    with tempfile.TemporaryDirectory() as folder:
        run = make_world(folder, SIZES[size], "dpo")
        beta = run.w["beta"]
        sides = {"ours": new_side(run), "ours, reference cached": new_side(run, cached=True)}
        make_trl(run, folder, rounds + 1, Turns()).train()
    times, note = clean(times)
    rows = [{"step": name, "seconds": spread([t[name] for t in times]),
             "ratio": spread([t["TRL DPOTrainer"] / t[name] for t in times])} for name in times[0]]
    return {"rows": rows, "timing": note, "proof": proof(history)}


def step_memory(kind, size):
    """Peak MiB of two steps; in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_world(folder, SIZES[size], "dpo" if "DPO" in kind else "symmpo")
        if kind == "DPO, TRL":
            return peak_of(make_trl(run, folder, steps=2).train)
        side = new_side(run, five_sequences if kind == "SymMPO, published" else None)
        run.policy = None
        return peak_of(lambda: [take_step(side, number) for number in range(2)])


def step_memories(size, rounds):
    """What the sides' steps add to the resident set, MiB."""
    kinds = "SymMPO, published", "SymMPO, ours", "DPO, TRL", "DPO, ours"
    return {"rows": [{"step": kind, "MiB": in_new_process("step_memory", kind, size)}
                     for kind in kinds if "TRL" not in kind or importlib.util.find_spec("trl")]}


def floor(size, rounds):
    """The packed SymMPO step with its cached reference over its matrix products at the measured
    rate of the decoder's largest one; and where the time goes, by operator."""
    import torch
    s = SIZES[size]
    shared, kept, images, _ = layouts(s)[-1]
    parts = step_flops(s, shared, kept, images, 0)
    tokens = shared[0][0] + sum(shared[0][1])
    with tempfile.TemporaryDirectory() as folder:
        run = make_world(folder, s)
        side, times, rates = new_side(run, cached=True), [], []
        from_disk = statistics.median(timed(lambda: data.build_rows(
            run.records[0], run.processor, run.fmt, run.cells))[0][1] for _ in range(5))
        for number in range(rounds + 1):
            rates.append(matmul_rate(tokens, s["h"], s["inner"]))
            times.append({"step": timed(lambda: take_step(side, number % 3))[0]})
        with torch.profiler.profile() as profile:
            take_step(side, 0)
    times, note = clean(times)
    rate, total = statistics.median(rates), sum(parts.values())
    spent = {e.key.removeprefix("aten::"): e.self_cpu_time_total for e in profile.key_averages()}
    shares = {k: round(v / sum(spent.values()), 4)
              for k, v in sorted(spent.items(), key=lambda kv: -kv[1])}
    kernels = sum(v for k, v in shares.items() if "mm" in k or "attention" in k)
    fractions = spread([total / rate / t["step"] for t in times])
    return {"fraction": fractions, "timing": note,
            "fraction if only products and attention took time": round(fractions[0] / kernels, 4),
            "step seconds": spread([t["step"] for t in times]), "GFLOP": round(total / 1e9, 1),
            "GFLOP/s": spread([r / 1e9 for r in rates]), "floor seconds": round(total / rate, 4),
            "FLOP shares": {k: round(v / total, 3) for k, v in parts.items()},
            "record from disk, seconds": round(from_disk, 4),
            "time shares by operator": dict(list(shares.items())[:16])}


# --- scale ---------------------------------------------------------------------------------------


def random_policy(s, device="cpu", dtype=None, **options):
    """A random LLaVA with LoRA, made where it is used and not read from a checkpoint."""
    import torch
    from transformers import AutoModelForImageTextToText
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config_of(s), dtype=dtype,
                                                        attn_implementation="sdpa").eval()
    return train.add_adapter(model.requires_grad_(False), SimpleNamespace(
        lora_r=s["rank"], lora_alpha=2 * s["rank"], lora_dropout=0.0, **{
            "grad_checkpointing": False, **options}))


def random_rows(s, records=1, responses=(3, 2), image_tokens=None, device="cpu"):
    """Rows of random tokens. With image_tokens the image's features are random, too, and no vision
    tower runs. Cells are SymMPO's for three and two responses, else a record a response."""
    import torch
    from symmpo import OBJECTIVES
    rows, patches = [], image_tokens or (s["px"] // 14) ** 2
    symmpo = sorted(OBJECTIVES["symmpo"][0]) if responses == (3, 2) else None
    cells = iter([(k, *cell) for k in range(records) for cell in symmpo] if symmpo else
                 [(k, 0, 0) for k in range(records * sum(responses))])
    for n in responses * records:
        text = torch.randint(5, s["vocab"], (PROMPT,))
        ids = torch.cat([torch.full((patches,), 3), text])[None]
        rows.append({"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                                "pixel_values": torch.randn(1, 3, s["px"], s["px"])},
                     "responses": [torch.randint(5, s["vocab"], (RESPONSE,)) for _ in range(n)],
                     "cells": [next(cells) for _ in range(n)], "source": "random"})
        if image_tokens:
            rows[-1]["features"] = torch.randn(patches, s["h"], device=device)
    return rows


def scale_step(size, axis, value):
    """(processor seconds, peak MiB) of a packed forward and backward pass in a fresh process."""
    from symmpo import logp_table
    s = SIZES[size]
    policy = random_policy(s)
    rows = random_rows(s, **{"responses": {"responses": (value,), "image_tokens": 576},
                             "image tokens": {"responses": (3,), "image_tokens": value},
                             "batch": {"records": value, "image_tokens": 576}}[axis])
    cells = 1 + max(record for row in rows for record, _, _ in row["cells"])

    def work():
        return timed(lambda: logp_table(policy, rows, cells).nansum().backward())[0][1]

    peak = peak_of(work)  # also warms up
    return work(), peak


def scale_records(path, n, check):
    """Seconds and MiB to open n records and read the last, to check them all, and to keep and find
    their reference log-probs; in a fresh process."""
    import torch
    found = {"records": n}
    before = memory("VmRSS")
    (_, found["open s"]), records = timed(lambda: data.Records(path))
    found["last record s"] = timed(lambda: records[n - 1])[0][1]
    found["open MiB"] = round(memory("VmRSS") - before, 1)
    if check:
        args = SimpleNamespace(data=path, model=None, allow_outside=False)
        found["check MiB"] = peak_of(lambda: found.update(
            {"check s": timed(lambda: data.check(args))[0][1]}))
    with tempfile.TemporaryDirectory() as folder:
        run = make_world(folder, SIZES["tiny"])
        rows = ((b"%d" % i, torch.zeros(6).numpy().tobytes()) for i in range(n))
        with run.cache:
            found["cache fill s"] = timed(lambda: run.cache.executemany(
                "INSERT INTO logps VALUES (?, ?)", rows))[0][1]
        keys = [b"%d" % random.randrange(n) for _ in range(500)]
        found["cache look-up ms"] = timed(lambda: [
            train.reference_table(run, [], [key]) for key in keys])[0][1] * 1000 / len(keys)
        order = SimpleNamespace(seed=0, batch_size=64)
        found["order of a step ms"] = timed(lambda: train.batch_of(1, n, order))[0][1] * 1000
    return {k: float(f"{v:.4g}") for k, v in found.items()}


AXES = {"responses": (1, 2, 4, 8), "image tokens": (64, 256, 576, 1152, 2304, 2880),
        "batch": (1, 2, 4, 8)}


def scale(size, rounds, most=1_000_000):
    """Time and memory against records, responses per prefix, image tokens and batch. `exponent`:
    of the power of the axis that fits; at most 1 is linear or better."""
    from PIL import Image
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(100):
            Image.new("RGB", (336, 336), (i, 90, 200 - i)).save(f"{folder}/{i}.jpg")
        for n in (10 ** k for k in range(2, 7) if 10 ** k <= most):
            path, text = f"{folder}/{n}.jsonl", "some words of a sentence " * 20
            with open(path, "w") as f:
                for i in range(n):
                    f.write(json.dumps({"image": f"{i % 100}.jpg", "contrast_image":
                                        f"{(i + 1) % 100}.jpg", "prompt": "What is here?",
                                        **{k: f"{i} {text}" for k in data.RESPONSES}}) + "\n")
            rows.append({**in_new_process("scale_records", path, n, n <= 100_000),
                         "file MB": round(os.path.getsize(path) / 1e6, 1)})
            os.remove(path)
            progress(f"{n:,} records: {rows[-1]}")
    for axis, values in AXES.items():
        points = [in_new_process("scale_step", size, axis, value) for value in values]
        found[axis] = {"values": values, "seconds": [round(t, 4) for t, _ in points],
                       "MiB": [m for _, m in points],
                       "exponent": [round(power(values, p), 2) for p in zip(*points)]}
        progress(f"{axis}: {found[axis]}")
    return {"rows": rows, "steps": found}


def power(x, y):
    """Slope of the straight line through (log x, log y)."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


# --- a CUDA GPU ----------------------------------------------------------------------------------

VARIANTS = {  # one change each against the first
    "packed, sdpa, fp32 adapters": {}, "plain sequences": {"plain": True},
    "gradient checkpointing": {"checkpointing": True}, "bf16 adapters": {"adapters": "bfloat16"},
    "flex attention": {"attention": "flex_attention"}, "torch.compile": {"compiled": True},
    "micro-batch 2": {"records": 2}, "micro-batch 4": {"records": 4},
    "micro-batch 8, checkpointing": {"records": 8, "checkpointing": True},
    "micro-batch 16, checkpointing": {"records": 16, "checkpointing": True},
}


def flex_mask(row_of, branch, dtype=None):
    """symmpo.branch_mask for flex attention: what may be seen, as a function of two positions."""
    from torch.nn.attention.flex_attention import create_block_mask

    def may_see(batch, head, query, key):
        return ((query >= key) & (row_of[query] == row_of[key])
                & ((branch[key] == 0) | (branch[query] == branch[key])))

    return create_block_mask(may_see, None, None, len(branch), len(branch), device=branch.device)


def variant(s, device, rounds, records=1, plain=False, checkpointing=False, adapters="float32",
            attention="sdpa", compiled=False):
    """Seconds, GiB and FLOPs of a SymMPO step (forward, backward, AdamW), its reference cached."""
    import torch
    import symmpo
    policy = random_policy(s, device, torch.bfloat16, grad_checkpointing=checkpointing)
    weights = [p for p in policy.parameters() if p.requires_grad]
    for p in weights:
        p.data = p.data.to(getattr(torch, adapters))
    policy.set_attn_implementation({"text_config": attention})
    if compiled:
        symmpo.language_model(policy).compile()
    optimizer, weight = torch.optim.AdamW(weights, lr=1e-6), symmpo.OBJECTIVES["symmpo"][1]
    rows, gpu = random_rows(s, records, device=device), device.startswith("cuda")
    run = SimpleNamespace(policy=policy, args=SimpleNamespace(
        device=device, dtype="bfloat16", no_share_prefix=plain,
        grad_checkpointing=checkpointing))

    def work():
        table = train.policy_table(run, [dict(row) for row in rows], records)
        sum(symmpo.loss_terms("symmpo", table, table.detach(), weight).values()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if gpu:
            torch.cuda.synchronize()

    usual = symmpo.branch_mask
    symmpo.branch_mask = flex_mask if attention == "flex_attention" else usual
    try:
        work()
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = spread([timed(work)[0][0] for _ in range(rounds)])
    finally:
        symmpo.branch_mask = usual
    layout = layouts(s)[2 if plain else 4]
    tokens = records * sum(prefix + sum(behind) for prefix, behind in layout[0])
    return {"seconds": seconds, "records/s": round(records / seconds[0], 3),
            "tokens/s": round(tokens / seconds[0]),
            "GiB": round(torch.cuda.max_memory_allocated() / 2 ** 30, 2) if gpu else None,
            "TFLOP": records * sum(step_flops(s, *layout[:3], 0).values()) / 1e12}


def saved_bytes(s, layers):
    """Bytes that the packed forward pass of one record in bf16, as in train.policy_table, keeps for
    its backward pass."""
    import peft
    import torch
    from symmpo import logp_table
    policy = random_policy({**s, "layers": layers}, dtype=torch.bfloat16)
    known, kept = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = random_rows(s, image_tokens=(s["px"] // 14) ** 2)
    with (torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
          torch.autocast("cpu", torch.bfloat16), peft.helpers.disable_input_dtype_casting(policy)):
        logp_table(policy, rows, 1)
    return sum(kept.values())


def expectation(s):
    """What the step of a full-size model needs, from its shapes: TFLOP a record, and GiB, of which
    the activations are counted on one and two layers of it."""
    h, inner = s["h"], s["inner"]
    base = s["layers"] * (4 * h * h + 3 * h * inner) + 2 * h * s["vocab"]
    base += s["v_layers"] * 12 * s["v"] ** 2 + h * (s["v"] + h)
    lora = s["layers"] * s["rank"] * (8 * h + 3 * (h + inner))
    one, two = saved_bytes(s, 1), saved_bytes(s, 2)
    gib = {"weights (bf16)": 2 * base, "adapters, gradients, AdamW (fp32)": 16 * lora,
           "activations": one + (two - one) * (s["layers"] - 1)}
    gib = {k: round(v / 2 ** 30, 1) for k, v in gib.items()}
    flop = [sum(step_flops(s, *layout).values()) / 1e12 for layout in layouts(s)]
    return {"parameters": base, "trained": lora, "GiB at micro-batch 1": gib, "TFLOP a record": {
        name: round(f, 1) for (name, *_), f in zip(RUNGS, flop)},
        "predicted ratio": round(flop[0] / flop[-1], 2)}


def cuda(size, rounds, device=None, variants=VARIANTS):
    """The table of VARIANTS on a GPU; where there is none, the expectation."""
    import torch
    device = device or ("cuda" if torch.cuda.is_available() else None)
    if device is None:
        return {"note": "no CUDA GPU here: computed, not measured", **expectation(SIZES[size])}
    rate = matmul_rate(*(3 * [8192 if device != "cpu" else 512]), device, torch.bfloat16)
    rows = []
    for name, options in variants.items():
        gc.collect()
        try:
            row = variant(SIZES[size], device, rounds, **options)
            row["utilisation"] = round(row["TFLOP"] * 1e12 / row["seconds"][0] / rate, 4)
        except (torch.OutOfMemoryError, NotImplementedError) as e:
            row = dict.fromkeys(rows[0].keys() - {"variant"} if rows else (), type(e).__name__)
        rows.append({"variant": name, **row})
        progress(str(rows[-1]))
    return {"rows": rows, "bf16 TFLOP/s of a matrix product": round(rate / 1e12, 1),
            "device": torch.cuda.get_device_name() if device != "cpu" else "cpu"}


# --- command line --------------------------------------------------------------------------------

INSIDE = {f.__name__: f for f in (step_memory, scale_step, scale_records)}
PARTS = {"ladder": ladder, "trl": against_trl, "memory": step_memories, "floor": floor,
         "scale": scale, "cuda": cuda}


def progress(text):
    print(text, file=sys.stderr, flush=True)


def summary(found):
    """The figures that are compared from release to release; null where a part did not run."""
    def last_ratio(part):
        return found[part]["rows"][-1]["ratio"][0] if part in found else None

    mib = {row["step"]: row["MiB"] for row in found.get("memory", {}).get("rows", [])}
    proofs = [part["proof"]["max_logp_diff"] for part in found.values() if "proof" in part]
    return {"five_sequence_time_ratio": last_ratio("ladder"),
            "five_sequence_memory_ratio":
                mib["SymMPO, published"] / mib["SymMPO, ours"] if mib else None,
            "trl_dpo_time_ratio": last_ratio("trl"),
            "trl_dpo_memory_ratio": mib.get("DPO, TRL") and mib["DPO, TRL"] / mib["DPO, ours"],
            "flop_floor_fraction": found.get("floor", {}).get("fraction", [None])[0],
            "max_logp_diff": max(proofs, default=None)}


def markdown(found):
    """The results as Markdown: rows as a table, [median, quartiles] as "1.0 (0.9-1.1)", and a line
    for each of the rest."""
    lines = []
    for name, part in found.items():
        lines.append(f"\n## {name}\n")
        for number, row in enumerate(part.get("rows", [])):
            if number == 0:
                lines += ["| " + " | ".join(row) + " |", "|---" * len(row) + "|"]
            lines.append("| " + " | ".join("{} ({}-{})".format(*v) if isinstance(v, list)
                                           else str(v) for v in (row.get(k, "")
                                                                 for k in part["rows"][0])) + " |")
        lines += [""] + [f"- {k}: {json.dumps(v)}" for k, v in part.items() if k != "rows"]
    return "\n".join(lines) + "\n"


def figure(found, path):
    """Time and memory against records, responses, image tokens and batch, in doubled log scale."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawing, axes = plt.subplots(1, 4, figsize=(16, 3.8), layout="constrained")
    rows = found["rows"]
    for key in ("open s", "check s", "cache fill s"):
        points = [(row["records"], row[key]) for row in rows if key in row]
        axes[0].plot(*zip(*points), "o-", label=f"{key[:-2]} (s)")
    axes[0].plot(*zip(*[(r["records"], max(r["open MiB"], 0.1)) for r in rows]), "s--",
                 label="open (MiB)")
    axes[0].set(xlabel="records")
    for axis, (name, steps) in zip(axes[1:], found["steps"].items()):
        axis.plot(steps["values"], steps["seconds"], "o-", label="step (s)")
        axis.plot(steps["values"], [m / 1024 for m in steps["MiB"]], "s--", label="memory (GiB)")
        axis.set(xlabel={"responses": "responses per prefix", "image tokens": "image tokens",
                         "batch": "records per micro-batch"}[name])
    for axis in axes:
        x, y = axis.lines[0].get_data()
        axis.plot(x, [y[-1] * v / x[-1] for v in x], ":", color="grey", label="linear")
        axis.set(xscale="log", yscale="log")
        axis.legend(fontsize=8)
    for axis, steps in zip(axes[1:], found["steps"].values()):
        axis.minorticks_off()
        axis.set_xticks(steps["values"], steps["values"], fontsize=8, rotation=45)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


def machine():
    import torch
    import transformers
    cpu = [line for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {"date": time.strftime("%Y-%m-%d"), "cpu": cpu[0].split(":")[1].strip() if cpu else "",
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "transformers": transformers.__version__, "load": os.getloadavg()[0],
            "command": " ".join(["python", "bench.py", *sys.argv[1:]])}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small model, few rounds, no scale")
    parser.add_argument("--json", action="store_true", help="the summary as the last line")
    parser.add_argument("--only", help="some parts, comma-separated: " + ", ".join(PARTS))
    parser.add_argument("--size", choices=SIZES, help="default: quick with --quick, else mid")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 3 with --quick, else 9)")
    parser.add_argument("--out", type=Path, help="folder for results (JSON, Markdown, figure)")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    import torch
    import transformers
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.inside:
        return print("\n" + json.dumps(INSIDE[args.inside[0]](*json.loads(args.inside[1]))))
    parts = args.only.split(",") if args.only else ["ladder", "trl", "memory", "floor"]
    if not set(parts) <= set(PARTS):
        parser.error(f"--only {args.only}: the parts are {', '.join(PARTS)}")
    size = args.size or ("quick" if args.quick else "7b" if parts == ["cuda"] else "mid")
    found = {"machine": machine()}
    for name in parts:
        progress(f"{name} ...")
        try:
            found[name] = PARTS[name](size, args.rounds or (3 if args.quick else 9))
        except Problem as e:
            progress(f"error: {e}")
        if args.out:  # after each part: what is measured is kept
            args.out.mkdir(parents=True, exist_ok=True)
            stem = args.out / f"{'-'.join(parts)}-{size}"
            Path(f"{stem}.json").write_text(json.dumps(found, indent=1))
            Path(f"{stem}.md").write_text(markdown(found))
    if args.out and "scale" in found:
        figure(found["scale"], f"{stem}.png")
    print(markdown(found))
    if args.json:
        print(json.dumps(summary(found)))
    sys.exit(0 if len(found) == 1 + len(parts) else 2)


if __name__ == "__main__":
    main()
