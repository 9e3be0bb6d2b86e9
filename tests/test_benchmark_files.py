"""The benchmarks' questions in the files that people have: parquet, and POPE's three files."""

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


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def colour_of(question):
    return Image.open(io.BytesIO(question.image)).getpixel((0, 0))


def ask(benchmark, folder, **settings):
    return BENCHMARKS[benchmark].questions(folder, Settings(**settings))


def answered(benchmark, questions, texts):
    field = BENCHMARKS[benchmark].ANSWER
    return [{**asked.record, field: text} for asked, text in zip(questions, texts, strict=True)]


def test_the_shards_of_a_parquet_table_are_one(tmp_path):
    rows = []
    for number, colour in enumerate(("red", "green", "red")):
        rows.append(
            {
                "index": str(number),
                "question": "Which?\nOptions: A: cat, B: dog",
                "image": {"bytes": png(colour), "path": None},
                "answer": "AB"[number % 2],
                "category": "math",
                "l2_category": "geometry",
                "bench": "MMStar",
            }
        )
    (tmp_path / "data").mkdir()
    for number, part in enumerate((rows[:2], rows[2:])):
        write_parquet(tmp_path / "data" / f"val-0000{number}-of-00002.parquet", part)
    questions = ask("mmstar", tmp_path)
    assert [colour_of(asked)[0] for asked in questions] == [255, 0, 255]
    metrics = score("mmstar", answered("mmstar", questions, ["A", "A", "A"]), tmp_path)["metrics"]
    assert metrics["overall"] == pytest.approx(200 / 3)


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


def test_a_category_without_its_file_is_an_error(pope):
    (pope / "coco_pope_popular.json").unlink()
    with pytest.raises(UserError, match="coco_pope_popular.json"):
        ask("pope", pope)
