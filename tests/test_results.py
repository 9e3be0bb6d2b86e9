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


def test_preferences_gain_with_records_and_imitation_does_not():
    rows = rows_of("mdpo-figure5")
    column = "amber sampled CHAIR↓"
    for label in ("mDPO", "SymMPO"):
        few, many = rows[f"{label} @ 25"], rows[f"{label} @ 777"]
        assert apart(many, few, column) and apart(few, many, "amber sampled Cover↑")
        assert f"{mean(few[column]):.1f} to {mean(many[column]):.1f}" in TEXT
        for size in (75, 250, 777):
            assert apart(rows[f"{label} @ {size}"], rows[f"SFT @ {size}"], column)
        assert not apart(rows[f"{label} @ 25"], rows["SFT @ 25"], column)
        greedy = {size: mean(rows[f"{label} @ {size}"]["amber CHAIR↓"]) for size in (25, 75, 777)}
        assert greedy[25] - greedy[75] > greedy[75] - greedy[777]
    for label in ("SFT", "DPO"):
        assert not apart(rows[f"{label} @ 777"], rows[f"{label} @ 25"], column)


def test_imitation_is_as_good_where_the_captioner_does_not_err_alone(five):
    rows = rows_of("tiny-errors")
    assert mean(rows["SFT @ 0"]["amber Cover↑"]) > 81.4
    greedy = [mean(rows[f"{label} @ 0"]["amber CHAIR↓"]) for label in ("SFT", "SymMPO")]
    assert abs(greedy[0] - greedy[1]) < 1 and 67.9 in rows["mDPO @ 0"]["amber CHAIR↓"]
    assert apart(rows["SymMPO @ 0"], rows["mDPO @ 0"], "amber Cover↑")
    for error in ("0.1", "0.4"):
        for label in ("mDPO", "SymMPO"):
            row = rows[f"{label} @ {error}"]
            assert apart(row, rows[f"SFT @ {error}"], "amber sampled CHAIR↓")
    assert rows["SFT @ 0.1"]["amber CHAIR↓"] == five["SFT"]["amber CHAIR↓"]  # the same runs
    assert mean(rows["SFT @ 0.4"]["amber sampled CHAIR↓"]) > rows["base"]["amber sampled CHAIR↓"][0]
    kept = {label: mean(rows[f"{label} @ 0.4"]["amber Cover↑"]) for label in ("SFT", "SymMPO")}
    assert f"SFT and SymMPO keep {kept['SFT']:.0f} and {kept['SymMPO']:.0f}" in TEXT
    assert stdev(rows["mDPO @ 0.4"]["amber Cover↑"]) > 5  # its seeds differ most
    for label in ("SFT", "mDPO", "SymMPO"):
        assert apart(rows[f"{label} @ 0.4"], rows["DPO @ 0.4"], "amber Cover↑")


KINDS = ("edit", "neighbour", "crop", "black", "noise")
COLUMNS = ("amber CHAIR↓", "amber Cover↑", "amber sampled CHAIR↓", "amber sampled Cover↑")


@pytest.fixture(scope="module")
def kinds():
    return rows_of("symmpo-figure4")


def mdpo_less_symmpo(rows, kind, column):
    """(difference of the means, its standard error)"""
    pair = rows[f"mDPO @ {kind}"][column], rows[f"SymMPO @ {kind}"][column]
    error = sum(stdev(values) ** 2 / 3 for values in pair) ** 0.5
    return mean(pair[0]) - mean(pair[1]), error


def test_what_the_contrast_image_shows_matters(kinds):
    cover = {}
    for kind in KINDS:
        cover[kind] = [
            mean(kinds[f"{label} @ {kind}"]["amber Cover↑"]) for label in ("mDPO", "SymMPO")
        ]
    assert min(cover["edit"]) > 72.5 and max(cover["edit"]) < 74.5
    assert min(cover["neighbour"] + cover["noise"]) > 67.5 and max(cover["neighbour"]) < 69.5
    assert min(cover["crop"] + cover["black"]) > 62 and max(cover["crop"] + cover["black"]) < 66.5


def test_four_of_twenty_comparisons_part_the_objectives(kinds):
    found = []
    for kind in KINDS:
        for column in COLUMNS:
            ours, theirs = kinds[f"SymMPO @ {kind}"], kinds[f"mDPO @ {kind}"]
            if apart(ours, theirs, column) or apart(theirs, ours, column):
                found.append((kind, column, mean(ours[column]) < mean(theirs[column])))
    assert found == [
        ("edit", "amber CHAIR↓", True),
        ("edit", "amber sampled Cover↑", True),
        ("neighbour", "amber CHAIR↓", False),
        ("black", "amber sampled CHAIR↓", False),
    ]


