"""A client for OpenAI-compatible servers, and the log in which every paid reply is kept.

A reply is on the disk before it is used: the same command goes on where a killed one stopped, and
asks nothing twice. Keys are read from the environment and written nowhere.
"""

import base64
import fcntl
import functools
import hashlib
import io
import json
import os
import threading
import time
from collections import defaultdict, deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass

from tqdm import tqdm

from support.cli import UserError
from support.images import open_image


def image_url(image, max_side=1024):
    """A PIL image as a JPEG data URL, shrunk so that its longer side has at most max_side px."""
    image = image.convert("RGB")  # a copy: thumbnail() works in place, and never enlarges
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat_message(prompt, image=None, max_side=1024):
    """A request's messages: the prompt, after the image (as `open_image` takes it) if any."""
    content = [{"type": "text", "text": prompt}]
    if image is not None:
        url = image_url(open_image(image), max_side)
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]


def ask_in_order(requests, log, **options):
    """As `ask_all`: the texts alone, in the order of the requests, until one got no usable reply;
    raises UserError at the end, when all others are in the log."""
    texts, order = {}, deque(id for id, _ in requests)
    for id, text in ask_all(requests, log, **options):
        texts[id] = text
        while order and texts.get(order[0]) is not None:
            yield texts.pop(order.popleft())
    if order:
        failed = list(texts.values()).count(None)
        raise UserError(f"{failed} requests got no usable reply; the same command asks them again")


def ask_all(
    requests,
    log,
    *,
    base_url,
    model,
    concurrency=8,
    retries=6,
    timeout=120,
    check=str,
    desc="",
    tries=3,
    key_env="OPENAI_API_KEY",
    **sampling,
):
    """Ask a chat model many things; yields (id, text) in completion order, (id, None) if in vain.

    requests: iterable of (id, messages), read no faster than it is answered. `messages` may also be
        a function that returns them, called in the thread that asks and only when it has to be
        asked (images are encoded late); then the id alone has to tell such requests apart.
    log: JSONL file to which every raw reply is appended and synced before it is yielded. A request
        (same id, messages, model and sampling) whose reply is there is not asked again.
    check: function of the text that raises ValueError for a malformed reply. That reply goes to the
        log with the reason, and the request is repeated: `tries` times, earlier runs included.
    retries: of the openai client, after 408, 409, 429, 5xx, a time-out (seconds) or a broken
        connection, in 0.5 to 8 seconds or when the server's Retry-After says. What then still has
        no reply, or met another 4xx, is logged with the reason, yielded as None, and asked again
        by the next run.
    key_env: environment variable of the key (if unset, OPENAI_API_KEY), sent to the server alone.
    sampling: temperature, max_tokens, ... in the server's words.
    Raises UserError when going on is pointless (key or model refused, server gone for good); the
    replies that have come by then are in the log.
    """
    import openai

    key = os.environ.get(key_env) or os.environ.get("OPENAI_API_KEY") or "none"
    size = len(requests) if hasattr(requests, "__len__") else None
    limit = functools.partial(bound, timeout)
    http = openai.DefaultHttpxClient(event_hooks={"response": [limit]})
    failed, in_a_row = 0, 0
    with (
        ReplyLog(log, key) as kept,
        ThreadPoolExecutor(concurrency) as pool,
        openai.OpenAI(
            base_url=base_url, api_key=key, timeout=timeout, max_retries=retries, http_client=http
        ) as client,
    ):
        asker = Asker(client, kept, check, tries, {"model": model, **sampling})
        bar = tqdm(in_flight(pool, asker.ask, requests, concurrency), desc, size)
        for future in bar:
            id, entry = future.result()
            usable = "reason" not in entry
            if not usable:
                failed += 1
            bar.set_postfix_str(f"{failed} failed, {kept.tokens:,} tokens")
            yield id, entry["text"] if usable else None
            in_a_row = in_a_row + 1 if entry["text"] is None else 0
            if in_a_row > 0 and in_a_row in (size, max(5, concurrency)):
                raise UserError(
                    f"{base_url}: {in_a_row} requests in a row failed, the last: "
                    f"{entry['reason']}. The same command goes on from {log}"
                )


