"""The long campaign: hundreds of kills, full disks, thousands of broken inputs, a mad server.

    nice python tests/faults/campaign.py [--only kill] [--out tests/faults/results]

Writes a table (OUT.md) and the same as JSON with every failure (OUT.json). Each fault has one
outcome: survived, or lost, when a result differs from that of an undisturbed run, a command hangs,
or ends in a traceback. About ten minutes on two cores.
"""

import argparse
import collections
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[n]) for n in range(3)]  # it is run as a file
import harness  # noqa: E402
import mutate  # noqa: E402

from conftest import save_llava15, write_prefs  # noqa: E402
from test_chat import cut_short, hang_up  # noqa: E402

FEW = (
    "--lora-r 2 --lora-alpha 4 --lr 1e-2 --steps 4 --batch-size 2 --save-every 1 "
    "--sample-every 9 --seed 1"
).split()


# --- what is done to ----------------------------------------------------------------------------


def world(folder):
    """A model, records, AMBER-like questions, pairs, and a server: what all jobs work on."""
    (folder / "data").mkdir()
    llava = save_llava15(folder / "llava", image_size=56)
    prefs = write_prefs(folder / "data", n=4)
    few = folder / "data" / "few.jsonl"
    few.write_text("".join(prefs.read_text().splitlines(True)[:1]))
    amber = folder / "amber"
    (amber / "query").mkdir(parents=True)
    shutil.copytree(folder / "data", amber / "image")
    names = sorted(p.name for p in (amber / "image").glob("*.png"))
    (amber / "query" / "query_all.json").write_text(
        json.dumps(
            [
                {
                    "id": i,
                    "image": names[i % len(names)],
                    "query": f"Is there a {'big ' * (i % 5)}dog?",
                }
                for i in range(1, 25)
            ]
        )
    )
    (amber / "annotations.json").write_text(json.dumps([{"type": "generative"}] * 24))
    return argparse.Namespace(folder=folder, llava=llava, prefs=prefs, few=few, amber=amber)


def train_job(w, name):
    out = w.folder / name
    return (
        "train",
        [
            "--model",
            w.llava,
            "--data",
            w.prefs,
            "--eval-data",
            w.few,
            "--out",
            out,
            "--cache",
            f"{out}-cache",
            *FEW,
            "--resume",
        ],
        harness.training,
        out,
    )


def generate_job(w, name):
    out = w.folder / name
    return (
        "evaluate",
        [
            "generate",
            "--benchmark",
            "amber",
            "--data",
            w.amber,
            "--model",
            w.llava,
            "--out",
            out,
            "--batch-size",
            4,
            "--max-new-tokens",
            24,
            "--dimension",
            "g",
        ],
        answers,
        out,
    )


def judge_job(w, name):
    out = w.folder / name
    out.mkdir(exist_ok=True)
    rows = [
        {
            "question": f"q{i}",
            "gt_answer": "yes",
            "model_prediction": "no",
            "category": "VD",
            "subcategory": "map",
            "set_id": "0",
            "figure_id": "0",
            "question_id": str(i),
            "gt_answer_details": "x",
            "sample_note": "",
        }
        for i in range(60)
    ]
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        "evaluate",
        [
            "judge",
            "--benchmark",
            "hallusionbench",
            "--out",
            out,
            "--judge-url",
            w.url,
            "--judge-model",
            "m",
        ],
        judgements,
        out,
    )


def build_job(w, name):
    out = w.folder / name / "prefs.jsonl"
    out.parent.mkdir(exist_ok=True)
    pairs = w.folder / "data" / "pairs.jsonl"
    pairs.write_text(
        "".join(
            json.dumps(
                {"image": f"m{i}.png", "contrast_image": f"c{i}.png", "prompt": "What is it?"}
            )
            + "\n"
            for i in range(4)
        )
    )
    models = [
        x
        for role in ("captioner", "policy", "writer")
        for x in (f"--{role}", role, f"--{role}-url", w.url)
    ]
    return (
        "construct.responses",
        [pairs, "--out", out, "--samples", 2, "--concurrency", 2, *models],
        records,
        out,
    )


def answers(out):
    return (out / "answers.jsonl").read_bytes()


def judgements(out):
    return (out / "judgements.jsonl").read_bytes()


def records(out):
    return out.read_bytes()


# --- kills --------------------------------------------------------------------------------------


