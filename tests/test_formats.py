"""Records as people have them: read in one form, or refused with the reason."""

import base64
import gzip
import io
import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin

import data
from conftest import save_llava15
from construct import contrast, review
from support.cli import UserError
from support.formats import normalise
from support.images import open_image
from support.records import Records
from vlm.prompts import VICUNA

PLAIN = {"image": "0.png", "prompt": "Is there a cup?", "chosen": "No.", "rejected": "Yes."}
TEXTS = {name: PLAIN[name] for name in ("prompt", "chosen", "rejected")}
USER = {"role": "user", "content": PLAIN["prompt"]}
GOOD = {"role": "assistant", "content": PLAIN["chosen"]}
BAD = {"role": "assistant", "content": PLAIN["rejected"]}


def picture(number=0):
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image):
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def form(raw):
    """What a raw record becomes, without the remarks on it."""
    record = normalise(raw)
    return {name: value for name, value in record.items() if name not in ("stripped", "unread")}


def said(role, text):
    return {"from": role, "value": text}


# --- layouts -------------------------------------------------------------------------------------

IMAGES = {"images": ["0.png"]}
LAYOUTS = {
    "RLAIF-V, MMPR": {
        "image": "0.png",
        "question": TEXTS["prompt"],
        "chosen": "No.",
        "rejected": "Yes.",
    },
    "RLHF-V": {
        "image": "0.png",
        "text": json.dumps({"question": TEXTS["prompt"], "chosen": "No.", "rejected": "Yes."}),
    },
    "TRL": {**IMAGES, "prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, prompt inside": {**IMAGES, "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "TRL, parts": {
        **IMAGES,
        "prompt": [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": TEXTS["prompt"]}],
            }
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}],
        "rejected": "Yes.",
    },
    "image in the turn": {
        "prompt": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": "0.png"},
                    {"type": "text", "text": TEXTS["prompt"]},
                ],
            }
        ],
        "chosen": "No.",
        "rejected": "Yes.",
    },
    "image behind the text, as Parquet has parts": {
        "prompt": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": TEXTS["prompt"], "image": None},
                    {"type": "image", "text": None, "image": "0.png"},
                ],
            }
        ],
        "chosen": "No.",
        "rejected": "Yes.",
    },
    "OpenRLHF": {**IMAGES, "prompt": json.dumps([USER]), "chosen": "No.", "rejected": "Yes."},
    "LLaMA-Factory": {
        **IMAGES,
        "conversations": [said("human", "<image>" + TEXTS["prompt"])],
        "chosen": said("gpt", "No."),
        "rejected": said("gpt", "Yes."),
    },
    "ms-swift": {
        **IMAGES,
        "messages": [{"role": "user", "content": "<image>" + TEXTS["prompt"]}, GOOD],
        "rejected_response": "Yes.",
    },
    "ms-swift, messages": {**IMAGES, "messages": [USER, GOOD], "rejected_messages": [USER, BAD]},
    "POVID": {
        "image": "0.png",
        "conversations": [said("human", "<image>\n" + TEXTS["prompt"]), said("gpt", "No.")],
        "rejected_conversations": [
            said("human", "<image>\n" + TEXTS["prompt"]),
            said("gpt", "Yes."),
        ],
    },
    "mDPO": {
        "img_path": "0.png",
        "prompt": f"{VICUNA} USER: <image>\n{TEXTS['prompt']} ASSISTANT:",
        "chosen": "No.",
        "rejected": "Yes.",
    },
    "OPA-DPO": {
        "image_bytes": "0.png",
        "queries": "<image>\n" + TEXTS["prompt"],
        "standard_response": "No.",
        "original_generate_response": "Yes.",
    },
    "end tokens": {**PLAIN, "chosen": "No.</s>", "rejected": "Yes.<|im_end|>"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_becomes_the_form(layout):
    assert form(LAYOUTS[layout]) == PLAIN


def test_the_second_image_of_swift_is_the_contrast_image():
    raw = {**LAYOUTS["ms-swift"], "rejected_images": ["1.png"]}
    assert form(raw) == {**PLAIN, "contrast_image": "1.png"}


REFUSED = {
    "turns: the last is the user's": (
        {**IMAGES, "prompt": [USER], "chosen": [GOOD, USER]},
        "one turn",
    ),
    "turns: two answers": ({**IMAGES, "prompt": [USER], "chosen": [GOOD, USER, GOOD]}, "one turn"),
    "turns: a history": (
        {**IMAGES, "prompt": [USER, GOOD, USER], "chosen": "No."},
        "not user, assistant",
    ),
    "turns: a system message": (
        {**IMAGES, "prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": "No."},
        "not system, user",
    ),
    "a system field": ({**PLAIN, "system": "Be brief."}, "system would be lost"),
    "two questions": (
        {**IMAGES, "chosen": [USER, GOOD], "rejected": [BAD, BAD]},
        "different questions",
    ),
    "two images": ({**PLAIN, "image": ["0.png", "1.png"]}, "2 images"),
    "two image parts": (
        {
            **IMAGES,
            "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
            "chosen": "No.",
        },
        "2 <image> tags",
    ),
    "several texts": ({**PLAIN, "chosen": ["No.", "None."]}, "list of 2 texts"),
    "ratings": ({"image": "0.png", "prompt": "Q", "completions": []}, "choose two"),
    "a tag inside": ({**PLAIN, "prompt": "Look at <image> here."}, "in the middle"),
    "a tag in the answer": ({**PLAIN, "chosen": "<image> No."}, "in the middle"),
    "another tag": ({**PLAIN, "prompt": "Picture 1: <img>0.png</img> What?"}, "chat template"),
    "a conversation as text": (
        {**PLAIN, "prompt": "USER: Is there a cup? ASSISTANT: Yes. USER: Sure? ASSISTANT:"},
        "chat template",
    ),
    "half a template": ({**PLAIN, "prompt": "Is there a cup?\nASSISTANT:"}, "chat template"),
    "a template with a system message": (
        {**PLAIN, "prompt": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nIs there a cup? [/INST]"},
        "chat template",
    ),
    "a template in the answer": ({**PLAIN, "rejected": "ASSISTANT: Yes."}, "chat template"),
    "no field": ({"image": "0.png", "prompt": "Q", "good": "No."}, "--fields chosen=THEIRS"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_with_its_reason(kind):
    raw, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=reason):
        normalise(raw)


@pytest.mark.parametrize(
    "prompt",
    [
        "<image>Is there a cup?",
        "Is there a cup?<image>",
        " <image>\n Is there a cup?",
        f"{VICUNA} USER: Is there a cup? ASSISTANT:",
        "USER: <image>\nIs there a cup? ASSISTANT:",
        "<|im_start|>user\n<image>\nIs there a cup?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Is there a cup?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<s>[INST] <image>\nIs there a cup? [/INST]",
        "<start_of_turn>user\n<start_of_image>Is there a cup?<end_of_turn>\n<start_of_turn>model\n",
    ],
)
def test_one_tag_and_one_frame_are_taken_off(prompt):
    record = normalise({**PLAIN, "prompt": prompt})
    assert record["prompt"] == PLAIN["prompt"] and record["stripped"]


# --- files ---------------------------------------------------------------------------------------


def texts(records):
    return [{name: record[name] for name in TEXTS} for record in records]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_is_read_however_it_is_written(folder, indent):
    many = [{**PLAIN, "prompt": f'é {{]}}" \\ {i}?'} for i in range(300)]
    (folder / "list.json").write_text(json.dumps(many, indent=indent, ensure_ascii=False))
    records = Records(folder / "list.json")
    assert len(records) == 300 and texts(records)[299]["prompt"] == many[299]["prompt"]
    assert records[7]["source"].endswith("list.json: record 8")


def test_a_broken_list_is_named_with_its_line(folder):
    (folder / "list.json").write_text(json.dumps([PLAIN, PLAIN], indent=1)[:-20])
    with pytest.raises(UserError, match=r"list.json:1\d: not valid JSON"):
        Records(folder / "list.json")


def test_shards_in_a_folder_or_a_glob_are_one_set_in_one_order(folder):
    (folder / "data").mkdir()
    for number in (2, 0, 1):
        rows = [{**PLAIN, "prompt": f"{number} {i}?"} for i in range(2)]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, folder / "data" / f"train-{number}.PARQUET")
    (folder / "data" / ".cache").mkdir()
    (folder / "data" / ".cache" / "x.json").write_text("{}")
    wanted = [f"{number} {i}?" for number in range(3) for i in range(2)]
    for path in (folder / "data", folder / "data" / "*.PARQUET"):
        records = Records(path)
        assert [record["prompt"] for record in records] == wanted
        assert records[3]["source"].endswith("train-1.PARQUET: row 2")
    write(folder / "data" / "more.jsonl", PLAIN)
    with pytest.raises(UserError, match="quoted glob"):
        Records(folder / "data")


def test_byte_order_marks_and_windows_lines(folder):
    line = json.dumps(PLAIN)
    (folder / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n{line}\r\n".encode())
    assert texts(Records(folder / "bom.jsonl")) == [TEXTS] * 2


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("a.jsonl.gz", gzip.compress(b"{}"), "gunzip"),
        ("a.jsonl", json.dumps(PLAIN).encode("utf-16"), "UTF-16"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("a.zip", b"PK\3\4", "zip"),
        ("a.csv", b"image,prompt", "read_csv"),
        ("a.arrow", b"\xff\xff\xff\xff", "load_from_disk"),
        ("a.json", json.dumps({"data": [PLAIN]}, indent=1).encode(), "several lines"),
    ],
)
def test_what_is_not_read_is_named_with_the_way_on(folder, name, content, reason):
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        Records(folder / name)


def test_latin_1_is_named_at_its_line(folder):
    latin = json.dumps({**PLAIN, "prompt": "é?"}, ensure_ascii=False).encode("latin-1")
    (folder / "a.jsonl").write_bytes(json.dumps(PLAIN).encode() + b"\n" + latin + b"\n")
    with pytest.raises(UserError, match=r"a.jsonl:2: the file is not UTF-8.*iconv"):
        Records(folder / "a.jsonl")[1]


def test_names_of_their_own(folder):
    theirs = {"img": "0.png", "instruction": PLAIN["prompt"], "good": "No.", "bad": "Yes."}
    path = write(folder / "mine.jsonl", theirs)
    fields = "image=img,prompt=instruction,chosen=good,rejected=bad"
    assert texts(Records(path, fields=fields)) == [TEXTS]
    with pytest.raises(UserError, match="the record has img, instruction, good, bad"):
        Records(path)[0]
    for wrong in ("picture=img", "image"):
        with pytest.raises(UserError, match="--fields"):
            Records(path, fields=wrong)


# --- images --------------------------------------------------------------------------------------


def test_images_inside_the_file(folder):
    text = base64.b64encode(png(picture())).decode()
    for image in (text, "data:image/png;base64," + text, "\n".join([text[:76], text[76:]])):
        assert np.array_equal(open_image(image), picture())
    with pytest.raises(UserError) as broken:
        open_image("A" * 5000)
    assert len(str(broken.value)) < 300
    with pytest.raises(UserError, match="no such image"):
        open_image("\n" * 100_000 + "!")  # in a moment
    with pytest.raises(UserError, match="web address"):
        open_image("https://example.com/0.png")


def test_transparency_is_white_and_deep_pictures_are_scaled_by_what_is_there(tmp_path):
    formula = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    formula.putpixel((1, 1), (0, 0, 0, 255))
    pixels = np.asarray(open_image(png(formula)))
    assert pixels[0, 0].tolist() == [255] * 3 and pixels[1, 1].tolist() == [0] * 3
    for top, white in ((255, 255), (4095, 255), (65535, 255), (2047, 127)):
        deep = Image.fromarray(np.array([[0, top]], dtype=np.uint16))
        assert np.asarray(open_image(png(deep)))[0, 1, 0] == pytest.approx(white, abs=1)
    Image.fromarray(np.array([[0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "f.tiff")
    assert np.asarray(open_image("f.tiff", tmp_path))[0, :, 0].tolist() == [0, 128, 255]


def test_only_formats_of_the_list_are_opened(tmp_path):
    """Records come from anywhere, and not every reader of Pillow is safe."""
    for form in "PNG JPEG MPO WEBP GIF BMP TIFF PPM JPEG2000 TGA ICO".split():
        picture().save(tmp_path / "a", form)
        assert open_image("a", tmp_path).getpixel((0, 0))
    for form in ("EPS", "PCX", "SGI", "PDF"):
        picture().save(tmp_path / "b", form)
        with pytest.raises(UserError, match="not a readable image"):
            open_image("b", tmp_path)


def test_a_long_text_chunk_is_no_reason_to_refuse_a_picture(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "x" * 2_000_000, zip=True)
    picture().save(tmp_path / "a.png", pnginfo=info)
    assert np.array_equal(open_image("a.png", tmp_path), picture())


# --- commands ------------------------------------------------------------------------------------


def check(capsys, *args):
    """(exit code, output) of `python data.py check`."""
    with pytest.raises(SystemExit) as end:
        data.main(["check", *map(str, args)])
    out, err = capsys.readouterr()
    return end.value.code, out + err


def test_check_says_each_kind_of_fault_once(folder, capsys):
    gone = [{**PLAIN, "image": f"no{i}.png", "prompt": f"{i}?"} for i in range(40)]
    path = write(folder / "prefs.jsonl", *gone, {**PLAIN, "chosen": " "})
    code, text = check(capsys, path)
    assert code == 1 and "41 records, 41 bad" in text
    assert (
        text.count("no such image") == 1
        and "40 records" in text
        and "prefs.jsonl:1, 2, 3 and 37 more" in text
    )
    code, text = check(capsys, path, "--all")
    assert text.count("no such image") == 40
    code, text = check(capsys, path, "--image-root", folder)
    assert "--image-root" in text


def test_check_says_what_will_be_trained(folder, capsys):
    Image.new("RGB", (8, 8), "red").save(folder / "red.png")
    swapped = {**PLAIN, "chosen": "Yes.", "rejected": "No."}
    path = write(
        folder / "prefs.jsonl",
        PLAIN,
        swapped,
        PLAIN,
        {**PLAIN, "rejected": "No."},
        {**PLAIN, "image": "red.png", "prompt": "<image>\nWhat?", "reject": "x"},
    )
    code, text = check(capsys, path)
    assert code == 0
    for line in (
        "5 records, 0 bad; usable by sft 5, dpo 5",
        f"equal pairs, chosen = rejected: 1, at {path}:4",
        "contradictory pairs, the other way round in an earlier record: 1, at",
        "duplicates of an earlier record: 1, at",
        f"image of one colour: 1, at {path}:5",
        f"prompt, an image tag taken off (the model's own is put around it): 1, at {path}:5",
        f"field reject, which is not read (--fields can name it): 1, at {path}:5",
    ):
        assert line in text, line


def test_check_shows_a_record_and_the_longest_and_writes_a_page(folder, tmp_path, capsys):
    save_llava15(tmp_path / "model")
    long = {**PLAIN, "image": "1.png", "prompt": "Is there a cup or a fork or a knife there?"}
    path = write(folder / "prefs.jsonl", PLAIN, long, {**PLAIN, "image": "2.png"})
    page = tmp_path / "page.html"
    code, text = check(capsys, path, "--model", tmp_path / "model", "--page", page)
    assert code == 0 and "label chosen (" in text and text.count("label rejected (") == 2
    assert f"{path}:1, " in text and f"{path}:2, " in text and "a fork or a knife" in text
    assert page.read_text().count("<article>") == 3
    assert "Is there a cup or" in page.read_text()
    _, text = check(capsys, path, "--model", tmp_path / "model", "--show", 1)
    assert text.count("label rejected (") == 1 and "a fork or a knife" in text
    tokens = int(re.search(r"length, tokens: .* max (\d+)", text)[1])
    _, text = check(capsys, path, "--model", tmp_path / "model", "--max-length", tokens - 1)
    assert "3 records, 1 bad" in text and f"--max-length {tokens} would take all" in text


def test_construction_reads_paths_in_parquet_from_the_data_folder_alone(folder, capsys):
    (folder / "data").mkdir()
    picture(0).save(folder / "data" / "in.png")
    path = folder / "data" / "prefs.jsonl"
    write(path, {**PLAIN, "image": {"bytes": None, "path": "in.png"}})
    out = folder / "data" / "pairs.jsonl"
    contrast.main([str(path), "--out", str(out), "--kind", "black"])
    assert json.loads(out.read_text())["image"] == "in.png"
    for name, reason in (("../0.png", "--allow-outside"), ("gone.png", "no such image file")):
        write(path, {**PLAIN, "image": {"bytes": None, "path": name}})
        with pytest.raises(SystemExit):
            contrast.main([str(path), "--out", str(out), "--kind", "black"])
        said = capsys.readouterr().err
        assert f"{path}:1: " in said and reason in said


def test_construction_takes_pictures_from_inside_the_file(folder):
    rows = []
    for number in range(3):
        image = {"bytes": png(picture(number)), "path": None}
        rows.append({**PLAIN, "image": image, "idx": number})
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "train.parquet")
    out = folder / "pairs.jsonl"
    contrast.main([str(folder / "train.parquet"), "--out", str(out), "--kind", "random"])
    pairs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [pair["idx"] for pair in pairs] == [0, 1, 2]
    for number, (pair, record) in enumerate(zip(pairs, Records(out))):
        assert np.array_equal(open_image(pair["image"], folder), picture(number))
        assert pair["contrast_image"] != pair["image"] and record["chosen"] == "No."
    review.main([str(folder / "train.parquet"), "--out", str(folder / "page.html")])
    assert "data:image/jpeg" in (folder / "page.html").read_text()
