"""Responses anchored on captions, and the one client for OpenAI-compatible servers.

    python respond.py build pairs.jsonl --out prefs.jsonl --captioner M --policy M --writer M ...
    python respond.py report prefs.jsonl --out report.html

`build` takes records with an image, a contrast image (`data.py contrast` makes them) and perhaps a
prompt. A vision model captions both images, the model to be trained answers the prompt several
times, and a writer sorts the claims in its answers by the caption and writes chosen, rejected and,
anchored on the other caption, contrast_chosen. The writer is a server (--writer-url), captioner
and policy are servers or local transformers models. Keys are read from the environment alone:
CAPTIONER_API_KEY, POLICY_API_KEY, WRITER_API_KEY, or OPENAI_API_KEY for all. Every reply is on disk
before it is used: the same command goes on where a killed one stopped, and asks nothing twice.

How this departs from the paper: it names the steps but publishes neither its prompts nor sampling
nor filters. The ones here are ours. The prompts stand in prompts/, one text a step (Jinja templates
that see the record's fields; the page of `report` is beside them); records carry their version.
"""
import argparse
import base64
import collections
import difflib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from pathlib import Path

import numpy as np
from data import (IMAGES, RESPONSES, Later, Problem, Records, command, encode_prompts, end_token_id,
                  fingerprint, image_records, load_model, need, open_image, problem_at,
                  prompt_format, within)
from tqdm import tqdm

httpx2, jinja2, openai, torch, transformers = map(
    Later, ("httpx2", "jinja2", "openai", "torch", "transformers"))

VERSION = 2  # of the texts in prompts/
STEPS = (  # prompt and log, who is asked, the fields of a reply in JSON
    ("captions", "captioner", {}),
    ("samples", "policy", {}),
    ("claims", "writer", {"consistent": list, "inconsistent": list}),
    ("rewrite", "writer", {"chosen": str, "rejected": str}),
    ("anchor", "writer", {"contrast_chosen": str, "changes": list}))
SAMPLING = {"captioner": {"temperature": 0.2, "max_tokens": 1024},
            "policy": {"temperature": 1.0, "max_tokens": 512},
            "writer": {"temperature": 0.7, "max_tokens": 4096}}


@functools.cache
def template(name):
    """A text of prompts/; .render(fields) fills it in."""
    text = Path(__file__).with_name("prompts").joinpath(name).read_text(encoding="utf-8")
    return jinja2.Template(text, autoescape=name.endswith(".html"), trim_blocks=True)


# --- the client --------------------------------------------------------------------------------


def image_url(image, max_side=1024):
    """A PIL image as a JPEG data URL, shrunk so that its longer side has at most max_side px."""
    image = image.convert("RGB")  # a copy: thumbnail() works in place, and never enlarges
    image.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def chat(prompt, image=None, max_side=1024):
    """A request's messages: the prompt, after the image (as data.open_image takes it) if any."""
    content = [{"type": "text", "text": prompt}]
    if image is not None:
        url = image_url(open_image(image), max_side)
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]


def ask_in_order(requests, log, **options):
    """As `ask_all`: the texts alone, in the order of the requests, until one got no usable reply;
    raises Problem at the end, when all others are in the log."""
    texts, order = {}, collections.deque(id for id, _ in requests)
    for id, text in ask_all(requests, log, **options):
        texts[id] = text
        while order and texts.get(order[0]) is not None:
            yield texts.pop(order.popleft())
    if order:
        raise Problem(f"{list(texts.values()).count(None)} requests got no usable reply; the same "
                      "command asks them again")


