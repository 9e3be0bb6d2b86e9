"""Disks that are full or read-only: a clear message, and everything finished still there."""

import os
import subprocess

import harness
import pytest
from test_kill import job  # noqa: F401

from conftest import build_args
from construct import responses

try:
    with harness.small_disk("/tmp/symmpo-may-we-mount"):
        REASON = ""
except OSError as e:
    REASON = f"no small disk can be mounted here: {e}"
finally:
    os.rmdir("/tmp/symmpo-may-we-mount")
needs_mount = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture
def disk(tmp_path):
    with harness.small_disk(tmp_path / "disk") as folder:
        yield folder


def last_words(log):
    """The last line, which has to be the message; never a traceback before it."""
    text = log.read_text()
    assert "Traceback" not in text, text
    return text.splitlines()[-1]


@needs_mount
@pytest.mark.parametrize("left", [0, 30_000], ids="{} bytes left".format)
def test_disk_full_while_training(job, disk, tmp_path, left):  # noqa: F811
    """Two steps fit, the third checkpoint finds the disk full at its start or in its middle."""
    argv, _, log = job(f"full{left}")
    out = disk / "run"
    argv = [*argv, "--out", out]
    harness.run("train", argv, log, watch=[out], kill_at=26)  # killed in the second step
    before = {p: p.read_bytes() for p in out.glob("checkpoint-*/*")}
    ballast = harness.fill(disk, leave=left)
    assert before and harness.run("train", [*argv, "--resume"], log) == 2
    assert str(out) in last_words(log) and "error: " in last_words(log)
    assert all(p.read_bytes() == whole for p, whole in before.items())
    ballast.unlink()
    assert harness.run("train", [*argv, "--resume"], log) == 0
    assert harness.training(out) == job.whole


@needs_mount
def test_disk_full_for_the_reference_cache(job, disk):  # noqa: F811
    argv, out, log = job("full-cache")
    ballast = harness.fill(disk)
    assert harness.run("train", [*argv, "--cache", disk / "cache"], log) == 2
    assert str(disk / "cache") in last_words(log)
    ballast.unlink()
    assert harness.run("train", [*argv, "--cache", disk / "cache", "--resume"], log) == 0
    assert harness.training(out) == job.whole


@needs_mount
def test_read_only_folders(job, disk):  # noqa: F811
    argv, out, log = job("read-only")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for option, place in (("--out", "run"), ("--cache", "cache")):
        assert harness.run("train", [*argv, option, disk / place], log) == 2
        assert str(disk) in last_words(log) and "ead-only" in last_words(log)


def test_nothing_written_can_be_executed(job):  # noqa: F811
    files = [p for p in job.base.rglob("*") if p.is_file()]
    assert len(files) > 10 and not any(p.stat().st_mode & 0o111 for p in files)


def test_building_where_nothing_can_be_written_is_one_message(pairs, capsys):
    with pytest.raises(SystemExit) as e:
        responses.main(build_args(pairs, "http://127.0.0.1:9/v1", out="/dev/null/prefs.jsonl"))
    assert e.value.code == 2 and "error: " in capsys.readouterr().err
