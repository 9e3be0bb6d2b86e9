"""Hallucination benchmarks: a folder each, which can be read alone.

NAME/NAME.py has the constants ITEMS (questions as published), ANSWER (the field of an answer),
JUDGE ("none", "optional" or "needed"), FILES (what is needed), COLUMNS (of the report), and

    questions(folder, settings) -> [Question]
    score(answers, folder, settings) -> (metrics, how texts were read)

and, if JUDGE is not "none", judge_messages(prompt, row) and check_reply(text); beside it
stand README.md (source, licence, how to get it, departures), word lists and the judge's prompt.
Another benchmark is another folder, and its name here.
"""

import importlib

from benchmarks.common import Settings, need_answers

NAMES = ("amber", "hallusionbench", "mmhal", "mmstar", "objhal")
BENCHMARKS = {name: importlib.import_module(f"benchmarks.{name}.{name}") for name in NAMES}


def score(benchmark, answers, folder, settings=None):
    """Answers in the benchmark's published format (dicts) as the command's result, a dict.

    folder: the benchmark's files. Percent, except MMHal's score (0-6). Raises UserError where the
    official scorer crashes and no correct number exists.
    """
    settings = settings or Settings()
    need_answers(answers, settings.judgements)
    metrics, reading = BENCHMARKS[benchmark].score(answers, folder, settings)
    return {
        "benchmark": benchmark,
        "protocol": settings.protocol,
        "n": len(answers),
        "reading": reading,
        "metrics": metrics,
    }
