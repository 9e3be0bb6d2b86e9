"""Object-HalBench (Rohrbach et al. 2018, as refined by RLHF-V): do descriptions name objects of
COCO that are not in the image? https://github.com/RLHF-V/RLAIF-V (eval); numbers as its scorer's.

    obj_halbench_300_with_image.jsonl   {"org_idx": 1, "image_id": 174482, "question":
                                         "Describe ...", "image": "(base64)"}, one a line
    annotations/*_{train,val}2014.json  COCO's instances and captions: what is there
    synonyms_refine.txt                 "person, girl, boy, ...": COCO's objects, their names
    answers                             {"question_id": 1, "image_id": 174482, "text": "..."}
    judgements                          JSON lists of the objects that a judge found in an answer

response_hallucination: answers with a wrong object, among those that name any (CHAIRs).
mention_hallucination: wrong mentions among all (CHAIRi). Without a judge the answers are parsed as
COCO's captions are ("caption mode").
"""

import contextlib
import json
import re
from collections import Counter, defaultdict
from itertools import groupby
from pathlib import Path

from benchmarks.common import HERE, Case, find, need_fields, question_about, read, rows_of
from benchmarks.words import noun_reader, phrase_reader
from support.cli import UserError

ITEMS, ANSWER, JUDGE = 300, "text", "optional"
COCO = (
    "annotations/instances_train2014.json",
    "annotations/instances_val2014.json",
    "annotations/captions_train2014.json",
    "annotations/captions_val2014.json",
)
COLUMNS = {"Resp.↓": "response_hallucination", "Ment.↓": "mention_hallucination"}


def questions(folder, settings):
    rows = rows_of(folder, "obj_halbench_300_with_image.jsonl")
    return [question_about(row, folder, "images", settings) for row in rows]


# --- the judge ------------------------------------------------------------------------------------


def is_unasked(row):
    """An answer that is too short to list objects: its judgement is []."""
    return len(without_speaker(row["text"]).split()) <= 3


def without_speaker(text):
    return text.replace("Assistant:", "")


def check_reply(text):
    """The last list of phrases in a reply, whatever stands around it, as JSON; else ValueError."""
    for place in reversed(re.findall(r"\[[^\[\]]*\]", text)):
        with contextlib.suppress(ValueError):
            if all(isinstance(phrase, str) for phrase in json.loads(place)):
                return place
    raise ValueError(f"no JSON list of objects: {text[:80]!r}")


# --- scoring --------------------------------------------------------------------------------------


def score(answers, folder, settings):
    """(metrics, how texts were read)."""
    need_fields(answers, {ANSWER: str, "image_id": (str, int)})
    names = Names(folder)
    count = Counter()
    truth = true_objects(folder, {int(row["image_id"]) for row in answers}, names)
    reading = f"no judge: caption mode, {names.reading}"
    if settings.judgements is not None:
        reading = f"judge; {names.phrase_reading}"
    for number, row in enumerate(answers):
        said = ""
        words = []
        if settings.judgements is None:
            named = names.in_text(without_speaker(row[ANSWER]))
        else:
            named = names.in_phrases(listed(row, settings.judgements[number]))
            said = ", ".join(word for word, _ in named)
        there = truth[int(row["image_id"])]
        for word, thing in named:
            kind = "true" if thing in there else "false"
            words.append((word, kind if thing else ""))
        kinds = Counter(kind for _, kind in words if kind)
        count.update(kinds, responses=len(kinds) > 0, hallucinated=kinds["false"] > 0)
        missed = sorted(there.difference(thing for _, thing in named))
        settings.cases.append(Case(kinds["false"] == 0, said, words=words, missed=missed))
    if count["responses"] == 0:
        raise UserError("no answer names any COCO object: there is nothing to score")
    metrics = {
        "response_hallucination": 100 * count["hallucinated"] / count["responses"],
        "mention_hallucination": 100 * count["false"] / (count["true"] + count["false"]),
    }
    return metrics, reading