def ask_all(requests, log, *, base_url, model, concurrency=8, retries=6, timeout=120, check=str,
            desc="", tries=3, key_env="OPENAI_API_KEY", **sampling):
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
    key_env: environment variable of the key (if unset, OPENAI_API_KEY), which is sent to the server
        and written nowhere.
    sampling: temperature, max_tokens, ... in the server's words.
    Raises Problem when going on is pointless (key or model refused, server gone for good); the
    replies that have come by then are in the log.
    """
    key = os.environ.get(key_env) or os.environ.get("OPENAI_API_KEY") or "none"
    size = len(requests) if hasattr(requests, "__len__") else None
    kept, failed, row = Log(log, key), 0, 0
    http = openai.DefaultHttpxClient(event_hooks={"response": [functools.partial(bound, timeout)]})
    with (kept.file, ThreadPoolExecutor(concurrency) as pool,
          openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=retries,
                        http_client=http) as client):
        one = functools.partial(answer, client, kept, check, tries, {"model": model, **sampling})
        bar = tqdm(in_flight(pool, one, requests, concurrency), desc, size)
        for future in bar:
            id, entry = future.result()
            failed += "reason" in entry
            bar.set_postfix_str(f"{failed} failed, {kept.tokens:,} tokens")
            yield id, None if "reason" in entry else entry["text"]
            row = row + 1 if entry["text"] is None else 0
            if row and row in (size, max(5, concurrency)):
                raise Problem(f"{base_url}: {row} requests in a row failed, the last: "
                              f"{entry['reason']}. The same command goes on from {log}")


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
    parts, content, end = response.stream, bytearray(), time.monotonic() + seconds
    for part in parts:
        content += part
        if len(content) > size or time.monotonic() > end:
            raise httpx2.ReadTimeout("the reply has no end", request=response.request)
    parts.close()  # the connection is free again
    response.stream = httpx2.ByteStream(bytes(content))


def answer(client, log, check, tries, body, request):
    """(id, the log's last entry for this request), which is asked until there is a good one."""
    id, messages = request
    name = digest(id, body, callable(messages) or messages)
    past = log.entries[name]  # append() adds to it
    while not past or "reason" in past[-1]:
        if sum(entry["text"] is not None for entry in past) >= tries:
            break
        entry = {"id": id, "request": name, "model": body["model"], "text": "", "usage": {}}
        asked = messages() if callable(messages) else messages
        try:
            reply = client.chat.completions.create(messages=asked, **body)
            entry["usage"] = reply.usage.to_dict() if reply.usage else {}
            entry["finish"] = reply.choices[0].finish_reason
            entry["text"] = reply.choices[0].message.content or ""
            check(entry["text"])
        except openai.AuthenticationError:  # what servers say here may show a part of the key
            raise Problem(f"{client.base_url} refuses the key in the environment") from None
        except openai.APIError as e:
            reason = " ".join(f"{e.message} {e.__cause__ or ''}".split())[:300]
            log.append(entry | {"text": None, "reason": reason})
            break
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            entry["reason"] = f"malformed reply: {e}"
        log.append(entry)
    return id, past[-1]


def digest(*parts):
    """A short name for content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class Log:
    """A JSONL file of replies, and in memory {request: its entries}. It is locked against a second
    run while it is open; the key, which a server may echo, does not come into it."""

    def __init__(self, path, key=""):
        self.entries, self.tokens = collections.defaultdict(list), 0
        self.secret = key if len(key) > 8 else "\n"  # which JSON does not contain
        self.file, self.turn = open(path, "a+b"), threading.Lock()
        with problem_at(f"{path}: another run is writing its replies here", OSError):
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.file.seek(0)
        *lines, torn = self.file.read().split(b"\n")
        self.file.truncate(self.file.tell() - len(torn))  # a run was killed while it wrote this
        for number, line in enumerate(lines, 1):
            with problem_at(f"{path}:{number}: not a reply; repair or remove the line", Exception):
                entry = json.loads(line)
                self.entries[entry["request"]].append(entry)

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


# --- building ----------------------------------------------------------------------------------


class Record(dict):
    """A record in the making; as attributes its images, [(path, hash)], and what was wrong."""
    reason, reply = None, None


def build(args):
    """`python respond.py build`: five steps, the gates, and the files of good and bad records."""
    root, given = image_records(args.data)
    Path(f"{args.out}.work").mkdir(parents=True, exist_ok=True)
    records = [take_in(r, root, args) for r in tqdm(given, desc="images")]
    for step, role, kinds in STEPS:
        ask_step([r for r in records if not r.reason], step, role, kinds, args)
    for r in records:
        r.reason = r.reason or gate(r)
    good = [r for r in records if not r.reason]
    bad = [{**r, "record": n, "reason": r.reason, "reply": r.reply}
           for n, r in enumerate(records, 1) if r.reason]
    for path, rows in ((args.out, good), (Path(args.out).with_name("rejected_records.jsonl"), bad)):
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
        Path(f"{path}.tmp").write_text(text, encoding="utf-8", errors="replace")
        os.replace(f"{path}.tmp", path)
    print(f"{args.out}: {len(good):,} records; {len(bad):,} in rejected_records.jsonl")
    for reason, count in collections.Counter(r["reason"] for r in bad).most_common(9):
        print(f"    {count:,} {reason}")
    for name, values in figures(good).items():
        print(f"{name:32} (min, 5 %, median, 95 %, max)", *spread(values))


def take_in(given, root, args):
    """The Record of a given one. It is set aside if an image cannot be read, or is none of the data
    folder's: images are sent to servers, and a record may come from anywhere."""
    r = Record(given, prompts_version=VERSION, models={role: vars(args)[role] for role in SAMPLING})
    r["prompt"] = r.get("prompt") or r.get("question") or template("question.txt").render()
    r.files = []
    try:
        for key in filter(r.get, IMAGES):
            open_image(str(r[key]), root, args.allow_outside)
            file = root / str(r[key])
            r.files.append((str(file), hashlib.sha256(file.read_bytes()).hexdigest()))
            r[key] = os.path.relpath(file, Path(args.out).parent)
        need(isinstance(r["prompt"], str), "the prompt is not text")
    except Problem as e:
        r.reason = f"record: {e}"
    return r


def ask_step(records, step, role, kinds, args):
    """Puts the replies to a step's questions into the records, or sets records aside.

    Each reply is kept in the step's log under the hash of prompt, image and repetition; so an image
    is captioned once, in however many records it occurs.
    """
    model, url, log = vars(args)[role], vars(args)[role + "_url"], f"{args.out}.work/{step}.jsonl"
    parse, requests = functools.partial(fields, **kinds), {}
    for r in records:
        text = template(f"{step}.txt").render(r)
        asked = {"captions": r.files, "samples": r.files[:1] * args.samples,
                 "anchor": [(None, None)] * len(r.files[1:])}.get(step, [(None, None)])
        r.ids = [digest(text, image, asked[:n].count(image)) for n, image in enumerate(asked)]
        requests |= {id: (text, file, args.max_side) for id, (file, _) in zip(r.ids, asked)}
    if url:
        chats = [(id, functools.partial(chat, *question)) for id, question in requests.items()]
        texts = dict(ask_all(chats, log, base_url=url, model=model, concurrency=args.concurrency,
                             timeout=args.timeout, check=parse, desc=step,
                             key_env=role.upper() + "_API_KEY", **SAMPLING[role]))
    else:
        texts = dict(answer_locally(requests, log, model, **SAMPLING[role]))
    entries = map(json.loads, Path(log).read_bytes().splitlines())
    why = {entry["id"]: entry for entry in entries if "reason" in entry}
    for r in records:
        missing = [why[id] for id in r.ids if texts[id] is None]
        if missing:
            r.reason, r.reply = f"{step}: {missing[0]['reason']}", missing[0]["text"]
            continue
        replies = [parse(texts[id]) for id in r.ids]
        for reply in replies if kinds else [{step: replies}]:
            r |= reply


def generate_batch(model, processor, fmt, prompts, images=None, max_new_tokens=1024, beams=1,
                   temperature=0.0):
    """The model's texts for a batch of prompts, each with its PIL image (or all without).

    Left-padded and KV-cached. Greedy, or sampled from torch's generator at a temperature above 0;
    greedy texts do not depend on what else is in the batch.
    """
    tokenizer, end = processor.tokenizer, end_token_id(processor, fmt)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, num_beams=beams, do_sample=temperature > 0, **sampling,
        eos_token_id=sorted({end, tokenizer.eos_token_id} - {None}), use_cache=True,
        pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    inputs = transformers.BatchFeature(encode_prompts(processor, fmt, prompts, images))
    inputs = inputs.to(model.device, model.dtype)  # the dtype for floating-point tensors alone
    tokens = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1]:]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def answer_locally(requests, log, path, temperature, max_tokens, batch=8):
    """As `ask_all`, for {id: (prompt, image file, _)}, from a transformers model. A batch is seeded
    by its requests, and sampled again whole if a killed run left it incomplete: the same texts."""
    model, processor = load_model(path, "cuda" if torch.cuda.is_available() else "cpu")
    form, weights, kept, ids = prompt_format(model), fingerprint(model), Log(log), list(requests)
    with kept.file:
        for i in tqdm(range(0, len(ids), batch), desc=Path(log).stem, unit=" batches"):
            names = [digest(id, weights, temperature, max_tokens) for id in ids[i:i + batch]]
            if not all(kept.entries[name] for name in names):
                prompts, files, _ = zip(*(requests[id] for id in ids[i:i + batch]))
                torch.manual_seed(int(names[0], 16) % 2**63)
                texts = generate_batch(model, processor, form, prompts, map(open_image, files),
                                       max_tokens, temperature=temperature)
                for id, name, text in zip(ids[i:], names, texts):
                    kept.append({"id": id, "request": name, "model": path, "text": text}
                                | ({} if text else {"reason": "malformed reply: empty"}))
            yield from ((id, kept.entries[name][-1]["text"] or None)
                        for id, name in zip(ids[i:], names))


