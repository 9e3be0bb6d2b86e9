"""What is refused before a run: decoders whose prefix cannot be shared, tables that differ."""

import copy
import functools
import json

import pytest
import torch
import transformers as tf
from transformers.quantizers.quantizers_utils import should_convert_module

from families import PACKED, PLAIN, TEXT, VISION, tiny_model, tiny_rows
from support.cli import UserError
from vlm.exact import need_packable, need_same
from vlm.load import OUTSIDE_THE_DECODER, adapter_off, add_lora, load_processor
from vlm.logprobs import Row, decoder, logp_table

LONG = 64  # tokens; the windows below are 4
DECODERS = {  # a llava over each: (configuration of the decoder, a word of the reason or None)
    "llama": (tf.LlamaConfig, {}, None),
    "mistral": (tf.MistralConfig, {"sliding_window": 4}, "last 4 tokens"),
    "mistral with a wide window": (tf.MistralConfig, {"sliding_window": LONG}, None),
    "qwen2": (tf.Qwen2Config, {}, None),
    "qwen2 sliding": (
        tf.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        "last 4 tokens",
    ),
    "phi3": (tf.Phi3Config, {"sliding_window": 4}, "last 4 tokens"),
    "gemma3": (tf.Gemma3TextConfig, {"sliding_window": 4, "head_dim": 8}, "last 4 tokens"),
    "cohere2": (tf.Cohere2Config, {"sliding_window": 4, "head_dim": 8}, "last 4 tokens"),
    "granite": (tf.GraniteConfig, {"logits_scaling": 8.0}, None),
    "qwen3_next": (
        tf.Qwen3NextConfig,
        {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8},
        "layers of linear_attention",
    ),
}


def llava_over(kind, **changes):
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=kind(**{**TEXT, **changes}),
        image_token_id=63,
    )
    torch.manual_seed(0)
    return tf.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoder_decides_whether_a_prefix_is_shared(name):
    """Those that are let through are exact, those that are refused are off by far more."""
    kind, changes, reason = DECODERS[name]
    model = llava_over(kind, **changes)
    rows = tiny_rows(model, lambda: {"pixel_values": torch.randn(1, 3, 28, 28)})
    with torch.no_grad():
        packed = logp_table(model, copy.deepcopy(rows), 1)
        plain = logp_table(model, rows, 1, packed=False)
    if reason is None:
        need_packable(model, LONG)
        assert need_same(packed, plain, rows, "float32", "both ways") < 1e-4
    else:
        with pytest.raises(UserError, match=f"{reason}.*--no-share-prefix"):
            need_packable(model, LONG)
        with pytest.raises(UserError, match="both ways differ by"):  # the second net
            need_same(packed, plain, rows, "float32", "both ways")


@pytest.mark.parametrize("tokens", [100, 500])
def test_bf16_noise_passes_and_another_model_does_not(tokens):
    """Under bf16 autocast, in a padded batch, sums move by parts of a nat."""
    model = llava_over(tf.LlamaConfig, max_position_embeddings=2048)
    image = torch.randn(1, 3, 28, 28)
    rows = tiny_rows(model, lambda: {"pixel_values": image}, ((tokens, 7, 5), (9, tokens)))
    other = llava_over(tf.LlamaConfig, max_position_embeddings=2048)
    for p in other.parameters():
        p.data += 0.02 * torch.randn_like(p)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alone = logp_table(model, copy.deepcopy(rows), 1)
        together = logp_table(model, copy.deepcopy(rows), 1, packed=False)
        wrong = logp_table(other, copy.deepcopy(rows), 1)
    off = need_same(alone, together, rows, "bfloat16", "both")
    assert 0 < off < 0.2 * tokens**0.5
    with pytest.raises(UserError, match="differ by"):
        need_same(alone, wrong, rows, "bfloat16", "both")


def test_nan_is_never_the_same():
    row = Row({}, [torch.tensor([5, 2])], [(0, 0)], source="prefs.jsonl:7")
    table = torch.zeros(3, 3, 1)
    assert need_same(table, table + 1e-4, [row], "float32", "both") == pytest.approx(1e-4)
    with pytest.raises(UserError, match="prefs.jsonl:7: both differ by nan nats"):
        need_same(table, torch.full_like(table, torch.nan), [row], "float32", "both")


@pytest.mark.parametrize("family", [*PACKED, *PLAIN])
def test_four_bits_are_for_the_decoder_alone(family):
    """Not for the vision tower, the projector and the head, in whatever family."""
    model, _ = tiny_model(family)
    inside = {id(module) for module in decoder(model).modules()}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert should_convert_module(name, [OUTSIDE_THE_DECODER]) == (id(module) in inside), (
                name
            )


def test_attention_by_cudnn_is_off_where_models_are_loaded(llava):
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_processor(llava)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    "config, reason",
    [
        (
            {"model_type": "mllama"},
            "mllama is not supported: its images are read by",
        ),
        ({"model_type": "paligemma"}, "paligemma is not supported: its prompt is read in both"),
        (
            {"model_type": "bunny", "auto_map": {"AutoConfig": "code.BunnyConfig"}},
            "it brings its own code; use the checkpoint for transformers",
        ),
    ],
)
def test_families_that_cannot_be_trained_are_refused_before_weights_are_read(
    tmp_path, config, reason
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("class BunnyConfig: pass\n")
    with pytest.raises(UserError, match=reason):
        load_processor(tmp_path)


def test_experts_are_adapted():
    """Their matrices are one parameter each, and most of the decoder."""
    text = {**TEXT, "model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 32}
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        text_config={**text, "num_experts_per_tok": 2},
        image_token_id=63,
        image_seq_length=1,
    )
    model = tf.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    image = torch.randn(1, 3, 28, 28)
    rows = tiny_rows(model, lambda: {"pixel_values": image})
    with torch.no_grad():
        reference = logp_table(model, copy.deepcopy(rows), 1)
    with pytest.raises(UserError, match="--lora-dropout 0.1: experts .* without it"):
        add_lora(model, 4, 8, dropout=0.1)
    policy = add_lora(model, 4, 8)
    adapters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    assert sum("experts" in name for name in adapters) == 2 * 2 * 2  # layers, matrices, A and B
    for name, p in adapters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    table = logp_table(policy, copy.deepcopy(rows), 1)
    need_same(table, logp_table(policy, rows, 1, packed=False), rows, "float32", "both ways")
    assert (table - reference).abs().nan_to_num().max() > 0.01
    table.nansum().backward()
    assert all(p.grad.abs().sum() > 0 for p in adapters.values())
    with torch.no_grad(), policy.disable_adapter():
        again = logp_table(policy, rows, 1)
    need_same(reference, again, rows, "float32", "the adapter off")
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad(), adapter_off(policy):
        same(logp_table(policy, rows, 1), again)  # as PEFT's way, to the bit
    with pytest.raises(ZeroDivisionError), adapter_off(policy):
        raise ZeroDivisionError
    same(logp_table(policy, rows, 1), table)  # and on again, even after an error
