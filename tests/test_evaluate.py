"""evaluate.py: the five scorers against known results, generation, judging, and the commands."""

import base64
import functools
import io
import itertools
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import benchmarks
import evaluate
from benchmarks import BENCHMARKS
from benchmarks import answers as answering
from benchmarks.amber.amber import yes_or_no
from benchmarks.answers import answer, before_and_after, measure
from benchmarks.common import Question, Settings, image_file, read
from conftest import ROOT, TINY
from support.cli import UserError
from support.text import Text
from vlm.load import load_adapter, load_model
from vlm.prompts import Prompts

KNOWN = Path(__file__).resolve().parent / "fixtures" / "benchmarks"


def score(benchmark, answers, folder, judgements=None, **settings):
    return benchmarks.score(benchmark, answers, folder, Settings(judgements=judgements, **settings))


def metrics(*args, **settings):
    return score(*args, **settings)["metrics"]


def questions(benchmark, folder, **settings):
    image_file.cache_clear()
    return BENCHMARKS[benchmark].questions(folder, Settings(**settings))


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


# --- scorers: results of the official code (fixtures/benchmarks/ORIGIN.md) -----------------------


@pytest.mark.parametrize("protocol", ["symmpo", "official"])
def test_amber_captions_as_the_official_scorer(protocol):
    answers = read(KNOWN / "amber/answers.json")
    assert metrics(
        "amber", answers, KNOWN / "amber", protocol=protocol, dimension="g", similar=[]
    ) == {"generative": {"CHAIR": 47.1, "Cover": 12.1, "Hal": 25.0, "Cog": 12.2}}


def test_hallusionbench_as_the_official_scorer():
    answers = read(KNOWN / "hallusionbench/answers.jsonl")
    replies = read(KNOWN / "hallusionbench/judgements.json")
    assert metrics("hallusionbench", answers, ".", replies) == {
        "qAcc": 34.8624,
        "fAcc": 38.3562,
        "aAcc": 65.4275,
    }


@pytest.mark.parametrize(
    "protocol, score, rate, types",
    [
        ("symmpo", 155 / 96, 65.625, [20, 14, 22, 20, 20, 22, 10, 27]),
        ("official", 133 / 96, 68 / 0.96, [20, 7, 22, 15, 17, 21, 10, 21]),
    ],
)
def test_mmhal_as_the_official_scorers(protocol, score, rate, types):
    replies = read(KNOWN / "mmhal/judgements.json")
    found = metrics("mmhal", [{}] * 96, ".", replies, protocol=protocol)
    assert found["score"] == pytest.approx(score)
    assert found["hallucination_rate"] == pytest.approx(rate)
    assert found["score_per_type"] == pytest.approx([total / 12 for total in types])
    assert found["types"]["adversarial"] == found["score_per_type"][1]


# --- scorers: rules, by hand ----------------------------------------------------------------------


@pytest.fixture
def amber(tmp_path):
    """Two captions and six yes/no questions: 3 and 4 existence, 5 state, 6 number, 7 and 8
    relation (written the two ways in which AMBER writes it); truths alternate no, yes."""
    kinds = [
        "discriminative-hallucination",
        "discriminative-hallucination",
        "discriminative-attribute-state",
        "discriminative-attribute-number",
        "discriminative-relation",
        "relation",
    ]
    notes = [
        {"id": i, "type": "generative", "truth": ["sky", "person"], "hallu": ["dog"]}
        for i in (1, 2)
    ]
    notes += [
        {"id": i, "type": kind, "truth": "yes" if i % 2 == 0 else "no"}
        for i, kind in enumerate(kinds, 3)
    ]
    folder = tmp_path / "amber"
    save(folder / "annotations.json", notes)
    save(
        folder / "relation.json",
        {
            "sky": [],
            "person": ["child", "woman"],
            "dog": ["puppy"],
            "cloud": [],
            "line": [],
            "hat": [],
        },
    )
    (folder / "safe_words.txt").write_text("line\n")
    rng = np.random.default_rng(0)
    queries = []
    for i in range(1, 9):
        query = "Describe this image." if i < 3 else f"Is there a {'very ' * (i - 3)}big dog?"
        queries.append({"id": i, "image": f"AMBER_{i % 3}.jpg", "query": query})
        (folder / "image").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (50 + 5 * i, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "image" / f"AMBER_{i % 3}.jpg")
    save(folder / "query" / "query_all.json", queries)
    return folder


def test_amber_words_and_pairs(amber):
    captions = [
        {"id": 1, "response": "Two children, a puppy/dog and a line under the sky; sky's blue."},
        {"id": 2, "response": "A hat."},
    ]
    # puppy/dog is one token, no noun of AMBER's; child covers person; line is safe; sky twice
    assert metrics("amber", captions, amber, dimension="g")["generative"] == {
        "CHAIR": 20.0,
        "Cover": 50.0,
        "Hal": 50.0,
        "Cog": 0.0,
    }  # the hat, among 5 nouns
    pairs = [["hat", "dog"], ["sky", "hat"]]  # marks the dog, then covers the sky: no hallucination
    found = score("amber", captions, amber, dimension="g", similar=pairs)
    assert found["metrics"]["generative"] == {"CHAIR": 0.0, "Cover": 75.0, "Hal": 0.0, "Cog": 50.0}
    assert "table of pairs" in found["reading"]


