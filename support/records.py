"""Files of records: JSON lines, a JSON list, Parquet; one file, a folder, or a glob.

Every kind gives its records by number, in one order, and keeps little of them in memory. What we do
not read is named for what it is, with the way on.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from support.cli import Unreadable, UserError
from support.formats import FIELDS, IMAGES, LAYOUTS, normalise
from support.images import open_image, path_or_bytes, pixel_hash

PICTURES = tuple(".jpg .jpeg .png .webp .bmp .gif .tif .tiff".split())
NO_RECORDS = ("dataset_info.json", "dataset_dict.json", "state.json")  # beside Arrow files
NOT_READ = {  # how a file begins: what it is, and the way on
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"\x1f\x8b": "compressed with gzip: unpack it with `gunzip`",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it with `unzstd`",
    b"PK": "a zip archive: unpack it with `unzip`",
    (b"\xff\xfe", b"\xfe\xff"): "UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`",
}
TABLE = "a table of text: pandas.read_csv(FILE, sep=...).to_json(OUT, orient='records', lines=True)"
NOT_READ_BY_SUFFIX = {
    ".csv": TABLE,
    ".tsv": TABLE,
    ".arrow": "an Arrow file: datasets.load_from_disk(FOLDER).to_parquet(OUT) makes it Parquet",
}
SUFFIXES = (".jsonl", ".json", ".parquet", *NOT_READ_BY_SUFFIX)
NOT_UTF8 = "the file is not UTF-8: convert it, perhaps with `iconv -f LATIN1 -t UTF-8`"

# --- one file ------------------------------------------------------------------------------------


@dataclass
class Listed:
    """Records that are read at once, and held in a list."""

    path: Path
    kind: str  # of record, for messages
    found: list

    def __len__(self):
        return len(self.found)

    def source(self, i):
        return f"{self.path}: {self.kind} {i + 1}"

    def read(self, i):
        return self.found[i]


class JsonLines(Listed):
    """The objects of a JSONL file by number. Memory: 16 bytes each, however long the lines."""

    def __init__(self, path):
        super().__init__(path, "JSON", array("q"))  # the first byte of each
        self.lines = array("q")
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    self.found.append(file.tell() - len(line))
                    self.lines.append(number)

    def source(self, i):
        return f"{self.path}:{self.lines[i]}"

    def read(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.found[i])
            return json.loads(file.readline())


def json_list(path):
    """The elements of one JSON list."""
    text = Path(path).read_text(encoding="utf-8-sig")
    try:
        return Listed(path, "record", json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}:{error.lineno}: not valid JSON: {error.msg}, column {error.colno}"
        ) from error


def pictures(path):
    """A folder's pictures: records that have nothing but an image."""
    names = [name for name in sorted(os.listdir(path)) if name.lower().endswith(PICTURES)]
    return Listed(path, "picture", [{"image": name} for name in names])


class Parquet(Listed):
    """The rows of a Parquet file by number. Memory: one row group a file, the one read last."""

    def __init__(self, path):
        import pyarrow.parquet

        super().__init__(path, "row", pyarrow.parquet.ParquetFile(path, memory_map=True))
        self.rows_of = functools.lru_cache(maxsize=1)(self.found.read_row_group)
        about = self.found.metadata
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        self.starts = [0, *accumulate(sizes)]  # first row of each group, and the end

    def __len__(self):
        return self.starts[-1]

    def read(self, i):
        group = bisect_right(self.starts, i) - 1
        [row] = self.rows_of(group).slice(i - self.starts[group], 1).to_pylist()
        return row


def open_file(path):
    """The records of one file, of whatever kind it is."""
    if os.path.isdir(path):
        return pictures(path)
    with open(path, "rb") as file:
        head = file.read(64)
    for beginning, what in NOT_READ.items():
        if head.startswith(beginning):
            raise UserError(f"{path}: {what}")
    suffix = Path(path).suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return Parquet(path)
    if suffix in NOT_READ_BY_SUFFIX:
        raise UserError(f"{path}: {NOT_READ_BY_SUFFIX[suffix]}")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return json_list(path)
    lines = JsonLines(path)
    if suffix == ".json" and len(lines) > 1:
        try:
            lines.read(0)
        except ValueError as error:
            raise UserError(
                f"{path}: a JSON object over several lines; records must be a JSON list, or one a "
                "line"
            ) from error
    return lines


# --- all of them ---------------------------------------------------------------------------------


def files_of(path, pictures_will_do):
    """The files that a path means: itself, a folder's, or a glob's, in the order of their names. A
    folder with pictures is one by itself where these are wanted."""
    if os.path.isdir(path):
        if pictures_will_do and len(pictures(path)):
            return [Path(path)]
        # glob leaves out what is hidden.
        inside = map(Path, glob.glob(f"{glob.escape(str(path))}/**", recursive=True))
        found = [file for file in inside if file.suffix.lower() in SUFFIXES]
        found = [file for file in found if file.name not in NO_RECORDS]
        need_one_kind(path, [file.relative_to(path) for file in found])
    elif os.path.exists(path):
        found = [Path(path)]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    if not found:
        what = "no images and no record files there" if os.path.isdir(path) else "no such file"
        raise UserError(f"{path}: {what}")
    return sorted(found)


