"""Servers that misbehave in rarer ways than test_chat.py has them: finished work is kept, the
client neither hangs nor swells, and the message says what was wrong."""

import json
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse

import pytest

from chat_server import KEY, ask, completion, echo, lines, questions
from support import http
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


def test_a_slow_drip_meets_the_timeout(serve, tmp_path):
    url, bodies = serve(lambda body, attempt: drip if attempt == 0 else echo(body, attempt))
    began = time.monotonic()
    assert ask(questions(1), tmp_path / "log", url, timeout=0.5) == {"q0": "re: question 0"}
    assert time.monotonic() - began < 8 and len(bodies) == 2


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


# --- keys, addresses, redirects -------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\t", " "])
def test_white_space_around_a_key_does_no_harm(serve, tmp_path, monkeypatch, ending):
    url, _ = serve(echo)
    monkeypatch.setenv("OPENAI_API_KEY", KEY + ending)
    assert ask(questions(1), tmp_path / "log", url) == {"q0": "re: question 0"}


@pytest.mark.parametrize("key", [KEY + "\n" + KEY, KEY + "é", KEY + "\x00", KEY + " " + KEY])
def test_a_key_that_no_header_can_carry_is_refused_unseen(tmp_path, monkeypatch, key):
    monkeypatch.setattr("os.environ", {**os.environ, "OPENAI_API_KEY": key})
    with pytest.raises(UserError, match="OPENAI_API_KEY.*copy it once more") as error:
        ask(questions(1), tmp_path / "log", "http://127.0.0.1:9/v1")
    assert KEY not in str(error.value) and not (tmp_path / "log").exists()


def test_a_key_is_redacted_as_it_is_and_url_quoted(serve, tmp_path, monkeypatch):
    key = "sk-quoted/and+more="
    monkeypatch.setenv("OPENAI_API_KEY", key)
    forms = [key, repr(key)[1:-1], urllib.parse.quote(key, safe=""), json.dumps(key)]
    url, _ = serve(lambda body, attempt: "you sent " + " ".join(forms), key=key)
    ask(questions(1), tmp_path / "log", url)
    said = (tmp_path / "log").read_text()
    assert "you sent" in said and "quoted" not in said


def test_a_password_in_the_address_is_refused_unseen(tmp_path):
    url = "http://me:pass%2Fword@127.0.0.1:9/v1?api-key=hidden-one"
    with pytest.raises(
        UserError, match="http://127.0.0.1:9/v1: a password in the address"
    ) as error:
        ask(questions(1), tmp_path / "log", url, retries=0)
    assert "word@" not in str(error.value) and "hidden" not in str(error.value)


@pytest.mark.parametrize("path", ["{there}/chat/completions", "/v1/elsewhere"])
def test_a_redirect_is_not_followed(serve, tmp_path, path):
    there, asked_there = serve(echo)

    def redirect(handler):
        handler.send_response(307)
        handler.send_header("Location", path.format(there=there))
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    url, bodies = serve(lambda body, attempt: redirect)
    with pytest.raises(UserError, match="307"):
        ask(questions(1), tmp_path / "log", url)
    assert not asked_there and len(bodies) == 1


