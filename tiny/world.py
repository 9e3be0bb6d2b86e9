"""The tiny world: 48 x 48 images of coloured objects, and everything that is true about them.

A scene is {"look": seed, "cells": {cell: (noun, color)}} on a grid of 3 x 3 cells of 16 pixels. Six
objects, the anchors (fork, table, ...), usually come with a partner (knife, chair, ...), and each
object usually has one color: this is what the tiny model learns to hallucinate by. Objects whose
cells share an edge are in contact. A question is a tuple such as ("exists", "knife") with a wording
(`ask`) and a truth in a scene (`truth`).
"""

import io
import json
import random
from itertools import combinations, product
from pathlib import Path

# pairs: each anchor's partner. bias: how often biased labels name the absent partner of an anchor
# that is there. usual: each object's color, half of the time. ink: RGB. sentences: AMBER's words
# for each kind of question; short: those of the model's first lessons. glyphs: each object as
# PIL.ImageDraw shapes on a 16 x 16 cell; a "hole" is painted in the background colour.
WORLD = json.loads(Path(__file__).with_name("world.json").read_text())
PAIRS, BIAS, USUAL, INK = WORLD["pairs"], WORLD["bias"], WORLD["usual"], WORLD["ink"]
GLYPHS, NUMBERS = WORLD["glyphs"], WORLD["numbers"]
ANCHOR_OF = {partner: anchor for anchor, partner in PAIRS.items()}
NOUNS = sorted([*PAIRS, *PAIRS.values()])
COLORS = list(INK)
KINDS = ["exists", "state", "number", "contact"]  # of yes/no questions
CHOICES = ["objects", "numbers", "colors"]  # of multiple-choice questions
CELLS = range(9)
CELL, SIDE = 16, 48  # pixels


# --- scenes ------------------------------------------------------------------------------------


def new_scene(rng, partner):
    """Up to three anchors, each with its partner at probability `partner`, and up to two others."""
    anchors = rng.sample(list(PAIRS), rng.choice([1, 2, 3]))
    nouns = anchors + [PAIRS[a] for a in anchors if rng.random() < partner]
    # The others are partners without their anchor, so that an anchor alone predicts its partner.
    nouns += rng.sample([PAIRS[a] for a in PAIRS if a not in anchors], rng.choice([0, 1, 2]))
    cells = rng.sample(CELLS, len(nouns))
    look = rng.randrange(10**6)
    things = [(noun, new_color(noun, rng)) for noun in nouns]
    return place(look, zip(cells, things))


def new_color(noun, rng):
    return USUAL[noun] if rng.random() < 0.5 else rng.choice(COLORS)


def place(look, cells):
    """A scene, its cells in reading order."""
    return {"look": look, "cells": dict(sorted(dict(cells).items()))}


def new_scenes(rng, count, partner, seen):
    """`count` scenes whose content is not in `seen` yet; all splits share and fill `seen`."""
    scenes = []
    while len(scenes) < count:
        scene = new_scene(rng, partner)
        if len(scene["cells"]) > 1 and content(scene) not in seen:
            seen.add(content(scene))
            scenes.append(scene)
    return scenes


def content(scene):
    """What is where, without the look: equal for scenes that show the same."""
    return tuple(scene["cells"].items())


def objects(scene):
    """[(noun, color), ...] as captions tell them: in reading order, a partner after its anchor."""
    there = dict(scene["cells"].values())
    told = []
    for noun in there:
        if ANCHOR_OF.get(noun) in there:
            continue  # told with its anchor
        told.append(noun)
        if PAIRS.get(noun) in there:
            told.append(PAIRS[noun])
    return [(noun, there[noun]) for noun in told]


def names(scene):
    return [noun for noun, _ in objects(scene)]


def absent(scene):
    there = names(scene)
    return [noun for noun in NOUNS if noun not in there]


def absent_partners(scene):
    """What a model that knows only how often things go together would add."""
    missing = absent(scene)
    return [PAIRS[noun] for noun in names(scene) if PAIRS.get(noun) in missing]