def fields(text, **kinds):
    """The JSON object in a reply, whose fields are of these types and not empty; without kinds, the
    text itself. Raises ValueError if the reply is malformed."""
    text = text.rpartition("</think>")[2].strip()  # reasoning models think aloud first
    if text and not kinds:
        return text
    try:
        found = json.loads(text[text.index("{"):text.rindex("}") + 1])
        json.dumps(found, ensure_ascii=False).encode()  # half an emoji fits in no file
    except (ValueError, RecursionError):
        raise ValueError("no JSON object" if kinds else "empty") from None
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind) or not str(found[key]).strip(" []"):
            raise ValueError(f"{key!r} is missing, empty or not a {kind.__name__}")
    return {key: found[key] for key in kinds}


# --- gates and report --------------------------------------------------------------------------


def words(text):
    return re.findall(r"[\w'-]+", text.lower())


def gate(r, limit=2):
    """Why a record is not fit for training, or None."""
    for other in RESPONSES[1:]:
        a, b = words(r["chosen"]), words(r.get(other, ""))
        if a == b:
            return f"gate: chosen and {other} are the same"
        if other in r and max(len(a), len(b)) > limit * min(len(a), len(b)):
            return f"gate: chosen has {len(a)} words, {other} {len(b)}"


def figures(records):
    """{what: its values} over the records, as far as they have the fields."""
    found = collections.defaultdict(list)
    for r in records:
        a = collections.Counter(words(r["chosen"]))
        found["chosen: words"].append(a.total())
        for other in RESPONSES[1:]:
            if other in r:
                b = collections.Counter(words(r[other]))
                shared = 2 * (a & b).total() / max(1, a.total() + b.total())
                found[f"{other}: length ratio"].append(b.total() / max(1, a.total()))
                found[f"{other}: word overlap"].append(shared)
    return found


