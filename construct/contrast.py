"""Give every record a contrast image, of one of seven kinds.

    python -m construct.contrast images/ --out images/pairs.jsonl --kind clip

crop (mDPO's) and clip (SymMPO's) are made by data.py; the others are for comparison (notebook 6).
Pictures that you made yourself (synthetic, in SymMPO's Fig. 4) need no command: name them
contrast_image in the records.
"""

import functools
import itertools
import math
import os
import random
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from tqdm import tqdm

from data import embed, nearest
from support.cli import NEEDED, UserError, flag_of, parse, run_command
from support.files import write_lines
from support.images import CROP_LARGE, crop, moco, noise, open_image
from support.records import DataOptions, Records, need_other, with_files

# Kinds that are made from the image itself: (image, random generator) -> image
MADE = {
    "crop": crop,
    "crop-large": functools.partial(crop, keep=CROP_LARGE),
    "black": lambda image, rng: Image.new("RGB", image.size),
    "noise": noise,  # with --step
    "moco": moco,
}


def choose(args, group_of):
    """{path of an image: (its contrast image, cosine or None)} for the kinds that take another one
    of the images; one for which no other will do is left out.

    group_of: {path of an image: its group, which the contrast image is not of}
    """
    chosen = {}
    if args.kind == "random":
        members = defaultdict(list)
        for image, group in group_of.items():
            members[group].append(image)
        if len(members) < 2:
            return chosen
        images = deque(itertools.chain(*members.values()))  # a group's side by side
        rng = random.Random(args.seed)
        for group in members.values():
            images.rotate(-len(group))  # to the end: the others stand before it
            others = len(images) - len(group)
            for image in group:
                chosen[image] = (images[rng.randrange(others)], None)
        return chosen

    images = list(group_of)
    vectors, pixels = embed(images, args.encoder, Path(args.out).with_suffix(""))
    groups = [numbered(pixels), numbered(group_of.values())]
    index, cosines = nearest(vectors, groups, args.max_sim)
    for image, i, cosine in zip(images, index.tolist(), cosines.tolist()):
        if math.isfinite(cosine) and cosine >= args.min_sim:  # -inf where there is none
            chosen[image] = (images[i], round(cosine, 4))
    return chosen


def groups_of(records, given, field):
    """{path of an image: its group}, which is the records' field, or without one the image itself.

    Raises UserError for a record without the field, and for an image of two groups."""
    group_of = {}
    for number, (fields, files) in enumerate(given):
        source = records.source(number)
        image = files["image"]
        group = image if field is None else fields.get(field)
        if group is None:
            raise UserError(f"{source}: there is no field {field}, which --group names")
        group = str(group)
        if group_of.setdefault(image, group) != group:
            raise UserError(
                f"{source}: --group {field}: {image} is of {group_of[image]!r} and {group!r}"
            )
    return group_of


def numbered(labels):
    """Labels as integers: equal ones get the same."""
    number = {}
    return torch.tensor([number.setdefault(label, len(number)) for label in labels])


def contrast(args):
    """The command: the records again, each with a contrast image."""
    if not 1 <= args.step <= 1000:
        raise UserError(f"--step {args.step}: must be 1 to 1000")
    for name, kinds in READ_BY.items():
        if args.kind not in kinds and getattr(args, name) != getattr(Options, name):
            raise UserError(f"{flag_of(name)} is read by --kind {' and '.join(kinds)} alone")
    out = Path(args.out)
    if not out.suffix:
        raise UserError(f"--out {out}: a file name such as {out}.jsonl; pictures go into {out}/")
    records = Records(args.data, args.image_root, args.fields, needed=("image",))
    need_other(out, records)
    folder = out.with_suffix("")  # of the pictures that are made, or of the embeddings
    inside = folder / "given"  # pictures that stand in the records themselves
    given = [with_files(records, i, inside, args.allow_outside) for i in range(len(records))]
    folder.mkdir(parents=True, exist_ok=True)

    chosen = {}
    lines = []
    stale = 0  # records with a response to another contrast image
    make = MADE.get(args.kind)
    if args.kind == "noise":
        make = functools.partial(noise, step=args.step)
    if make is None:
        chosen = choose(args, groups_of(records, given, args.group))
    for number, (fields, files) in enumerate(tqdm(given, desc=args.kind, unit=" records")):
        image = files["image"]
        if make:
            seed = f"{args.seed} {number} {fields['image']}"
            rng = random.Random(seed.encode("utf-8", "replace"))  # a path may be none
            other = folder / f"{number:06d}.png"
            cosine = None
            make(open_image(str(image)), rng).save(other)
        elif image in chosen:
            other, cosine = chosen[image]
        else:
            continue
        if fields.pop("contrast_chosen", None):
            fields.pop("changes", None)  # it says what that response changed
            stale += 1
        fields |= {
            "image": os.path.relpath(image, out.parent),
            "contrast_image": os.path.relpath(other, out.parent),
            "contrast_kind": args.kind,
            "contrast_seed": args.seed,
            "similarity": cosine,
        }
        lines.append(fields)
    write_lines(out, lines)
    print(f"{out}: {len(lines):,} records, {len(records) - len(lines):,} left out (no image fits)")
    if stale:
        print(
            f"contrast_chosen left out of {stale:,} records: it answers for the contrast image "
            "that they had; `python -m construct.responses` writes new ones"
        )


READ_BY = {
    "encoder": ["clip"],
    "min_sim": ["clip"],
    "max_sim": ["clip"],
    "group": ["random", "clip"],
    "step": ["noise"],
}


@dataclass
class Options(DataOptions):
    """What is typed.

    out                 FILE.jsonl beside the images; made pictures go to FILE/
    kind                of contrast image
    seed                of what is drawn at random
    encoder             for clip
    min_sim             clip: least cosine of a neighbour
    max_sim             clip: above it are duplicates
    group               random, clip: field; images that share it are never paired
    step                noise: diffusion step of 1000
    """

    out: str = NEEDED
    kind: Literal[*MADE, "random", "clip"] = "clip"
    seed: int = 0
    encoder: str = "openai/clip-vit-large-patch14-336"
    min_sim: float = -1.0
    max_sim: float = 0.98
    group: str = None
    step: int = 500


def main(argv=None):
    run_command(contrast, parse(Options, __doc__, argv))


if __name__ == "__main__":
    main()
