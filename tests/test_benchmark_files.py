"""The benchmarks' questions in the files that people have: VLMEvalKit's TSVs, parquet, and
POPE's three files."""

import base64
import csv
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from benchmarks import BENCHMARKS, score
from benchmarks.common import Settings
from support.cli import UserError

COLOURS = ("red", "green", "blue", "white")


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(file, "PNG")
    return file.getvalue()


def write_tsv(path, rows):
    """As VLMEvalKit's: a picture in base64 the first time, then the index of that row."""
    first = {}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        for row in rows:
            seen = first.setdefault(row["image"], row["index"])
            own = base64.b64encode(png(row["image"])).decode() if seen == row["index"] else seen
            writer.writerow({**row, "image": own})


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def colour_of(question):
    return Image.open(io.BytesIO(question.image)).getpixel((0, 0))


def ask(benchmark, folder, **settings):
    return BENCHMARKS[benchmark].questions(folder, Settings(**settings))


def answered(benchmark, questions, texts):
    field = BENCHMARKS[benchmark].ANSWER
    return [{**asked.record, field: text} for asked, text in zip(questions, texts, strict=True)]


def test_hallusionbench_tsv(tmp_path):
    rows = []
    for number, (index, answer) in enumerate(
        [("0_0", "Yes"), ("0_1", "No"), ("1_0", "No"), ("1_1", "Yes")]
    ):
        rows.append(
            {
                "index": f"hallusion_VD_illusion_7_{index}",
                "category": "VD",
                "l2-category": "illusion",
                "question": f'Is "it"\tlonger\u2028, {number}?',
                "answer": answer,
                "image": COLOURS[number // 2],
            }
        )
    write_tsv(tmp_path / "HallusionBench.tsv", rows)
    questions = ask("hallusionbench", tmp_path)
    assert [asked.prompt for asked in questions] == [row["question"] for row in rows]
    assert colour_of(questions[0]) == colour_of(questions[1]) == (255, 0, 0)
    assert colour_of(questions[3]) == (0, 128, 0)
    place = {"subcategory": "illusion", "set_id": "7", "figure_id": "1", "question_id": "0"}
    assert place.items() <= questions[2].record.items() and "image" not in questions[2].record
    answers = answered("hallusionbench", questions, ["Yes.", "no", "No, it is not", "no"])
    found = score("hallusionbench", answers, tmp_path)
    assert found["metrics"] == {"qAcc": 50.0, "fAcc": 50.0, "aAcc": 75.0}


def test_mmstar_tsv_and_the_shards_of_a_parquet_table_are_asked_alike(tmp_path):
    rows = []
    for number, colour in enumerate(("red", "green", "red")):
        rows.append(
            {
                "index": str(number),
                "question": "Which?\nOptions: A: cat, B: dog",
                "image": colour,
                "answer": "AB"[number % 2],
                "category": "math",
                "l2_category": "geometry",
                "bench": "MMStar",
            }
        )
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    for number, part in enumerate((rows[:2], rows[2:])):
        part = [{**row, "image": {"bytes": png(row["image"]), "path": None}} for row in part]
        write_parquet(tmp_path / "parquet" / "data" / f"val-0000{number}-of-00002.parquet", part)
    write_tsv(tmp_path / "MMStar.tsv", rows)
    results = []
    for folder in (tmp_path, tmp_path / "parquet"):
        questions = ask("mmstar", folder)
        assert [colour_of(asked)[0] for asked in questions] == [255, 0, 255]
        answers = answered("mmstar", questions, ["A", "A", "A"])
        results.append((answers, score("mmstar", answers, folder)["metrics"]))
    assert results[0] == results[1] and results[0][1]["overall"] == pytest.approx(200 / 3)
    text = (tmp_path / "MMStar.tsv").read_text()
    (tmp_path / "MMStar.tsv").write_text(text.replace("\t0\tA\t", "\t9\tA\t"))
    with pytest.raises(UserError, match="MMStar.tsv: .* row 2: its image '9'"):
        ask("mmstar", tmp_path)


def test_amber_tsv_has_the_yes_no_questions(tmp_path):
    kinds = ["discriminative-hallucination", "discriminative-attribute-state", "relation"]
    rows = []
    for number, (kind, answer) in enumerate(zip(kinds, ("No", "Yes", "Yes"))):
        rows.append(
            {
                "index": str(number),
                "category": kind,
                "question": f"Is it {number}?",
                "answer": answer,
                "image": "blue",
            }
        )
    write_tsv(tmp_path / "AMBER.tsv", rows)
    assert len(ask("amber", tmp_path, dimension="dr")) == 1
    questions = ask("amber", tmp_path)
    answers = answered("amber", questions, ["No", "Yes", "No"])
    metrics = score("amber", answers, tmp_path)["metrics"]
    assert metrics["discriminative"]["Accuracy"] == 66.6  # the official 0.001 in the denominator
    assert metrics["existence"]["Accuracy"] == pytest.approx(99.9)
    assert "generative" not in metrics  # there are no captions, and no word lists


# --- POPE -----------------------------------------------------------------------------------------


@pytest.fixture
def pope(tmp_path):
    """Two questions about each of two images in each category, the second one's truth is no."""
    (tmp_path / "val2014").mkdir()
    for number, colour in enumerate(COLOURS[:2]):
        Image.new("RGB", (20, 20), colour).save(tmp_path / "val2014" / f"COCO_{number}.png")
    for category in BENCHMARKS["pope"].CATEGORIES:
        rows = []
        for number in range(4):
            rows.append(
                {
                    "question_id": number + 1,
                    "image": f"COCO_{number // 2}.png",
                    "text": f"Is there a {category} {number % 2} in the image?",
                    "label": ("yes", "no")[number % 2],
                }
            )
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"coco_pope_{category}.json").write_text(lines)
    return tmp_path


