"""SymMPO and its baselines: every loss term, and the log-probabilities they are made of.

How this file departs from the paper and from the code published with it:
- Margin uses plain log-ratio differences (no beta), as the slides and the published code do.
- Log-probabilities are fp32 sums over the response tokens, the end token included; never means.
- mDPO's contrast image is drawn once per record (data.py), not again in every forward pass.
- A record's sequences share their image-and-prompt prefix (`packed_logps`): the same numbers as
  separate sequences to rounding, for about a third of the compute. `plain_logps` is the oracle.

Notation: m image, m' contrastive image, x prompt, y_w / y_l chosen / rejected response for (m, x),
y'_w chosen response for (m', x), pi_theta policy, pi_ref frozen reference, beta the DPO scale.
Everything the objectives know about a record is the table of log-ratios
    rho[image, response] = log pi_theta(y | image, x) - log pi_ref(y | image, x)      (nats)
with images (m, m') and responses (y_w, y_l, y'_w): shape (B, 2, 3), NaN where nobody asked.

Papers: SymMPO (Liu et al. 2025, "Mitigating Hallucination Through Theory-Consistent Symmetric
Multimodal Preference Optimization"); mDPO (Wang et al. 2024, "mDPO: Conditional Preference
Optimization for Multimodal Large Language Models"); DPO (Rafailov et al. 2023).
"""
import math

import torch
from torch.nn.functional import cross_entropy, logsigmoid
from torch.nn.utils.rnn import pad_sequence

M, M_ = 0, 1  # images: m and m'
YW, YL, YW_ = 0, 1, 2  # responses: y_w, y_l and y'_w

# ---------------------------------------------------------------------------------------------
# Loss terms: pure functions of (B,) log-ratios in nats; each returns a (B,) tensor.
#
# The derivation they share. The optimal policy of KL-regularised reward maximisation is
#     pi*(y|m,x) = pi_ref(y|m,x) exp(r(m,x,y) / beta) / Z(m,x),
# so the reward that a policy implies is
#     r(m,x,y) = beta rho(m,y) + beta log Z(m,x),
#     Z(m,x)   = sum_y pi_ref(y|m,x) exp(r(m,x,y) / beta)                              (Eq. 12)
# Bradley-Terry says p(a preferred to b) = sigma(r_a - r_b). Z depends on the image and the prompt
# and not on the response: it cancels if and only if both sides share the image.
# ---------------------------------------------------------------------------------------------


def dpo_m(rho_w, rho_l, beta):
    """DPO with an image: -log sigma(beta [rho(m,y_w) - rho(m,y_l)]).  (SymMPO L_DPOm; DPO Eq. 7)

    r(m,y_w) - r(m,y_l) = beta rho(m,y_w) + beta log Z(m,x) - beta rho(m,y_l) - beta log Z(m,x):
    one image on both sides, so log Z(m,x) cancels exactly.
    """
    return -logsigmoid(beta * (rho_w - rho_l))


def copo(rho_m, rho_m_, beta):
    """CoPO / VCO: -log sigma(beta [rho(m,y_w) - rho(m',y_w)]).  (SymMPO Eq. 6; mDPO Sec. 3.1)

    r(m,y_w) - r(m',y_w) = beta [rho(m,y_w) - rho(m',y_w)] + beta log Z(m,x) - beta log Z(m',x):
    the images differ, the two partition functions stay. This loss drops them (c = 0 below), so
    its gradient is -sigma(-u) du/dtheta (Eq. 15) where Eq. 14 has -sigma(-(u + c)) du/dtheta.
    """
    return vco(rho_m, rho_m_, beta, c=0.0)