def test_amber_yes_no_by_protocol(amber):
    said = {3: "No", 4: "Yes", 5: "no.", 6: "no", 7: "I do not see one", 8: "Yes"}
    answers = [{"id": i, "response": text} for i, text in said.items()]
    lenient = metrics("amber", answers, amber, dimension="d")
    assert lenient["existence"]["Accuracy"] == 100.0  # 2 / 2.001
    assert lenient["attribute"] == {"Accuracy": 49.9, "Precision": 49.9, "Recall": 99.7, "F1": 66.5}
    strict = metrics("amber", answers, amber, protocol="official", dimension="dr")
    assert strict == {"relation": {"Accuracy": 50.0, "Precision": 0.0, "Recall": 0.0, "F1": 0.0}}
    assert list(metrics("amber", answers, amber, dimension="da")) == [
        "attribute",
        "state",
        "number",
        "action",
    ]
    assert next(iter(metrics("amber", answers, amber))) == "discriminative"  # there is no caption
    answers.append({"id": 1, "response": "a dog"})
    assert list(metrics("amber", answers, amber))[:2] == ["generative", "discriminative"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("yes", "Yes"),
        ("No.", "No"),
        ("", "Yes"),
        ("maybe", "Yes"),
        ("unknown", "No"),
        ("Yes, no doubt", "Yes"),
        ("Not that I can see, yes", "No"),
        ("I would say yes", "Yes"),
        ("There is a dog, no", "No"),
        ("Look, no dog is there", "No"),
        ("A dog sits there", None),
        ("I say yes and not no!!!!!!", "Yes"),
    ],
)
def test_amber_reads_free_answers(text, expected):
    assert yes_or_no(text) == (expected or text)


def hallusion(figure, question, said, truth="1", category="VD"):
    return {
        "category": category,
        "subcategory": "map",
        "set_id": "0",
        "figure_id": str(figure),
        "question_id": str(question),
        "gt_answer": truth,
        "model_prediction": said,
    }


def test_hallusionbench_groups_and_reading_without_judge():
    answers = [
        hallusion(0, 0, "Yes."),
        hallusion(1, 0, "No, it is not.", "0"),
        hallusion(0, 1, "I cannot tell"),
        hallusion(1, 1, "The map says yes"),
        hallusion(0, 0, "unsure", category="VS"),
        hallusion(1, 0, "now", category="VS"),
    ]
    found = score("hallusionbench", answers, ".")
    # VS figure 0 may be unsure and is no figure; "now" is not "no"
    assert found["metrics"] == {"qAcc": 33.3333, "fAcc": 33.3333, "aAcc": 66.6667}
    assert found["reading"].startswith("no judge")
    perfect = metrics("hallusionbench", answers, ".", ["Correct"] * 6)
    assert perfect == {"qAcc": 100.0, "fAcc": 100.0, "aAcc": 100.0}


def mmstar(prediction, answer="B"):
    """One answer to each of the 18 sub-categories."""
    rows = []
    for name in read(ROOT / "benchmarks/mmstar/categories.json"):
        category, _, part = name.removesuffix(")").partition("(")
        if part:
            row = {"category": category, "l2_category": part}
            rows.append({**row, "answer": answer, "prediction": prediction})
    return rows


@pytest.mark.parametrize(
    "prediction, official, symmpo",
    [
        ("B", 1, 1),
        ("b) a cat", 1, 1),
        ("(B)", 1, 1),
        ("Option B", 1, 1),
        ("The answer is B", 1, 0),
        ("", 0, 0),
        ("It is B", 0, 1),
        ("the option\nB", 0, 1),
        ("option\nB", 1, 1),
        ("?", 0, 0),
    ],
)
def test_mmstar_letters(prediction, official, symmpo):
    for protocol, right in (("official", official), ("symmpo", symmpo)):
        found = metrics("mmstar", mmstar(prediction), ".", protocol=protocol)
        assert found["overall"] == pytest.approx(100 * 18 * right / 1500)
        assert found["math"] == pytest.approx(100 * 3 * right / 250)
        assert found["math(geometry)"] == 100 * right


def test_mmstar_takes_the_sizes_of_another_question_file(tmp_path):
    lines = [
        {"category": "math", "l2_category": "sums", "question": "?", "answer": a} for a in "ABCD"
    ]
    (tmp_path / "mmstar.jsonl").write_text("\n".join(map(json.dumps, lines)))
    answers = [{**line, "prediction": "A"} for line in lines]
    assert metrics("mmstar", answers, tmp_path) == {
        "overall": 25.0,
        "math": 25.0,
        "math(sums)": 25.0,
    }


@pytest.fixture
def objhal(tmp_path):
    """COCO annotations of two images: a cat on a chair; two dogs, a person, a dining table."""
    folder = tmp_path / "objhal"
    names = ["cat", "chair", "dog", "person", "dining table"]
    for split, image, objects, caption in [
        ("train", 1, ["cat"], "A kitten on a wooden chair."),
        ("val", 2, ["dog", "person"], "Dogs at a dining table."),
    ]:
        save(
            folder / f"annotations/captions_{split}2014.json",
            {"annotations": [{"image_id": image, "caption": caption}]},
        )
        save(
            folder / f"annotations/instances_{split}2014.json",
            {
                "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
                "annotations": [
                    {"image_id": image, "category_id": names.index(o)} for o in objects
                ],
            },
        )
    return folder


def test_objhal_caption_mode(objhal, tmp_path):
    answers = [
        {"image_id": 1, "text": "Assistant: A baby cat on a chair by a wine glass. The cat..."},
        {"image_id": 2, "text": "Two women with puppies on tables, and a hot dog."},
        {"image_id": 2, "text": "The toilet has a seat; the seat is up."},
        {"image_id": 1, "text": "Nothing to see."},
    ]
    # 1: cat chair [wine glass] cat; 2: person dog table [hot dog]; 3: [toilet], its seat no chair
    found = score("objhal", answers, objhal)
    assert found["metrics"]["response_hallucination"] == 100.0
    assert found["metrics"]["mention_hallucination"] == pytest.approx(100 * 3 / 9)
    assert "no judge: caption mode" in found["reading"]
    truth = {"1": ["cat", "chair"], "2": ["dog", "person", "dining table"]}
    save(tmp_path / "given" / "gt_objects.json", truth)
    assert metrics("objhal", answers, tmp_path / "given") == found["metrics"]