def test_pope_is_scored_as_officially(pope):
    questions = ask("pope", pope)
    assert len(questions) == 12 and questions[0].image.endswith("COCO_0.png")
    assert questions[0].prompt.endswith(
        "image?\nAnswer the question using a single word or phrase."
    )
    assert ask("pope", pope, protocol="official")[0].prompt.endswith("in the image?")
    random = ["Yes", "yes. No", "No", "There is not. Yes"]  # read: yes yes no no; truth: yes no ...
    popular = ["I see no, thing", "NO", "nothing", "No,"]  # no yes yes no
    adversarial = ["no"] * 4
    answers = answered("pope", questions, random + popular + adversarial)
    metrics = score("pope", answers, pope)["metrics"]
    one_in_two = {"accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes_ratio": 50}
    assert metrics["random"] == one_in_two
    assert metrics["popular"] == one_in_two
    never = {"accuracy": 50, "precision": 0, "recall": 0, "f1": 0, "yes_ratio": 0}
    assert metrics["adversarial"] == never
    assert metrics["mean"]["f1"] == pytest.approx(100 / 3)


def test_repope_corrects_labels_and_leaves_questions_out(pope):
    path = pope / "coco_pope_random.json"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["label"] = "yes"
    (pope / "coco_repope_random.json").write_text("\n".join(json.dumps(row) for row in rows[:3]))
    questions = ask("pope", pope)
    result = score("pope", answered("pope", questions, ["yes"] * 12), pope)
    assert result["reading"].endswith("RePOPE")
    assert result["metrics"]["random"]["precision"] == 50
    assert result["metrics"]["repope random"]["precision"] == 100
    assert "repope popular" not in result["metrics"]


def test_pope_is_read_from_parquet(tmp_path):
    rows = []
    for number, category in enumerate(("random", "popular")):
        rows.append(
            {
                "question_id": str(number),
                "category": category,
                "question": "Is there a cat in the image?",
                "answer": ("Yes", "No")[number],
                "image": {"bytes": png(COLOURS[number]), "path": None},
            }
        )
    write_parquet(tmp_path / "test-00000-of-00001.parquet", rows)
    questions = ask("pope", tmp_path)
    assert [asked.record["category"] for asked in questions] == ["random", "popular"]
    assert colour_of(questions[1]) == (0, 128, 0)
    metrics = score("pope", answered("pope", questions, ["yes"] * 2), tmp_path)["metrics"]
    assert metrics["random"]["accuracy"] == 100 and metrics["popular"]["accuracy"] == 0


def test_pope_tsv_asks_a_question_in_each_of_its_categories(tmp_path):
    rows = []
    for number, categories in enumerate(("adversarial,popular,random", "random")):
        rows.append(
            {
                "index": str(number),
                "category": categories,
                "question": "Is there a cat in the image?",
                "answer": ("Yes", "No")[number],
                "image": COLOURS[number],
            }
        )
    write_tsv(tmp_path / "POPE.tsv", rows)
    questions = ask("pope", tmp_path)
    assert [asked.record["category"] for asked in questions] == [
        "adversarial",
        "popular",
        "random",
        "random",
    ]
    assert colour_of(questions[3]) == (0, 128, 0)
    metrics = score("pope", answered("pope", questions, ["yes"] * 4), tmp_path)["metrics"]
    assert metrics["random"]["accuracy"] == 50 and metrics["popular"]["accuracy"] == 100


def test_a_category_without_its_file_is_an_error(pope):
    (pope / "coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match="coco_pope_popular.json"):
        ask("pope", pope)
