"""The loop through its real command line, on a small LLaVA: exactness, resume, refusals."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import symmpo
import train
from conftest import ROOT, save_gemma3
from data import Examples, build_rows
from support.files import whole_lines
from support.reference import ReferenceCache
from vlm import attention
from vlm.load import load_adapter, load_model
from vlm.logprobs import logp_table
from vlm.prompts import Prompts

FAST = "--lora-r 4 --lora-alpha 8 --lr 1e-2 --steps 3 --batch-size 4 --sample-every 99".split()


@pytest.fixture
def fit(llava, prefs, tmp_path, capsys):
    """fit(*options) trains in this process and returns (loss per step, adapter, printed text)."""
    count = iter(range(99))

    def run(*options, out=None, data=prefs):
        out = Path(out or tmp_path / f"run{next(count)}")
        train.main(
            [
                "--model",
                str(llava),
                "--data",
                str(data),
                "--out",
                str(out),
                "--cache",
                str(tmp_path / "cache"),
                *FAST,
                *map(str, options),
            ]
        )
        lines = read_metrics(out)
        adapter = load_file(sorted(out.glob("checkpoint-*"))[-1] / "adapter_model.safetensors")
        return [line["loss"] for line in lines], adapter, capsys.readouterr().out

    return run


def read_metrics(out):
    return whole_lines(Path(out) / "metrics.jsonl")


def refusal(capsys, *argv):
    """The message of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as e:
        train.main([str(a) for a in argv])
    assert e.value.code == 2
    return capsys.readouterr().err


KEPT = {}


def plain(fit):
    """What fit() returns, trained once for all tests that compare with it."""
    if "plain" not in KEPT:
        KEPT["plain"] = fit()
    return KEPT["plain"]


def close(a, b, tolerance=2e-5):
    return a.keys() == b.keys() and all((a[k] - b[k]).abs().max() < tolerance for k in a)


def test_it_learns_and_says_what_it_does(fit):
    losses, adapter, text = fit("--steps", 12)
    assert losses[0] == pytest.approx(4 * 0.693147, abs=1e-4) and losses[-1] < 0.9 * losses[0]
    for fact in ("12 records", "closed form 2.772589", "language_model", "ASSISTANT:", "</s>"):
        assert fact in text
    assert all("language_model" in name and "vision" not in name for name in adapter)
    assert all(adapter[name].abs().max() > 0 for name in adapter)
    targets = {name.split(".")[-3] for name in adapter}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_micro_batches_make_no_difference(fit):
    one, four = plain(fit), fit("--micro-batch", 4)
    assert one[0] == pytest.approx(four[0], abs=1e-5) and close(one[1], four[1])


def test_shared_prefix_equals_plain(fit):
    shared, padded = plain(fit), fit("--no-share-prefix")
    assert shared[0] == pytest.approx(padded[0], abs=1e-5) and close(shared[1], padded[1])


def test_gradient_checkpointing_changes_nothing_and_trains(fit):
    usual, saving = plain(fit), fit("--grad-checkpointing")
    assert usual[0] == pytest.approx(saving[0], abs=1e-5) and close(usual[1], saving[1])


def test_last_short_batch_is_divided_by_its_real_size(fit):
    """12 records, batches of 5: the third has two, and its mean is over two."""
    losses, _, _ = fit("--batch-size", 5, "--steps", 6, "--lr", 1e-9)
    assert losses == pytest.approx([4 * 0.693147] * 6, abs=1e-4)


def test_records_are_read_ahead_of_the_step(fit, tmp_path, monkeypatch):
    """On a slow disk (0.1 s a record) a step that takes longer waits for none with a worker."""
    read, table, waits = Examples.__getitem__, train.policy_table, []
    monkeypatch.setattr(Examples, "__getitem__", lambda *args: (time.sleep(0.1), read(*args))[1])
    monkeypatch.setattr(
        train, "policy_table", lambda *args, **more: (time.sleep(0.15), table(*args, **more))[1]
    )
    for workers in (0, 1):
        fit("--batch-size", 2, "--steps", 2, "--workers", workers, out=tmp_path / str(workers))
        waits.append([line["data_wait"] for line in read_metrics(tmp_path / str(workers))])
    assert min(waits[0]) > 0.1 and max(waits[1][1:]) < min(waits[0]) / 3


