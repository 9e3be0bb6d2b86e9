"""Preference data: from a record in a file to token ids and pixels, and pairs of images.

    python data.py check prefs.jsonl [--model M]       every bad line, counts, a rendered prompt

Images are paired here, too: a crop of the image itself, or CLIP's nearest neighbour. The command
that writes pairs for a whole folder is `python -m construct.contrast`.

A record is one JSON object a line; image paths are relative to the file:

    {"image": "img/1.jpg", "prompt": "...", "chosen": "...", "rejected": "...",
     "contrast_image": "img/9.jpg", "contrast_chosen": "..."}

`rejected` is read by dpo, mdpo and symmpo; `contrast_image` by copo, mdpo and symmpo (when absent,
copo and mdpo draw a crop of the image, once, from a seed); `contrast_chosen` by symmpo. Published
layouts are read as well (support/formats.py), and any names through --fields.

Departures from the published code: a record that is too long is refused, never cut; mDPO's crop is
drawn once for each record, not again in every forward pass.
"""

import hashlib
import math
import random
import shlex
import statistics
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from support.cli import Unreadable, UserError, check_numbers, kind_of, parse, places, run_command
from support.formats import IMAGES, RESPONSES
from support.images import crop, open_image, pixel_hash
from support.records import Records
from support.reference import key_of
from support.signals import outlive_a_signal
from symmpo import NONE, OBJECTIVES
from vlm.load import fingerprint, load_encoder, load_processor
from vlm.logprobs import Row
from vlm.prompts import prompts_for

MOST_BAD = 0.1  # share of the records that --skip-bad leaves out before it asks for a look

# --- rows ----------------------------------------------------------------------------------------


class MissingField(UserError):
    """The record is whole, but the objective needs more than it has."""


def missing_fields(record, cells):
    """The fields that an objective's cells read and the record lacks. A contrast image may be
    absent, a crop is drawn then (copo, mdpo); not beside a response written for it (symmpo)."""
    needed = {RESPONSES[response] for _, response in cells}
    if "contrast_chosen" in needed:
        needed.add("contrast_image")
    return sorted(needed - record.keys())


def usable_by(record):
    """The names of the objectives that a record can serve."""
    return [name for name, o in OBJECTIVES.items() if not missing_fields(record, o.cells)]


def build_rows(record, prompts, cells, seed=0, max_length=2048, allow_outside=True):
    """A record as the model sees it: a `Row` for each image among the objective's cells.

    seed: of a missing contrast image. max_length: tokens of the longest sequence. Raises UserError
    with file and line for a missing field, a bad image, or too many tokens.
    """
    source = record["source"]
    missing = missing_fields(record, cells)
    if missing:
        serves = ", ".join(usable_by(record))
        raise MissingField(
            f"{source}: the objective needs the field {', '.join(missing)}; this record can serve "
            f"{serves} (--objective)"
        )
    rows = []
    for image_number in sorted({image for image, _ in cells}):
        own = [(image, response) for image, response in cells if image == image_number]
        images = None
        if image_number != NONE:
            images = [image_of(record, IMAGES[image_number], seed, allow_outside)]
        texts = [record[RESPONSES[response]] for _, response in own]
        try:
            inputs = prompts.encode([record["prompt"]], images)
            responses = [torch.tensor(prompts.encode_response(text)) for text in texts]
        except Exception as error:  # processors, tokenizers and templates raise anything
            raise UserError(f"{source}: {type(error).__name__}: {error}") from error
        row = Row(inputs, responses, own, source=source)
        if row.longest() > max_length:
            raise UserError(
                f"{source}: {row.longest()} tokens, --max-length is {max_length}: raise it, or "
                "leave the record out with --skip-bad"
            )
        rows.append(row)
    return rows


def image_of(record, field, seed, allow_outside):
    """The record's image or contrast image. A missing contrast image is a crop of the image, drawn
    once: from the seed and the record's place in the file."""
    try:
        image = open_image(record.get(field, record["image"]), record["root"], allow_outside)
    except UserError as error:
        raise type(error)(f"{record['source']}: {error}") from error
    if field not in record:
        place = record["source"].rpartition(":")[2]
        image = crop(image, random.Random(f"{seed} {place}"))
    return image