def test_a_key_does_not_travel_in_the_clear(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for host in ("8.8.8.8", "[2001:4860:4860::8888]", "judge.example.com"):
        with pytest.raises(UserError, match="use https, or unset OPENAI_API_KEY"):
            http.key_for(f"http://{host}:8000/v1", "OPENAI_API_KEY")
        assert http.key_for(f"https://{host}/v1", "OPENAI_API_KEY") == KEY
    for host in (
        "localhost",
        "127.0.0.1",
        "10.0.0.7",
        "[::1]",
        "192.168.1.2",
        "gpu-box",
        "a.local",
    ):
        assert http.key_for(f"http://{host}:8000/v1", "OPENAI_API_KEY") == KEY
    monkeypatch.delenv("OPENAI_API_KEY")
    assert http.key_for("http://8.8.8.8:8000/v1", "OPENAI_API_KEY") == "none"


def test_a_proxy_does_not_get_the_key(serve, tmp_path, monkeypatch):
    asked = []
    proxy, _ = serve(lambda body, attempt: asked.append(body) or 500)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.setenv("http_proxy", proxy)
    url, _ = serve(echo)
    assert ask(questions(1), tmp_path / "log", url) == {"q0": "re: question 0"}
    assert not asked


# --- replies without an end, and replies that are none --------------------------------------------


def drip_headers(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(60):
        handler.wfile.write(b"X-More: %d\r\n" % i)
        handler.wfile.flush()
        time.sleep(0.1)


def only_102(handler):
    for _ in range(60):
        handler.wfile.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        handler.wfile.flush()
        time.sleep(0.1)


def drip_chunk_extension(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;")
    for _ in range(60):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.1)


@pytest.mark.parametrize("trouble", [drip_headers, only_102, drip_chunk_extension])
def test_a_reply_that_never_ends_meets_the_deadline(serve, tmp_path, trouble):
    url, bodies = serve(lambda body, attempt: trouble if attempt == 0 else echo(body, attempt))
    began = time.monotonic()
    assert ask(questions(1), tmp_path / "log", url, timeout=0.5) == {"q0": "re: question 0"}
    assert time.monotonic() - began < 8 and len(bodies) == 2


def odd(**changes):
    reply = completion("x")
    for name, value in changes.items():
        if name == "choices":
            reply["choices"] = value
        else:
            reply["choices"][0]["message"][name] = value
    return lambda handler: handler.reply(200, reply)


def deep(handler):
    text = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    begin(handler, len(text))
    handler.wfile.write(text)


ODD = {
    "deep JSON": deep,
    "content in parts": odd(content=[{"type": "text", "text": "yes"}]),
    "null content": odd(content=None),
    "empty content": odd(content=" "),
    "refused": odd(content=None, refusal="I cannot look at this"),
    "an error inside": odd(choices=[]),
}


@pytest.mark.parametrize("what", ODD)
def test_what_is_no_answer_is_logged_and_asked_again(serve, tmp_path, what):
    state = {"well": False}
    url, bodies = serve(lambda body, attempt: echo(body, 0) if state["well"] else ODD[what])
    log = tmp_path / "log"
    assert ask(questions(2), log, url, tries=2, retries=0) == {"q0": None, "q1": None}
    reasons = [entry["reason"] for entry in lines(log)]
    assert len(reasons) == len(bodies) >= 2 and all(reasons)
    if what == "refused":
        assert "I cannot look at this" in reasons[0]
    state["well"] = True
    assert ask(questions(2), log, url) == {"q0": "re: question 0", "q1": "re: question 1"}


@pytest.mark.parametrize(
    "word, message",
    [
        ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        ("temperature", "Unsupported value: 'temperature' does not support 0 with this model."),
    ],
)
def test_a_server_that_refuses_a_parameter_is_adapted_to_once(serve, tmp_path, word, message):
    def script(body, attempt):
        if word in body:
            return lambda handler: handler.reply(400, {"error": {"message": message}})
        return echo(body, attempt)

    url, bodies = serve(script)
    sampling = {"temperature": 0, "max_tokens": 9}
    got = ask(questions(6), tmp_path / "log", url, concurrency=2, **sampling)
    assert None not in got.values() and len(bodies) <= 6 + 2
    assert all(word not in entry["sent"] for entry in lines(tmp_path / "log"))
    assert ask(questions(6), tmp_path / "log", url, **sampling) == got and len(bodies) <= 6 + 2


# --- the end of a run while replies are under way -------------------------------------------------


def test_replies_under_way_are_kept_when_the_key_is_refused(serve, tmp_path):
    """Seven are held back until the eighth has been refused."""
    refused, held = threading.Event(), threading.Semaphore(0)

    def script(body, attempt):
        if body["messages"][-1]["content"] == "question 7":
            for _ in range(7):
                held.acquire()
            refused.set()
            return 401
        held.release()
        refused.wait(20)
        time.sleep(0.5)
        return echo(body, attempt)

    url, _ = serve(script)
    with pytest.raises(UserError, match="refuses the key"):
        ask(questions(8), tmp_path / "log", url, concurrency=8)
    assert {entry["id"] for entry in lines(tmp_path / "log")} == {f"q{i}" for i in range(7)}


def test_control_c_on_a_silent_server_ends_soon(serve, tmp_path):
    asked = threading.Event()
    url, _ = serve(lambda body, attempt: asked.set() or time.sleep(30) or 500)

    def interrupt():
        asked.wait(20)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(questions(3), tmp_path / "log", url, timeout=100)
    assert time.monotonic() - began < 12
