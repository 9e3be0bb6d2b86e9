"""Give every record a contrast image, of one of eight kinds.

    python -m construct.contrast images/ --out images/pairs.jsonl --kind clip

crop (mDPO's) and clip (SymMPO's) are made by data.py; the others are for comparison (notebook 4).
"""

import argparse
import os
import random
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from data import IMAGES, Records, embed, nearest
from support.cli import UserError, run_command, within
from support.files import write_lines
from support.images import CROP_LARGE, crop, moco, need_inside, noise, open_image

# Kinds that are made from the image itself: (image, random generator, args) -> image
MADE = {
    "crop": lambda image, rng, args: crop(image, rng),
    "crop-large": lambda image, rng, args: crop(image, rng, CROP_LARGE),
    "black": lambda image, rng, args: Image.new("RGB", image.size),
    "noise": lambda image, rng, args: noise(image, rng, args.step),
    "moco": lambda image, rng, args: moco(image, rng),
}
TAKEN = ("random", "clip", "synthetic")  # kinds that take a picture that is there already


def choose(args, root, records):
    """{image: (its contrast image, cosine or None)} for the kinds in TAKEN; an image for which no
    other will do is left out."""
    if args.kind == "synthetic":
        folder, pairs = read_images(args.mapping, IMAGES)
        return {pair["image"]: (folder / pair["contrast_image"], None) for pair in pairs}

    group_of = {r["image"]: str(r.get(args.group, r["image"])) for r in records}
    images, chosen = list(group_of), {}
    if args.kind == "random":
        rng = random.Random(args.seed)
        for image in images:
            for other in rng.choices(images, k=20):
                if group_of[other] != group_of[image]:
                    chosen[image] = (root / other, None)
                    break
        return chosen

    cache = Path(args.out).with_suffix("")
    vectors, pixels = embed([root / image for image in images], args.encoder, cache)
    same_pixels, same_group = numbered(pixels), numbered(group_of.values())
    index, cosines = nearest(vectors, [same_pixels, same_group], args.max_sim)
    for image, i, cosine in zip(images, index.tolist(), cosines.tolist()):
        if cosine >= args.min_sim:
            chosen[image] = (root / images[i], round(cosine, 4))
    return chosen


def numbered(labels):
    """Labels as integers: equal ones get the same."""
    number = {}
    return torch.tensor([number.setdefault(label, len(number)) for label in labels])


def read_images(path, needed=("image",)):
    """(folder, [{"image", ...}]): the records of a file as they stand, or a folder's pictures.

    Raises UserError for a record without a path in one of the fields that are needed."""
    if os.path.isdir(path):
        endings = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
        names = sorted(name for name in os.listdir(path) if name.lower().endswith(endings))
        return Path(path), [{"image": name} for name in names]
    records = Records(path)
    raws = [records.raw(i) for i in range(len(records))]
    for i, raw in enumerate(raws):
        for name in needed:
            if not isinstance(raw.get(name), str):
                raise UserError(f"{records.file.source(i)}: the field {name} must hold a path")
    return records.root, raws


def contrast(args):
    """The command: the records again, each with a contrast image."""
    root, records = read_images(args.data)
    out = Path(args.out)
    if not records:
        raise UserError(f"{args.data}: no images there")
    if not out.suffix:
        raise UserError(f"--out {out}: a file name such as {out}.jsonl; pictures go into {out}/")
    for record in records:
        need_inside(record["image"], root, args.allow_outside)
    folder = out.with_suffix("")  # of the pictures that are made, or of the embeddings
    folder.mkdir(parents=True, exist_ok=True)

    chosen = choose(args, root, records) if args.kind in TAKEN else {}
    lines = []
    for number, record in enumerate(tqdm(records, desc=args.kind, unit=" records")):
        image = record["image"]
        if args.kind in MADE:
            rng = random.Random(f"{args.seed} {number} {image}")
            other, cosine = folder / f"{number:06d}.png", None
            MADE[args.kind](open_image(image, root), rng, args).save(other)
        elif image in chosen:
            other, cosine = chosen[image]
        else:
            continue
        found = {
            "image": os.path.relpath(root / image, out.parent),
            "contrast_image": os.path.relpath(other, out.parent),
            "contrast_kind": args.kind,
            "contrast_seed": args.seed,
            "similarity": cosine,
        }
        lines.append({**record, **found})
    write_lines(out, lines)
    print(f"{out}: {len(lines):,} records, {len(records) - len(lines):,} left out (no image fits)")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="records (.jsonl) or a folder of images")
    add("--out", required=True, help="FILE.jsonl beside the images; made pictures go to FILE/")
    add("--kind", default="clip", choices=(*MADE, *TAKEN))
    add("--seed", type=int, default=0)
    add("--encoder", default="openai/clip-vit-large-patch14-336", help="for clip")
    add("--min-sim", type=float, default=-1.0, help="clip: least cosine of a neighbour")
    add("--max-sim", type=float, default=0.98, help="clip: above it are duplicates (default 0.98)")
    add("--group", default="image", help="field; images that share it are never paired")
    add(
        "--step",
        type=within(1, 1000),
        default=500,
        help="noise: diffusion step of 1000 (default 500)",
    )
    add("--mapping", default="synthetic.jsonl", help="synthetic: file of {image, contrast_image}")
    add("--allow-outside", action="store_true", help="permit image paths out of the data's folder")
    run_command(contrast, parser.parse_args(argv))


if __name__ == "__main__":
    main()
