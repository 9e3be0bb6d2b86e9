"""Breaks each guard that the README or docs claim, once, and looks whether a test notices.

    nice python -m tests.mutants [--only key]

Each mutant is a copy of the project with one text replaced; the tests that are named beside it have
to fail there. (They pass on the project itself: that is what the suite is.)
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    guard: str  # what is claimed
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest


MUTANTS = [
    Mutant(
        "checkpoints are flushed to the disk",
        "support/checkpoint.py",
        "    os.fsync(handle)\n",
        "",
        "tests/faults/test_guards.py -k checkpoint",
    ),
    Mutant(
        "paid replies are flushed before they are used",
        "support/chat.py",
        "        os.fsync(self.file.fileno())\n",
        "",
        "tests/faults/test_guards.py -k reply",
    ),
    Mutant(
        "a reply is asked for again only when it is not in the log",
        "support/chat.py",
        '        if past and "reason" not in past[-1]:\n            return id, past[-1]\n',
        "",
        "tests/test_chat.py -k same_question",
    ),
    Mutant(
        "no code of a model is run",
        "vlm/load.py",
        "trust_remote_code=False",
        "trust_remote_code=True",
        "tests/faults/test_guards.py -k code",
    ),
    Mutant(
        "check opens no images outside the data folder",
        "data.py",
        "image_of(record, name, 0, self.args.allow_outside)",
        "image_of(record, name, 0, True)",
        "tests/faults/test_guards.py -k outside",
    ),
    Mutant(
        "training opens no images outside the data folder",
        "data.py",
        "limits = options.seed, options.max_length, options.allow_outside",
        "limits = options.seed, options.max_length, True",
        "tests/faults/test_guards.py -k training_opens",
    ),
    Mutant(
        "a record that is too long is refused",
        "data.py",
        "        if row.longest() > max_length:",
        "        if False:",
        "tests/test_data.py -k too_long",
    ),
    Mutant(
        "the cache is compared with fresh numbers",
        "train.py",
        "    need_same(fresh, cached, rows, run.options.dtype, what)\n",
        "",
        "tests/test_train.py -k wrong_cache",
    ),
    Mutant(
        "rho is 0 at the start, or the run stops",
        "train.py",
        "    rho = need_same(table.rho, zero, example.rows, run.options.dtype, what)",
        "    rho = 0.0",
        "tests/test_train.py -k step_0_catches",
    ),
    Mutant(
        "two tables are the same within rounding, and NaN is not",
        "vlm/exact.py",
        "            if not off <= NOISE[dtype] * len(response) ** 0.5:",
        "            if off > 100:",
        "tests/test_exact.py -k nan",
    ),
    Mutant(
        "a decoder with a window shares no prefix",
        "vlm/exact.py",
        '    if "sliding_attention" in layers and window < longest:',
        "    if False:",
        "tests/test_exact.py -k decides",
    ),
    Mutant(
        "judgements that nobody can read are no score",
        "benchmarks/__init__.py",
        "    if count and count == len(judgements):",
        "    if False:",
        "tests/test_evaluate.py -k nobody_can_read",
    ),
    Mutant(
        "a loss that is not finite stops the run",
        "train.py",
        "if not math.isfinite(",
        "if False and not math.isfinite(",
        "tests/test_train.py -k non_finite",
    ),
    Mutant(
        "the mean is over the records that there were",
        "train.py",
        'p.grad /= totals["records"]',
        "p.grad /= options.batch_size",
        "tests/test_train.py -k last_short_batch",
    ),
    Mutant(
        "a checkpoint is what was saved",
        "support/checkpoint.py",
        'about["files"].items() - hashes(folder).items()',
        "[]",
        "tests/faults/test_same_run.py -k damaged",
    ),
    Mutant(
        "records are those that were trained on",
        "support/checkpoint.py",
        "            if records.hash(number) != hash:",
        "            if False:",
        "tests/faults/test_same_run.py -k changed_since",
    ),
    Mutant(
        "a fingerprint is of all bytes",
        "vlm/load.py",
        'digest.update(f"{file.name} {own}".encode())',
        'digest.update(f"{file.name} {file.stat().st_size}".encode())',
        "tests/faults/test_same_run.py -k fingerprint",
    ),
    Mutant(
        "weights are all there",
        "vlm/load.py",
        '    need_all_weights(path, found, ("missing_keys", "mismatched_keys", "unexpected_keys"))',
        "",
        "tests/faults/test_same_run.py -k missing_and_unused",
    ),
    Mutant(
        "an adapter fits",
        "vlm/load.py",
        "        need_all_tensors(adapted, folder)\n",
        "",
        "tests/faults/test_same_run.py -k does_not_fit",
    ),
    Mutant(
        "keys are written nowhere",
        "support/chat.py",
        '            line = line.replace(secret, "[key]")',
        "            pass",
        "tests/test_chat.py tests/faults/test_servers.py -k 'key_is_in_no or redacted'",
    ),
    Mutant(
        "no key goes to a public host in the clear",
        "support/http.py",
        'if parts.scheme == "http" and key != "none" and',
        "if False and",
        "tests/faults/test_servers.py -k in_the_clear",
    ),
    Mutant(
        "no redirect is followed",
        "support/http.py",
        "follow_redirects=False",
        "follow_redirects=True",
        "tests/faults/test_servers.py -k redirect",
    ),
    Mutant(
        "replies under way are waited for",
        "support/chat.py",
        "wait(tasks, GRACE)",
        "wait(tasks, 0)",
        "tests/faults/test_servers.py -k under_way",
    ),
    Mutant(
        "data workers end with the run",
        "support/signals.py",
        "signal.signal(number, end_soon)",
        "signal.signal(number, signal.SIG_IGN)",
        "tests/faults/test_same_run.py -k holds_up",
    ),
    Mutant(
        "EPS starts no Ghostscript, thin pictures no MemoryError",
        "support/images.py",
        "            if max(image.size) > LONGEST * min(image.size):",
        "            if False:",
        "tests/faults/test_same_run.py -k break_the_reader",
    ),
    Mutant(
        "what is read is not written over",
        "support/records.py",
        "        if os.path.exists(out) and os.path.samefile(out, file.path):",
        "        if False:",
        "tests/faults/test_same_run.py -k written_over",
    ),
]


def noticed(mutant, copy):
    """Do the named tests fail with the guard broken?"""
    path = Path(copy, mutant.file)
    whole = path.read_text()
    assert mutant.old in whole, f"{mutant.file} has no {mutant.old!r}"
    path.write_text(whole.replace(mutant.old, mutant.new))
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {mutant.tests}"
    try:
        done = subprocess.run(command, shell=True, cwd=copy, capture_output=True, timeout=240)
        return done.returncode == 1  # 5 would be: no test was found
    except subprocess.TimeoutExpired:
        return True
    finally:
        path.write_text(whole)


def outcomes(only=""):
    """Yields (guard, whether a test noticed)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        ignore = shutil.ignore_patterns(".git", "runs", ".hypothesis", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignore)
        for mutant in MUTANTS:
            if only in mutant.guard:
                yield mutant.guard, noticed(mutant, copy)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="a part of a guard's words")
    unnoticed = 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for guard, good in outcomes(parser.parse_args().only):
        print("noticed  " if good else "UNNOTICED", guard, flush=True)
        if not good:
            unnoticed += 1
    sys.exit(1 if unnoticed else 0)


if __name__ == "__main__":
    main()
