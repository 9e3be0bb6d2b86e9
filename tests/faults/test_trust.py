"""Nothing loaded can run code, keys stay in memory, paths stay inside, numbers are checked."""

import dataclasses
import json
import pickle
import shutil

import harness
import pytest
import torch
from test_kill import job  # noqa: F401

import train
from chat_server import KEY
from conftest import save_llava15
from construct import contrast, review
from support.cli import UserError
from vlm.load import load_adapter, load_model


class Harmful:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


# --- trust -------------------------------------------------------------------------------------


def test_a_pickle_in_a_checkpoint_does_not_run(job, tmp_path, capsys):  # noqa: F811
    argv, out, _ = job("whole")
    shutil.copytree(out, tmp_path / "run")
    [folder] = (tmp_path / "run").glob("checkpoint-*")
    trace = tmp_path / "it-ran"
    command = [*map(str, argv), "--out", str(tmp_path / "run"), "--resume"]
    state = (folder / "optimizer.pt").read_bytes()
    torch.save(Harmful(trace), folder / "optimizer.pt")
    with pytest.raises(SystemExit):
        train.main(command)
    (folder / "optimizer.pt").write_bytes(state)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Harmful(trace)))
    with pytest.raises(SystemExit):
        train.main(command)
    message = capsys.readouterr().err
    assert message.count("damaged") == 2 and str(folder) in message and not trace.exists()


@pytest.mark.parametrize(
    "whole, harm",
    [
        ("model.safetensors", "pytorch_model.bin"),
        ("tokenizer.json", None),
        ("config.json", None),
        ("model.safetensors", None),
    ],
)
def test_damaged_and_harmful_models_are_refused(llava, tmp_path, whole, harm):
    trace, folder = tmp_path / "it-ran", tmp_path / "model"
    shutil.copytree(llava, folder)
    if harm:
        (folder / whole).unlink()
        torch.save({"x": Harmful(trace)}, folder / harm)
    else:
        (folder / whole).write_bytes((folder / whole).read_bytes()[:-100])
    with pytest.raises(UserError, match="model"):
        load_model(str(folder))
    assert not trace.exists()


def test_code_beside_a_model_is_not_run(llava, tmp_path, monkeypatch):
    """Not even when somebody who is asked would say yes."""
    folder, trace = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(llava, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="model"):
        load_model(str(folder))
    assert not trace.exists()


def test_a_key_in_the_environment_is_written_nowhere(job, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    argv, out, log = job("with-key")
    assert harness.run("train", argv, log) == 0
    written = [p.read_bytes() for p in out.parent.rglob("*") if p.is_file()]
    assert len(written) > 10 and not any(KEY.encode() in content for content in written)


def test_paths_out_of_the_data_folder_need_a_flag(job, tmp_path, capsys):  # noqa: F811
    argv, _, _ = job("outside")
    line = json.loads(argv[3].read_text().splitlines()[0])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "link").symlink_to(argv[3].parent)
    for image in (str(argv[3].parent / line["image"]), "link/" + line["image"]):
        path = tmp_path / "deep" / "prefs.jsonl"
        path.write_text(json.dumps({**line, "image": image, "contrast_image": image}) + "\n")
        command = [
            *map(str, argv),
            "--data",
            str(path),
            "--eval-data",
            str(path),
            "--steps",
            "1",
            "--out",
            str(tmp_path / image.replace("/", "-")),
        ]
        with pytest.raises(SystemExit):
            train.main(command)
        message = capsys.readouterr().err
        assert f"{path}:1: " in message and "--allow-outside" in message
        train.main([*command, "--allow-outside"])
        for module, other in (
            (contrast, [str(path), "--kind", "black"]),
            (contrast, [str(path), "--kind", "random"]),
            (review, [str(path)]),
        ):
            again = [*other, "--out", str(tmp_path / "deep" / "out.jsonl")]
            with pytest.raises(SystemExit) as end:
                module.main(again)
            assert end.value.code == 2 and "--allow-outside" in capsys.readouterr().err
            try:
                module.main([*again, "--allow-outside"])
            except SystemExit as end:
                assert end.code == 0


