"""A random LLaVA at LLaVA-1.5's token counts, records for it, and how many operations a step takes.

576 image, 60 prompt and 100 response tokens a sequence; a SymMPO record has three responses behind
m and two behind m'.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import RESPONSES
from tiny.model import IMAGE
from tiny.world import NOUNS
from vlm.load import load_processor
from vlm.prompts import Prompts

PROMPT, RESPONSE = 60, 100  # tokens
TINY_MODEL = Path(__file__).parent.parent / "tiny" / "built" / "model"
PATCH = 14  # pixels


@dataclass(frozen=True)
class Size:
    width: int  # of the decoder
    layers: int
    inner: int
    vocabulary: int
    rank: int  # of LoRA
    tower: int  # width of the vision tower
    tower_layers: int
    pixels: int = 336

    def patches(self):
        """Image tokens."""
        return (self.pixels // PATCH) ** 2


SIZES = {
    "tiny": Size(64, 2, 128, 512, rank=4, tower=32, tower_layers=2, pixels=56),
    "quick": Size(256, 4, 704, 8192, rank=8, tower=64, tower_layers=4),
    "mid": Size(1024, 8, 2752, 32064, rank=32, tower=256, tower_layers=6),
    "7b": Size(4096, 32, 11008, 32064, rank=128, tower=1024, tower_layers=24),
}

# --- model and records ----------------------------------------------------------------------------


def new_model(size, device):
    """bf16 on CUDA, where 7b fits in memory once."""
    from transformers import AutoModelForImageTextToText, LlavaConfig

    text = {"model_type": "llama", "hidden_size": size.width, "intermediate_size": size.inner}
    text |= {"num_hidden_layers": size.layers, "num_attention_heads": max(2, size.width // 128)}
    text |= {"vocab_size": size.vocabulary, "initializer_range": 0.05}
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": size.tower,
        "intermediate_size": 4 * size.tower,
    }
    vision |= {
        "num_hidden_layers": size.tower_layers,
        "num_attention_heads": max(2, size.tower // 64),
    }
    vision |= {"image_size": size.pixels, "patch_size": PATCH}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def new_processor(size):
    """The tiny world's, whose tokens are words: a text has exactly the tokens asked for."""
    _, processor = load_processor(TINY_MODEL)
    processor.patch_size, processor.tokenizer.model_max_length = PATCH, 4096
    processor.image_processor.size = {"shortest_edge": size.pixels}
    processor.image_processor.crop_size = {"height": size.pixels, "width": size.pixels}
    return processor


def write_world(folder, size, device="cpu"):
    """A checkpoint and prefs.jsonl with three records; the third has the second's images and the
    first's texts."""
    folder, pick, rng = Path(folder), random.Random(0), np.random.default_rng(0)
    new_model(size, device).save_pretrained(folder)
    processor = new_processor(size)
    processor.save_pretrained(folder)
    for name in ("m0", "m1", "c0", "c1"):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((size.pixels, size.pixels))
        picture.save(folder / f"{name}.png")

    def text(n):
        return " ".join(pick.choices(NOUNS, k=n))

    one_word = Prompts(processor, "vicuna").encode(["cup"], [picture])["input_ids"].shape[1]
    frame = one_word - size.patches() - 1  # tokens of the template
    lines = []
    for i in range(2):
        texts = {name: text(RESPONSE - 1) for name in RESPONSES}
        images = {"image": f"m{i}.png", "contrast_image": f"c{i}.png"}
        lines.append({"prompt": text(PROMPT - frame), **texts, **images})
    lines.append({**lines[0], "image": "m1.png", "contrast_image": "c1.png"})
    (folder / "prefs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- operations -----------------------------------------------------------------------------------


def step_flops(size):
    """Floating-point operations of the matrix products of a packed SymMPO step whose reference is
    cached, by part; (m, k) x (k, n) is 2mkn.

    The backward pass is that of frozen weights, once more the forward, and of trained adapters,
    twice. The first layer needs no gradient of its input.
    """
    width, inner, layers, patches = size.width, size.inner, size.layers, size.patches()
    prefix, branch = patches + PROMPT, RESPONSE - 1  # the last token predicts nothing
    tokens = 2 * prefix + 5 * branch
    pairs = prefix * (prefix + 1) + 5 * (branch * prefix + branch * (branch + 1) / 2)
    linear = 2 * tokens * layers * (4 * width * width + 3 * width * inner)
    lora = 2 * tokens * layers * size.rank * (8 * width + 3 * (width + inner))
    tower = 24 * (patches + 1) * size.tower**2 + 4 * (patches + 1) ** 2 * size.tower
    projector = 2 * patches * width * (size.tower + width)
    return {
        "decoder": 2 * linear - 6 * tokens * width * width,
        "lora": 3 * lora,
        "attention": 12 * width * layers * pairs,  # pairs (query, key) that the mask lets see
        "head": 4 * 5 * RESPONSE * width * size.vocabulary,
        "vision": 2 * (size.tower_layers * tower + projector),
    }
