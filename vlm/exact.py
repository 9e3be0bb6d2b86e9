"""When two ways to compute log-probabilities are the same: what is refused before a run."""

import math

from support.cli import UserError
from vlm.logprobs import base_model

PACKABLE = (
    "llava llava_next llava_onevision idefics2 idefics3 smolvlm internvl mistral3 ovis2".split()
)
NOISE = {"float32": 1e-3, "bfloat16": 0.2}  # nats by which one token may be off, generously


def need_packable(model, longest):
    """Refuse a model for which sharing the prefix is not exact, in sequences of up to `longest`
    tokens. What no configuration tells is found by train.py, which compares both ways at the start.
    """
    reason = not_packable(model, longest)
    if reason:
        raise UserError(
            f"{model.name_or_path}: sharing the prefix is not exact for {reason}; add "
            "--no-share-prefix"
        )


def not_packable(model, longest=math.inf):
    """Why sharing the prefix is not exact in sequences of up to `longest` tokens, or None."""
    config = base_model(model).config
    text, reason = config.get_text_config(), None
    layers = set(getattr(text, "layer_types", None) or ["sliding_attention"])
    window = getattr(text, "sliding_window", None) or longest
    if "sliding_attention" in layers and window < longest:
        reason = f"attention that sees the last {window} tokens alone (--max-length {longest})"
    if not layers <= {"full_attention", "sliding_attention"}:
        reason = f"layers of {', '.join(sorted(layers - {'full_attention'}))}"
    if config.model_type not in PACKABLE:
        reason = f"{config.model_type} models"
    return reason


def need_same(one, other, rows, dtype, what):
    """The largest difference between two tables of one record, nats; refuses one that rounding does
    not explain, and NaN.

    In another batch, or on another card, bf16 moves the log-prob of a token by some 0.04 nats
    (github.com/ServiceNow/Fast-LLM, 525), and that of n tokens by some sqrt(n) times as much.
    """
    largest = 0.0
    for row in rows:
        for cell, response in zip(row.cells, row.responses):
            off = (one[cell] - other[cell]).abs().item()
            if not off <= NOISE[dtype] * len(response) ** 0.5:
                raise UserError(
                    f"{row.source}: {what} differ by {off:.3g} nats, and they should be the same: "
                    "dropout, another dtype, another template or another model does this"
                )
            largest = max(largest, off)
    return largest
