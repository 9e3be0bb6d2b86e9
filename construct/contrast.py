"""Give every record a contrast image, of one of seven kinds.

    python -m construct.contrast images/ --out images/pairs.jsonl --kind clip

crop (mDPO's) and clip (SymMPO's) are made by data.py; the others are for comparison (notebook 6).
Pictures that you made yourself (synthetic, in SymMPO's Fig. 4) need no command: name them
contrast_image in the records.
"""

import functools
import math
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

from data import embed, nearest
from support.cli import NEEDED, UserError, parse, run_command
from support.files import write_lines
from support.images import CROP_LARGE, crop, moco, noise, open_image
from support.records import DataOptions, Records, need_other, with_files

# Kinds that are made from the image itself: (image, random generator) -> image
MADE = {
    "crop": crop,
    "crop-large": functools.partial(crop, keep=CROP_LARGE),
    "black": lambda image, rng: Image.new("RGB", image.size),
    "noise": noise,
    "moco": moco,
}


def choose(args, images):
    """{path of an image: (its contrast image, cosine or None)} for the kinds that take another one
    of the images; one for which no other will do is left out."""
    chosen = {}
    if len(images) < 2:
        return chosen
    if args.kind == "random":
        rng = random.Random(args.seed)
        for number, image in enumerate(images):
            other = (number + rng.randrange(1, len(images))) % len(images)
            chosen[image] = (images[other], None)
        return chosen

    vectors, pixels = embed(images, args.encoder, Path(args.out).with_suffix(""))
    index, cosines = nearest(vectors, [numbered(pixels)], args.max_sim)
    for image, i, cosine in zip(images, index.tolist(), cosines.tolist()):
        if math.isfinite(cosine):  # -inf where there is none
            chosen[image] = (images[i], round(cosine, 4))
    return chosen


def numbered(labels):
    """Labels as integers: equal ones get the same."""
    number = {}
    return torch.tensor([number.setdefault(label, len(number)) for label in labels])


def contrast(args):
    """The command: the records again, each with a contrast image."""
    out = Path(args.out)
    if not out.suffix:
        raise UserError(f"--out {out}: a file name such as {out}.jsonl; pictures go into {out}/")
    records = Records(args.data, args.image_root, args.fields, needed=("image",))
    need_other(out, records)
    folder = out.with_suffix("")  # of the pictures that are made, or of the embeddings
    numbers = range(len(records))
    given = [with_files(records, i, folder / "given", args.allow_outside) for i in numbers]
    folder.mkdir(parents=True, exist_ok=True)

    chosen = {}
    lines = []
    if args.kind not in MADE:
        images = dict.fromkeys(files["image"] for _, files in given)
        chosen = choose(args, list(images))
    for number, (fields, files) in enumerate(tqdm(given, desc=args.kind, unit=" records")):
        image = files["image"]
        if args.kind in MADE:
            seed = f"{args.seed} {number} {fields['image']}"
            rng = random.Random(seed.encode("utf-8", "replace"))  # a path may be none
            other = folder / f"{number:06d}.png"
            cosine = None
            MADE[args.kind](open_image(str(image)), rng).save(other)
        elif image in chosen:
            other, cosine = chosen[image]
        else:
            continue
        found = {
            "image": os.path.relpath(image, out.parent),
            "contrast_image": os.path.relpath(other, out.parent),
            "contrast_kind": args.kind,
            "contrast_seed": args.seed,
            "similarity": cosine,
        }
        lines.append({**fields, **found})
    write_lines(out, lines)
    print(f"{out}: {len(lines):,} records, {len(records) - len(lines):,} left out (no image fits)")


@dataclass
class Options(DataOptions):
    """What is typed.

    out                 FILE.jsonl beside the images; made pictures go to FILE/
    kind                of contrast image
    seed                of what is drawn at random
    encoder             for clip
    max_sim             clip: above it are duplicates
    """

    out: str = NEEDED
    kind: Literal[*MADE, "random", "clip"] = "clip"
    seed: int = 0
    encoder: str = "openai/clip-vit-large-patch14-336"
    max_sim: float = 0.98


def main(argv=None):
    run_command(contrast, parse(Options, __doc__, argv))


if __name__ == "__main__":
    main()