def test_objhal_judge_mode(objhal):
    answers = [
        {"image_id": 1, "text": "There is a cat with a laptop here."},
        {"image_id": 2, "text": "Dogs, a man and his car door."},
        {"image_id": 2, "text": "A cat sits."},
    ]  # three words: the judge is not asked
    replies = [
        '["cats", "Cat", "red laptop"]',
        'They are:\n["dogs", "group of men", "car door", "dining tables", "tennis racket"]',
        "not asked",
    ]
    found = score("objhal", answers, objhal, replies)
    # cat [laptop]; dog man "dining table" ["tennis racket"]; a car door is no car
    assert found["metrics"] == {
        "response_hallucination": 100.0,
        "mention_hallucination": pytest.approx(100 * 2 / 6),
    }
    with pytest.raises(UserError, match="no JSON list"):
        score("objhal", answers, objhal, ["dogs and cats"] * 3)


def test_judgements_may_be_chat_completions():
    wrapped = [{"choices": [{"message": {"content": "Rating: 4"}}]}] * 96
    assert metrics("mmhal", [{}] * 96, ".", wrapped)["score"] == 4


@pytest.mark.parametrize(
    "benchmark, answers, replies, message",
    [
        ("hallusionbench", [hallusion(0, 0, "yes"), hallusion(0, 0, "yes")], None, "second one"),
        ("hallusionbench", [hallusion(1, 0, "yes")], None, "figure 0"),
        ("hallusionbench", [hallusion(0, 0, "yes")], ["correct"] * 2, "2 judgements for 1"),
        ("mmhal", [{}] * 95, ["Rating: 3"] * 95, "96 questions"),
        ("mmhal", [{}] * 96, None, "no judge-free reading"),
        ("mmstar", mmstar("A")[1:], None, "no answers in coarse perception"),
        (
            "mmstar",
            [{**mmstar("A")[0], "prediction": None}],
            None,
            "answer 1: the field prediction",
        ),
        (
            "objhal",
            [{"image_id": 1, "text": "Nothing at all here."}],
            None,
            "names any COCO object",
        ),
        ("objhal", [{"image_id": 7, "text": "A cat."}], None, "what is in image 7"),
        ("amber", [{"id": 9, "response": "Yes"}], None, "no question with the id 9"),
        ("amber", [{"response": "Yes"}], None, "answer 1: the field id"),
        ("amber", [], None, "no answers"),
    ],
)
def test_errors_are_one_clear_line(benchmark, answers, replies, message, objhal, amber, tmp_path):
    save(tmp_path / "answers.json", answers)
    save(tmp_path / "replies.json", replies)
    command = [
        sys.executable,
        ROOT / "evaluate.py",
        "score",
        "--benchmark",
        benchmark,
        "--data",
        objhal if benchmark == "objhal" else amber,
        "--out",
        tmp_path / "m.json",
        "--answers",
        tmp_path / "answers.json",
    ]
    command += ["--judgements", tmp_path / "replies.json"] * (replies is not None)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "m.json").exists()
    assert message in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"id": 1},\n{"id": }]', "line 2"),
        ('{"id": 1}\n{"id"\n', "line 2"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    ],
)
def test_broken_files_are_named(tmp_path, text, message):
    for name in ["answers.jsonl"] + ["mmstar.parquet"] * ("git-lfs" in text):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("a.json", '{"a": {}}', {"a": {}}),
        ("a.json", '{\n "a": [{}\n, {}]\n}', {"a": [{}, {}]}),
        ("a.json", '{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ("a.json", "[]", []),
        ("a.json", '\ufeff{"a": "}\\n{"}\r\n{"a": 2}', [{"a": "}\n{"}, {"a": 2}]),
        ("a.jsonl", '{"a": 1}', [{"a": 1}]),
        ("a.jsonl", '[{"a": 1}]', [{"a": 1}]),
        ("a.jsonl", '"x"\n\n"y"\n', ["x", "y"]),
        ("a.jsonl", "", []),
    ],
)
def test_json_and_jsonl_are_told_apart(tmp_path, name, text, value):
    (tmp_path / name).write_text(text, newline="")
    assert read(tmp_path / name) == value


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["chopsticks", "earrings", "slippers", "sunglasses"])
def test_words_that_amber_has_in_the_plural_only_are_never_found(tmp_path, word):
    """Officially a noun is lemmatised first, and the singular is not in the vocabulary."""
    notes = [{"id": 1, "type": "generative", "truth": ["sky"], "hallu": [word]}]
    save(tmp_path / "annotations.json", notes)
    save(tmp_path / "relation.json", {"sky": [], word: []})
    (tmp_path / "safe_words.txt").write_text("")
    answers = [{"id": 1, "response": f"The sky and {word}."}]
    found = metrics("amber", answers, tmp_path, dimension="g")["generative"]
    assert found == {"CHAIR": 0.0, "Cover": 99.9, "Hal": 0.1, "Cog": 0.0}


