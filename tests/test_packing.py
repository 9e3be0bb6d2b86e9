"""Packed rows against separate unpadded forwards: log-probs and adapter gradients, by family.

Controls, each of which must break the equality: a plain causal mask (branches see each other),
positions that run on through the branches, and the contrast image in the image's place.
"""

import dataclasses
import functools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from families import PACKED, PLAIN, tiny_model, tiny_rows
from support.cli import UserError
from symmpo import MP, NONE, WP, L, M, W
from vlm import logprobs
from vlm.logprobs import (
    Row,
    add_image_features,
    decoder,
    groups_of,
    logp_table,
    packed_logps,
    response_lengths,
)
from vlm.savings import gated_mlp, save_work

TOLERANCE, GRAD_TOLERANCE = 2e-5, 2e-5  # nats; nats per unit of adapter weight


def with_adapter(family, savings=True):
    model, image = tiny_model(family)
    prefix = next(n for n, m in model.named_modules() if m is decoder(model))
    policy = get_peft_model(
        model.requires_grad_(False),
        LoraConfig(
            r=4, target_modules=rf"{prefix}\..*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)"
        ),
    )
    torch.manual_seed(1)
    for name, p in policy.named_parameters():
        if "lora_B" in name:  # not zero, so that the adapter matters
            torch.nn.init.normal_(p, std=0.05)
    if savings:
        save_work(decoder(policy).layers)
    return policy, tiny_rows(model, image, records=2)


def separate(model, rows):
    """The oracle: one unpadded sequence per response through the model's own forward."""
    sums = []
    for row in rows:
        for response in row.responses:
            inputs, n = dict(row.inputs), row.inputs["input_ids"].shape[1]
            for key, value in row.inputs.items():
                more = {"input_ids": response, "attention_mask": torch.ones_like(response)}.get(
                    key, torch.zeros_like(response)
                )
                if value.shape[:2] == (1, n):
                    inputs[key] = torch.cat([value, more[None].to(value.dtype)], dim=1)
            logits = model(**inputs).logits[0, n - 1 : -1].float()
            sums.append(logits.log_softmax(-1).gather(1, response[:, None]).sum())
    return torch.stack(sums)


def values_and_grads(policy, sums):
    policy.zero_grad()
    weights = torch.linspace(-1, 1, len(sums))  # every response pulls with another weight
    (sums * weights).sum().backward()
    return sums.detach(), torch.cat(
        [p.grad.flatten() for p in policy.parameters() if p.requires_grad]
    )


def table_sums(policy, rows, **how):
    fresh = [dataclasses.replace(row, features=None) for row in rows]
    table = logp_table(policy, fresh, 2, **how)
    cells = [(*cell, row.record) for row in rows for cell in row.cells]
    return torch.stack([table[cell] for cell in cells])


@pytest.mark.parametrize("family", PACKED + PLAIN)
def test_exact(family):
    policy, rows = with_adapter(family)
    expected, expected_grad = values_and_grads(policy, separate(policy, rows))
    assert expected_grad.abs().max() > 0.1
    ways = {"plain": dict(packed=False)}
    if family in PACKED:
        ways |= {"one row at a time": {}, "all rows in one": dict(tokens_per_forward=10_000)}
    for way, how in ways.items():
        found, grad = values_and_grads(policy, table_sums(policy, rows, **how))
        assert (found - expected).abs().max() < TOLERANCE, way
        assert (grad - expected_grad).abs().max() < GRAD_TOLERANCE * expected_grad.abs().max(), way


def all_in_one(row_of, branch, like):
    """A segment in which every token sees all before it."""
    whole = slice(0, len(branch))
    return [(whole, whole, None)]


