"""Prompts about one image are answered from one cache: the texts of one-by-one greedy decoding."""

import functools

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from benchmarks.answers import batches
from benchmarks.common import Question
from conftest import FIXTURES, frequent
from families import TEXT, VISION
from vlm.generate import generate
from vlm.load import load_model
from vlm.prompts import Prompts

ASKED = [f"Is there a {'very ' * n}red dog in this picture?" for n in (0, 5, 1, 0, 9)]
ASKED += ["Describe it.", "What is it?"]
ABOUT = [0, 0, 0, 1, 1, 0, 2]  # the numbers of their images


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def llava_next():
    """Its images have as many tokens as their shapes ask for: prefixes differ in length."""
    tokenizer = frequent(tf.LlamaTokenizer.from_pretrained(FIXTURES / "llama_tokenizer"), 500)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    grids = [[28, 56], [56, 28]]
    images = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=grids,
    )
    processor = tf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**{**TEXT, "vocab_size": len(tokenizer)}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
    )
    torch.manual_seed(0)
    return tf.LlavaNextForConditionalGeneration(config).eval(), processor


def tokens_read(model, work):
    """What work returns, and how many tokens the decoder read for it."""
    counts = []

    def note(module, args, options):
        counts.append(options["inputs_embeds"].shape[:2].numel())

    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    result = work()
    hook.remove()
    return result, sum(counts)


@pytest.mark.parametrize("family", ["llava15", "llava_next"])
def test_together_as_one_by_one(family, llava15):
    model, processor = load_model(str(llava15)) if family == "llava15" else llava_next()
    prompts = Prompts(processor, "vicuna")
    shown = pictures((90, 60), (50, 120), (40, 40))
    images = [shown[number] for number in ABOUT]
    ask = functools.partial(generate, model, prompts, max_new_tokens=6)
    alone = [ask([text], [image])[0] for text, image in zip(ASKED, images)]
    assert len(set(alone)) > 4
    together, few = tokens_read(model, lambda: ask(ASKED, images))
    copies = [image.copy() for image in images]
    apart, many = tokens_read(model, lambda: ask(ASKED, copies))
    assert alone == together == apart
    assert few < 0.7 * many  # three prefixes for seven
    assert [text.cut for text in alone] == [text.cut for text in together]
    assert ask(ASKED, images, beams=2) == ask(ASKED, copies, beams=2)


def test_samples_of_one_prompt_are_drawn_as_apart(llava15):
    model, processor = load_model(str(llava15))
    prompts, (image,) = Prompts(processor, "vicuna"), pictures((90, 60))
    drawn, read = [], []
    for images in ([image] * 4, [image.copy() for _ in range(4)]):
        torch.manual_seed(0)
        work = functools.partial(
            generate, model, prompts, ["What is it?"] * 4, images, 5, temperature=1.0
        )
        texts, tokens = tokens_read(model, work)
        drawn.append(texts)
        read.append(tokens)
    assert drawn[0] == drawn[1] and len(set(drawn[0])) == 4
    assert read[0] < 0.3 * read[1]


def test_fifteen_questions_an_image_read_a_fifth_of_the_tokens(llava15):
    model, processor = load_model(str(llava15))
    prompts, (image,) = Prompts(processor, "vicuna"), pictures((90, 60))
    texts = [f"Is there a dog number {n}?" for n in range(15)]
    read = []
    for images in ([image] * 15, [image.copy() for _ in texts]):
        work = functools.partial(generate, model, prompts, texts, images, 1)
        read.append(tokens_read(model, work)[1])
    assert 5 * read[0] < read[1]


def test_an_image_in_the_middle_of_what_differs_is_read_with_each_prompt(llava, monkeypatch):
    """What is shared is looked for, not assumed: here it ends before the image."""
    model, processor = load_model(str(llava))
    prompts, (image,) = Prompts(processor, "vicuna"), pictures((90, 60))
    monkeypatch.setattr(prompts, "render", lambda text, with_image=True: f"<s> {text} <image>\n A:")
    texts = ["red dog", "blue cat"]
    alone = [generate(model, prompts, [text], [image], 5)[0] for text in texts]
    assert generate(model, prompts, texts, [image, image], 5) == alone
    assert alone[0] != alone[1]


def test_an_image_s_questions_are_in_one_batch():
    def sizes(counts, size):
        asked = []
        for number, count in enumerate(counts):
            image = f"{number}.png" if count > 0 else None
            asked += [Question("?", image, {})] * abs(count)
        starts, found = [], []
        for start, batch in batches(asked, size):
            starts.append(start)
            found.append(len(batch))
        assert sum(found) == len(asked) and starts == [sum(found[:n]) for n in range(len(found))]
        return found

    assert sizes([15, 15, 15], 16) == [15, 15, 15]
    assert sizes([5, 5, 5, 5, 1], 16) == [15, 6]
    assert sizes([1] * 40, 16) == [16, 16, 8]
    assert sizes([20, 3], 8) == [8, 8, 7]
    assert sizes([3, -2, 4], 16) == [3, 2, 4]  # 2 without an image
    assert sizes([-40], 16) == [16, 16, 8]
    assert sizes([], 16) == []