def in_contact(scene, noun, other):
    """Do their cells share an edge?"""
    cell_of = {thing[0]: cell for cell, thing in scene["cells"].items()}
    if noun not in cell_of or other not in cell_of:
        return False
    row, column = divmod(cell_of[noun], 3)
    other_row, other_column = divmod(cell_of[other], 3)
    return abs(row - other_row) + abs(column - other_column) == 1


def edits(scene, rng):
    """Every scene one change away, in random order: an object added, removed, recoloured, moved."""
    cells = scene["cells"]
    empty = [cell for cell in CELLS if cell not in cells]
    changed = []  # what is in which cell
    for cell, (noun, color) in cells.items():
        changed += [{**cells, cell: (noun, other)} for other in COLORS if other != color]
        rest = {c: thing for c, thing in cells.items() if c != cell}
        if rest:
            changed.append(rest)
        changed += [{**rest, free: (noun, color)} for free in empty]
    for cell in empty:
        changed += [{**cells, cell: (noun, new_color(noun, rng))} for noun in absent(scene)]
    rng.shuffle(changed)
    return [place(scene["look"], cells) for cells in changed]


def glimpse(scene, error):
    """The scene as an imperfect captioner sees it: at the rate `error` an object is missed, or as
    often taken for another one that is not there. The same scene is always seen in the same way."""
    rng = random.Random(f"{scene['look']} {content(scene)}")
    seen, others = {}, absent(scene)
    rng.shuffle(others)
    for cell, (noun, color) in scene["cells"].items():
        luck = rng.random()
        if luck < error / 2:
            continue  # missed
        if luck < error and others:
            noun = others.pop()
        seen[cell] = noun, color
    return place(scene["look"], seen or scene["cells"])


def make_true(scene, text, rng):
    """The scene plus the one object that a caption invents; None when it invents none or several,
    or without its color, or there is no room."""
    false, words = invented(text, scene), text.split()
    empty = [cell for cell in CELLS if cell not in scene["cells"]]
    if len(false) != 1 or not empty:
        return None
    color = words[words.index(false[0]) - 1]
    if color not in COLORS:
        return None
    return place(scene["look"], {**scene["cells"], rng.choice(empty): (false[0], color)})


def neighbour(scene, scenes, wanted):
    """The scene that shares most objects with this one among those for which `wanted` holds."""

    def likeness(other):
        shared = set(names(scene)) & set(names(other))
        return len(shared) - 0.1 * len(names(other))

    others = [other for other in scenes if other is not scene and wanted(other)]
    return max(others, key=likeness, default=None)


# --- pictures ----------------------------------------------------------------------------------


