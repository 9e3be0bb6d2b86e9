"""Records, prompts, tokens and images: with a real Llama tokenizer and real files."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import write_prefs
from data import Records, build_rows
from support.cli import UserError
from support.files import whole_lines, write_lines
from support.images import CROP, CROP_LARGE, crop, open_image
from symmpo import MP, OBJECTIVES, L, M, W
from vlm.load import add_lora, load_model, load_processor
from vlm.logprobs import decoder, logp_table
from vlm.prompts import Prompts, prompt_format

SYMMPO = OBJECTIVES["symmpo"].cells


def one(tmp_path, raw):
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(raw))
    return Records(path)[0]


@pytest.fixture(scope="module")
def prompts(llava):
    return Prompts(load_processor(llava)[1], "vicuna")


def test_known_shapes_are_told_apart(tmp_path):
    plain = {"image": "a.png", "prompt": "Q?", "chosen": "yes", "rejected": "no"}
    user = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}]
    shapes = [
        plain,
        {"image": "a.png", "question": "Q?", "chosen": "yes", "rejected": "no"},
        {
            "image": "a.png",
            "text": json.dumps({"question": "Q?", "chosen": "yes", "rejected": "no"}),
        },
        {
            "images": ["a.png"],
            "prompt": user,
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
        },
        {
            "images": ["a.png"],
            "chosen": user + [{"role": "assistant", "content": "yes"}],
            "rejected": user + [{"role": "assistant", "content": "no"}],
        },
    ]
    for raw in shapes:
        record = one(tmp_path, raw)
        assert {k: record[k] for k in plain} == plain
    raw = {
        "question": "Q?",
        "image_1": "a.png",
        "image_2": "b.png",
        "resp_1_w": "yes",
        "resp_1_l": "no",
        "resp_2_w": "maybe",
        "resp_2_l": "unused",
    }
    assert {k: one(tmp_path, raw)[k] for k in (*plain, "contrast_image", "contrast_chosen")} == {
        **plain,
        "contrast_image": "b.png",
        "contrast_chosen": "maybe",
    }


def test_published_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    Image.new("RGB", (8, 6), "red").save(tmp_path / "x.png")
    picture = {"bytes": (tmp_path / "x.png").read_bytes(), "path": None}
    rows = [
        {
            "question": f"Q{i}?",
            "image_1": picture,
            "image_2": picture,
            "resp_1_w": "a",
            "resp_1_l": "b",
            "resp_2_w": "c",
            "resp_2_l": "d",
            "idx": i,
        }
        for i in range(7)
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=3
    )
    records = Records(tmp_path / "p.parquet")
    assert [records[i]["prompt"] for i in (6, 0, 3)] == ["Q6?", "Q0?", "Q3?"] and len(records) == 7
    assert open_image(records[4]["image"]).getpixel((0, 0)) == (255, 0, 0)
    assert [record["source"][-6:] for record in records] == [f" row {i}" for i in range(1, 8)]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"image": "a.png", "prompt": "Q?"', "not valid JSON"),
        ("[1, 2]", "JSON object"),
        ('{"image": "a.png", "prompt": "Q?"}', "missing: chosen;"),
        ('{"image": "a.png", "prompt": "  ", "chosen": "x"}', "field prompt is empty, or no text"),
        ('{"image": "a.png", "prompt": "Q?", "chosen": 3}', "field chosen is empty, or no text: 3"),
        (
            '{"images": ["a", "b"], "prompt": [{"content": "Q"}], "chosen": [{"content": "A"}]}',
            "2 images",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"image": "a.png", "prompt": "Q?", "chosen": "x"}\n\n' + line + "\n")
    records = Records(path)
    assert records[0]["chosen"] == "x" and len(records) == 2
    with pytest.raises(UserError, match=reason) as e:
        records[1]
    assert f"{path}:3" in str(e.value)


def test_records_are_lazy(tmp_path):
    import tracemalloc

    peaks = []
    for n in (1000, 20_000):
        path = tmp_path / f"{n}.jsonl"
        path.write_text(
            json.dumps({"image": "a.png", "prompt": "Q?", "chosen": "x" * 500}) * 1
            + "\n"
            + ("{}".ljust(600) + "\n") * (n - 1)
        )
        tracemalloc.start()
        records = Records(path)
        assert len(records) == n and records[0]["chosen"] == "x" * 500
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 20_000 * 64 + 200_000  # bytes; the file has 12 MB


def test_lines_are_read_back_whatever_is_in_their_texts(tmp_path):
    rows = [{"text": "one\u2028two\x85three"}, {"text": "four"}]
    path = tmp_path / "a.jsonl"
    write_lines(path, rows)
    path.write_bytes(path.read_bytes() + b'{"text": "torn')
    assert whole_lines(path) == rows


def test_vicuna_tokens(prompts):
    """One BOS, one EOS, no space lost or doubled at the boundary, 16 image tokens."""
    tokenizer = prompts.tokenizer
    image = Image.new("RGB", (90, 60))
    ids = prompts.encode(["What is it?"], [image])["input_ids"][0].tolist()
    answer = prompts.encode_response("A red cup.")
    assert ids.count(tokenizer.bos_token_id) == 1 == (ids[0] == tokenizer.bos_token_id)
    assert answer.count(tokenizer.eos_token_id) == 1 == (answer[-1] == tokenizer.eos_token_id)
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 16
    text = tokenizer.decode([i for i in ids + answer if i not in tokenizer.all_special_ids])
    assert text.endswith("USER: \nWhat is it? ASSISTANT: A red cup.")
    whole = tokenizer("ASSISTANT: A red cup.", add_special_tokens=False).input_ids
    assert whole[-len(answer) + 1 :] == answer[:-1]  # what tokenising both at once gives here


def test_special_tokens_in_user_text_stay_text(prompts):
    tokenizer = prompts.tokenizer
    image = Image.new("RGB", (90, 60))
    prompt = "Is </s> or <image> an <s> image?"
    ids = prompts.encode([prompt], [image])["input_ids"][0].tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 16
    assert tokenizer.eos_token_id not in ids and ids.count(tokenizer.bos_token_id) == 1
    answer = prompts.encode_response("one</s><s><image><pad> two")
    assert [i for i in answer if i in tokenizer.all_special_ids] == [tokenizer.eos_token_id]
    assert "two" in tokenizer.decode(answer)


@pytest.mark.parametrize(
    "template, separator, end",
    [
        (
            "{% for m in messages %}{{ m.role.upper() }}: {% for c in m.content %}"
            "{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}"
            "{% if m.role == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
            "",
            "</s>",
        ),
        (
            "{% for m in messages %}{{ m.role }}\n{% for c in m.content %}"
            "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}<end>\n{% endfor %}"
            "{% if add_generation_prompt %}assistant\n{% endif %}",
            "",
            "<end>",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
            "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %} {% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "",
            "</s>",
        ),
    ],
)
def test_chat_templates(llava, template, separator, end):
    """The end token is the template's own; where it has none, EOS is trained on all the same."""
    _, processor = load_processor(llava)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<end>"]})
    processor.chat_template = template
    prompts = Prompts(processor, "chat")
    assert prompts.separator == separator
    assert prompts.end_token == processor.tokenizer.convert_tokens_to_ids(end)
    ids = prompts.encode(["What?"], [Image.new("RGB", (9, 9))])["input_ids"]
    assert (ids == processor.tokenizer.bos_token_id).sum() == 1
    assert (ids == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 16
    text = processor.tokenizer.decode(ids[0].tolist() + prompts.encode_response("A cup."))
    tail = text.rpartition("What?")[2]
    assert "A cup." + end in tail and "  " not in tail  # one space at the boundary, not two


def test_real_llava15_layout(llava15, prefs):
    """336 px, patch 14: 576 image tokens, and features that fit them; a changed image matters."""
    model, processor = load_model(llava15)
    assert prompt_format(model.config, processor) == "vicuna"
    processor.chat_template = "{{ '<|start_header_id|>user<|end_header_id|>' }}"
    assert prompt_format(model.config, processor) == "chat"  # a llava over Llama 3
    assert prompt_format(model.config, processor, "vicuna") == "vicuna"
    record, prompts = Records(prefs)[0], Prompts(processor, "vicuna")
    rows = build_rows(record, prompts, SYMMPO)
    image_token = model.config.image_token_id
    assert [(row.inputs["input_ids"] == image_token).sum() for row in rows] == [576, 576]
    swapped = build_rows({**record, "image": record["contrast_image"]}, prompts, SYMMPO)
    with torch.no_grad():
        packed = logp_table(model, rows, 1)
        plain = logp_table(model, rows, 1, packed=False)
        other = logp_table(model, swapped, 1)
    assert (packed - plain)[~packed.isnan()].abs().max() < 5e-5
    assert abs(other[M, W, 0] - packed[M, W, 0]) > 1e-3


def test_left_padded_batches_hold_the_single_prompts(prompts):
    images = [Image.new("RGB", (40, 60), color) for color in ("red", "blue")]
    texts = ["What?", "What is the colour of this?"]
    batch = prompts.encode(texts, images)
    for k in range(2):
        alone = prompts.encode([texts[k]], [images[k]])
        real = batch["attention_mask"][k].bool()
        assert batch["input_ids"][k][real].tolist() == alone["input_ids"][0].tolist()
        assert (batch["pixel_values"][k] == alone["pixel_values"][0]).all()


def test_crops_keep_their_share_and_their_seed(prefs, prompts):
    image = Image.new("RGB", (320, 240))
    for keep in (CROP, CROP_LARGE):
        for seed in range(200):
            part = crop(image, random.Random(seed), keep)
            share = part.width * part.height / (320 * 240)
            assert keep[0] - 0.003 < share < keep[1] + 0.003
    record = {k: v for k, v in Records(prefs)[0].items() if not k.startswith("contrast")}
    mdpo = [(M, W), (M, L), (MP, W)]
    pixels = []
    for seed in (0, 0, 1):
        _, contrast = build_rows(record, prompts, mdpo, seed=seed)
        pixels.append(contrast.inputs["pixel_values"])
    assert (pixels[0] == pixels[1]).all() and (pixels[0] != pixels[2]).any()
    with pytest.raises(UserError, match="contrast_chosen"):
        build_rows(record, prompts, SYMMPO)


def test_images_of_every_kind(tmp_path):
    rgb = Image.new("RGB", (20, 10), (255, 0, 0))
    exif = rgb.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    rgb.save(tmp_path / "exif.jpg", exif=exif)
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg")
    rgb.convert("P").save(tmp_path / "palette.png")
    Image.fromarray(np.full((10, 20), 40_000, np.uint16)).save(tmp_path / "16bit.png")
    rgb.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (20, 10))])
    Image.new("RGBA", (1, 1)).save(tmp_path / "one.png")
    for name in ("cmyk.jpg", "palette.png", "16bit.png", "animated.gif", "one.png"):
        assert open_image(name, tmp_path).mode == "RGB"
    assert open_image("exif.jpg", tmp_path).size == (10, 20)
    assert open_image("16bit.png", tmp_path).getpixel((0, 0)) == (156, 156, 156)


