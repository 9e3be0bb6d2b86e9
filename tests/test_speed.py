"""The comparison at tiny size: its sides compute the same."""

import json

import pytest
import torch

import on_gpu
from speed import __main__ as speed
from speed.measure import Result, in_new_process, peak_of, proof
from speed.sides import RUNGS, Rung, prepare, rows_of_records, step_memory
from speed.world import PROMPT, RESPONSE, patches_of
from support.cli import UserError


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("world"), "tiny", "symmpo", "cpu")


def test_ladder_sides_agree_over_steps_and_see_the_image(tmp_path):
    rows, figures = speed.ladder("tiny", tmp_path, rounds=3, device="cpu")
    *rungs, proven = rows
    assert [row["step"] for row in rungs] == [rung.name for rung in RUNGS]
    assert figures["five_sequence_time_ratio"] == rungs[-1]["ratio"][0] > 0
    assert proven["steps"] == 4 and proven["max_logp_diff"] < 2e-3
    assert proven["image_swap_moves"] > 0.1
    low, high = proven["loss_range"]
    assert high - low > 0.05


def test_proof_refuses_sides_that_differ():
    policy, reference = torch.randn(2, 3, 3, 1)
    history = [[Result(policy, reference + n, 0.7 - n / 10)] * 2 for n in range(3)]
    assert proof(history)["image_swap_moves"] == pytest.approx(2)
    off = Result(policy + 0.1, reference + 1, 0.6)
    other = [history[0], [history[1][0], off], history[2]]
    blind = [[Result(policy, reference, loss)] * 2 for loss in (0.7, 0.6, 0.5)]
    for wrong in (other, blind):  # blind: swapping the image changes nothing
        with pytest.raises(UserError):
            proof(wrong)
    assert proof(other, exact=False)["max_logp_diff"] == pytest.approx(0.1, abs=1e-6)


def test_the_sequences_are_as_long_as_it_says(run):
    for rows in rows_of_records(run):
        for row in rows:
            assert row.inputs["input_ids"].shape[1] == patches_of("tiny") + PROMPT
            assert {len(response) for response in row.responses} == {RESPONSE}


def test_trl_takes_the_same_steps(tmp_path):
    pytest.importorskip("trl")
    from against_trl import against_trl

    rows = against_trl("tiny", tmp_path, rounds=3, device="cpu")
    assert rows[0]["step"] == "TRL DPOTrainer"
    assert rows[-1]["max_logp_diff"] < 2e-3 and rows[-1]["max_loss_diff"] < 1e-4


def test_what_is_measured_on_a_gpu_runs_on_a_cpu(tmp_path):
    def part(name):
        return on_gpu.PARTS[name]("tiny", tmp_path, 2, "cpu")[0]

    assert part("rates")[0]["TFLOP/s"] > 0
    (found,) = part("exact")
    assert found["segments against mask"] < 2e-3 and found["segments against plain"] < 2e-3
    assert found["of"] > 100
    *rungs, proven = part("ragged ladder")
    assert proven["max_logp_diff"] < 2e-3
    published, *_, ours = rungs
    assert published["TFLOP"] > 2 * ours["TFLOP"] > 0
    assert 0 < ours["of the rate"] < 1


def test_each_ragged_step_has_lengths_of_its_own(run):
    whole = rows_of_records(run)
    lengths = []
    for number in range(10):
        rows = on_gpu.shortened(whole[number % len(whole)], number)
        lengths.append(tuple(row.tokens() for row in rows))
        assert all(len(y) > RESPONSE // 2 for row in rows for y in row.responses)
    assert len(set(lengths)) == 10


def allocate():
    torch.ones(64, 2**20 // 4)


def test_memory_of_a_step_is_seen():
    """In a new process: here an earlier test may have left room that is resident already."""
    assert in_new_process(peak_of, allocate) == pytest.approx(64, abs=8)


def test_memory_in_a_fresh_process(tmp_path):
    assert in_new_process(step_memory, Rung("ours"), tmp_path, "tiny", "cpu") > 1


def test_command_line_ends_in_json(capsys):
    speed.main(["--only", "ladder", "--size", "tiny", "--rounds", "2", "--json"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last) == speed.SUMMARY.split()
    assert last["five_sequence_time_ratio"] > 0
    assert 0 <= last["max_logp_diff"] < 2e-3


def test_says_what_is_wrong_with_the_command():
    with pytest.raises(UserError, match="--rounds 1"):
        speed.main(["--rounds", "1"])  # too few steps to compare the sides
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="finds no CUDA GPU"):
            speed.main(["--cuda", "--size", "tiny"])
