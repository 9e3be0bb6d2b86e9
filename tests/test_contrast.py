"""The contrastive images: each kind on real image files, and exact neighbours."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw

from conftest import FIXTURES
from construct import contrast
from data import embed, nearest
from support.images import moco, noise
from support.records import Records

MADE = ("crop", "crop-large", "black", "noise", "moco")
VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=16,
    initializer_range=0.2,
)
TEXT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
)


def picture(seed, size=(160, 120)):
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.choices(range(256), k=3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        draw.ellipse((x, y, x + 30, y + 30), fill=tuple(rng.choices(range(256), k=3)))
    return image


@pytest.fixture
def folder(tmp_path):
    for i in range(8):
        picture(i).save(tmp_path / f"{i}.png")
    return tmp_path


@pytest.fixture(scope="session", params=["clip", "siglip", "llava"])
def encoder(request, tmp_path_factory):
    torch.manual_seed(0)
    path, tf = tmp_path_factory.mktemp(request.param), transformers
    if request.param == "clip":
        model = tf.CLIPModel(tf.CLIPConfig(vision_config=VISION, text_config=TEXT))
    elif request.param == "siglip":
        model = tf.SiglipModel(tf.SiglipConfig(vision_config=VISION, text_config=TEXT))
    else:
        model = tf.LlavaForConditionalGeneration(
            tf.LlavaConfig(
                vision_config=tf.CLIPVisionConfig(**VISION), text_config=tf.LlamaConfig(**TEXT)
            )
        )
    model.save_pretrained(path)
    images = tf.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    tokenizer = tf.LlamaTokenizer.from_pretrained(FIXTURES / "llama_tokenizer", pad_token="<pad>")
    processor = {"clip": tf.CLIPProcessor, "siglip": tf.SiglipProcessor}.get(request.param)
    processor = (
        processor(images, tokenizer)
        if processor
        else tf.LlavaProcessor(
            images, tokenizer, patch_size=16, vision_feature_select_strategy="default"
        )
    )
    processor.save_pretrained(path)
    return path


def run(*args, code=0):
    argv = [str(arg) for arg in args]
    if code == 0:
        return contrast.main(argv)
    with pytest.raises(SystemExit) as end:
        contrast.main(argv)
    assert end.value.code == code


def lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


# --- the kinds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, low, high", [("crop", 0.005, 0.2), ("crop-large", 0.19, 0.51)])
def test_crops_keep_their_share_of_the_area(folder, kind, low, high):
    run(folder, "--out", folder / "out.jsonl", "--kind", kind)
    for record in lines(folder / "out.jsonl"):
        w, h = Image.open(folder / record["contrast_image"]).size
        assert low < w * h / (160 * 120) < high


def test_noise_is_the_forward_process():
    grey = Image.new("RGB", (200, 200), (127, 127, 127))
    x, rng = np.zeros((200, 200, 3)), np.random.default_rng(1)
    for beta in np.linspace(1e-4, 0.02, 1000)[:60]:  # step by step, as DDPM defines it
        x = (1 - beta) ** 0.5 * x + beta**0.5 * rng.standard_normal(x.shape)
    ours = np.asarray(noise(grey, random.Random(0), 60)) / 127.5 - 1
    assert ours.std() == pytest.approx(x.std(), rel=0.01) and abs(ours.mean()) < 0.01
    image = picture(1)
    kept = [
        np.corrcoef(
            np.asarray(noise(image, random.Random(0), step)).ravel(), np.asarray(image).ravel()
        )[0, 1]
        for step in (0, 250, 500, 999)
    ]
    assert kept[0] == 1 and kept == sorted(kept, reverse=True) and abs(kept[3]) < 0.1


def test_moco_does_all_five_things():
    image, seen = picture(3), set()
    for seed in range(60):
        out = moco(image, random.Random(seed))
        assert out.size == image.size and out.mode == "RGB"
        r, g, b = (np.asarray(channel, int) for channel in out.split())
        seen.add("grey" if (r == g).all() and (g == b).all() else "colour")
        seen.add(out.tobytes())
    assert {"grey", "colour"} <= seen and len(seen) == 62
    red = Image.new("RGB", (32, 32), (200, 40, 40))  # a flat image shows colour jitter alone
    hues = {moco(red, random.Random(seed)).convert("HSV").getpixel((9, 9))[0] for seed in range(60)}
    assert len(hues) > 20 and all(h < 30 or h > 225 for h in hues)  # +-0.1 of the circle, wrapped


@pytest.mark.parametrize("kind", MADE + ("random",))
def test_the_same_seed_gives_the_same_bytes(folder, kind):
    def made(seed, out):
        run(folder, "--out", folder / out, "--kind", kind, "--seed", seed)
        records = lines(folder / out)
        assert {(r["contrast_kind"], r["contrast_seed"]) for r in records} == {(kind, seed)}
        assert all(r["contrast_image"] != r["image"] for r in records) and len(records) == 8
        return [(folder / r["contrast_image"]).read_bytes() for r in records]

    first = made(0, "a.jsonl")
    text = (folder / "a.jsonl").read_bytes()
    assert made(0, "a.jsonl") == first and (folder / "a.jsonl").read_bytes() == text
    assert (made(1, "b.jsonl") == first) == (kind == "black")


def test_records_keep_their_fields_and_images_without_a_partner_are_left_out(folder, capsys):
    records = [{"image": f"{i // 2}.png", "prompt": "é?", "scene": i} for i in range(4)]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    run(folder / "in.jsonl", "--out", folder / "new/out.jsonl", "--kind", "random")
    found = lines(folder / "new/out.jsonl")
    assert [line["contrast_image"] for line in found] == ["../1.png"] * 2 + ["../0.png"] * 2
    assert found[0] | records[0] == found[0] | {"image": "0.png"}
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, records[:2])))
    run(folder / "in.jsonl", "--out", folder / "out.jsonl", "--kind", "random")
    assert lines(folder / "out.jsonl") == [] and "2 left out" in capsys.readouterr().out


def test_images_of_a_group_are_never_paired(folder, capsys):
    path = folder / "in.jsonl"
    records = [{"image": f"{i}.png", "scene": (0, 1, 0, 0, 1)[i]} for i in range(5)]
    path.write_text("\n".join(map(json.dumps, records)))
    partners = {image: set() for image in range(5)}
    for seed in range(30):
        out = folder / "out.jsonl"
        run(path, "--out", out, "--kind", "random", "--group", "scene", "--seed", seed)
        for record in lines(out):
            partners[int(record["image"][0])].add(int(record["contrast_image"][0]))
    even, odd = {0, 2, 3}, {1, 4}
    assert partners == {0: odd, 1: even, 2: odd, 3: odd, 4: even}
    path.write_text("\n".join(json.dumps(record | {"scene": 0}) for record in records))
    run(path, "--out", out, "--kind", "random", "--group", "scene")
    assert lines(out) == [] and "5 left out" in capsys.readouterr().out
    path.write_text("\n".join(json.dumps({"image": "0.png", "scene": i}) for i in range(2)))
    run(path, "--out", out, "--kind", "random", "--group", "scene", code=2)
    assert "in.jsonl:2: --group scene" in capsys.readouterr().err
    run(path, "--out", out, "--kind", "random", "--group", "scnee", code=2)
    assert "in.jsonl:1: there is no field scnee" in capsys.readouterr().err


SYMMPO_NAMES = ("question", "image_1", "image_2", "resp_1_w", "resp_1_l", "resp_2_w")
OUR_NAMES = ("prompt", "image", "contrast_image", "chosen", "rejected", "contrast_chosen")


@pytest.mark.parametrize("names", [OUR_NAMES, SYMMPO_NAMES, "xabcde"])
def test_a_response_to_another_contrast_image_is_left_out(folder, capsys, names):
    """Else SymMPO would train on what is said of a picture that is not there."""
    values = ("What?", "0.png", "1.png", "yes", "no", "of the other one")
    records = [dict(zip(names, values)) | {"changes": ["of the other one"]} for _ in range(2)]
    records.append(dict(zip(names[:5], values)))
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, records)))
    fields = ",".join(f"{ours}={theirs}" for ours, theirs in zip(OUR_NAMES, names))
    mapped = ["--fields", fields] if names == "xabcde" else []
    run(folder / "in.jsonl", "--out", folder / "out.jsonl", "--kind", "black", *mapped)
    said = capsys.readouterr().out
    assert said.count("contrast_chosen") == 1 and "of 2 records" in said and "responses" in said
    text = (folder / "out.jsonl").read_text()
    assert "of the other one" not in text and "resp_2_w" not in text
    for number, record in enumerate(Records(folder / "out.jsonl")):
        assert record["contrast_image"] == f"out/{number:06d}.png"
        assert "contrast_chosen" not in record and record["rejected"] == "no"
        assert record["unread"] == []


def test_texts_that_no_encoding_knows_survive(folder):
    (folder / "in.jsonl").write_text('{"image": "0.png", "prompt": "\\ud800 é"}')
    run(folder / "in.jsonl", "--out", folder / "out.jsonl", "--kind", "black")
    assert lines(folder / "out.jsonl")[0]["prompt"] == "\ud800 é"
    assert "é" in (folder / "out.jsonl").read_text()


def test_errors_name_the_place(folder, capsys):
    (folder / "in.jsonl").write_text('{"image": "0.png"}\n\n{"picture": 1}\n')
    (folder / "gone.jsonl").write_text('{"image": "gone.png"}\n')
    (folder / "empty").mkdir()
    out = ["--out", folder / "out.jsonl"]
    for args, message in [
        ([folder / "in.jsonl", "--kind", "crop"], "in.jsonl:3: "),
        ([folder / "gone.jsonl", "--kind", "crop"], "gone.png: no such image"),
        ([folder / "none.jsonl", "--kind", "crop"], "none.jsonl: no such file"),
        ([folder / "empty", "--kind", "crop"], "no images"),
        ([folder, "--encoder", folder / "empty"], "not an image encoder"),
    ]:
        run(*args, *out, code=2)
        assert message in capsys.readouterr().err
    assert not (folder / "out.jsonl").exists()


# --- neighbours ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_neighbours_are_exact(block):
    torch.manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(50, 4), dim=1)
    vectors[7] = vectors[3]  # a duplicate that only the ceiling can catch
    labels = [torch.arange(50) // 5, torch.arange(50) % 9]
    index, cosine = nearest(vectors, labels, max_sim=0.95, block=block)
    for i in range(50):
        allowed = {
            j: float(vectors[i] @ vectors[j])
            for j in range(50)
            if all(label[i] != label[j] for label in labels)
        }
        best = max(c for c in allowed.values() if c <= 0.95)
        assert allowed[int(index[i])] == pytest.approx(best, abs=1e-6)
        assert float(cosine[i]) == pytest.approx(best, abs=1e-6)
    alone = nearest(vectors, [torch.zeros(50)], 1.0)[1]
    assert torch.isinf(alone).all()


def test_every_encoder_family_finds_neighbours_and_no_duplicates(folder, encoder):
    picture(0).save(folder / "copy.bmp")  # the same pixels in another file
    nearly = picture(0)
    nearly.putpixel((0, 0), (1, 2, 3))
    nearly.save(folder / "nearly.png")
    run(folder, "--out", folder / "out.jsonl", "--encoder", encoder, "--max-sim", 0.999)
    found = {r["image"]: r for r in lines(folder / "out.jsonl")}
    same = {"0.png", "copy.bmp", "nearly.png"}
    assert len(found) == 10
    assert all(found[image]["contrast_image"] not in same for image in same)
    assert all(r["contrast_kind"] == "clip" and r["similarity"] <= 0.999 for r in found.values())
    run(folder, "--out", folder / "all.jsonl", "--encoder", encoder, "--max-sim", 2)
    pairs = {r["image"]: r["contrast_image"] for r in lines(folder / "all.jsonl")}
    assert pairs["0.png"] == pairs["copy.bmp"] == "nearly.png"  # without a ceiling, the same pixels
    vectors, _ = embed([folder / f"{i}.png" for i in range(8)], encoder, folder / "cache")
    assert vectors.norm(dim=1).allclose(torch.ones(8))
    near = round(float(vectors[4] @ vectors[int(found["4.png"]["contrast_image"][0])]), 4)
    assert near == pytest.approx(found["4.png"]["similarity"], abs=1e-4)
    (folder / "in.jsonl").write_text(
        "\n".join(json.dumps({"image": f"{i}.png", "scene": i % 2}) for i in range(8))
    )
    command = [folder / "in.jsonl", "--out", folder / "out.jsonl", "--encoder", encoder]
    run(*command, "--group", "scene")
    grouped = lines(folder / "out.jsonl")
    assert all((int(r["image"][0]) + int(r["contrast_image"][0])) % 2 for r in grouped)
    floor = sorted(r["similarity"] for r in grouped)[len(grouped) // 2] - 1e-4
    run(*command, "--group", "scene", "--min-sim", floor)
    assert lines(folder / "out.jsonl") == [r for r in grouped if r["similarity"] >= floor]


def test_embeddings_are_cached_by_content(folder, encoder):
    files = [folder / f"{i}.png" for i in range(8)]
    first, _ = embed(files, encoder, folder / "cache", batch=4)
    kept = {p: p.stat().st_mtime_ns for p in (folder / "cache").iterdir()}
    again, _ = embed(files, encoder, folder / "cache", batch=4)
    assert torch.equal(first, again) and len(kept) == 2
    assert kept == {p: p.stat().st_mtime_ns for p in (folder / "cache").iterdir()}
    picture(77).save(files[6])  # the same name with another content
    changed, _ = embed(files, encoder, folder / "cache", batch=4)
    assert len(list((folder / "cache").iterdir())) == 3
    assert torch.equal(first[:6], changed[:6]) and not torch.allclose(first[6], changed[6])


def test_noise_takes_a_step_of_the_schedule(folder, capsys):
    off = []
    for step in (1, 500, 1000):
        run(folder, "--kind", "noise", "--out", folder / f"{step}.jsonl", "--step", step)
        made, given = Image.open(folder / f"{step}/000000.png"), Image.open(folder / "0.png")
        off.append(np.abs(np.asarray(made, float) - np.asarray(given, float)).mean())
    assert off[0] < 2 < 20 < off[1] < off[2]
    run(folder, "--kind", "noise", "--out", folder / "out.jsonl")
    assert (folder / "out/000000.png").read_bytes() == (folder / "500/000000.png").read_bytes()
    run(folder, "--kind", "noise", "--out", folder / "out.jsonl", "--step", 2000, code=2)
    assert "--step" in capsys.readouterr().err
    run(folder, "--kind", "crop", "--out", folder / "out.jsonl", "--step", 300, code=2)
    assert "--step is read by --kind noise alone" in capsys.readouterr().err


def test_an_output_without_a_suffix_is_named(folder, tmp_path, capsys):
    """The pictures' folder has the file's name without it."""
    run(folder, "--kind", "black", "--out", tmp_path / "pairs", code=2)
    assert "pairs.jsonl" in capsys.readouterr().err
