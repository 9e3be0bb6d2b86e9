"""The claims of docs/results.md and README.md, computed from papers/results."""

import json
import re
from statistics import mean, stdev

import pytest

from conftest import ROOT

TEXT = " ".join((ROOT / "docs" / "results.md").read_text().split())


def rows_of(name):
    """{label without its rate: {column: values}}"""
    found = json.loads((ROOT / f"papers/results/{name}.json").read_text())["rows"]
    return {re.sub(", lr .*", "", label): row for label, row in found.items()}


@pytest.fixture(scope="module")
def five():
    return rows_of("miniature")


def apart(row, other, column):
    """Does every seed of `row` have less than every seed of `other`?"""
    return max(row[column]) < min(other[column])


def test_every_row_names_fewer_false_objects_and_fewer_true_ones(five):
    for label in ("SFT", "DPO", "mDPO", "SymMPO"):
        for column in ("amber CHAIR↓", "amber Cover↑", "amber sampled CHAIR↓"):
            assert apart(five[label], five["base"], column), (label, column)
    lost = {label: 81.4 - mean(row["amber Cover↑"]) for label, row in five.items()}
    assert five["base"]["amber Cover↑"] == [81.4] and "7 to 10 points of 81" in TEXT
    assert sorted(round(value) for value in lost.values()) == [0, 7, 10, 10, 10]


def test_preferences_beat_imitation(five):
    for label in ("mDPO", "SymMPO"):
        assert apart(five[label], five["SFT"], "amber sampled CHAIR↓")
        assert mean(five[label]["amber CHAIR↓"]) < mean(five["SFT"]["amber CHAIR↓"])
        for column in ("amber Acc↑", "hallusionbench aAcc↑"):
            assert apart(five["SFT"], five["base"], column)
            assert apart(five["base"], five[label], column)
    gained = mean(five["SFT"]["amber Acc↑"]) - mean(five["base"]["amber Acc↑"])
    assert round(gained) == -17 and "loses 17 points of yes/no accuracy" in TEXT


def test_mdpo_and_symmpo_are_not_told_apart(five):
    """Within the sum of their spreads, in every column."""
    for column, values in five["mDPO"].items():
        others = five["SymMPO"][column]
        spread = stdev(values) + stdev(others)
        assert abs(mean(values) - mean(others)) <= spread, column
    error = {}
    for column in ("amber CHAIR↓", "amber Cover↑"):
        squares = [stdev(five[label][column]) ** 2 / 3 for label in ("mDPO", "SymMPO")]
        error[column] = sum(squares) ** 0.5
    shown = f"{error['amber CHAIR↓']:.1f} in CHAIR and {error['amber Cover↑']:.1f} in coverage"
    assert shown in TEXT


def test_more_records_buy_little():
    rows = rows_of("mdpo-figure5")
    for label in ("SFT", "DPO", "mDPO", "SymMPO"):
        few, many = rows[f"{label} @ 75"], rows[f"{label} @ 250"]
        assert abs(mean(few["amber CHAIR↓"]) - mean(many["amber CHAIR↓"])) < 2
    for size in (75, 250):
        for label in ("mDPO", "SymMPO"):
            sft = rows[f"SFT @ {size}"]
            assert apart(rows[f"{label} @ {size}"], sft, "amber sampled CHAIR↓")


def test_imitation_is_as_good_where_the_captioner_does_not_err(five):
    rows = rows_of("tiny-errors")
    assert mean(rows["SFT @ 0"]["amber Cover↑"]) > 81.4
    assert apart(five["SFT"], rows["SFT @ 0"], "amber Cover↑")
    greedy = [mean(rows[f"{label} @ 0"]["amber CHAIR↓"]) for label in ("SFT", "SymMPO")]
    assert abs(greedy[0] - greedy[1]) < 1 and 67.9 in rows["mDPO @ 0"]["amber CHAIR↓"]
    assert apart(rows["SymMPO @ 0"], rows["mDPO @ 0"], "amber Cover↑")


def test_what_the_contrast_image_shows_matters():
    rows = rows_of("symmpo-figure4")
    lost = {}
    for label in ("mDPO", "SymMPO"):
        edit = rows[f"{label} @ edit"]
        for kind in ("crop", "black"):
            assert apart(rows[f"{label} @ {kind}"], edit, "amber Cover↑")
            change = mean(edit["amber Cover↑"]) - mean(rows[f"{label} @ {kind}"]["amber Cover↑"])
            lost[label, kind] = round(change)
    assert apart(rows["SymMPO @ edit"], rows["mDPO @ edit"], "amber CHAIR↓")
    assert lost["mDPO", "crop"] == 11 and lost["SymMPO", "crop"] == 7
    assert lost["mDPO", "black"] == 9 and lost["SymMPO", "black"] == 7
    errors = []
    for kind in ("crop", "black"):
        cells = [
            rows[f"{label} @ {shown}"] for label in ("mDPO", "SymMPO") for shown in ("edit", kind)
        ]
        squares = [stdev(row["amber Cover↑"]) ** 2 / 3 for row in cells]
        errors.append(f"{sum(squares) ** 0.5:.1f}")
    assert " and ".join(errors) + " points, so three seeds do not decide it" in TEXT
