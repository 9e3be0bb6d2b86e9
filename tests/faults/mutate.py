"""Damage in the ways that files are damaged: seeded, endless, for the tests and the campaign."""

import json
import random

GOOD = [
    {
        "image": "a.png",
        "prompt": "What is it?",
        "chosen": "A cup.",
        "rejected": "A dog.",
        "contrast_image": "b.png",
        "contrast_chosen": "A tree.",
    },
    {"image": "a.png", "question": "What?", "chosen": "yes", "rejected": "no", "idx": 3},
    {"image": "a.png", "text": json.dumps({"question": "Q?", "chosen": "yes", "rejected": "no"})},
    {
        "image_1": {"path": "a.png"},
        "image_2": "b.png",
        "question": "Q?",
        "resp_1_w": "a",
        "resp_1_l": "b",
        "resp_2_w": "c",
    },
    {
        "images": ["a.png"],
        "prompt": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}
        ],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
    },
]
VALUES = [
    None,
    True,
    0,
    -1,
    3.5,
    "",
    " ",
    "x",
    "</s>",
    "<image>",
    "\0",
    "\ud800",
    "a" * 5000,
    [],
    {},
    [[]],
    [None],
    {"bytes": 3},
    {"path": None},
    {"bytes": "x", "path": "y"},
    "../../x",
    "/etc/passwd",
    "/dev/zero",
    ".",
    {"text": {"text": "x"}},
    [{"content": None}],
    [{"content": [{"type": "text"}]}],
    "[1]",
    "3",
    '"x"',
    "{}",
    "\x1b[2J",
    "n" * 300 + "/",
]


def value(rng, raw):
    """A deep copy in which one value, somewhere, is another, or gone, or stands twice."""
    raw = json.loads(json.dumps(raw))
    place, inner = raw, raw
    while isinstance(inner, (dict, list)) and inner:
        place = inner
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = place[key]
        if rng.random() < 0.3:
            break
    act = rng.randrange(4)
    if act == 0 and isinstance(place, dict):
        del place[key]
    elif act == 1 and isinstance(place, dict):
        place[rng.choice([*rng.choice(GOOD), "new"])] = inner
    else:
        place[key] = rng.choice(VALUES)
    return raw


def data(rng, whole):
    """The bytes cut, flipped, overwritten, repeated or mixed with others."""
    whole = bytearray(whole)
    for _ in range(rng.choice([1, 1, 2, 8])):
        a, b = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
        act = rng.randrange(5)
        if act == 0:
            del whole[a:]
        elif act == 1 and whole:
            whole[a % len(whole)] ^= 1 << rng.randrange(8)
        elif act == 2:
            whole[a:b] = rng.randbytes(rng.randrange(20))
        elif act == 3:
            whole[a:a] = whole[a:b][:1000]
        else:
            del whole[a:b][:50]
    return bytes(whole)


def line(rng):
    """A mutated line of a JSONL file, without the newline."""
    whole = value(rng, rng.choice(GOOD)) if rng.random() < 0.7 else rng.choice(GOOD)
    text = json.dumps(whole, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.4:
        text = data(rng, text)
    if rng.random() < 0.02:
        text = rng.choice([b"[" * 100_000, b'{"text": ' * 900 + b"1" + b"}" * 900, b"9" * 5000])
    return text.replace(b"\n", b" ").replace(b"\r", b" ")


def pictures():
    """{file name: bytes} of small pictures of every kind that turns up in data sets."""
    import io

    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = rgb.getexif()
    exif[0x0112] = 6
    kinds = [
        ("rgb.jpg", rgb, {}),
        ("rgb.png", rgb, {}),
        ("rgb.webp", rgb, {}),
        ("exif.jpg", rgb, {"exif": exif}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("palette.png", rgb.convert("P"), {}),
        ("alpha.png", rgb.convert("RGBA"), {}),
        ("grey.png", rgb.convert("L"), {}),
        ("bit.png", rgb.convert("1"), {}),
        ("16.png", Image.fromarray(rng.integers(0, 60000, (40, 60), dtype=np.uint16)), {}),
        ("float.tiff", rgb.convert("F"), {}),
        ("int.tiff", rgb.convert("I"), {}),
        ("lab.tiff", rgb.convert("LAB"), {}),
        ("one.png", rgb.crop((0, 0, 1, 1)), {}),
        ("moving.gif", rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        ("wrong.jpg", rgb, {"format": "PNG"}),
        ("rgb.bmp", rgb, {}),
        ("progressive.jpg", rgb, {"progressive": True}),
    ]
    found = {}
    for name, image, options in kinds:
        buffer = io.BytesIO()
        kind = {"jpg": "JPEG", "tiff": "TIFF"}.get(name.split(".")[1], name.split(".")[1].upper())
        image.save(buffer, **{"format": kind, **options})
        found[name] = buffer.getvalue()
    return found


def parquet(path, rows=5):
    """The published columns, with pictures inside, in two row groups."""
    import pyarrow
    import pyarrow.parquet

    picture = {"bytes": pictures()["rgb.png"], "path": "x.png"}
    table = [
        {
            "question": f"Q{i}?",
            "image_1": picture,
            "image_2": picture,
            "resp_1_w": "a",
            "resp_1_l": "b",
            "resp_2_w": "c",
        }
        for i in range(rows)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=3)
    return path


def random_of(seed):
    return random.Random(seed)
