"""Give every record a contrast image, of one of seven kinds.

    python -m construct.contrast images/ --out images/pairs.jsonl --kind clip

crop (mDPO's) and clip (SymMPO's) are made by data.py; the others are for comparison (notebook 6).
Pictures that you made yourself (synthetic, in SymMPO's Fig. 4) need no command: name them
contrast_image in the records.
"""

import os
import random
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from data import embed, nearest
from support.cli import UserError, new_parser, run_command, within
from support.files import write_lines
from support.images import CROP_LARGE, crop, moco, noise, open_image
from support.records import Records, add_data_options, need_other, with_files

# Kinds that are made from the image itself: (image, random generator, args) -> image
MADE = {
    "crop": lambda image, rng, args: crop(image, rng),
    "crop-large": lambda image, rng, args: crop(image, rng, CROP_LARGE),
    "black": lambda image, rng, args: Image.new("RGB", image.size),
    "noise": lambda image, rng, args: noise(image, rng, args.step),
    "moco": lambda image, rng, args: moco(image, rng),
}


def choose(args, given):
    """{path of an image: (its contrast image, cosine or None)} for the kinds that take another
    record's image; one for which no other will do is left out. given: (fields, files) of each
    record."""
    group_of = {}
    for fields, files in given:
        group_of[files["image"]] = str(fields.get(args.group, files["image"]))
    images, chosen = list(group_of), {}
    if args.kind == "random":
        rng = random.Random(args.seed)
        for image in images:
            for other in rng.choices(images, k=20):
                if group_of[other] != group_of[image]:
                    chosen[image] = (other, None)
                    break
        return chosen

    vectors, pixels = embed(images, args.encoder, Path(args.out).with_suffix(""))
    same_pixels, same_group = numbered(pixels), numbered(group_of.values())
    index, cosines = nearest(vectors, [same_pixels, same_group], args.max_sim)
    for image, i, cosine in zip(images, index.tolist(), cosines.tolist()):
        if cosine >= args.min_sim:
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

    chosen = {} if args.kind in MADE else choose(args, given)
    lines = []
    for number, (fields, files) in enumerate(tqdm(given, desc=args.kind, unit=" records")):
        image = files["image"]
        if args.kind in MADE:
            seed = f"{args.seed} {number} {fields['image']}"
            rng = random.Random(seed.encode("utf-8", "replace"))  # a path may be none
            other, cosine = folder / f"{number:06d}.png", None
            MADE[args.kind](open_image(str(image)), rng, args).save(other)
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


def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add_data_options(parser, "folder of images, record file, folder of them, or quoted glob")
    add("--out", required=True, help="FILE.jsonl beside the images; made pictures go to FILE/")
    add("--kind", default="clip", choices=(*MADE, "random", "clip"))
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
    run_command(contrast, parser.parse_args(argv))


if __name__ == "__main__":
    main()
