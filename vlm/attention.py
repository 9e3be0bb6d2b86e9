"""Attention over a packed sequence in segments, without a mask over all of it.

The mask of logprobs.py hides most of what a kernel computes: responses from each other, rows from
each other, the future. In segments it is not computed at all (numbers: order of the calls):

                 keys:   prefix  y_w  y_l  y'_w
    queries: prefix      1\\
             y_w         2 # #   2\\
             y_l         3 # #        3\\
             y'_w        4 # #             4\\

1 is causal attention of the prefix over itself. 2 is attention of y_w over [prefix | y_w], causal
in its last part, and so on. The same numbers to rounding (tests/test_packing.py).
"""

import functools
import math
from itertools import groupby

import torch


def segments_of(row_of, branch, like):
    """(slice of the prefix, slice of the queries, their mask or None) for each piece of a packed
    sequence; like: a tensor of the mask's dtype and device. row_of, branch: one number a token."""
    segments, start = [], 0
    for (_, k), tokens in groupby(zip(row_of, branch)):
        n = len(list(tokens))
        own = slice(start, start + n)
        start = own.stop
        if k == 0:
            prefix = own
            segments.append((slice(0, 0), own, None))  # nothing before it, plain causal
            continue
        length = prefix.stop - prefix.start
        hidden = like.new_full((n, length + n), -math.inf)
        mask = hidden.triu(length + 1)  # (n, length + n), 0 where a query may see a key
        segments.append((prefix, own, mask))
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
        for before, own, mask in segments:
            keys = torch.cat([key[:, :, before], key[:, :, own]], dim=2)
            values = torch.cat([value[:, :, before], value[:, :, own]], dim=2)
            part, _ = sdpa(module, query[:, :, own], keys, values, mask, **options)
            found.append(part)  # (1, queries, heads, width of a head)
        return torch.cat(found, dim=1), None

    AttentionInterface.register("sdpa", attend)
