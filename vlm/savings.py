"""What a training step need not compute, and what it need not keep. Neither changes a result
(tests/test_packing.py).

1. Of the last decoder layer's outputs, those are read that predict a response token. For all other
tokens, image and prompt above all, only keys and values are needed: the layer's queries, its output
projection and its MLP, 83% of a LLaMA layer's products, are computed for the tokens that are read.

2. Behind down(act(gate) * up) autograd keeps gate, act(gate), up and the product, each of them the
MLP's width for each token. Here act(gate) is computed again in the backward pass, and not kept.
"""

import functools

import torch
from torch.utils.checkpoint import checkpoint

TOKEN_BY_TOKEN = ("q_proj", "o_proj", "dense", "mlp")  # names of what looks at no other token


def save_work(layers):
    """Both, in a decoder's layers that are built as a LLaMA's are; others stay as they are."""
    if hasattr(layers[-1], "self_attn"):
        LastLayer(layers[-1])
    for layer in layers:
        mlp = getattr(layer, "mlp", None)
        if hasattr(mlp, "gate_proj") and hasattr(mlp, "act_fn"):
            mlp.forward = functools.partial(gated_mlp, mlp)


class LastLayer:
    """Hooks that compute the tokens in `read`, an argument of the decoder (tokens,), and give 0 for
    the others. Without it they do nothing."""

    def __init__(self, layer):
        # Noted at the attention, not at the layer: hooks of the layer itself are not called when
        # gradient checkpointing computes it again, when another row was the last to be noted.
        layer.self_attn.register_forward_pre_hook(self.note, with_kwargs=True)
        for name, part in layer.named_modules():
            if name.split(".")[-1] in TOKEN_BY_TOKEN:
                part.register_forward_pre_hook(self.shorten)
                part.register_forward_hook(self.lengthen)

    def note(self, attention, args, kwargs):
        self.read = kwargs.get("read")

    def shorten(self, part, args):
        hidden = args[0]
        self.tokens = hidden.shape[1]
        return hidden if self.read is None else hidden[:, self.read]

    def lengthen(self, part, args, found):
        if self.read is None:
            return found
        everywhere = found.new_zeros(1, self.tokens, found.shape[2])
        return everywhere.index_copy(1, self.read, found)


def gated_mlp(mlp, hidden):
    """A LLaMA's MLP, with less to keep."""

    def product(gate, up):
        return mlp.act_fn(gate) * up

    gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    if torch.is_grad_enabled():
        inner = checkpoint(product, gate, up, use_reentrant=False, preserve_rng_state=False)
    else:
        inner = product(gate, up)
    return mlp.down_proj(inner)
