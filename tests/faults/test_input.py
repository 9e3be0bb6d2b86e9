"""Broken records and images: either a record or a UserError that names it, and nothing else."""

import json
import random
import subprocess
import sys

import harness
import mutate
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_kill import job  # noqa: F401

import data
import evaluate
import train
from construct import responses, review
from support.cli import UserError
from support.images import open_image
from test_train import read_metrics
from vlm.load import load_processor
from vlm.prompts import Prompts

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([v for v in mutate.VALUES if isinstance(v, str)]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                sorted({key for raw in mutate.GOOD for key in raw} | {"content", "type"})
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)
QUICK = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read(path, i):
    """Record i with its images, or the message of the error it meets, which names the line."""
    try:
        records = data.Records(path)
        record = records[i]
        for field in data.IMAGES:
            if field in record:
                open_image(record[field], record["root"], allow_outside=False)
    except UserError as e:
        return str(e)
    assert all(record[field].strip() for field in ("prompt", "chosen"))
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


@QUICK
@given(raw=ANYTHING)
def test_any_json_is_a_record_or_named(folder, raw):
    path = folder / "any.jsonl"
    path.write_text('{"image": "a.png", "prompt": "Q?", "chosen": "x"}\n' + json.dumps(raw))
    found = read(path, 1)
    if isinstance(found, str):
        assert found.startswith(f"{path}:2: ")
    else:
        assert all(found[name] for name in ("image", "prompt", "chosen"))


@pytest.mark.parametrize("seed", range(3))
def test_mutated_lines_are_records_or_named(folder, seed):
    """In the campaign there are thousands of them."""
    rng = random.Random(seed)
    lines = [mutate.line(rng) for _ in range(100)]
    path = folder / "mutated.jsonl"
    path.write_bytes(b"\n".join(line if line.strip() else b"?" for line in lines) + b"\n")
    records = data.Records(path)
    assert len(records) == 100
    for i in range(100):
        found = read(path, i)
        try:
            records[i]
        except UserError:
            assert found.startswith(f"{path}:{i + 1}: "), found


def test_mutated_images_open_or_are_named(folder):
    rng = random.Random(0)
    pictures = mutate.pictures()
    for name, whole in pictures.items():
        (folder / name).write_bytes(whole)
        assert open_image(name, folder).mode == "RGB"
    for _ in range(150):
        name = rng.choice(list(pictures))
        (folder / f"bad-{name}").write_bytes(mutate.data(rng, pictures[name]))
        try:
            assert open_image(f"bad-{name}", folder).mode == "RGB"
        except UserError as e:
            assert f"bad-{name}" in str(e)


def test_mutated_parquet_is_read_or_named(folder):
    whole = mutate.parquet(folder / "whole.parquet").read_bytes()
    rng, path, outcomes = random.Random(0), folder / "bad.parquet", set()
    for _ in range(100):
        path.write_bytes(mutate.data(rng, whole))
        found = read(path, 4)
        outcomes.add(type(found))
        picture = "the image's bytes: not a readable image"  # named by whoever asks for it
        assert isinstance(found, dict) or str(path) in found or found.startswith(picture), found
    assert outcomes == {dict, str}


@QUICK
@given(
    parts=st.lists(
        st.sampled_from(
            ["<image>", "</s>", "<s>", "<pad>", "<", ">", "/s", " ", "\n", "image", "word"]
        )
        | st.text(max_size=5),
        max_size=8,
    )
)
def test_no_text_becomes_a_special_token(prompts, parts):
    text = "x" + "".join(parts).encode("utf-8", "replace").decode()
    special = set(prompts.tokenizer.all_special_ids) - {prompts.tokenizer.unk_token_id}
    answer = prompts.encode_response(text)
    assert [i for i in answer if i in special] == answer[-1:]
    ids = prompts.encode([text], [Image.new("RGB", (9, 9))])["input_ids"]
    assert (ids == prompts.tokenizer.convert_tokens_to_ids("<image>")).sum() == 16


@pytest.fixture(scope="module")
def prompts(llava):
    return Prompts(load_processor(llava)[1], "vicuna")


