"""What the README claims is checked: line counts, commands, defaults, and the diff it shows."""

import ast
import io
import json
import re
import shutil
import subprocess
import sys
import tokenize

import pytest

import symmpo
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def code_lines(path):
    """Lines that carry code: neither blank, nor comment, nor docstring."""
    source, lines, documentation = path.read_text(), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(
            node
        ):
            documentation.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skip = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


def test_reading_order_counts():
    rows = re.findall(r"^\| `(\S+\.py)` \| (\d+) \| (\d+) \|", README, re.M)
    assert [name for name, *_ in rows[:4]] == ["symmpo.py", "data.py", "train.py", "evaluate.py"]
    for name, lines, code in rows:
        path = ROOT / name
        counted = len(path.read_text().splitlines()), code_lines(path)
        assert counted == (int(lines), int(code)), name


@pytest.mark.parametrize("name", ["symmpo.py", "data.py", "train.py", "evaluate.py", "respond.py"])
def test_house_style(name):
    source = (ROOT / name).read_text()
    assert max(map(len, source.splitlines())) <= 100
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            limit = 120 if node.name == "train" else 60
            assert node.end_lineno - node.lineno < limit, node.name


def test_the_new_objective_applies_and_trains(tmp_path, llava, prefs):
    diff = re.search(r"```diff\n(.*?)```", README, re.S)[1]
    assert len(re.findall(r"^\+(?!\+\+)", diff, re.M)) < 17
    for name in ("symmpo.py", "train.py", "data.py", "evaluate.py", "respond.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks")
    for part in re.split(r"^--- a/", diff, flags=re.M)[1:]:
        target = tmp_path / part.split("\n")[0]
        for hunk in re.split(r"^@@\n", part, flags=re.M)[1:]:
            lines = [line or " " for line in hunk.removesuffix("\n").split("\n")]
            old, new = (
                "\n".join(line[1:] for line in lines if line[0] in kind) for kind in (" -", " +")
            )
            source = target.read_text()
            assert source.count(old) == 1, old
            target.write_text(source.replace(old, new))
    done = subprocess.run(
        [
            sys.executable,
            tmp_path / "train.py",
            "--model",
            llava,
            "--data",
            prefs,
            "--objective",
            "ipo",
            "--steps",
            "2",
            "--batch-size",
            "4",
            "--lora-r",
            "4",
            "--out",
            tmp_path / "run",
            "--cache",
            tmp_path / "cache",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in train.read_metrics(tmp_path / "run")]
    assert losses[0] == pytest.approx((1 / (2 * 0.1)) ** 2)  # rho = 0: 25


def test_commands_and_defaults_are_the_real_ones():
    names = {action.option_strings[0] for action in train.options()._actions}
    for command in re.findall(r"^(?:torchrun|python) .*train\.py.*$", README, re.M):
        flags = re.findall(r" (--[a-z-]+)", command.split("train.py")[1])
        assert set(flags) <= names, command
    flags = "lam|gamma|eta|anchors|resume|skip-bad|no-share-prefix"
    for flag in re.findall(rf"`(--(?:{flags}))", README):
        assert flag in names
    args = train.parse_args(["--model", "m", "--data", "d"])
    w = symmpo.OBJECTIVES["symmpo"][1]
    assert (w["beta"], w["lam"], w["gamma"], w["eta"], w["delta"]) == (0.1, 0.5, 1e-4, 1.0, 0.0)
    assert (
        args.batch_size,
        args.epochs,
        args.lr,
        args.warmup,
        args.weight_decay,
        args.clip,
        args.lora_r,
        args.lora_alpha,
        args.lora_dropout,
    ) == (64, 2, 5e-6, 0.05, 0.01, 1.0, 128, 256, 0.0)
    for text in ("batch 64, 2 epochs", "rate 5e-6", "rank 128 and alpha 256", "weight decay\n0.01"):
        assert text in README


def test_results_are_the_measured_ones():
    assert (ROOT / "docs" / "tiny_table.md").read_text() in README


def test_pins_are_exact_and_links_lead_somewhere():
    for line in (ROOT / "requirements.txt").read_text().split():
        assert re.fullmatch(r"[a-z0-9-]+==[\d.]+", line)
    for link in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_speed_figures_are_the_measured_ones():
    """Every ratio and size in the README's side-by-side tables stands in bench_results/."""
    text = README[README.index("**Side by side**") : README.index("**Distance to the limit.**")]
    results = [json.loads(path.read_text()) for path in (ROOT / "bench_results").glob("*.json")]
    measured = {
        f"{row['ratio'][0]:.2f}"
        for found in results
        for part in ("ladder", "trl")
        for row in found.get(part, {}).get("rows", [])
    }
    measured |= {
        f"{row['predicted ratio']:.2f}"
        for found in results
        for row in found.get("ladder", {}).get("rows", [])
    }
    mib = {
        f"{row['MiB']:,.0f}" for found in results for row in found.get("memory", {}).get("rows", [])
    }
    ratios = re.findall(r"\| \**(\d\.\d\d)\**(?= )", text)
    text = text[text.index("| peak memory") :]
    sizes = re.findall(r"\| ([\d,]*\d)(?=,? )", text)
    assert len(ratios) >= 16 and set(ratios) <= measured, set(ratios) - measured
    assert len(sizes) == 8 and set(sizes) <= mib, set(sizes) - mib


def test_limit_and_scale_figures_are_the_measured_ones():
    text = " ".join(README[README.index("**Distance to the limit.**") :].split())
    quick, mid, wide, scale = (
        json.loads((ROOT / "bench_results" / f"{name}.json").read_text())[part]
        for name, part in [
            ("ladder-trl-memory-floor-quick", "floor"),
            ("floor-mid", "floor"),
            ("floor-wide", "floor"),
            ("scale-small", "scale"),
        ]
    )
    shares = mid["time shares by operator"]
    products = sum(v for k, v in shares.items() if k in ("mm", "addmm", "bmm"))
    attention = sum(v for k, v in shares.items() if "attention" in k)
    times, memory = zip(
        *(scale["steps"][axis]["exponent"] for axis in ("responses", "image tokens", "batch"))
    )
    last = scale["rows"][-1]
    for claim in (
        f"{quick['fraction'][0]:.2f} (quick), {mid['fraction'][0]:.2f} (mid-size",
        f"{wide['fraction'][0]:.2f} with two layers",
        f"products ({products:.0%} of the step)",
        f"attention kernel ({attention:.0%};",
        "would leave "
        f"{mid['fraction if only products and attention took time']:.2f} if everything else",
        f"{last['records']:,.0f} lines (1.6 GB) opens in {last['open s']:.1f} s",
        "exponent {} in responses per prefix, {} in image tokens".format(*times),
        f"and {times[2]} in batch, memory with {memory[0]}, {memory[1]} and {memory[2]}",
    ):
        assert claim in text, claim
