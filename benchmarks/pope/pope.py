"""POPE (Li et al. 2023): is there a snowboard in the image? 9,000 yes/no questions about 500 images
of COCO; what is not there is drawn at random, is popular, or is often seen with what is there.
https://github.com/AoiDragon/POPE; numbers as its official scorer's.

    coco_pope_random.json     {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
    coco_pope_popular.json     "text": "Is there a snowboard in the image?", "label": "yes"}
    coco_pope_adversarial.json
    coco_repope_*.json        the same with corrected labels (Neuhaus & Hein 2025), optional
    answers                   {"question": ..., "label": ..., "category": "random", "answer": ...}

An answer is No if its first sentence has the word no, No or not, and else Yes. Protocol "symmpo"
asks as LLaVA's evaluation does, for a single word; "official" asks the bare question.
"""

from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.common import Case, need_fields, question_about, read, rows_of

ITEMS, ANSWER, JUDGE = 9000, "answer", "none"
CATEGORIES = ("random", "popular", "adversarial")
COLUMNS = {
    "F1 random↑": "random.f1",
    "F1 popular↑": "popular.f1",
    "F1 adversarial↑": "adversarial.f1",
    "Acc↑": "mean.accuracy",
    "F1↑": "mean.f1",
}
SUFFIX = {"symmpo": "\nAnswer the question using a single word or phrase.", "official": ""}


def questions(folder, settings):
    asked = []
    for row in published_rows(folder):
        for category in row["category"].split(","):  # a TSV has a question of all three once
            record = {
                "question_id": row.get("question_id", row.get("index")),
                "picture": row.get("picture"),
                "question": row["question"],
                "label": row["answer"].lower(),
                "category": category.strip().lower(),
                "image": row["image"],
            }
            prompt = row["question"] + SUFFIX[settings.protocol]
            asked.append(question_about(record, folder, "val2014", settings, prompt))
    return asked


def published_rows(folder):
    """Those of the three files, or of VLMEvalKit's TSV or the hub's parquet, in the latter's words.
    "picture" is the image's name, by which RePOPE knows a question."""
    rows = rows_of(folder, "coco_pope_random.json", "POPE.tsv", "*.parquet")
    if "category" in rows[0]:
        return rows
    rows = []
    for category in CATEGORIES:
        for row in rows_of(folder, f"coco_pope_{category}.json"):
            row |= {"category": category, "question": row["text"], "answer": row["label"]}
            row["picture"] = row["image"]
            rows.append(row)
    return rows


def is_clear(text):
    return text.lower().startswith(("yes", "no"))


def repope(folder):
    """{(category, picture, question): corrected label}; RePOPE leaves out what is not clear."""
    labels = {}
    for category in CATEGORIES:
        for place in (Path(folder), Path(folder, "annotations")):
            path = place / f"coco_repope_{category}.json"
            for row in read(path) if path.is_file() else ():
                labels[category, row["image"], row["text"]] = row["label"]
    return labels


def yes_or_no(text):
    """As the official scorer: the first sentence, cut into words at spaces."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "yes" if {"No", "not", "no"}.isdisjoint(words) else "no"


def score(answers, folder, settings):
    """(metrics, how texts were read). Precision and F1 of the answer "yes"; 0 where the official
    scorer divides by zero. "mean" is over the categories that were asked."""
    need_fields(answers, dict.fromkeys((ANSWER, "question", "label", "category"), str))
    corrected = repope(folder)
    counts = defaultdict(Counter)
    for row in answers:
        said = yes_or_no(row[ANSWER])
        category = row["category"]
        settings.cases.append(Case(said == row["label"], said, row["label"]))
        counts[category][said, row["label"]] += 1
        label = corrected.get((category, row.get("picture"), row["question"]))
        if label is not None:
            counts[f"repope {category}"][said, label] += 1
    metrics = {part: rates(count) for part, count in counts.items()}
    asked = [metrics[category] for category in CATEGORIES if category in metrics]
    metrics["mean"] = {}
    for name in asked[0]:
        metrics["mean"][name] = sum(rate[name] for rate in asked) / len(asked)
    return metrics, "no, not in the first sentence" + ("; RePOPE" if corrected else "")


def rates(count):
    """In percent, from {(said, label): answers}."""
    both = count["yes", "yes"]
    said = both + count["yes", "no"]
    true = both + count["no", "yes"]
    n = count.total()
    return {
        "accuracy": 100 * (both + count["no", "no"]) / n,
        "precision": 100 * both / max(said, 1),
        "recall": 100 * both / max(true, 1),
        "f1": 100 * 2 * both / max(said + true, 1),  # the harmonic mean of these two
        "yes_ratio": 100 * said / n,
    }
