"""MMHal-Bench (Sun et al. 2023): 96 open questions of eight types, rated by a judge who sees no
image. https://huggingface.co/datasets/Shengcao1006/MMHal-Bench; numbers as its official scorer's.

    response_template.json   [{"question_type": "attribute", "question_topic": "vehicle",
                               "image_id": "...", "image_src": "https://.../x.jpg",
                               "image_content": ["Car"], "question": "...", "gt_answer": "...",
                               "model_answer": ""}, ...]
    answers                  the same, each with "model_answer"
    judgements               texts with "Rating: 4", in answer order

score: mean rating, 0 to 6. hallucination_rate: share of ratings below 3. A judgement without one
clear rating counts as 0, as officially; protocol "symmpo" also takes a rating on the next line.
"""

import re

from benchmarks.common import Case, question_about, rows_of
from support.cli import UserError

ITEMS, ANSWER, JUDGE = 96, "model_answer", "needed"
FILES = (
    "mmhal-bench_with_image.jsonl",
    "response_template.json",
    "mmhal-bench_answer_template.json",
)
COLUMNS = {"Score↑": "score", "Hall↓": "hallucination_rate"}
TYPES = "attribute adversarial comparison counting relation environment holistic other".split()

# As judges write it: "Rating: 4", {"rating": 4}, "Rating (0-6): 4", "a rating of 4"
RATING = re.compile(r"rating(?: *\(0 *(?:-|–|to) *6\))?\W*(?:(?:is|of)\W*)?([0-6])(?![.–-]?\d)")


def questions(folder, settings):
    asked = []
    for row in rows_of(folder, *FILES):
        row.pop(ANSWER, None)  # a template has an empty one
        asked.append(question_about(row, folder, "images", settings, other="image_src"))
    return asked


def check_reply(text):
    """The judgement with its one rating as it is scored, "Rating: 4"; else ValueError."""
    found = set(RATING.findall(text.lower()))
    if len(found) != 1:
        raise ValueError(f"not one rating of 0 to 6: {text[-80:]!r}")
    return text if rating(text, "official") else f"{text}\nRating: {found.pop()}"


def score(answers, folder, settings):
    """(metrics, how texts were read)."""
    judgements = settings.judgements or []
    ratings = [rating(text, settings.protocol) for text in judgements]
    for answer, said, value in zip(answers, judgements, ratings):
        settings.cases.append(Case(value >= 3, said, answer.get("gt_answer", "")))
    if len(answers) != ITEMS or not judgements:
        raise UserError(
            f"MMHal-Bench has 96 questions and no judge-free reading; here are {len(answers)} "
            f"answers, {len(judgements)} judgements"
        )
    low = sum(value < 3 for value in ratings)
    by_type = [sum(ratings[first::8]) / 12 for first in range(8)]  # the types come in turns
    metrics = {
        "score": sum(ratings) / ITEMS,
        "hallucination_rate": 100 * low / ITEMS,
        "score_per_type": by_type,
        "types": dict(zip(TYPES, by_type)),
    }
    return metrics, "judge"


def rating(text, protocol):
    """The one rating in a judgement, else 0."""
    text = text.lower()
    found = set(re.findall("rating: ([0-6])", text))
    if not found and protocol == "symmpo":
        found = set(re.findall("rating: ?\n([0-6])", text))
    return int(found.pop()) if len(found) == 1 else 0
