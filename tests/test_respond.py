"""respond.py against a real server on the loopback that speaks the OpenAI chat protocol."""
import base64
import contextlib
import functools
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

import data
import respond
from data import Problem

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-secret-0123456789abcdef"


@pytest.fixture
def serve(monkeypatch):
    """serve(script) -> (base_url, list of the request bodies so far).

    script(body, attempt) gives the text of the reply, or an int: an HTTP status, or a function of
    the handler that does the damage itself; attempt counts the earlier times of the same messages.
    """
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def start(script, key=KEY):
        bodies, seen, lock = [], {}, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def reply(self, status, content):
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                if status >= 400:
                    self.send_header("Retry-After", "0.01")  # seconds: the tests are in a hurry
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    bodies.append(body)
                    asked = json.dumps(body["messages"])
                    attempt = seen[asked] = seen.get(asked, -1) + 1
                if self.headers["Authorization"] != f"Bearer {key}":
                    wrong = self.headers["Authorization"].split()[-1]
                    return self.reply(401, {"error": {"message": f"bad key {wrong[:9]}***"}})
                answer = script(body, attempt)
                if callable(answer):
                    return answer(self)
                if isinstance(answer, int):
                    return self.reply(answer, {"error": {"message": f"no, {KEY}"}})
                self.reply(200, completion(answer, body["model"]))

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", bodies

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def completion(text, model="m"):
    message = {"role": "assistant", "content": text}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": model,
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}}