def need_one_kind(path, files):
    """Refuse a folder that mixes kinds of files, or splits."""
    kinds = {file.suffix.lower() for file in files}
    splits = set(re.findall(r"\b(train|test|val|validation|dev)\b", " ".join(map(str, files))))
    for several in (sorted(kinds), sorted(splits)):
        if len(several) > 1:
            raise UserError(
                f"{path}: the folder has {' and '.join(several)} files; say which, as a quoted "
                f"glob: '{path}/*{several[-1]}*'"
            )


def field_names(text):
    """{our name: theirs} from "prompt=instruction,image=img_path"."""
    names = {}
    if not text:
        return names
    for item in text.split(","):
        ours, _, theirs = item.partition("=")
        if ours not in FIELDS or not theirs:
            known = ", ".join(FIELDS)
            raise UserError(f"--fields {item}: NAME=THEIRS, where NAME is one of {known}")
        names[ours] = theirs
    return names


@dataclass
class DataOptions:
    """What every command that reads records has.

    data                record file, folder of them or of images, or quoted glob (docs/data.md)
    image_root          folder where image paths start, if not the data file's
    fields              names in the file: prompt=instruction,chosen=good,image=img_path
    allow_outside       permit image paths out of that folder
    """

    data: str
    image_root: str = None
    fields: str = None
    allow_outside: bool = False


@contextlib.contextmanager
def named(source, kind):
    """Whatever goes wrong inside is said of this file or record."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: {NOT_UTF8}") from error
    except Exception as error:  # JSON, recursion, pyarrow have a kind each
        if isinstance(error, OSError) and error.errno:
            raise Unreadable(f"{source}: {error}") from error
        raise UserError(f"{source}: not valid {kind}: {error}") from error


class Records:
    """The records of a path in one form (`formats.normalise`), each with its `source`
    ("file:line") and its `root`, the folder where its image paths start. A broken record is an
    error when it is asked for.

    image_root: that folder, when it is not the file's own. fields: --fields, see `field_names`.
    needed: the fields without which there is no record.
    """

    def __init__(self, path, image_root=None, fields=None, needed=("image", "prompt", "chosen")):
        self.names = field_names(fields)
        self.needed = needed
        self.files = []
        for file in files_of(path, pictures_will_do=self.needed == ("image",)):
            with named(file, "record file"):
                opened = open_file(file)
            opened.root = Path(image_root or (file if file.is_dir() else file.parent))
            self.files.append(opened)
        self.starts = [0, *accumulate(len(file) for file in self.files)]
        if len(self) == 0:
            raise UserError(f"{path}: the file has no records")

    def __len__(self):
        return self.starts[-1]

    def place(self, i):
        """(the file of record i, its number there)"""
        if not 0 <= i < len(self):
            raise IndexError(i)  # which ends a for loop
        number = bisect_right(self.starts, i) - 1
        return self.files[number], i - self.starts[number]

    def source(self, i):
        file, k = self.place(i)
        return file.source(k)

    def raw(self, i):
        """Record i as it stands in the file, under our names where --fields gives them."""
        file, k = self.place(i)
        source = file.source(k)
        with named(source, file.kind):
            raw = file.read(k)
        if not isinstance(raw, dict):
            raise UserError(f"{source}: not a JSON object but {type(raw).__name__}")
        own = {name: value for name, value in raw.items() if name not in self.names.values()}
        there = {ours: raw[theirs] for ours, theirs in self.names.items() if theirs in raw}
        return {**own, **there}  # all at once: two names may have been exchanged

    def hash(self, i):
        """A short one of record i as it stands in the file; None where it cannot be read."""
        try:
            raw = repr(sorted(self.raw(i).items()))
        except UserError:
            return None
        return hashlib.blake2b(raw.encode("utf-8", "replace"), digest_size=8).hexdigest()

    def __getitem__(self, i):
        raw = self.raw(i)
        source = self.source(i)
        try:
            record = normalise(raw, self.needed)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise UserError(f"{source}: {error}") from error
        return {**record, "source": source, "root": self.place(i)[0].root}


# --- records whose images are files --------------------------------------------------------------


def with_files(records, i, folder, allow_outside):
    """(the fields of record i, {image field: its path}); an image that stands in the data itself is
    written into the folder."""
    record = records[i]
    files = {}
    fields = {name: record[name] for name in FIELDS if name in record}
    for name, value in records.raw(i).items():
        if name not in LAYOUTS and not isinstance(value, (bytes, dict)):
            fields[name] = value  # as it is written there
    for name in IMAGES:
        if name not in record:
            continue
        try:
            files[name] = image_file(record[name], record["root"], folder, allow_outside)
        except UserError as error:
            raise UserError(f"{record['source']}: {error}") from error
        if files[name].parent == Path(folder):
            fields[name] = files[name].name
    return fields, files


def need_other(out, records):
    """Refuse to write over a file that is being read."""
    for file in records.files:
        if os.path.exists(out) and os.path.samefile(out, file.path):
            raise UserError(f"--out {out}: the records are read from it; choose another name")


def image_file(image, root, folder, allow_outside):
    """The path of an image, which is written into the folder if it has none yet."""
    found = path_or_bytes(image, root, allow_outside)
    if isinstance(found, str):
        return Path(found)
    picture = open_image(found)
    path = Path(folder, f"{pixel_hash(picture)[:16]}.png")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return path
