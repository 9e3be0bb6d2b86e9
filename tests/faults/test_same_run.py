"""What goes on is what was begun: checkpoints, records, weights, folders, or a refusal by name."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_kill import job  # noqa: F401

import train
from conftest import ROOT
from construct import contrast, responses, review
from support.cli import UserError
from support.formats import normalise
from support.images import open_image
from vlm.load import fingerprint, load_adapter, load_model


def command(argv, *more):
    return [*map(str, argv), *map(str, more)]


def refused(argv, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def three_steps(job, tmp_path_factory):  # noqa: F811
    """(argv, its folder, its data) of a run that was stopped after three of four steps."""
    argv, _, _ = job("whole")
    base = tmp_path_factory.mktemp("three")
    shutil.copytree(argv[3].parent, base / "data")
    argv = command(argv, "--data", base / "data" / "prefs.jsonl", "--out", base / "run")
    real, calls = train.forward_and_backward, []

    def stopping(*args):
        calls.append(args)
        sums = real(*args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return sums

    train.forward_and_backward = stopping
    try:
        _, done = train.train(train.read_options(argv))
    finally:
        train.forward_and_backward = real
    assert done == 3
    shutil.copytree(base / "data", base / "data-as-it-was")
    return argv, base / "run", base / "data"


@pytest.fixture
def begun(three_steps, tmp_path):
    """(argv that resumes a copy of it, the copy's folder, its records)."""
    argv, run, folder = three_steps
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.with_name("data-as-it-was"), folder)
    shutil.copytree(run, tmp_path / "run")
    argv = command(argv, "--out", tmp_path / "run", "--resume")
    return argv, tmp_path / "run", folder / "prefs.jsonl"


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def halve(path):
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[::2]), path)


def forget_state(path):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "state": {}}, path)


def other_rate(path):
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "seed": 7}))


@pytest.mark.parametrize(
    "name, damage",
    [
        ("adapter_model.safetensors", halve),
        ("optimizer.pt", forget_state),
        ("optimizer.pt", flip),
        ("run.json", other_rate),
        ("../metrics.jsonl", flip),
        ("records.json", lambda path: path.write_text("{}")),
    ],
)
def test_a_damaged_checkpoint_is_refused(begun, capsys, name, damage):
    argv, out, _ = begun
    [folder] = out.glob("checkpoint-*")
    damage(folder / name)
    assert str(folder) in refused(argv, capsys)


def test_records_that_changed_since_they_were_trained_on_are_refused(begun, capsys):
    argv, _, prefs = begun
    lines = prefs.read_text().splitlines(True)
    prefs.write_text("".join(reversed(lines)))
    assert "changed since it was trained on" in refused(argv, capsys)
    prefs.write_text("".join(lines))
    train.main(argv)


def test_advice_may_be_followed_with_resume(begun):
    """--skip-bad, --max-length and --allow-outside; and other people's folders stay."""
    argv, out, _ = begun
    for name in ("checkpoint-3-backup1", "checkpoint-best-2", "checkpoint-x"):
        (out / name).mkdir()
    train.main([*argv, "--skip-bad", "--max-length", "4096", "--allow-outside"])
    names = {path.name for path in out.glob("checkpoint-*")}
    assert names == {"checkpoint-3-backup1", "checkpoint-best-2", "checkpoint-x", "checkpoint-4"}


def test_what_was_left_out_is_remembered(begun, capsys):
    argv, out, _ = begun
    [folder] = out.glob("checkpoint-*")
    about = json.loads((folder / "run.json").read_text())
    about["left_out"] = {"prefs.jsonl:9: bad": 8}
    (folder / "run.json").write_text(json.dumps(about))
    train.main([*argv, "--skip-bad"])
    assert "left out: prefs.jsonl:9: bad" in capsys.readouterr().out


def test_a_vanished_folder_is_no_bad_record(begun, capsys, monkeypatch):
    argv, out, prefs = begun
    real = train.forward_and_backward

    def vanish(*args):
        sums = real(*args)
        shutil.rmtree(prefs.parent, ignore_errors=True)  # after the first step
        return sums

    monkeypatch.setattr(train, "forward_and_backward", vanish)
    argv = [*argv[:-1], "--skip-bad", "--out", str(out) + "2", "--workers", "0"]
    said = refused(argv, capsys)
    assert "is its disk still there" in said or "No such file" in said
    assert (out.with_name(out.name + "2") / "checkpoint-1").is_dir()


