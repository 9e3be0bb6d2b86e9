"""log pi(y | m, x) for every response of a record: the simple way, and the same numbers for a third
of the work.

A `Row` is one image with its prompt, and the responses asked of it. For a SymMPO record:

    row of m     [ image m,  prompt ]  ->  y_w   y_l   y'_w
    row of m'    [ image m', prompt ]  ->  y'_w  y_w

`plain_logps` runs each response as a sequence of its own, behind its own copy of the prefix (576
image tokens, for LLaVA). `packed_logps` runs the prefix once and puts all responses behind it:

    position ids    0 1 2 3 | 4 5 6 | 4 5 | 4 5 6
    tokens          prefix  | y_w   | y_l | y'_w            every response starts at position 4
    branch          0 0 0 0 | 1 1 1 | 2 2 | 3 3 3

    who sees whom   prefix  y_w  y_l  y'_w                  (row: query, column: key; \\ is causal)
        prefix        \\
        y_w           #       \\
        y_l           #            \\
        y'_w          #                  \\

It is computed in segments (attention.py), or with the picture as a mask: the tests' oracle. Exact
for models with plain causal attention and one position per token (see exact.py).
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence

from support.cli import UserError
from vlm.attention import allow_segments, branch_mask, segments_of

CHUNK = 128  # positions whose logits exist at the same time
PIXELS_ALONE = {"input_ids", "attention_mask", "pixel_values"}  # inputs of which images are a batch


@dataclass
class Row:
    inputs: dict  # the processor's tensors for image and prompt, batch dimension 1
    responses: list  # of LongTensors, end token included
    cells: list  # for each response its (image, response) cell in the table
    record: int = 0  # which record of the micro-batch, the last dimension of the table
    source: str = ""  # "prefs.jsonl:7", for messages
    features: torch.Tensor | None = None  # of the image, where they are computed already

    def prefix(self):
        """(tokens,) of image and prompt."""
        return self.inputs["input_ids"][0]

    def longest(self):
        """Tokens of its longest plain sequence."""
        return len(self.prefix()) + max(len(y) for y in self.responses)

    def tokens(self):
        """Tokens that it takes packed."""
        return len(self.prefix()) + sum(len(y) for y in self.responses)


def logp_table(model, rows, records, packed=True, tokens_per_forward=0):
    """(3, 3, records) fp32 log-probabilities in nats; NaN in the cells that no row asks for.

    packed: rows go into one forward pass while they fit into tokens_per_forward; with 0 each row
    has its own.
    """
    device = base_model(model).device
    table = torch.full((3, 3, records), math.nan, device=device)
    for group in groups_of(rows, tokens_per_forward):
        logps = packed_logps(model, group) if packed else plain_logps(model, group)
        sums = torch.stack([logp.sum() for logp in logps])
        cells = []
        for row in group:
            cells += [(*cell, row.record) for cell in row.cells]
        places = on_device(cells, device).T  # of image, response, record
        table = table.index_put(tuple(places), sums)
    return table


def response_lengths(rows, records):
    """(3, records) tokens of each response, end token included; NaN where no row has it."""
    lengths = torch.full((3, records), math.nan)
    for row in rows:
        for (_, response), tokens in zip(row.cells, row.responses):
            lengths[response, row.record] = len(tokens)
    return lengths


def groups_of(rows, tokens_per_forward):
    """Consecutive rows, as many at a time as fit."""
    group, size = [], 0
    for row in rows:
        tokens = row.tokens()
        if group and size + tokens > tokens_per_forward:
            yield group
            group, size = [], 0
        group.append(row)
        size += tokens
    yield group


# --- the simple way ------------------------------------------------------------------------------


def plain_logps(model, rows):
    """Per-token log-probs (fp32) of every response, from a right-padded batch for each row.

    The tests' oracle, and the way of the families that cannot be packed.
    """
    device = base_model(model).device
    logps = []
    for row in rows:
        n = len(row.responses)
        responses = pad_sequence(row.responses, batch_first=True)  # (n, longest)
        real = pad_sequence([torch.ones_like(y) for y in row.responses], batch_first=True)

        inputs = {}
        for name, tensor in row.inputs.items():
            inputs[name] = torch.cat([tensor] * n)  # once for each response
        behind_the_prompt = {
            "input_ids": responses,
            "attention_mask": real,
            "token_type_ids": torch.zeros_like(responses),  # Gemma 3: 0 is text
            "mm_token_type_ids": torch.zeros_like(responses),  # Qwen2-VL: 0 is text
        }
        for name, tensor in inputs.items():
            if name in behind_the_prompt:
                tensor = torch.cat([tensor, behind_the_prompt[name]], dim=1)
            inputs[name] = tensor.to(device)

        # Position t predicts token t + 1: the logits of the prompt's last token and all behind it.
        keep = responses.shape[1] + 1
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits
        all_logps = logits.float().log_softmax(-1)[:, -keep:-1]
        targets = responses.to(device)
        picked = all_logps.gather(2, targets[:, :, None])  # (n, longest, 1)
        for k, response in enumerate(row.responses):
            logps.append(picked[k, : len(response), 0])
    return logps


# --- packed --------------------------------------------------------------------------------------


def packed_logps(model, rows, masked=False):
    """The same numbers from one sequence that holds all rows, each prefix once (picture above)."""
    ids, position = [], []  # one entry for each token of the sequence
    row_of, branch = [], []  # the same
    predicting, targets = [], []  # the places that predict a response token, and these tokens
    lengths = []  # of the responses

    def append(tokens, first_position, number, k):
        ids.extend(tokens)
        position.extend(range(first_position, first_position + len(tokens)))
        row_of.extend([number] * len(tokens))
        branch.extend([k] * len(tokens))

    for number, row in enumerate(rows):
        prefix = row.prefix().tolist()
        append(prefix, 0, number, 0)
        end_of_prefix = len(ids) - 1
        for k, response in enumerate(row.responses, start=1):
            start = len(ids)
            response = response.tolist()
            append(response[:-1], len(prefix), number, k)  # the last token predicts nothing
            predicting += [end_of_prefix, *range(start, len(ids))]
            targets += response
            lengths.append(len(response))

    base = base_model(model)
    ids, position = on_device([ids, position], base.device)  # (tokens,) each
    read = on_device(sorted(set(predicting)), base.device)  # a prefix's end predicts several tokens
    predicting, targets = on_device([predicting, targets], base.device)  # (response tokens,) each
    embeds = embed(model, rows, ids)  # (1, tokens, width)
    inputs = {"inputs_embeds": embeds, "position_ids": position[None], "use_cache": False}
    if masked:
        inputs["attention_mask"] = branch_mask(row_of, branch, embeds)[None, None]
    else:
        allow_segments()
        inputs["segments"] = segments_of(row_of, branch, embeds)
        inputs["read"] = read  # by a layer that need not compute more (savings.py)
        inputs["attention_mask"] = embeds.new_zeros(1, 1, 1, 1)  # given: none is made, nor used
    hidden = decoder(model)(**inputs).last_hidden_state[0]  # (tokens, width)
    head = base.get_output_embeddings()
    logps = TokenLogProbs.apply(hidden[predicting], targets, head)
    return logps.split(lengths)


def on_device(numbers, device):
    """A tensor of numbers there. A GPU goes on with what it does; only a copy that blocks would
    wait for it."""
    return torch.tensor(numbers).to(device, non_blocking=True)


class TokenLogProbs(torch.autograd.Function):
    """log p(target) from hidden states (T, width), without keeping (T, vocabulary) logits.

    Autograd would keep the logits for the backward pass: 32,000 floats a token. But their gradient
    is short, and can be taken while a chunk's logits are there. With logits = W h, W the frozen
    head,
        log p(y) = (W h)[y] - logsumexp(W h)     d log p(y) / dh = W[y] - softmax(W h) W
    which is `width` floats a token.
    """

    @staticmethod
    def forward(ctx, hidden, targets, head):
        logps, gradients = [], []
        hidden = hidden.detach()  # hooks on the head must not look for a graph: there is none here
        for h, y in zip(hidden.split(CHUNK), targets.split(CHUNK)):
            logp = logits_of(head, h).log_softmax(-1)  # (chunk, vocabulary)
            logps.append(logp.gather(1, y[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                p = logp.exp().to(h.dtype)
                gradients.append(head.weight[y] - p @ head.weight)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad_logps):
        (gradients,) = ctx.saved_tensors
        grad_hidden = grad_logps[:, None].to(gradients.dtype) * gradients
        return grad_hidden, None, None


def logits_of(head, hidden):
    """In fp32: bf16 would round logits of 16 to 32 to eighths. On CUDA the product is fp32 at no
    cost, elsewhere what the head gives is converted."""
    if hidden.is_cuda and hidden.dtype == head.weight.dtype:
        logits = torch.mm(hidden, head.weight.T, out_dtype=torch.float32)
        return logits if head.bias is None else logits + head.bias
    return head(hidden).float()


# --- images, and the parts of a model ------------------------------------------------------------


def embed(model, rows, ids):
    """Token embeddings (1, tokens, width), with the image features in place of image tokens."""
    base = base_model(model)
    embeds = base.get_input_embeddings()(ids)  # (tokens, width)
    add_image_features(model, rows)
    features = [row.features for row in rows if row.features is not None]
    if features:
        is_image = (ids == base.config.image_token_id)[:, None]
        features = torch.cat(features).to(embeds.dtype)  # (image tokens, width)
        embeds = embeds.masked_scatter(is_image, features)
    return embeds[None]


def add_image_features(model, rows):
    """Compute what is missing of `row.features`. The vision tower is frozen, so whoever calls this
    on rows before asking for several tables runs it once for all of them."""
    rows = [row for row in rows if row.features is None and "pixel_values" in row.inputs]
    shapes = {row.inputs["pixel_values"].shape for row in rows}
    batches = [[row] for row in rows]
    if len(shapes) == 1 and rows[0].inputs.keys() == PIXELS_ALONE:
        batches = [rows]
    image_token = base_model(model).config.image_token_id
    for batch in batches:
        features = image_features(model, batch)  # (image tokens of all rows, width)
        for row, found in zip(batch, features.chunk(len(batch))):
            wanted = row.prefix().tolist().count(image_token)
            if wanted != len(found):
                raise UserError(
                    f"{row.source}: {wanted} image tokens in the prompt, {len(found)} features "
                    "from the vision tower: processor and model do not fit (patch_size, "
                    "num_additional_image_tokens, vision_feature_select_strategy)"
                )
            row.features = found


@torch.no_grad()
def image_features(model, rows):
    """(image tokens of all rows, width) from the frozen vision tower."""
    from transformers import BatchFeature

    base, images = base_model(model), BatchFeature()
    for name in rows[0].inputs.keys() - {"input_ids", "attention_mask"}:
        images[name] = torch.cat([row.inputs[name] for row in rows])
    images.to(base.device, base.dtype, non_blocking=True)  # the dtype for pixels, not for numbers
    found = base.get_image_features(**images, return_dict=True).pooler_output
    return torch.cat([image.flatten(0, -2) for image in found])


def base_model(model):
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder(model):
    """The language model inside a vision-language model."""
    return base_model(model).get_decoder()
