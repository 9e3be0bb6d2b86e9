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
nor filters. The ones below are ours; every record carries their version.
"""
import argparse
import base64
import collections
import contextlib
import datetime
import difflib
import fcntl
import functools
import hashlib
import html
import io
import json
import os
import re
import string
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, as_completed, wait
from pathlib import Path

from data import (Later, Problem, command, encode_prompts, end_token_id, image_records,
                  load_model, open_image, prompt_format)
from tqdm import tqdm

httpx2, openai, torch, transformers = map(Later, ("httpx2", "openai", "torch", "transformers"))

# --- prompts (a change of text is a change of version) ------------------------------------------

VERSION = 1
SAMPLING = {"captioner": {"temperature": 0.2, "max_tokens": 1024},
            "policy": {"temperature": 1.0, "max_tokens": 512},
            "writer": {"temperature": 0.7, "max_tokens": 4096}}
QUESTION = "Describe this image in detail."  # for records without a prompt
CAPTION = """Describe this image for somebody who has to answer any question about it without \
seeing it: every object with its number, colour, position and what it does, how the objects stand \
to each other, the setting, and all text that can be read. State only what is plainly visible. Do \
not guess, and do not mention what is absent."""
CLAIMS = """Below are a reliable description of an image, a question about the image, and answers \
to the question by a model that makes mistakes. Break the answers up into short claims, one fact \
each. A claim is consistent if the description states or clearly implies it. It is inconsistent if \
the description contradicts it, or if it names what the description would have mentioned. Leave out\
 opinions and whatever the description cannot decide.

Description: $caption

Question: $question

$answers

Reply with JSON alone: {"consistent": ["...", ...], "inconsistent": ["...", ...]}"""
REWRITE = """Write two answers to a question about an image, in one style: the same tone, the same \
order, about the same length, the same words wherever the facts allow it. The preferred answer \
states only facts from the description and the consistent claims. The dispreferred answer is the \
preferred answer with inconsistent claims stated in it as if they were true, in place of the facts \
they contradict. Neither mentions the description or the claims.

Description: $caption

Question: $question

Consistent claims: $consistent

Inconsistent claims: $inconsistent

Reply with JSON alone: {"preferred": "...", "dispreferred": "..."}"""
ANCHOR = """An answer to a question about one image follows, and a reliable description of another \
image. Answer the same question for the other image. Keep the wording and the order of the given \
answer wherever it is true of the description, change what is not true, and add nothing that the \
description does not state. List each statement of the given answer that the description \
contradicts ("was") beside the one that replaces it ("is").

Question: $question

Answer for the first image: $preferred

Description of the other image: $caption

Reply with JSON alone: {"preferred": "...", "changes": [{"was": "...", "is": "..."}, ...]}"""

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
    waiting, failed, order = {}, 0, iter([id for id, _ in requests])
    following = next(order, None)
    for id, text in ask_all(requests, log, **options):
        waiting[id], failed = text, failed + (text is None)
        while waiting.get(following) is not None:
            yield waiting.pop(following)
            following = next(order, None)
    if failed:
        raise Problem(f"{failed} requests got no usable reply; the same command asks them again")


def ask_all(requests, log, *, base_url, model, concurrency=8, retries=6, timeout=120, check=None,
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
    key_env: environment variable of the key, which is sent to the server and written nowhere.
    sampling: temperature, max_tokens, ... in the server's words; None is left out.
    Raises Problem when going on is pointless (key or model refused, server gone for good); the
    replies that have come by then are in the log.
    """
    if not base_url.startswith(("http://", "https://")):
        raise Problem(f"{base_url}: not a server address; one looks like http://127.0.0.1:8000/v1")
    key = os.environ.get(key_env) or "none"  # local servers ask for none
    body = {"model": model} | {k: v for k, v in sampling.items() if v is not None}
    size = len(requests) if hasattr(requests, "__len__") else None
    count, row, limit = collections.Counter(), 0, max(5, concurrency)
    with (reply_log(log, check) as entries, tqdm(total=size, desc=desc) as bar,
          openai.OpenAI(base_url=base_url, api_key=key, timeout=timeout, max_retries=retries,
                        http_client=bounded_http(timeout)) as client,
          ThreadPoolExecutor(concurrency) as pool):
        one = functools.partial(answer, client, entries, body, tries)
        for id, text, failure, tokens in in_flight(pool, one, requests, concurrency):
            row = row + 1 if failure else 0
            count.update(done=1, failed=int(text is None), tokens=tokens)
            bar.update()
            bar.set_postfix_str(f"{count['failed']} failed, {count['tokens']:,} tokens")
            yield id, text
            if row == limit:
                break
        if row and row in (limit, count["done"]):
            raise Problem(f"{base_url}: {row} requests in a row failed, the last: {failure}. All "
                          f"replies so far are in {log}; the same command goes on from there")


