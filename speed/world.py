"""A random LLaVA at LLaVA-1.5's token counts, and records for it.

576 image, 60 prompt and 100 response tokens a sequence; a SymMPO record has three responses behind
m and two behind m'.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import RESPONSES
from support.files import write_lines
from tiny.model import IMAGE
from tiny.world import NOUNS
from vlm.load import load_processor
from vlm.prompts import Prompts

PROMPT, RESPONSE = 60, 100  # tokens
TINY_MODEL = Path(__file__).parent.parent / "tiny" / "built" / "model"
# Each a rank of LoRA and the two parts of a LlavaConfig.
SIZES = json.loads(Path(__file__).with_name("sizes.json").read_text())


def patches_of(size):
    """Image tokens."""
    vision = SIZES[size]["vision_config"]
    return (vision["image_size"] // vision["patch_size"]) ** 2


# --- model and records ----------------------------------------------------------------------------


def new_model(size, device):
    """bf16 on CUDA, where 7b fits in memory once."""
    from transformers import AutoModelForImageTextToText, LlavaConfig

    config = LlavaConfig(
        text_config=SIZES[size]["text_config"],
        vision_config=SIZES[size]["vision_config"],
        image_token_id=IMAGE,
    )
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def new_processor(size):
    """The tiny world's, whose tokens are words: a text has exactly the tokens asked for."""
    _, processor = load_processor(TINY_MODEL)
    vision = SIZES[size]["vision_config"]
    pixels = vision["image_size"]
    processor.patch_size = vision["patch_size"]
    processor.tokenizer.model_max_length = 4096
    images = processor.image_processor
    images.size = {"shortest_edge": pixels}
    images.crop_size = {"height": pixels, "width": pixels}
    return processor


def write_world(folder, size, device="cpu"):
    """A checkpoint and prefs.jsonl with three records; the third has the second's images and the
    first's texts."""
    folder = Path(folder)
    pick, rng = random.Random(0), np.random.default_rng(0)
    new_model(size, device).save_pretrained(folder)
    processor = new_processor(size)
    processor.save_pretrained(folder)
    for name in ("m0", "m1", "c0", "c1"):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((336, 336))
        picture.save(folder / f"{name}.png")

    def text(n):
        return " ".join(pick.choices(NOUNS, k=n))

    one_word = Prompts(processor, "vicuna").encode(["cup"], [picture])
    frame = one_word["input_ids"].shape[1] - patches_of(size) - 1  # tokens of the template
    images = [{"image": f"m{i}.png", "contrast_image": f"c{i}.png"} for i in range(2)]
    lines = []
    for pair in images:
        texts = {name: text(RESPONSE - 1) for name in RESPONSES}
        lines.append({"prompt": text(PROMPT - frame), **texts, **pair})
    lines.append({**lines[0], **images[1]})
    write_lines(folder / "prefs.jsonl", lines)
