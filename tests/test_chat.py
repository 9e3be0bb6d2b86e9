"""support/chat.py against a real server on the loopback that speaks the OpenAI chat protocol."""

import asyncio
import base64
import contextlib
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from chat_server import KEY, ask, completion, echo, lines, lines_of_whole, questions
from conftest import ROOT, TINY
from support.chat import ask_all, image_url
from support.cli import UserError
from support.images import open_image


def cut_short(handler):
    """Promises a long body, sends the beginning and hangs up."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "4000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "c", "choices": [{"mess')
    handler.close_connection = True


def hang_up(handler):
    handler.connection.shutdown(2)
    handler.close_connection = True


def not_json(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "9")
    handler.end_headers()
    handler.wfile.write(b"<html>oh ")


@pytest.mark.parametrize(
    "trouble",
    [
        429,
        500,
        503,
        cut_short,
        hang_up,
        not_json,
        lambda h: time.sleep(0.6) or hang_up(h),
        lambda h: h.reply(200, {"choices": []}),
    ],
    ids=[
        "429",
        "500",
        "503",
        "truncated body",
        "broken connection",
        "not JSON",
        "time-out",
        "no choices",
    ],
)
def test_passing_trouble_is_retried(serve, tmp_path, trouble):
    url, bodies = serve(lambda body, attempt: trouble if attempt < 2 else echo(body, attempt))
    got = ask(questions(3), tmp_path / "log.jsonl", url, timeout=0.3)
    assert got == {f"q{i}": f"re: question {i}" for i in range(3)}
    assert len(bodies) == 9
    good = [e for e in lines(tmp_path / "log.jsonl") if "reason" not in e]
    assert [e["usage"] for e in good] == [completion("")["usage"]] * 3


def test_asks_from_inside_a_running_loop_such_as_a_notebooks(serve, tmp_path):
    url, _ = serve(echo)

    async def cell():
        return ask(questions(2), tmp_path / "log", url)

    assert asyncio.run(cell()) == {"q0": "re: question 0", "q1": "re: question 1"}


def test_retry_after_is_obeyed(serve, tmp_path):
    def busy(handler):
        handler.send_response(429)
        handler.send_header("Retry-After", "0.4")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    url, _ = serve(lambda body, attempt: busy if attempt == 0 else echo(body, attempt))
    start = time.monotonic()
    assert ask(questions(1), tmp_path / "log", url) == {"q0": "re: question 0"}
    assert time.monotonic() - start > 0.4


def test_a_request_that_always_fails_is_none_and_asked_again_by_the_next_run(serve, tmp_path):
    broken = {"now": True}

    def script(body, attempt):
        bad = broken["now"] and body["messages"][-1]["content"] in ("question 1", "question 2")
        return (500 if "1" in body["messages"][-1]["content"] else 400) if bad else echo(body, 0)

    url, bodies = serve(script)
    log = tmp_path / "log.jsonl"
    got = ask(questions(5), log, url, retries=2)
    assert {id for id in got if got[id] is None} == {"q1", "q2"} and len(got) == 5
    assert len(bodies) == 3 + 3 + 1  # three good ones, 500 asked three times, 400 once
    reasons = {e["id"]: e["reason"] for e in lines(log) if e["text"] is None}
    assert "500" in reasons["q1"] and "400" in reasons["q2"]
    broken["now"] = False
    bodies.clear()
    assert None not in ask(questions(5), log, url).values()
    assert len(bodies) == 2


def test_malformed_replies_are_repeated_a_few_times_and_kept(serve, tmp_path):
    def script(body, attempt):
        hopeless = body["messages"][-1]["content"] == "question 1"
        return "gibberish" if hopeless or attempt == 0 else '{"a": 1}'

    url, bodies = serve(script)
    log = tmp_path / "log.jsonl"
    assert ask(questions(2), log, url, check=json.loads) == {"q0": '{"a": 1}', "q1": None}
    assert len(bodies) == 2 + 3
    bad = [e for e in lines(log) if "reason" in e]
    assert len(bad) == 4 and all(e["text"] == "gibberish" for e in bad)
    assert all(e["reason"].startswith("malformed reply: ") for e in bad)
    assert ask(questions(2), log, url, check=json.loads)["q1"] is None
    assert len(bodies) == 5 + 3  # the next run asks it again, and it alone


def test_a_wrong_key_stops_at_once_and_costs_no_finished_work(serve, tmp_path, monkeypatch, capfd):
    url, bodies = serve(echo)
    log = tmp_path / "log.jsonl"
    ask(questions(3), log, url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0123456789abcdef")
    bodies.clear()
    with pytest.raises(UserError, match="refuses the key") as error:
        ask(questions(50), log, url, concurrency=2)
    assert len(bodies) <= 4 and len(lines(log)) == 3
    everything = str(error.value) + "".join(capfd.readouterr()) + log.read_text()
    assert "sk-wrong" not in everything
    monkeypatch.setenv("OTHER_KEY", KEY)
    assert len(ask(questions(50), log, url, key_env="OTHER_KEY")) == 50


@pytest.mark.parametrize("status", [404, 402])
def test_a_wrong_model_stops_soon(serve, tmp_path, status):
    url, bodies = serve(lambda body, attempt: status)
    with pytest.raises(UserError, match=f"in a row failed.* {status}") as error:
        ask(questions(50), tmp_path / "log", url, concurrency=2)
    assert len(bodies) <= 5 + 2 and KEY not in str(error.value)


def test_a_server_that_is_gone_is_given_up(tmp_path, serve):
    with pytest.raises(UserError, match="in a row failed"):
        ask(questions(50), tmp_path / "log", "http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(UserError, match="in a row failed"):
        ask(questions(1), tmp_path / "log", "http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(UserError, match="127.0.0.1:9: not a server's address.*http://host"):
        ask(questions(1), tmp_path / "log", "127.0.0.1:9", retries=1)


def test_the_concurrency_bound_holds(serve, tmp_path):
    now, most, lock = [0], [0], threading.Lock()

    def script(body, attempt):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return echo(body, attempt)

    url, _ = serve(script)
    assert len(ask(questions(40), tmp_path / "log", url, concurrency=4)) == 40 and most[0] == 4


def test_a_reply_is_used_again_only_for_the_same_question(serve, tmp_path):
    url, bodies = serve(echo)
    log = tmp_path / "log.jsonl"
    ask(questions(2), log, url, temperature=0)
    ask(questions(2), log, url, temperature=0)
    assert len(bodies) == 2
    ask([("q0", "another", None)], log, url, temperature=0)
    ask(questions(1), log, url, temperature=0, model="n")
    ask(questions(1), log, url, temperature=1)
    assert len(bodies) == 5


def test_a_torn_last_line_is_dropped_and_other_damage_is_named(serve, tmp_path):
    url, bodies = serve(echo)
    log = tmp_path / "log.jsonl"
    ask(questions(3), log, url)
    whole = log.read_bytes()
    log.write_bytes(whole[:-7])
    assert len(ask(questions(3), log, url)) == 3
    assert len(bodies) == 4 and len(lines(log)) == 3
    log.write_bytes(b"{oops\n" + whole)
    with pytest.raises(UserError, match="log.jsonl:1: not a reply"):
        ask(questions(3), log, url)
    assert log.read_bytes() == b"{oops\n" + whole


def test_two_runs_do_not_share_a_log(serve, tmp_path):
    url, _ = serve(echo)
    first = ask_all(questions(3), tmp_path / "log", base_url=url, model="m")
    next(first)
    with pytest.raises(UserError, match="another run"):
        ask(questions(3), tmp_path / "log", url)
    first.close()


def test_the_key_is_in_no_output(serve, tmp_path, capfd):
    url, _ = serve(lambda body, attempt: 500 if attempt == 0 else f"your key is {KEY}")
    ask(questions(2), tmp_path / "log.jsonl", url)
    with pytest.raises(UserError) as error:
        ask(questions(2), tmp_path / "log2.jsonl", serve(lambda *_: 500)[0], retries=0)
    out = "".join(capfd.readouterr()) + str(error.value)
    out += "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert "your key is [key]" in out and KEY not in out


def test_image_url_is_a_bounded_jpeg():
    url = image_url(Image.new("RGBA", (3000, 1000), "red"), max_side=600)
    image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert image.format == "JPEG" and image.size == (600, 200)
    small = image_url(Image.new("RGB", (30, 10)))
    assert Image.open(io.BytesIO(base64.b64decode(small.split(",")[1]))).size == (30, 10)


CHILD = """
import json, sys
from support.chat import ask_all
url, log, out = sys.argv[1:]
requests = [(f"q{i}", f"question {i}", None) for i in range(30)]
replies = dict(ask_all(requests, log, base_url=url, model="m", concurrency=3))
open(out, "w").write(json.dumps(replies, sort_keys=True))
"""


def test_a_killed_run_asks_nothing_again(serve, tmp_path):
    url, bodies = serve(lambda body, attempt: time.sleep(0.03) or echo(body, attempt))
    run = [sys.executable, "-c", CHILD, url]
    subprocess.run(run + [tmp_path / "whole.log", tmp_path / "whole.json"], cwd=ROOT, check=True)
    assert len(bodies) == 30
    bodies.clear()
    log = tmp_path / "log.jsonl"
    for kill_after in (5, 12):
        child = subprocess.Popen(run + [log, tmp_path / "out.json"], cwd=ROOT)
        while not (log.exists() and log.read_bytes().count(b"\n") >= kill_after):
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (tmp_path / "out.json").exists()
        kept = {e["id"] for e in lines_of_whole(log)}
        assert len(kept) >= kill_after
        time.sleep(0.1)
        bodies.clear()
    subprocess.run(run + [log, tmp_path / "out.json"], cwd=ROOT, check=True)
    asked = {"q" + body["messages"][-1]["content"].split()[-1] for body in bodies}
    assert not asked & kept and len(asked) == 30 - len(kept)
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_transformers_serve_answers_about_an_image(tmp_path):
    pytest.importorskip("fastapi", reason="needs the extra transformers[serving]")
    pytest.importorskip("uvicorn")
    model, port = str(TINY / "model"), free_port()
    server = subprocess.Popen(
        [
            Path(sys.executable).parent / "transformers",
            "serve",
            model,
            "--device",
            "cpu",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(port, server)
        image = open_image("images/0000.png", TINY)
        image.save(tmp_path / "image.png")
        got = ask(
            [("q", "Describe this image.", str(tmp_path / "image.png"))],
            tmp_path / "log",
            f"http://127.0.0.1:{port}/v1",
            model=model,
            max_tokens=40,
            timeout=60,
        )
        assert got["q"].startswith("a ")
        assert lines(tmp_path / "log")[0]["usage"]["completion_tokens"] > 5
    finally:
        server.kill()
        server.wait()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(port, process, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError("the server did not start")