def questions(n):
    return [(f"q{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(n)]


def ask(requests, log, url, **options):
    options = {"model": "m", "timeout": 5, **options}
    return dict(respond.ask_all(requests, log, base_url=url, **options))


def echo(body, attempt):
    return "re: " + body["messages"][-1]["content"]


def lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


# --- the client: what a server can do to it -----------------------------------------------------


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


@pytest.mark.parametrize("trouble", [429, 500, 503, cut_short, hang_up, not_json,
                                     lambda h: time.sleep(0.6) or hang_up(h),
                                     lambda h: h.reply(200, {"choices": []})],
                         ids=["429", "500", "503", "truncated body", "broken connection",
                              "not JSON", "time-out", "no choices"])
def test_passing_trouble_is_retried(serve, tmp_path, trouble):
    url, bodies = serve(lambda body, attempt: trouble if attempt < 2 else echo(body, attempt))
    got = ask(questions(3), tmp_path / "log.jsonl", url, timeout=0.3)
    assert got == {f"q{i}": f"re: question {i}" for i in range(3)}
    assert len(bodies) == 9
    good = [e for e in lines(tmp_path / "log.jsonl") if "reason" not in e]
    assert [e["usage"] for e in good] == [completion("")["usage"]] * 3


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
    assert len(bodies) == 5  # the tries of earlier runs count
    ask(questions(2), log, url, check=json.loads, tries=4)
    assert len(bodies) == 6


def test_a_wrong_key_stops_at_once_and_costs_no_finished_work(serve, tmp_path, monkeypatch, capfd):
    url, bodies = serve(echo)
    log = tmp_path / "log.jsonl"
    ask(questions(3), log, url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-0123456789abcdef")
    bodies.clear()
    with pytest.raises(Problem, match="refuses the key") as error:
        ask(questions(50), log, url, concurrency=2)
    assert len(bodies) <= 4 and len(lines(log)) == 3
    everything = str(error.value) + "".join(capfd.readouterr()) + log.read_text()
    assert "sk-wrong" not in everything
    monkeypatch.setenv("OTHER_KEY", KEY)
    assert len(ask(questions(50), log, url, key_env="OTHER_KEY")) == 50


@pytest.mark.parametrize("status", [404, 402])
def test_a_wrong_model_stops_soon(serve, tmp_path, status):
    url, bodies = serve(lambda body, attempt: status)
    with pytest.raises(Problem, match=f"in a row failed.* {status}") as error:
        ask(questions(50), tmp_path / "log", url, concurrency=2)
    assert len(bodies) <= 5 + 2 and KEY not in str(error.value)


def test_a_server_that_is_gone_is_given_up(tmp_path, serve):
    with pytest.raises(Problem, match="in a row failed"):
        ask(questions(50), tmp_path / "log", "http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(Problem, match="in a row failed"):
        ask(questions(1), tmp_path / "log", "http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(Problem, match="in a row failed.*missing an 'http://'"):
        ask(questions(1), tmp_path / "log", "127.0.0.1:9", retries=1)


def test_the_concurrency_bound_holds_and_requests_are_read_lazily(serve, tmp_path):
    now, most, lock, read = [0], [0], threading.Lock(), [0]

    def script(body, attempt):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return echo(body, attempt)

    def source():
        for i, (id, messages) in enumerate(questions(40)):
            read[0] = i + 1
            yield id, lambda messages=messages: messages

    url, _ = serve(script)
    for done, _ in enumerate(respond.ask_all(source(), tmp_path / "log", base_url=url, model="m",
                                             concurrency=4)):
        assert read[0] <= done + 1 + 4
    assert done == 39 and most[0] == 4


def test_a_reply_is_used_again_only_for_the_same_question(serve, tmp_path):
    url, bodies = serve(echo)
    log = tmp_path / "log.jsonl"
    ask(questions(2), log, url, temperature=0)
    ask(questions(2), log, url, temperature=0)
    assert len(bodies) == 2
    ask([("q0", [{"role": "user", "content": "another"}])], log, url, temperature=0)
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
    with pytest.raises(Problem, match="log.jsonl:1: not a reply"):
        ask(questions(3), log, url)
    assert log.read_bytes() == b"{oops\n" + whole


def test_two_runs_do_not_share_a_log(serve, tmp_path):
    url, _ = serve(echo)
    first = respond.ask_all(questions(3), tmp_path / "log", base_url=url, model="m")
    next(first)
    with pytest.raises(Problem, match="another run"):
        ask(questions(3), tmp_path / "log", url)
    first.close()


def test_the_key_is_in_no_output(serve, tmp_path, capfd):
    url, _ = serve(lambda body, attempt: 500 if attempt == 0 else f"your key is {KEY}")
    ask(questions(2), tmp_path / "log.jsonl", url)
    with pytest.raises(Problem) as error:
        ask(questions(2), tmp_path / "log2.jsonl", serve(lambda *_: 500)[0], retries=0)
    out = "".join(capfd.readouterr()) + str(error.value)
    out += "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert "your key is [key]" in out and KEY not in out


def test_image_url_is_a_bounded_jpeg():
    url = respond.image_url(Image.new("RGBA", (3000, 1000), "red"), max_side=600)
    image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert image.format == "JPEG" and image.size == (600, 200)
    small = respond.image_url(Image.new("RGB", (30, 10)))
    assert Image.open(io.BytesIO(base64.b64decode(small.split(",")[1]))).size == (30, 10)


CHILD = """
import json, sys
import respond
url, log, out = sys.argv[1:]
requests = [(f"q{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(30)]
replies = dict(respond.ask_all(requests, log, base_url=url, model="m", concurrency=3))
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


def lines_of_whole(log):
    return [json.loads(line) for line in log.read_bytes().splitlines(True) if line.endswith(b"\n")]


# --- building -----------------------------------------------------------------------------------

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}


def oracle(body, attempt):
    """A captioner, a policy and a writer that see nothing but the colour of an image."""
    *picture, text = body["messages"][0]["content"]
    text = text["text"]
    if picture:
        data = base64.b64decode(picture[0]["image_url"]["url"].split(",")[1])
        pixel = Image.open(io.BytesIO(data)).resize((1, 1)).getpixel((0, 0))
        colour = min(COLOURS, key=lambda c: sum((a - b) ** 2 for a, b in zip(COLOURS[c], pixel)))
    if body["model"] == "captioner":
        return f"A plain {colour} square."
    if body["model"] == "policy":
        return f"A {colour} square with a dog."
    colour = next(c for c in COLOURS if f"plain {c}" in text)
    if text.startswith("Below are"):
        return "Well: " + json.dumps({"consistent": [f"it is {colour}"], "inconsistent": ["a dog"]})
    if text.startswith("Write two"):
        return json.dumps({"chosen": f"The picture shows a {colour} square, nothing else.",
                           "rejected": f"The picture shows a {colour} square and a dog."})
    was = re.search(r"shows a (\w+) square", text)[1]
    return "<think>{}</think>" + json.dumps({
        "contrast_chosen": f"The picture shows a {colour} square, nothing else.",
        "changes": [{"was": f"a {was} square", "is": f"a {colour} square"}]})


@pytest.fixture
def pairs(tmp_path):
    """Records over four images, one of which is broken, each image in two records."""
    for name, rgb in COLOURS.items():
        Image.new("RGB", (64, 48), rgb).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    names = [*COLOURS, "broken"]
    records = [{"image": f"{a}.png", "prompt": "What is it?", "contrast_image": f"{b}.png",
                "contrast_kind": "random", "contrast_seed": 0, "similarity": None}
               for a, b in zip(names, names[1:] + names[:1])]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path / "pairs.jsonl"


def test_the_prompts_are_those_of_their_version():
    """Who changes a text changes the version, which every record carries."""
    texts = "".join(p.read_text() for p in sorted((ROOT / "prompts").glob("*.txt")))
    assert (respond.VERSION, respond.digest(texts)[:8]) == (2, "f9239fbd")


def build_args(pairs, url, out="prefs.jsonl"):
    return ["build", str(pairs), "--out", str(pairs.parent / out), "--samples", "2",
            "--captioner", "captioner", "--captioner-url", url, "--policy", "policy",
            "--policy-url", url, "--writer", "writer", "--writer-url", url]


def test_build_makes_records_that_training_takes(serve, pairs, llava, capfd):
    url, bodies = serve(oracle)
    respond.main(build_args(pairs, url))
    folder = pairs.parent
    made = lines(folder / "prefs.jsonl")
    assert [r["image"] for r in made] == ["red.png", "green.png", "blue.png"]
    assert made[0]["chosen"] == "The picture shows a red square, nothing else."
    assert made[0]["rejected"] == "The picture shows a red square and a dog."
    assert made[0]["contrast_chosen"] == "The picture shows a green square, nothing else."
    assert made[0]["changes"] == [{"was": "a red square", "is": "a green square"}]
    assert made[0]["prompts_version"] == respond.VERSION and made[0]["contrast_kind"] == "random"
    with pytest.raises(SystemExit) as end:
        data.main(["check", str(folder / "prefs.jsonl"), "--model", str(llava)])
    assert end.value.code == 0 and "symmpo 3" in capfd.readouterr().out
    bad = lines(folder / "rejected_records.jsonl")
    assert [r["record"] for r in bad] == [4, 5] and all("broken.png" in r["reason"] for r in bad)
    models = [body["model"] for body in bodies]
    assert models.count("captioner") == 4  # an image is described once, whoever needs it
    assert models.count("policy") == 3 * 2 and models.count("writer") == 3 * 3
    assert all("temperature" in body for body in bodies)
    respond.main(build_args(pairs, url))
    assert len(bodies) == len(models)
    everything = "".join(capfd.readouterr())
    everything += "".join(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())
    assert "word overlap" in everything and KEY not in everything


def test_images_outside_the_data_folder_are_not_sent(serve, pairs, capfd):
    url, bodies = serve(oracle)
    (pairs.parent / "data").mkdir()
    inside = pairs.parent / "data" / "pairs.jsonl"
    inside.write_text('{"image": "../red.png", "contrast_image": "../green.png"}\n'
                      '{"image": "../red.png", "contrast_image": {"path": 1}}\n'
                      '{"image": "../red.png", "prompt": ["What?"]}\n')
    respond.main(build_args(inside, url))
    reasons = [r["reason"] for r in lines(inside.parent / "rejected_records.jsonl")]
    assert len(reasons) == 3 and "--allow-outside" in reasons[0] and not bodies
    respond.main(build_args(inside, url) + ["--allow-outside"])
    assert len(lines(inside.parent / "prefs.jsonl")) == 1


def test_malformed_replies_end_in_the_rejected_file_with_their_text(serve, pairs):
    wrong = {"red": "no claims, sorry", "green": '{"consistent": ["a"], "inconsistent": []}',
             "blue": '{"consistent": "a", "inconsistent": ["b"]}'}

    def script(body, attempt):
        text = body["messages"][0]["content"][-1]["text"]
        for colour, reply in wrong.items():
            if text.startswith("Below are") and f"plain {colour}" in text:
                return reply
        return oracle(body, attempt)

    url, bodies = serve(script)
    respond.main(build_args(pairs, url))
    assert lines(pairs.parent / "prefs.jsonl") == []
    bad = lines(pairs.parent / "rejected_records.jsonl")
    assert [r["reply"] for r in bad[:3]] == list(wrong.values())
    assert ["no JSON" in bad[0]["reason"], "'inconsistent' is missing, empty" in bad[1]["reason"],
            "'consistent'" in bad[2]["reason"]] == [True] * 3
    asked = [b for b in bodies if "Below are" in b["messages"][0]["content"][-1]["text"]]
    assert len(asked) == 3 * 3


@pytest.mark.parametrize("reply, fault", [
    ('Sure! ```json\n{"a": "x", "b": [1]}\n```', None),
    ('<think>{"a": 1}</think>{"a": "x", "b": [0]}', None),
    ("no", "no JSON object"), ('{"a": "x", "b": [1]', "no JSON object"),
    ('{"a": "\\ud83d", "b": [1]}', "no JSON object"), ("{" * 100_000 + "}", "no JSON object"),
    ('{"b": [1]}', "'a' is missing"), ('{"a": " ", "b": [1]}', "'a' is missing, empty"),
    ('{"a": "x", "b": []}', "'b' is missing, empty"), ('{"a": ["x"], "b": [1]}', "not a str")])
def test_json_in_replies(reply, fault):
    parse = functools.partial(respond.fields, a=str, b=list)
    if fault:
        with pytest.raises(ValueError, match=fault):
            parse(reply)
    else:
        assert parse(reply)["a"] == "x"


@pytest.mark.parametrize("change, reason", [
    ({"rejected": "The  cat SAT."}, "chosen and rejected are the same"),
    ({"contrast_chosen": "The cat sat"}, "chosen and contrast_chosen are the same"),
    ({"rejected": "A dog and a cat and a mouse sat."}, "chosen has 3 words, rejected 9"),
    ({"contrast_chosen": "No"}, "chosen has 3 words, contrast_chosen 1"),
    ({}, None)])
def test_gates(change, reason):
    record = {"chosen": "The cat sat.", "rejected": "The dog sat.", "contrast_chosen": "A car."}
    found = respond.gate(record | change)
    assert found == (f"gate: {reason}" if reason else None)


def test_records_without_contrast_images_become_dpo_records(serve, pairs):
    url, bodies = serve(oracle)
    pairs.write_text('{"image": "red.png"}\n')
    respond.main(build_args(pairs, url))
    [record] = lines(pairs.parent / "prefs.jsonl")
    assert "contrast_chosen" not in record
    assert record["prompt"] == respond.template("question.txt").render()
    assert len(bodies) == 1 + 2 + 2


def test_a_killed_build_goes_on_to_the_same_file(serve, pairs):
    url, bodies = serve(lambda body, attempt: time.sleep(0.05) or oracle(body, attempt))
    command = [sys.executable, "respond.py", *build_args(pairs, url, "whole.jsonl")]
    command += ["--concurrency", "2"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    total = len(bodies)
    command[command.index(str(pairs.parent / "whole.jsonl"))] = str(pairs.parent / "prefs.jsonl")
    for replies_before_kill in (2, 13):
        bodies.clear()
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL)
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
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert len(bodies) == total - kept
    whole, prefs = (pairs.parent / name for name in ("whole.jsonl", "prefs.jsonl"))
    assert prefs.read_bytes() == whole.read_bytes()


def test_local_captioner_and_policy(serve, pairs, llava, monkeypatch):
    monkeypatch.setitem(respond.SAMPLING, "captioner", {"temperature": 0.2, "max_tokens": 5})
    monkeypatch.setitem(respond.SAMPLING, "policy", {"temperature": 1.0, "max_tokens": 5})

    def script(body, attempt):
        body["messages"][0]["content"][-1]["text"] += " plain red"
        return oracle(body, attempt)

    url, bodies = serve(script)
    args = build_args(pairs, url)
    for role in ("captioner", "policy"):
        at = args.index(f"--{role}")
        args[at:at + 4] = [f"--{role}", str(llava)]
    respond.main(args)
    logs = pairs.parent / "prefs.jsonl.work"
    samples = {e["id"]: e["text"] for e in lines(logs / "samples.jsonl")}
    assert len(lines(logs / "captions.jsonl")) == 4 and len(samples) == 6
    assert len(set(samples.values())) > 1
    torn = (logs / "samples.jsonl").read_bytes().splitlines(True)[:4]
    (logs / "samples.jsonl").write_bytes(b"".join(torn))
    respond.main(args)
    assert {e["id"]: e["text"] for e in lines(logs / "samples.jsonl")} == samples


def test_report_is_one_page_that_needs_nothing_else(serve, pairs):
    url, _ = serve(oracle)
    respond.main(build_args(pairs, url))
    respond.main(["report", str(pairs.parent / "prefs.jsonl"), "--out",
                  str(pairs.parent / "report.html"), "--limit", "2"])
    page = (pairs.parent / "report.html").read_text()
    assert page.count("<article>") == 2 and page.count("data:image/jpeg;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|<script", page)
    assert "<mark>square and a dog.</mark>" in page and "<mark>green</mark> square" in page
    assert "“a red square” → “a green square”" in page


def test_transformers_serve_answers_about_an_image(tmp_path):
    pytest.importorskip("fastapi", reason="needs the extra transformers[serving]")
    pytest.importorskip("uvicorn")
    model, port = str(data.TINY / "model"), free_port()
    server = subprocess.Popen(
        [Path(sys.executable).parent / "transformers", "serve", model, "--device", "cpu", "--host",
         "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port, server)
        image = data.open_image("images/0000.png", data.TINY)
        content = [{"type": "image_url", "image_url": {"url": respond.image_url(image)}},
                   {"type": "text", "text": "Describe this image."}]
        got = ask([("q", [{"role": "user", "content": content}])], tmp_path / "log",
                  f"http://127.0.0.1:{port}/v1", model=model, max_tokens=40, timeout=60)
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