def bounded_http(seconds, size=2**25):
    """An HTTP client that gives up on replies that drip on and on or never end: the usual time-out
    is one of silence. seconds: for the whole reply; size: bytes."""

    def bound(response):
        inner, end = response.stream, time.monotonic() + seconds

        class Bounded(httpx2.SyncByteStream):
            def __iter__(self):
                total = 0
                for part in inner:
                    total += len(part)
                    if total > size or time.monotonic() > end:
                        raise httpx2.ReadTimeout("the reply has no end", request=response.request)
                    yield part

            def close(self):
                inner.close()

        response.stream = Bounded()
    return openai.DefaultHttpxClient(event_hooks={"response": [bound]})


def in_flight(pool, function, items, limit):
    """Results of function(item) in completion order; never more than `limit` items under way."""
    pending = set()
    for item in items:
        pending.add(pool.submit(function, item))
        if len(pending) >= limit:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    yield from (future.result() for future in as_completed(pending))


def answer(client, log, body, tries, request):
    """One request, from the log or the server: (id, text or None, why no reply came, tokens)."""
    (id, messages), (find, append), tokens = request, log, 0
    name = digest(id, body, None if callable(messages) else messages)
    text, malformed = find(name)
    if text is None and malformed < tries:
        body = body | {"messages": messages() if callable(messages) else messages}
    while text is None and malformed < tries:
        entry = {"id": id, "request": name, "model": body["model"], **complete(client, body)}
        append(entry)
        if entry["text"] is None:
            return id, None, entry["reason"], tokens
        tokens += sum(entry["usage"].values())
        text, malformed = find(name)
    return id, text, None, tokens


def complete(client, body):
    """One chat completion as {"text", "usage", "finish"}; text None and the "reason" without one.

    Raises Problem for what every other request would meet as well.
    """

    def clean(text):  # a server may echo the key; lone surrogates cannot be written to a file
        text = text.encode("utf-8", "replace").decode()
        return text.replace(client.api_key, "[key]") if len(client.api_key) > 8 else text

    try:
        reply = client.chat.completions.create(**body)
        choice, usage = reply.choices[0], reply.usage
        spent = [usage.prompt_tokens or 0, usage.completion_tokens or 0] if usage else []
        return {"text": clean(choice.message.content or ""), "finish": choice.finish_reason,
                "usage": dict(zip(("prompt", "completion"), spent))}
    except openai.AuthenticationError:  # what servers say here may show a part of the key
        raise Problem(f"{client.base_url} refuses the key: set it in the environment "
                      "(OPENAI_API_KEY, or the role's own variable)") from None
    except openai.APIStatusError as e:
        reason = f"HTTP {e.status_code}: " + clean(" ".join(str(e.message).split())[:300])
        if e.status_code in (402, 404) or e.code == "insufficient_quota":
            raise Problem(f"{client.base_url} refuses every request for the model "
                          f"{body['model']!r} with {reason}") from None
        return {"text": None, "reason": reason}
    except openai.APIConnectionError as e:
        return {"text": None, "reason": f"{e.message} {e.__cause__ or ''}".strip()}
    except (openai.OpenAIError, ValueError, TypeError, LookupError, AttributeError) as e:
        return {"text": "", "usage": {}, "reason": f"not a chat completion ({type(e).__name__})"}


