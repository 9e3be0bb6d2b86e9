"""Responses anchored on captions: preference records out of pairs of images.

    python -m construct.responses pairs.jsonl --out prefs.jsonl \\
        --captioner M --policy M --writer M --writer-url http://host:8000/v1

It takes records with an image, a contrast image (`python -m construct.contrast` makes them) and
perhaps a prompt. A vision model captions both images, the model to be trained answers the prompt
several times, and a writer sorts the claims in its answers by the caption and writes chosen,
rejected and, anchored on the other caption, contrast_chosen. The writer is a server (--writer-url),
captioner and policy are servers or local transformers models. Keys are read from the environment
alone: CAPTIONER_API_KEY, POLICY_API_KEY, WRITER_API_KEY, or OPENAI_API_KEY for all. Every reply is
on disk before it is used: the same command goes on where a killed one stopped.

Departures from the paper: it names the steps but publishes neither its prompts nor sampling nor
filters. The ones here are ours. The prompts stand in prompts/, one text a step (Jinja templates
that see the record's fields); records carry their version.
"""

import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from construct.review import figures, spread, template, words
from data import RESPONSES
from support.chat import ReplyLog, ask_all, digest
from support.cli import NEEDED, UserError, check_numbers, parse, run_command
from support.files import write_lines
from support.images import open_image, open_images
from support.records import DataOptions, Records, need_other, with_files
from vlm.generate import generate
from vlm.load import fingerprint, load_model
from vlm.prompts import prompts_for

VERSION = 2  # of the texts in prompts/
SAMPLING = {
    "captioner": {"temperature": 0.2, "max_tokens": 1024},
    "policy": {"temperature": 1.0, "max_tokens": 512},
    "writer": {"temperature": 0.7, "max_tokens": 4096},
}
LONGER = 2  # a gate: how many times as long as the other a response may be, in words


@dataclass
class Draft:
    """A record in the making."""

    record: dict  # as it will be written
    images: list  # (file, hash): of m, then of m'
    reason: str | None = None  # why it is set aside
    reply: str | None = None  # the reply that was of no use


def build(args):
    """The command: the five steps, the gates, and the files of good and bad records."""
    check_numbers(args, above_0=("samples", "max_side", "concurrency", "timeout"))
    records = Records(args.data, args.image_root, args.fields, needed=("image",))
    need_other(args.out, records)
    Path(f"{args.out}.work").mkdir(parents=True, exist_ok=True)
    drafts = [take_in(records, i, args) for i in tqdm(range(len(records)), desc="images")]
    # 1. The captioner describes each image.
    ask(drafts, "captions", "captioner", args)
    # 2. The model to be trained answers the prompt for m, several times.
    ask(drafts, "samples", "policy", args)
    # 3. The writer sorts the claims in the samples: consistent with the caption of m, or not.
    ask(drafts, "claims", "writer", args, consistent=list, inconsistent=list)
    # 4. It makes of them a preferred and a dispreferred response in one style.
    ask(drafts, "rewrite", "writer", args, chosen=str, rejected=str)
    # 5. It answers the same prompt for m', from the caption of m'.
    with_contrast = [draft for draft in drafts if len(draft.images) == 2]
    ask(with_contrast, "anchor", "writer", args, contrast_chosen=str, changes=list)

    good = []
    bad = []
    for number, draft in enumerate(drafts, 1):
        if draft.reason is None:
            draft.reason = gate(draft.record)
        if draft.reason is None:
            good.append(draft.record)
        else:
            why = {"record": number, "reason": draft.reason, "reply": draft.reply}
            bad.append({**draft.record, **why})
    write_lines(args.out, good)
    rejected = Path(args.out).with_suffix(".rejected.jsonl")
    write_lines(rejected, bad)
    print(f"{args.out}: {len(good):,} records; {len(bad):,} in {rejected}")
    for reason, count in Counter(record["reason"] for record in bad).most_common(9):
        print(f"    {count:,} {reason}")
    for name, values in figures(good).items():
        print(f"{name:32} (min, 5 %, median, 95 %, max)", *spread(values))


def take_in(records, i, args):
    """The draft of record i. It is set aside if it cannot be read, or if an image is none of the
    data folder's: images are sent to servers, and a record may come from anywhere."""
    made = {"prompts_version": VERSION, "models": {role: getattr(args, role) for role in SAMPLING}}
    images = []
    try:
        fields, files = with_files(records, i, f"{args.out}.work/given", args.allow_outside)
        for name, file in files.items():
            open_image(str(file))
            images.append((str(file), hashlib.sha256(file.read_bytes()).hexdigest()))
            fields[name] = os.path.relpath(file, Path(args.out).parent)
    except UserError as error:
        return Draft(made, images, f"record: {error}")
    prompt = fields.get("prompt") or template("question.txt").render()
    return Draft({**fields, **made, "prompt": prompt}, images)


# --- asking ---------------------------------------------------------------------------------------


def usable_text(text):
    """A reply without what a reasoning model thought aloud before it; ValueError when empty."""
    text = text.rpartition("</think>")[2].strip()
    if not text:
        raise ValueError("empty")
    return text


