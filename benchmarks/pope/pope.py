"""POPE (Li et al. 2023): is there a snowboard in the image? 9,000 yes/no questions about 500 images
of COCO; what is not there is drawn at random, is popular, or is often seen with what is there.
https://github.com/AoiDragon/POPE; numbers as its official scorer's.

    coco_pope_random.json     {"question_id": 1, "image": "COCO_val2014_000000310196.jpg",
    coco_pope_popular.json     "text": "Is there a snowboard in the image?", "label": "yes"}
    coco_pope_adversarial.json
    coco_repope_*.json         the same with corrected labels (Neuhaus & Hein 2025), optional
    answers                    the same with "category" (random, ...) and "answer"

An answer is No if its first sentence has the word no, No or not, and else Yes. Protocol "symmpo"
asks as LLaVA's evaluation does, for a single word; "official" asks the bare question.
"""

from collections import Counter
from pathlib import Path

from benchmarks.common import Case, need_fields, percent, question_about, read, rows_of

ITEMS, ANSWER, JUDGE = 9000, "answer", "none"
CATEGORIES = ("random", "popular", "adversarial")
FILES = tuple(f"coco_pope_{category}.json" for category in CATEGORIES)
COLUMNS = {
    "F1 random↑": ("random", "f1"),
    "F1 popular↑": ("popular", "f1"),
    "F1 adversarial↑": ("adversarial", "f1"),
    "Acc↑": ("mean", "accuracy"),
    "F1↑": ("mean", "f1"),
}
SUFFIX = {"symmpo": "\nAnswer the question using a single word or phrase.", "official": ""}


def questions(folder, settings):
    asked = []
    for row in published_rows(folder):
        prompt = row["text"] + SUFFIX[settings.protocol]
        asked.append(question_about(row, prompt, row["image"], folder, "val2014", settings))
        if isinstance(row["image"], str) and "." in row["image"]:
            asked[-1].record["image"] = row["image"]  # RePOPE names questions by it
    return asked


def published_rows(folder):
    """The official files' rows with their category, or a table's (VLMEvalKit's TSV, the hub's
    parquet) as the official files have them."""
    rows = []
    if Path(folder, FILES[0]).is_file():
        for category, file in zip(CATEGORIES, FILES):
            for row in read(Path(folder, file)):
                rows.append({**row, "category": category})
        return rows
    for row in rows_of(folder, FILES[0], "POPE*.tsv", "*.parquet"):
        for category in row["category"].split(","):  # the TSV has a question once
            rows.append(
                {
                    "question_id": row.get("question_id") or row["index"],
                    "image": row["image"],
                    "text": row["question"],
                    "label": row["answer"].lower(),
                    "category": category.strip().lower(),
                }
            )
    return rows


def is_clear(text):
    return text.lower().startswith(("yes", "no"))


def cases(answers, folder, settings):
    """([Case], how texts were read)."""
    need_fields(answers, dict.fromkeys((ANSWER, "text", "label", "category"), str))
    corrected = repope(folder)
    found = []
    for row in answers:
        said = yes_or_no(row[ANSWER])
        parts = {row["category"]: row["label"]}
        label = corrected.get((row["category"], row.get("image"), row["text"]))
        if label is not None:
            parts[f"repope {row['category']}"] = label
        found.append(Case(said == row["label"], said, row["label"], parts=parts))
    return found, "no, not in the first sentence" + ("; RePOPE" if corrected else "")


def repope(folder):
    """{(category, image, question): corrected label}; RePOPE leaves out what is not clear."""
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
    found, reading = cases(answers, folder, settings)
    counts = {}
    for case in found:
        for part, label in case.parts.items():
            counts.setdefault(part, Counter())[case.said, label] += 1
    metrics = {part: rates(count) for part, count in counts.items()}
    asked = [metrics[category] for category in CATEGORIES if category in metrics]
    metrics["mean"] = {}
    for name in asked[0]:
        metrics["mean"][name] = sum(rate[name] for rate in asked) / len(asked)
    return metrics, reading


def rates(count):
    """In percent, from {(said, label): answers}."""
    both = count["yes", "yes"]
    said, true, n = both + count["yes", "no"], both + count["no", "yes"], count.total()
    return {
        "accuracy": percent(both + count["no", "no"], n),
        "precision": percent(both, max(said, 1)),
        "recall": percent(both, max(true, 1)),
        "f1": percent(2 * both, max(said + true, 1)),  # the harmonic mean of these two
        "yes_ratio": percent(said, n),
    }
