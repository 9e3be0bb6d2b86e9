"""Hallucination benchmarks: a folder each, which can be read alone.

NAME/NAME.py has the constants ITEMS (questions as published), ANSWER (the field of an answer),
JUDGE ("none", "optional" or "needed"), COLUMNS (of the report), and

    questions(folder, settings) -> [Question]
    score(answers, folder, settings) -> (metrics, how texts were read)
                      and, into settings.cases, what was read in each answer, for the page
    is_clear(text)    where answers have a form: has this one?

and, if JUDGE is not "none", check_reply(text), which returns a judgement as it is scored, and
is_unasked(row) where some answers need no judge (their judgement is []). Beside it stand README.md
(source, licence, how to get it, departures), word lists and the judge's prompt.
Another benchmark is another folder, and its name here.
"""

import contextlib
import importlib
from collections import Counter
from dataclasses import replace

from benchmarks.common import Settings, need_answers, plain, reply_text
from support.cli import UserError

NAMES = ("amber", "hallusionbench", "mmhal", "mmstar", "objhal", "pope")
BENCHMARKS = {name: importlib.import_module(f"benchmarks.{name}.{name}") for name in NAMES}
DOUBTS = ("empty or given up", "cut by the token limit", "unclear", "judgement unreadable")
MOST_DOUBTFUL = 0.02  # share of the answers above which a row is marked


@contextlib.contextmanager
def well_formed(benchmark, folder):
    """Files, or answers, that are not as the benchmark publishes them end in one message."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{folder}: the files, or the answers to them, are not as {benchmark} has them "
            f"({what}); `evaluate.py fetch-help {benchmark}` says what to get"
        ) from error


def score(benchmark, answers, folder, settings=None):
    """Answers in the benchmark's published format (dicts) as the command's result, a dict.

    folder: the benchmark's files. Percent, except MMHal's score (0-6). Raises UserError where the
    official scorer crashes and no correct number exists.
    """
    settings = settings or Settings()
    module = BENCHMARKS[benchmark]
    need_answers(answers, settings.judgements)
    with well_formed(benchmark, folder):
        answers, found = without_thinking(answers, module)
        if settings.judgements is not None:
            texts = [reply_text(reply) for reply in settings.judgements]
            settings = replace(settings, judgements=texts)
        metrics, reading = module.score(answers, folder, settings)
        found["judgement unreadable"] = unreadable(settings.judgements, module)
    doubts = {name: found[name] for name in DOUBTS}
    return {
        "benchmark": benchmark,
        "protocol": settings.protocol,
        "n": len(answers),
        "thinking, not scored": found["thinking"],
        "doubts": doubts,
        "doubtful": max(doubts.values()) > MOST_DOUBTFUL * len(answers),
        "reading": reading,
        "metrics": metrics,
    }


def without_thinking(answers, module):
    """The answers as they are scored, and how many of them are what."""
    scored = []
    found = Counter()
    for answer in answers:
        text = answer.get(module.ANSWER)
        if isinstance(text, str):  # else the scorer says what is wrong
            said = text.rpartition("</think>")[2].strip()
            if "</think>" in text:
                found["thinking"] += 1
                answer = {**answer, module.ANSWER: said}
            found["empty or given up"] += not said
            found["cut by the token limit"] += answer.get("cut", False)
            if hasattr(module, "is_clear"):
                found["unclear"] += not module.is_clear(said)
        scored.append(answer)
    return scored, found


def unreadable(judgements, module):
    """How many judgements even a careful reader does not understand."""
    count = 0
    for text in judgements or []:
        try:
            module.check_reply(plain(text))
        except ValueError:
            count += 1
    if count and count == len(judgements):
        raise UserError(f"none of the {count} judgements can be read, the last is {text[-80:]!r}")
    return count