def json_fields(text, **kinds):
    """The JSON object in a reply: its fields, which must be of these types and not empty.

    Raises ValueError if the reply is malformed."""
    text = usable_text(text)
    try:
        found = json.loads(text[text.index("{") : text.rindex("}") + 1])
        json.dumps(found, ensure_ascii=False).encode()  # half an emoji fits in no file
    except (ValueError, RecursionError):
        raise ValueError("no JSON object") from None
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind) or not str(found[key]).strip(" []"):
            raise ValueError(f"{key!r} is missing, empty or not a {kind.__name__}")
    return {key: found[key] for key in kinds}


def questions_of(draft, step, args):
    """[(id, text, file of the image or None)] as `ask_all` takes them. The id has the image's hash:
    so an image is captioned once, in however many records it occurs."""
    text = template(f"{step}.txt").render(draft.record)
    if step == "captions":
        asked = [(image, 0) for image in draft.images]
    elif step == "samples":
        asked = [(draft.images[0], repetition) for repetition in range(args.samples)]
    else:
        asked = [((None, None), 0)]
    return [(digest(text, image, number), text, image[0]) for image, number in asked]


def ask(drafts, step, role, args, **kinds):
    """A step: what is asked of each draft, the replies in its record, or why it is set aside.

    kinds: {field: type} of the JSON object that is the reply; without them it is a text. Replies
    are kept in the step's log.
    """
    drafts = [draft for draft in drafts if draft.reason is None]
    questions = [questions_of(draft, step, args) for draft in drafts]
    requests = list(dict.fromkeys(itertools.chain(*questions)))
    log = f"{args.out}.work/{step}.jsonl"
    parse = functools.partial(json_fields, **kinds) if kinds else usable_text
    model = getattr(args, role)
    url = getattr(args, f"{role}_url")
    if url:
        found = ask_all(
            requests,
            log,
            base_url=url,
            model=model,
            concurrency=args.concurrency,
            timeout=args.timeout,
            check=parse,
            desc=step,
            max_side=args.max_side,
            key_env=f"{role.upper()}_API_KEY",
            **SAMPLING[role],
        )
    else:
        found = answer_locally(requests, log, model, **SAMPLING[role])
    entries = dict(found)
    for draft, own in zip(drafts, questions):
        replies = [entries[id] for id, _, _ in own]
        failed = [entry for entry in replies if "reason" in entry]
        if failed:
            draft.reason = f"{step}: {failed[0]['reason']}"
            draft.reply = failed[0]["text"]
        elif kinds:
            draft.record |= parse(replies[0]["text"])
        else:
            draft.record[step] = [parse(entry["text"]) for entry in replies]


def answer_locally(requests, log, path, temperature, max_tokens, batch=8):
    """(id, entry of the log) as `ask_all`, from a transformers model. A batch is seeded by its
    requests, and sampled again whole if a killed run left it incomplete: the same texts."""
    model, processor = load_model(path)
    prompts = prompts_for(model.config, processor)
    weights = fingerprint(path)
    with ReplyLog(log) as kept:
        for i in tqdm(range(0, len(requests), batch), desc=Path(log).stem, unit=" batches"):
            ids, asked, files = zip(*requests[i : i + batch])
            names = [digest(id, weights, temperature, max_tokens) for id in ids]
            if not all(kept.entries[name] for name in names):
                torch.manual_seed(int(names[0], 16) % 2**63)
                images = open_images(files)
                texts = generate(model, prompts, asked, images, max_tokens, temperature=temperature)
                for id, name, text in zip(ids, names, texts):
                    entry = {"id": id, "request": name, "model": path, "text": text}
                    try:
                        usable_text(text)
                    except ValueError as error:
                        entry["reason"] = f"malformed reply: {error}"
                    kept.append(entry)
            for id, name in zip(ids, names):
                yield id, kept.entries[name][-1]


def gate(record):
    """Why a record is not fit for training, or None."""
    chosen = words(record["chosen"])
    for name in RESPONSES[1:]:
        if name not in record:
            continue
        other = words(record[name])
        if chosen == other:
            return f"gate: chosen and {name} are the same"
        shorter, longer = sorted([len(chosen), len(other)])
        if longer > LONGER * shorter:
            return f"gate: chosen has {len(chosen)} words, {name} {len(other)}"
    return None


@dataclass
class Options(DataOptions):
    """What is typed.

    out                 the records (.jsonl); all replies are kept in OUT.work
    captioner           describes the images; a local model, if no server is given
    captioner_url       its server
    policy              the model to be trained, likewise
    policy_url          its server
    writer              sorts claims and writes responses, on a server
    writer_url          its server
    samples             answers of the policy
    max_side            px of images sent
    concurrency         requests at a time
    timeout             seconds a request
    """

    out: str = NEEDED
    captioner: str = NEEDED
    captioner_url: str = None
    policy: str = NEEDED
    policy_url: str = None
    writer: str = NEEDED
    writer_url: str = NEEDED
    samples: int = 4
    max_side: int = 1024
    concurrency: int = 8
    timeout: float = 120.0


def main(argv=None):
    run_command(build, parse(Options, __doc__, argv))


if __name__ == "__main__":
    main()
