"""benchmarks/page.py: what the page marks is what the scorers count."""

import base64
import html
import io
import json
import re
import shutil

import pytest
from PIL import Image

import benchmarks
import evaluate
from benchmarks.common import Settings, read
from conftest import FIXTURES, TINY

KNOWN = FIXTURES / "benchmarks"
PAGE = "page.html"


def picture(width=90):
    buffer = io.BytesIO()
    Image.new("RGB", (width, 60), "teal").save(buffer, "PNG")
    return buffer.getvalue()


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def page_of(tmp_path, *args):
    """(the whole page, what stands in its sections)."""
    evaluate.main(["page", *map(str, args), "--out", str(tmp_path / PAGE)])
    text = (tmp_path / PAGE).read_text()
    return text, text[text.index("<section>") :]


def marks(body, kind):
    return [html.unescape(word) for word in re.findall(f'<mark class="{kind}">(.*?)</mark>', body)]


def verdicts(body):
    """How many answers are marked as right, and as wrong."""
    return body.count('<span class="good">✓'), body.count('<span class="bad">✗')


def metrics(benchmark, answers, folder, **settings):
    return benchmarks.score(benchmark, answers, folder, Settings(**settings))["metrics"]


def tiny_amber(dimension):
    """What is said of the bundled set's questions, in the order in which they are asked."""
    asked = benchmarks.BENCHMARKS["amber"].questions(TINY / "amber", Settings(dimension=dimension))
    return [question.record for question in asked]


@pytest.fixture
def amber(tmp_path):
    """(the official fixture as a folder that can be asked, its answers)."""
    folder = shutil.copytree(KNOWN / "amber", tmp_path / "amber")
    (folder / "image.png").write_bytes(picture(width=900))
    answers = read(folder / "answers.json")
    rows = [{"id": row["id"], "image": "image.png", "query": "Describe it."} for row in answers]
    (folder / "query").mkdir()
    (folder / "query/query_all.json").write_text(json.dumps(rows))
    (tmp_path / "similar.json").write_text("[]")
    return folder, answers


def test_marked_words_are_what_amber_counts(amber, tmp_path):
    """47.1 and 12.1 are the official scorer's (tests/fixtures/benchmarks/ORIGIN.md)."""
    folder, answers = amber
    file = write_lines(tmp_path / "a.jsonl", answers)
    how = ["--data", folder, "--similar", tmp_path / "similar.json", "--dimension", "g"]
    page, body = page_of(tmp_path, file, *how)
    named = {kind: marks(body, kind) for kind in ("true", "false", "safe", "missed")}
    mentions = sum(len(named[kind]) for kind in ("true", "false", "safe"))
    assert round(100 * len(named["false"]) / mentions, 1) == 47.1 and named["safe"]
    objects = sum(len(note["truth"]) for note in read(folder / "annotations.json"))
    assert round(100 * (objects - len(named["missed"])) / objects, 1) == 12.1
    assert verdicts(body) == (6, 2)  # Hal 25.0
    for value in ("47.1", "12.1", "25"):
        assert f"<td>{value}</td>" in body
    texts = re.findall(r'<div class="text">(.*?)</div>', body, re.S)
    plain = sorted(html.unescape(re.sub("<[^>]*>", "", text)).strip() for text in texts)
    assert plain == sorted(answer["response"].strip() or "(empty)" for answer in answers)
    [shown] = set(re.findall(r"data:image/jpeg;base64,([^\"]*)", page))
    assert Image.open(io.BytesIO(base64.b64decode(shown))).size == (480, 32)
    assert not re.search(r"(src|href)=\"(?!data:|#)", page)  # nothing comes from a network


def test_yes_and_no_are_marked_as_amber_reads_them(tmp_path):
    asked = tiny_amber("d")[:12]
    said = ["Yes", "no.", "It might be a cup", "I do not think so, no"] * 3
    answers = [{**row, "response": text} for row, text in zip(asked, said)]
    for protocol in ("symmpo", "official"):
        how = ["--protocol", protocol, "--dimension", "d"]
        _, body = page_of(tmp_path, write_lines(tmp_path / "a.jsonl", answers), *how)
        found = metrics("amber", answers, TINY / "amber", dimension="d", protocol=protocol)
        right, wrong = verdicts(body)
        assert right + wrong == 12 and found["discriminative"]["Accuracy"] == round(
            100 * right / 12.001, 1
        )
    assert "read as\n<q>no.</q>; the truth is" in body


