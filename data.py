"""Preference data: from a record in a file to token ids and pixels, and pairs of images.

    python data.py check prefs.jsonl [--model M]       every bad line, counts, a rendered prompt

Images are paired here, too: a crop of the image itself, or CLIP's nearest neighbour. The command
that writes pairs for a whole folder is `python -m construct.contrast`.

A record is one JSON object a line; image paths are relative to the file:

    {"image": "img/1.jpg", "prompt": "...", "chosen": "...", "rejected": "...",
     "contrast_image": "img/9.jpg", "contrast_chosen": "..."}

`rejected` is read by dpo, mdpo and symmpo; `contrast_image` by copo, mdpo and symmpo (when absent,
copo and mdpo draw a crop of the image, once, from a seed); `contrast_chosen` by symmpo. Three
published shapes are read as well: see `normalise`.

Departures from the published code: a record that is too long is refused, never cut; mDPO's crop is
drawn once for each record, not again in every forward pass.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
from array import array
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

from support import processes
from support.cli import UserError, run_command, within
from support.images import crop, open_image
from support.reference import key_of
from symmpo import NONE, OBJECTIVES
from vlm.logprobs import Row

IMAGES = ("image", "contrast_image")  # the fields behind the table's images m and m'
RESPONSES = ("chosen", "rejected", "contrast_chosen")  # behind its responses y_w, y_l and y'_w

# --- records -------------------------------------------------------------------------------------


class JsonLines:
    """The objects of a JSONL file by number. Memory: 16 bytes each, however long the lines."""

    KIND = "JSON"

    def __init__(self, path):
        self.path, self.starts, self.numbers = path, array("q"), array("q")
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    self.starts.append(file.tell() - len(line))
                    self.numbers.append(number)

    def __len__(self):
        return len(self.starts)

    def source(self, i):
        return f"{self.path}:{self.numbers[i]}"

    def read(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            return json.loads(file.readline())


class Parquet:
    """The rows of a parquet file by number. Memory: one row group, the one read last."""

    KIND = "parquet"

    def __init__(self, path):
        import pyarrow.parquet

        self.path, self.file = path, pyarrow.parquet.ParquetFile(path, memory_map=True)
        groups = range(self.file.num_row_groups)
        sizes = [self.file.metadata.row_group(g).num_rows for g in groups]
        self.starts = [0, *accumulate(sizes)]  # first row of each group, and the end
        self.loaded = None  # (number, table) of a group

    def __len__(self):
        return self.starts[-1]

    def source(self, i):
        return f"{self.path}: row {i + 1}"

    def read(self, i):
        group = bisect_right(self.starts, i) - 1
        if self.loaded is None or self.loaded[0] != group:
            self.loaded = group, self.file.read_row_group(group)
        return self.loaded[1].slice(i - self.starts[group], 1).to_pylist()[0]


class Records:
    """A file's records in the form above, each with its `source` ("file:line") and its `root`, the
    folder where image paths start. A broken line is an error when it is asked for."""

    def __init__(self, path):
        self.root = Path(path).parent
        try:
            self.file = Parquet(path) if Path(path).suffix == ".parquet" else JsonLines(path)
        except Exception as error:  # pyarrow has many kinds
            raise UserError(f"{path}: {error}") from error
        if len(self) == 0:
            raise UserError(f"{path}: the file has no records")

    def __len__(self):
        return len(self.file)

    def __getitem__(self, i):
        raw = self.raw(i)
        source = self.file.source(i)
        try:
            record = normalise(raw)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(
                f"{source}: not a record (`python data.py --help` shows one): {error}"
            ) from error
        return {**record, "source": source, "root": self.root}

    def raw(self, i):
        """Record i as it stands in the file."""
        if not 0 <= i < len(self):
            raise IndexError(i)  # which ends a for loop
        try:
            raw = self.file.read(i)
        except Exception as error:  # JSON, recursion, pyarrow
            raise UserError(
                f"{self.file.source(i)}: not valid {self.file.KIND}: {error}"
            ) from error
        if not isinstance(raw, dict):
            kind = type(raw).__name__
            raise UserError(f"{self.file.source(i)}: not a JSON object but {kind}")
        return raw


def normalise(raw):
    """A record of any known shape in the form above; ValueError, KeyError, ... if it is none."""
    if "resp_1_w" in raw:  # the published SymMPO parquet files
        found = {
            "image": raw["image_1"],
            "contrast_image": raw.get("image_2"),
            "prompt": raw["question"],
            "chosen": raw["resp_1_w"],
            "rejected": raw.get("resp_1_l"),
            "contrast_chosen": raw.get("resp_2_w"),
        }
    elif "text" in raw and "chosen" not in raw:  # RLHF-V: question and answers as JSON in a field
        answers = json_object("text", raw["text"])
        found = {**raw, **answers, "prompt": answers.get("question")}
    elif isinstance(raw.get("chosen"), list):  # TRL's messages; the prompt may stand in chosen, too
        question = raw.get("prompt") or raw["chosen"][:-1]
        if len(question) != 1:
            raise ValueError("the prompt must be one user turn")
        found = {
            "image": the_only_image(raw),
            "prompt": last_message(question),
            "chosen": last_message(raw["chosen"]),
        }
        if raw.get("rejected"):
            found["rejected"] = last_message(raw["rejected"])
    else:  # the form above; RLAIF-V says question for prompt
        found = {"prompt": raw.get("question"), **raw, "image": the_only_image(raw)}

    record = {}
    for name in (*IMAGES, "prompt", *RESPONSES):
        value = found.get(name)
        if value is None and name in ("image", "prompt", "chosen"):
            raise ValueError(f"the field {name} is missing")
        if value is not None:
            record[name] = value if name in IMAGES else clean_text(name, value)
    return record


def json_object(name, text):
    """The object that a field holds as JSON."""
    found = json.loads(text) if isinstance(text, str) else None
    if not isinstance(found, dict):
        raise ValueError(f"the field {name} holds no JSON object")
    return found


def the_only_image(raw):
    """The image of a record that may have a list of them."""
    images = raw.get("image", raw.get("images"))
    if not isinstance(images, list):
        return images
    if len(images) != 1:
        raise ValueError(f"{len(images)} images; there must be one")
    return images[0]


def last_message(messages):
    """The text of the last turn of a conversation; a text is its own."""
    if isinstance(messages, str):
        return messages
    content = messages[-1]["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    return content


def clean_text(name, value):
    """The text without white space around it; ValueError when nothing is left."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the field {name} is empty, or no text: {value!r:.40}")
    return value.encode("utf-8", "replace").decode().strip()  # no unpaired surrogates