def digest(*parts):
    """A short name for content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextlib.contextmanager
def reply_log(path, check=None):
    """The log of replies, locked against a second run: yields the functions (find, append).

    find(request) -> (text or None, number of malformed replies so far). append(entry) returns when
    the entry is on the disk, dated, and with a reason if check(text) raises ValueError.
    """
    found, malformed, lock = {}, collections.Counter(), threading.Lock()

    def note(entry):
        if entry["text"] is not None and "reason" in entry:
            malformed[entry["request"]] += 1
        elif entry["text"] is not None:
            found[entry["request"]] = entry["text"]

    def append(entry):
        try:
            if check and "reason" not in entry:
                check(entry["text"])
        except ValueError as e:
            entry["reason"] = f"malformed reply: {e}"
        entry["date"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        with lock:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            note(entry)

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the end of the process
        except OSError:
            raise Problem(f"{path}: another run is writing its replies here") from None
        file.seek(0)
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(end)  # a run was killed while it wrote this line
                break
            end += len(line)
            try:
                note(json.loads(line))
            except (ValueError, TypeError, KeyError):
                raise Problem(f"{path}:{number}: not a reply; repair or remove the line") from None
        yield lambda request: (found.get(request), malformed[request]), append


# --- building ----------------------------------------------------------------------------------


def build(args):
    """`python respond.py build`: five steps, the gates, and the files of good and bad records."""
    root, given = image_records(args.data)
    out = Path(args.out)
    args.work = Path(f"{out}.work")
    args.work.mkdir(parents=True, exist_ok=True)
    records = [{"given": r, "question": r.get("prompt") or r.get("question") or QUESTION,
                "files": [root / str(r[key]) for key in ("image", "contrast_image") if r.get(key)]}
               for r in given]
    check_records(records, root, args.allow_outside)
    ask = functools.partial(ask_step, args, records)
    ask("captions", "captioner", lambda r: [(CAPTION, file) for file in r["files"]])
    ask("samples", "policy", lambda r: [(r["question"], r["files"][0])] * args.samples)
    ask("claims", "writer",
        lambda r: [(fill(CLAIMS, r, 0, {"answers": "\n---\n".join(r["samples"])}), None)],
        json_with(consistent=list, inconsistent=list))
    ask("rewrite", "writer", lambda r: [(fill(REWRITE, r, 0, r["claims"][0]), None)],
        json_with(preferred=str, dispreferred=str))
    ask("anchor", "writer",
        lambda r: [(fill(ANCHOR, r, 1, r["rewrite"][0]), None) for _ in r["files"][1:]],
        json_with(preferred=str, changes=list))
    for r in records:
        if "reason" not in r:
            r["made"] = assemble(r, args, out.parent)
            r |= gate(r["made"])
    good = [r["made"] for r in records if "reason" not in r]
    bad = [{"record": number, "reason": r["reason"], "reply": r.get("reply"),
            **r.get("made", r["given"])} for number, r in enumerate(records, 1) if "reason" in r]
    write_lines(out, good)
    write_lines(out.parent / "rejected_records.jsonl", bad)
    print(f"{out}: {len(good):,} records; {len(bad):,} in rejected_records.jsonl")
    for step, n in collections.Counter(r["reason"].split(":")[0] for r in bad).most_common():
        example = next(r["reason"] for r in bad if r["reason"].startswith(step))
        print(f"    {n:,} at {step}, for example {example}")
    for name, *cells in summary(good):
        print(f"{name:32}" + "".join(f"{cell:>8}" for cell in cells))


def check_records(records, root, allow_outside):
    """Gives a record a `reason` if an image cannot be read, or is none of the data folder's: images
    are sent to servers, and a record may come from anywhere."""
    for r in tqdm(records, desc="images"):
        try:
            if not isinstance(r["question"], str):
                raise Problem("the prompt is not text")
            for file in r["files"]:
                open_image(os.path.relpath(file, root), root, allow_outside)
        except Problem as e:
            r["reason"] = f"record: {e}"


@functools.cache
def file_hash(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def some_text(text):
    """The text; ValueError if there is none."""
    if not text.strip():
        raise ValueError("empty")
    return text.strip()


def ask_step(args, records, name, role, questions, parse=some_text):
    """Puts the parsed replies to questions(record), a list of (prompt, image file or None), under
    record[name]. A record that lacks one gets a `reason`, and the raw reply if there is one.

    Each reply is kept in the log of that name under the hash of prompt, image and repetition; so
    an image is captioned once, in however many records it occurs.
    """
    requests, wanted, log = {}, [], args.work / f"{name}.jsonl"
    for r in records:
        asked = [] if "reason" in r else questions(r)
        ids = [digest(prompt, file and file_hash(file), asked[:k].count((prompt, file)))
               for k, (prompt, file) in enumerate(asked)]
        requests |= zip(ids, asked)
        wanted.append(ids)
    texts = replies(args, role, requests, log, parse)
    with open(log, encoding="utf-8") as f:
        why = {entry["id"]: entry for entry in map(json.loads, f) if "reason" in entry}
    for r, ids in zip(records, wanted):
        missing = [why[id] for id in ids if texts[id] is None]
        if missing:
            r |= {"reason": f"{name}: {missing[0]['reason']}", "reply": missing[0]["text"]}
        else:
            r[name] = [parse(texts[id]) for id in ids]


def replies(args, role, requests, log, check):
    """{id: text or None} for requests {id: (prompt, image file or None)}, by the role's model."""
    model, server = getattr(args, role), getattr(args, role + "_url")
    if not server:
        return dict(answer_locally(requests, log, model, check, **SAMPLING[role]))

    chats = [(id, functools.partial(chat, prompt, file and str(file), args.max_side))
             for id, (prompt, file) in requests.items()]
    own = role.upper() + "_API_KEY"
    return dict(ask_all(chats, log, base_url=server, model=model, check=check, desc=log.stem,
                        concurrency=args.concurrency, timeout=args.timeout,
                        key_env=own if own in os.environ else "OPENAI_API_KEY", **SAMPLING[role]))


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
    inputs = encode_prompts(processor, fmt, prompts, images)
    inputs = {name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype)
              for name, x in inputs.items()}
    tokens = model.generate(**inputs, generation_config=config)
    texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:],
                                   skip_special_tokens=True)
    return [text.strip() for text in texts]