def vco(rho_m, rho_m_, beta, c):
    """The image-side preference with its partition offset: -log sigma(u + c).  (Eq. 13)

    u = beta [rho(m,y_w) - rho(m',y_w)] and c = beta log Z(m,x) - beta log Z(m',x), in nats; c does
    not depend on theta, so dL/dtheta = -sigma(-(u + c)) du/dtheta (Eq. 14). Z sums over every
    response: `log_partition` has it where that sum is possible, `log_partition_mc` estimates it.
    """
    return -logsigmoid(beta * (rho_m - rho_m_) + c)


def pair(rho_m_w, rho_m_w_, rho_m__w_, rho_m__w, beta):
    """SymMPO's symmetric preference (L_Pair): under m prefer y_w to y'_w, under m' y'_w to y_w.

    -log sigma(beta [rho(m,y_w) - rho(m,y'_w)]) - log sigma(beta [rho(m',y'_w) - rho(m',y_w)])
    Each sigma compares two responses under ONE image: log Z(m,x) cancels in the first as in DPO,
    log Z(m',x) in the second. The images are contrasted without ever meeting in a difference.
    """
    return -logsigmoid(beta * (rho_m_w - rho_m_w_)) - logsigmoid(beta * (rho_m__w_ - rho_m__w))


def margin(rho_m_w, rho_m_w_, rho_m__w_, rho_m__w):
    """Margin consistency (L_Margin): (Delta - Delta')^2 in nats^2, without beta.

    Delta = rho(m,y_w) - rho(m,y'_w) and Delta' = rho(m',y'_w) - rho(m',y_w); in each the log Z of
    its own image has cancelled already, so the two can be compared.
    """
    return ((rho_m_w - rho_m_w_) - (rho_m__w_ - rho_m__w)) ** 2


def ancpo(rho, beta, delta, direction=+1):
    """Anchor (L_AncPO): -log sigma(direction * (beta rho - delta)).  (mDPO Sec. 3.2, Table 4)

    direction +1 holds the reward of a good cell above delta, -1 that of a bad one below it. It
    needs no second response, and no Z cancels: it is a regulariser and not a Bradley-Terry model.
    """
    return -logsigmoid(direction * (beta * rho - delta))


# ---------------------------------------------------------------------------------------------
# Objectives: the cells they read, their default weights, and a function of the two (B, 2, 3)
# tables (log-ratios, policy log-probs) and the weights w that returns weighted (B,) terms.
# Ablations are weights of zero.
# ---------------------------------------------------------------------------------------------

ANCHORS = {  # name on the command line -> (image, response, direction); mDPO Table 4 and SymMPO
    "yw": (M, YW, +1), "yl": (M, YL, -1), "ml": (M_, YW, -1), "yw'": (M_, YW_, +1),
}


def _anchors(rho, w):
    cells = [ANCHORS[name] for name in w["anchors"]]
    return sum(ancpo(rho[:, i, y], w["beta"], w["delta"], sign) for i, y, sign in cells)


def _dpo(rho, logp, w):
    return {"dpo": dpo_m(rho[:, M, YW], rho[:, M, YL], w["beta"]),
            "ancpo": w["eta"] * _anchors(rho, w)}


def _copo(rho, logp, w):
    return {"copo": copo(rho[:, M, YW], rho[:, M_, YW], w["beta"]),
            "ancpo": w["eta"] * _anchors(rho, w)}


def _mdpo(rho, logp, w):  # L_mDPO = L_DPOm + L_CoPO + L_AncPO  (lam = eta = 1)
    return {**_dpo(rho, logp, w),
            "copo": w["lam"] * copo(rho[:, M, YW], rho[:, M_, YW], w["beta"])}


def _symmpo(rho, logp, w):  # L_SymMPO = L_DPOm + lam L_Pair + gamma L_Margin + eta L_AncPO
    cells = rho[:, M, YW], rho[:, M, YW_], rho[:, M_, YW_], rho[:, M_, YW]
    return {**_dpo(rho, logp, w),
            "pair": w["lam"] * pair(*cells, w["beta"]),
            "margin": w["gamma"] * margin(*cells)}


