"""Speed and memory, side by side with other ways to do the same work.

    python -m speed --quick --json        small model, about a minute on two cores; JSON at the end
    python -m speed                       the mid-size model: the tables of docs/speed.md
    python -m speed --cuda --size 7b      full size on a GPU; without one, what to expect

What is compared, at LLaVA-1.5's token counts:
- ladder: the SymMPO step against its published layout (five padded sequences, logits at every
  position, the vision tower for each sequence, the reference in each step), one saving at a time;
- trl: the DPO step against TRL's DPOTrainer (pip install "trl==1.16.*"; nothing else needs it);
- memory: what a step adds to the resident set of a fresh process;
- floor: the packed step against its matrix products alone, at the rate measured beside it.

How: one thread, random weights, the sides take turns in one process. Ratios are medians over rounds
with their quartiles, and stand beside the proof that both sides compute the same numbers.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch

import symmpo
from speed import measure
from speed.measure import Result, Spent, spread, timed
from speed.sides import RUNGS, Rung, Side, five_sequences, make_trl, prepare
from speed.world import (
    EPOCHS,
    SIZES,
    Layout,
    layouts,
    random_policy,
    random_rows,
    step_flops,
)
from support.cli import UserError, within
from vlm.logprobs import logp_table

OURS, CACHED = Rung("ours"), Rung("ours, reference cached", cached=True)
MEMORY = ("SymMPO, published", "SymMPO, ours", "DPO, TRL", "DPO, ours")


def ladder(size, rounds):
    """The SymMPO step, one saving at a time."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(folder, SIZES[size])
        sides = {rung.name: Side(run, rung) for rung in RUNGS}
        rounds_spent, history = [], []
        for number in range(rounds + 1):
            spent, results = take_turns(sides, number % 3)
            rounds_spent.append(spent)
            history.append(results)
    times, note = measure.undisturbed(rounds_spent)
    published, *_, shared, cached = sides
    for seconds in times:  # the cached reference costs one forward pass in EPOCHS epochs
        seconds[cached] += (seconds[shared] - seconds[cached]) / EPOCHS
    rows = ratios(times, published)
    flops = [sum(step_flops(SIZES[size], layout).values()) for layout in layouts(SIZES[size])]
    for row, flop in zip(rows, flops):
        row["predicted ratio"] = round(flops[0] / flop, 2)
        row["GFLOP"] = round(flop / 1e9, 1)
    return {"rows": rows, "timing": note, "proof": measure.proof(history)}


def take_turns(sides, number):
    """({side: Spent}, [Result]) of one step of each."""
    spent, results = {}, []
    for name, side in sides.items():
        spent[name], result = timed(lambda side=side: side.take_step(number))
        results.append(result)
    return spent, results


def ratios(times, first):
    """A row for each side: its seconds, and how many times faster it is than the first."""
    rows = []
    for name in times[0]:
        seconds = [t[name] for t in times]
        faster = [t[first] / t[name] for t in times]
        rows.append({"step": name, "seconds": spread(seconds), "ratio": spread(faster)})
    return rows


def against_trl(size, rounds):
    """The DPO step against TRL's, which keeps its own loop: after each of its steps ours follow."""
    from transformers import TrainerCallback

    rounds_spent, history = [], []

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = measure.time.perf_counter(), measure.time.process_time()

        def on_step_end(self, *args, **kwargs):
            wall = measure.time.perf_counter() - self.began[0]
            self.spent = Spent(wall, measure.time.process_time() - self.began[1])

        def on_log(self, args, state, control, logs, **kwargs):
            if "logps/chosen" not in logs:  # the summary at the end
                return
            spent, results = take_turns(sides, len(history) % 3)
            rounds_spent.append({"TRL DPOTrainer": self.spent, **spent})
            history.append([logged(logs, beta), *results])

    with tempfile.TemporaryDirectory() as folder:
        run = prepare(folder, SIZES[size], "dpo")
        beta = run.weights.beta
        sides = {rung.name: Side(run, rung) for rung in (OURS, CACHED)}
        make_trl(run, folder, rounds + 1, Turns()).train()
    times, note = measure.undisturbed(rounds_spent)
    rows = ratios(times, "TRL DPOTrainer")
    return {"rows": rows, "timing": note, "proof": measure.proof(history)}


