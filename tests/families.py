"""Tiny random models of the vision-language families, and rows for them (helpers of the tests)."""

import torch
import transformers as tf

from vlm.logprobs import Row

TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)  # wide weights: attention must matter for a control to bite
VISION = dict(
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=28,
    patch_size=14,
    initializer_range=0.2,
)
IMAGE = 63  # the image token in every one of these models
PACKED = ["llava", "llava_next", "llava_onevision", "idefics2", "idefics3", "smolvlm", "internvl"]
PACKED += ["mistral3", "ovis2"]
PLAIN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "gemma3", "gemma4", "lfm2_vl"]
PLAIN += ["aya_vision"]


def tiny_model(family, seed=0):
    """(model in fp32 and eval mode, the processor's tensors for one random image)."""
    torch.manual_seed(seed)
    config, image = _CONFIGS[family]()
    model = tf.AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa").eval()
    if family == "gemma3":  # its random initialisation leaves the image projection at zero
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
    return model, image


def _llava():
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
    )
    return config, lambda: {"pixel_values": torch.randn(1, 3, 28, 28)}


def _llava_next():
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28]],
    )
    return config, lambda: {
        "pixel_values": torch.randn(1, 3, 3, 28, 28),
        "image_sizes": torch.tensor([[25, 56]]),
    }


def _llava_onevision():
    text = {**TEXT, "layer_types": ["full_attention"] * 2}
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION),
        text_config=tf.Qwen2Config(**text),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28]],
    )
    return config, lambda: {
        "pixel_values": torch.randn(1, 3, 3, 28, 28),
        "image_sizes": torch.tensor([[25, 56]]),
    }


def _idefics3(kind="Idefics3"):
    config = getattr(tf, kind + "Config")(
        vision_config={**VISION, "model_type": kind.lower() + "_vision"},
        text_config={**TEXT, "model_type": "llama"},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return config, lambda: {
        "pixel_values": torch.randn(1, 2, 3, 28, 28),
        "pixel_attention_mask": torch.ones(1, 2, 28, 28, dtype=torch.bool),
    }


def _internvl():
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        image_seq_length=1,
    )
    return config, lambda: {"pixel_values": torch.randn(1, 3, 28, 28)}


def _qwen(kind):
    vision = dict(
        depth=2,
        hidden_size=32,
        num_heads=4,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    vision |= (
        dict(embed_dim=32)
        if kind == "Qwen2VL"
        else dict(
            out_hidden_size=32, intermediate_size=48, window_size=56, fullatt_block_indexes=[1]
        )
    )
    text = {
        **TEXT,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 10000.0,
        },
    }
    config = getattr(tf, kind + "Config")(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=62,
        vision_start_token_id=61,
        vision_end_token_id=60,
    )
    return config, lambda: {
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _gemma3():
    text = {
        **TEXT,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**VISION),
        text_config=tf.Gemma3TextConfig(**text),
        image_token_id=IMAGE,
        boi_token_index=61,
        eoi_token_index=60,
        mm_tokens_per_image=4,
    )
    return config, lambda: {"pixel_values": torch.randn(1, 3, 28, 28)}


def _newer_qwen(kind, **text):
    vision = dict(
        depth=2,
        hidden_size=32,
        num_heads=4,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        intermediate_size=48,
        out_hidden_size=32,
    )
    if kind == "Glm4v":
        vision["image_size"] = 56
        ids = dict(image_start_token_id=61, image_end_token_id=60)
    else:
        vision |= dict(num_position_embeddings=16)
        ids = dict(vision_start_token_id=61, vision_end_token_id=60)
    if kind == "Qwen3VL":
        vision["deepstack_visual_indexes"] = [1]
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    if kind == "Glm4v":
        rope["partial_rotary_factor"] = 1.0
    config = getattr(tf, kind + "Config")(
        vision_config=vision,
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope, **text},
        image_token_id=IMAGE,
        video_token_id=62,
        **ids,
    )
    return config, lambda: {
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }


def _qwen3_5():
    heads = dict(linear_num_value_heads=4, linear_num_key_heads=2)
    heads |= dict(linear_key_head_dim=8, linear_value_head_dim=8)
    return _newer_qwen("Qwen3_5", layer_types=["linear_attention", "full_attention"], **heads)


def _mistral3():
    config = tf.Mistral3Config(
        vision_config={**VISION, "model_type": "pixtral", "image_size": 56, "head_dim": 6},
        text_config={**TEXT, "model_type": "mistral", "head_dim": 8},
        image_token_index=IMAGE,
    )
    return config, lambda: {
        "pixel_values": torch.randn(1, 3, 56, 56),
        "image_sizes": torch.tensor([[56, 56]]),
    }