def in_flight(pool, function, items, limit):
    """Futures of function(item) in completion order; never more than `limit` items under way."""
    running = set()
    for item in items:
        running.add(pool.submit(function, item))
        if len(running) == limit:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from done
    yield from as_completed(running)


def bound(seconds, response, size=2**25):
    """Reads an HTTP response, and gives up on one that drips on and on or has no end: the usual
    time-out is one of silence."""
    import httpx2

    parts, content, end = response.stream, bytearray(), time.monotonic() + seconds
    for part in parts:
        content += part
        if len(content) > size or time.monotonic() > end:
            raise httpx2.ReadTimeout("the reply has no end", request=response.request)
    parts.close()  # the connection is free again
    response.stream = httpx2.ByteStream(bytes(content))


@dataclass
class Asker:
    """Asks one request, as often as it takes to get a good reply."""

    client: object  # openai.OpenAI
    log: "ReplyLog"
    check: object  # raises ValueError for a malformed text
    tries: int
    body: dict  # model and sampling

    def ask(self, request):
        """(id, the log's last entry for this request)."""
        id, messages = request
        late = callable(messages)
        name = digest(id, self.body, late or messages)
        past = self.log.entries[name]  # append() adds to it
        while not past or "reason" in past[-1]:
            replies = [entry for entry in past if entry["text"] is not None]
            if len(replies) >= self.tries:
                break
            entry = {"id": id, "request": name, "model": self.body["model"]}
            entry |= {"text": "", "usage": {}}
            self.ask_once(messages() if late else messages, entry)
            self.log.append(entry)
            if entry["text"] is None:
                break  # the client has tried again already
        return id, past[-1]

    def ask_once(self, messages, entry):
        """Puts the reply into the entry, or None and the reason why there is none."""
        import openai

        try:
            reply = self.client.chat.completions.create(messages=messages, **self.body)
            if reply.usage:
                entry["usage"] = reply.usage.to_dict()
            entry["finish"] = reply.choices[0].finish_reason
            entry["text"] = reply.choices[0].message.content or ""
            self.check(entry["text"])
        except openai.AuthenticationError:  # what servers say here may show a part of the key
            url = self.client.base_url
            raise UserError(f"{url} refuses the key in the environment") from None
        except openai.APIError as error:
            entry["text"] = None
            entry["reason"] = " ".join(f"{error.message} {error.__cause__ or ''}".split())[:300]
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            entry["reason"] = f"malformed reply: {error}"


def digest(*parts):
    """A short name for content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class ReplyLog:
    """A JSONL file of replies, and in memory {request: its entries}. It is locked against a second
    run while it is open; the key, which a server may echo, does not come into it."""

    def __init__(self, path, key=""):
        self.entries, self.tokens = defaultdict(list), 0
        self.secret = key if len(key) > 8 else "\n"  # which JSON does not contain
        self.file, self.turn = open(path, "a+b"), threading.Lock()
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{path}: another run is writing its replies here") from error
        self.file.seek(0)
        *lines, torn = self.file.read().split(b"\n")
        self.file.truncate(self.file.tell() - len(torn))  # a run was killed while it wrote this
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                self.entries[entry["request"]].append(entry)
            except Exception as error:  # no JSON, no object, no such field, too deep
                raise UserError(
                    f"{path}:{number}: not a reply; repair or remove the line: {error}"
                ) from error

    def append(self, entry):
        """Returns when the entry is on the disk."""
        line = json.dumps(entry, ensure_ascii=False).replace(self.secret, "[key]")
        line = line.encode("utf-8", "replace") + b"\n"  # half an emoji fits in no file
        with self.turn:
            self.file.write(line)
            self.file.flush()
            os.fsync(self.file.fileno())
            self.tokens += entry.get("usage", {}).get("total_tokens") or 0
        self.entries[entry["request"]].append(json.loads(line))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()