def _sft(rho, logp, w):  # plain likelihood of y_w, summed over its tokens
    return {"sft": -logp[:, M, YW]}


def _weights(lam=0.0, gamma=0.0, eta=0.0, anchors=("yw",)):
    return {"beta": 0.1, "lam": lam, "gamma": gamma, "eta": eta, "delta": 0.0, "anchors": anchors}


OBJECTIVES = {  # name: (cells it reads, default weights, terms)
    "dpo": ([(M, YW), (M, YL)], _weights(), _dpo),
    "copo": ([(M, YW), (M_, YW)], _weights(), _copo),
    "mdpo": ([(M, YW), (M, YL), (M_, YW)], _weights(lam=1.0, eta=1.0), _mdpo),
    "symmpo": ([(M, YW), (M, YL), (M, YW_), (M_, YW_), (M_, YW)],
               _weights(lam=0.5, gamma=1e-4, eta=1.0, anchors=("yw", "yw'")), _symmpo),
    "sft": ([(M, YW)], _weights(), _sft),
}


def loss_terms(name, policy, reference, w):
    """The weighted terms of an objective: {term: (B,)}, from two (B, 2, 3) log-prob tables."""
    return OBJECTIVES[name][2](policy - reference, policy, w)


def loss_at_start(name, w):
    """The loss in nats where policy = reference, so that rho = 0: its closed form. NaN for SFT,
    which reads the log-probs themselves.

    A pair costs ln 2, an anchor log(1 + exp(+-delta)): dpo ln 2; mdpo 3 ln 2; symmpo
    (1 + 2 lam + 2 eta) ln 2 = 4 ln 2 with the paper's weights.
    """
    rho = torch.zeros(1, 2, 3)
    return sum(OBJECTIVES[name][2](rho, rho * math.nan, w).values()).item()


@torch.no_grad()
def metrics(policy, reference, beta):
    """What to log, under the names of DPO and TRL: {name: (B,) tensor}; no cell, no metric."""
    rho = policy - reference
    reward_w, reward_l = beta * rho[:, M, YW], beta * rho[:, M, YL]
    delta = rho[:, M, YW] - rho[:, M, YW_]
    delta_ = rho[:, M_, YW_] - rho[:, M_, YW]
    found = {
        "rewards/chosen": reward_w, "rewards/rejected": reward_l,
        "rewards/margins": reward_w - reward_l, "logps/chosen": policy[:, M, YW],
        "logps/rejected": policy[:, M, YL], "rewards/chosen_contrast": beta * rho[:, M_, YW_],
        "pair/margin_m": delta, "pair/margin_m_contrast": delta_,
        "copo/margin": beta * (rho[:, M, YW] - rho[:, M_, YW]),
    }
    for name, gap in [("rewards/accuracies", reward_w - reward_l), ("pair/accuracy_m", delta),
                      ("pair/accuracy_m_contrast", delta_)]:
        found[name] = torch.where(gap.isnan(), gap, (gap > 0).to(gap.dtype))
    return {name: value for name, value in found.items() if not value.isnan().any()}


# ---------------------------------------------------------------------------------------------
# Partition functions of small response sets (Eq. 12), for the notebooks and for `vco`.
# ---------------------------------------------------------------------------------------------


def log_partition(ref_logp, reward, beta):
    """Exact log Z = log sum_y pi_ref(y) exp(r(y) / beta) over the last dimension, in nats."""
    return torch.logsumexp(ref_logp + reward / beta, dim=-1)


def partition_offset(log_z, log_z_, beta):
    """c = beta log Z(m,x) - beta log Z(m',x), the offset of Eq. 13, in nats."""
    return beta * (log_z - log_z_)