def test_broken_images_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    (tmp_path / "text.jpg").write_text("version https://git-lfs.github.com/spec/v1")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    for name, reason in [
        ("cut.png", "not a readable image"),
        ("text.jpg", "Git LFS pointer"),
        ("bomb.png", "900000000 pixels"),
        ("none.png", "no such image"),
    ]:
        with pytest.raises(UserError, match=reason) as e:
            open_image(name, tmp_path)
        assert name in str(e.value)
    (tmp_path / "inner").mkdir()
    assert open_image("../whole.png", tmp_path / "inner").size == (100, 100)
    with pytest.raises(UserError, match="outside"):
        open_image("../whole.png", tmp_path / "inner", allow_outside=False)


def test_too_long_is_refused_not_cut(prefs, prompts):
    with pytest.raises(UserError, match="--max-length is 50"):
        build_rows(Records(prefs)[0], prompts, SYMMPO, max_length=50)


def test_check_command(prefs, llava, tmp_path, capsys):
    def run(*args):
        with pytest.raises(SystemExit) as end:
            data.main(["check", *map(str, args)])
        return end.value.code, "".join(capsys.readouterr())

    code, text = run(prefs, "--model", llava)
    assert code == 0 and "12 records, 0 bad" in text
    assert "symmpo 12" in text and "ASSISTANT:" in text and "</s>" in text
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"image": "gone.png", "prompt": "Q?", "chosen": "x"}\n{"image": 3}\n')
    code, text = run(bad)
    assert code == 1 and "2 bad" in text
    assert all(f"{bad}:{n}" in text for n in (1, 2))
    assert run(tmp_path / "none.jsonl")[0] == 2