# --- numbers -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(llava, prefs, tmp_path_factory):
    """small(model, name, *options) -> (exit code, log) of one step with one cache for all."""
    base = tmp_path_factory.mktemp("numbers")

    def run(name, *options, model=llava):
        argv = [
            "--model",
            model,
            "--data",
            prefs,
            "--out",
            base / name,
            "--cache",
            base / "cache",
            *"--steps 1 --batch-size 2 --lora-r 2 --lora-alpha 4".split(),
            *options,
        ]
        return harness.run("train", argv, base / f"{name}.log"), (base / f"{name}.log").read_text()

    run.cache = base / "cache"
    return run


def test_the_cache_of_another_model_setting_or_dtype_is_not_used(small, llava, tmp_path):
    """Each finds no entry of another's, and passes the check against a fresh reference."""
    import sqlite3

    def entries():
        return sum(
            sqlite3.connect(p).execute("SELECT count(*) FROM tables").fetchone()[0]
            for p in small.cache.glob("*.sqlite")
        )

    other = save_llava15(tmp_path / "other", image_size=56, seed=1)
    layer, pixels, chatty = (tmp_path / name for name in ("layer", "pixels", "chatty"))
    shutil.copytree(llava, chatty)
    (chatty / "chat_template.jinja").write_text(
        "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else "
        "c.text }}{% endfor %} {% endfor %}"
    )
    for folder, file, old, new in [
        (layer, "config.json", '"vision_feature_layer": -2', '"vision_feature_layer": -3'),
        (pixels, "processor_config.json", '"do_normalize": true', '"do_normalize": false'),
    ]:
        shutil.copytree(llava, folder)
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))
    code, log = small("first")
    assert code == 0, log
    for n, (name, options) in enumerate(
        [
            ("other", {"model": other}),
            ("layer", {"model": layer}),
            ("pixels", {"model": pixels}),
            ("dtype", {"options": ("--dtype", "bfloat16")}),
            ("format", {"model": chatty, "options": ("--prompt-format", "chat")}),
        ],
        2,
    ):
        code, log = small(name, *options.get("options", ()), model=options.get("model", llava))
        assert code == 0, log
        assert entries() == 2 * n, name


def test_an_adapter_for_another_base_is_refused(job, tmp_path):  # noqa: F811
    _, out, _ = job("whole")
    [adapter] = out.glob("checkpoint-*")
    same_shape = save_llava15(tmp_path / "same", image_size=56, seed=5)
    wider = save_llava15(tmp_path / "wider", image_size=56, width=48)
    for model in (same_shape, wider):
        with pytest.raises(UserError, match="another base"):
            load_adapter(load_model(str(model))[0], adapter)
    stranger = tmp_path / "stranger"  # an adapter from elsewhere, that says nothing of its base
    shutil.copytree(adapter, stranger)
    (stranger / "run.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_adapter(load_model(str(wider))[0], stranger)


@pytest.mark.parametrize("what", ["dtype", "template"])
def test_step_0_catches_a_reference_made_differently(job, tmp_path, capsys, monkeypatch, what):  # noqa: F811
    real = train.policy_table

    def different(run, rows, records):
        if torch.is_grad_enabled():
            return real(run, rows, records)
        if what == "dtype":
            with torch.autocast("cpu", torch.bfloat16):
                return real(run, rows, records)
        cut = []
        for row in rows:
            ids = row.inputs["input_ids"].clone()
            ids[0, -2] = 5
            inputs = {**row.inputs, "input_ids": ids}
            cut.append(dataclasses.replace(row, inputs=inputs))
        return real(run, cut, records)

    monkeypatch.setattr(train, "policy_table", different)
    argv, _, _ = job(f"step0-{what}")
    with pytest.raises(SystemExit):
        train.main([*map(str, argv)])
    assert "before the first step" in capsys.readouterr().err