@pytest.mark.parametrize(
    "table, form, lemma",
    [
        ("amber", "chopsticks", "chopstick"),
        ("amber", "earrings", "earring"),
        ("amber", "sunglasses", "sunglass"),
        ("amber", "people", "people"),
        ("amber", "men", None),  # a word of WordNet itself, and as short as "man"
        ("amber", "women", "woman"),
        ("amber", "knives", "knife"),
        ("amber", "children", "child"),
        ("amber", "glasses", "glass"),
        ("objhal", "men", None),
        ("objhal", "sports", "sport"),
        ("objhal", "knives", "knife"),
        ("objhal", "skis", "ski"),
        ("objhal", "scissors", None),
        ("objhal", "mice", "mouse"),
    ],
)
def test_lemmas_are_those_of_wordnet(table, form, lemma):
    lemmas = read(benchmarks.common.HERE / table / "lemma_table.json")
    assert lemmas.get(form, form) == (lemma or form)


@pytest.mark.parametrize(
    "form, lemma",
    [
        ("men", "man"),
        ("oxen", "ox"),
        ("scissors", "scissor"),
        ("sports", "sport"),
        ("glasses", "glass"),
        ("bus", "bus"),
        ("people", "people"),
    ],
)
def test_lemmas_of_phrases_are_those_of_spacy(form, lemma):
    lemmas = read(benchmarks.common.HERE / "objhal" / "spacy_noun_lemma_table.json")
    assert lemmas[form] == lemma


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", benchmarks.NAMES)
def test_a_benchmark_is_a_folder_that_says_where_it_comes_from(name):
    folder = ROOT / "benchmarks" / name
    text = (folder / "README.md").read_text()
    for heading in ("Source: https://", "## How to get it", "## How the scorer here departs"):
        assert heading in text
    for path in folder.iterdir():
        if path.suffix in (".json", ".txt"):
            assert f"`{path.name}`" in text, f"{path.name}: origin and licence are missing"


def test_another_benchmark_is_one_module(tmp_path, monkeypatch, capsys):
    class Sixth:
        ITEMS, ANSWER, JUDGE = 1, "said", "needed"
        FILES, COLUMNS = ("sixth.json",), {"Right↑": "right"}

        @staticmethod
        def questions(folder, settings):
            return [Question(row["ask"], None, row) for row in read(folder / "sixth.json")]

        @staticmethod
        def score(answers, folder, settings):
            return {"right": 100.0 * (answers[0]["said"] == answers[0]["true"])}, "equal texts"

    monkeypatch.setitem(BENCHMARKS, "sixth", Sixth)
    answers = save(tmp_path / "answers.json", [{"ask": "?", "true": "b", "said": "b"}])
    run(
        "score",
        "--benchmark",
        "sixth",
        "--data",
        tmp_path,
        "--answers",
        answers,
        "--out",
        tmp_path / "metrics.json",
    )
    run("report", tmp_path / "metrics.json", "--out", tmp_path)
    assert "| answers | 100 |" in (tmp_path / "report.md").read_text()
    with pytest.raises(SystemExit):
        run("run", "--benchmark", "sixth", "--data", tmp_path)
    assert "needs --judge-url and --judge-model" in capsys.readouterr().err


# --- cost -----------------------------------------------------------------------------------------


def test_scoring_is_quick_and_needs_no_torch(tmp_path):
    rows = [
        {"id": i, "type": "discriminative-hallucination", "truth": "no"}
        if i > 1004
        else {"id": i, "type": "generative", "truth": ["sky", "person"], "hallu": ["dog"]}
        for i in range(1, 15221)
    ]
    save(tmp_path / "annotations.json", rows)
    save(tmp_path / "relation.json", {"sky": [], "person": ["man"], "dog": []})
    (tmp_path / "safe_words.txt").write_text("line\n")
    caption = "A man looks at the sky and at a dog, which looks at the man. " * 6
    save(
        tmp_path / "answers.json",
        [
            {"id": row["id"], "response": caption if i < 1004 else "No."}
            for i, row in enumerate(rows)
        ],
    )
    code = (
        "import sys, evaluate; evaluate.main(sys.argv[1:]); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    begin = time.time()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "score",
            "--benchmark",
            "amber",
            "--data",
            tmp_path,
            "--answers",
            tmp_path / "answers.json",
            "--out",
            tmp_path / "m.json",
        ],
        cwd=ROOT,
    )
    assert done.returncode == 0 and time.time() - begin < 5
    assert read(tmp_path / "m.json")["metrics"]["discriminative"]["Accuracy"] == 100.0


# --- generation -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def loaded(llava):
    """(model, prompts)"""
    model, processor = load_model(str(llava))
    return model, Prompts(processor, "vicuna")


