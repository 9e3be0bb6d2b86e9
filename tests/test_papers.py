"""Tables by name: the commands they print exist, and one small table is made, kept and shown."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from PIL import Image

import evaluate
import train
from conftest import ROOT
from papers.__main__ import TABLES, main
from support.files import write_json

FULL_SIZE = ["--model", "m", "--data", "d.jsonl", "--benchmarks", f"{ROOT}/tiny/built/."]


def commands(out, name, *options):
    command = ["bash", TABLES[name], *options, "--seeds", "1", "--dry-run", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("python ")]
    return [line[1:] for line in found]


def test_all_of_them_are_all_of_them():
    command = ["bash", TABLES["all"], "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = [name for name in TABLES if name not in ("all", "calibrate")]
    script = TABLES["all"].read_text()
    assert all(f" {name} " in script for name in tables)
    printed = set(done.stdout.splitlines())
    wanted = subprocess.run(
        ["bash", TABLES["mdpo-table3"], "--dry-run"], capture_output=True, text=True, check=True
    )
    assert {line for line in wanted.stdout.splitlines() if line.startswith("python")} <= printed
    for option in ("--model", "--out"):
        refused = subprocess.run([*command, option, "x"], capture_output=True, text=True)
        assert refused.returncode == 2 and option in refused.stderr


@pytest.mark.parametrize("name", [name for name in TABLES if name != "all"])
@pytest.mark.parametrize("options", [[], FULL_SIZE], ids=["tiny world", "full size"])
def test_every_command_of_every_table_exists(tmp_path, name, options):
    if options and "tiny_only" in TABLES[name].read_text():
        pytest.skip("about the tiny world alone")
    found = commands(tmp_path / "out", name, *options)
    assert len(found) > 1
    for script, *argv in found:
        if script == "-m":
            assert (ROOT / f"{argv[0].replace('.', '/')}.py").exists()
            continue
        argv = [{"BEST": "1e-4"}.get(part, part) for part in argv]
        if script == "train.py":
            read = train.read_options(argv)
            read.weights()  # refuses what the objective does not read
            assert (read.model == "m") == bool(options)
            if not options:
                preset = json.loads((ROOT / "tiny/options.json").read_text())
                for key in ("steps", "batch_size", "micro_batch", "lora_r", "lora_alpha", "warmup"):
                    assert getattr(read, key) == preset[key]
        else:
            assert script == "evaluate.py"
            assert evaluate.parse_args(argv).command in ("run", "page")


def test_lists_its_tables(capsys):
    with pytest.raises(SystemExit):
        main([])
    text = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\S", text, re.M) for name in TABLES)
    with pytest.raises(SystemExit) as end:
        main(["symmpo-table9"])
    assert end.value.code == 2


def test_a_table_is_made_once_and_goes_on_where_it_stopped(llava, prefs, tmp_path):
    amber = tmp_path / "benchmarks" / "amber"
    (amber / "image").mkdir(parents=True)
    Image.new("RGB", (28, 28), "red").save(amber / "image" / "1.png")
    files = {
        "annotations.json": [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": ["dog"]}],
        "relation.json": {"sky": [], "dog": []},
        "query/query_all.json": [{"id": 1, "image": "1.png", "query": "Describe this image."}],
    }
    for name, value in files.items():
        write_json(amber / name, value)
    (amber / "safe_words.txt").write_text("object")
    script = tmp_path / "one.sh"
    script.write_text(
        f". {ROOT}/papers/rows.sh\nrecipe=(--steps 1 --batch-size 2)\n"
        "measure mmhal amber-captions\nrow SymMPO --objective symmpo\nfinish\n"
    )
    command = ["bash", script, "--model", llava, "--data", prefs, "--seeds", "1"]
    command += ["--benchmarks", amber.parent, "--out", tmp_path / "out"]
    path = {"PATH": f"{sys.exec_prefix}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}
    first = subprocess.run(command, capture_output=True, text=True, env=path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("python train.py") == first.stdout.count("evaluate.py run") == 1
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["state"] == "finished" and list(results["rows"]) == ["SymMPO"]
    made = json.loads((tmp_path / "out/SymMPO-0/amber-captions/metrics.json").read_text())
    assert made["row"] == "SymMPO" and "| SymMPO" in (tmp_path / "out/results.md").read_text()
    again = subprocess.run(command, capture_output=True, text=True, env=path)
    assert again.returncode == 0 and "python" not in again.stdout.split("|")[0]
    (tmp_path / "out/SymMPO-0/curves.png").unlink()
    (tmp_path / "out/SymMPO-0/metrics.jsonl").unlink()  # a run that cannot go on
    broken = subprocess.run(command, capture_output=True, text=True, env=path)
    assert broken.returncode == 1 and "error: it failed, the end of" in broken.stderr
    script.write_text(script.read_text().replace("finish\n", "row bad --objective dpo --lam 1\n"))
    (tmp_path / "half").mkdir()
    half = command[:-1] + [tmp_path / "half"]
    assert subprocess.run(half, capture_output=True, env=path).returncode == 1
    assert "state: unfinished" in (tmp_path / "half/results.md").read_text()
