"""The layout: who may import whom, how long files and functions may be, what stands at the root."""

import ast
import io
import subprocess
import tokenize

import pytest

from conftest import ROOT

MODULES = ("symmpo", "data", "train", "evaluate")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FOLDERS = ("vlm", "support", "benchmarks", "construct", "speed", "tiny", "papers", "notebooks")
OURS = (*MODULES, *FOLDERS)
MAY_IMPORT = {
    "symmpo": (),
    "support": ("support",),
    "vlm": ("support", "vlm"),
    "data": ("symmpo", "support", "vlm"),
    "benchmarks": ("support", "benchmarks"),
    "train": ("symmpo", "data", "support", "vlm"),
    "evaluate": ("benchmarks", "support"),
    "construct": ("data", "support", "vlm", "construct"),
    "speed": OURS,
    "tiny": OURS,
    "papers": ("benchmarks", "support"),
    "notebooks": OURS,
}
# What may also be imported inside functions: where a model answers.
INSIDE_FUNCTIONS = {
    "benchmarks/answers.py": ("vlm",),
    "data.py": ("construct",),
    "evaluate.py": ("vlm",),
    "train.py": ("benchmarks",),
}
# Slow or optional: inside the functions that need them, except in these folders.
SLOW = {"transformers", "peft", "openai", "pyarrow", "matplotlib", "nltk", "spacy"}
SKIPPED_TOKENS = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def files():
    found = [ROOT / f"{name}.py" for name in MODULES]
    for folder in FOLDERS:
        found += sorted((ROOT / folder).rglob("*.py"))
    return found


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def owner(path):
    """ "train" for train.py, "vlm" for vlm/load.py."""
    return name_of(path).removesuffix(".py").split("/")[0]


def imports(path):
    """[(top-level name, is it inside a function?)]"""
    tree = ast.parse(path.read_text())
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            inside.update(id(child) for child in ast.walk(node))
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        found += [(name.split(".")[0], id(node) in inside) for name in names]
    return found


def lines_and_tokens(path):
    """(lines of code, tokens), without comments and docstrings."""
    source, documentation = path.read_text(), set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
        if documented and ast.get_docstring(node) is not None:
            documentation.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines, tokens = set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED_TOKENS and token.start[0] not in documentation:
            lines.update(range(token.start[0], token.end[0] + 1))
            tokens += 1
    return len(lines), tokens


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_imports_only_what_its_layer_may(path):
    allowed = MAY_IMPORT[owner(path)]
    for name, is_inside in imports(path):
        if name not in OURS or name in allowed:
            continue
        late = INSIDE_FUNCTIONS.get(name_of(path), ())
        assert is_inside and name in late, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_slow_packages_are_imported_where_they_are_needed(path):
    at_the_top = {name for name, is_inside in imports(path) if not is_inside}
    assert not at_the_top & SLOW
    if owner(path) in ("benchmarks", "evaluate"):
        assert "torch" not in at_the_top, "scoring starts without torch"


def test_symmpo_needs_torch_and_the_standard_library():
    names = {name for name, _ in imports(ROOT / "symmpo.py")}
    assert names == {"torch", "math", "collections", "dataclasses", "typing"}


@pytest.mark.parametrize("path", files(), ids=name_of)
def test_files_and_functions_are_short(path):
    lines, _ = lines_and_tokens(path)
    assert lines <= 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, FUNCTIONS):
            assert node.end_lineno - node.lineno < 80, node.name


def test_the_four_modules_are_the_thousand_lines():
    counted = [lines_and_tokens(ROOT / f"{name}.py") for name in MODULES]
    assert sum(lines for lines, _ in counted) <= 1150
    assert sum(tokens for _, tokens in counted) <= 11_500


def test_speed_is_four_small_files():
    counted = [lines_and_tokens(path)[0] for path in (ROOT / "speed").glob("*.py")]
    assert len(counted) <= 4 and sum(counted) <= 450


def test_everything_is_small():
    counted = [path for path in files() if owner(path) != "notebooks"]
    tokens = sum(lines_and_tokens(path)[1] for path in counted)
    assert tokens <= 49_670


def test_nothing_else_stands_at_the_root():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in listed.stdout.splitlines()}
    visible = {name for name in names if not name.startswith(".")}
    wanted = {f"{name}.py" for name in MODULES} | set(FOLDERS)
    wanted |= {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", "docs", "tests"}
    assert visible == wanted