def test_amber_is_shown_in_whatever_order_it_was_answered(tmp_path):
    asked = tiny_amber("a")[-20:]
    answers = [{"id": row["id"], "response": f"it is {row['id']}"} for row in asked]
    files = []
    for name, order in (("ours", 1), ("official", -1)):
        files.append(write_lines(tmp_path / f"{name}.jsonl", answers[::order]))
    _, body = page_of(tmp_path, *files)
    texts = re.findall(r'<div class="text">(.*?)</div>', body, re.S)
    said = [html.unescape(re.sub("<[^>]*>", "", text)).strip() for text in texts]
    assert len(said) == 40 and said[::2] == said[1::2]


def objhal(folder):
    image = base64.b64encode(picture()).decode()
    rows = []
    for number, image_id in enumerate((1, 2, 2, 1)):
        rows.append({"org_idx": number, "image_id": image_id, "question": "Q", "image": image})
    write_lines(folder / "obj_halbench_300_with_image.jsonl", rows)
    truth = {"1": ["cat", "chair"], "2": ["dog", "person", "dining table"]}
    (folder / "gt_objects.json").write_text(json.dumps(truth))
    texts = [
        "Assistant: A Baby cat on a chair by a wine\nglass. The cat...",
        "Two women with puppies on tables, and a hot dog.",
        "The toilet has a seat; the seat is up.",
        "Nothing to see.",
    ]
    for row, text in zip(rows, texts):
        del row["image"]
        row["text"] = text
    return rows


def test_marked_words_are_what_object_halbench_counts(tmp_path):
    answers = objhal(tmp_path / "data")
    file = write_lines(tmp_path / "a/answers.jsonl", answers)
    _, body = page_of(tmp_path, file, "--data", tmp_path / "data")
    assert sorted(marks(body, "false")) == ["hot dog", "toilet"]
    assert "wine\nglass" in body and len(re.findall('<mark class="false">', body)) == 3
    assert marks(body, "true") == ["Baby cat", "chair", "cat", "women", "puppies", "tables"]
    found = metrics("objhal", answers, tmp_path / "data")
    assert found["mention_hallucination"] == pytest.approx(100 * 3 / 9)
    assert marks(body, "missed") == ["dining table", "dog", "person", "cat", "chair"]
    assert verdicts(body) == (1, 3)
    replies = ['["cats", "red laptop"]', '["dogs", "Men"]', '["cup"]', "[]"]
    write_lines(tmp_path / "a/judgements.jsonl", [{"text": reply} for reply in replies])
    _, body = page_of(tmp_path, file, "--data", tmp_path / "data")
    assert sorted(marks(body, "false")) == ["cup", "laptop"] and "the judge lists" in body
    assert "read in different ways" not in body
    unjudged = write_lines(tmp_path / "b/answers.jsonl", answers)
    _, body = page_of(tmp_path, unjudged, file, "--data", tmp_path / "data")
    assert "read in different ways" in body


@pytest.mark.parametrize("judged", [False, True])
def test_right_answers_are_those_of_hallusionbench(tmp_path, judged):
    answers = read(KNOWN / "hallusionbench/answers.jsonl")
    for row in answers:
        row |= {"question": "Is it?", "visual_input": "0"}
    asked = [{**row, "model_prediction": None} for row in answers]
    (tmp_path / "HallusionBench.json").write_text(json.dumps(asked))
    replies = None
    if judged:
        replies = read(KNOWN / "hallusionbench/judgements.json")
        write_lines(tmp_path / "judgements.jsonl", [{"text": reply} for reply in replies])
    file = write_lines(tmp_path / "answers.jsonl", answers)
    _, body = page_of(tmp_path, file, "--data", tmp_path, "--limit", 1000)
    right, wrong = verdicts(body)
    found = metrics("hallusionbench", answers, tmp_path, judgements=replies)
    assert right + wrong == len(answers) and "asked without an image" in body
    assert found["aAcc"] == round(100 * right / len(answers), 4)
    assert (found["aAcc"] == 65.4275) == judged  # the official scorer's
    assert ("</span>, judge:" in body) == judged and ("</span>, read as" in body) != judged


