"""Attention over a packed sequence in segments, without a mask over all of it.

The mask of logprobs.py hides much of what a kernel computes: rows from each other, the future, the
responses from the prefix. In segments a row takes two calls, whose keys stand side by side in the
sequence, so that nothing is copied for them (numbers: order of the calls):

                 keys:   prefix  y_w  y_l  y'_w
    queries: prefix      1\\
             y_w         2 # #   \\
             y_l         2 # #        \\
             y'_w        2 # #             \\

1 is causal attention of the prefix over itself, by the kernel that skips the future. 2 is attention
of all responses over the row, under a mask of its own. The same numbers to rounding
(tests/test_packing.py).
"""

import functools
import math

import torch


def branch_mask(row_of, branch, like):
    """(tokens, tokens) of like's dtype and device: 0 where a query may see a key, else -inf.

    row_of, branch: one number a token. Not a boolean mask: attention would make such a float copy
    of it in every layer, and keep it.
    """
    row_of, branch = torch.tensor([row_of, branch])
    # Row: the query, column: the key.
    place = torch.arange(len(branch))
    earlier = place <= place[:, None]
    same_row = row_of == row_of[:, None]
    own_response = branch == branch[:, None]
    in_the_prefix = branch == 0
    visible = earlier & same_row & (in_the_prefix | own_response)
    mask = torch.zeros(visible.shape, dtype=like.dtype)
    mask.masked_fill_(~visible, -math.inf)
    return mask.to(like.device, non_blocking=True)


def segments_of(row_of, branch, like):
    """(slice of the keys, slice of the queries, their mask or None) for each call."""
    segments = []
    start = 0
    for number in range(row_of[-1] + 1):
        row = slice(start, start + row_of.count(number))
        length = branch[row].count(0)
        prefix = slice(start, start + length)
        responses = slice(prefix.stop, row.stop)
        segments.append((prefix, prefix, None))  # None: causal
        if responses.start < row.stop:  # else all responses are a single token, which predicts none
            mask = branch_mask(row_of[row], branch[row], like)
            segments.append((row, responses, mask[length:]))  # (responses' tokens, tokens of row)
        start = row.stop
    return segments


@functools.cache
def allow_segments():
    """From here on transformers' SDPA attention takes `segments`, which the decoder hands on."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    def attend(module, query, key, value, attention_mask, segments=None, **options):
        if segments is None:
            return sdpa(module, query, key, value, attention_mask, **options)
        found = []
        for keys, own, mask in segments:
            of_keys = key[:, :, keys], value[:, :, keys]  # (1, heads, keys, width of a head) each
            part, _ = sdpa(module, query[:, :, own], *of_keys, mask, **options)
            found.append(part)  # (1, queries, heads, width of a head)
        return torch.cat(found, dim=1), None

    AttentionInterface.register("sdpa", attend)