# --- micro-batches ------------------------------------------------------------------------------


@dataclass
class Example:
    number: int  # of the record in its file, from 0
    rows: list = field(default_factory=list)
    key: bytes = b""  # of the reference's log-probs in the cache
    error: UserError | None = None  # why the record is of no use

    def response_tokens(self):
        return sum(row.tokens() - len(row.prefix()) for row in self.rows)


class Examples(torch.utils.data.Dataset):
    """A file's records, tokenised, with their pixels. Read ahead by worker processes."""

    def __init__(self, path, prompts, options):
        self.path = path
        self.records = Records(path, options.image_root, options.fields)
        self.prompts = prompts
        self.options = options
        self.tried = self.bad = 0  # records
        self.cells = OBJECTIVES[options.objective].cells

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        options = self.options
        limits = options.seed, options.max_length, options.allow_outside
        try:
            record = self.records[i]
            rows = build_rows(record, self.prompts, self.cells, *limits)
            return Example(i, rows, key_of(rows))
        except UserError as error:
            return Example(i, error=error)

    def usable(self, examples, left_out):
        """Those without an error. The others end the run, or with --skip-bad go to `left_out`; a
        field that the objective needs, or a disk that cannot be read, ends it either way, since the
        record is not bad."""
        check = f"`python data.py check {shlex.quote(str(self.path))}`"
        for example in examples:
            if isinstance(example.error, MissingField | Unreadable):
                raise example.error
            if example.error and not self.options.skip_bad:
                raise UserError(
                    f"{example.error}\n--skip-bad goes on without such records; {check} lists "
                    "them all"
                )
            if example.error:
                left_out[str(example.error)] = example.number
                self.bad += 1
        self.tried += len(examples)
        if self.tried >= 20 and self.bad > MOST_BAD * self.tried:
            raise UserError(
                f"{self.bad} of {self.tried} records of {self.path} are bad, too many for "
                f"--skip-bad: {check} shows why; train on a file without them"
            )
        return [example for example in examples if not example.error]

    def of_step(self, step):
        """Record numbers of one optimiser step: a new seeded order each epoch, its last batch
        short."""
        size = self.options.batch_size
        epoch, place = divmod(step, math.ceil(len(self) / size))
        generator = torch.Generator().manual_seed(self.options.seed * 1000 + epoch)
        order = torch.randperm(len(self), generator=generator)
        return order[place * size : (place + 1) * size].tolist()

    def micro_batches(self, first_step):
        """Record numbers from a step on, for one forward pass after the other."""
        size = self.options.micro_batch
        for step in range(first_step, self.options.steps):
            numbers = self.of_step(step)
            for k in range(0, len(numbers), size):
                yield numbers[k : k + size]


def held_out(path, prompts, options, left_out):
    """(examples, samples) of a held-out file, read now and kept: a bad record is named before the
    first step. The samples, (prompt, image), are answered now and then for people to see."""
    if not path:
        return [], []
    every = Examples(path, prompts, options)
    examples = every.usable(list(every), left_out)
    samples = []
    for example in examples[:2]:
        record = every.records[example.number]
        image = image_of(record, "image", options.seed, options.allow_outside)
        samples.append((record["prompt"], image))
    return examples, samples


def read_ahead(examples, first_step):
    """An iterator over micro-batches, lists of examples."""
    options = examples.options
    loader = torch.utils.data.DataLoader(
        examples,
        batch_sampler=examples.micro_batches(first_step),
        collate_fn=list,
        pin_memory=options.device != "cpu",  # by a thread, which takes over from the workers
        num_workers=options.workers,
        multiprocessing_context="fork" if options.workers else None,
        worker_init_fn=outlive_a_signal,
    )
    return iter(loader)


# --- pairs of images: `crop` is above; CLIP's nearest neighbours --------------------------------