@pytest.mark.parametrize("name", ["torch", "transformers", "peft"])
def test_an_older_package_is_named(tmp_path, llava, prefs, name, monkeypatch, capsys):
    about = tmp_path / f"{name}-0.9.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.9\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as end:
        data.main(["check", str(prefs), "--model", str(llava)])
    assert end.value.code == 2 and f"{name} 0.9 is older than" in capsys.readouterr().err


def test_four_bit_base_weights_train(llava, tmp_path):
    """bitsandbytes packs on a CPU, too, where it is installed."""
    pytest.importorskip("bitsandbytes")
    tables = []
    for four_bit in (False, True):
        model, processor = load_model(str(llava), dtype=torch.bfloat16, four_bit=four_bit)
        policy = add_lora(model, rank=4, alpha=8)
        record = Records(write_prefs(tmp_path))[0]
        rows = build_rows(record, Prompts(processor, "vicuna"), SYMMPO)
        with torch.autocast("cpu", torch.bfloat16):
            tables.append(logp_table(policy, rows, 1))
    packed = {type(m).__name__ for m in decoder(model).modules()}
    assert "Linear4bit" in packed and type(model.lm_head) is torch.nn.Linear
    tables[1].nansum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())
    off = (tables[0] - tables[1]).nan_to_num().abs().max().item()
    assert 0 < off < 10  # nats over sums of about -50: near, and not the same weights