def lives(w, job, kills, wound):
    """Outcomes of `kills` SIGKILLs: a run is killed and resumed until it comes to its end; after
    twelve kills it is left alone. wound(...) starts a life and says whether it was killed."""
    module, argv, state, out = job(w, f"{job.__name__}-whole")
    log = w.folder / f"{job.__name__}.log"
    harness.run("train", ["--help"], w.folder / "warm-up.log")
    began = time.time()
    if harness.run(module, argv, log, watch=[w.folder]):
        yield "the undisturbed run failed: " + log.read_text()[-300:]
        return
    whole = state(out), int(Path(f"{log}.count").read_text()), time.time() - began
    chain, killed = 0, 0
    while killed < kills:
        chain += 1
        name = f"{job.__name__}-{wound.__name__}-{chain}"
        module, argv, state, out = job(w, name)
        log, here = w.folder / f"{name}.log", 0
        while here < 12 and wound(module, argv, log, w.folder, whole):
            here += 1
        if here == 12:
            harness.run(module, argv, log)
        killed += here
        text = log.read_text(errors="replace")
        same = "Traceback" not in text and state(out) == whole[0]
        yield from [""] * (here - 1) if here else []
        if here:
            yield "" if same else f"{name}: {'Traceback' if 'Traceback' in text else 'differs'}"
        for place in (out, w.folder / f"{name}-cache"):
            if same:
                shutil.rmtree(place, ignore_errors=True)


def at_random_moment(module, argv, log, folder, whole):
    return harness.killed_after(random.uniform(0.1, whole[2]), module, argv, log)


