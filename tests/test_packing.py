"""Packed rows against separate unpadded forwards: log-probs and adapter gradients, by family.

Controls, each of which must break the equality: a plain causal mask (branches see each other),
positions that run on through the branches, and the contrast image in the image's place.
"""
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

import symmpo
from families import PACKED, PLAIN, tiny_model, tiny_rows

TOLERANCE, GRAD_TOLERANCE = 2e-5, 2e-5  # nats; nats per unit of adapter weight


def with_adapter(family):
    model, image = tiny_model(family)
    prefix = next(n for n, m in model.named_modules() if m is symmpo.language_model(model))
    policy = get_peft_model(model.requires_grad_(False), LoraConfig(
        r=4, target_modules=rf"{prefix}\..*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)"))
    torch.manual_seed(1)
    for name, p in policy.named_parameters():
        if "lora_B" in name:  # not zero, so that the adapter matters
            torch.nn.init.normal_(p, std=0.05)
    return policy, tiny_rows(model, image, records=2)


def separate(model, rows):
    """The oracle: one unpadded sequence per response through the model's own forward."""
    sums = []
    for row in rows:
        for response in row["responses"]:
            inputs, n = dict(row["inputs"]), row["inputs"]["input_ids"].shape[1]
            for key, value in row["inputs"].items():
                more = {"input_ids": response, "attention_mask": torch.ones_like(response)}.get(
                    key, torch.zeros_like(response))
                if value.shape[:2] == (1, n):
                    inputs[key] = torch.cat([value, more[None].to(value.dtype)], dim=1)
            logits = model(**inputs).logits[0, n - 1:-1].float()
            sums.append(logits.log_softmax(-1).gather(1, response[:, None]).sum())
    return torch.stack(sums)


def values_and_grads(policy, sums):
    policy.zero_grad()
    weights = torch.linspace(-1, 1, len(sums))  # every response pulls with another weight
    (sums * weights).sum().backward()
    return sums.detach(), torch.cat([p.grad.flatten() for p in policy.parameters()
                                     if p.requires_grad])


def table_sums(policy, rows, **how):
    for row in rows:
        row.pop("features", None)
    table = symmpo.logp_table(policy, rows, 2, **how)
    return torch.stack([table[cell] for row in rows for cell in row["cells"]])


@pytest.mark.parametrize("family", PACKED + PLAIN)
def test_exact(family):
    policy, rows = with_adapter(family)
    expected, expected_grad = values_and_grads(policy, separate(policy, rows))
    assert expected_grad.abs().max() > 0.1
    ways = {"plain": dict(share_prefix=False)}
    if family in PACKED:
        ways |= {"one row at a time": {}, "all rows in one": dict(tokens_per_forward=10_000)}
    for way, how in ways.items():
        found, grad = values_and_grads(policy, table_sums(policy, rows, **how))
        assert (found - expected).abs().max() < TOLERANCE, way
        assert (grad - expected_grad).abs().max() < GRAD_TOLERANCE * expected_grad.abs().max(), way


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("control", ["mask", "positions", "image"])
def test_controls_bite(family, control, monkeypatch):
    policy, rows = with_adapter(family)
    expected = separate(policy, rows).detach()
    if control == "mask":
        monkeypatch.setattr(symmpo, "branch_mask", lambda *_: None)
    if control == "positions":
        decoder = symmpo.language_model(policy)
        decoder.register_forward_pre_hook(lambda module, args, kwargs: (args, {
            **kwargs, "position_ids": torch.arange(kwargs["position_ids"].shape[1])[None]}),
            with_kwargs=True)
    if control == "image":
        for row in rows:
            pixels = row["inputs"]["pixel_values"]
            row["inputs"] = {**row["inputs"], "pixel_values": torch.randn_like(pixels)}
    with torch.no_grad():
        found = table_sums(policy, rows)
    assert (found - expected).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("family", PLAIN)
def test_unpackable_families_really_differ(family):
    """Why train.py refuses to share the prefix for them."""
    policy, rows = with_adapter(family)
    with torch.no_grad():
        assert (table_sums(policy, rows) - separate(policy, rows)).abs().max() > 0.01


def test_cells_not_asked_for_are_not_computed():
    policy, rows = with_adapter("llava")
    with torch.no_grad():
        whole = symmpo.logp_table(policy, rows, 2)
        part = [{**rows[0], "responses": rows[0]["responses"][:1], "cells": rows[0]["cells"][:1]}]
        few = symmpo.logp_table(policy, part, 2)
    assert (~few.isnan()).sum() == 1 and few[0, 0, 0].item() == pytest.approx(
        whole[0, 0, 0].item(), abs=TOLERANCE)
    seen = []
    policy.get_base_model().lm_head.register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape[0]))
    symmpo.logp_table(policy, part, 2)
    assert seen == [len(rows[0]["responses"][0])]  # logits only where a response is predicted


def test_sums_not_means_and_fp32():
    policy, rows = with_adapter("llava")
    with torch.no_grad():
        tokens = symmpo.packed_logps(policy, rows[:1])
        table = symmpo.logp_table(policy, rows[:1], 1)
        assert table[0, 0, 0].item() == pytest.approx(tokens[0].sum().item())
        assert table[0, 0, 0].item() < 2 * tokens[0].mean().item()
        half = symmpo.logp_table(policy.to(torch.bfloat16), rows[:1], 1)
    assert half.dtype == torch.float32


def test_image_tokens_must_match_the_features():
    policy, rows = with_adapter("llava")
    ids = rows[0]["inputs"]["input_ids"]
    rows[0]["inputs"]["input_ids"] = ids[:, 3:]
    with pytest.raises(ValueError, match="image tokens"):
        symmpo.logp_table(policy, rows[:1], 1)
    assert math.isfinite(symmpo.logp_table(policy, rows[1:2], 1)[0, 1, 2].item())