def embed(files, encoder, cache, batch=64):
    """(N, d) unit image embeddings of CLIP, SigLIP, or a LLaVA (mean over its image tokens), and a
    hash of each image's pixels. A batch is kept in the folder `cache` under a hash of encoder and
    pixels, so that a killed run goes on where it stopped."""
    model, preprocess = load_encoder(encoder)
    weights = fingerprint(encoder)
    vectors = []
    pixels = []
    Path(cache).mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(0, len(files), batch), desc="embedding", unit=" batches"):
        images = [open_image(str(file)) for file in files[i : i + batch]]
        hashes = [pixel_hash(image) for image in images]
        key = hashlib.sha256(f"{weights} {preprocess} {hashes}".encode()).hexdigest()
        kept = Path(cache, f"{key}.pt")
        try:
            found = torch.load(kept, weights_only=True)
        except Exception:  # it is not there, or torn
            inputs = preprocess(images=images, return_tensors="pt").to(model.device)
            features = model.get_image_features(**inputs).pooler_output
            means = torch.stack([x.reshape(-1, x.shape[-1]).mean(0) for x in features])
            found = torch.nn.functional.normalize(means).cpu()
            torch.save(found, kept)
        vectors.append(found)
        pixels += hashes
    return torch.cat(vectors), pixels


def nearest(vectors, groups, max_sim=1.0, block=256):
    """Each row's nearest other row, exactly: (indices, cosines), cosine -inf where there is none.

    vectors: (N, d) of unit length. groups: integer tensors (N,); rows that share one are no
    neighbours, nor are rows with a cosine above max_sim. Memory: block x N cosines.
    """
    index = torch.zeros(len(vectors), dtype=int)
    best = torch.zeros(len(vectors))
    for i in tqdm(range(0, len(vectors), block), desc="neighbours", unit=" blocks"):
        here = slice(i, i + block)
        cosine = vectors[here] @ vectors.T
        cosine[cosine > max_sim] = -torch.inf
        for group in groups:
            cosine[group[here, None] == group] = -torch.inf
        best[here], index[here] = cosine.max(dim=1)
    return index, best


# --- python data.py check ------------------------------------------------------------------------


class Pairs:
    """Counts what nobody reads, and pairs from which nothing, or nothing clear, can be learned."""

    def __init__(self):
        self.seen = set()  # hashes of (image and prompt, chosen, rejected)
        self.found = defaultdict(list)  # what: sources of the records

    def add(self, record):
        chosen = record["chosen"]
        rejected = record.get("rejected")
        found = [
            f"prompt, {what} taken off (the model's own is put around it)"
            for what in record["stripped"]
        ]
        found += [
            f"field {name}, which is not read (--fields can name it)" for name in record["unread"]
        ]
        if chosen == rejected:
            found.append("equal pairs, chosen = rejected")
        if chosen == record.get("contrast_chosen"):
            found.append("equal pairs, chosen = contrast_chosen")
        question = f"{record['image']!r} {record['prompt']!r}"
        pair = hash((question, chosen, rejected))
        if pair in self.seen:
            found.append("duplicates of an earlier record")
        elif hash((question, rejected, chosen)) in self.seen:
            found.append("contradictory pairs, the other way round in an earlier record")
        self.seen.add(pair)
        for what in found:
            self.found[what].append(record["source"])

    def lines(self):
        return [f"{what}: {len(at):,}, at {places(at)}" for what, at in self.found.items()]


def look_at_pairs(records):
    """What a run says of its pairs before it starts, from the first 2,000 records."""
    pairs = Pairs()
    for i in range(min(2_000, len(records))):
        try:
            pairs.add(records[i])
        except UserError:
            continue  # training names it
    return [f"note        {line}" for line in pairs.lines()]


