"""Remote models: the one small client of this repository for OpenAI-compatible servers."""
import base64
import collections
import contextlib
import datetime
import fcntl
import functools
import hashlib
import io
import json
import os
import random
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from pathlib import Path

from data import Problem

# --- the client --------------------------------------------------------------------------------


def image_url(image, max_side=1024):
    """A PIL image as a JPEG data URL, shrunk so that its longer side has at most max_side px."""
    image = image.convert("RGB")  # a copy: thumbnail() works in place, and never enlarges
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask_all(requests, log, *, base_url, model, concurrency=8, retries=6, timeout=120, check=None,
            desc="", tries=3, backoff=1.0, key_env="OPENAI_API_KEY", **sampling):
    """Ask a chat model many things; yields (id, text) in completion order, (id, None) if in vain.

    requests: iterable of (id, messages), read no faster than it is answered. `messages` may also be
        a function that returns them, called in the thread that asks and only when it has to be
        asked (images are encoded late); then the id alone has to tell such requests apart.
    log: JSONL file to which every raw reply is appended and synced before it is yielded. A request
        (same id, messages, model and sampling) whose reply is there is not asked again.
    check: function of the text that raises ValueError for a malformed reply. That reply goes to the
        log with the reason, and the request is repeated: `tries` times, earlier runs included.
    retries, backoff: after 408, 409, 429, 5xx, a time-out (seconds) or a broken connection the next
        attempt follows in backoff * 2^k seconds, or when the server's Retry-After says. What then
        still has no reply, or met another 4xx, is logged with the reason, yielded as None, and
        asked again by the next run.
    key_env: environment variable of the key, which is sent to the server and written nowhere.
    sampling: temperature, max_tokens, ... in the server's words; None is left out.
    Raises Problem when going on is pointless (key or model refused, server gone for good); the
    replies that have come by then are in the log.
    """
    import openai
    from tqdm import tqdm
    if not base_url.startswith(("http://", "https://")):
        raise Problem(f"{base_url}: not a server address; one looks like http://127.0.0.1:8000/v1")
    key = os.environ.get(key_env) or "none"  # local servers ask for none
    body = {"model": model} | {k: v for k, v in sampling.items() if v is not None}
    size = len(requests) if hasattr(requests, "__len__") else None
    stop, count, row = threading.Event(), collections.Counter(), 0
    with (reply_log(log) as replies, tqdm(total=size, desc=desc) as bar,
          openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=0) as client,
          ThreadPoolExecutor(concurrency) as pool):
        send = functools.partial(complete, client, key, retries, backoff, stop)
        one = functools.partial(answer, body=body, log=replies, send=send, check=check,
                                tries=tries)
        try:
            for id, text, failure, tokens in in_flight(pool, one, requests, concurrency):
                row = row + 1 if failure else 0
                count.update(done=1, failed=text is None, tokens=tokens)
                bar.update()
                bar.set_postfix_str(f"{count['failed']} failed, {count['tokens']:,} tokens")
                yield id, text
                if row >= max(5, concurrency):
                    break
            if row and (row >= max(5, concurrency) or row == count["done"]):
                raise Problem(f"{base_url}: {row} requests in a row failed, the last: {failure}. "
                              f"All replies so far are in {log}; the same command goes on there")
        finally:
            stop.set()  # no further attempts; replies on their way are awaited and logged


def in_flight(pool, function, items, limit):
    """Results of function(item) in completion order; never more than `limit` items under way."""
    pending = set()
    for item in items:
        pending.add(pool.submit(function, item))
        if len(pending) >= limit:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    yield from (future.result() for future in as_completed(pending))