def logged(logs, beta):
    """TRL's log of a step as a `Result`."""
    policy = torch.full((3, 3, 1), torch.nan)
    reference = policy.clone()
    for response, name in ((symmpo.W, "chosen"), (symmpo.L, "rejected")):
        policy[symmpo.M, response] = logs[f"logps/{name}"]
        rho = logs[f"rewards/{name}"] / beta
        reference[symmpo.M, response] = logs[f"logps/{name}"] - rho
    return Result(policy, reference, logs["loss"])


def step_memory(kind, size):
    """Peak MiB of two steps; to be called in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(folder, SIZES[size], "dpo" if "DPO" in kind else "symmpo")
        if kind == "DPO, TRL":
            return measure.peak_of(make_trl(run, folder, steps=2).train)
        rung = RUNGS[0] if kind == "SymMPO, published" else OURS
        side = Side(run, rung)
        run.policy = None

        def two_steps():
            side.take_step(0)
            side.take_step(1)

        return measure.peak_of(two_steps)


def memories(size, rounds):
    """What the sides' steps add to the resident set, MiB."""
    rows = []
    for kind in MEMORY:
        if "TRL" in kind and not importlib.util.find_spec("trl"):
            continue
        rows.append({"step": kind, "MiB": measure.in_new_process(kind, size)})
    return {"rows": rows}


def floor(size, rounds):
    """The packed SymMPO step with its cached reference over its matrix products at the measured
    rate of the decoder's largest one."""
    s = SIZES[size]
    layout = dataclasses.replace(layouts(s)[-1], reference=0)
    parts = step_flops(s, layout)
    longest = max(prefix + sum(branches) for prefix, branches in layout.rows)
    with tempfile.TemporaryDirectory() as folder:
        side = Side(prepare(folder, s), CACHED)
        rounds_spent, rates = [], []
        for number in range(rounds + 1):
            rates.append(measure.matmul_rate(longest, s.width, s.inner))
            rounds_spent.append(take_turns({"step": side}, number % 3)[0])
    times, note = measure.undisturbed(rounds_spent)
    rate, total = statistics.median(rates), sum(parts.values())
    return {
        "fraction": spread([total / rate / t["step"] for t in times]),
        "timing": note,
        "step seconds": spread([t["step"] for t in times]),
        "GFLOP": round(total / 1e9, 1),
        "GFLOP/s": spread([r / 1e9 for r in rates]),
        "FLOP shares": {name: round(flop / total, 3) for name, flop in parts.items()},
    }


# --- a CUDA GPU -----------------------------------------------------------------------------------


def full_size(size, rounds, device=None):
    """The SymMPO step of a full-size model in bf16: published layout, ours, ours with the reference
    cached; ragged lengths. Where there is no GPU, the expectation."""
    s = SIZES[size]
    if device is None and not torch.cuda.is_available():
        return {"note": "no CUDA GPU here: computed, not measured", **expectation(s)}
    device = device or "cuda"
    side = 512 if device == "cpu" else 8192
    rate = measure.matmul_rate(side, side, side, device, torch.bfloat16)
    policy = random_policy(s, device, torch.bfloat16)
    found = {
        "bf16 TFLOP/s of a matrix product": round(rate / 1e12, 2),
        "device": device,
        "rows": [],
    }
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name()
    ways = [
        ("published: five sequences", five_sequences, 1, layouts(s)[0]),
        ("ours", packed, 1, layouts(s)[3]),
        ("ours, reference cached", packed, 0, dataclasses.replace(layouts(s)[3], reference=0)),
    ]
    for name, way, references, layout in ways:
        row = {"step": name, **time_on(policy, s, device, way, references, layout, rounds)}
        row["utilisation"] = round(row["TFLOP"] * 1e12 / row["seconds"][0] / rate, 3)
        found["rows"].append(row)
        progress(str(row))
    return found


def packed(policy, rows):
    return logp_table(policy, rows, 1, tokens_per_forward=2048)


