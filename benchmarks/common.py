"""What the benchmarks share: reading their files, finding their images, checking answers.

Nothing in benchmarks/ imports torch (but answers.py, where a model answers): scoring is quick.
"""

import base64
import csv
import functools
import glob
import io
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from support.cli import UserError
from support.images import open_image

HERE = Path(__file__).resolve().parent


@dataclass
class Question:
    prompt: str
    image: str | bytes | None  # its path, or the file itself
    record: dict  # the published answer format without the answer


@dataclass
class Settings:
    """How a benchmark is asked and read."""

    protocol: str = "symmpo"  # the paper's lenient reading, or "official"
    dimension: str = "a"  # AMBER: a all, g captions, d yes/no, de, da, dr its parts
    judgements: list | None = None  # texts or chat completions in answer order
    similar: list | None = None  # AMBER: pairs of words that mean the same
    allow_outside: bool = False  # may images leave the benchmark's folder?
    cases: list = field(default_factory=list)  # filled by `score`: a Case for each answer


@dataclass
class Case:
    """What a scorer reads in an answer while it counts, for a person to see."""

    right: bool  # of objects: none is false
    said: str = ""  # yes, a letter, a judge's words; "" for captions: the answer itself is read
    truth: str = ""  # what should have been said
    words: list | tuple = ()  # (word, "true", "false", "safe", or "" for no object), in order
    missed: list | tuple = ()  # true objects that are not named


# --- files ----------------------------------------------------------------------------------------


def read(path):
    """A JSON file's value, or the list of values of a JSONL, parquet or TSV file."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        if raw.startswith(b"version https://git-lfs"):
            raise UserError(f"{path}: a Git LFS pointer; `git lfs pull` fetches the file itself")
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.ParquetFile(path).read().to_pylist()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n").strip()
        if path.suffix == ".tsv":
            return tab_separated(text)
        is_lines = path.suffix == ".jsonl" or "}\n{" in text
        if is_lines and not text.startswith("["):
            lines = [line for line in text.split("\n") if line.strip()]
            text = "[" + ",\n".join(lines) + "]"  # one text, so that an error says the line
        return json.loads(text)
    except (OSError, ValueError, ImportError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def tab_separated(text):
    """The rows of VLMEvalKit's TSVs: an image is base64, or the index of the row that has it."""
    csv.field_size_limit(sys.maxsize)
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
    images = {row["index"]: row["image"] for row in rows}
    for row in rows:
        given = row["image"]
        row["image"] = images.get(given, given)
        if len(row["image"]) <= 64:  # too short for an image
            raise ValueError(f"row {row['index']}: its image {given!r} is that of no other row")
    return rows


def files_of(folder, *patterns):
    """The files that the first pattern finds, in the folder or its data/."""
    for place in (Path(folder), Path(folder, "data")):
        for pattern in patterns:
            names = sorted(glob.glob(pattern, root_dir=place))
            if names:
                return [place / name for name in names]
    raise UserError(
        f"{folder}: no {' or '.join(patterns)}; `evaluate.py fetch-help` says what to get"
    )


def rows_of(folder, *patterns):
    """The rows of these files, which are the parts of one table."""
    rows = []
    for path in files_of(folder, *patterns):
        rows += read(path)
    return rows


def find(folder, *names):
    """The first of the named files that is there."""
    return files_of(folder, *map(glob.escape, names))[0]


# --- images ---------------------------------------------------------------------------------------


def question_about(row, folder, subfolder, settings, prompt=None, other="image"):
    """A Question about an image; its record is the row without it. The row has it under "image", or
    in the `other` field: a path, a web address (its last part is the file's name), base64, bytes,
    or {"bytes", "path"}. A question must not have lost its image."""
    prompt = prompt or row["question"]
    image = row.get("image") or row.get(other)
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if not image:
        raise UserError(f"{folder}: no image belongs to the question {prompt!r}")
    if isinstance(image, str) and "." in image:
        image = image_file(str(folder), subfolder, image, settings.allow_outside)
    elif isinstance(image, str):
        image = base64.b64decode(image)
    return Question(prompt, image, {name: row[name] for name in row if name != "image"})


@functools.cache
def image_file(folder, subfolder, name, allow_outside):
    """The path of an image, when it can be opened: a broken one is an error before the model is
    loaded."""
    if "://" in name:
        name = name.rpartition("/")[2]
    path = find(folder, name, f"{subfolder}/{name}")
    open_image(os.path.relpath(path, folder), folder, allow_outside)
    return str(path)


# --- answers --------------------------------------------------------------------------------------


def made_of(file):
    """Its row's name and, if `generate` wrote the file, how."""
    made = {"name": Path(file).stem}
    known = Path(file).with_suffix(".settings.json")
    if known.is_file():
        made |= read(known)
    return made


def need_answers(answers, judgements):
    """Answers are a list of dicts, and there is a judgement for each or none at all."""
    if not isinstance(answers, list) or not answers:
        raise UserError("no answers: they are a JSON list, or JSONL")
    if judgements is not None and len(judgements) != len(answers):
        raise UserError(f"{len(judgements)} judgements for {len(answers)} answers")


def need_fields(answers, kinds):
    """Answers have these fields, {name: type or types}."""
    for number, answer in enumerate(answers, start=1):
        for name, kind in kinds.items():
            if not isinstance(answer.get(name), kind):
                raise UserError(f"answer {number}: the field {name} is missing or of a wrong type")


def reply_text(reply):
    """The text of a judge's reply: itself, a line of judgements.jsonl, or a chat completion."""
    if isinstance(reply, dict):
        reply = reply["text"] if "text" in reply else reply["choices"][0]["message"]["content"]
    return reply or ""


def plain(reply):
    """What a judge says behind its thinking, without Markdown."""
    return re.sub("[*`#]", "", reply.rpartition("</think>")[2]).strip()