def log_partition_mc(reward, beta):
    """Monte-Carlo log Z from rewards (..., N) of N samples of pi_ref: (estimate, standard error).

    Z is the mean of exp(r / beta) under pi_ref. The error is the delta method's,
    sd(weights) / (sqrt(N) mean(weights)): trust it only while no single sample dominates.
    """
    n = reward.shape[-1]
    log_z = torch.logsumexp(reward / beta, dim=-1) - math.log(n)
    weights = torch.exp(reward / beta - log_z.unsqueeze(-1))  # mean 1 over the samples
    return log_z, weights.std(dim=-1) / math.sqrt(n)


# ---------------------------------------------------------------------------------------------
# Log-probabilities. A row is one image with its prompt and the responses asked of it:
#   {"inputs": the processor's tensors for the prompt and image, batch dimension 1,
#    "responses": [LongTensor (n,), end token included], "cells": [(record, image, response)]}
# ---------------------------------------------------------------------------------------------


def logp_table(model, rows, records, share_prefix=True, tokens_per_forward=0):
    """(records, 2, 3) fp32 log-probabilities in nats, NaN in the cells that no row asks for.

    share_prefix packs each row's responses behind one prefix. Rows are packed into one forward
    while they fit into tokens_per_forward; 0 means one row at a time (best on a CPU).
    """
    chunks, room = [], 0
    for row in rows:
        tokens = row["inputs"]["input_ids"].shape[1] + sum(map(len, row["responses"]))
        if tokens > room:
            chunks.append([])
            room = tokens_per_forward
        chunks[-1].append(row)
        room -= tokens
    logps = packed_logps if share_prefix else plain_logps
    sums = torch.stack([lp.sum() for chunk in chunks for lp in logps(model, chunk)])
    cells = [cell for row in rows for cell in row["cells"]]
    index = tuple(torch.tensor(cells, device=sums.device).T)
    return torch.full((records, 2, 3), math.nan, device=sums.device).index_put(index, sums)


def packed_logps(model, rows):
    """Per-token log-probs (fp32) of every response in rows, each prefix computed once.

    The rows lie in one sequence without padding, [prefix | y_1 | y_2 | ...] [prefix | ...]:
    a token sees the prefix of its own row and the past of its own response, and position ids
    restart after the prefix for each response, so that every number is that of a separate
    sequence. Logits exist only where a response token is predicted; the prefix's last position
    predicts the first token of each response, and a response's last token is never an input.
    """
    ids, row_of, branch, position, keep, targets = [], [], [], [], [], []
    for i, row in enumerate(rows):
        prefix, responses = row["inputs"]["input_ids"][0], row["responses"]
        for k, piece in enumerate([prefix] + [response[:-1] for response in responses]):
            start, first = len(row_of), len(prefix) if k > 0 else 0
            ids.append(piece)
            row_of += [i] * len(piece)
            branch += [k] * len(piece)
            position += range(first, first + len(piece))
            if k == 0:
                last = len(row_of) - 1
            else:
                keep += [last, *range(start, len(row_of))]
        targets += responses
    device = _base(model).device
    ids, labels = torch.cat(ids).to(device), torch.cat(targets).to(device)
    row_of, branch, position, keep = (
        torch.tensor(x, device=device) for x in (row_of, branch, position, keep))
    embeds = _embed(model, rows, ids)
    hidden = language_model(model)(
        inputs_embeds=embeds, position_ids=position[None], use_cache=False,
        attention_mask=branch_mask(row_of, branch, embeds.dtype)).last_hidden_state[0]
    logps = _token_logps(_base(model).get_output_embeddings(), hidden[keep], labels)
    return logps.split([len(response) for response in targets])


