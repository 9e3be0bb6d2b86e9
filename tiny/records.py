"""Preference records of the tiny world: the model's own errors against the truth.

The contrast image is an edit of the image that makes the error true ("edit"), or the scene most
like it for which it is true ("neighbour").
"""

from tiny.model import DESCRIBE, reply
from tiny.world import (
    KINDS,
    NOUNS,
    ask,
    caption,
    content,
    edits,
    invented,
    make_true,
    names,
    neighbour,
    objects,
    random_question,
    truth,
    yes_no,
)


def record_of(scene, prompt, said, other, kind, task):
    """said: chosen, rejected and contrast_chosen."""
    chosen, rejected, contrast_chosen = said
    return {
        "image": scene,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "contrast_image": other,
        "contrast_chosen": contrast_chosen,
        "kind": kind,
        "task": task,
    }


def caption_records(model, prompts, scenes, rng, seen):
    """Records whose rejected caption is the model's own sample and names an absent object."""
    asked = [(scene, rng.choice(DESCRIBE)) for scene in scenes]
    samples = [reply(model, prompts, asked, sample=True) for _ in range(3)]
    records = []
    for (scene, prompt), *texts in zip(asked, *samples):
        wrong = sorted({text for text in texts if invented(text, scene)})
        for kind, text in zip(rng.sample(["edit", "neighbour"], 2), wrong):
            other = contrast_of_caption(scene, scenes, text, kind, rng)
            if other is None or (kind == "edit" and content(other) in seen):
                continue
            seen.add(content(other))
            said = caption(objects(scene)), text, caption(objects(other))
            records.append(record_of(scene, prompt, said, other, kind, "caption"))
    return records


def contrast_of_caption(scene, scenes, text, kind, rng):
    """A scene with the object that the caption invents, or None."""
    if kind == "edit":
        return make_true(scene, text, rng)
    false = invented(text, scene)[0]
    return neighbour(scene, scenes, lambda other: false in names(other))


def question_records(model, prompts, scenes, rng, seen):
    """Records of the yes/no questions that the model gets wrong; true of the contrast image is the
    answer that is wrong for the image."""
    asked = []
    for scene in scenes:
        asked += [(scene, ("exists", noun)) for noun in NOUNS]
    for scene in scenes:
        asked += [(scene, random_question(kind, scene, rng)) for kind in KINDS[1:]]
    texts = reply(model, prompts, [(scene, ask(question)) for scene, question in asked])
    records = []
    for (scene, question), text in zip(asked, texts):
        right = truth(question, scene)
        if text == yes_no(right):
            continue
        kind, other = contrast_of_question(scene, scenes, question, rng, seen)
        if other is None:
            continue
        seen.add(content(other))
        said = yes_no(right), yes_no(not right), yes_no(not right)
        records.append(record_of(scene, ask(question), said, other, kind, question[0]))
    rng.shuffle(records)
    return records


def contrast_of_question(scene, scenes, question, rng, seen):
    """(kind, a scene in which the answer is the other one, or None)."""
    right = truth(question, scene)

    def flips(other):
        return truth(question, other) is (not right)

    flipped = [other for other in edits(scene, rng) if flips(other)]
    near = [other for other in flipped if content(other) not in seen]
    if near and rng.random() < 0.7:
        return "edit", near[0]
    return "neighbour", neighbour(scene, scenes, flips)