def test_resume_is_exact(fit, tmp_path, monkeypatch):
    options = ["--steps", 6, "--lora-dropout", 0.2]  # the draws of each step come back, too
    whole, out = fit(*options), tmp_path / "cut"
    assert whole[0] != pytest.approx(fit("--steps", 6)[0], abs=1e-3)
    real = symmpo.loss_terms
    calls = iter(range(99))

    def stop_in_step_4(*args):  # a signal, as Ctrl-C sends it: three steps are done
        if next(calls) == 15:  # one of them checks the start
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(symmpo, "loss_terms", stop_in_step_4)
    with pytest.raises(SystemExit) as e:
        fit(*options, out=out)
    assert e.value.code == 130 and (out / "checkpoint-3").is_dir()
    monkeypatch.undo()
    kept = json.loads((out / "checkpoint-3" / "run.json").read_text())
    assert "device" not in kept  # on several GPUs each process has its own, and all may resume
    resumed = fit(*options, "--resume", out=out)
    assert resumed[0] == pytest.approx(whole[0], abs=1e-6) and close(resumed[1], whole[1], 1e-6)


def test_kill_minus_nine_and_resume(llava, prefs, fit, tmp_path):
    whole, out = fit("--steps", 8, "--save-every", 1), tmp_path / "killed"
    command = [
        sys.executable,
        ROOT / "train.py",
        "--model",
        llava,
        "--data",
        prefs,
        "--out",
        out,
        "--cache",
        tmp_path / "cache2",
        *FAST,
        "--steps",
        8,
        "--save-every",
        1,
    ]
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(out.glob("checkpoint-[3-8]")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    resumed = fit("--steps", 8, "--save-every", 1, "--resume", out=out)
    assert resumed[0] == pytest.approx(whole[0], abs=1e-5) and close(resumed[1], whole[1])


def test_torchrun_is_refused(fit, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        fit()
    assert "one process trains, on one GPU" in capsys.readouterr().err


def test_one_folder_one_process(fit, tmp_path, capsys):
    (tmp_path / "busy").mkdir()
    hold = (
        "import fcntl; f = open('.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold],
        cwd=tmp_path / "busy",
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(SystemExit):
        fit(out=tmp_path / "busy")
    other.communicate("\n")
    assert "another process" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--objective", "dpo"],
        ["--objective", "dpo-no-image"],
        ["--objective", "sft"],
        ["--objective", "copo"],
        ["--objective", "mdpo", "--anchors", "yw,yl,ml"],
        ["--lam", "0", "--gamma", "0", "--eta", "0"],
        ["--objective", "dpo", "--eta", "1"],
    ],
)
def test_every_objective_runs(fit, options):
    losses, _, text = fit(*options, "--steps", 2)
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert ("rho = 0 within" in text) == (options[1] != "sft")


def test_copo_draws_a_crop_when_there_is_no_contrast_image(fit, prefs):
    short = prefs.parent / "short.jsonl"
    keep = ("image", "prompt", "chosen", "rejected")
    short.write_text(
        "".join(
            json.dumps({k: json.loads(line)[k] for k in keep}) + "\n"
            for line in prefs.read_text().splitlines()
        )
    )
    assert len(fit("--objective", "mdpo", data=short)[0]) == 3


def test_reference_is_computed_once(fit, monkeypatch):
    counts = []
    real = train.policy_table

    def counting(run, rows, records):
        counts.append(torch.is_grad_enabled())
        return real(run, rows, records)

    monkeypatch.setattr(train, "policy_table", counting)
    fit("--steps", 6)
    epochs = 2  # at the start of each, one record's reference is computed again and compared
    both_ways = 2  # at the start: with a shared prefix, and without
    start = 1  # there it is also compared with the policy, before anything is kept
    assert counts.count(True) == 1 + 24
    assert counts.count(False) == 12 + start + epochs + both_ways
    counts.clear()
    fit(
        "--steps", 6
    )  # another run, the same cache: one record an epoch is computed anew to check it
    assert counts.count(False) == start + epochs + both_ways
    counts.clear()
    fit("--steps", 3, "--objective", "sft")  # reads no reference
    assert counts == [False] * both_ways + [True] * 12


def test_processes_may_open_the_cache_at_once(tmp_path):
    """One that finds the file locked waits; with a write-ahead log some gave up."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(2)

    def use():
        for i in range(60):
            barrier.wait(30)
            ReferenceCache(tmp_path / f"{i}.sqlite").file.close()

    pair = [fork.Process(target=use) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
    assert [process.exitcode for process in pair] == [0, 0]


def test_a_wrong_cache_is_refused(fit, tmp_path, capsys):
    fit()
    with sqlite3.connect(next((tmp_path / "cache").glob("*.sqlite"))) as cache:
        wrong = torch.full((9,), -3.0).numpy().tobytes()
        cache.execute("UPDATE tables SET nats = ?", (wrong,))
    cache.close()
    with pytest.raises(SystemExit):
        fit()
    assert "the reference and its cache (delete" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [0, 1])
def test_a_response_that_sees_another_one_is_refused(seed, tmp_path, monkeypatch, capsys):
    """On the bundled records, of which many are answered in a word: the longest is looked at."""

    def causal(row_of, branch, like):
        return torch.full((len(branch), len(branch)), -math.inf).triu(1)

    monkeypatch.setattr(attention, "branch_mask", causal)
    with pytest.raises(SystemExit):
        train.main(["--seed", str(seed), "--out", str(tmp_path), "--cache", str(tmp_path)])
    shown = capsys.readouterr()
    assert "with a shared prefix and without it, log-probs" in shown.err
    label = re.search(r"label chosen \((\d+) tokens\)", shown.out)
    assert int(label[1]) > 10
    (cache,) = tmp_path.glob("*.sqlite")
    with sqlite3.connect(cache) as kept:
        assert kept.execute("SELECT count(*) FROM tables").fetchone() == (0,), (
            "nothing wrong is kept"
        )


def test_step_0_catches_dropout(llava, fit, capsys, monkeypatch):
    real = train.add_lora

    def with_dropout(model, *args):
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        return real(model, *args)

    monkeypatch.setattr(train, "add_lora", with_dropout)
    with pytest.raises(SystemExit):
        fit()
    assert "before the first step" in capsys.readouterr().err


def test_non_finite_loss_names_the_records_and_saves(fit, tmp_path, capsys, monkeypatch):
    real = symmpo.loss_terms

    def broken_after_the_first_step(name, table, weights):
        moved = table.rho.detach().abs().nan_to_num().max() > 0
        factor = math.nan if moved else 1.0
        return {term: value * factor for term, value in real(name, table, weights).items()}

    monkeypatch.setattr(symmpo, "loss_terms", broken_after_the_first_step)
    with pytest.raises(SystemExit):
        fit(out=tmp_path / "nan")
    message = capsys.readouterr().err
    assert "step 1: loss nan" in message and re.search(r"record numbers \[\d+, \d+, \d+", message)
    assert (tmp_path / "nan" / "checkpoint-1" / "adapter_model.safetensors").exists()


def test_bad_input_is_named(llava, prefs, tmp_path, capsys, fit):
    lines = prefs.read_text().splitlines()
    blank = {**json.loads(lines[3]), "rejected": " "}
    broken = prefs.parent / "broken.jsonl"
    gone = {**json.loads(lines[0]), "image": "gone.png"}
    broken.write_text("\n".join([*lines, json.dumps(blank), json.dumps(gone), "{"]) + "\n")
    base = ["--model", llava, "--cache", tmp_path / "cache", *FAST]
    for argv, reason in [
        ([*base, "--data", tmp_path / "none.jsonl"], "none.jsonl: no such file"),
        ([*base, "--data", broken, "--steps", 9, "--out", tmp_path / "b"], f"{broken}:1"),
        ([*base], "--data is missing"),
        ([*base, "--data", prefs, "--lr", "0"], "--lr 0.0: must be above 0"),
        ([*base, "--data", prefs, "--resume"], "--resume needs --out"),
        ([*base, "--data", prefs, "--anchors", "foo"], "--anchors: symmpo has no cell 'foo'"),
        (
            [*base, "--data", prefs, "--objective", "dpo", "--lam", "3"],
            "--lam: the objective dpo does not read it",
        ),
        (["--data", prefs], "--model is missing"),
        ([*base, "--data", prefs, "--load-4bit", "--device", "cpu"], "needs a CUDA GPU"),
        ([*base, "--data", prefs, "--max-length", 40, "--out", tmp_path / "c"], "-length is 40"),
        (["--model", tmp_path, "--data", prefs, "--out", tmp_path / "d"], "no vision-language"),
    ]:
        assert reason in refusal(capsys, *argv)
    for argv in (
        ["--objective", "ppo"],
        ["--no-such-option"],
        ["--workers", -1],
        ["--steps", -1],
        ["--lora-dropout", 1],
        ["--beta", -1],
        ["--clip", "inf"],
        ["--epochs", "nan"],
        ["--device", "cuda:1"],
        ["--warmup", "x"],
    ):
        assert argv[0] in refusal(capsys, *argv)
    losses, _, text = fit("--skip-bad", "--steps", 4, data=broken)
    assert len(losses) == 4 and text.count("left out: ") == 3
    assert f"{broken}:13: the field rejected is empty" in text
    losses, _, _ = fit("--skip-bad", "--batch-size", 1, "--steps", 15, data=broken)
    assert len(losses) == 12  # three batches had nothing in them


def test_a_folder_is_never_overwritten(fit, llava, prefs, tmp_path, capsys):
    fit(out=tmp_path / "x")
    base = [
        "--model",
        llava,
        "--data",
        prefs,
        "--cache",
        tmp_path / "cache",
        *FAST,
        "--out",
        tmp_path / "x",
    ]
    assert "holds another run" in refusal(capsys, *base)
    assert "lr was 0.01, is 0.5" in refusal(capsys, *base, "--resume", "--lr", "0.5")


def test_unpackable_families_are_refused_by_name_and_train_without(tmp_path, prefs, capsys):
    folder = save_gemma3(tmp_path / "gemma")
    argv = [
        "--model",
        folder,
        "--data",
        prefs,
        "--cache",
        tmp_path / "cache",
        *FAST,
        "--out",
        tmp_path / "g",
    ]
    message = refusal(capsys, *argv)
    assert "gemma3" in message and "--no-share-prefix" in message
    train.main([str(a) for a in [*argv, "--no-share-prefix"]])
    text = capsys.readouterr().out
    assert "<start_of_turn>model" in text and "<end_of_turn>'" in text  # its own end is trained on
    assert "4 of them image" in text and text.count("<image_soft_token>") == 1
    assert [round(line["loss"], 3) for line in read_metrics(tmp_path / "g")][0] == 2.773


def test_held_out_records_and_samples(fit, prefs, tmp_path):
    fit("--eval-data", prefs, "--sample-every", 2, out=tmp_path / "h")
    lines = read_metrics(tmp_path / "h")
    found = [("eval/loss" in line, len(line.get("samples", []))) for line in lines]
    assert found == [(False, 0), (True, 2), (True, 2)]


def test_image_tokens_that_do_not_fit_are_explained(llava, prefs, tmp_path, capsys):
    shutil.copytree(llava, tmp_path / "odd")
    path = tmp_path / "odd" / "processor_config.json"
    path.write_text(
        path.read_text().replace(
            '"num_additional_image_tokens": 1', '"num_additional_image_tokens": 2'
        )
    )
    message = refusal(
        capsys,
        "--model",
        tmp_path / "odd",
        "--data",
        prefs,
        "--out",
        tmp_path / "o",
        "--cache",
        tmp_path / "cache",
        *FAST,
    )
    assert f"{prefs}:" in message and "17 image tokens" in message and "16 features" in message


def test_help_has_every_option():
    began = time.time()
    text = subprocess.run(
        [sys.executable, ROOT / "train.py", "--help"], check=True, capture_output=True, text=True
    ).stdout
    assert time.time() - began < 6  # two seconds for torch, and a busy machine
    for flag in ("--model", "--no-share-prefix", "--skip-bad", "--lora-alpha", "--gamma"):
        assert flag in text
    run, loss = text.split("loss; without them, the objective's own:")
    assert "--beta BETA " in loss and "--workers WORKERS " in run and "--beta BETA " not in run


def test_adapter_loads_with_peft(fit, llava, prefs, tmp_path):
    fit(out=tmp_path / "p")
    folder = next((tmp_path / "p").glob("checkpoint-*"))
    model, processor = load_model(str(llava))
    model = load_adapter(model, folder)
    record = data.Records(prefs)[0]
    rows = build_rows(record, Prompts(processor, "vicuna"), [(0, 0)])
    with torch.no_grad():
        tuned = logp_table(model, rows, 1)[0, 0, 0]
        with model.disable_adapter():
            assert abs(logp_table(model, rows, 1)[0, 0, 0] - tuned) > 1e-3


def test_no_micro_batch_waits_for_the_gpu(fit, monkeypatch):
    """On a GPU a look at a computed number waits for all that the GPU was asked to do: a step looks
    when its gradients are there, not once more for each micro-batch. (What is looked at of tokens
    are integers on the host; images are read in another process.)"""
    looked, inside = [], []

    def watch(name):
        real = getattr(torch.Tensor, name)

        def watching(tensor, *args, **more):
            if inside and tensor.dtype != torch.long:
                looked.append(name)
            return real(tensor, *args, **more)

        monkeypatch.setattr(torch.Tensor, name, watching)

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        watch(name)
    real = train.forward_and_backward

    def gradients(*args):
        inside.append(True)
        try:
            return real(*args)
        finally:
            inside.clear()

    fit()  # fills the reference's cache
    monkeypatch.setattr(train, "forward_and_backward", gradients)
    fit("--workers", 1)
    assert looked == []