def missing_fields(record, cells):
    """The fields that an objective's cells read and the record lacks. A contrast image may be
    absent, a crop is drawn then (copo, mdpo); not beside a response written for it (symmpo)."""
    needed = {RESPONSES[response] for _, response in cells}
    if "contrast_chosen" in needed:
        needed.add("contrast_image")
    return sorted(needed - record.keys())


# --- rows ----------------------------------------------------------------------------------------


def build_rows(record, prompts, cells, seed=0, max_length=2048, allow_outside=True):
    """A record as the model sees it: a `Row` for each image among the objective's cells.

    seed: of a missing contrast image. max_length: tokens of the longest sequence. Raises UserError
    with file and line for a missing field, a bad image, or too many tokens.
    """
    source = record["source"]
    missing = missing_fields(record, cells)
    if missing:
        raise UserError(f"{source}: the objective needs the field {', '.join(missing)}")
    rows = []
    for image_number in sorted({image for image, _ in cells}):
        own = [(image, response) for image, response in cells if image == image_number]
        images = None
        if image_number != NONE:
            images = [image_of(record, IMAGES[image_number], seed, allow_outside)]
        inputs = prompts.encode([record["prompt"]], images)
        texts = [record[RESPONSES[response]] for _, response in own]
        responses = [torch.tensor(prompts.encode_response(text)) for text in texts]
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
        raise UserError(f"{record['source']}: {error}") from error
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


class Examples(torch.utils.data.Dataset):
    """A file's records, tokenised, with their pixels. Read ahead by worker processes."""

    def __init__(self, path, prompts, options):
        self.records, self.prompts, self.options = Records(path), prompts, options
        self.cells = OBJECTIVES[options.objective].cells

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        options = self.options
        try:
            rows = build_rows(
                self.records[i],
                self.prompts,
                self.cells,
                options.seed,
                options.max_length,
                options.allow_outside,
            )
            return Example(i, rows, key_of(rows))
        except UserError as error:
            return Example(i, error=error)

    def usable(self, examples, left_out):
        """Those without an error. The others end the run, or with --skip-bad go to `left_out`."""
        for example in examples:
            if example.error and not self.options.skip_bad:
                raise UserError(
                    f"{example.error}\n--skip-bad goes on without such records; "
                    f"`python data.py check {self.options.data}` lists them all"
                )
            if example.error:
                left_out[str(example.error)] = example.number
        return [example for example in examples if not example.error]


def records_of_step(step, n, options):
    """Record numbers of one optimiser step: a new seeded order each epoch, its last batch short."""
    steps_per_epoch = math.ceil(n / options.batch_size)
    epoch, place = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(options.seed * 1000 + epoch)
    order = torch.randperm(n, generator=generator)
    return order[place * options.batch_size : (place + 1) * options.batch_size].tolist()


def micro_batches(first_step, n, options, rank, world):
    """This process's record numbers from a step on: (step, numbers) for each forward pass."""
    for step in range(first_step, options.steps):
        mine = records_of_step(step, n, options)[rank::world]
        for k in range(0, len(mine), options.micro_batch):
            yield mine[k : k + options.micro_batch]