@pytest.mark.parametrize("family", ["llava", "internvl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_segments_attend_as_the_mask_says(family, checkpointing):
    policy, rows = with_adapter(family)
    if checkpointing:
        policy.train().gradient_checkpointing_enable({"use_reentrant": False})

    def sums(masked):
        fresh = [dataclasses.replace(row, features=None) for row in rows]
        return torch.stack([logp.sum() for logp in packed_logps(policy, fresh, masked)])

    expected, expected_grad = values_and_grads(policy, sums(masked=True))
    found, grad = values_and_grads(policy, sums(masked=False))
    assert (found - expected).abs().max() < TOLERANCE
    assert (grad - expected_grad).abs().max() < GRAD_TOLERANCE * expected_grad.abs().max()


@pytest.mark.parametrize("family", ["llava", "internvl", "smolvlm", "mistral3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_savings_change_nothing_but_the_work(family, checkpointing):
    """With rows of different lengths: the backward pass starts when another row was the last."""
    policy, rows = with_adapter(family, savings=False)
    expected, expected_grad = values_and_grads(policy, table_sums(policy, rows))
    layers = decoder(policy).layers
    save_work(layers)
    if checkpointing:
        policy.train().gradient_checkpointing_enable({"use_reentrant": False})
    seen = {0: [], len(layers) - 1: []}
    for number, tokens in seen.items():
        gate = layers[number].mlp.gate_proj
        gate.register_forward_hook(lambda m, args, out, tokens=tokens: tokens.append(out.shape[1]))
    found, grad = values_and_grads(policy, table_sums(policy, rows))
    assert (found - expected).abs().max() < TOLERANCE
    assert (grad - expected_grad).abs().max() < GRAD_TOLERANCE * expected_grad.abs().max()
    forward = [row.tokens() - len(row.responses) for row in rows]
    read = [row.tokens() - len(row.prefix()) - len(row.responses) + 1 for row in rows]
    again = [size[::-1] if checkpointing else [] for size in (forward, read)]
    assert seen[0] == forward + again[0]
    assert seen[len(layers) - 1] == read + again[1]
    # Without `read`, as in sequences of their own, the last layer computes all.
    plain, _ = values_and_grads(policy, table_sums(policy, rows, packed=False))
    assert (plain - expected).abs().max() < TOLERANCE


def test_the_gate_is_not_kept():
    """Bytes that autograd keeps for the backward pass: less by act(gate) of every layer."""
    policy, rows = with_adapter("llava", savings=False)

    def kept():
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
            return tensor

        held = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sums = table_sums(policy, rows[:1])
        assert sums.requires_grad
        return sum(sizes.values())

    before = kept()
    layers = decoder(policy).layers
    for layer in layers:
        layer.mlp.forward = functools.partial(gated_mlp, layer.mlp)
    width = layers[0].mlp.gate_proj.weight.shape[0]
    tokens = rows[0].tokens() - len(rows[0].responses)
    assert before - kept() >= 4 * width * tokens * len(layers)


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("control", ["mask", "positions", "image"])
def test_controls_bite(family, control, monkeypatch):
    policy, rows = with_adapter(family)
    expected = separate(policy, rows).detach()
    if control == "mask":
        monkeypatch.setattr(logprobs, "segments_of", all_in_one)
    if control == "positions":
        decoder(policy).register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {**kwargs, "position_ids": torch.arange(kwargs["position_ids"].shape[1])[None]},
            ),
            with_kwargs=True,
        )
    if control == "image":
        for row in rows:
            pixels = row.inputs["pixel_values"]
            row.inputs = {**row.inputs, "pixel_values": torch.randn_like(pixels)}
    with torch.no_grad():
        found = table_sums(policy, rows)
    assert (found - expected).abs().max() > 500 * TOLERANCE


@pytest.mark.parametrize("family", PLAIN)
def test_unpackable_families_really_differ(family):
    """Why train.py refuses to share the prefix for them."""
    policy, rows = with_adapter(family)
    with torch.no_grad():
        assert (table_sums(policy, rows) - separate(policy, rows)).abs().max() > 0.01


def test_cells_not_asked_for_are_not_computed():
    policy, rows = with_adapter("llava")
    with torch.no_grad():
        whole = logp_table(policy, rows, 2)
        few_cells = {"responses": rows[0].responses[:1], "cells": rows[0].cells[:1]}
        part = [dataclasses.replace(rows[0], **few_cells)]
        few = logp_table(policy, part, 2)
    assert whole.shape == (3, 3, 2) and (~few.isnan()).sum() == 1
    assert few[M, W, 0].item() == pytest.approx(whole[M, W, 0].item(), abs=TOLERANCE)
    seen = []
    policy.get_base_model().lm_head.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape[0])
    )
    logp_table(policy, part, 2)
    assert seen == [len(rows[0].responses[0])]  # logits only where a response is predicted