@pytest.mark.parametrize(
    "raw, reason",
    [
        ({"image": "a\0.png", "prompt": "Q", "chosen": "A"}, "a\\0.png"),
        ({"image": "n" * 300, "prompt": "Q", "chosen": "A"}, "nnn"),
        ({"image": "a.png", "text": "[1]"}, "text"),
        ({"image": "a.png", "text": 3}, "text"),
        (
            {"images": 5, "prompt": "Q", "chosen": [{"role": "assistant", "content": "A"}]},
            "not int",
        ),
        ({"image": "a.png", "prompt": [{"content": "Q"}], "chosen": "A"}, "without a role"),
    ],
)
def test_odd_records_are_named(folder, raw, reason):
    path = folder / "odd.jsonl"
    path.write_text(json.dumps(raw) + "\n")
    assert isinstance(found := read(path, 0), str)
    assert reason in found or reason in ascii(found).replace("x00", "0")


def test_the_check_survives_an_ascii_terminal(folder):
    path = folder / "odd.jsonl"
    path.write_text('{"image": "\\ud800é.png", "prompt": "Q", "chosen": "A"}\n')
    result = subprocess.run(
        [sys.executable, harness.ROOT / "data.py", "check", path],
        capture_output=True,
        text=True,
        env={**harness.os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert result.returncode == 1 and "1 bad" in result.stdout, result.stderr


def test_a_bad_record_costs_no_finished_step(job):  # noqa: F811
    """Step 3 of an epoch meets it; steps 1 and 2 are in a checkpoint, and repair goes on there."""
    argv, out, log = job("bad-record")
    prefs = argv[argv.index("--data") + 1]
    path, lines = prefs.parent / "one-bad.jsonl", prefs.read_text().splitlines()
    command = [*map(str, argv), "--data", str(path), "--batch-size", "2", "--save-every", "99"]
    path.write_text("\n".join(lines) + "\n")
    bad = data.Examples(path, None, train.read_options(command)).of_step(2)[0]
    path.write_text("\n".join([*lines[:bad], "{", *lines[bad + 1 :]]) + "\n")
    assert harness.run("train", command, log) == 2
    assert f"{path}:{bad + 1}: not valid JSON" in log.read_text()
    assert (out / "checkpoint-2" / "adapter_model.safetensors").exists()
    path.write_text("\n".join(lines) + "\n")
    assert harness.run("train", [*command, "--resume"], log) == 0
    assert len(read_metrics(out)) == 4


def test_bad_held_out_records_are_found_before_the_first_step(job, capsys):  # noqa: F811
    argv, out, _ = job("bad-held-out")
    path = argv[3].parent / "held.jsonl"
    path.write_text(
        '{"image": "gone.png", "prompt": "Q", "chosen": "A", "rejected": "B", '
        '"contrast_image": "gone.png", "contrast_chosen": "C"}\n{\n'
        + argv[3].read_text().splitlines()[0]
        + "\n"
    )
    command = [*map(str, argv), "--eval-data", str(path)]
    with pytest.raises(SystemExit):
        train.main(command)
    said = capsys.readouterr().err
    assert f"{path}:1" in said and f"data.py check {path}`" in said and not read_metrics(out)
    train.main([*command, "--skip-bad", "--out", str(out) + "2"])
    assert capsys.readouterr().out.count("left out") == 2
    assert "eval/loss" in read_metrics(out.with_name(out.name + "2"))[-1]


@pytest.mark.parametrize(
    "module, command",
    [
        (train, "--workers -1"),
        (train, "--lora-dropout -0.5"),
        (train, "--weight-decay -1"),
        (evaluate, "generate --beams 0"),
        (evaluate, "generate --limit -1"),
        (evaluate, "generate --temperature nan"),
        (evaluate, "run --batch-size 0"),
        (review, "x --out y --limit 0"),
        (review, "x --out y --limit 1.5"),
        (responses, "x --out y --captioner a --policy b --writer c --writer-url d --concurrency 0"),
        (responses, "x --out y --captioner a --policy b --writer c --writer-url d --timeout inf"),
        (data, "check x --max-length 0"),
    ],
)
def test_numbers_without_a_meaning_are_refused(module, command, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(command.split())
    *_, option, number = command.split()
    said = capsys.readouterr().err
    assert end.value.code == 2 and option in said and number in said
