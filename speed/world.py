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
from symmpo import OBJECTIVES
from vlm.load import add_lora
from vlm.logprobs import Row
from vlm.prompts import Prompts

PROMPT, RESPONSE = 60, 100  # tokens
EPOCHS = 4  # over which the cost of the cached reference is spread
WORDS = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]  # the first token ids


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
        return (self.pixels // 14) ** 2


SIZES = {
    "tiny": Size(64, 2, 128, 512, rank=4, tower=32, tower_layers=2, pixels=56),
    "quick": Size(256, 4, 704, 8192, rank=8, tower=64, tower_layers=4),
    "mid": Size(1024, 8, 2752, 32064, rank=32, tower=256, tower_layers=6),
    "7b": Size(4096, 32, 11008, 32064, rank=128, tower=1024, tower_layers=24),
    "13b": Size(5120, 40, 13824, 32064, rank=128, tower=1024, tower_layers=24),
}

# --- model and records ----------------------------------------------------------------------------


def config_of(size):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=max(2, size.width // 128),
        initializer_range=0.05,
        max_position_embeddings=8192,
        pad_token_id=4,
    )
    vision = CLIPVisionConfig(
        hidden_size=size.tower,
        intermediate_size=4 * size.tower,
        num_hidden_layers=size.tower_layers,
        num_attention_heads=max(2, size.tower // 64),
        image_size=size.pixels,
        patch_size=14,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)


def new_processor(size):
    """A processor whose tokens are words, so that a text has exactly the tokens asked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = WORDS + [f"w{i}" for i in range(len(WORDS), size.vocabulary)]
    ids = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    square = {"height": size.pixels, "width": size.pixels}
    images = CLIPImageProcessorPil(size={"shortest_edge": size.pixels}, crop_size=square)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        image_token="<image>",
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def write_world(folder, size):
    """A checkpoint and prefs.jsonl with three records; the third has the second's images and the
    first's texts."""
    from transformers import LlavaForConditionalGeneration

    folder, pick, rng = Path(folder), random.Random(0), np.random.default_rng(0)
    processor = new_processor(size)
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config_of(size)).save_pretrained(folder)
    processor.save_pretrained(folder)
    for name in ("m0", "m1", "c0", "c1"):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((size.pixels, size.pixels))
        picture.save(folder / f"{name}.png")

    def text(n):
        return " ".join(f"w{pick.randrange(5, size.vocabulary)}" for _ in range(n))

    frame = Prompts(processor, "vicuna").render("w5", with_image=False)
    frame = len(processor.tokenizer(frame).input_ids) - 1
    lines = []
    for i in range(2):
        texts = {name: text(RESPONSE - 1) for name in RESPONSES}
        images = {"image": f"m{i}.png", "contrast_image": f"c{i}.png"}
        lines.append({"prompt": text(PROMPT - frame), **texts, **images})
    lines.append({**lines[0], "image": "m1.png", "contrast_image": "c1.png"})
    (folder / "prefs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def random_policy(size, device="cpu", dtype=None, grad_checkpointing=False):
    """A random LLaVA with LoRA, made where it is used and not read from a checkpoint."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config_of(size), dtype=dtype, attn_implementation="sdpa"
        )
    lora = size.rank, 2 * size.rank
    return add_lora(model.eval(), *lora, grad_checkpointing=grad_checkpointing)


def random_rows(size, ragged=0):
    """A SymMPO record's two rows, of random tokens. ragged: up to so many tokens a response less."""
    cells = OBJECTIVES["symmpo"].cells
    rows = []
    for image in (0, 1):
        own = [cell for cell in cells if cell[0] == image]
        text = torch.randint(5, size.vocabulary, (PROMPT,))
        ids = torch.cat([torch.full((size.patches(),), 3), text])[None]
        pixels = torch.randn(1, 3, size.pixels, size.pixels)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        responses = []
        for _ in own:
            length = RESPONSE - random.randint(0, ragged)
            responses.append(torch.randint(5, size.vocabulary, (length,)))
        rows.append(Row(inputs, responses, own, source="random"))
    return rows


# --- operations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What a way to compute the SymMPO step puts through the model."""

    rows: list  # (prefix length, [lengths behind it]) of each sequence
    kept: int  # positions that get logits
    images: int  # passes of the vision tower
    reference: float = 1.0  # share of the reference's forward pass that is in the step

    def tokens(self):
        return sum(prefix + sum(branches) for prefix, branches in self.rows)

    def visible_pairs(self):
        """(query, key) pairs that the mask lets see each other."""
        pairs = 0
        for prefix, branches in self.rows:
            pairs += prefix * (prefix + 1) / 2
            pairs += sum(length * prefix + length * (length + 1) / 2 for length in branches)
        return pairs


def layouts(size):
    """Of the rungs of the ladder, from the published one to ours."""
    prefix = size.patches() + PROMPT
    separate = [(prefix + RESPONSE, [])] * 5
    shared = [(prefix, [RESPONSE - 1] * 3), (prefix, [RESPONSE - 1] * 2)]
    kept = 5 * RESPONSE
    return [
        Layout(separate, 5 * (prefix + RESPONSE), 10),
        Layout(separate, kept + 5, 10),
        Layout(separate, kept + 5, 2),
        Layout(shared, kept, 2),
        Layout(shared, kept, 2, 1 / EPOCHS),
    ]


def step_flops(size, layout):
    """Floating-point operations of a step's matrix products, by part; (m, k) x (k, n) is 2mkn.

    The backward pass is that of frozen weights, once more the forward, and of trained adapters,
    twice. The first layer needs no gradient of its input.
    """
    width, inner, layers, reference = size.width, size.inner, size.layers, layout.reference
    tokens, patches = layout.tokens(), size.patches()
    linear = 2 * tokens * layers * (4 * width * width + 3 * width * inner)
    lora = 2 * tokens * layers * size.rank * (8 * width + 3 * (width + inner))
    tower = 24 * (patches + 1) * size.tower**2 + 4 * (patches + 1) ** 2 * size.tower
    projector = 2 * patches * width * (size.tower + width)
    return {
        "decoder": linear * (2 + reference) - 6 * tokens * width * width,
        "lora": 3 * lora,
        "attention": 4 * width * layers * layout.visible_pairs() * (3 + reference),
        "head": 2 * layout.kept * width * size.vocabulary * (2 + reference),
        "vision": layout.images * (size.tower_layers * tower + projector),
    }