def test_the_offset_and_where_mdpo_loses(kinds):
    """c is notebook 3's, as it printed it."""
    printed = json.loads((ROOT / "notebooks/03_offset_on_a_model.ipynb").read_text())
    text = "".join(
        "".join(out.get("text", "")) for c in printed["cells"] for out in c.get("outputs", [])
    )
    groups = {True: [], False: []}
    for kind, name in zip(KINDS, ("edit", "neighbour", "crop 1–20 %", "black", "noise")):
        c = float(re.search(rf"(?m)^{name} +\d+% +(\S+) nats", text)[1])
        cells = [mdpo_less_symmpo(kinds, kind, column) for column in COLUMNS]
        groups[c < 0].append(cells)
        greedy, sampled = cells[1], cells[3]
        line = f"| {kind} | {c:+.2f} | {greedy[0]:+.1f} ± {greedy[1]:.1f} | "
        assert line + f"{sampled[0]:+.1f} ± {sampled[1]:.1f} |" in TEXT
    assert [len(group) for group in groups.values()] == [2, 3]
    gaps = []
    for column in range(4):
        sides = [[cells[column] for cells in group] for group in groups.values()]
        (low, low_error), (high, high_error) = map(mean_of_several, sides)
        error = (low_error**2 + high_error**2) ** 0.5
        gaps.append(f"{low - high:.1f} ± {error:.1f}")
    assert f"lie {gaps[1]} points apart when greedy and {gaps[3]} at temperature 1" in TEXT
    assert f"nothing of it ({gaps[0].lstrip('-')} and {gaps[2]})" in TEXT


def mean_of_several(cells):
    """(mean, its standard error) of [(value, standard error), ...]"""
    error = sum(error**2 for _, error in cells) ** 0.5 / len(cells)
    return mean(value for value, _ in cells), error


def test_what_each_term_does():
    rows = rows_of("tiny-terms")
    rates = json.loads((ROOT / "papers/results/tiny-terms.json").read_text())["rows"]
    for label in ("DPO", "DPO+Pair", "no-AncPO"):
        assert f"{label}, lr 1e-4" in rates  # the lowest that was tried
        assert min(rows[label]["amber CHAIR↓"]) > 10
    assert f"DPO falls to {mean(rows['DPO+AncPO']['amber CHAIR↓']):.1f}" in TEXT
    whole, without = rows["SymMPO"], rows["no-Pair"]
    assert apart(whole, without, "amber sampled CHAIR↓")
    assert apart(without, whole, "amber CHAIR↓")
    strong = rows["SymMPO-strong-Margin"]
    for column in COLUMNS:
        values, others = whole[column], rows["no-Margin"][column]
        assert abs(mean(values) - mean(others)) <= stdev(values) + stdev(others), column
        assert apart(whole, strong, column)
    assert min(rows["DPO+Margin"]["amber Cover↑"]) > 77


def test_what_pair_does_shows_in_questions():
    rows = rows_of("symmpo-table2")
    whole, without = rows["SymMPO"], rows["no-Pair"]
    for column in ("amber Acc↑", "hallusionbench aAcc↑"):
        assert apart(without, whole, column)
        shown = f"{mean(without[column]):.1f} in place of {mean(whole[column]):.1f}"
        assert shown in TEXT
    assert apart(without, whole, "objhal Resp.↓")  # the paper's counter-example
    published = json.loads((ROOT / "benchmarks/paper.json").read_text())["7b"]
    resp = {
        name: row["objhal Resp.↓"][0] for name, row in published.items() if "objhal Resp.↓" in row
    }
    assert resp["SymMPO paper: w/o Pair"] < resp["SymMPO paper: + SymMPO"]


def test_rejected_images_of_other_kinds():
    rows = rows_of("mdpo-table3")
    order = ("random", "crop", "crop-large", "moco")
    chair = [mean(rows[kind]["amber CHAIR↓"]) for kind in order]
    cover = [mean(rows[kind]["amber Cover↑"]) for kind in order]
    assert chair == sorted(chair) and cover == sorted(cover, reverse=True)
    assert apart(rows["random"], rows["moco"], "amber CHAIR↓")
    assert apart(rows["moco"], rows["random"], "amber Cover↑")
    for one, other in zip(order, order[1:]):
        for column in ("amber CHAIR↓", "amber Cover↑"):
            assert not (
                apart(rows[one], rows[other], column) or apart(rows[other], rows[one], column)
            )
    resp = {kind: mean(rows[kind]["objhal Resp.↓"]) for kind in order}
    assert min(resp, key=resp.get) == "crop-large"


def test_both_terms_of_mdpo_keep_coverage():
    rows = rows_of("mdpo-table2")
    for label in ("no-conditional", "no-anchor"):
        assert apart(rows[label], rows["mDPO"], "amber Cover↑")
    kept = {label: mean(row["amber Cover↑"]) for label, row in rows.items()}
    assert f"it is {kept['no-conditional']:.1f} in place of {kept['mDPO']:.1f}" in TEXT
    assert f"without the anchor {kept['no-anchor']:.1f}" in TEXT
    assert mean(rows["no-conditional"]["amber CHAIR↓"]) < mean(rows["mDPO"]["amber CHAIR↓"])
    blind = rows_of("mdpo-figure1")["DPO-no-image"]
    assert (
        abs(mean(blind["amber CHAIR↓"]) - 12) < 0.5
        and abs(mean(blind["amber Cover↑"]) - 81.4) < 0.5
    )


def test_one_anchor_is_enough():
    rows = rows_of("mdpo-table4")
    assert len(rows) == 3
    for label in ("y_w,y_l", "y_w,y_l,m_l"):
        assert apart(rows["y_w"], rows[label], "amber CHAIR↓")