def listed(row, reply):
    """The phrases that the judge lists for an answer."""
    if is_unasked(row):
        return []
    try:
        return json.loads(check_reply(reply))
    except ValueError as error:
        raise UserError(f"a judgement cannot be read, judge again: {error}") from error


class Names:
    """Reads COCO's objects out of texts: nouns, two-word names, synonyms."""

    def __init__(self, folder):
        try:
            path = find(folder, "synonyms_refine.txt")
        except UserError:
            path = HERE / "objhal/synonyms_refine.txt"
        self.object_of = {}  # a word -> the COCO object that it names
        for line in path.read_text(encoding="utf-8").strip().split("\n"):
            words = [word.strip() for word in line.split(",")]
            self.object_of |= dict.fromkeys(words, words[0])
        self.doubles = {word: word for word in self.object_of if " " in word}
        self.doubles |= read(HERE / "objhal/doubles.json")
        self.tokens, self.reading = noun_reader(read(HERE / "objhal/lemma_table.json"))
        table = read(HERE / "objhal/spacy_noun_lemma_table.json")
        self.phrase_tokens, self.phrase_reading = phrase_reader(table)

    def in_text(self, text):
        """[(word, the object that it names or None)], each time that the text does."""
        return self.objects(self.merge_doubles(self.tokens(text.lower())))

    def in_phrases(self, phrases):
        """The same of a judge's phrases; a name that comes twice counts once."""
        names = []
        for phrase in phrases:
            names += self.names_of_phrase(self.phrase_tokens(phrase))
        return self.objects([(name, name) for name in dict.fromkeys(names)])

    def objects(self, named):
        """[(word, its object or None)] of [(word, its name)]. A toilet's seat is no chair."""
        known = self.object_of
        if any(name == "toilet" for _, name in named):
            known = {**known, "seat": None}
        return [(word, known.get(name)) for word, name in named]

    def merge_doubles(self, tokens):
        """[(one word or two, their name)]: the lemmas, merged from left to right."""
        merged = []
        while tokens:
            double = " ".join(lemma for lemma, _, _ in tokens[:2])
            size = 2 if double in self.doubles else 1
            name = self.doubles.get(double, tokens[0][0])
            merged.append((" ".join(word for _, _, word in tokens[:size]), name))
            tokens = tokens[size:]
        return merged

    def names_of_phrase(self, tokens):
        """Of a phrase the two-word names alone or, if it has none, its runs of nouns."""
        merged = self.merge_doubles(tokens)
        doubles = [name for words, name in merged if len(words.split()) == 2]
        if doubles:
            return doubles
        runs = []
        for is_noun, run in groupby(tokens, key=lambda token: token[1]):
            if is_noun:
                runs.append(" ".join(lemma for lemma, _, _ in run))
        return runs


def true_objects(folder, ids, names):
    """{image id: its objects} from gt_objects*.json, else from COCO 2014's annotations."""
    truth = defaultdict(set)
    given = sorted(Path(folder).glob("gt_objects*.json"))
    if given:
        for image, objects in read(given[0]).items():
            truth[int(image)] = {names.object_of.get(name, name) for name in objects}
    else:
        for name in COCO:
            add_coco(truth, read(find(folder, name, Path(name).name)), ids, names)
    for image in ids - truth.keys():
        raise UserError(f"{folder}: nothing says what is in image {image}")
    return truth


def add_coco(truth, coco, ids, names):
    """The objects of one of COCO's files: its categories, or those that its captions name."""
    categories = {c["id"]: names.object_of[c["name"]] for c in coco.get("categories", [])}
    for note in coco["annotations"]:
        if note["image_id"] not in ids:
            continue
        if categories:
            truth[note["image_id"]].add(categories[note["category_id"]])
        else:
            named = names.in_text(note["caption"])
            truth[note["image_id"]].update(thing for _, thing in named if thing)
