"""A client for OpenAI-compatible servers, and the log in which every paid reply is kept.

A reply is on the disk before it is used: the same command goes on where a killed one stopped, and
asks nothing twice. Keys are read from the environment and written nowhere.
"""

import asyncio
import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import sys
from collections import defaultdict
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from support.cli import UserError
from support.files import drop_torn_line
from support.images import open_image
from support.text import Text

# What newer models do not take, and what they take instead.
NEWER = {"max_tokens": "max_completion_tokens", "temperature": None}
GRACE = 5  # seconds for replies that are under way when a run ends early


def image_url(image, max_side=1024):
    """A PIL image as a JPEG data URL, shrunk so that its longer side has at most max_side px."""
    image = image.convert("RGB")  # a copy: thumbnail() works in place, and never enlarges
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat_message(prompt, image, max_side):
    """A request's messages: the prompt, after the image (as `open_image` takes it) or None."""
    content = prompt
    if image is not None:
        url = image_url(open_image(image), max_side)
        picture = {"type": "image_url", "image_url": {"url": url}}
        content = [picture, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def ask_in_order(requests, log, give_up=0, **options):
    """{id: text} as of `ask_all`, in the order of the requests. Up to give_up requests without
    a usable reply are "", more raise UserError; the replies of the others are in the log then."""
    entries = dict(ask_all(requests, log, **options))
    failed = sum("reason" in entry for entry in entries.values())
    if failed > give_up:
        raise UserError(
            f"{failed} requests got no usable reply; the same command asks them again, and with "
            f"--give-up {failed} goes on without"
        )
    return {id: text_of(entries[id]) for id, _, _ in requests}


def text_of(entry):
    """The reply in an entry of the log; "" where there is no usable one."""
    if "reason" in entry:
        return ""
    return Text(entry["text"], cut=entry.get("finish") == "length")


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
    max_side=1024,
    key_env="OPENAI_API_KEY",
    **sampling,
):
    """Ask a chat model many things; yields (id, entry of the log) in completion order. An entry has
    a text or, if it was in vain, a reason.

    requests: list of (id, prompt, image or None). An image is opened when it has to be sent; those
        of requests with one id and prompt are taken for the same.
    log: JSONL file to which every raw reply is appended and synced before it is yielded. A request
        (same id, prompt, model and sampling) whose reply is there is not asked again.
    check: function of the text that raises ValueError for a malformed reply. That reply goes to the
        log with the reason, and the request is repeated, `tries` times in all.
    timeout: seconds from a request to the last byte of its reply.
    retries: of the openai client, after 408, 409, 429, 5xx, a time-out or a broken connection, in
        0.5 to 8 seconds or when the server's Retry-After says. What then still has no reply, or met
        another 4xx, is logged with the reason, and asked again by the next run.
    max_side: pixels of an image's longer side, as it is sent.
    key_env: environment variable of the key (if unset, OPENAI_API_KEY), sent to the server alone.
    sampling: temperature, max_tokens, ... in the server's words.
    Raises UserError when going on is pointless (key or model refused, server gone for good).
    However it ends, replies that are under way have GRACE seconds to come, and are in the log.
    """
    import openai

    from support import http

    key = http.key_for(base_url, key_env)
    client = openai.AsyncOpenAI(
        base_url=base_url,
        api_key=key,
        timeout=timeout,
        max_retries=retries,
        http_client=http.new_client(base_url, timeout),
    )
    in_a_row = 0
    with ReplyLog(log, http.forms_of(key)) as kept:
        asker = Asker(client, kept, check, tries, max_side, {"model": model, **sampling})
        size = len(requests)
        with contextlib.closing(answers(asker, requests, concurrency)) as found:
            for id, entry in tqdm(found, desc, size):
                yield id, entry
                in_a_row = in_a_row + 1 if entry["text"] is None else 0
                if in_a_row in (size, max(5, concurrency)):
                    raise UserError(
                        f"{http.shown(base_url)}: {in_a_row} requests in a row failed, the last: "
                        f"{entry['reason']}. The same command goes on from {log}"
                    )


