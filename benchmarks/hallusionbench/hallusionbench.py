"""HallusionBench (Guan et al. 2024): the same questions about a figure and about an edit of it.
https://github.com/tianyi-lab/HallusionBench; numbers as its official scorer's, to the digit.

    HallusionBench.json    [{"category": "VD", "subcategory": "illusion", "set_id": "0",
                             "figure_id": "1", "question_id": "0", "question": "...",
                             "gt_answer": "1", "filename": "./VD/illusion/0_1.png",
                             "visual_input": "1"}, ...]
    answers                the same, each with "model_prediction"
    judgements             texts that say correct, incorrect or unclear, in answer order

aAcc: right answers. qAcc: questions right for all their figures. fAcc: figures with all answers
right. Without a judge the first yes or no of an answer is compared with gt_answer.
"""

import re
from collections import defaultdict
from typing import NamedTuple

from benchmarks.common import Case, Question, need_fields, question_about, rows_of
from support.cli import UserError

ITEMS, ANSWER, JUDGE = 1129, "model_prediction", "optional"
COLUMNS = {"qAcc↑": "qAcc", "fAcc↑": "fAcc", "aAcc↑": "aAcc"}


class Place(NamedTuple):
    """Where a question belongs. Figure 0 is the original, others are its edits."""

    category: str
    subcategory: str
    set_id: str
    figure_id: str
    question_id: str

    def without_image(self):
        """VS questions of figure 0 are asked without any image: there, unsure is right."""
        return self.category == "VS" and self.figure_id == "0"


def questions(folder, settings):
    asked = []
    for row in rows_of(folder, "HallusionBench.json", "HallusionBench.tsv", "*.parquet"):
        if "l2-category" in row:
            row = row_of_tsv(row)
        if str(row["visual_input"]) == "0":
            row.pop("image", None)  # the parquet has an empty one
            asked.append(Question(row["question"], None, row))
        else:
            question = question_about(row, folder, "hallusion_bench", settings, other="filename")
            asked.append(question)
    return asked


def row_of_tsv(row):
    """VLMEvalKit's row, whose numbers stand in its index, in the published names. There are none of
    the questions without an image."""
    set_id, figure_id, question_id = row["index"].split("_")[-3:]
    return {
        **row,
        "subcategory": row["l2-category"],
        "visual_input": "1",
        "set_id": set_id,
        "figure_id": figure_id,
        "question_id": question_id,
        "gt_answer": {"yes": "1", "no": "0"}[row["answer"].lower()],
    }


def check_reply(text):
    """The judgement, its last word on it: correct, incorrect or unclear; else ValueError."""
    said = re.sub(r"\bnot incorrect\b", "correct", text.lower())
    said = re.sub(r"\bnot correct\b", "incorrect", said)
    found = re.findall(r"\b(?:correct|incorrect|unclear)\b", said)
    if not found:
        raise ValueError(f"neither correct nor incorrect nor unclear: {text[-80:]!r}")
    return found[-1]


def is_clear(text):
    return bool(first_yes_or_no(text))


def score(answers, folder, settings):
    """(metrics, how texts were read)."""
    need_fields(answers, {ANSWER: str, **dict.fromkeys((*Place._fields, "gt_answer"), (str, int))})
    judgements = settings.judgements
    right = {}
    for number, answer in enumerate(answers):
        place = Place(*(str(answer[name]) for name in Place._fields))
        if place in right:
            raise UserError(f"question {'/'.join(place)}: there is a second one")
        truth = "yes" if str(answer["gt_answer"]) == "1" else "no"
        if judgements is None:
            said = first_yes_or_no(answer[ANSWER])
            right[place] = said == truth if said else place.without_image()
        else:
            said = judgements[number]
            right[place] = judged_right(said, place)
        settings.cases.append(Case(right[place], said, truth))

    # People also publish the questions with an image alone, which is without a half of VS.
    of_vs = [place for place in right if place.category == "VS"]
    is_whole = not of_vs or any(place.without_image() for place in of_vs)
    for place in right:
        needs_original = is_whole or place.category != "VS"
        if needs_original and place._replace(figure_id="0") not in right:
            raise UserError(f"question {'/'.join(place)}: there is none like it of figure 0")
    of_figures = {place: ok for place, ok in right.items() if not place.without_image()}
    if not of_figures:
        raise UserError("there are no answers about figures: no fAcc")
    metrics = {
        "qAcc": share(right, figure_id=""),
        "fAcc": share(of_figures, question_id=""),
        "aAcc": share(right),
    }
    reading = "no judge: first yes/no" if judgements is None else "judge"
    if not is_whole:
        del metrics["qAcc"]
        reading += "; image questions alone, no qAcc"
    return metrics, reading


def share(right, **left_out):
    """In percent, the groups that are right altogether. The places of a group are alike but for
    what is left out."""
    groups = defaultdict(list)
    for place, is_right in right.items():
        groups[place._replace(**left_out)].append(is_right)
    whole = sum(map(all, groups.values()))
    return round(100 * whole / len(groups), 4)


def judged_right(reply, place):
    reply = reply.lower()
    if "incorrect" in reply:
        return False
    return True if "correct" in reply else place.without_image()


def first_yes_or_no(text):
    """Nothing, if there is none."""
    said = re.search(r"\b(yes|no)\b", text.lower())
    return said[1] if said else ""