def answer_locally(requests, log, path, check, temperature, max_tokens, batch=8):
    """As `replies`, from a transformers model. A batch is seeded by its requests, and sampled again
    whole if a killed run left it incomplete, so that the replies come out the same."""
    model, processor = load_model(path, "cuda" if torch.cuda.is_available() else "cpu")
    form, ids = prompt_format(model), list(requests)
    changed = [file.stat().st_mtime_ns for file in sorted(Path(path).glob("*.safetensors"))]
    with reply_log(log, check) as (find, append):
        for i in tqdm(range(0, len(ids), batch), desc=log.stem, unit=" batches"):
            names = [digest(id, path, changed, temperature, max_tokens) for id in ids[i:i + batch]]
            if (None, 0) in map(find, names):
                prompts, files = zip(*(requests[id] for id in ids[i:i + batch]))
                images = [open_image(str(file)) for file in files]
                torch.manual_seed(int(names[0], 16) % 2**63)
                out = generate_batch(model, processor, form, prompts, images, max_tokens,
                                     temperature=temperature)
                for id, name, text in zip(ids[i:], names, out):
                    if find(name) == (None, 0):
                        append({"id": id, "request": name, "model": path, "text": text})
            yield from ((id, find(name)[0]) for id, name in zip(ids[i:], names))


def json_with(**kinds):
    """A function that finds the JSON object in a reply, whose fields are of these types and not
    empty; it raises ValueError if the reply is malformed."""
    def parse(text):
        text = text.rpartition("</think>")[2]  # reasoning models think aloud first
        try:
            found = json.loads(text[text.index("{"):text.rindex("}") + 1])
            json.dumps(found, ensure_ascii=False).encode()  # half an emoji fits in no file
        except (ValueError, RecursionError):
            raise ValueError("no JSON object") from None
        for key, kind in kinds.items():
            if not isinstance(found.get(key), kind) or not str(found[key]).strip(" []"):
                raise ValueError(f"{key!r} is missing, empty or not a {kind.__name__}")
        return found
    return parse