def at_file_operation(module, argv, log, folder, whole):
    n = random.randint(1, max(whole[1] // 2, min(whole[1] + 1, 20)))  # sometimes past the end
    return harness.run(module, argv, log, watch=[folder], kill_at=n) == -signal.SIGKILL


def stopped(w):
    """SIGINT and SIGTERM, to the process and to its group, with and without image readers."""
    module, argv, state, out = train_job(w, "stop-whole")
    harness.run(module, argv, w.folder / "stop.log")
    whole = state(out)
    for n, (number, group, workers) in enumerate(
        (s, g, k) for s in (signal.SIGINT, signal.SIGTERM) for g in (0, 1) for k in (0, 2)
    ):
        module, argv, state, out = train_job(w, f"stop{n}")
        argv, log = [*argv, "--workers", workers], w.folder / f"stop{n}.log"
        process = harness.child(module, argv, log)
        while process.is_alive() and not (out / "checkpoint-1").exists():
            time.sleep(0.02)
        (os.killpg if group else os.kill)(process.pid, number)
        process.join(60)
        saved = process.exitcode == 130 and "Traceback" not in log.read_text()
        again = harness.run(module, argv, log)
        yield "" if saved and again == 0 and state(out) == whole else f"signal {number} {n}"


# --- disks --------------------------------------------------------------------------------------


def full(w):
    """Each command meets a disk with a little room left, then gets space and goes on."""
    for job, rooms in (
        (train_job, range(0, 140_000, 20_000)),
        (generate_job, (0, 4096, 8192)),
        (judge_job, (0, 8192)),
        (build_job, (0, 8192, 16384)),
    ):
        module, argv, state, out = job(w, f"room-whole-{job.__name__}")
        log = w.folder / "room.log"
        harness.run(module, argv, log)
        whole = state(out)
        for room in rooms:
            with harness.small_disk(w.folder / "disk") as disk:
                inner = argparse.Namespace(**{**vars(w), "folder": disk})
                if job is build_job:
                    shutil.copytree(w.folder / "data", disk / "data")
                module, argv, state, out = job(inner, "run")
                log = w.folder / f"{job.__name__}-{room}.log"
                ballast = harness.fill(disk, leave=room)
                code = harness.run(module, argv, log)
                text = log.read_text(errors="replace")
                ballast.unlink()
                again = harness.run(module, argv, log)
                good = (
                    "Traceback" not in text
                    and (code == 2 and "error: " in text or code == 0)
                    and again == 0
                    and state(out) == whole
                )
                yield "" if good else f"{job.__name__} with {room} bytes: {text[-300:]}"


def read_only(w):
    import subprocess

    for job in (train_job, generate_job, judge_job, build_job):
        with harness.small_disk(w.folder / "disk") as disk:
            inner = argparse.Namespace(**{**vars(w), "folder": disk})
            if job is build_job:
                shutil.copytree(w.folder / "data", disk / "data")
            module, argv, *_ = job(inner, "run")
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            log = w.folder / f"read-only-{job.__name__}.log"
            code, text = harness.run(module, argv, log), log.read_text()
            good = code == 2 and "ead-only" in text and "Traceback" not in text
            yield "" if good else f"{job.__name__}: {text[-300:]}"


# --- input --------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_time(seconds=20):
    def late(*_):
        raise TimeoutError("a hang")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def broken_lines(w, n=6000):
    import data
    from support.cli import UserError

    path, rng = w.folder / "data" / "mutated.jsonl", random.Random(1)
    for _ in range(0, n, 500):
        lines = [mutate.line(rng) for _ in range(500)]
        path.write_bytes(b"\n".join(line if line.strip() else b"?" for line in lines) + b"\n")
        found = data.Records(path)
        for i in range(500):
            try:
                with in_time():
                    found[i]
                yield ""
            except UserError as e:
                yield "" if str(e).startswith(f"{path}:{i + 1}: ") else f"not named: {e}"
            except Exception as e:
                yield f"{type(e).__name__}: {lines[i][:200]!r}"


def broken_images(w, n=600):
    from PIL import Image

    from support.cli import UserError
    from support.images import open_image

    warnings.simplefilter("ignore")
    rng, whole = random.Random(2), mutate.pictures()
    Image.new("1", (30_000, 30_000)).save(w.folder / "bomb.png")
    tried = [("bomb.png", None), ("data", None), ("no.png", None), ("/dev/zero", None)]
    tried += [(name, whole[name]) for name in whole]
    tried += [(f"x{name}", mutate.data(rng, whole[name])) for name in rng.choices(list(whole), k=n)]
    for name, content in tried:
        if content is not None:
            (w.folder / name).write_bytes(content)
        try:
            with in_time():
                good = open_image(name, w.folder).mode == "RGB"
            yield "" if good else f"{name}: not RGB"
        except UserError as e:
            yield "" if name in str(e) else f"{name} not named: {e}"
        except BaseException as e:
            yield f"{name}: {type(e).__name__} {e}"


def broken_parquet(w, n=400):
    import data
    from support.cli import UserError
    from support.images import open_image

    rng, path = random.Random(3), w.folder / "bad.parquet"
    whole = mutate.parquet(w.folder / "whole.parquet").read_bytes()
    for _ in range(n):
        path.write_bytes(mutate.data(rng, whole))
        try:
            with in_time():
                found = data.Records(path)
                for i in range(min(5, len(found))):
                    open_image(found[i]["image"])
            yield ""
        except UserError:
            yield ""
        except Exception as e:
            yield f"{type(e).__name__}: {e}"


# --- servers ------------------------------------------------------------------------------------


def server(reply):
    """(URL, stop) of a chat server; reply(body, handler) gives the text or does the damage."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def send(self, status, content):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with contextlib.suppress(OSError):  # the client was killed
                text = reply(body, self)
                if text is not None:
                    message = {"role": "assistant", "content": text}
                    choice = {"index": 0, "finish_reason": "stop", "message": message}
                    self.send(
                        200,
                        {
                            "id": "c",
                            "object": "chat.completion",
                            "created": 0,
                            "model": "m",
                            "choices": [choice],
                        },
                    )

    it = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    it.handle_error = lambda *_: None  # clients that were killed
    it.daemon_threads = True
    threading.Thread(target=it.serve_forever, args=(0.05,), daemon=True).start()
    return f"http://127.0.0.1:{it.server_port}/v1", it.shutdown


def oracle(body, handler):
    """Captions, answers, claims and rewrites that depend on nothing but the question."""
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    time.sleep(0.02)
    if text.startswith("Below are"):
        return json.dumps({"consistent": ["it is a square"], "inconsistent": ["a dog"]})
    if text.startswith("Write two"):
        return json.dumps(
            {
                "chosen": "The picture shows a square, nothing else.",
                "rejected": "The picture shows a square and a dog.",
            }
        )
    if text.startswith("An answer"):
        return json.dumps(
            {
                "contrast_chosen": "The picture shows a circle, nothing else.",
                "changes": [{"was": "a square", "is": "a circle"}],
            }
        )
    return "A plain square with a dog." if body["model"] == "policy" else "A plain square."


def mad_server(w, n=300):
    """Every second request is refused, cut, delayed or garbled; each question is one outcome."""
    from support.chat import ask_all

    rng, lock, tries = random.Random(4), threading.Lock(), collections.Counter()
    bad = [
        lambda h, s=s: h.send(s, {"error": {"message": "no"}}) for s in (429, 500, 502, 503, 408)
    ]
    bad += [
        cut_short,
        hang_up,
        lambda h: h.send(200, b"<html>"),
        lambda h: h.send(200, {}),
        lambda h: h.send(200, {"choices": []}),
        lambda h: time.sleep(1.5),
    ]

    def reply(body, handler):
        with lock:
            tries[body["messages"][0]["content"]] += 1
            trouble = rng.choice(bad) if rng.random() < 0.5 else None
        return trouble(handler) if trouble else "re: " + body["messages"][0]["content"]

    url, stop = server(reply)
    questions = [(f"q{i}", f"question {i}", None) for i in range(n)]
    options = dict(base_url=url, model="m", timeout=1, retries=12, tries=8)
    got = dict(ask_all(questions, w.folder / "mad.jsonl", **options))
    asked = sum(tries.values())
    again = dict(ask_all(questions, w.folder / "mad.jsonl", **options))
    stop()
    for i in range(n):
        good = got[f"q{i}"]["text"] == again[f"q{i}"]["text"] == f"re: question {i}"
        bounded = tries[f"question {i}"] <= 20 and sum(tries.values()) == asked
        yield "" if good and bounded else f"q{i}: {got[f'q{i}']}"


# --- checkpoints and guards -----------------------------------------------------------------------


def damaged(w, n=40):
    """A random bit of a random file of a run's folder is flipped: its resumption is refused."""
    module, argv, state, out = train_job(w, "damaged")
    log, rng = w.folder / "damaged.log", random.Random(5)
    harness.run(module, argv, log)
    whole = w.folder / "undamaged"
    shutil.copytree(out, whole)
    for _ in range(n):
        shutil.rmtree(out)
        shutil.copytree(whole, out)
        names = ("*.safetensors", "optimizer.pt", "run.json", "records.json", "metrics.jsonl")
        [path] = out.rglob(rng.choice(names))
        raw = bytearray(path.read_bytes())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        log.write_text("")
        code, text = harness.run(module, argv, log), log.read_text()
        good = code == 2 and "Traceback" not in text
        unchanged = code == 0 and state(out) == state(whole)  # such as a bit of white space
        yield "" if good or unchanged else f"{path.name}: exit {code}, {text[-200:]}"


def guards(w):
    """Each guard broken on purpose: a test has to fail."""
    from tests.mutants import outcomes

    for guard, noticed in outcomes():
        yield "" if noticed else f"no test notices: {guard}"


# --- the table ----------------------------------------------------------------------------------

CAMPAIGN = {
    "SIGKILL at a random moment of training": lambda w: lives(w, train_job, 50, at_random_moment),
    "SIGKILL before a file operation of training": lambda w: lives(
        w, train_job, 50, at_file_operation
    ),
    "SIGKILL in `evaluate.py generate`": lambda w: lives(w, generate_job, 15, at_random_moment),
    "SIGKILL in `evaluate.py judge`": lambda w: lives(w, judge_job, 15, at_random_moment),
    "SIGKILL in `construct.responses`": lambda w: lives(w, build_job, 20, at_random_moment),
    "SIGKILL before a file operation of the three": lambda w: (
        x
        for job in (generate_job, judge_job, build_job)
        for x in lives(w, job, 10, at_file_operation)
    ),
    "SIGINT and SIGTERM, to process and group": stopped,
    "Disk full, all four commands": full,
    "Disk read-only, all four commands": read_only,
    "Mutated lines": broken_lines,
    "Mutated and odd images": broken_images,
    "Mutated parquet files": broken_parquet,
    "Questions to a mad server": mad_server,
    "A flipped bit in a run's folder": damaged,
    "A guard broken on purpose (`python -m tests.mutants`)": guards,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="a part of a fault's name")
    parser.add_argument("--out", default=str(Path(__file__).with_name("results")))
    args = parser.parse_args()
    random.seed(0)
    rows = []
    for name, tries in CAMPAIGN.items():
        if args.only.lower() not in name.lower():
            continue
        with tempfile.TemporaryDirectory() as folder:
            w, began = world(Path(folder)), time.time()
            w.url, stop = server(oracle)
            outcomes = list(tries(w))
            stop()
        lost = [o for o in outcomes if o]
        rows.append(
            {
                "fault": name,
                "tried": len(outcomes),
                "survived": len(outcomes) - len(lost),
                "lost": len(lost),
                "failures": lost[:9],
                "seconds": round(time.time() - began),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    import peft
    import torch
    import transformers

    made = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    keys = ("fault", "tried", "survived", "lost", "seconds")
    table = [
        "# Faults tried",
        "",
        "`python tests/faults/campaign.py`: " + made + ".",
        "",
        f"| {' | '.join(keys)} |",
        "|---" + "|---:" * (len(keys) - 1) + "|",
    ]
    table += [
        f"| {' | '.join(f'{row[k]:,}' if k != 'fault' else row[k] for k in keys)} |" for row in rows
    ]
    Path(f"{args.out}.md").write_text("\n".join(table) + "\n")
    Path(f"{args.out}.json").write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