# --- data workers ---------------------------------------------------------------------------------

ENDING = """
import os, signal, sys, time, multiprocessing
import train
real, how = train.compute_loss, sys.argv.pop(1)
def failing(run, examples, **more):
    if run.policy.training and len(multiprocessing.active_children()) > 0:
        print("at", time.time(), flush=True)
        if how == "error":
            raise RuntimeError("injected")
        if how == "killed worker":
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        if how == "hangup":
            os.kill(os.getpid(), signal.SIGHUP)
    return real(run, examples, **more)
train.compute_loss = failing
train.main(sys.argv[1:])
"""


@pytest.mark.parametrize("how", ["error", "killed worker", "hangup"])
def test_no_worker_holds_up_the_end_of_a_run(job, tmp_path, how):  # noqa: F811
    argv, _, _ = job("whole")
    argv = command(argv, "--out", tmp_path / "run", "--workers", 2)
    process = subprocess.run(
        [sys.executable, "-c", ENDING, how, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    text = process.stdout + process.stderr
    ended = time.time()
    [began, *_] = [float(line[3:]) for line in text.splitlines() if line.startswith("at ")]
    assert process.returncode != 0 and ended - began < 8  # five seconds, and a busy machine
    wanted = {"error": "injected", "killed worker": "worker", "hangup": "go on with"}[how]
    assert wanted in text, text[-2000:]


# --- weights --------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_all_bytes(llava, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(llava, copy)
    assert fingerprint(copy) == fingerprint(llava)
    path = copy / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "embed_tokens" in name)
    tensors[name][1234, 5] += 1  # a row that a sample would miss
    save_file(tensors, path, metadata={"format": "pt"})
    assert fingerprint(copy) != fingerprint(llava)


def test_missing_and_unused_weights_are_refused(llava, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(llava, copy)
    path = copy / "model.safetensors"
    tensors = load_file(path)
    renamed = {name.replace("layers.1", "blocks.1"): value for name, value in tensors.items()}
    save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="weights are missing, such as"):
        load_model(str(copy))
    save_file({**tensors, "extra.weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights are unexpected, such as extra.weight"):
        load_model(str(copy))


def test_an_adapter_that_does_not_fit_or_does_nothing_is_refused(job, llava, tmp_path):  # noqa: F811
    _, out, _ = job("whole")
    [whole] = out.glob("checkpoint-*")
    tensors = load_file(whole / "adapter_model.safetensors")
    renamed = {k.replace("language_model.layers", "text.layers"): v for k, v in tensors.items()}
    half = dict(list(tensors.items())[:-2])
    zero = {k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}
    cases = {"renamed": renamed, "half": half, "zero": zero}
    for name, changed in cases.items():
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        save_file(changed, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match="cannot be loaded"):
            load_adapter(load_model(str(llava))[0], folder)
    load_adapter(load_model(str(llava))[0], whole)


# --- files of the user's ----------------------------------------------------------------------


def test_nothing_is_written_over_what_is_read(prefs, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(prefs.parent, data)
    path, whole = data / "prefs.jsonl", prefs.read_bytes()
    models = "--captioner a --policy b --writer c --writer-url http://127.0.0.1:9/v1".split()
    for module, more in ((contrast, ["--kind", "black"]), (responses, models), (review, [])):
        with pytest.raises(SystemExit) as end:
            module.main([str(path), "--out", str(data / "." / "prefs.jsonl"), *more])
        assert end.value.code == 2 and "records are read from it" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_pictures_that_would_break_the_reader_are_refused(tmp_path):
    from PIL import Image

    Image.new("L", (60_000, 1)).save(tmp_path / "thin.png")
    with pytest.raises(UserError, match="thin.png.*too long and thin"):
        open_image("thin.png", tmp_path)
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(UserError, match="eps.png: not a readable image"):
        open_image("eps.png", tmp_path)


def test_paths_that_are_none_end_in_one_line(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("a\x00b.png", "\udc80.png", "loop"):
        line = {"image": name, "prompt": "Q", "chosen": "A", "rejected": "B"}
        (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
        argv = [str(tmp_path / "x.jsonl"), "--out", str(tmp_path / "y.jsonl")]
        with pytest.raises(SystemExit) as end:
            contrast.main([*argv, "--kind", "black"])
        assert end.value.code == 2 and "error: " in capsys.readouterr().err


def test_a_terminal_that_cannot_show_a_text_still_gets_a_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"image": "é.png", "prompt": "日本", "chosen": "a"}) + "\n")
    result = subprocess.run(
        [sys.executable, "data.py", "check", path],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "HOME": "/nonexistent"},
    )
    assert result.returncode == 1 and b"Traceback" not in result.stderr


def test_evaluation_refuses_lines_that_are_not_the_questions_answers(tmp_path):
    from benchmarks.answers import Answers
    from benchmarks.common import Question

    questions = [Question(f"q{i}", None, {"id": i}) for i in range(3)]
    answers = Answers(tmp_path, {}, questions)
    answers.extend(["a", "b"], "response")
    path = tmp_path / "answers.jsonl"
    first, second = path.read_bytes().splitlines(True)
    for damaged in (first + b"\n" + second, second + first, first + b"[]\n"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="answers.jsonl:[12]: not the answer to question"):
            Answers(tmp_path, {}, questions)
    path.write_bytes(first + second)
    assert Answers(tmp_path, {}, questions).count == 2


def test_malformed_benchmark_files_end_in_one_message(tmp_path):
    from benchmarks import BENCHMARKS, well_formed
    from benchmarks.common import Settings

    (tmp_path / "query").mkdir()
    good = {"id": 1, "image": "a.png", "query": "q"}
    for asked, notes in (
        ([good], {}),
        ([good], [{"kind": "x"}]),
        ([{"id": "1"}], [{"type": "generative"}]),
        ([{**good, "id": 9}], [{"type": "generative"}]),
        ([good], [{"type": "unknown"}]),
        ({"a": 1}, [{"type": "generative"}]),
        (7, [None]),
    ):
        (tmp_path / "query" / "query_all.json").write_text(json.dumps(asked))
        (tmp_path / "annotations.json").write_text(json.dumps(notes))
        with (
            pytest.raises(UserError, match="not as amber has them"),
            well_formed("amber", tmp_path),
        ):
            BENCHMARKS["amber"].questions(tmp_path, Settings())


def test_held_out_images_may_vanish_after_the_start(begun, monkeypatch):
    """They were read before the first step."""
    argv, out, prefs = begun
    held = prefs.parent / "held"
    shutil.copytree(prefs.parent, held)
    options = train.read_options([*argv[:-1], "--eval-data", str(held / "few.jsonl")])
    options.out, options.sample_every, options.workers = str(out) + "3", 1, 0
    real = train.evaluate_held_out

    def vanish(run):
        shutil.rmtree(held, ignore_errors=True)
        return real(run)

    monkeypatch.setattr(train, "evaluate_held_out", vanish)
    _, done = train.train(options)
    assert done == options.steps


def test_long_texts_are_read_in_a_moment(tmp_path):
    began = time.monotonic()
    text = "a" + "\n" * 150_000 + "b"
    for words in (text, "Human: " + text, "USER: " + text):
        try:
            normalise({"image": "x", "prompt": words, "chosen": text, "rejected": "c"})
        except ValueError:
            pass  # half a template
    review.marked("the cat " * 4000, "the dog the cat " * 2000)
    assert time.monotonic() - began < 5


def test_errors_of_processor_and_template_are_the_records(prefs, llava):
    from data import build_rows
    from support.records import Records
    from vlm.load import load_processor
    from vlm.prompts import Prompts

    _, processor = load_processor(str(llava))
    for template in (
        "{{ messages[7].content }}",
        "{{ raise_exception('only one turn') }}",
    ):
        prompts = Prompts(processor, "vicuna")
        prompts.form, processor.chat_template = "chat", template
        record = Records(prefs)[2]
        with pytest.raises(UserError, match="prefs.jsonl:3: .*template"):
            build_rows(record, prompts, [(0, 0)])


def test_a_torn_embedding_is_made_again(prefs, llava, tmp_path):
    from data import embed

    files = [prefs.parent / f"m{i}.png" for i in range(3)]
    first, _ = embed(files, str(llava), tmp_path / "cache")
    [kept] = (tmp_path / "cache").glob("*.pt")
    kept.write_bytes(kept.read_bytes()[:100])
    again, _ = embed(files, str(llava), tmp_path / "cache")
    assert torch.equal(first, again)


def test_no_home_folder_is_said(llava, prefs):
    options = train.Options(model=str(llava), data=str(prefs), cache="~no-such-user/cache")
    with pytest.raises(UserError, match="name a folder"):
        options.check()