class Survey:
    """What `check` finds out about the records, one after the other."""

    def __init__(self, prompts, args):
        self.prompts = prompts
        self.args = args
        self.pairs = Pairs()
        self.faults = defaultdict(list)  # kind of message, or --all's source: [(source, message)]
        self.usable_by = Counter()
        self.lengths = []  # in tokens
        self.first = []  # rows of the record to show
        self.longest = []  # and of the longest
        self.most_tokens = 0

    def add(self, i, record):
        able = usable_by(record)
        for name in IMAGES:
            if name in record:
                image = image_of(record, name, 0, self.args.allow_outside)
                if image.getcolors(maxcolors=1):  # None where there are more
                    self.pairs.found[f"{name} of one colour"].append(record["source"])
        if self.prompts:
            self.add_rows(i, record, able)
        self.usable_by.update(able)
        self.pairs.add(record)

    def add_rows(self, i, record, able):
        most = max((OBJECTIVES[name].cells for name in able), key=len)
        rows = build_rows(record, self.prompts, most, max_length=math.inf)
        lengths = [row.longest() for row in rows]
        self.lengths += lengths
        if max(lengths) > self.most_tokens:
            self.most_tokens = max(lengths)
            self.longest = rows
        if max(lengths) > self.args.max_length:
            raise UserError(f"{max(lengths)} tokens, more than --max-length {self.args.max_length}")
        if not self.first and self.args.show in (None, i):
            self.first = rows

    def bad(self):
        return sum(len(found) for found in self.faults.values())

    def report(self, total):
        for found in self.faults.values():
            at = places([source for source, _ in found])
            print(f"bad: {len(found):,} records, {at}: {found[0][1]}")
        counts = ", ".join(f"{name} {self.usable_by[name]:,}" for name in OBJECTIVES)
        print(f"{total:,} records, {self.bad():,} bad; usable by {counts}")
        for line in self.pairs.lines():
            print(line)
        if self.lengths:
            low = min(self.lengths)
            middle = statistics.median_low(self.lengths)
            print(f"length, tokens: min {low}, median {middle}, max {self.most_tokens}")
        if self.most_tokens > self.args.max_length:
            print(f"--max-length {self.most_tokens} would take all records")


def check(args):
    """`python data.py check`: what a file holds; returns how many of its records are bad."""
    check_numbers(args, above_0=("max_length",))
    records = Records(args.data, args.image_root, args.fields)
    prompts = None
    if args.model:
        config, processor = load_processor(args.model)
        prompts = prompts_for(config, processor, args.prompt_format)
    elif args.show is not None:
        raise UserError("--show needs --model: a record is shown as that model sees it")
    survey = Survey(prompts, args)
    for i in tqdm(range(len(records)), desc="checking", unit=" records", disable=None):
        source = records.source(i)
        try:
            survey.add(i, records[i])
        except UserError as error:
            message = str(error).removeprefix(f"{source}: ")
            kind = source if args.all else kind_of(message)
            survey.faults[kind].append((source, message))
    survey.report(len(records))
    shown = survey.first
    if survey.longest is not survey.first:
        shown = shown + survey.longest
    for row in shown:
        print(f"{row.source}, {row.longest()} tokens")
        print(prompts.describe(row))
    if args.show is not None and not survey.first:
        print(f"--show {args.show}: there is no such record, or it is bad")
    if args.page:
        from construct.review import review

        args.out = args.page
        args.limit = 100
        review(args)
    return survey.bad()


@dataclass
class Options:
    """What is typed.

    command             what to do
    data                record file, folder of them, or quoted glob (docs/data.md)
    image_root          folder where image paths start, if not the data file's
    fields              names in the file: prompt=instruction,chosen=good,image=img_path
    allow_outside       permit image paths out of that folder
    model               also render and tokenise for this model (folder or hub name)
    prompt_format       auto: vicuna for LLaVA-1.5
    max_length          tokens
    show                show this record as the model sees it, counted from 0
    all                 every bad record, not each kind once
    page                also write a page (.html) with images and responses side by side
    """

    command: Literal["check"]
    data: str
    image_root: str = None
    fields: str = None
    allow_outside: bool = False
    model: str = None
    prompt_format: Literal["auto", "vicuna", "chat"] = "auto"
    max_length: int = 2048
    show: int = None
    all: bool = False
    page: str = None


def main(argv=None):
    bad = run_command(check, parse(Options, __doc__, argv))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