def time_on(policy, size, device, way, references, layout: Layout, rounds):
    """First and later seconds, peak GiB and FLOPs of a step: forward, backward, AdamW."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    weights = symmpo.weights_of("symmpo", {})
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()

    def work():
        rows = random_rows(size, ragged=20)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            if references:
                with torch.no_grad(), policy.disable_adapter():
                    way(policy, [dataclasses.replace(row) for row in rows])
            table = way(policy, rows)
        rho = table - table.detach()
        terms = symmpo.loss_terms("symmpo", symmpo.Table(rho, table, None), weights)
        sum(terms.values()).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        measure.synchronise(device)

    random.seed(0)
    first = timed(work)[0].wall
    seconds = spread([timed(work)[0].wall for _ in range(rounds)])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device != "cpu" else None
    return {
        "first call, seconds": round(first, 3),
        "seconds": seconds,
        "records/s": round(1 / seconds[0], 3),
        "GiB": peak and round(peak, 2),
        "TFLOP": round(sum(step_flops(size, layout).values()) / 1e12, 6),
    }


def expectation(size):
    """What the step of a full-size model needs, from its shapes."""
    width, inner = size.width, size.inner
    base = size.layers * (4 * width * width + 3 * width * inner) + 2 * width * size.vocabulary
    base += size.tower_layers * 12 * size.tower**2 + width * (size.tower + width)
    lora = size.layers * size.rank * (8 * width + 3 * (width + inner))
    tflops = {}
    for rung, layout in zip(RUNGS, layouts(size)):
        tflops[rung.name] = round(sum(step_flops(size, layout).values()) / 1e12, 1)
    return {
        "parameters": base,
        "trained": lora,
        "GiB of weights (bf16)": round(2 * base / 2**30, 1),
        "GiB of adapters, gradients, AdamW (fp32)": round(16 * lora / 2**30, 1),
        "TFLOP a record": tflops,
    }


# --- command line ---------------------------------------------------------------------------------

PARTS = {"ladder": ladder, "trl": against_trl, "memory": memories, "floor": floor}


def progress(text):
    print(text, file=sys.stderr, flush=True)


def summary(found):
    """The figures that are compared from release to release; null where a part did not run."""

    def last_ratio(part):
        return found[part]["rows"][-1]["ratio"][0] if part in found else None

    def memory_ratio(theirs, ours):
        rows = found.get("memory", {}).get("rows", [])
        mib = {row["step"]: row["MiB"] for row in rows}
        return mib[theirs] / mib[ours] if theirs in mib else None

    proofs = [part["proof"]["max_logp_diff"] for part in found.values() if "proof" in part]
    return {
        "five_sequence_time_ratio": last_ratio("ladder"),
        "five_sequence_memory_ratio": memory_ratio(MEMORY[0], MEMORY[1]),
        "trl_dpo_time_ratio": last_ratio("trl"),
        "trl_dpo_memory_ratio": memory_ratio(MEMORY[2], MEMORY[3]),
        "flop_floor_fraction": found.get("floor", {}).get("fraction", [None])[0],
        "max_logp_diff": max(proofs, default=None),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small model, few rounds")
    add("--json", action="store_true", help="the summary as the last line")
    add("--only", help="some parts, comma-separated: " + ", ".join(PARTS))
    add("--cuda", action="store_true", help="full size on a GPU instead")
    add("--size", choices=SIZES, help="default: quick with --quick, 7b with --cuda, else mid")
    add("--rounds", type=within(1), help="timed rounds (default 3 with --quick, else 9)")
    add("--out", type=Path, help="folder for the results (JSON and Markdown)")
    add("--inside", choices=MEMORY, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)
    if args.inside:
        return print("\n" + json.dumps(step_memory(args.inside, args.size)))
    parts = {"cuda": full_size} if args.cuda else PARTS
    if args.only:
        names = args.only.split(",")
        if not set(names) <= set(PARTS):
            parser.error(f"--only {args.only}: the parts are {', '.join(PARTS)}")
        parts = {name: PARTS[name] for name in names}
    default = "quick" if args.quick else "7b" if args.cuda else "mid"
    size, rounds = args.size or default, args.rounds or (3 if args.quick else 9)
    command = " ".join(["python", "-m", "speed", *(sys.argv[1:] if argv is None else argv)])
    found, failed = {"machine": measure.machine(command)}, False
    for name, part in parts.items():
        progress(f"{name} ...")
        try:
            found[name] = part(size, rounds)
        except UserError as error:
            progress(f"error: {error}")
            failed = True
        if args.out:  # after each part: what is measured is kept
            args.out.mkdir(parents=True, exist_ok=True)
            stem = args.out / f"{'-'.join(parts)}-{size}"
            Path(f"{stem}.json").write_text(json.dumps(found, indent=1))
            Path(f"{stem}.md").write_text(measure.markdown(found))
    print(measure.markdown(found))
    if args.json:
        print(json.dumps(summary(found)))
    sys.exit(2 if failed else 0)


if __name__ == "__main__":
    main()