def read_ahead(examples, first_step, options, rank, world):
    """An iterator over this process's micro-batches, lists of examples."""
    loader = torch.utils.data.DataLoader(
        examples,
        batch_sampler=micro_batches(first_step, len(examples), options, rank, world),
        collate_fn=list,
        pin_memory=options.device != "cpu",  # by a thread, which takes over from the workers
        num_workers=options.workers,
        multiprocessing_context="fork" if options.workers else None,
        worker_init_fn=processes.leave_signals_to_the_parent,
    )
    return iter(loader)


# --- pairs of images: `crop` is above; CLIP's nearest neighbours --------------------------------


def embed(files, encoder, cache, batch=64):
    """(N, d) unit image embeddings of CLIP, SigLIP, or a LLaVA (mean over its image tokens), and a
    hash of each image's pixels. A batch is kept in the folder `cache` under a hash of encoder and
    pixels, so that a killed run goes on where it stopped."""
    from vlm.load import fingerprint, load_encoder

    model, preprocess = load_encoder(encoder)
    weights, vectors, pixels = fingerprint(model), [], []
    Path(cache).mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(0, len(files), batch), desc="embedding", unit=" batches"):
        images = [open_image(str(file)) for file in files[i : i + batch]]
        hashes = [hashlib.sha256(f"{x.size}".encode() + x.tobytes()).hexdigest() for x in images]
        key = hashlib.sha256(f"{weights} {preprocess} {hashes}".encode()).hexdigest()
        kept = Path(cache, f"{key}.pt")
        if not kept.exists():
            inputs = preprocess(images=images, return_tensors="pt").to(model.device)
            found = model.get_image_features(**inputs).pooler_output
            means = torch.stack([x.reshape(-1, x.shape[-1]).mean(0) for x in found])
            torch.save(torch.nn.functional.normalize(means).cpu(), kept.with_suffix(".part"))
            os.replace(kept.with_suffix(".part"), kept)
        vectors.append(torch.load(kept, weights_only=True))
        pixels += hashes
    return torch.cat(vectors), pixels


def nearest(vectors, groups, max_sim=1.0, block=256):
    """Each row's nearest other row, exactly: (indices, cosines), cosine -inf where there is none.

    vectors: (N, d) of unit length. groups: integer tensors (N,); rows that share one are no
    neighbours, nor are rows with a cosine above max_sim. Memory: block x N cosines.
    """
    index = torch.zeros(len(vectors), dtype=int)
    best = torch.full((len(vectors),), -torch.inf)
    for i in tqdm(range(0, len(vectors), block), desc="neighbours", unit=" blocks"):
        here = slice(i, i + block)
        cosine = vectors[here] @ vectors.T
        cosine[cosine > max_sim] = -torch.inf
        for group in groups:
            cosine[group[here, None] == group[None, :]] = -torch.inf
        best[here], index[here] = cosine.max(dim=1)
    return index, best


# --- python data.py check ------------------------------------------------------------------------


def check(args):
    """`python data.py check`: every bad line with its reason; returns how many there are."""
    records, prompts, rows = Records(args.data), None, []
    if args.model:
        from vlm.load import load_processor
        from vlm.prompts import Prompts, prompt_format

        config, processor = load_processor(args.model)
        prompts = Prompts(processor, prompt_format(config, args.prompt_format))
    bad, usable_by = 0, dict.fromkeys(OBJECTIVES, 0)
    figures = {"width, pixels": [], "height, pixels": [], "length, tokens": []}
    for i in tqdm(range(len(records)), desc="checking", unit=" records", disable=None):
        try:
            record = records[i]
            able = [n for n, o in OBJECTIVES.items() if not missing_fields(record, o.cells)]
            for name in IMAGES:
                if name in record:
                    image = image_of(record, name, 0, args.allow_outside)
                    figures["width, pixels"].append(image.width)
                    figures["height, pixels"].append(image.height)
            if prompts:
                most = max((OBJECTIVES[name].cells for name in able), key=len)
                rows = build_rows(record, prompts, most, max_length=args.max_length)
                figures["length, tokens"] += [row.longest() for row in rows]
            for name in able:
                usable_by[name] += 1
        except UserError as error:
            bad += 1
            tqdm.write(f"bad: {error}")
    counts = ", ".join(f"{name} {count:,}" for name, count in usable_by.items())
    print(f"{len(records):,} records, {bad:,} bad; usable by {counts}")
    for name, values in figures.items():
        if values:
            values.sort()
            print(f"{name}: min {values[0]}, median {values[len(values) // 2]}, max {values[-1]}")
    if rows:
        print(prompts.describe(rows[0]))
    return bad


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=("check",))
    add("data", help="prefs.jsonl or a parquet file")
    add("--model", help="also render and tokenise for this model (folder or hub name)")
    add("--prompt-format", choices=("auto", "vicuna", "chat"), default="auto")
    add("--max-length", type=within(1), default=2048, help="tokens (default 2048)")
    add("--allow-outside", action="store_true", help="permit image paths out of the data's folder")
    bad = run_command(check, parser.parse_args(argv))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # records hold what a terminal may not show
    main()