def answers(asker, requests, limit):
    """What asker.ask(request) returns, in completion order; never more than `limit` under way. The
    event loop is in a thread of its own, since a notebook has one already. However it ends, replies
    that are under way have GRACE seconds to come."""
    from anyio.from_thread import start_blocking_portal

    left = iter(requests)
    tasks = set()
    with start_blocking_portal() as portal:
        try:
            while True:
                for request in islice(left, limit - len(tasks)):
                    tasks.add(portal.start_task_soon(asker.ask, request))
                if not tasks:
                    return
                done, _ = wait(tasks, return_when=FIRST_COMPLETED)
                task = done.pop()
                tasks.remove(task)
                yield task.result()
        finally:
            if tasks:
                text = f"waiting {GRACE} s at most for {len(tasks)} replies that are under way"
                print(text, file=sys.stderr)
                wait(tasks, GRACE)
            portal.call(asker.client.close)


@dataclass
class Asker:
    """Asks one request, as often as it takes to get a good reply."""

    client: object  # openai.AsyncOpenAI
    log: "ReplyLog"
    check: object  # raises ValueError for a malformed text
    tries: int
    max_side: int  # px
    body: dict  # model and sampling, as asked for

    def __post_init__(self):
        self.sent = dict(self.body)  # as this server takes them

    async def ask(self, request):
        """(id, the log's last entry for this request)."""
        id, prompt, image = request
        name = digest(id, self.body, prompt)
        past = self.log.entries[name]  # append() adds to it
        if past and "reason" not in past[-1]:
            return id, past[-1]
        messages = await asyncio.to_thread(chat_message, prompt, image, self.max_side)
        for _ in range(self.tries):
            entry = {"id": id, "request": name, "model": self.body["model"], "text": ""}
            await self.ask_once(messages, entry)
            self.log.append(entry)
            if "reason" not in entry or entry["text"] is None:
                break  # a good reply, or none: the client has tried again already
        return id, past[-1]

    async def ask_once(self, messages, entry):
        """Puts the reply into the entry, or None and the reason why there is none."""
        import openai

        from support import http

        entry["sent"] = sent = dict(self.sent)
        try:
            reply = await self.client.chat.completions.create(messages=messages, **sent)
            entry["text"] = content_of(reply, entry)
            self.check(entry["text"])
        except openai.AuthenticationError:  # what servers say here may show a part of the key
            url = http.shown(str(self.client.base_url))
            raise UserError(f"{url} refuses the key in the environment") from None
        except openai.APIError as error:
            if isinstance(error, openai.BadRequestError):
                self.adapt(error.message)
            if self.sent != sent:
                return await self.ask_once(messages, entry)
            entry["text"] = None
            entry["reason"] = " ".join(f"{error.message} {error.__cause__ or ''}".split())[:300]
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            entry["reason"] = f"malformed reply: {error}"

    def adapt(self, message):
        """Send no more what the server's error names."""
        for name, instead in NEWER.items():
            if name in message and name in self.sent:
                value = self.sent.pop(name)
                if instead:
                    self.sent[instead] = value
                text = f"note: the server takes no {name}, and gets {instead or 'none'}"
                tqdm.write(text, file=sys.stderr)


def content_of(reply, entry):
    """The text of a reply; how it ended and what it cost go into the entry. ValueError, with what
    the server says of it, where there is no answer."""
    if reply.usage:
        entry["usage"] = reply.usage.to_dict()
    if not reply.choices:
        raise ValueError(f"no answer in it: {reply!s:.300}")
    choice = reply.choices[0]
    entry["finish"] = choice.finish_reason
    text = choice.message.content
    is_text = isinstance(text, str) and text.strip()
    if not is_text or choice.message.refusal or choice.finish_reason == "content_filter":
        raise ValueError(f"no answer in it: {choice!s:.300}")
    return text


def digest(*parts):
    """A short name for content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class ReplyLog:
    """A JSONL file of replies, and in memory {request: its entries}. It is locked against a second
    run while it is open; `secrets`, which a server may echo, do not come into it."""

    def __init__(self, path, secrets=()):
        self.entries = defaultdict(list)
        self.secrets = secrets
        self.file = open(path, "ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{path}: another run is writing its replies here") from error
        drop_torn_line(Path(path))
        for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
            try:
                entry = json.loads(line)
                self.entries[entry["request"]].append(entry)
            except Exception as error:  # no JSON, no object, no such field, too deep
                raise UserError(
                    f"{path}:{number}: not a reply; repair or remove the line: {error}"
                ) from error

    def append(self, entry):
        """Returns when the entry is on the disk."""
        line = json.dumps(entry, ensure_ascii=False)
        for secret in self.secrets:
            line = line.replace(secret, "[key]")
        line = line.encode("utf-8", "replace") + b"\n"  # half an emoji fits in no file
        self.file.write(line)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.entries[entry["request"]].append(json.loads(line))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()
