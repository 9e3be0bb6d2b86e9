"""Files of records: JSON lines, a JSON list, Parquet, Arrow, CSV; one file, a folder, or a glob.

Every kind gives its records by number, in one order, and keeps little of them in memory. What we do
not read is named for what it is, with the way on.
"""

import copy
import csv
import glob
import hashlib
import json
import os
import re
from array import array
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

from support.cli import Unreadable, UserError
from support.formats import FIELDS, IMAGES, LAYOUTS, normalise
from support.images import decoded, need_inside, open_image, pixel_hash

SUFFIXES = ".jsonl .json .parquet .arrow .csv .tsv".split()
NO_RECORDS = ("dataset_info.json", "dataset_dict.json", "state.json")  # beside Arrow files
NOT_READ = {  # how a file begins: what it is, and the way on
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run `git lfs pull`",
    b"\x1f\x8b": "compressed with gzip: unpack it with `gunzip`",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it with `unzstd`",
    b"PK": "a zip archive: unpack it with `unzip`",
    (b"\xff\xfe", b"\xfe\xff"): "UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`",
}
NOT_UTF8 = "the file is not UTF-8: convert it, perhaps with `iconv -f LATIN1 -t UTF-8`"

# --- one file ------------------------------------------------------------------------------------


class Numbered:
    """What the kinds share: `starts` has a place for each record."""

    def __len__(self):
        return len(self.starts)

    def source(self, i):
        return f"{self.path}: {self.PLACE} {i + 1}"


class JsonLines(Numbered):
    """The objects of a JSONL file by number. Memory: 16 bytes each, however long the lines."""

    KIND = "JSON"

    def __init__(self, path):
        self.path, self.starts, self.numbers = path, array("q"), array("q")
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    self.starts.append(file.tell() - len(line))
                    self.numbers.append(number)

    def source(self, i):
        return f"{self.path}:{self.numbers[i]}"

    def read(self, i):
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            return json.loads(file.readline())


class JsonList(Numbered):
    """The elements of one JSON list. Memory: all of them; JSONL needs less."""

    KIND, PLACE = "JSON", "record"

    def __init__(self, path):
        self.path = path
        text = Path(path).read_text(encoding="utf-8-sig")
        try:
            self.starts = json.loads(text)
        except ValueError as error:
            raise UserError(
                f"{path}:{error.lineno}: not valid JSON: {error.msg}, column {error.colno}"
            ) from error

    def read(self, i):
        return copy.copy(self.starts[i])


class Parquet(Numbered):
    """The rows of a Parquet file by number. Memory: one row group a file, the one read last."""

    KIND, PLACE = "Parquet", "row"

    def __init__(self, path):
        import pyarrow.parquet

        self.path, self.file = path, pyarrow.parquet.ParquetFile(path, memory_map=True)
        groups = range(self.file.num_row_groups)
        sizes = [self.file.metadata.row_group(g).num_rows for g in groups]
        self.starts = [0, *accumulate(sizes)]  # first row of each group, and the end
        self.loaded = None  # (number, table) of a group

    def __len__(self):
        return self.starts[-1]

    def read(self, i):
        group = bisect_right(self.starts, i) - 1
        if self.loaded is None or self.loaded[0] != group:
            self.loaded = group, self.file.read_row_group(group)
        return self.loaded[1].slice(i - self.starts[group], 1).to_pylist()[0]


class Rows(Numbered):
    """The rows of a table that is read at once: CSV and TSV into memory, Arrow mapped from disk."""

    KIND, PLACE = "a table", "row"

    def __init__(self, path):
        self.path = path
        if Path(path).suffix.lower() == ".arrow":
            import pyarrow

            file = pyarrow.memory_map(str(path))
            is_file = file.read(6) == b"ARROW1"  # else a stream, as `save_to_disk` writes it
            file.seek(0)
            reader = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            self.table = reader(file).read_all()
        else:
            between = "\t" if Path(path).suffix.lower() == ".tsv" else ","
            csv.field_size_limit(2**27)
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = csv.DictReader(file, restkey="cells without a name", delimiter=between)
                self.table = list(rows)

    def __len__(self):
        return len(self.table)

    def read(self, i):
        row = self.table[i : i + 1]
        if not isinstance(row, list):
            return row.to_pylist()[0]
        return {name: value for name, value in row[0].items() if value}  # an empty cell is none


class Pictures(Numbered):
    """A folder's pictures: records that have nothing but an image."""

    KIND, PLACE = "a folder", "picture"
    ENDINGS = tuple(".jpg .jpeg .png .webp .bmp .gif .tif .tiff".split())

    def __init__(self, path):
        names = sorted(os.listdir(path))
        self.path, self.starts = path, [n for n in names if n.lower().endswith(self.ENDINGS)]

    def read(self, i):
        return {"image": self.starts[i]}


