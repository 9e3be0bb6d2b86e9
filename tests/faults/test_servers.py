"""Servers that misbehave in rarer ways than test_chat.py has them: finished work is kept, the
client neither hangs nor swells, and the message says what was wrong."""

import json
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc

import pytest

from chat_server import KEY, ask, completion, echo, lines, questions
from support.cli import UserError


def begin(handler, length):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(length))
    handler.end_headers()


def drip(handler):
    """A byte every tenth of a second: each read succeeds long before the time-out."""
    begin(handler, 4000)
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.1)


def endless(handler):
    """Says that 10 GB will come, and sends as much as is taken."""
    begin(handler, 10_000_000_000)
    for _ in range(1000):
        handler.wfile.write(b" " * 1_000_000)


def test_a_slow_drip_meets_the_timeout(serve, tmp_path):
    url, bodies = serve(lambda body, attempt: drip if attempt == 0 else echo(body, attempt))
    began = time.monotonic()
    assert ask(questions(1), tmp_path / "log", url, timeout=0.5) == {"q0": "re: question 0"}
    assert time.monotonic() - began < 4 and len(bodies) == 2


def test_an_endless_reply_is_cut_off(serve, tmp_path):
    url, _ = serve(lambda body, attempt: endless if attempt == 0 else echo(body, attempt))
    tracemalloc.start()
    assert ask(questions(1), tmp_path / "log", url) == {"q0": "re: question 0"}
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()


def test_replies_with_a_wrong_id_or_model_still_belong_to_their_request(serve, tmp_path):
    def stranger(body, attempt):
        reply = completion(echo(body, attempt), "another-model") | {"id": "chatcmpl-of-somebody"}
        return lambda handler: handler.reply(200, reply)

    url, _ = serve(stranger)
    log = tmp_path / "log"
    assert ask(questions(4), log, url) == {f"q{i}": f"re: question {i}" for i in range(4)}
    assert {entry["id"] for entry in lines(log)} == {f"q{i}" for i in range(4)}


def test_a_key_that_expires_midway_keeps_what_was_answered(serve, tmp_path):
    valid, asked = {"left": 7}, []

    def script(body, attempt):
        asked.append(body)
        valid["left"] -= 1
        return echo(body, attempt) if valid["left"] >= 0 else 401

    url, _ = serve(script)
    log = tmp_path / "log"
    with pytest.raises(UserError, match="refuses the key"):
        ask(questions(40), log, url, concurrency=2)
    assert len(lines(log)) == 7 and len(asked) <= 7 + 4 and KEY not in log.read_text()
    valid["left"] = 40  # a new key
    asked.clear()
    assert len(ask(questions(40), log, url, concurrency=2)) == 40 and len(asked) == 33


@pytest.mark.parametrize("how", ["no TLS there", "unknown certificate"])
def test_tls_errors_are_named(serve, tmp_path, how, monkeypatch):
    url, _ = serve(echo)
    if how == "unknown certificate":
        made = subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "1",
                "-subj",
                "/CN=127.0.0.1",
                "-keyout",
                tmp_path / "key",
                "-out",
                tmp_path / "cert",
            ],
            capture_output=True,
        )
        if made.returncode:
            pytest.skip("no openssl to make a certificate with")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
        server = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)

        def refuse():
            while True:
                try:
                    server.accept()
                except ssl.SSLError:
                    pass  # the client hung up on the certificate
                except OSError:
                    return

        threading.Thread(target=refuse, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="SSL|TLS|certificate") as error:
        ask(questions(3), tmp_path / "log", url.replace("http:", "https:"), retries=1)
    assert KEY not in str(error.value) and "again" not in json.dumps(str(error.value))
    if how == "unknown certificate":
        server.close()
