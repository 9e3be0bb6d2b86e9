"""The committed notebooks were run to their end, in order, without an error, and are not heavy.

Running them again is the business of .ci/run; here only what stands in the files is checked.
"""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    return [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == kind]


def test_there_are_notebooks_and_they_weigh_under_3_mb():
    assert {path.name[:3] for path in NOTEBOOKS} >= {"01_", "02_"}
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
