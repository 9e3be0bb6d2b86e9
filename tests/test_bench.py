"""The benchmark at tiny size: its sides compute the same, its FLOPs are those that are executed."""

import json
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import symmpo
from data import Problem

TINY = bench.SIZES["tiny"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_ladder_sides_agree_over_steps_and_see_the_image():
    found = bench.ladder("tiny", rounds=3)
    assert [row["step"] for row in found["rows"]] == [name for name, *_ in bench.RUNGS]
    assert found["proof"]["steps"] == 4 and found["proof"]["max_logp_diff"] < 2e-3
    assert found["proof"]["image_swap_moves"] > 0.1
    low, high = found["proof"]["loss_range"]
    assert high - low > 0.05
    predicted = [row["predicted ratio"] for row in found["rows"]]
    assert predicted == sorted(predicted) and predicted[0] == 1


def test_proof_refuses_sides_that_differ():
    policy, reference = torch.randn(2, 1, 2, 3)
    history = [[(policy, reference + n, 0.7 - n / 10)] * 2 for n in range(3)]
    assert bench.proof(history)["image_swap_moves"] == pytest.approx(2)
    other = [history[0], [history[1][0], (policy + 0.1, reference + 1, 0.6)], history[2]]
    blind = [[(policy, reference, loss)] * 2 for loss in (0.7, 0.6, 0.5)]
    for wrong in (other, blind, history[:2]):  # blind: swapping the image changes nothing
        with pytest.raises(Problem):
            bench.proof(wrong)


def test_trl_takes_the_same_steps():
    pytest.importorskip("trl")
    found = bench.against_trl("tiny", rounds=3)
    assert found["proof"]["max_logp_diff"] < 2e-3 and found["proof"]["max_loss_diff"] < 1e-4
    assert [row["step"] for row in found["rows"]][0] == "TRL DPOTrainer"


def test_without_trl_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "trl.trainer", None)
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    with pytest.raises(Problem, match="pip install"):
        bench.make_trl(None, None, 1)


@pytest.mark.parametrize("rung", [2, 3])
def test_flops_are_those_that_are_executed(rung):
    """All but attention, which PyTorch's counter does not know on a CPU. Rank-sized rest: the first
    layer's adapters need no gradient of their input."""
    policy, rows = bench.random_policy(TINY), bench.random_rows(TINY)
    table = bench.RUNGS[rung][1] or (lambda policy, rows: symmpo.logp_table(policy, rows, 1))
    with FlopCounterMode(display=False) as counter:
        table(policy, rows).nansum().backward()
    counts = counter.get_flop_counts()["Global"]
    executed = sum(n for op, n in counts.items() if "attention" not in str(op))
    parts = bench.step_flops(TINY, *bench.layouts(TINY)[rung][:3], reference=0)
    tower_attention = 2 * TINY["v_layers"] * 4 * 17**2 * TINY["v"]
    expected = sum(parts.values()) - parts["attention"] - tower_attention
    assert executed == pytest.approx(expected, rel=0.02)


def test_predictions_for_the_full_size():
    for size in ("7b", "13b"):
        flop = [
            sum(bench.step_flops(bench.SIZES[size], *layout).values())
            for layout in bench.layouts(bench.SIZES[size])
        ]
        assert 2.7 < flop[0] / flop[-1] < 2.9


def test_cuda_part_runs_on_a_cpu_and_has_an_expectation_without_gpu():
    variants = {
        k: v
        for k, v in bench.VARIANTS.items()
        if not v or {"plain", "adapters", "attention"} & v.keys()
    }
    variants["both"] = {"records": 2, "checkpointing": True}
    rows = bench.cuda("tiny", 1, "cpu", variants)["rows"]
    assert len(rows) == len(variants)
    for row in rows:  # flex attention has no backward pass on CPUs
        assert ("flex" in row["variant"]) == isinstance(row["seconds"], str)
    if not torch.cuda.is_available():
        assert "not measured" in bench.cuda("tiny", 1)["note"]
    assert bench.saved_bytes(TINY, 2) > bench.saved_bytes(TINY, 1) > 1e6


def test_flex_mask_is_the_branch_mask():
    row_of = torch.tensor([0] * 9 + [1] * 7)
    branch = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1, 1, 2, 2])
    may_see, at = bench.flex_mask(row_of, branch).mask_mod, torch.arange(16)
    mask = symmpo.branch_mask(row_of, branch)[0, 0] == 0
    assert torch.equal(may_see(0, 0, at[:, None], at[None]), mask)


def test_memory_of_a_step_is_seen():
    assert bench.peak_of(lambda: torch.ones(64, 2**20 // 4)) == pytest.approx(64, abs=8)


def test_command_line_ends_in_json(capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        bench.main(
            ["--only", "floor", "--size", "tiny", "--rounds", "1", "--json", "--out", str(tmp_path)]
        )
    assert end.value.code == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < last["flop_floor_fraction"] < 1 and last["trl_dpo_time_ratio"] is None
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}


def test_scale_step_and_figure(tmp_path):
    points = [bench.scale_step("tiny", axis, 2) for axis in bench.AXES]
    assert points[0][0] > 0
    steps = {
        axis: {"values": [1, 2], "seconds": [s / 2, s], "MiB": [20, 20 + mib]}
        for axis, (s, mib) in zip(bench.AXES, points)
    }
    rows = [bench.scale_records(bench_records(tmp_path, n), n, check=False) for n in (10, 100)]
    assert rows[1]["records"] == 100 and rows[1]["cache look-up ms"] > 0
    bench.figure({"rows": rows, "steps": steps}, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def bench_records(folder, n):
    path = folder / f"{n}.jsonl"
    line = json.dumps({"image": "a.png", "prompt": "p", "chosen": "c", "rejected": "r"})
    path.write_text(f"{line}\n" * n)
    return path