def test_right_letters_are_those_of_mmstar(tmp_path):
    rows = read(TINY / "mmstar/mmstar.jsonl")
    answers = []
    for number, row in enumerate(rows):
        said = ["B: the cup", "the answer is C", "?"][number % 3]
        answers.append({**row, "prediction": said, "image": ""})
        del answers[-1]["image"]
    file = write_lines(tmp_path / "a.jsonl", answers)
    for protocol in ("symmpo", "official"):
        _, body = page_of(tmp_path, file, "--protocol", protocol, "--limit", 120)
        found = metrics("mmstar", answers, TINY / "mmstar", protocol=protocol)
        assert verdicts(body)[0] == round(found["overall"] * len(rows) / 100)


def mmhal(folder):
    rows = []
    for number in range(96):
        row = {"image_src": "https://example.org/x.png", "question": f"Q{number}"}
        rows.append({**row, "gt_answer": f"<b>truth {number}", "model_answer": ""})
    (folder / "images").mkdir()
    (folder / "images/x.png").write_bytes(picture())
    (folder / "response_template.json").write_text(json.dumps(rows))
    answers = [{**row, "model_answer": f"said {n}"} for n, row in enumerate(rows)]
    return write_lines(folder / "m/answers.jsonl", answers)


def test_mmhal_is_shown_with_the_words_of_its_judge(tmp_path):
    file, replies = mmhal(tmp_path), read(KNOWN / "mmhal/judgements.json")
    write_lines(file.with_name("judgements.jsonl"), [{"text": reply} for reply in replies])
    _, body = page_of(tmp_path, file, "--data", tmp_path, "--limit", 96)
    assert 100 * verdicts(body)[1] / 96 == 65.625  # the hallucination rate
    shown = html.unescape(body)
    assert all(f"<q>{reply}</q>" in shown for reply in replies if reply)
    assert "<b>truth" not in body and "<b>truth 95" in shown


def test_what_was_broken_fixed_and_changed(tmp_path):
    """Three models; broken and fixed ones come first, in turns, and the rest is said to be left."""
    rows = read(TINY / "mmstar/mmstar.jsonl")[:6]
    other = {"A": "B", "B": "C", "C": "D", "D": "A"}
    right = [row["answer"] for row in rows]
    wrong = [other[letter] for letter in right]
    said = {
        "base": [right[0], wrong[1], right[2], right[3], wrong[4], right[5]],
        "tuned": [wrong[0], right[1], right[2] + "!", right[3], wrong[4], right[5]],
        "third": [right[0], right[1], right[2], right[3], wrong[4], wrong[5]],
    }
    files = []
    for name, letters in said.items():
        answers = []
        for row, letter in zip(rows, letters):
            answers.append({"index": row["index"], **row, "prediction": letter})
        files.append(write_lines(tmp_path / name / "answers.jsonl", answers))
        settings = {"name": "x", "row": f"<i>{name}</i>"}
        (tmp_path / name / "answers.settings.json").write_text(json.dumps(settings))
    page, body = page_of(tmp_path, *files, "--protocol", "official")
    numbers = [int(n) for n in re.findall(r"<h3><small>(\d)</small>", body)]
    assert numbers == [1, 2, 6, 3, 5, 4]
    classes = [set(c.split()) for c in re.findall('<article class="([^"]*)"', body)]
    assert classes[0] == {"same", "broken", "wrong", "changed"}
    assert classes[1] == {"wrong", "fixed", "changed"}
    assert [("broken" in c, "changed" in c, "wrong" in c) for c in classes[2:]] == [
        (True, True, True),
        (False, True, False),
        (False, False, True),
        (False, False, False),
    ]
    assert "<td>1</td><td>1</td><td>3</td>" in body  # tuned: fixed, broken, changed
    assert "<i>" not in page and "cases are shown" not in body
    _, body = page_of(tmp_path, *files, "--protocol", "official", "--limit", 2)
    assert body.count("<article") == 2 and "2 of 6 cases are shown" in body
    assert "--limit 6" in body and "<td>1</td><td>1</td><td>3</td>" in body