def open_file(path):
    """The records of one file, of whatever kind it is."""
    if os.path.isdir(path):
        return Pictures(path)
    with open(path, "rb") as file:
        head = file.read(64)
    for beginning, what in NOT_READ.items():
        if head.startswith(beginning):
            raise UserError(f"{path}: {what}")
    suffix = Path(path).suffix.lower()
    if head.startswith(b"PAR1") or suffix == ".parquet":
        return Parquet(path)
    if suffix in (".csv", ".tsv", ".arrow"):
        return Rows(path)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return JsonList(path)
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
        if pictures_will_do and len(Pictures(path)):
            return [Path(path)]
        found = []
        for file in sorted(Path(path).rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.suffix.lower() in SUFFIXES and file.name not in NO_RECORDS and not hidden:
                found.append(file)
        kinds = sorted({file.suffix.lower() for file in found})
        names = " ".join(str(file.relative_to(path)) for file in found)
        splits = sorted(set(re.findall(r"\b(train|test|val|validation|dev)\b", names)))
        for several in (kinds, splits):
            if len(several) > 1:
                raise UserError(
                    f"{path}: the folder has {' and '.join(several)} files; say which, as a quoted "
                    f"glob: '{path}/*{several[-1]}*'"
                )
    elif os.path.exists(path):
        found = [Path(path)]
    else:
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        what = "no images and no record files there" if os.path.isdir(path) else "no such file"
        raise UserError(f"{path}: {what}")
    return found


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


def add_data_options(parser, what="record file, folder of them, or quoted glob (docs/data.md)"):
    """What every command that reads records has."""
    add = parser.add_argument
    add("data", help=what)
    add("--image-root", help="folder where image paths start, if not the data file's")
    add("--fields", help="names in the file: prompt=instruction,chosen=good,image=img_path")
    add("--allow-outside", action="store_true", help="permit image paths out of that folder")


class Records:
    """The records of a path in one form (`formats.normalise`), each with its `source`
    ("file:line") and its `root`, the folder where its image paths start. A broken record is an
    error when it is asked for.

    image_root: that folder, when it is not the file's own. fields: --fields, see `field_names`.
    needed: the fields without which there is no record.
    """

    def __init__(self, path, image_root=None, fields=None, needed=("image", "prompt", "chosen")):
        self.names, self.needed, self.files, self.roots = field_names(fields), needed, [], []
        for file in files_of(path, pictures_will_do=self.needed == ("image",)):
            try:
                self.files.append(open_file(file))
            except UserError:
                raise
            except UnicodeDecodeError as error:
                raise UserError(f"{file}: {NOT_UTF8}") from error
            except Exception as error:  # pyarrow has many kinds
                raise UserError(f"{file}: {error}") from error
            self.roots.append(Path(image_root or (file if file.is_dir() else file.parent)))
        self.starts = [0, *accumulate(len(file) for file in self.files)]
        if len(self) == 0:
            raise UserError(f"{path}: the file has no records")

    def __len__(self):
        return self.starts[-1]

    def place(self, i):
        """(number of the file, number in it) of record i."""
        if not 0 <= i < len(self):
            raise IndexError(i)  # which ends a for loop
        number = bisect_right(self.starts, i) - 1
        return number, i - self.starts[number]

    def source(self, i):
        number, k = self.place(i)
        return self.files[number].source(k)

    def raw(self, i):
        """Record i as it stands in the file, under our names where --fields gives them."""
        number, k = self.place(i)
        file = self.files[number]
        source = file.source(k)
        try:
            raw = file.read(k)
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: {NOT_UTF8}") from error
        except Exception as error:  # JSON, recursion, pyarrow
            if isinstance(error, OSError) and error.errno:
                raise Unreadable(f"{source}: {error}") from error
            raise UserError(f"{source}: not valid {file.KIND}: {error}") from error
        if not isinstance(raw, dict):
            raise UserError(f"{source}: not a JSON object but {type(raw).__name__}")
        if not self.names:
            return raw
        there = {ours: raw[theirs] for ours, theirs in self.names.items() if theirs in raw}
        for theirs in self.names.values():
            raw.pop(theirs, None)
        return {**raw, **there}  # all at once: two names may have been exchanged

    def hash(self, i):
        """A short one of record i as it stands in the file; None where it cannot be read."""
        try:
            raw = repr(sorted(self.raw(i).items()))
        except UserError:
            return None
        return hashlib.blake2b(raw.encode("utf-8", "replace"), digest_size=8).hexdigest()

    def __getitem__(self, i):
        raw, source = self.raw(i), self.source(i)
        try:
            record = normalise(raw, self.needed)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise UserError(f"{source}: {error}") from error
        return {**record, "source": source, "root": self.roots[self.place(i)[0]]}


# --- records whose images are files --------------------------------------------------------------


def with_files(records, i, folder, allow_outside):
    """(the fields of record i, {image field: its path}); an image that stands in the data itself is
    written into the folder."""
    record, files = records[i], {}
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


def folders_of(record):
    """Where a record's images are, if they are files."""
    images = [record[name] for name in IMAGES if isinstance(record.get(name), str)]
    return {os.path.dirname(record["root"] / image) for image in images if len(image) < 1000}


def need_other(out, records):
    """Refuse to write over a file that is being read."""
    for file in records.files:
        if os.path.exists(out) and os.path.samefile(out, file.path):
            raise UserError(f"--out {out}: the records are read from it; choose another name")


def image_file(image, root, folder, allow_outside):
    """The path of an image, which is written into the folder if it has none yet."""
    if isinstance(image, str):
        image = decoded(image)
    if isinstance(image, str):
        need_inside(image, root, allow_outside)
        return root / image
    picture = open_image(image)
    path = Path(folder, f"{pixel_hash(picture)[:16]}.png")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    return path