def test_sums_not_means_and_fp32():
    policy, rows = with_adapter("llava")
    with torch.no_grad():
        tokens = packed_logps(policy, rows[:1])
        table = logp_table(policy, rows[:1], 1)
        assert table[M, W, 0].item() == pytest.approx(tokens[0].sum().item())
        assert table[M, W, 0].item() < 2 * tokens[0].mean().item()
        half = logp_table(policy.to(torch.bfloat16), rows[:1], 1)
    assert half.dtype == torch.float32


def test_image_tokens_must_match_the_features():
    policy, rows = with_adapter("llava")
    rows[0].inputs["input_ids"] = rows[0].inputs["input_ids"][:, 3:]
    with pytest.raises(UserError, match="image tokens"):
        logp_table(policy, rows[:1], 1)
    assert math.isfinite(logp_table(policy, rows[1:2], 1)[MP, WP, 0].item())


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_a_prompt_without_an_image_has_a_cell_of_its_own(family):
    """The third image of the table is none: a row of text alone, packed or plain."""
    policy, rows = with_adapter(family)
    image_token = policy.get_base_model().config.image_token_id
    ids = rows[0].inputs["input_ids"]
    text = ids[ids != image_token][None]
    inputs = {name: torch.ones_like(text) for name in rows[0].inputs if name == "attention_mask"}
    if "token_type_ids" in rows[0].inputs:
        inputs["token_type_ids"] = torch.zeros_like(text)
    cells = [(NONE, response) for _, response in rows[0].cells]
    row = dataclasses.replace(rows[0], inputs={"input_ids": text, **inputs}, cells=cells)
    packed = family == "llava"
    with torch.no_grad():
        expected = separate(policy, [row])
        table = logp_table(policy, [row], 1, packed=packed)
        with_image = logp_table(policy, rows[:1], 1, packed=packed)
    assert table[:NONE].isnan().all()
    assert (table[NONE, :, 0] - expected).abs().max() < TOLERANCE
    assert (table[NONE] - with_image[M]).abs().max() > 0.01


def test_lengths_are_those_of_the_responses():
    policy, rows = with_adapter("llava")
    under_m = rows[::2]  # of both records
    assert response_lengths(under_m, 2).tolist() == [[5, 6], [9, 10], [3, 4]]
    assert response_lengths(rows[1:2], 2)[L].isnan().all()


def row_of_lengths(prefix, *responses):
    inputs = {"input_ids": torch.zeros(1, prefix, dtype=torch.long)}
    responses = [torch.zeros(n, dtype=torch.long) for n in responses]
    return Row(inputs, responses, cells=[])


def test_rows_share_a_forward_pass_while_their_tokens_fit():
    """On CUDA two SymMPO records of LLaVA-1.5, on a CPU each of their rows and whole records of the
    tiny world."""
    full = [row_of_lengths(636, 100, 100, 100), row_of_lengths(636, 100, 100)]  # image, prompt: 636
    small = [row_of_lengths(40, 8, 8, 8), row_of_lengths(40, 8, 8)]

    def sizes(rows, tokens_per_forward):
        return [len(group) for group in groups_of(rows, tokens_per_forward)]

    assert sizes(2 * full, 4096) == [4]
    assert sizes(3 * full, 4096) == [4, 2]
    assert sizes(2 * full, 512) == [1, 1, 1, 1]
    assert sizes(4 * small, 512) == [8]
    assert sizes(4 * full, 0) == [1] * 8


@pytest.mark.parametrize("family", PACKED)
def test_images_of_one_shape_are_one_batch(family):
    """Where the pixels are all that the tower reads; the same features as one by one."""
    model, image = tiny_model(family)
    rows = tiny_rows(model, image, records=2)
    apart = [dataclasses.replace(row) for row in rows]
    for row in apart:
        add_image_features(model, [row])
    batches = []
    real = model.get_image_features

    def counting(pixel_values, **more):
        batches.append(len(pixel_values))
        return real(pixel_values=pixel_values, **more)

    model.get_image_features = counting
    add_image_features(model, rows)
    pixels_alone = rows[0].inputs.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert pixels_alone == (family in ("llava", "internvl", "ovis2"))
    assert batches == ([4] if pixels_alone else [1, 1, 1, 1])
    for one, other in zip(rows, apart):
        torch.testing.assert_close(one.features, other.features, rtol=0, atol=1e-5)
    assert (rows[0].features - rows[1].features).abs().max() > 0.01
