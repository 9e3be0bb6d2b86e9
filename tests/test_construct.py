"""Records out of pairs of images, built with a real server on the loopback, and the review page."""

import functools
import re
import signal
import subprocess
import sys
import time

import pytest

import data
from chat_server import KEY, lines, lines_of_whole, oracle
from conftest import ROOT, build_args
from construct import responses, review
from construct.review import template
from support.chat import digest


def test_the_prompts_are_those_of_their_version():
    """Who changes a text changes the version, which every record carries."""
    texts = "".join(p.read_text() for p in sorted((ROOT / "construct" / "prompts").glob("*.txt")))
    assert (responses.VERSION, digest(texts)[:8]) == (2, "f9239fbd")


def test_build_makes_records_that_training_takes(serve, pairs, llava, capfd):
    url, bodies = serve(oracle)
    responses.main(build_args(pairs, url))
    folder = pairs.parent
    made = lines(folder / "prefs.jsonl")
    assert [r["image"] for r in made] == ["red.png", "green.png", "blue.png"]
    assert made[0]["chosen"] == "The picture shows a red square, nothing else."
    assert made[0]["rejected"] == "The picture shows a red square and a dog."
    assert made[0]["contrast_chosen"] == "The picture shows a green square, nothing else."
    assert made[0]["changes"] == [{"was": "a red square", "is": "a green square"}]
    assert made[0]["prompts_version"] == responses.VERSION and made[0]["contrast_kind"] == "random"
    with pytest.raises(SystemExit) as end:
        data.main(["check", str(folder / "prefs.jsonl"), "--model", str(llava)])
    assert end.value.code == 0 and "symmpo 3" in capfd.readouterr().out
    bad = lines(folder / "prefs.rejected.jsonl")
    assert [r["record"] for r in bad] == [4, 5] and all("broken.png" in r["reason"] for r in bad)
    models = [body["model"] for body in bodies]
    assert models.count("captioner") == 4  # an image is described once, whoever needs it
    assert models.count("policy") == 3 * 2 and models.count("writer") == 3 * 3
    assert all("temperature" in body for body in bodies)
    responses.main(build_args(pairs, url))
    assert len(bodies) == len(models)
    everything = "".join(capfd.readouterr())
    everything += "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())
    assert "rejected: word overlap" in everything and KEY not in everything


def test_images_outside_the_data_folder_are_not_sent(serve, pairs, capfd):
    url, bodies = serve(oracle)
    (pairs.parent / "data").mkdir()
    inside = pairs.parent / "data" / "pairs.jsonl"
    inside.write_text(
        '{"image": "../red.png", "contrast_image": "../green.png"}\n'
        '{"image": "../red.png", "contrast_image": {"path": 1}}\n'
        '{"image": "../red.png", "prompt": ["What?"]}\n'
    )
    responses.main(build_args(inside, url))
    reasons = [r["reason"] for r in lines(inside.parent / "prefs.rejected.jsonl")]
    assert len(reasons) == 3 and "--allow-outside" in reasons[0] and not bodies
    responses.main(build_args(inside, url) + ["--allow-outside"])
    assert len(lines(inside.parent / "prefs.jsonl")) == 1


def test_malformed_replies_end_in_the_rejected_file_with_their_text(serve, pairs):
    wrong = {
        "red": "no claims, sorry",
        "green": '{"consistent": ["a"], "inconsistent": []}',
        "blue": '{"consistent": "a", "inconsistent": ["b"]}',
    }

    def script(body, attempt):
        text = str(body["messages"][0]["content"])
        for colour, reply in wrong.items():
            if text.startswith("Below are") and f"plain {colour}" in text:
                return reply
        return oracle(body, attempt)

    url, bodies = serve(script)
    responses.main(build_args(pairs, url))
    assert lines(pairs.parent / "prefs.jsonl") == []
    bad = lines(pairs.parent / "prefs.rejected.jsonl")
    assert [r["reply"] for r in bad[:3]] == list(wrong.values())
    assert [
        "no JSON" in bad[0]["reason"],
        "'inconsistent' is missing, empty" in bad[1]["reason"],
        "'consistent'" in bad[2]["reason"],
    ] == [True] * 3
    asked = [b for b in bodies if "Below are" in b["messages"][0]["content"]]
    assert len(asked) == 3 * 3


@pytest.mark.parametrize(
    "reply, fault",
    [
        ('Sure! ```json\n{"a": "x", "b": [1]}\n```', None),
        ('<think>{"a": 1}</think>{"a": "x", "b": [0]}', None),
        ("no", "no JSON object"),
        ('{"a": "x", "b": [1]', "no JSON object"),
        ('{"a": "\\ud83d", "b": [1]}', "no JSON object"),
        ("{" * 100_000 + "}", "no JSON object"),
        ('{"b": [1]}', "'a' is missing"),
        ('{"a": " ", "b": [1]}', "'a' is missing, empty"),
        ('{"a": "x", "b": []}', "'b' is missing, empty"),
        ('{"a": ["x"], "b": [1]}', "not a str"),
    ],
)
def test_json_in_replies(reply, fault):
    parse = functools.partial(responses.json_fields, a=str, b=list)
    if fault:
        with pytest.raises(ValueError, match=fault):
            parse(reply)
    else:
        assert parse(reply)["a"] == "x"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"rejected": "The  cat SAT."}, "chosen and rejected are the same"),
        ({"contrast_chosen": "The cat sat"}, "chosen and contrast_chosen are the same"),
        ({"rejected": "A dog and a cat and a mouse sat."}, "chosen has 3 words, rejected 9"),
        ({"contrast_chosen": "No"}, "chosen has 3 words, contrast_chosen 1"),
        ({}, None),
    ],
)
def test_gates(change, reason):
    record = {"chosen": "The cat sat.", "rejected": "The dog sat.", "contrast_chosen": "A car."}
    found = responses.gate(record | change)
    assert found == (f"gate: {reason}" if reason else None)