def _idefics2():
    perceiver = dict(resampler_n_latents=4, resampler_depth=1, resampler_n_heads=4)
    perceiver |= dict(resampler_head_dim=8, num_key_value_heads=2, hidden_size=32)
    config = tf.Idefics2Config(
        vision_config=VISION,
        perceiver_config=perceiver,
        text_config={**TEXT, "model_type": "mistral"},
        image_token_id=IMAGE,
    )
    return config, lambda: {
        "pixel_values": torch.randn(1, 1, 3, 28, 28),
        "pixel_attention_mask": torch.ones(1, 1, 28, 28, dtype=torch.bool),
    }


def _aya_vision():
    text = {**TEXT, "model_type": "cohere2", "head_dim": 8, "sliding_window": 8}
    config = tf.AyaVisionConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        text_config={**text, "tie_word_embeddings": True},
        image_token_index=IMAGE,
    )
    return config, lambda: {"pixel_values": torch.randn(1, 3, 28, 28)}


def _ovis2():
    vision = {**VISION, "image_size": 56, "vocab_size": 40, "hidden_stride": 2}
    config = tf.Ovis2Config(
        vision_config={**vision, "num_visual_indicator_tokens": 5},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[55, 56, 57, 58, 59],
        vocab_size=64,
        hidden_size=32,
    )
    return config, lambda: {"pixel_values": torch.randn(1, 3, 56, 56)}


def _lfm2_vl():
    vision = {name: VISION[name] for name in VISION if name != "image_size"}
    config = tf.Lfm2VlConfig(
        vision_config={**vision, "model_type": "siglip2_vision_model", "num_patches": 16},
        text_config={**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        image_token_id=IMAGE,
        projector_hidden_size=32,
    )
    return config, lambda: {
        "pixel_values": torch.randn(1, 16, 3 * 14 * 14),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.int32),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


def _gemma4():
    vision = {**VISION, "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4}
    vision |= dict(pooling_kernel_size=2, default_output_length=4, position_embedding_size=64)
    text = {**TEXT, "head_dim": 8, "global_head_dim": 8, "sliding_window": 8}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    config = tf.Gemma4Config(
        vision_config=vision,
        text_config={**text, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64},
        image_token_id=IMAGE,
        boi_token_id=61,
        eoi_token_id=60,
        video_token_id=62,
        audio_token_id=58,
    )
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)[None]
    return config, lambda: {
        "pixel_values": torch.rand(1, 16, 3 * 4 * 4),
        "image_position_ids": places,
    }


_CONFIGS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "idefics3": _idefics3,
    "smolvlm": lambda: _idefics3("SmolVLM"),
    "internvl": _internvl,
    "qwen2_vl": lambda: _qwen("Qwen2VL"),
    "qwen2_5_vl": lambda: _qwen("Qwen2_5_VL"),
    "qwen3_vl": lambda: _newer_qwen("Qwen3VL"),
    "qwen3_5": _qwen3_5,
    "glm4v": lambda: _newer_qwen("Glm4v"),
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "mistral3": _mistral3,
    "idefics2": _idefics2,
    "aya_vision": _aya_vision,
    "ovis2": _ovis2,
    "lfm2_vl": _lfm2_vl,
}


def tiny_rows(model, image, lengths=((5, 9, 3), (7, 4)), records=1, seed=0):
    """SymMPO-shaped rows: per record one for m with three responses, one for m' with two."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(records):
        for i, (cells, sizes) in enumerate(zip(((0, 1, 2), (2, 0)), lengths)):
            picture = image()
            found = model.get_image_features(**picture, return_dict=True).pooler_output
            n = sum(f.flatten(0, -2).shape[0] for f in found)
            text = torch.randint(3, 50, (6 + number + i,), generator=generator)
            ids = torch.cat(
                [torch.tensor([1, 61]), torch.full((n,), IMAGE), torch.tensor([60]), text]
            )[None]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture}
            kind = model.config.model_type
            if kind == "gemma3":
                inputs["token_type_ids"] = (ids == IMAGE).long()
            if kind.startswith(("qwen", "glm4v")):
                inputs["mm_token_type_ids"] = (ids == IMAGE).long()
            responses = [
                torch.cat(
                    [
                        torch.randint(3, 50, (size + number - 1,), generator=generator),
                        torch.tensor([2]),
                    ]
                )
                for size in sizes
            ]
            rows.append(Row(inputs, responses, [(i, y) for y in cells], record=number))
    return rows
