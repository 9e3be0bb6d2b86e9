"""Guards that are easily lost, since nothing shows when they are gone (see tests/mutants.py)."""

import json
import os
import shutil

import pytest
import torch
from test_kill import job  # noqa: F401

import data
import train
from chat_server import ask, echo, questions
from support.chat import ReplyLog
from support.cli import UserError
from vlm.load import load_model


@pytest.fixture
def flushed(monkeypatch):
    """The names of the files that were flushed to the disk, in order, and what is renamed."""
    names, fsync, rename = [], os.fsync, os.rename

    def flushing(handle):
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renaming(old, new):
        names.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "rename", renaming)
    return names


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(job, tmp_path, flushed):  # noqa: F811
    argv, _, _ = job("whole")
    train.main([*map(str, argv), "--steps", "1", "--out", str(tmp_path / "run")])
    wanted = {"adapter_model.safetensors", "optimizer.pt", "run.json", "records.json"}
    assert wanted <= set(flushed)


def test_a_reply_is_on_the_disk_before_it_is_used(tmp_path, flushed, serve):
    with ReplyLog(tmp_path / "log") as log:
        log.append({"request": "a", "text": "x"})
        assert flushed == ["log"]
    url, _ = serve(echo)
    ask(questions(3), tmp_path / "log2", url)
    assert flushed.count("log2") == 3


@pytest.mark.parametrize(
    "file, kind",
    [
        ("config.json", "AutoConfig"),
        ("config.json", "AutoModelForImageTextToText"),
        ("processor_config.json", "AutoProcessor"),
        ("tokenizer_config.json", "AutoTokenizer"),
    ],
)
def test_no_code_beside_config_model_or_processor_is_run(llava, tmp_path, monkeypatch, file, kind):
    folder, trace = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(llava, folder)
    found = json.loads((folder / file).read_text())
    own = ["own.Own", None] if kind == "AutoTokenizer" else "own.Own"
    found["auto_map"] = {kind: own}
    if kind == "AutoProcessor":
        found["processor_class"] = "Own"
    if kind == "AutoConfig":
        found["model_type"] = "own"
    (folder / file).write_text(json.dumps(found))
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        load_model(str(folder))
    except UserError:
        pass  # refused, which is as good
    assert not trace.exists()


def test_training_opens_no_image_outside_the_folder(job, tmp_path):  # noqa: F811
    argv, _, _ = job("whole")
    line = json.loads(argv[3].read_text().splitlines()[0])
    line["image"] = str(argv[3].parent / line["image"])
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(line) + "\n")
    options = train.read_options([*map(str, argv), "--data", str(path)])
    options.eval_data, options.out = None, str(tmp_path / "run")
    with pytest.raises(UserError, match="p.jsonl:1.*--allow-outside"):
        train.train(options)


def test_check_opens_no_image_outside_the_folder(prefs, tmp_path, capsys):
    line = json.loads(prefs.read_text().splitlines()[0])
    line["image"] = str(prefs.parent / line["image"])
    del line["contrast_image"], line["contrast_chosen"]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(SystemExit) as end:
        data.main(["check", str(path)])
    assert end.value.code == 1 and "--allow-outside" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        data.main(["check", str(path), "--allow-outside"])
    assert end.value.code == 0 and torch.is_grad_enabled()
