"""Test sets of the tiny world in the benchmarks' own formats, from known truth."""

import base64
import json
import random
from pathlib import Path

from support.files import write_json, write_lines
from tiny.model import DESCRIBE
from tiny.world import (
    CHOICES,
    KINDS,
    NOUNS,
    absent_partners,
    ask,
    caption,
    content,
    edits,
    is_usual,
    names,
    new_scenes,
    png,
    questions,
    random_choice,
    random_question,
    truth,
    yes_no,
)

AMBER_TYPES = {
    "exists": "discriminative-hallucination",
    "state": "discriminative-attribute-state",
    "number": "discriminative-attribute-number",
    "contact": "discriminative-relation",
}


# Training steps by stage; scenes by split; preference records wanted.
SIZES = json.loads(Path(__file__).with_name("sizes.json").read_text())


def draw_splits(size, seed):
    """(random generator, contents of all scenes so far, {split: scenes}): test scenes first, and no
    scene twice. Those of HallusionBench are pairs, with questions."""
    rng, seen, splits = random.Random(seed), set(), {}
    for name in ("amber", "amber_val", "hallusionbench", "objhal", "mmstar", "val", "prefs"):
        splits[name] = new_scenes(rng, size[name], 0.5, seen)
    pairs = [flipped_pair(scene, rng, seen) for scene in splits["hallusionbench"]]
    splits["hallusionbench"] = pairs
    return rng, seen, splits


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value)


def write_amber(folder, scenes, rng):
    """AMBER: a caption and up to five questions for each image."""
    captions, attributes, existences, relations = [], [], [], []  # (image, query, note)
    for i, scene in enumerate(scenes, 1):
        image = f"AMBER_{i}.png"
        write(folder / "image" / image, png(scene))
        note = {"type": "generative", "truth": names(scene), "hallu": absent_partners(scene)}
        captions.append((image, DESCRIBE[0], note))
        for asked, kind, answer in (
            (existences, "exists", True),
            (existences, "exists", False),
            (attributes, "state", i % 2 == 0),
            (attributes, "number", i % 4 < 2),
            (relations, "contact", i % 4 < 2),
        ):
            question = random_question(kind, scene, rng, answer, hard=1)
            if question:  # else no two objects are in contact, or all
                note = {"type": AMBER_TYPES[kind], "truth": yes_no(answer).lower()}
                asked.append((image, ask(question), note))

    annotations, queries = [], []
    told = captions + attributes + existences + relations
    for id, (image, query, note) in enumerate(told, 1):
        annotations.append({"id": id, **note})
        queries.append({"id": id, "image": image, "query": query})
    write_json(folder / "query" / "query_all.json", queries)
    write_json(folder / "annotations.json", annotations)
    write_json(folder / "relation.json", {noun: [] for noun in NOUNS})
    write(folder / "safe_words.txt", b"object\nimage")


def flipped_pair(scene, rng, seen):
    """The scene and an edit of it, and questions: the edit flips the first and keeps the others."""
    pool = []
    for kind in KINDS:
        pool += questions(kind, scene)
    usual = [question for question in pool if is_usual(question, scene)]
    rng.shuffle(usual)
    first, other = first_flip(scene, usual + rng.sample(pool, len(pool)), rng, seen)
    asked = [first]
    for answer in (True, False):
        alike = [q for q in pool if truth(q, scene) is truth(q, other) is answer]
        asked.append(rng.choice(alike))
    seen.add(content(other))
    return [scene, other], asked


def first_flip(scene, asked, rng, seen):
    """The first question that an edit flips, and that edit."""
    for question in asked:
        flipped = not truth(question, scene)
        for other in edits(scene, rng):
            if content(other) not in seen and truth(question, other) is flipped:
                return question, other
    raise AssertionError("every scene has an edit that flips a question")


def write_hallusionbench(folder, pairs):
    """HallusionBench: the same questions about an image and about a minimal edit of it."""
    items = []
    for number, (pair, asked) in enumerate(pairs):
        for figure, shown in enumerate(pair):
            filename = f"./VD/figure/{number}_{figure}.png"
            write(folder / filename, png(shown))
            for k, question in enumerate(asked):
                answer = truth(question, shown)
                items.append(
                    {
                        "category": "VD",
                        "subcategory": "figure",
                        "visual_input": str(figure + 1),
                        "set_id": str(number),
                        "figure_id": str(figure),
                        "sample_note": "tiny world",
                        "question_id": str(k),
                        "question": ask(question),
                        "gt_answer_details": f"{yes_no(answer)}. It shows {caption(shown)}.",
                        "gt_answer": str(int(answer)),
                        "filename": filename,
                    }
                )
    write_json(folder / "HallusionBench.json", items)


def write_objhal(folder, scenes):
    """Object-HalBench: images inside the question file, truth as COCO captions and instances."""
    items, parts = [], [([], []), ([], [])]
    for i, scene in enumerate(scenes, 1):
        captions, instances = parts[i % 2]
        image = base64.b64encode(png(scene)).decode()
        prompt = DESCRIBE[i % 2]
        items.append({"org_idx": i - 1, "image_id": i, "question": prompt, "image": image})
        captions.append({"image_id": i, "id": i, "caption": f"A picture of {caption(scene)}."})
        for k, noun in enumerate(names(scene)):
            category = NOUNS.index(noun) + 1
            instances.append({"image_id": i, "id": 10 * i + k, "category_id": category})
    write_lines(folder / "obj_halbench_300_with_image.jsonl", items)
    categories = [{"id": i, "name": noun} for i, noun in enumerate(NOUNS, 1)]
    for split, (captions, instances) in zip(("val", "train"), parts):  # as COCO is split
        write_json(folder / f"captions_{split}2014.json", {"annotations": captions})
        found = {"annotations": instances, "categories": categories}
        write_json(folder / f"instances_{split}2014.json", found)
    write(folder / "synonyms_refine.txt", "\n".join(NOUNS).encode())


def write_mmstar(folder, scenes, rng):
    """MMStar: multiple choice, in this world's own three categories."""
    items = []
    for i, scene in enumerate(scenes):
        kind = CHOICES[i % len(CHOICES)]
        question, answer = random_choice(kind, scene, rng)
        items.append(
            {
                "index": i,
                "question": question,
                "answer": answer,
                "category": kind,
                "l2_category": kind,
                "bench": "tiny world",
                "image": base64.b64encode(png(scene)).decode(),
            }
        )
    write_lines(folder / "mmstar.jsonl", items)