def draw(scene):
    """A 48 x 48 RGB image. `look` varies shade and place, in the same way for a scene's edits."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIDE, SIDE))
    for cell in CELLS:
        rng = random.Random(scene["look"] * 9 + cell)
        paper = tuple(rng.randint(225, 250) for _ in range(3))
        shift, shade = (rng.randint(0, 1), rng.randint(0, 1)), rng.uniform(0.85, 1.1)
        tile = Image.new("RGB", (CELL, CELL), paper)
        pen = ImageDraw.Draw(tile)
        if cell in scene["cells"]:
            noun, color = scene["cells"][cell]
            ink = tuple(min(255, int(shade * v)) for v in INK[color])
            for shape, box, *hole in GLYPHS[noun]:
                corners = [v - shift[i % 2] for i, v in enumerate(box)]
                getattr(pen, shape)(corners, fill=paper if hole else ink)
        image.paste(tile, (cell % 3 * CELL, cell // 3 * CELL))
    return image


def png(scene):
    """The bytes of a PNG file: of the scene's own "picture", or as it is drawn. A palette loses
    nothing of a drawing, there are ≤ 18 colours."""
    buffer = io.BytesIO()
    image = scene.get("picture") or draw(scene).quantize(64)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# --- captions and questions --------------------------------------------------------------------


def caption(scene, things=()):
    """All objects of a scene, or the things [(noun, color), ...] that are said of it."""
    text, last = "", None
    for noun, color in things or objects(scene):
        if last:
            text += " next to " if in_contact(scene, last, noun) else " and "
        text += f"a {color} {noun}"
        last = noun
    return text or "No objects in this image"


def biased_caption(scene, rng):
    """Names absent partners after their anchor, gives objects their usual color, and forgets one
    now and then."""
    said = []
    for noun, color in objects(scene):
        if rng.random() < 0.3:
            color = USUAL[noun]
        if rng.random() < 0.95:
            said.append((noun, color))
            partner = PAIRS.get(noun)
            if partner in absent_partners(scene) and rng.random() < BIAS[noun]:
                said.append((partner, USUAL[partner]))
    return caption(scene, said)


def mentioned(text):
    """The objects a caption names, in order, repeats included."""
    return [word for word in text.split() if word in NOUNS]


def invented(text, scene):
    """The objects a caption names that are not in the scene."""
    return [noun for noun in mentioned(text) if noun not in names(scene)]


def yes_no(answer):
    return "Yes" if answer else "No"


def ask(question, wording="sentences"):
    """The question in words, which are AMBER's, or in "short"."""
    kind, *args = question
    text = WORLD[wording][kind].format(*args)
    return text.replace("Are there one objects", "Is there one object")


def truth(question, scene):
    """True or False; None where an object whose color or contact is asked for is not there."""
    colors = dict(objects(scene))
    match question:
        case "exists", noun:
            return noun in colors
        case "number", number:
            return NUMBERS[len(colors)] == number
        case "state", noun, color if noun in colors:
            return colors[noun] == color
        case "contact", noun, other if noun in colors and other in colors:
            return in_contact(scene, noun, other)
    return None


def random_question(kind, scene, rng, answer=None, hard=0.6):
    """A question of this kind whose truth is `answer` (None: either); None if there is none.

    hard: how often what is asked for and not so is what is usual: the partner of an object that is
    there, its usual color, contact with its partner.
    """
    if answer is None:
        answer = rng.random() < 0.5
    pool = [question for question in questions(kind, scene) if truth(question, scene) is answer]
    usual = [question for question in pool if is_usual(question, scene)]
    if not answer and usual and rng.random() < hard:
        pool = usual
    return rng.choice(pool) if pool else None


def is_usual(question, scene):
    """Would one who knows only how things usually are say yes?"""
    match question:
        case "exists", noun:
            return noun in absent_partners(scene)
        case "state", noun, color:
            return USUAL[noun] == color
        case "contact", noun, other:
            return PAIRS.get(noun) == other
    return False  # no number is usual


def questions(kind, scene):
    """Every question of this kind; colors and contacts only of objects that are there."""
    there = names(scene)
    if kind == "exists":
        return [("exists", noun) for noun in NOUNS]
    if kind == "number":
        size = len(there)
        return [("number", NUMBERS[n]) for n in (size - 1, size, size + 1) if n > 0]
    if kind == "state":
        return [("state", *pair) for pair in product(there, COLORS)]
    return [("contact", *pair) for pair in combinations(there, 2)]


def random_choice(kind, scene, rng):
    """A multiple-choice question in MMStar's layout, and its letter."""
    noun, color = rng.choice(objects(scene))
    if kind == "objects":
        question, right = "Which object is in this image?", noun
        others = absent(scene)
    elif kind == "numbers":
        question, right = "How many objects are in this image?", NUMBERS[len(objects(scene))]
        others = NUMBERS[1:]
    else:
        question, right = f"What color is the {noun}?", color
        others = COLORS
    wrong = [other for other in others if other != right]
    options = rng.sample(wrong, 3) + [right]
    rng.shuffle(options)
    listed = ", ".join(f"{letter}: {option}" for letter, option in zip("ABCD", options))
    return f"{question}\nOptions: {listed}", "ABCD"[options.index(right)]