def _token_logps(head, hidden, labels, chunk=128):
    """(T,) fp32 log p(label) from (T, width) hidden states, with their gradient and without keeping
    (T, vocabulary) logits for it: while a chunk's are there, so is the gradient, by hand
        d log p(y) / d hidden = W[y] - softmax(logits) W
    and a term of value zero carries it. The head W itself is frozen and gets none."""
    logps, slopes = [], []
    with torch.no_grad():
        for h, y in zip(hidden.detach().split(chunk), labels.split(chunk)):
            logp = head(h).float().log_softmax(-1)
            logps.append(logp.gather(1, y[:, None])[:, 0])
            if hidden.requires_grad:
                slopes.append(head.weight[y] - logp.exp_().to(h.dtype) @ head.weight)
    if not slopes:
        return torch.cat(logps)
    zero = (hidden - hidden.detach()).float()
    return torch.cat(logps) + (zero * torch.cat(slopes)).sum(-1)


def branch_mask(row_of, branch, dtype=torch.float32):
    """(1, 1, L, L): 0 where query i may see key j, else -inf; None where plain causal attention is
    right. Not a boolean, of which attention would make and keep such a copy in every layer."""
    if row_of[-1] == 0 and branch[-1] <= 1:
        return None
    past = torch.ones(len(branch), len(branch), dtype=torch.bool, device=branch.device).tril()
    same_row = row_of[:, None] == row_of[None]
    same_branch = (branch[None] == 0) | (branch[:, None] == branch[None])
    allowed = (past & same_row & same_branch)[None, None]
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, -math.inf)


def plain_logps(model, rows):
    """The same numbers the plain way: for each row a right-padded batch of full sequences.

    The model's own forward gets the processor's own tensors, repeated for each response; this is
    the tests' oracle and the way of families whose attention or positions do not allow packing.
    """
    out, device = [], _base(model).device
    for row in rows:
        n, length = len(row["responses"]), row["inputs"]["input_ids"].shape[1]
        padded = pad_sequence(row["responses"], batch_first=True)
        real = pad_sequence([torch.ones_like(r) for r in row["responses"]], batch_first=True)
        inputs = {}
        for key, value in row["inputs"].items():
            value = value.repeat(n, *[1] * (value.dim() - 1))
            if value.shape[:2] == (n, length):  # along the text: grows with it, masked by length
                more = {"input_ids": padded, "attention_mask": real}.get(key, 0 * padded)
                value = torch.cat([value, more.to(value.dtype)], dim=1)
            inputs[key] = value.to(device)
        logits = model(**inputs, use_cache=False,  # no logits for the prompt
                       logits_to_keep=padded.shape[1] + 1).logits[:, :-1].float()
        out += [-cross_entropy(logits[k, :len(r)], r.to(device), reduction="none")
                for k, r in enumerate(row["responses"])]
    return out


def image_features(model, row):
    """(tokens, width) features of a row's image: computed once, by frozen weights, and kept, so
    that policy and reference share them. Raises ValueError when their number is not that of the
    image tokens in the prompt."""
    if "features" not in row:
        base = _base(model)
        images = {key: value.to(base.device, base.dtype if value.is_floating_point() else None)
                  for key, value in row["inputs"].items()
                  if key not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            found = base.get_image_features(**images, return_dict=True).pooler_output
        row["features"] = torch.cat([image.flatten(0, -2) for image in found])
        tokens = (row["inputs"]["input_ids"] == base.config.image_token_id).sum().item()
        if tokens != len(row["features"]):
            raise ValueError(f"{tokens} image tokens in the prompt, {len(row['features'])} features"
                             " from the vision tower: processor and model do not fit (patch_size,"
                             " num_additional_image_tokens, vision_feature_select_strategy)")
    return row["features"]


def _embed(model, rows, ids):
    """Token embeddings (1, L, width) with the image features at the image tokens."""
    base = _base(model)
    embeds = base.get_input_embeddings()(ids)
    images = [image_features(model, row) for row in rows if "pixel_values" in row["inputs"]]
    if images:
        here = (ids == base.config.image_token_id)[:, None]
        embeds = embeds.masked_scatter(here, torch.cat(images).to(embeds.dtype))
    return embeds[None]


def language_model(model):
    """The text decoder inside a vision-language model."""
    return _base(model).get_decoder()


def _base(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model
