"""What tests share: small real checkpoints on disk, and preference records with real images."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
TINY = ROOT / "tiny" / "built"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small to be shared between cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def frequent(tokenizer, n):
    """A Llama tokenizer that knows the n tokens that BPE merged first, and all characters: it loads
    in a hundredth of a second."""
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    kept = [
        w for w, i in sorted(core["vocab"].items(), key=lambda kv: kv[1]) if i < n or len(w) == 1
    ]
    vocab = {w: i for i, w in enumerate(kept)}
    merges = [(a, b) for a, b in core["merges"] if {a, b, a + b} <= vocab.keys()]
    return type(tokenizer)(vocab=vocab, merges=merges)


def save_llava15(folder, image_size=336, width=32, seed=0, tokens=None, **more):
    """A checkpoint with LLaVA-1.5's configuration (CLIP ViT patch 14, feature layer -2, a real
    Llama tokenizer, or its `tokens` most frequent ones, with <image> and <pad> added) but small
    random weights; returns its folder."""
    import torch
    import transformers as tf

    tokenizer = tf.LlamaTokenizer.from_pretrained(FIXTURES / "llama_tokenizer")
    tokenizer = frequent(tokenizer, tokens) if tokens else tokenizer
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    images = tf.CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    processor = tf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        image_token="<image>",
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    vision = tf.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=14,
    )
    text = tf.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
        **more,
    )
    torch.manual_seed(seed)
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )
    model.generation_config = tf.GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_gemma3(folder):
    """A small random Gemma 3 with its own processor (chat template, end of turn); its folder."""
    import transformers as tf

    from families import TEXT, VISION

    marks = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = tf.LlamaTokenizer.from_pretrained(
        FIXTURES / "llama_tokenizer", pad_token="<pad>", extra_special_tokens=marks
    )
    tokenizer.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    template = (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' "
        "else m.role }}\n{% for c in m.content %}{{ '<start_of_image>' if c.type == 'image' else "
        "c.text }}{% endfor %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}),
        tokenizer,
        chat_template=template,
        image_seq_length=4,
    ).save_pretrained(folder)
    image, boi, eoi = (tokenizer.convert_tokens_to_ids(mark) for mark in marks.values())
    text = tf.Gemma3TextConfig(
        **{
            **TEXT,
            "vocab_size": len(tokenizer),
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    )
    tf.AutoModelForImageTextToText.from_config(
        tf.Gemma3Config(
            vision_config=tf.SiglipVisionConfig(**VISION),
            text_config=text,
            mm_tokens_per_image=4,
            image_token_id=image,
            boi_token_index=boi,
            eoi_token_index=eoi,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """Folder of a small LLaVA with 16 image tokens (56 px)."""
    return save_llava15(tmp_path_factory.mktemp("llava"), image_size=56, tokens=6000)


@pytest.fixture(scope="session")
def llava15(tmp_path_factory):
    """Folder of a LLaVA with the real 336 px and 576 image tokens."""
    return save_llava15(tmp_path_factory.mktemp("llava15"))


@pytest.fixture(scope="session")
def prefs(tmp_path_factory):
    """Path of a prefs.jsonl with twelve complete records and their images."""
    return write_prefs(tmp_path_factory.mktemp("prefs"))


def write_prefs(folder, n=12):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    words = "red blue cup pot dog cat sky tree on under near the a small large".split()
    lines = []
    for i in range(n):
        for name in ("m", "c"):
            pixels = rng.integers(0, 256, (60 + i, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{i}.png")

        def text(k):
            return " ".join(rng.choice(words, k)) + "."

        lines.append(
            {
                "image": f"m{i}.png",
                "contrast_image": f"c{i}.png",
                "prompt": text(4)[:-1] + "?",
                "chosen": text(3 + i % 4),
                "rejected": text(2 + i % 5),
                "contrast_chosen": text(4 + i % 3),
            }
        )
    path = folder / "prefs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def serve(monkeypatch):
    """serve(script) -> (base_url, list of the request bodies so far): see chat_server.start."""
    import chat_server

    monkeypatch.setenv("OPENAI_API_KEY", chat_server.KEY)
    servers = []

    def start(script, key=chat_server.KEY):
        server, bodies = chat_server.start(script, key)
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", bodies

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def pairs(tmp_path):
    """Records over four images, one of which is broken, each image in two records."""
    from PIL import Image

    import chat_server

    for name, rgb in chat_server.COLOURS.items():
        Image.new("RGB", (64, 48), rgb).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    names = [*chat_server.COLOURS, "broken"]
    records = [
        {
            "image": f"{a}.png",
            "prompt": "What is it?",
            "contrast_image": f"{b}.png",
            "contrast_kind": "random",
            "contrast_seed": 0,
            "similarity": None,
        }
        for a, b in zip(names, names[1:] + names[:1])
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return tmp_path / "pairs.jsonl"


def build_args(pairs, url, out="prefs.jsonl"):
    return [
        str(pairs),
        "--out",
        str(pairs.parent / out),
        "--samples",
        "2",
        "--captioner",
        "captioner",
        "--captioner-url",
        url,
        "--policy",
        "policy",
        "--policy-url",
        url,
        "--writer",
        "writer",
        "--writer-url",
        url,
    ]
