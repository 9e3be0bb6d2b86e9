"""Answers to a benchmark's questions, one after the other, on disk as they come."""

import json
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from benchmarks import score
from benchmarks.amber import amber
from benchmarks.common import Settings, made_of
from support.cli import UserError
from support.files import drop_torn_line, lock, need_same, write_json
from support.images import open_images


def answer(model, prompts, questions, first=0, batch_size=16, seed=0, **decoding):
    """Yields the model's answers from question number `first` on, in order, and keeps none. Batches
    and their seeds do not depend on `first`, so answers do not either."""
    import torch

    from vlm.generate import generate

    every = list(batches(questions, batch_size))
    for start, batch in tqdm(every, desc="answering", unit=" batches"):
        if start + len(batch) > first:
            images = None
            if batch[0].image is not None:
                images = open_images([question.image for question in batch])
            texts = [question.prompt for question in batch]
            torch.manual_seed(seed + start)
            answers = generate(model, prompts, texts, images, **decoding)
            yield from answers[max(0, first - start) :]


def batches(questions, size):
    """(number of its first question, questions): all with an image, or all without. An image's
    questions are in one batch if they fit into one."""
    start = 0
    batch = []
    for image, group in groupby(questions, key=lambda question: question.image):
        group = list(group)
        if batch:
            alike = (batch[0].image is None) == (image is None)
            if not alike or len(batch) + len(group) > size:
                yield start, batch
                start += len(batch)
                batch = []
        batch += group
        while len(batch) > size:
            yield start, batch[:size]
            start += size
            batch = batch[size:]
    if batch:
        yield start, batch


def measure(model, prompts, folder, **decoding):
    """Generate and score a folder of AMBER's form in memory: what `score` returns."""
    questions = amber.questions(folder, Settings())
    answers = []
    for text, question in zip(answer(model, prompts, questions, **decoding), questions):
        answers.append({**question.record, amber.ANSWER: text})
    return score("amber", answers, folder)


def before_and_after(policy, prompts, folder):
    """Print hallucination on a folder of AMBER's form, the policy's adapter off and on."""
    policy.eval()
    with policy.disable_adapter():
        before = measure(policy, prompts, folder)["metrics"]
    after = measure(policy, prompts, folder)["metrics"]
    print(f"{'held-out scenes (%)':20}   CHAIR   cover     hal  yes/no")
    for name, found in (("before", before), ("after", after)):
        made = found["generative"]
        asked = found["discriminative"]
        values = made["CHAIR"], made["Cover"], made["Hal"], asked["Accuracy"]
        print(f"{name:20}" + "".join(f"{value:8.1f}" for value in values))


class Answers:
    """answers.jsonl in a folder, which it holds the lock of, and beside it answers.settings.json:
    how they are made. It grows question by question. A killed run goes on; other settings, and
    lines that are not the questions' answers, are refused."""

    def __init__(self, folder, made, questions):
        self.path = Path(folder, "answers.jsonl")
        self.questions = questions
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = lock(folder)
        known = self.path.with_suffix(".settings.json")
        if self.path.exists():
            need_same(self.path, made_of(self.path), made)
        self.count = drop_torn_line(self.path)
        self.need_answers()
        write_json(known, made)

    def need_answers(self):
        """Line n answers question n: it has all that is in the question's record."""
        lines = self.path.read_bytes().splitlines() if self.count else []
        for number, (line, question) in enumerate(zip(lines, self.questions), start=1):
            try:
                found = json.loads(line)
                is_its_answer = {**found, **question.record} == found
            except (ValueError, TypeError):  # no JSON, or no object
                is_its_answer = False
            if not is_its_answer:
                raise UserError(
                    f"{self.path}:{number}: not the answer to question {number}; remove this line "
                    "and those behind it, and the same command asks them again"
                )

    def extend(self, texts, field):
        """Append an answer for each question that has none yet; returns the file."""
        with open(self.path, "a", encoding="utf-8") as file:
            for text, question in zip(texts, self.questions[self.count :]):
                line = {**question.record, field: text}
                if getattr(text, "cut", False):
                    line["cut"] = True
                file.write(json.dumps(line) + "\n")
                file.flush()
        return self.path