def fill(template, r, image, values):
    """The prompt with the record's question, the caption of image 0 or 1, and the values."""
    values = {**values, "question": r["question"], "caption": r["captions"][image]}
    return string.Template(template).substitute({
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()})


def assemble(r, args, folder):
    """The finished record: what training reads, and where it comes from."""
    made = {**r["given"], "prompt": r["question"], "captions": r["captions"],
            "claims": r["claims"][0], "prompts_version": VERSION,
            "models": {role: getattr(args, role) for role in SAMPLING},
            "chosen": r["rewrite"][0]["preferred"].strip(),
            "rejected": r["rewrite"][0]["dispreferred"].strip()}
    for key, file in zip(("image", "contrast_image"), r["files"]):
        made[key] = os.path.relpath(file, folder)
    for anchor in r["anchor"]:
        made["contrast_chosen"] = anchor["preferred"].strip()
        made["changes"] = anchor["changes"]
    return made


def write_lines(path, records):
    """A JSONL file that is there whole or not at all."""
    with open(f"{path}.tmp", "w", encoding="utf-8", errors="replace") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    os.replace(f"{path}.tmp", path)


# --- gates and report --------------------------------------------------------------------------


def words(text):
    return re.findall(r"[\w'-]+", text.lower())


def gate(record, max_ratio=2):
    """{"reason": ...} if a record is not fit for training, else {}."""
    for other in ("rejected", "contrast_chosen"):
        a, b = words(record["chosen"]), words(record.get(other, ""))
        if a == b:
            return {"reason": f"gate: chosen and {other} are the same"}
        if other in record and max(len(a), len(b)) > max_ratio * min(len(a), len(b)):
            return {"reason": f"gate: chosen has {len(a)} words, {other} {len(b)}"}
    return {}


def overlap(a, b):
    """Share of words in common, 2 |a & b| / (|a| + |b|), repeats counted."""
    a, b = collections.Counter(words(a)), collections.Counter(words(b))
    return 2 * (a & b).total() / max(1, a.total() + b.total())


def figures(record):
    """{what: number} of a record, as far as it has the fields."""
    chosen = record["chosen"]
    found = {"chosen: words": len(words(chosen))}
    for other in ("rejected", "contrast_chosen"):
        if other in record:
            ratio = len(words(record[other])) / max(1, found["chosen: words"])
            found |= {f"{other}: length ratio": ratio,
                      f"{other}: word overlap": overlap(chosen, record[other])}
    if "changes" in record:
        found["contradictions"] = len(record["changes"])
    if record.get("similarity") is not None:
        found["similarity of images"] = record["similarity"]
    return found


