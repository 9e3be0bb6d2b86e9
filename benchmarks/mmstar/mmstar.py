"""MMStar (Chen et al. 2024): 1,500 questions with lettered answers that cannot be told without the
image. https://huggingface.co/datasets/Lin-Chen/MMStar; numbers as its official scorer's.

    mmstar.parquet   rows {"index": 0, "question": "Which ...?\\nOptions: A: cat, B: dog, ...",
                           "image": {...}, "answer": "B", "category": "coarse perception",
                           "l2_category": "image scene and topic", "meta_info": {...}}
    answers          the same without the image, each with "prediction"

Six categories, eighteen sub-categories: shares of right letters. Protocol "symmpo" (the paper's)
takes the first a to d anywhere in the answer; "official" wants the letter in its place.
"""

import contextlib
import re
from collections import Counter

from benchmarks.common import HERE, Case, need_fields, question_about, read, rows_of
from support.cli import UserError

ITEMS, ANSWER, JUDGE = 1500, "prediction", "none"
FILES = ("mmstar.json*", "MMStar.tsv", "*.parquet")
COLUMNS = {"Overall↑": "overall"}
SUFFIX = {  # what is asked behind a question
    "symmpo": "\nAnswer the question directly.",
    "official": "\nAnswer with the option's letter from the given choices directly.",
}


def questions(folder, settings):
    asked = []
    for row in rows_of(folder, *FILES):
        prompt = row["question"] + SUFFIX[settings.protocol]
        asked.append(question_about(row, folder, "images", settings, prompt))
    return asked


def is_clear(text):
    """Does it name one letter? "The answer is B" has an a, too, which protocol symmpo reads."""
    return bool(re.fullmatch(r"(?s)[\W_]*[a-d]\b.*", text.lower()))


def score(answers, folder, settings):
    """(metrics, how texts were read)."""
    need_fields(answers, {ANSWER: str, "answer": str, "category": str, "l2_category": str})
    right = Counter()
    count = Counter()
    for row in answers:
        parts = parts_of(row)
        count.update(parts)
        said = letter_in(row[ANSWER], settings.protocol)
        truth = lowered(row["answer"])
        settings.cases.append(Case(said == truth, said, truth))
        if said == truth:
            right.update(parts)
    size = published_sizes(folder)
    for part in sorted(count.keys() ^ size.keys()):
        raise UserError(f"MMStar: no answers in {part}, or no such category; all are needed")
    metrics = {}
    for part in size:  # officially a sub-category is divided by what was answered of it
        whole = count[part] if "(" in part else size[part]
        metrics[part] = 100 * right[part] / whole
    return metrics, "first letter a-d" if settings.protocol == "symmpo" else "letter in place"


def parts_of(row):
    """The shares in which a question counts."""
    category = row["category"]
    return ("overall", category, f"{category}({row['l2_category']})")


def published_sizes(folder):
    """{part: questions}: of the question file that is there, else of the published one."""
    with contextlib.suppress(UserError):  # scoring needs no question file
        size = Counter()
        for row in rows_of(folder, *FILES):
            size.update(parts_of(row))
        return size
    return read(HERE / "mmstar/categories.json")


def letter_in(text, protocol):
    """That as which the prediction is read."""
    text = lowered(text)
    if protocol == "symmpo":
        found = re.search("[a-d]", text)
        return found[0] if found else "a"
    return re.match(r"(?:\(|option |the answer is )?(.?)", text)[1]


def lowered(text):
    return text.lower().strip().replace("\n", " ")