def spread(values):
    """What the tables show of a figure: min, 5 %, median, 95 %, max."""
    return [f"{value:.3g}" for value in np.quantile(values, (0, 0.05, 0.5, 0.95, 1))]


def report(args):
    """`python respond.py report`: one self-contained page on which a person can scan records."""
    root, records = image_records(args.data)
    records = [given | r for given, r in zip(records, Records(args.data))]
    shown = list(enumerate(records, 1))[::max(1, -(-len(records) // args.limit))]
    what = f"{len(shown):,} of {len(records):,} records"
    page = template("report.html").render(
        title=f"{Path(args.data).name}: {what}", marked=marked, figures=figures,
        spread=spread, everything=records, records=tqdm(shown, desc="report"),
        picture=lambda image: image_url(open_image(image, root, args.allow_outside), 480))
    Path(args.out).write_text(page, encoding="utf-8")
    print(f"{args.out}: {what}")


def marked(text, other):
    """The text in parts: (words, whether the other text has others there)."""
    a, b = text.split(), other.split()
    moves = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    return [(" ".join(a[i:j]), tag != "equal") for tag, i, j, _, _ in moves if i < j]


# --- command line ------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("build", help="write records from images and captions").add_argument
    add("data", help="records with image, contrast_image and perhaps prompt (.jsonl)")
    add("--out", required=True, help="the records (.jsonl); OUT.work and rejected_records.jsonl "
        "beside it keep all replies and the bad records")
    for role, task in (("captioner", "describes the images"), ("policy", "the model to be trained"),
                       ("writer", "sorts claims and writes responses")):
        add(f"--{role}", required=True, metavar="MODEL", help=task)
        add(f"--{role}-url", required=role == "writer", metavar="URL", help="its server, "
            "http://host:port/v1" + " (without: a local model)" * (role != "writer"))
    add("--samples", type=within(1), default=4, help="answers of the policy (default 4)")
    add("--max-side", type=within(1), default=1024, help="px of images sent (default 1024)")
    add("--concurrency", type=within(1), default=8, help="requests at a time (default 8)")
    add("--timeout", type=within(1, kind=float), default=120,
        help="seconds a request (default 120)")
    add("--allow-outside", action="store_true", help="send images outside the data's folder, too")
    add = commands.add_parser("report", help="look at records in a browser").add_argument
    add("data", help="prefs.jsonl")
    add("--out", required=True, help="the page (.html)")
    add("--limit", type=within(1), default=100, help="records shown (default 100)")
    add("--allow-outside", action="store_true", help="show images outside the data's folder, too")
    args = parser.parse_args(argv)
    command(lambda: build(args) if args.command == "build" else report(args))


if __name__ == "__main__":
    main()