@pytest.fixture(scope="session")
def adapter(llava, tmp_path_factory):
    """Folder of a PEFT adapter whose random weights change what the model says."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|up_proj)", init_lora_weights=False
    )
    tuned = get_peft_model(load_model(str(llava))[0], config)
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    tuned.save_pretrained(folder)
    return folder


def texts(model, prompts, items, **options):
    return list(answer(model, prompts, items, max_new_tokens=12, **options))


@pytest.mark.parametrize("tuned", [False, True])
def test_batched_generation_is_one_by_one_generation(loaded, llava, adapter, amber, tuned):
    model, prompts = loaded
    if tuned:
        model = load_adapter(load_model(str(llava))[0], adapter)
    items = questions("amber", amber)
    items.insert(3, Question("Is there a dog?", None, {}))  # one without an image in between
    single = texts(model, prompts, items, batch_size=1)
    assert texts(model, prompts, items, batch_size=4) == single
    assert len(set(single)) > 4  # the items differ, or equality would say nothing
    if tuned:
        assert single != texts(*loaded, items, batch_size=1)


def test_the_bundled_model_answers_the_bundled_sets(tmp_path):
    for benchmark, limit in [("amber", 12), ("hallusionbench", 12), ("objhal", 6), ("mmstar", 9)]:
        run("run", "--benchmark", benchmark, "--limit", limit, "--out", tmp_path / benchmark)
        result = read(tmp_path / benchmark / "metrics.json")
        assert result["n"] == limit and result["name"] == "built-model"
    model, processor = load_model(str(TINY / "model"))
    prompts, items = Prompts(processor, "vicuna"), questions("amber", TINY / "amber")[::20]
    assert texts(model, prompts, items, batch_size=1) == texts(model, prompts, items)


def test_sampling_is_seeded_and_answers_are_not_kept(loaded, amber):
    items = questions("amber", amber)
    drawn = texts(*loaded, items, temperature=1.0, seed=1)
    assert drawn == texts(*loaded, items, temperature=1.0, seed=1)
    assert drawn != texts(*loaded, items, temperature=1.0, seed=2)
    endless = answer(*loaded, items * 1000, max_new_tokens=1, batch_size=2)
    assert len(list(itertools.islice(endless, 3))) == 3  # two batches ran, not four thousand


def run(*args):
    evaluate.main(list(map(str, args)))


def test_run_goes_on_where_it_stopped_and_refuses_other_settings(llava, amber, tmp_path, capsys):
    out, answers = tmp_path / "out", tmp_path / "out/answers.jsonl"
    command = [
        "run",
        "--benchmark",
        "amber",
        "--model",
        llava,
        "--data",
        amber,
        "--out",
        out,
        "--max-new-tokens",
        6,
        "--batch-size",
    ]
    run(*command, 3)
    whole = answers.read_bytes()
    result = read(out / "metrics.json")
    assert result["n"] == 8 and result["prompt_format"] == "vicuna"
    assert result["decoding"] == {"max_new_tokens": 6, "beams": 1, "temperature": 0.0, "seed": 0}
    answers.write_bytes(whole[: len(whole) // 2])  # killed in the middle of a line
    kept = whole[: len(whole) // 2].rpartition(b"\n")[0]
    run(*command, 2)
    assert answers.read_bytes() == whole and whole.startswith(kept)
    with pytest.raises(SystemExit) as end:
        run(*command, 2, "--beams", 2)
    assert end.value.code == 2 and "other settings (decoding was" in capsys.readouterr().err
    assert answers.read_bytes() == whole  # nothing is overwritten or put aside
    assert sorted(path.name for path in out.iterdir() if "answers" in path.name) == [
        "answers.jsonl",
        "answers.settings.json",
    ]


def test_the_report_has_a_picture_of_its_columns(tmp_path):
    heights = {}
    for name, value in (("high", 80.0), ("low", 20.0)):
        made = {"benchmark": "amber", "name": name, "reading": "", "metrics": {}}
        made["metrics"]["discriminative"] = {"Accuracy": value}
        save(tmp_path / f"{name}.json", made)
    run("report", tmp_path / "high.json", tmp_path / "low.json", "--out", tmp_path)
    picture = np.asarray(Image.open(tmp_path / "report.png").convert("RGB")).astype(int)
    for name, color in (("high", (68, 1, 84)), ("low", (253, 231, 37))):
        is_bar = np.abs(picture[:, :-110] - color).sum(axis=2) < 10  # (H, W), without the legend
        heights[name] = is_bar.sum(axis=0).max()
        assert is_bar[:, :200].any() == (name == "high")  # each in its place
    assert heights["high"] == pytest.approx(4 * heights["low"], rel=0.1) and heights["low"] > 20
    empty = {"benchmark": "amber", "name": "none", "reading": "", "metrics": {"relation": {}}}
    (tmp_path / "of_no_column").mkdir()
    run("report", save(tmp_path / "none.json", empty), "--out", tmp_path / "of_no_column")
    assert [path.name for path in (tmp_path / "of_no_column").iterdir()] == ["report.md"]


def test_an_adapter_is_a_row_beside_its_base(llava, adapter, amber, tmp_path, capsys):
    command = ["run", "--benchmark", "amber", "--model", llava, "--data", amber]
    short = ["--max-new-tokens", 5, "--limit", 4]
    run(*command, *short, "--out", tmp_path / "base")
    run(*command, *short, "--out", tmp_path / "tuned", "--adapter", adapter)
    files = [tmp_path / name / "metrics.json" for name in ("base", "tuned")]
    run("report", *files, "--out", tmp_path, "--paper", "7b")
    base, tuned = (read(file.with_name("answers.jsonl")) for file in files)
    assert len(base) == len(tuned) == 4 and base != tuned
    assert read(files[1])["adapter_hash"] and read(files[1])["model_hash"]
    table = (tmp_path / "report.md").read_text()
    for folder in (llava, adapter):
        assert f"| {'-'.join(folder.parts[-2:])} (!) |" in table  # cut at five tokens
    assert "| SymMPO paper: + SymMPO | 82.6 | 87.7 |" in table
    with pytest.raises(SystemExit):
        run("report", *files, "--out", tmp_path, "--paper", "7b", "--differences")
    assert "--differences: for one model" in capsys.readouterr().err
    run("report", files[0], "--out", tmp_path, "--paper", "7b", "--differences")
    table = (tmp_path / "report.md").read_text()
    ours = read(files[0])["metrics"]["discriminative"]["Accuracy"]
    assert f"| SymMPO paper: LLaVA-1.5 | 71.8 ({ours - 71.8:+.4g})" in table
    assert f"| {ours:.4g} |" in table
    assert "- amber, beams: ours 1, published 3" in table
    assert "- amber, max_new_tokens: ours 5, published 1024" in table
    with pytest.raises(SystemExit):
        run(*command, "--adapter", tmp_path)
    assert "no PEFT folder (it has no adapter_config.json)" in capsys.readouterr().err


def test_resuming_without_a_progress_bar(loaded, amber, monkeypatch):
    items = questions("amber", amber)
    whole = texts(*loaded, items, batch_size=2, temperature=1.0)
    monkeypatch.setattr(answering, "tqdm", functools.partial(answering.tqdm, disable=True))
    assert texts(*loaded, items, batch_size=2, temperature=1.0, first=5) == whole[5:]


def test_in_memory_as_through_files(loaded, llava, amber, tmp_path):
    found = measure(*loaded, amber, max_new_tokens=6)
    run(
        "run",
        "--benchmark",
        "amber",
        "--model",
        llava,
        "--data",
        amber,
        "--out",
        tmp_path,
        "--max-new-tokens",
        6,
    )
    assert read(tmp_path / "metrics.json")["metrics"] == found["metrics"]


def test_every_benchmark_is_asked_as_published(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "PNG")
    coded = base64.b64encode(buffer.getvalue()).decode()
    (tmp_path / "obj_halbench_300_with_image.jsonl").write_text(
        json.dumps({"org_idx": 0, "image_id": 5, "question": "Describe.", "image": coded})
    )
    asked = questions("objhal", tmp_path)[0]
    assert (asked.prompt, asked.image, asked.record["image_id"]) == (
        "Describe.",
        buffer.getvalue(),
        5,
    )
    (tmp_path / "obj_halbench_300_with_image.jsonl").write_text('{"image_id": 5, "question": "D"}')
    with pytest.raises(UserError, match="no image belongs to the question 'D'"):
        questions("objhal", tmp_path)
    save(
        tmp_path / "response_template.json",
        [{"image_src": "https://example.org/a/b.png", "question": "What?", "gt_answer": "x"}],
    )
    (tmp_path / "images").mkdir()
    (tmp_path / "images/b.png").write_bytes(buffer.getvalue())
    assert questions("mmhal", tmp_path)[0].image == str(tmp_path / "images/b.png")
    import pyarrow
    import pyarrow.parquet

    row = {
        "index": 0,
        "question": "Q\nOptions: A: x",
        "image": buffer.getvalue(),
        "answer": "A",
        "category": "math",
        "l2_category": "geometry",
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "mmstar.parquet")
    [asked] = questions("mmstar", tmp_path)
    assert asked.prompt.endswith("A: x\nAnswer the question directly.")
    assert asked.image == buffer.getvalue()
    [asked] = questions("mmstar", tmp_path, protocol="official")
    assert asked.prompt.endswith("choices directly.")
    rows = [
        {**hallusion(0, 0, ""), "question": "Q", "visual_input": "0", "filename": None},
        {**hallusion(1, 0, ""), "question": "Q", "visual_input": "2", "filename": "./VD/1.png"},
    ]
    save(tmp_path / "HallusionBench.json", rows)
    with pytest.raises(UserError, match="no ./VD/1.png or hallusion_bench/"):
        questions("hallusionbench", tmp_path)
    (tmp_path / "hallusion_bench/VD").mkdir(parents=True)
    (tmp_path / "hallusion_bench/VD/1.png").write_bytes(buffer.getvalue())
    asked = questions("hallusionbench", tmp_path)
    assert asked[0].image is None and asked[1].image.endswith("VD/1.png")


@pytest.mark.parametrize("place", ["../secret.png", "{tmp}/secret.png", "link.png"])
def test_images_outside_the_data_folder_are_refused(amber, tmp_path, capsys, place):
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (amber / "image" / "link.png").symlink_to(tmp_path / "secret.png")
    queries = read(amber / "query/query_all.json")
    save(
        amber / "query/query_all.json",
        [{**row, "image": place.format(tmp=tmp_path)} for row in queries],
    )
    with pytest.raises(SystemExit):  # before anything is loaded: there is no such model
        run("generate", "--benchmark", "amber", "--data", amber, "--model", "m", "--out", tmp_path)
    assert "outside the data folder" in capsys.readouterr().err
    items = questions("amber", amber, allow_outside=True)
    assert Path(items[0].image).samefile(tmp_path / "secret.png")
    with pytest.raises(SystemExit):  # there is still no such model
        run(
            "generate",
            "--benchmark",
            "amber",
            "--data",
            amber,
            "--model",
            tmp_path,
            "--out",
            tmp_path,
            "--allow-outside",
        )
    assert "amber as published has 15220" in capsys.readouterr().err


def test_broken_images_are_named_before_the_model_is_loaded(amber):
    (amber / "image" / "AMBER_2.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match="AMBER_2.jpg: not a readable image"):
        questions("amber", amber)


# --- servers and judges ---------------------------------------------------------------------------


def test_generating_through_a_server_keeps_the_order(serve, amber, tmp_path):
    def script(body, attempt):
        time.sleep(0.02 * (len(body["messages"][0]["content"][1]["text"]) % 5))
        assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg")
        return body["messages"][0]["content"][1]["text"]

    url, bodies = serve(script)
    command = [
        "generate",
        "--benchmark",
        "amber",
        "--model",
        "m",
        "--data",
        amber,
        "--server",
        url,
        "--out",
        tmp_path / "out",
    ]
    run(*command)
    answers = read(tmp_path / "out/answers.jsonl")
    assert [row["id"] for row in answers] == [1, 2, 3, 6, 4, 7, 5, 8]  # captions, then by image
    assert all(row["response"] == row["query"] for row in answers)
    assert bodies[0]["temperature"] == 0 and bodies[0]["max_tokens"] == 1024
    run(*command)
    assert len(bodies) == 8  # the second run asked for nothing


def test_judging_stores_replies_first_and_resumes(serve, objhal, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    answers = [
        {"image_id": 1, "question": "Describe.", "text": "There is a cat with a laptop."},
        {"image_id": 2, "question": "Describe.", "text": "A dog."},
        {"image_id": 2, "question": "Describe.", "text": "Two dogs are at the table."},
    ]
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    broken = {"yes": True}

    def script(body, attempt):
        text = body["messages"][0]["content"]
        assert body["messages"][0]["role"] == "user" and "Describe." in text
        if "cat" in text:
            return '["cat", "laptop"]'
        return "I see dogs" if broken["yes"] else '["dogs", "dining table"]'

    url, bodies = serve(script)
    command = [
        "judge",
        "--benchmark",
        "objhal",
        "--judge-url",
        url,
        "--judge-model",
        "j",
        "--out",
        out,
    ]
    with pytest.raises(SystemExit):
        run(*command)
    assert "no usable reply" in capsys.readouterr().err
    assert "I see dogs" in (out / "judge_replies.jsonl").read_text()
    broken["yes"], asked = False, len(bodies)
    for row in (out / "judge_replies.jsonl").read_text().splitlines():
        assert json.loads(row)["model"] == "j"
    answers[2]["text"] += " Really."  # another answer is another request
    (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    run(*command)
    assert len(bodies) == asked + 1
    run(
        "score",
        "--benchmark",
        "objhal",
        "--data",
        objhal,
        "--answers",
        out / "answers.jsonl",
        "--judgements",
        out / "judgements.jsonl",
        "--out",
        out / "metrics.json",
    )
    result = read(out / "metrics.json")
    assert result["metrics"]["mention_hallucination"] == 25.0 and result["judge"] == "j"


def test_no_judge_where_one_is_needed(tmp_path, capsys):
    for command in (
        ["run", "--benchmark", "mmhal", "--data", tmp_path],
        ["judge", "--benchmark", "mmhal", "--out", tmp_path],
        ["judge", "--benchmark", "amber", "--out", tmp_path],
    ):
        with pytest.raises(SystemExit) as end:
            run(*command)
        assert end.value.code == 2
        assert "needs --judge-url and --judge-model" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", sorted(BENCHMARKS))
def test_fetch_help_says_where_the_files_are(benchmark, capsys):
    run("fetch-help", benchmark)
    assert "https://" in capsys.readouterr().out


def test_numbers_without_a_meaning_are_refused_by_name(capsys):
    for option, value in [
        ("--limit", 0),
        ("--batch-size", 0),
        ("--max-new-tokens", 0),
        ("--beams", 0),
        ("--temperature", -1),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--beams", "x"),
    ]:
        with pytest.raises(SystemExit) as end:
            run("run", option, value)
        assert end.value.code == 2 and option in capsys.readouterr().err


def test_before_and_after_switch_the_adapter(loaded, llava, adapter, amber, monkeypatch, capsys):
    short = functools.partial(measure, max_new_tokens=12)
    monkeypatch.setattr(answering, "measure", short)
    model, prompts = loaded
    tuned = load_adapter(load_model(str(llava))[0], adapter)
    before_and_after(tuned, prompts, amber)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "held-out scenes (%)    CHAIR   cover     hal  yes/no"
    assert [line.split()[0] for line in printed] == ["held-out", "before", "after"]
    for line, policy in zip(printed[1:], (model, tuned)):
        found = short(policy, prompts, amber)["metrics"]
        assert line.split()[1] == str(found["generative"]["CHAIR"])
        assert line.split()[-1] == str(found["discriminative"]["Accuracy"])


@pytest.mark.parametrize(
    "benchmark, reply, read_as",
    [
        ("mmhal", "**Rating:** 4", "Rating: 4"),
        ("mmhal", '{"rating": 4, "reason": "ok"}', "Rating: 4"),
        ("mmhal", "## Rating\n3", "Rating: 3"),
        ("mmhal", "The scale is 0-6. Rating (0-6): 2", "Rating: 2"),
        ("hallusionbench", "The answer is not incorrect.", "correct"),
        ("hallusionbench", "That is not correct.", "incorrect"),
        ("hallusionbench", "Is it correct or incorrect? It agrees, so: **correct**", "correct"),
        ("hallusionbench", '{"verdict": "incorrect"}', "incorrect"),
        ("objhal", 'Here is the list: ["dog", "cup"] as asked.', '["dog", "cup"]'),
        ("objhal", '{"objects": ["dog", "cup"]}', '["dog", "cup"]'),
        ("mmhal", "<think>Rating: 0? Rating: 1?</think>\n## Verdict\nRating: **5**", "Rating: 5"),
        ("hallusionbench", "<think>correct or incorrect?</think>**Correct**", "correct"),
        ("objhal", '```json\n["dog", "cup"]\n```', '["dog", "cup"]'),
    ],
)
def test_judgements_are_what_follows_the_thinking_without_markdown(
    serve, tmp_path, benchmark, reply, read_as
):
    row = {"question": "q", "gt_answer": "a", "model_answer": "b", "image_content": ["c"]}
    row |= {"model_prediction": "x", "gt_answer_details": "y", "text": "A dog and a red cup."}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    url, _ = serve(lambda body, attempt: reply)
    command = ["judge", "--benchmark", benchmark, "--out", tmp_path, "--judge-url", url]
    run(*command, "--judge-model", "j")
    [line] = read(tmp_path / "judgements.jsonl")
    assert read_as in line["text"] and "think" not in line["text"]


@pytest.mark.parametrize("benchmark", ["mmhal", "hallusionbench"])
def test_a_reply_without_a_judgement_is_asked_again_and_never_scored(
    serve, tmp_path, capsys, benchmark
):
    row = {"question": "q", "gt_answer": "a", "model_answer": "b", "image_content": ["c"]}
    row |= {"model_prediction": "x", "gt_answer_details": "y"}
    (tmp_path / "answers.jsonl").write_text(json.dumps(row) + "\n")
    url, bodies = serve(lambda body, attempt: "I would rather not say.")
    with pytest.raises(SystemExit) as end:
        command = ["judge", "--benchmark", benchmark, "--out", tmp_path, "--judge-url", url]
        run(*command, "--judge-model", "j")
    assert end.value.code == 2 and "no usable reply" in capsys.readouterr().err
    assert len(bodies) == 3 and not (tmp_path / "judgements.jsonl").exists()


def test_what_is_empty_cut_unclear_or_thought_aloud_is_counted_and_marked(tmp_path, capsys):
    """Thinking is cut off before scoring; a row with over 2 % of doubtful answers is marked."""
    texts = ["<think>A, B or C?</think>B", "B: cat", "(b)", "", "The correct answer is (B)"] * 3
    rows = []
    for number, text in enumerate(texts):
        row = {"index": number, "category": "c", "l2_category": "l", "answer": "B"}
        rows.append({**row, "question": "?", "prediction": text})
    rows[1]["cut"] = True
    save(tmp_path / "mmstar.json", [{**row, "image": "x"} for row in rows])
    found = score("mmstar", rows, tmp_path)
    assert found["thinking, not scored"] == 3
    assert found["doubts"] == {
        "empty or given up": 3,
        "cut by the token limit": 1,
        "unclear": 6,  # the empty ones, and the sentences, which have other letters first
        "judgement unreadable": 0,
    }
    assert found["metrics"]["overall"] == 60.0 and found["doubtful"]
    answers = save(tmp_path / "answers.json", rows)
    run(
        "score",
        "--benchmark",
        "mmstar",
        "--answers",
        answers,
        "--data",
        tmp_path,
        "--out",
        tmp_path / "m.json",
    )
    assert "note: {'empty or given up': 3" in capsys.readouterr().err
    run("report", tmp_path / "m.json", "--out", tmp_path)
    assert "| answers (!) | 60 |" in (tmp_path / "report.md").read_text()


def test_judgements_that_nobody_can_read_are_counted_and_never_all_scored():
    rows = [hallusion(0, 0, "yes"), hallusion(0, 1, "yes")]
    found = score("hallusionbench", rows, ".", ["correct", "hm"])
    assert found["doubts"]["judgement unreadable"] == 1 and found["doubtful"]
    with pytest.raises(UserError, match="none of the 2 judgements can be read"):
        score("hallusionbench", rows, ".", ["hm", "hm"])


def test_hallusionbench_image_questions_alone():
    """Without VS's questions of figure 0 there is no qAcc, and the row says why."""
    rows = [hallusion(0, 0, "yes"), hallusion(1, 0, "no", "0")]
    rows += [hallusion(1, 0, "yes", category="VS"), hallusion(2, 0, "no", category="VS")]
    found = score("hallusionbench", rows, ".")
    assert found["metrics"] == {"fAcc": 75.0, "aAcc": 75.0}
    assert "image questions alone" in found["reading"]
    with pytest.raises(UserError, match="none like it of figure 0"):
        score("hallusionbench", rows[1:], ".")


