"""Hallucination benchmarks: a folder each, which can be read alone.

NAME/NAME.py has the constants ITEMS (questions as published), ANSWER (the field of an answer),
JUDGE ("none", "optional" or "needed"), FILES (what is needed), COLUMNS (of the report), and

    questions(folder, settings) -> [Question]
    score(answers, folder, settings) -> (metrics, how texts were read)

and, if JUDGE is not "none", judge_messages(prompt, row) and check_reply(text); beside it
stand README.md (source, licence, how to get it, departures), word lists and the judge's prompt.
Another benchmark is another folder, and its name here.
"""

import contextlib
import importlib

from benchmarks.common import Settings, need_answers
from support.cli import UserError

NAMES = ("amber", "hallusionbench", "mmhal", "mmstar", "objhal")
BENCHMARKS = {name: importlib.import_module(f"benchmarks.{name}.{name}") for name in NAMES}


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
    need_answers(answers, settings.judgements)
    with well_formed(benchmark, folder):
        metrics, reading = BENCHMARKS[benchmark].score(answers, folder, settings)
    return {
        "benchmark": benchmark,
        "protocol": settings.protocol,
        "n": len(answers),
        "reading": reading,
        "metrics": metrics,
    }