def test_several_benchmarks_are_sections_and_texts_are_no_html(tmp_path):
    amber = tiny_amber("a")[:2]
    evil = '<script>alert(1)</script> a cup & "a" <b>clock'
    texts = [evil, "<think>no cup</think>"]
    made = [{**row, "response": text, "cut": True} for row, text in zip(amber, texts)]
    first = write_lines(tmp_path / "amber.jsonl", made)
    [row] = read(TINY / "hallusionbench/HallusionBench.json")[:1]
    second = write_lines(tmp_path / "h.jsonl", [{**row, "model_prediction": "well"}])
    page, body = page_of(tmp_path, first, second)
    assert body.count("<section>") == 2 and 'href="#hallusionbench"' in page
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; a <mark" in body
    assert "&lt;b&gt;<mark" in body and body.count(">cut by the token limit<") == 2
    assert "no cup" not in body and "(empty)" in body and "thinking not shown" in body
    assert "read as\n<q>unclear</q>" in body


def test_a_part_of_a_benchmark_that_has_no_metrics_is_refused(tmp_path, capsys):
    row = {"question": "Q", "answer": "A", "category": "math", "l2_category": "geometry"}
    image = base64.b64encode(picture()).decode()
    asked = [row, row, {**row, "category": "logical reasoning"}]
    rows = [{**row, "image": image} for row in asked]
    write_lines(tmp_path / "data/data/mmstar.jsonl", rows)
    file = write_lines(tmp_path / "a.jsonl", [{**row, "prediction": "A"}] * 2)
    with pytest.raises(SystemExit):
        page_of(tmp_path, file, "--data", tmp_path / "data")
    assert "a.jsonl: MMStar: no answers in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "lines, message",
    [
        (
            [0, 1, 3],
            "a.jsonl: line 3 (by id, if answers have one): not the answer to",
        ),
        ([0, 1], "a.jsonl: line 3"),
        ([0, 1, 2, 3], "a.jsonl: line 4"),
        ([1, 1, 2], "a.jsonl: line 1"),
        ([], "a.jsonl: no answers"),
        (["x"], "a.jsonl: no benchmark has answers like the first one"),
        ([0, "x", 2], "the answers to them, are not as amber has them"),
        ([{"said": "x"}], "a.jsonl: no benchmark has answers like the first one"),
        ([{"response": 7}, 1, 2], "a.jsonl: answer 1: the field response"),
        ([{"response": "x"}, {}, {}], "a.jsonl: line 2"),
    ],
)
def test_answers_to_other_questions_are_refused_by_line(tmp_path, capsys, lines, message):
    rows = [{**row, "response": "a cup"} for row in tiny_amber("a")[:4]]
    first = write_lines(tmp_path / "first.jsonl", rows[:3])
    given = [{**rows[0], **line} if line == {"response": 7} else line for line in lines]
    given = [rows[line] if isinstance(line, int) else line for line in given]
    second = write_lines(tmp_path / "a.jsonl", given)
    with pytest.raises(SystemExit) as end:
        page_of(tmp_path, first, second)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / PAGE).exists()


def test_what_a_page_cannot_be_made_of(tmp_path, capsys):
    file = mmhal(tmp_path)
    answers = write_lines(tmp_path / "x.jsonl", [{"id": 1, "response": "a cup"}])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": 1, "response": "x"}\n{"id"\n')
    for args, message in [
        ([file, "--data", tmp_path], "answers.jsonl: MMHal-Bench has 96 questions and no judge"),
        ([answers, "--data", tmp_path], "x.jsonl: "),
        ([broken], "line 2"),
        ([tmp_path / "none.jsonl"], "none.jsonl"),
    ]:
        with pytest.raises(SystemExit) as end:
            page_of(tmp_path, *args)
        assert end.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["page", str(answers), "--out", str(answers)])
    assert "--out is the page" in capsys.readouterr().err
    assert answers.read_text() == '{"id": 1, "response": "a cup"}\n'
    write_lines(file.with_name("judgements.jsonl"), [{"text": "Rating: 4"}] * 3)
    with pytest.raises(SystemExit):
        page_of(tmp_path, file, "--data", tmp_path)
    assert "answers.jsonl: 3 judgements for 96 answers" in capsys.readouterr().err
