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

from benchmarks.common import HERE, Case, find, need_fields, question_about, read, rows_of
from benchmarks.words import noun_reader, similarity
from support.cli import UserError

ITEMS, ANSWER, JUDGE = 15220, "response", "none"
COLUMNS = {  # of the report: heading -> where it stands in the metrics
    "Acc↑": "discriminative.Accuracy",
    "F1↑": "discriminative.F1",
    "CHAIR↓": "generative.CHAIR",
    "Cover↑": "generative.Cover",
    "Hal↓": "generative.Hal",
    "Cog↓": "generative.Cog",
}
# of_dimension: the parts of AMBER that a dimension on the command line measures. of_type: those in
# which an answer to a question of a type counts.
PARTS = read(HERE / "amber/parts.json")


def questions(folder, settings):
    notes = notes_of(folder)
    captions = []
    yes_no = []
    wanted = set(PARTS["of_dimension"][settings.dimension])
    rows = list(notes.values())
    if "query" not in rows[0]:
        rows = rows_of(folder, "query/query_all.json")
    for row in rows:
        kind = notes[row["id"]]["type"]
        if wanted.isdisjoint(PARTS["of_type"][kind]):
            continue
        group = captions if kind == "generative" else yes_no
        group.append(question_about(row, folder, "image", settings, row["query"]))
    # An image's yes/no questions are read together.
    return captions + sorted(yes_no, key=lambda question: question.image)


def notes_of(folder):
    """{id: what the annotators say of the question}; VLMEvalKit's TSV has the yes/no questions
    alone, and each beside its note."""
    rows = rows_of(folder, "annotations.json", "AMBER.tsv")
    if "index" not in rows[0]:
        return dict(enumerate(rows, start=1))
    notes = {}
    for row in rows:
        number = int(row["index"])
        notes[number] = {
            "id": number,
            "type": row["category"],
            "truth": row["answer"],
            "query": row["question"],
            "image": row["image"],
        }
    return notes


def score(answers, folder, settings):
    """(metrics, how texts were read)."""
    need_fields(answers, {ANSWER: str, "id": int})
    notes = notes_of(folder)
    captions = None
    cases = defaultdict(list)
    for number, answer in enumerate(answers, start=1):
        if answer["id"] not in notes:
            raise UserError(f"answer {number}: AMBER has no question with the id {answer['id']}")
        note = notes[answer["id"]]
        text = answer[ANSWER]
        if note["type"] == "generative":
            if captions is None:
                captions = Captions(folder, settings.similar)
            case = captions.add(text, note)
        else:
            said = yes_or_no(text) if settings.protocol == "symmpo" else text
            truth = note["truth"].title()
            case = Case(said == truth, said, truth)
        settings.cases.append(case)
        for part in PARTS["of_type"][note["type"]]:
            cases[part].append(case)
    metrics = {}
    for part in PARTS["of_dimension"][settings.dimension]:
        if part != "generative":
            metrics[part] = of_yes_no(cases[part], part)
        elif captions is not None:
            metrics[part] = captions.metrics()
    return metrics, settings.protocol if captions is None else captions.reading


def ratio(above, below, start=0.001):
    """In percent, one decimal; the official scorer starts every denominator at 0.001."""
    return round(100 * above / (below + start), 1)


class Captions:
    """CHAIR   mentions that are not in the image, among all mentions
    Cover   objects in the image that are mentioned, among those objects
    Hal     captions with a wrong mention
    Cog     likely inventions (the annotators' `hallu` lists) that are mentioned, among these"""

    def __init__(self, folder, similar):
        self.relation = read(find(folder, "relation.json"))
        self.safe = find(folder, "safe_words.txt").read_text(encoding="utf-8").split("\n")
        self.known = set(self.relation).union(*self.relation.values())
        self.tokens, reader = noun_reader(read(HERE / "amber/lemma_table.json"))
        self.alike, judge = similarity(similar)
        self.reading = f"{reader}; similarity: {judge}"
        self.count = Counter()

    def add(self, text, note):
        """Count a caption; returns its Case."""
        covered = set()
        invented = set()
        words = []
        for lemma, is_noun, word in self.tokens(text):
            if not is_noun or lemma not in self.known:
                kind = ""
            elif lemma in self.safe:
                kind = "safe"
            else:
                there = self.named_by(lemma, note["truth"], str.__eq__)
                if there is None:
                    invented.add(self.named_by(lemma, note["hallu"], str.__eq__))
                    invented.add(self.named_by(lemma, note["hallu"], self.alike))
                    there = self.named_by(lemma, note["truth"], self.alike)
                covered.add(there)
                kind = "false" if there is None else "true"
            words.append((word, kind))
        kinds = Counter(kind for _, kind in words)
        self.count.update(
            kinds,
            captions=1,
            wrong=kinds["false"] > 0,
            objects=len(note["truth"]),
            covered=len(covered - {None}),
            likely=len(note["hallu"]),
            invented=len(invented - {None}),
        )
        missed = [thing for thing in note["truth"] if thing not in covered]
        return Case(kinds["false"] == 0, words=words, missed=missed)

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
            "CHAIR": ratio(n["false"], n["true"] + n["false"] + n["safe"]),
            "Cover": ratio(n["covered"], n["objects"]),
            "Hal": ratio(n["wrong"] + 0.001, n["captions"]),  # officially 100 - those without
            "Cog": ratio(n["invented"], n["likely"]),
        }


def of_yes_no(cases, part):
    """Accuracy, and precision, recall and F1 of the answer "No", as officially."""
    start = 0.003 if part == "attribute" else 0.001  # attribute sums three denominators
    said_no = [case.right for case in cases if case.said == "No"]
    is_no = [case.right for case in cases if case.truth == "No"]
    precision = ratio(sum(said_no), len(said_no), start)
    recall = ratio(sum(is_no), len(is_no), start)
    p, r = precision / 100, recall / 100  # F1 is of the rounded ones
    return {
        "Accuracy": ratio(sum(case.right for case in cases), len(cases), start),
        "Precision": precision,
        "Recall": recall,
        "F1": ratio(2 * p * r, p + r, 0.001 if part == "existence" else 0.0001),
    }


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