def test_records_without_contrast_images_become_dpo_records(serve, pairs):
    url, bodies = serve(oracle)
    pairs.write_text('{"image": "red.png"}\n')
    responses.main(build_args(pairs, url))
    [record] = lines(pairs.parent / "prefs.jsonl")
    assert "contrast_chosen" not in record
    assert record["prompt"] == template("question.txt").render()
    assert len(bodies) == 1 + 2 + 2


def test_a_killed_build_goes_on_to_the_same_file(serve, pairs):
    url, bodies = serve(lambda body, attempt: time.sleep(0.05) or oracle(body, attempt))
    args = [*map(str, build_args(pairs, url, "whole.jsonl")), "--concurrency", "2"]
    responses.main(args)
    total = len(bodies)
    args[args.index(str(pairs.parent / "whole.jsonl"))] = str(pairs.parent / "prefs.jsonl")
    command = [sys.executable, "-m", "construct.responses", *args]
    for replies_before_kill in (2, 13):
        bodies.clear()
        child = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        logs = pairs.parent / "prefs.jsonl.work"
        while sum(p.read_bytes().count(b"\n") for p in logs.glob("*")) < replies_before_kill:
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        time.sleep(0.2)
    assert not (pairs.parent / "prefs.jsonl").exists()
    kept = sum(len(lines_of_whole(p)) for p in logs.glob("*"))
    assert kept >= 13
    bodies.clear()
    responses.main(args)
    assert len(bodies) == total - kept
    whole, prefs = (pairs.parent / name for name in ("whole.jsonl", "prefs.jsonl"))
    assert prefs.read_bytes() == whole.read_bytes()


def test_local_captioner_and_policy(serve, pairs, llava, monkeypatch):
    monkeypatch.setitem(responses.SAMPLING, "captioner", {"temperature": 0.2, "max_tokens": 5})
    monkeypatch.setitem(responses.SAMPLING, "policy", {"temperature": 1.0, "max_tokens": 5})

    def script(body, attempt):
        body["messages"][0]["content"] += " plain red"
        return oracle(body, attempt)

    url, bodies = serve(script)
    args = build_args(pairs, url)
    for role in ("captioner", "policy"):
        at = args.index(f"--{role}")
        args[at : at + 4] = [f"--{role}", str(llava)]
    responses.main(args)
    logs = pairs.parent / "prefs.jsonl.work"
    samples = {e["id"]: e["text"] for e in lines(logs / "samples.jsonl")}
    assert len(lines(logs / "captions.jsonl")) == 4 and len(samples) == 6
    assert len(set(samples.values())) > 1
    torn = (logs / "samples.jsonl").read_bytes().splitlines(True)[:4]
    (logs / "samples.jsonl").write_bytes(b"".join(torn))
    responses.main(args)
    assert {e["id"]: e["text"] for e in lines(logs / "samples.jsonl")} == samples


def test_a_local_reply_of_nothing_but_thoughts_is_malformed(pairs, llava, tmp_path, monkeypatch):
    thoughts = "a fork is there</think> "
    monkeypatch.setattr(responses, "generate", lambda *args, **options: [thoughts])
    image = str(pairs.parent / lines(pairs)[0]["image"])
    requests = [("id", "Describe it.", image)]
    found = responses.answer_locally(requests, tmp_path / "log.jsonl", str(llava), 0.2, 5)
    ((_, entry),) = found
    assert entry["reason"] == "malformed reply: empty" and entry["text"] == thoughts


def test_lengths_and_overlaps_are_shares_of_words():
    record = {"chosen": "A cat and a dog.", "rejected": "a cat", "contrast_chosen": "Two mice sat"}
    found = review.figures([record, {"chosen": "Yes", "rejected": "yes."}])
    assert found == {
        "chosen: words": [5, 1],
        "rejected: length ratio": [2 / 5, 1],
        "rejected: word overlap": [4 / 7, 1],
        "contrast_chosen: length ratio": [3 / 5],
        "contrast_chosen: word overlap": [0],
    }


def test_report_is_one_page_that_needs_nothing_else(serve, pairs):
    url, _ = serve(oracle)
    responses.main(build_args(pairs, url))
    review.main(
        [
            str(pairs.parent / "prefs.jsonl"),
            "--out",
            str(pairs.parent / "report.html"),
            "--limit",
            "2",
        ]
    )
    page = (pairs.parent / "report.html").read_text()
    assert page.count("<article>") == 2 and page.count("data:image/jpeg;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|<script", page)
    assert "<mark>square and a dog.</mark>" in page and "<mark>green</mark> square" in page
    assert "“a red square” → “a green square”" in page
    assert page.count("rejected: word overlap") == 3  # of all, in the table, and of each record
