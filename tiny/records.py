"""Preference records of the tiny world: the model's own errors against an imperfect captioner.

    python -m tiny.records --out DIR --error 0.2 --kinds crop     others than those of tiny/built

As in SymMPO's pipeline, what is right is what a captioner sees, who misses and misnames things at a
set rate (`glimpse`): chosen responses are never better than that, and a rejected one may be right.
At --error 0 they are the truth. The contrast image is one of which the rejected response is true:
an edit of the image ("edit"), or the scene most like it ("neighbour"). Of the kinds that only show
less, "crop" keeps a ninth, "noise" and "black" nothing.
"""

import random
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from PIL import Image

from support.cli import NEEDED, UserError, check_numbers, parse, run_command
from support.files import write_lines
from support.images import noise
from tiny.model import DESCRIBE, reply
from tiny.sets import SIZES, draw_splits, write
from tiny.world import (
    CELL,
    CELLS,
    KINDS,
    NOUNS,
    ask,
    caption,
    content,
    draw,
    edits,
    glimpse,
    invented,
    make_true,
    names,
    neighbour,
    place,
    png,
    random_question,
    truth,
    yes_no,
)

LESS = ("crop", "noise", "black")  # kinds of contrast image that show less than the image


@dataclass
class Writer:
    """Writes records about the scenes from what the model says of them."""

    model: torch.nn.Module
    prompts: object  # vlm.prompts.Prompts
    scenes: list
    rng: random.Random
    seen: set  # contents of all scenes so far; it grows by the edits that are made
    error: float = 0.1  # how often the captioner misses or misnames an object
    kinds: tuple = ("edit", "neighbour")

    def see(self, scene):
        return glimpse(scene, self.error)

    def captions(self):
        """Records whose rejected caption is the model's own sample, and names an object that the
        captioner does not see."""
        asked = [(scene, self.rng.choice(DESCRIBE)) for scene in self.scenes]
        samples = [reply(self.model, self.prompts, asked, temperature=1.0) for _ in range(3)]
        records = []
        for (scene, prompt), *texts in zip(asked, *samples):
            chosen = caption(self.see(scene))
            wrong = sorted({text for text in texts if invented(text, self.see(scene))})
            order = self.rng.sample(self.kinds, len(self.kinds))
            for text, kind in zip(wrong, cycle(order)):
                other = self.contrast_of_caption(scene, text, kind)
                if other is None:
                    continue
                other_chosen = caption(self.see(other))
                if other_chosen == chosen:
                    continue
                records.append(
                    {
                        "image": scene,
                        "prompt": prompt,
                        "chosen": chosen,
                        "rejected": text,
                        "contrast_image": other,
                        "contrast_chosen": other_chosen,
                        "kind": kind,
                        "task": "caption",
                    }
                )
        return records

    def contrast_of_caption(self, scene, text, kind):
        """A scene with what the caption invents, or one that shows less; None if there is none."""
        if kind in LESS:
            return less_of(scene, kind, self.rng)
        false = invented(text, self.see(scene))[0]
        if kind == "neighbour":
            return neighbour(scene, self.scenes, lambda other: false in names(other))
        other = make_true(scene, text, self.rng)
        if other is None or content(other) in self.seen:
            return None
        self.seen.add(content(other))
        return other

    def questions(self):
        """Records of the yes/no questions that the model gets wrong, as the captioner sees it. The
        answer that is wrong of the image is right of the contrast image. Where that only shows
        less, nobody knows an answer, and there are none."""
        if set(self.kinds) <= set(LESS):
            return []
        asked = []
        for scene in self.scenes:
            asked += [(scene, ("exists", noun)) for noun in NOUNS]
            for kind in KINDS[1:]:
                question = random_question(kind, scene, self.rng)
                if question:
                    asked.append((scene, question))
        pairs = [(scene, ask(question)) for scene, question in asked]
        records = []
        for (scene, question), text in zip(asked, reply(self.model, self.prompts, pairs)):
            right = truth(question, self.see(scene))
            if right is None or text == yes_no(right):
                continue
            kind, other = self.contrast_of_question(scene, question, right)
            if other is None:
                continue
            self.seen.add(content(other))
            wrong = yes_no(not right)
            records.append(
                {
                    "image": scene,
                    "prompt": ask(question),
                    "chosen": yes_no(right),
                    "rejected": wrong,
                    "contrast_image": other,
                    "contrast_chosen": wrong,
                    "kind": kind,
                    "task": question[0],
                }
            )
        self.rng.shuffle(records)
        return records

    def contrast_of_question(self, scene, question, right):
        """(kind, a scene in which the captioner sees the other answer, or None)."""

        def flips(other):
            return truth(question, self.see(other)) is (not right)

        if "edit" in self.kinds and self.rng.random() < 0.7:
            for other in edits(scene, self.rng):
                if flips(other) and content(other) not in self.seen:
                    return "edit", other
        return "neighbour", neighbour(scene, self.scenes, flips)


def less_of(scene, kind, rng):
    """What is left of the scene, with its "picture", which `draw` would not give."""
    picture = draw(scene)
    kept = {}
    if kind == "black":
        less = Image.new("RGB", picture.size)
    elif kind == "noise":
        less = noise(picture, rng)
    else:
        cell = rng.choice(CELLS)  # mDPO keeps less than a fifth of the image
        left, top = cell % 3 * CELL, cell // 3 * CELL
        less = picture.crop((left, top, left + CELL, top + CELL)).resize(picture.size)
        if cell in scene["cells"]:
            kept = {4: scene["cells"][cell]}
    return {**place(scene["look"], kept), "picture": less}


def write_records(path, records, files):
    """prefs.jsonl; `files` maps scenes to their image files and grows."""

    def file(scene):
        key = scene["look"], content(scene), id(scene.get("picture"))
        if key not in files:
            files[key] = f"images/{len(files):04d}.png"
            write(path.parent / files[key], png(scene))
        return files[key]

    lines = []
    for record in records:
        images = {"image": file(record["image"]), "contrast_image": file(record["contrast_image"])}
        lines.append({**record, **images})
    write_lines(path, lines)


@dataclass
class Options:
    """What is typed.

    out                 folder for prefs.jsonl and its images
    error               the captioner's, 0 to 1
    kinds               of contrast image, "crop black": edit, neighbour, crop, noise, black
    number              only so many records
    captions            no yes/no questions
    """

    out: Path = NEEDED
    error: float = 0.1
    kinds: str.split = "edit neighbour"
    number: int = None
    captions: bool = False


def make(args):
    from vlm.load import load_model
    from vlm.prompts import prompts_for

    check_numbers(args, above_0=("number",))
    unknown = set(args.kinds) - {"edit", "neighbour", *LESS}
    if unknown or not args.kinds or args.error > 1:
        raise UserError(
            f"--kinds {' '.join(args.kinds)} --error {args.error}: kinds are edit, neighbour, "
            "crop, noise and black, and an error is 0 to 1"
        )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = load_model(Path(__file__).with_name("built") / "model")
    prompts = prompts_for(model.config, processor)
    rng, seen, splits = draw_splits(SIZES["full"], seed=1)
    writer = Writer(model, prompts, splits["prefs"], rng, seen, args.error, tuple(args.kinds))
    records = writer.captions()
    if not args.captions:
        records += writer.questions()
    rng.shuffle(records)
    records = records[: args.number]
    write_records(args.out / "prefs.jsonl", records, {})
    print(f"{args.out / 'prefs.jsonl'}: {len(records):,} records")


def main(argv=None):
    run_command(make, parse(Options, __doc__, argv))


if __name__ == "__main__":
    main()
