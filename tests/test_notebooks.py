"""The committed notebooks were run to their end, in order, without an error, and are not heavy.

Running them again is the business of .ci/run; here only what stands in the files is checked.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import matplotlib
import pytest

from notebooks import exercises, hosted
from support.cli import UserError
from test_layers import lines_and_tokens

HERE = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))


def cells(path, kind=None):
    found = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in found if kind in (None, cell["cell_type"])]


def text_of(cell):
    return "".join(cell["source"])


def setup_of(path):
    return text_of(cells(path, "code")[0])


def test_there_are_notebooks_and_they_weigh_under_3_mb():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{n:02}_" for n in range(7)]
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 3_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_from_a_clean_kernel_without_an_error(path):
    code = cells(path, "code")
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [out for c in code for out in c["outputs"]]
    errors = [out["ename"] for out in outputs if out["output_type"] == "error"]
    assert not errors
    for c in code:
        drawn = sum("image/png" in out.get("data", {}) for out in c["outputs"])
        assert drawn == "".join(c["source"]).count("plt.show()"), "a picture is missing"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_the_modules_and_asserts_its_claims(path):
    code = ["".join(c["source"]) for c in cells(path, "code")]
    assert any(f"import {m}\n" in text + "\n" for text in code for m in ("symmpo", "data", "train"))
    assert sum(text.count("assert ") for text in code) >= 5
    assert not any(
        f"def {name}(" in text
        for text in code
        for name in ("dpo_m", "copo", "pair", "margin", "ancpo", "packed_logps", "build_rows")
    ), "copied code"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_shows_no_paths_or_warnings_of_the_machine_it_ran_on(path):
    for c in cells(path, "code"):
        for out in c["outputs"]:
            text = "".join(out.get("text", [])) + "".join(out.get("data", {}).get("text/plain", []))
            for word in ("/home/", "/root/", "/Users/", "site-packages", "Traceback"):
                assert word not in text, f"{word!r} in an output: {text[:200]}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_there_are_exercises(path):
    code = [cell for cell in cells(path, "code") if not cell["metadata"].get("jupyter")]
    texts = ["".join(c["source"]) for c in code]
    assert len(texts) <= 12
    for text in texts:
        assert text.count("\n") < 15 and max(map(len, text.split("\n"))) <= 130, text
    assert 1 <= sum(text.count("# yours") for text in texts) <= 8
    words = "".join("".join(c["source"]) for c in cells(path, "markdown"))
    assert "## What you can do now" in words and ("minutes" in words)
    assert re.search(r"^\| symbol( or word)? \| meaning \|$", words, re.MULTILINE)
    if not path.name.startswith("00"):
        assert "Break it yourself" in words and "**Exercise" in words


@pytest.mark.parametrize("name", ["00_losses_by_hand", "01_partition_function"])
def test_solutions_pass_and_blanks_fail(name):
    matplotlib.use("agg")
    path, known, tried = HERE / f"{name}.ipynb", {}, 0
    for cell in cells(path, "code"):
        text = "".join(cell["source"])
        if "# yours" in text and "def check" not in text:
            with pytest.raises((AssertionError, TypeError, AttributeError, ValueError)):
                exec(exercises.blank(text), dict(known))
            tried += 1
        exec(text, known)
    assert tried >= 1


def test_helpers_are_small_plain_and_documented():
    lines, tokens = lines_and_tokens(HERE / "helpers.py")
    assert tokens <= 2020 and tokens <= 10 * lines
    for node in ast.walk(ast.parse((HERE / "helpers.py").read_text())):
        if isinstance(node, ast.FunctionDef) and node.name not in (
            "__init__",
            "closure",
            "do_POST",
        ):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_tells_a_result_is_folded(path):
    """What follows a cell begins with a heading or a bold word, or is folded away."""
    found = cells(path)
    for before, cell in zip(found, found[1:]):
        if before["cell_type"] == "code" and cell["cell_type"] == "markdown":
            left = exercises.FOLDED.sub("", text_of(cell)).strip()
            assert not left or left.startswith(("## ", "**")), left[:100]


def test_blank_copies_give_nothing_away(tmp_path, capsys):
    exercises.main(["--out", str(tmp_path)])
    for path in NOTEBOOKS:
        text = (tmp_path / path.name).read_text("utf-8")
        assert "<details>" not in text and "widget-state" not in text
        came_out = set()
        for cell in cells(path, "code"):
            for out in cell["outputs"]:
                came_out |= set(re.findall(r"[+-]?\d+\.\d+", "".join(out.get("text", []))))
        known = {number for cell in cells(path) for number in given_numbers(text_of(cell))}
        for cell in cells(tmp_path / path.name, "markdown"):
            told = set(re.findall(r"[+-]?\d+\.\d+", text_of(cell)))
            assert not told & came_out - known, f"{path.name}: {told & came_out - known}"
        for cell in cells(tmp_path / path.name, "code"):
            assert not cell["outputs"]
            source = text_of(cell)
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Assert):
                    line = source.splitlines()[node.lineno - 1]
                    assert "# yours" in source or "# checks" in line, line
                    assert node.msg is None, line
            for line in source.splitlines():
                if "# yours" in line:
                    assert re.search(r"[=:] \.\.\.,?  # yours", line), line


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_line_of_a_blank_copy_lost_its_use(path):
    """What only an assertion read that is gone in the copy would be left to puzzle over."""
    solved = [text_of(cell) for cell in cells(path, "code")]
    blanks = [exercises.blank(text) for text in solved]
    read_in_the_copy = set().union(*[names_in(text, ast.Load) for text in blanks])
    read = set().union(*[names_in(text, ast.Load) for text in solved])
    for text in blanks:
        if "# yours" not in text:
            idle = (names_in(text, ast.Store) & read) - read_in_the_copy
            assert not idle, text


def names_in(source, context):
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    return {node.id for node in found if isinstance(node.ctx, context)}


def given_numbers(source):
    """Settings of the code, which outputs may repeat: beta = 0.1."""
    return re.findall(r"(?:=|\(|, |: )([+-]?\d+\.\d+)", source)


def test_badges_open_the_notebooks_where_they_are_published(tmp_path, monkeypatch, capsys):
    for path in NOTEBOOKS:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(exercises, "HERE", tmp_path)
    exercises.main(["--badges", "https://github.com/else/where", "--branch", "old"])
    exercises.main(["--badges", "https://github.com/some-one/a.course.git"])
    for path in NOTEBOOKS:
        title = text_of(cells(tmp_path / path.name)[0])
        place = f"some-one/a.course/blob/main/notebooks/{path.name}"
        links = re.findall(r"\[!\[[^]]*\]\((https://[^)]*)\)\]\((https://[^)]*)\)", title)
        assert [link for _, link in links] == [
            f"https://colab.research.google.com/github/{place}",
            f"https://kaggle.com/kernels/welcome?src=https://github.com/{place}",
        ]
        assert title.startswith("# ") and title.split("\n")[1].startswith("[![")
        setup = setup_of(tmp_path / path.name)
        assert 'environ.get("SYMMPO_REPOSITORY", "https://github.com/some-one/a.course")' in setup
        assert cells(tmp_path / path.name)[2:] == cells(path)[2:], "all else is as it was"
    for args in (["--badges", "git@github.com:a/b"], ["--out", "x", "--branch", "main"]):
        with pytest.raises(UserError):
            exercises.main(args)


def test_all_notebooks_begin_with_the_same_setup():
    assert len({setup_of(path) for path in NOTEBOOKS}) == 1
    for path in NOTEBOOKS:
        first, second, *_ = cells(path, "code")
        assert first["metadata"] == second["metadata"] == {"jupyter": {"source_hidden": True}}


def run_setup(folder, address, on_colab):
    code = "import sys, types\n"
    if on_colab:
        code += 'sys.modules["google.colab"] = types.ModuleType("colab")\n'
    code += f"{setup_of(NOTEBOOKS[0])}\nprint(ROOT)"
    env = {**os.environ, "SYMMPO_REPOSITORY": address}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def published(tmp_path):
    """A repository that has what the setup cell needs."""
    folder = tmp_path / "published"
    (folder / "notebooks").mkdir(parents=True)
    (folder / "symmpo.py").touch()
    (folder / "requirements.txt").write_text(f"numpy=={metadata.version('numpy')}\n")
    shutil.copy(HERE / "hosted.py", folder / "notebooks")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    for args in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *args], check=True)
    return folder


def test_setup_finds_the_project_above_clones_it_on_colab_or_says_what_to_do(tmp_path, published):
    inside = run_setup(published / "notebooks", "", on_colab=False)
    assert inside.stdout.strip() == str(published)
    (tmp_path / "elsewhere").mkdir()
    for address, on_colab in (("", False), (str(published), False), ("", True)):
        lost = run_setup(tmp_path / "elsewhere", address, on_colab)
        assert lost.returncode == 1 and "Traceback" not in lost.stderr
        assert "clone it" in lost.stderr and "ADDRESS" in lost.stderr
    for _ in range(2):  # the second time it is there
        found = run_setup(tmp_path / "elsewhere", f"file://{published}", on_colab=True)
        assert found.stdout.strip() == str(tmp_path / "elsewhere" / "symmpo"), found.stderr


def test_what_is_missing_of_the_requirements(tmp_path, capsys):
    here = f"numpy=={metadata.version('numpy')}"
    absent = ["numpy==0.1", "no-such-package-anywhere==1.0"]
    assert hosted.missing([here, *absent, "jupyter==0.1"]) == absent
    (tmp_path / "requirements.txt").write_text(here)
    hosted.need_packages(tmp_path, install=True)
    assert capsys.readouterr().out == ""
    (tmp_path / "requirements.txt").write_text("\n".join([here, *absent]))
    hosted.need_packages(tmp_path, install=False)
    assert "numpy==0.1 no-such-package-anywhere==1.0" in capsys.readouterr().out
