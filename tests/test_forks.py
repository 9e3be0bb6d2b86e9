"""The patches of docs/forks: each applies, is the formula that its page shows, and trains."""

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from symmpo import MP, NONE, WP, L, M, W

FORKS = ROOT / "docs" / "forks"
NAMES = sorted(path.stem for path in FORKS.glob("*.patch"))

TRAIN_ALL = """
import sys
patched, root, out, *names = sys.argv[1:]
sys.path[:0] = [patched, root]
import symmpo, train
assert symmpo.__file__.startswith(patched)
from support.files import whole_lines
for name in names:
    options = train.read_options(["--objective", name, "--steps", "2", "--batch-size", "2"])
    options.eval_data, options.out, options.cache = None, f"{out}/{name}", f"{out}/cache"
    run, done = train.train(options)
    lines = whole_lines(f"{out}/{name}/metrics.jsonl")
    moved = max(p.abs().max().item() for n, p in run.policy.named_parameters() if "lora_B" in n)
    assert moved > 0 and done == 2
    rewards = any(key.startswith("rewards/") for key in lines[0])
    print("RESULT", name, lines[0]["loss"], lines[1]["loss"], rewards)
"""


def patched(folder, names):
    """A copy of symmpo.py with patches applied; the module's path."""
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "symmpo.py", folder)
    for name in names:
        if f'    "{name}": Objective(' in (ROOT / "symmpo.py").read_text():
            continue  # this checkout has the patch already
        command = ["git", "apply", FORKS / f"{name}.patch"]
        outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
        subprocess.run(command, cwd=folder, check=True, env=outside)
    return folder / "symmpo.py"


def load(path):
    spec = importlib.util.spec_from_file_location("patched_symmpo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sigmoid_loss(x):
    return math.log(1 + math.exp(-x))


def by_hand(name, rho, logp, length):
    """The loss of one record, with plain floats, from the pages' formulas."""
    b = 0.1
    dpo = sigmoid_loss(b * (rho[M][W] - rho[M][L]))
    copo = sigmoid_loss(b * (rho[M][W] - rho[MP][W]))
    if name == "ipo":
        return (rho[M][W] - rho[M][L] - 1 / (2 * b)) ** 2
    if name == "simpo":
        return sigmoid_loss(2.0 * (logp[M][W] / length[W] - logp[M][L] / length[L]) - 1.0)
    if name == "rdpo":
        return dpo + copo
    if name == "chip":
        return sigmoid_loss(b * (2 * rho[M][W] - rho[M][L] - rho[MP][W]))
    if name == "lpoi":
        s = [math.exp(b * rho[image][W]) for image in (M, MP, NONE)]
        ranking = s[0] / sum(s) * s[1] / (s[1] + s[2])
        return dpo - math.log(ranking) + sigmoid_loss(b * rho[M][W])
    assert name == "svco"
    own, other = {W: M, WP: MP}, {W: MP, WP: M}
    total = 0.0
    for y in (W, WP):
        total += sigmoid_loss(b * (rho[own[y]][y] - rho[NONE][y]))
        total += sigmoid_loss(b * (rho[NONE][y] - rho[other[y]][y]))
    return total


def test_there_are_six_pages_that_show_their_patches():
    assert NAMES == ["chip", "ipo", "lpoi", "rdpo", "simpo", "svco"]
    index = (FORKS / "README.md").read_text()
    for name in NAMES:
        patch, page = (FORKS / f"{name}.patch").read_text(), (FORKS / f"{name}.md").read_text()
        assert re.search(r"```diff\n(.*?)```", page, re.S)[1] == patch
        assert f"({name}.md)" in index
        files = re.findall(r"^\+\+\+ b/(.*)$", patch, re.M)
        assert files == ["symmpo.py"], "an objective touches symmpo.py alone"
        added = [line for line in patch.splitlines() if re.match(r"\+[^+]", line)]
        assert f"adds {len(added)} lines" in " ".join(page.split())


@pytest.mark.parametrize("name", NAMES)
def test_applies_alone_and_is_its_formula(name, tmp_path):
    module = load(patched(tmp_path, [name]))
    torch.manual_seed(0)
    rho, logp = 20 * torch.randn(3, 3, 2).double(), -50 * torch.rand(3, 3, 2).double()
    length = torch.tensor([[7.0, 9.0], [12.0, 5.0], [8.0, 8.0]]).double()
    unread = torch.ones(3, 3, dtype=torch.bool)
    for cell in module.OBJECTIVES[name].cells:
        unread[cell] = False
    rho[unread] = math.nan
    if not module.OBJECTIVES[name].reference:
        rho[:] = math.nan
    weights = module.weights_of(name, {})
    terms = module.loss_terms(name, module.Table(rho, logp, length), weights)
    loss = sum(terms.values())
    for i in range(2):
        numbers = rho[:, :, i].tolist(), logp[:, :, i].tolist(), length[:, i].tolist()
        assert loss[i].item() == pytest.approx(by_hand(name, *numbers), rel=1e-9)
    zeros = torch.zeros(3, 3).tolist()
    at_start = module.loss_at_start(name, weights)
    if name == "simpo":
        assert at_start is None
    else:
        assert at_start == pytest.approx(by_hand(name, zeros, zeros, [1, 1, 1]), rel=1e-6)


def test_all_together_take_two_steps_each(tmp_path):
    patched(tmp_path / "patched", NAMES)
    command = [sys.executable, "-c", TRAIN_ALL, tmp_path / "patched", ROOT, tmp_path, *NAMES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = re.findall(r"^RESULT (\S+) (\S+) (\S+) (\S+)$", done.stdout, re.M)
    assert [name for name, *_ in results] == NAMES
    for name, first, second, rewards in results:
        assert math.isfinite(float(first)) and math.isfinite(float(second))
        assert (rewards == "True") == (name != "simpo"), "no reference, so no rewards"


def test_the_losses_own_tests_pass_with_more_objectives(tmp_path):
    patched(tmp_path, NAMES)
    paths = f"pythonpath={tmp_path} {ROOT} {ROOT / 'tests'}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", paths]
    command.append(ROOT / "tests" / "test_symmpo.py")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
