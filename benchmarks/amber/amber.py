"""AMBER (Wang et al. 2023): which objects do captions invent, and are yes/no questions answered
right? https://github.com/junyangwang0410/AMBER; numbers as its official scorer's, to the digit.

    query/query_all.json   [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}, ...]
    annotations.json       [{"id": 1, "type": "generative", "truth": [...], "hallu": [...]}, ...
                            {"id": 1005, "type": "discriminative-hallucination", "truth": "yes"}]
    relation.json          {"person": ["man", ...], ...}, the words that stand for an object
    safe_words.txt         nouns that are never counted as wrong
    answers                [{"id": 1, "response": "..."}, ...]

Protocol "symmpo" (the paper's) first turns a free answer into Yes or No; "official" does not. Every
noun is lemmatised before it is looked up, as officially: so the scorer never meets "chopsticks",
"earrings" or "sunglasses", which are in the vocabulary in the plural only, and drops them.
"""

from collections import Counter, defaultdict

from benchmarks.common import (
    find,
    need_fields,
    question_about,
    read,
    word_list,
)
from benchmarks.words import noun_reader, similarity
from support.cli import UserError

ITEMS, ANSWER, JUDGE = 15220, "response", "none"
FILES = ("query/query_all.json", "annotations.json", "relation.json", "safe_words.txt")
COLUMNS = {  # of the report: heading -> where it stands in the metrics
    "Acc↑": ("discriminative", "Accuracy"),
    "F1↑": ("discriminative", "F1"),
    "CHAIR↓": ("generative", "CHAIR"),
    "Cover↑": ("generative", "Cover"),
    "Hal↓": ("generative", "Hal"),
    "Cog↓": ("generative", "Cog"),
}
# of_dimension: the parts of AMBER that a dimension on the command line measures. of_type: those in
# which an answer to a question of a type counts.
PARTS = read(word_list("amber", "parts.json"))


def questions(folder, settings):
    notes = read(find(folder, "annotations.json"))
    wanted = set(PARTS["of_dimension"][settings.dimension])
    asked = []
    for row in read(find(folder, "query/query_all.json")):
        if wanted.isdisjoint(PARTS["of_type"][notes[row["id"] - 1]["type"]]):
            continue
        asked.append(question_about(row, row["query"], row["image"], folder, "image", settings))

    def captions_then_images(question):
        note = notes[question.record["id"] - 1]
        return note["type"] != "generative", question.image

    return sorted(asked, key=captions_then_images)  # an image's yes/no questions: read together


def score(answers, folder, settings):
    """(metrics, how texts were read)."""
    need_fields(answers, {ANSWER: str, "id": int})
    notes = read(find(folder, "annotations.json"))
    captions, yes_no = Captions(folder, settings.similar), defaultdict(YesNo)
    for number, answer in enumerate(answers, start=1):
        if not 0 < answer["id"] <= len(notes):
            raise UserError(f"answer {number}: AMBER has no question with the id {answer['id']}")
        note, text = notes[answer["id"] - 1], answer[ANSWER]
        if note["type"] == "generative":
            captions.add(text, note)
            continue
        said = yes_or_no(text) if settings.protocol == "symmpo" else text
        for part in PARTS["of_type"][note["type"]]:
            yes_no[part].add(said, note["truth"].title())
    metrics = {}
    for part in PARTS["of_dimension"][settings.dimension]:
        if part == "generative":
            metrics[part] = captions.metrics()
        else:
            metrics[part] = yes_no[part].metrics(part)
    return metrics, captions.reading if captions.count["captions"] else settings.protocol


def ratio(above, below, start=0.001):
    """In percent, one decimal; the official scorer starts every denominator at 0.001."""
    return round(100 * above / (below + start), 1)


class Captions:
    """CHAIR   mentions that are not in the image, among all mentions
    Cover   objects in the image that are mentioned, among those objects
    Hal     captions with a wrong mention
    Cog     likely inventions (the annotators' `hallu` lists) that are mentioned, among these"""

    def __init__(self, folder, similar=None):
        self.relation = read(find(folder, "relation.json"))
        self.safe = find(folder, "safe_words.txt").read_text(encoding="utf-8").split("\n")
        self.known = {word for name, words in self.relation.items() for word in (name, *words)}
        self.tokens, reader = noun_reader(read(word_list("amber", "lemma_table.json")))
        self.alike, judge = similarity(similar)
        self.reading = f"{reader}; similarity: {judge}"
        self.count = Counter()

    def add(self, text, note):
        mentions = [lemma for lemma, noun in self.tokens(text) if noun and lemma in self.known]
        covered, invented, wrong = set(), set(), 0
        for word in mentions:
            if word in self.safe:
                continue
            there = self.named_by(word, note["truth"], str.__eq__)
            if there is None:
                invented.add(self.named_by(word, note["hallu"], str.__eq__))
                invented.add(self.named_by(word, note["hallu"], self.alike))
                there = self.named_by(word, note["truth"], self.alike)
            covered.add(there)
            wrong += there is None
        self.count["captions"] += 1
        self.count["with wrong"] += wrong > 0
        self.count["mentions"] += len(mentions)
        self.count["wrong"] += wrong
        self.count["objects"] += len(note["truth"])
        self.count["covered"] += len(covered - {None})
        self.count["likely"] += len(note["hallu"])
        self.count["invented"] += len(invented - {None})

    def named_by(self, word, objects, same):
        """The first object that the word stands for: by an association, or else by its name."""
        for thing in objects:
            if any(same(word, other) for other in self.relation.get(thing, [])):
                return thing
        for thing in objects:
            if same(word, thing):
                return thing
        return None

    def metrics(self):
        n = self.count
        return {
            "CHAIR": ratio(n["wrong"], n["mentions"]),
            "Cover": ratio(n["covered"], n["objects"]),
            "Hal": ratio(n["with wrong"] + 0.001, n["captions"]),  # officially 100 - those without
            "Cog": ratio(n["invented"], n["likely"]),
        }


class YesNo:
    """Accuracy, and precision, recall and F1 of the answer "No", as officially."""

    def __init__(self):
        self.count = Counter()

    def add(self, said, truth):
        self.count["asked"] += 1
        self.count["right"] += said == truth
        self.count["said no"] += said == "No"
        self.count["is no"] += truth == "No"
        self.count["both no"] += said == truth == "No"

    def metrics(self, part):
        n = self.count
        start = 0.003 if part == "attribute" else 0.001  # attribute sums three denominators
        found = {
            "Accuracy": ratio(n["right"], n["asked"], start),
            "Precision": ratio(n["both no"], n["said no"], start),
            "Recall": ratio(n["both no"], n["is no"], start),
        }
        p, r = found["Precision"] / 100, found["Recall"] / 100  # of the rounded ones
        found["F1"] = ratio(2 * p * r, p + r, 0.001 if part == "existence" else 0.0001)
        return found


def yes_or_no(text):
    """A free answer as "Yes" or "No": by its first five letters, its last five, or anywhere.

    A short unclear one is Yes, and a long one stays as it is."""
    low = text.lower()
    places = [low, "yes"] if len(low) < 8 else [low[:5], low[-5:], low]
    for place in places:
        if "yes" in place:
            return "Yes"
        if "no" in place:
            return "No"
    return text