def answer(request, body, log, send, check, tries):
    """One request, from the log or the server: (id, text or None, why no reply came, tokens)."""
    (id, messages), (find, append), total = request, log, 0
    known_by = json.dumps([id, body, None if callable(messages) else messages], sort_keys=True)
    digest = hashlib.sha256(known_by.encode()).hexdigest()[:32]
    text, malformed = find(digest)
    if text is None and malformed < tries:
        body = body | {"messages": messages() if callable(messages) else messages}
    while text is None and malformed < tries:
        entry = {"id": id, **send(body), "model": body["model"], "request": digest,
                 "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
        if entry["text"] is None:
            append(entry)
            return id, None, entry["reason"], total
        total += sum(entry["usage"].values())
        try:
            if check:
                check(entry["text"])
            text = entry["text"]
        except ValueError as error:
            entry["reason"] = f"malformed reply: {error}"
            malformed += 1
        append(entry)
    return id, text, None, total


def complete(client, key, retries, backoff, stop, body):
    """One chat completion: {"text", "usage", "finish"}, or {"text": None, "reason"} without one.

    Repeats after failures that pass; raises Problem for those that every other request would meet.
    """
    import openai
    from tqdm import tqdm

    def clean(text):  # a server may echo the key; lone surrogates cannot be written to a file
        text = text.encode("utf-8", "replace").decode()
        return text.replace(key, "[key]") if len(key) > 8 else text

    for attempt in range(retries + 1):
        delay = backoff * 2 ** attempt * random.uniform(0.8, 1.2)
        try:
            reply = client.chat.completions.create(**body)
            choice, usage = reply.choices[0], reply.usage
            return {"text": clean(choice.message.content or ""), "finish": choice.finish_reason,
                    "usage": {"prompt": usage.prompt_tokens or 0,
                              "completion": usage.completion_tokens or 0} if usage else {}}
        except openai.APIStatusError as error:
            status, said = error.status_code, clean(" ".join(str(error.message).split())[:300])
            if status == 401:  # what servers say here may show a part of the key
                raise Problem(f"{client.base_url} refuses the key: set it in the environment "
                              "(OPENAI_API_KEY, or the role's own variable)") from None
            if status in (402, 404) or error.code == "insufficient_quota":
                raise Problem(f"{client.base_url} refuses every request for the model "
                              f"{body['model']!r} with HTTP {status}: {said}") from None
            reason = f"HTTP {status}: {said}"
            if status < 500 and status not in (408, 409, 429):
                break  # this one request is at fault: too long, or an image it cannot read
            with contextlib.suppress(ValueError):
                delay = min(120.0, float(error.response.headers.get("retry-after", "")))
        except openai.APIConnectionError as error:
            reason = f"{error.message} {error.__cause__ or ''}".strip()
        except (openai.OpenAIError, ValueError, TypeError, LookupError, AttributeError) as error:
            reason = f"no chat completion in the reply ({type(error).__name__})"
        if attempt < retries and delay > 3:  # shorter hiccups are not worth a line
            tqdm.write(f"{client.base_url}: {reason}; again in {delay:.0f} s", file=sys.stderr)
        if attempt == retries or stop.wait(delay):
            break
    return {"text": None, "reason": reason}


@contextlib.contextmanager
def reply_log(path):
    """The log of replies, locked against a second run: yields the functions (find, append).

    find(digest) -> (text or None, number of malformed replies so far). append(entry) returns when
    the entry is on the disk. Memory: one small tuple a reply, the texts stay in the file.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the end of the process
        except OSError:
            raise Problem(f"{path}: another run is writing its replies here") from None
        found, malformed, end, lock = {}, collections.Counter(), 0, threading.Lock()
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(end)  # a run was killed while it wrote this line
                break
            try:
                entry = json.loads(line)
                if entry["text"] is not None and "reason" not in entry:
                    found[entry["request"]] = end, len(line)
                malformed[entry["request"]] += entry["text"] is not None and "reason" in entry
            except (ValueError, TypeError, KeyError):
                raise Problem(f"{path}:{number}: not a reply; repair or remove the line") from None
            end += len(line)

        def find(digest):
            if digest not in found:
                return None, malformed[digest]
            offset, length = found[digest]
            return json.loads(os.pread(file.fileno(), length, offset))["text"], 0

        def append(entry):
            with lock:
                file.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

        yield find, append