def test_give_up_settles_a_few_requests_and_says_so(serve, tmp_path, capsys):
    def script(body, attempt):
        question = body["messages"][0]["content"]
        return "no" if "Q1" in json.dumps(question) else "correct"

    rows = [
        {**hallusion(0, k, "yes"), "gt_answer_details": "d", "question": f"Q{k}"} for k in range(3)
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    url, bodies = serve(script)
    command = ["judge", "--benchmark", "hallusionbench", "--out", tmp_path, "--judge-url", url]
    with pytest.raises(SystemExit):
        run(*command, "--judge-model", "j")
    assert "with --give-up 1 goes on without" in capsys.readouterr().err
    run(*command, "--judge-model", "j", "--give-up", 1)
    assert [row["text"] for row in read(tmp_path / "judgements.jsonl")] == [
        "correct",
        "",
        "correct",
    ]
    run(
        "score",
        "--benchmark",
        "hallusionbench",
        "--answers",
        tmp_path / "answers.jsonl",
        "--judgements",
        tmp_path / "judgements.jsonl",
        "--out",
        tmp_path / "m.json",
    )
    made = read(tmp_path / "m.json")
    assert made["doubts"]["judgement unreadable"] == 1 and made["doubtful"]


def test_more_fields_go_into_each_request(serve, tmp_path):
    (tmp_path / "answers.jsonl").write_text(
        json.dumps({**hallusion(0, 0, "yes"), "gt_answer_details": "d", "question": "Q"}) + "\n"
    )
    url, bodies = serve(lambda body, attempt: "correct")
    command = ["judge", "--benchmark", "hallusionbench", "--out", tmp_path, "--judge-url", url]
    run(*command, "--judge-model", "j", "--request", '{"reasoning_effort": "low"}')
    assert bodies[0]["reasoning_effort"] == "low" and bodies[0]["temperature"] == 0


def test_a_text_knows_that_it_was_cut_also_in_another_process():
    text = pickle.loads(pickle.dumps(Text("a cup and", cut=True)))
    assert text == "a cup and" and text.cut
    assert Text("a cup").cut is False
