"""What `python -m speed --cuda` measures on a GPU beside the ladder and its memory: the card's
rates, attention in segments against the mask, lengths that change, TRL's DPOTrainer.

Each part prints its lines as it goes, so that a failure late loses nothing. All of it runs on a CPU
as well, where tests/test_speed.py calls it at tiny size.
"""

from dataclasses import replace
from importlib.util import find_spec

import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from speed import measure
from speed.__main__ import compare, ratios
from speed.sides import RECORDS, RUNGS, Side, prepare, rows_of_records
from vlm.load import mixed_precision
from vlm.logprobs import packed_logps, plain_logps


def rates(size, folder, rounds, device):
    """What the machine can do: matrix products in TFLOP/s, copies in GB/s."""
    return [measured_rates(device)], {}


def measured_rates(device):
    n, dtype = (1024, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    matrix = torch.randn(n, n, device=device, dtype=dtype)
    product = Timer("m @ m", globals={"m": matrix}).blocked_autorange(min_run_time=1)
    copy = Timer("m.clone()", globals={"m": matrix}).blocked_autorange(min_run_time=1)
    tflops = 2e-12 * n**3 / product.median
    return {"TFLOP/s": tflops, "GB/s": 2e-9 * matrix.nbytes / copy.median}


def shortened(rows, number):
    """Without the first tokens of each response, as many as no other number and response lacks."""
    found = []
    for row in rows:
        responses = []
        for (_, response), tokens in zip(row.cells, row.responses):
            responses.append(tokens[(3 * number + response) % (len(tokens) // 2) :])
        found.append(replace(row, responses=responses))
    return found


def exact(size, folder, rounds, device):
    """The same responses in one sequence by segments, by the mask, and each in its own: the largest
    differences in nats."""
    run = prepare(folder, size, "symmpo", device)
    rows = rows_of_records(run)[0]
    with torch.no_grad(), mixed_precision(run.policy, device != "cpu"):
        segments = sums(packed_logps(run.policy, rows))
        mask = sums(packed_logps(run.policy, rows, masked=True))
        plain = sums(plain_logps(run.policy, rows))
    found = {"segments against mask": (segments - mask).abs().max().item()}
    found["segments against plain"] = (segments - plain).abs().max().item()
    found["of"] = plain.abs().max().item()
    return [found], {}


def sums(logps):
    return torch.stack([logp.sum() for logp in logps])


def ragged(size, folder, rounds, device):
    """The ladder on lengths that are new in each step, so that what is planned or compiled for a
    length is paid for in each, and what part of the machine's rate the
    steps' products are; in one process, so that peaks of memory are the allocator's."""
    run = prepare(folder, size, "symmpo", device)
    whole = rows_of_records(run)
    records = [shortened(whole[n % RECORDS], n) for n in range(rounds + 1)]
    sides = {rung.name: Side(run, rung, records) for rung in RUNGS}
    rows, rate = [], measured_rates(device)["TFLOP/s"]
    times, proof = compare(sides, rounds, device)
    for row in ratios(times):
        side = sides[row["step"]]
        row["peak MiB"] = measure.peak_of(lambda side=side: side.take_step(0), device)
        with FlopCounterMode(display=False) as counter:
            side.take_step(0)
        row["TFLOP"] = counter.get_total_flops() / 1e12
        row["of the rate"] = row["TFLOP"] / row["seconds"][0] / rate
        rows.append(row)
    return [*rows, proof], {}


def trl(size, folder, rounds, device):
    """The DPO step against TRL's, where TRL is installed."""
    if find_spec("trl") is None:
        return [{"TRL": "is not installed"}], {}
    from tests.against_trl import against_trl

    return against_trl(size, folder, rounds, device), {}


PARTS = {"rates": rates, "exact": exact, "ragged ladder": ragged, "trl": trl}
