"""Killed at any file operation or moment, or stopped politely: resumed, it equals the whole run."""

import os
import random
import signal
import time

import harness
import pytest

from conftest import write_prefs

FEW = (
    "--lora-r 2 --lora-alpha 4 --lr 1e-2 --steps 4 --batch-size 3 --save-every 1 "
    "--sample-every 3 --seed 1"
).split()


@pytest.fixture(scope="module")
def job(llava, tmp_path_factory):
    """job(name, *options) -> (argv, folder, log) of a training run with its own reference cache;
    job.whole is what the uninterrupted run left, job.events its number of file operations."""
    base = tmp_path_factory.mktemp("kill")
    (base / "data").mkdir()
    prefs = write_prefs(base / "data", n=6)
    few = prefs.parent / "few.jsonl"
    few.write_text("".join(prefs.read_text().splitlines(True)[:2]))

    def make(name, *options):
        out, cache = base / name, base / f"{name}-cache"
        argv = [
            "--model",
            llava,
            "--data",
            prefs,
            "--eval-data",
            few,
            "--out",
            out,
            "--cache",
            cache,
            *FEW,
            *options,
        ]
        return argv, out, base / f"{name}.log"

    argv, out, log = make("whole")
    assert harness.run("train", argv, log, watch=[base]) == 0, log.read_text()
    make.whole, make.base = harness.training(out), base
    make.events = int((base / "whole.log.count").read_text())
    return make


def test_killed_again_and_again_at_file_operations(job):
    """Each life ends before the n-th creation, renaming or removal of a file."""
    argv, out, log = job("killed")
    rng, lives = random.Random(0), 0
    while (
        harness.run(
            "train",
            [*argv, "--resume"],
            log,
            watch=[job.base],
            kill_at=rng.randint(job.events // 3, job.events // 2),
        )
        == -signal.SIGKILL
    ):
        lives += 1
        assert lives < 20
    assert lives >= 2 and "Traceback" not in log.read_text()
    assert harness.training(out) == job.whole


def test_sigterm_to_the_whole_group_saves_first_and_the_folder_stays_locked(job):
    """As schedulers send it, to the processes that read images too."""
    argv, out, log = job("stopped", "--workers", "1")
    process = harness.child("train", argv, log)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.is_alive(), log.read_text()
        time.sleep(0.01)
    second = job.base / "second.log"
    assert harness.run("train", [*argv, "--resume"], second) == 2
    assert "another process is writing" in second.read_text()
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    text = log.read_text()
    assert process.exitcode == 130 and "go on with" in text and "Traceback" not in text, text
    assert harness.run("train", [*argv, "--resume"], log) == 0
    assert harness.training(out) == job.whole


def test_resuming_a_finished_run_changes_nothing(job):
    argv, out, log = job("whole")
    assert harness.run("train", [*argv, "--resume"], log) == 0, log.read_text()
    assert harness.training(out) == job.whole


def test_killed_at_any_moment(job):
    """Also inside native code, where no Python event is counted: three lives end by the clock."""
    argv, out, log = job("any-moment")
    rng, killed = random.Random(3), 0
    for _ in range(6):
        killed += harness.killed_after(rng.uniform(0.5, 2.5), "train", [*argv, "--resume"], log)
        if killed == 3:
            break
    assert killed >= 1 and "Traceback" not in log.read_text()
    assert harness.run("train", [*argv, "--resume"], log) == 0, log.read_text()
    assert harness.training(out) == job.whole
