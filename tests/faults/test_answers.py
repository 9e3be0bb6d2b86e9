"""evaluate.py generate, killed and disturbed: the answers are those of the undisturbed run."""

import json
import shutil
import signal
import time

import harness
import pytest

from support.files import lock


@pytest.fixture(scope="module")
def asked(llava, prefs, tmp_path_factory):
    """(argv without --out, answers of the undisturbed run): sampled, so that seeds matter."""
    base = tmp_path_factory.mktemp("asked")
    shutil.copytree(prefs.parent, base / "image")
    (base / "query").mkdir()
    (base / "query" / "query_all.json").write_text(
        json.dumps(
            [
                {"id": i, "image": f"m{i - 1}.png", "query": "Is it " + "very " * i + "big?"}
                for i in range(1, 11)
            ]
        )
    )
    (base / "annotations.json").write_text(json.dumps([{"type": "generative"}] * 10))
    argv = [
        "generate",
        "--benchmark",
        "amber",
        "--data",
        base,
        "--model",
        llava,
        "--batch-size",
        "4",
        "--max-new-tokens",
        "16",
        "--temperature",
        "1",
        "--dimension",
        "g",
    ]
    assert harness.run("evaluate", [*argv, "--out", base / "whole"], base / "log") == 0, (
        base / "log"
    ).read_text()
    return argv, (base / "whole" / "answers.jsonl").read_bytes()


def test_answers_after_a_kill_are_those_of_the_undisturbed_run(asked, tmp_path):
    """Torn in the middle of a batch, and of a line."""
    argv, whole = asked
    out, log = tmp_path / "out", tmp_path / "log"
    argv = [*argv, "--out", out]
    process = harness.child("evaluate", argv, log)
    while process.is_alive() and not (
        (out / "answers.jsonl").exists() and (out / "answers.jsonl").read_bytes()
    ):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
    assert whole.startswith((out / "answers.jsonl").read_bytes())
    assert harness.run("evaluate", argv, log) == 0, log.read_text()
    assert (out / "answers.jsonl").read_bytes() == whole  # from what the killed process left
    for kept in (len(whole.splitlines(True)[0]) + 9, whole.rindex(b"{") + 3):
        (out / "answers.jsonl").write_bytes(whole[:kept])
        assert harness.run("evaluate", argv, log) == 0, log.read_text()
        assert (out / "answers.jsonl").read_bytes() == whole


def test_sampled_answers_go_on_with_the_same_batch_size_alone(asked, tmp_path):
    """A batch is sampled together: another size gives other answers."""
    argv, whole = asked
    (tmp_path / "out").mkdir()
    argv = [*argv, "--out", tmp_path / "out"]
    assert harness.run("evaluate", argv, tmp_path / "log") == 0
    assert harness.run("evaluate", [*argv, "--batch-size", "3"], tmp_path / "log") == 2
    assert "batch_size was 4, is 3" in (tmp_path / "log").read_text()
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == whole


def test_a_second_process_on_the_folder_is_refused(asked, tmp_path):
    argv, whole = asked
    argv = [*argv, "--out", tmp_path / "out"]
    (tmp_path / "out").mkdir()
    held = lock(tmp_path / "out")  # as a running evaluation holds it
    assert harness.run("evaluate", argv, tmp_path / "log") == 2
    assert "another process" in (tmp_path / "log").read_text()
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    held.close()
    assert harness.run("evaluate", argv, tmp_path / "log") == 0
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == whole
