"""What README.md and docs/ claim is checked: commands, options, defaults, links, figures."""

import contextlib
import importlib
import io
import json
import re

import pytest
import torch

import symmpo
import train
from benchmarks import report
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "speed" / "results"
COMMANDS = (  # whose --help is asked
    "train.py",
    "data.py",
    "evaluate.py",
    "-m construct.contrast",
    "-m construct.responses",
    "-m construct.review",
    "-m tiny.make",
    "-m papers",
    "-m vlm.convert",
    "-m speed",
)
OF_OTHERS = {"target", "local-dir"}  # SimPO's, hf's


def page(name):
    return " ".join((ROOT / "docs" / name).read_text().split())


@pytest.fixture(scope="module")
def options():
    """{command: the options in its --help}"""
    found = {}
    for command in COMMANDS:
        name = command.removeprefix("-m ").removesuffix(".py")
        if name in ("speed", "papers"):
            name = f"{name}.__main__"
        text = io.StringIO()
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            importlib.import_module(name).main(["--help"])
        found[command] = set(re.findall(r"--([a-z0-9-]+)", text.getvalue()))
    return found


def commands_of(text):
    """The commands in code blocks, continued lines joined."""
    for block in re.findall(r"^```\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"\bpython ", line):
                yield line.split("#")[0]


def test_readme_is_short():
    assert len(README) <= 9000


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(((?!http)[^)#\s]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_commands_and_options_exist(path, options):
    text = path.read_text()
    for line in commands_of(text):
        command = next((c for c in COMMANDS if c in line), None)
        if command is not None:
            given = set(re.findall(r" --([a-z0-9_-]+)", line)) - OF_OTHERS
            assert given <= options[command], line
        script = re.search(r"python (\S+\.py)", line)
        assert not script or (ROOT / script[1]).exists(), line
    every = set.union(*options.values()) | OF_OTHERS
    assert set(re.findall(r"`[^`\n]*--([a-z0-9_-]+)[^`\n]*`", text)) <= every


def test_readme_shows_objectives_that_exist():
    shown = re.findall(r"^\| `([a-z][a-z-]+)` \|", README, re.M)
    assert len(shown) == 6 and set(shown) <= set(symmpo.OBJECTIVES)


def test_defaults_are_those_of_the_table():
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", (ROOT / "docs" / "design.md").read_text(), re.M)
    table = dict(rows)
    paper, mdpo = symmpo.weights_of("symmpo", {}), symmpo.weights_of("mdpo", {})
    options = train.Options()
    for label, values in {
        "β, δ": f"{paper.beta}, {paper.delta:g}",
        "λ, γ, η of symmpo": f"{paper.lam}, 1e-4, {paper.eta:g}",
        "λ, η of mdpo": f"{mdpo.lam:g}, {mdpo.eta:g}",
        "batch, epochs": f"{options.batch_size}, {options.epochs:g}",
        "learning rate": "5e-6",
        "schedule": f"cosine, {options.warmup:.0%} warm-up".replace("%", " %"),
        "weight decay, clip": f"{options.weight_decay}, {options.clip}",
        "LoRA dropout": f"{options.lora_dropout:g}",
        "max length": f"{options.max_length:,} tokens",
    }.items():
        assert table[label] == values
    assert table["LoRA rank, alpha"].startswith(f"{options.lora_r}, {options.lora_alpha} ")
    assert (paper.gamma, options.lr) == (1e-4, 5e-6)


def test_results_are_the_measured_ones():
    """docs/results.md shows tables of papers/results, each behind a link to its file."""
    text = (ROOT / "docs" / "results.md").read_text()
    shown = re.findall(r"papers/results/([a-z0-9-]+)\.json\).*?\n\n(\| model .*?)\n\n", text, re.S)
    assert len(shown) >= 9
    for path in (ROOT / "papers/results").glob("*.json"):
        assert f"papers/results/{path.stem}." in text
    for name, table in shown:
        rows = measured(name)
        headings = [cell.strip() for cell in table.splitlines()[0].strip("|").split("|")][1:]
        assert table.splitlines() == report.table(rows, {}, headings, {})
    by_label = {name.partition(", lr")[0]: row for name, row in measured("miniature").items()}
    lines = re.findall(r"^\| (?:base|SFT|DPO|mDPO|SymMPO) \|.*$", README, re.M)
    assert len(lines) == 5
    for line in lines:
        name, *values = [cell.strip() for cell in line.strip("|").split("|")]
        for heading, value in zip(SHOWN, values, strict=True):
            assert report.with_spread(by_label[name][heading]) == value


def measured(name):
    return json.loads((ROOT / f"papers/results/{name}.json").read_text())["rows"]


SHOWN = ["hallusionbench aAcc↑", "amber Acc↑", "amber CHAIR↓", "amber Cover↑"]
SHOWN += ["amber sampled CHAIR↓", "amber sampled Cover↑"]


def test_speed_figures_are_the_measured_ones():
    """Every ratio and size in the side-by-side tables stands in speed/results."""
    text = (ROOT / "docs" / "speed.md").read_text()
    text = text[text.index("## Side by side") : text.index("For the full 7B")]
    results = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    measured, mib = set(), set()
    for found in results:
        for part in ("ladder", "trl", "trl as it is on a CPU"):
            for row in found.get(part, {}).get("rows", []):
                measured.add(f"{row['ratio'][0]:.2f}")
                measured.add(f"{row.get('predicted ratio', 1):.2f}")
        for row in found.get("memory", {}).get("rows", []):
            mib.add(f"{row['MiB']:,.0f}")
    ratios = re.findall(r"\| \**(\d\.\d\d)\**(?= )", text)
    sizes = re.findall(r"\| ([\d,]*\d)(?=,? )", text[text.index("| peak memory") :])
    assert len(ratios) >= 15 and set(ratios) <= measured, set(ratios) - measured
    assert len(sizes) == 8 and set(sizes) <= mib, set(sizes) - mib
    for figure in ("3.44 to 3.59 times", "3.1 times less memory", "2.5 times"):
        assert figure in " ".join(README.split())
        assert figure.split()[0] in text


def test_limit_and_scale_figures_are_the_measured_ones():
    text = page("speed.md")
    quick, mid, wide, scale = (
        json.loads((RESULTS / f"{name}.json").read_text())[part]
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
    exponents = [scale["steps"][axis]["exponent"] for axis in AXES]
    times, memory = zip(*exponents)
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


AXES = ("responses", "image tokens", "batch")


def test_the_picture_joins_two_images_where_z_stays():
    """What the README says of the method's picture: which cells stand in one sigmoid, by image."""

    def joined(name, term):
        def loss(rho):
            table = symmpo.Table(rho.view(3, 3, 1), rho.view(3, 3, 1), torch.ones(3, 1))
            weights = symmpo.weights_of(name, {})
            return symmpo.loss_terms(name, table, weights)[term].sum()

        curvature = torch.autograd.functional.hessian(loss, torch.zeros(9))
        pairs = curvature.triu(diagonal=1).nonzero().tolist()
        return [(a // 3, b // 3) for a, b in pairs]

    assert joined("symmpo", "dpo") == [(symmpo.M, symmpo.M)]
    assert joined("symmpo", "pair") == [(symmpo.M, symmpo.M), (symmpo.MP, symmpo.MP)]
    assert joined("mdpo", "copo") == [(symmpo.M, symmpo.MP)]


def test_pins_are_exact():
    for line in (ROOT / "requirements.txt").read_text().split():
        assert re.fullmatch(r"[a-z0-9-]+==[\d.]+", line)