def summary(records):
    """Rows of text (what, min, 5 %, median, 95 %, max) over the records' figures."""
    columns = collections.defaultdict(list)
    for r in records:
        for name, value in figures(r).items():
            columns[name].append(value)
    rows = [("", "min", "5 %", "median", "95 %", "max")]
    for name, values in columns.items():
        values.sort()
        at = [values[round(q * (len(values) - 1))] for q in (0, 0.05, 0.5, 0.95, 1)]
        rows.append((name, *(f"{value:.3g}" for value in at)))
    return rows


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>$title</title><style>
body {font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1240px; color: #222}
td {padding: 1px 16px 1px 0; text-align: right} td:first-child {text-align: left}
article {border-top: 2px solid #ddd; margin-top: 16px; padding-top: 10px; display: grid;
  gap: 8px 16px; grid-template-columns: repeat(3, 1fr)} header {grid-column: span 3}
img {width: 100%; height: 210px; object-fit: contain; background: #f4f4f4}
h3 {font-size: 12px; margin: 0 0 3px; color: #666; font-weight: 600}
.text {padding: 6px 12px 10px; border-radius: 6px} mark {border-radius: 3px}
.chosen {background: #eff8ef} .chosen mark {background: #b4e3b4}
.rejected {background: #fdefef} .rejected mark {background: #f8b8b8}
.contrast_chosen {background: #eff3fc} .contrast_chosen mark {background: #bccff8}
</style><h1>$title</h1><table>$rows</table>$records</html>
"""


def report(args):
    """`python respond.py report`: one self-contained page on which a person can scan records."""
    root, records = image_records(args.data)
    for number, r in enumerate(records, 1):
        if not all(isinstance(r.get(key), str) for key in ("prompt", "chosen")):
            raise Problem(f"{args.data}: line {number}: no prompt and chosen; is it a prefs.jsonl?")
    shown = list(enumerate(records, 1))[::max(1, -(-len(records) // args.limit))]
    rows = ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
            for row in summary(records))
    articles = (article(number, r, root) for number, r in tqdm(shown, desc="report"))
    Path(args.out).write_text(string.Template(PAGE).substitute(
        title=f"{html.escape(Path(args.data).name)}: {len(shown):,} of {len(records):,} records",
        rows="".join(rows), records="".join(articles)), encoding="utf-8")
    print(f"{args.out}: {len(shown):,} of {len(records):,} records")


def article(number, r, root):
    """One record as HTML: prompt, both images, figures, and the responses with differing words."""
    cells = [f"<header>{number} &nbsp; <b>{html.escape(r['prompt'])}</b></header>"]
    for key in ("image", "contrast_image"):
        if key in r:
            url = image_url(open_image(r[key], root), 480)
            cells.append(f'<div><h3>{key}</h3><img src="{url}" alt=""></div>')
    facts = [" → ".join(f"“{text}”" for text in change.values())
             if isinstance(change, dict) else str(change) for change in r.get("changes", [])]
    facts += [f"{name} {value:.3g}" for name, value in figures(r).items()]
    facts += [f"{key}: {r[key]}" for key in ("contrast_kind", "prompts_version") if key in r]
    cells.append("<small>" + "<br>".join(map(html.escape, facts)) + "</small>")
    for key, other in (("chosen", "rejected"), ("rejected", "chosen"),
                       ("contrast_chosen", "chosen")):
        if key in r:
            text = marked(r[key], r.get(other, r[key]))
            cells.append(f'<div class="text {key}"><h3>{key}</h3>{text}</div>')
    return "<article>" + "".join(cells) + "</article>\n"


def marked(text, other):
    """The text as HTML, with the words marked that the other text does not have there."""
    a, b = text.split(), other.split()
    moves = difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    parts = [(tag, html.escape(" ".join(a[i:j]))) for tag, i, j, _, _ in moves if i < j]
    return " ".join(part if tag == "equal" else f"<mark>{part}</mark>" for tag, part in parts)


# --- command line ------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("build", help="write preference records from images and captions")
    p.add_argument("data", help="records with image, contrast_image and perhaps prompt (.jsonl)")
    p.add_argument("--out", required=True, help="the preference records (.jsonl); replies are kept "
                   "in the folder OUT.work, bad records in rejected_records.jsonl beside it")
    for role, task in (("captioner", "describes the images"), ("policy", "the model to be trained"),
                       ("writer", "sorts claims and writes responses")):
        p.add_argument(f"--{role}", required=True, metavar="MODEL", help=task)
        p.add_argument(f"--{role}-url", required=role == "writer", metavar="URL",
                       help="its server, http://host:port/v1" +
                       " (default: MODEL is a local transformers model)" * (role != "writer"))
    p.add_argument("--samples", type=int, default=4, help="answers of the policy (default 4)")
    p.add_argument("--max-side", type=int, default=1024, help="px of images sent (default 1024)")
    p.add_argument("--concurrency", type=int, default=8, help="requests at a time (default 8)")
    p.add_argument("--allow-outside", action="store_true",
                   help="send images that are not in the data file's folder, too")
    p.add_argument("--timeout", type=float, default=120, help="seconds a request (default 120)")
    p.set_defaults(run=build)
    p = commands.add_parser("report", help="look at records in a browser")
    p.add_argument("data", help="prefs.jsonl")
    p.add_argument("--out", required=True, help="the page (.html)")
    p.add_argument("--limit", type=int, default=100, help="records shown (default 100)")
    p.set_defaults(run=report)
    args = parser.parse_args(argv)
    command(lambda: args.run(args))


if __name__ == "__main__":
    main()
