"""A real server on the loopback that speaks the OpenAI chat protocol, and what to ask it."""

import base64
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from support.chat import ask_all

KEY = "sk-secret-0123456789abcdef"


def start(script, key=KEY):
    """(server, the request bodies so far).

    script(body, attempt) gives the text of the reply, or an int: an HTTP status, or a function of
    the handler that does the damage itself; attempt counts the earlier times of the same messages.
    """
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
    return server, bodies


def completion(text, model="m"):
    message = {"role": "assistant", "content": text}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    }


def questions(n):
    return [(f"q{i}", f"question {i}", None) for i in range(n)]


def ask(requests, log, url, **options):
    options = {"model": "m", "timeout": 5, **options}
    entries = ask_all(requests, log, base_url=url, **options)
    return {id: None if "reason" in entry else entry["text"] for id, entry in entries}


def echo(body, attempt):
    return "re: " + body["messages"][-1]["content"]


def lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def lines_of_whole(log):
    return [json.loads(line) for line in log.read_bytes().splitlines(True) if line.endswith(b"\n")]


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255,) * 3}


def oracle(body, attempt):
    """A captioner, a policy and a writer that see nothing but the colour of an image."""
    picture, text = [], body["messages"][0]["content"]
    if not isinstance(text, str):
        *picture, text = text
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
        return json.dumps(
            {
                "chosen": f"The picture shows a {colour} square, nothing else.",
                "rejected": f"The picture shows a {colour} square and a dog.",
            }
        )
    was = re.search(r"shows a (\w+) square", text)[1]
    return "<think>{}</think>" + json.dumps(
        {
            "contrast_chosen": f"The picture shows a {colour} square, nothing else.",
            "changes": [{"was": f"a {was} square", "is": f"a {colour} square"}],
        }
    )
