"""SymMPO and its baselines: every loss term, with the derivation it comes from.

Read this file beside the paper. It knows no model and no data, only a table of numbers:

    rho(m, y) = log pi_theta(y | m, x) - log pi_ref(y | m, x)          a log-ratio, in nats

for image m, prompt x and response y, summed over the tokens of y, end token included, never
averaged. A record has two images, and the prompt can be asked without any; it has three responses:

                       y_w chosen     y_l rejected    y'_w chosen for m'
    m   image           rho[M, W]       rho[M, L]        rho[M, WP]
    m'  contrast       rho[MP, W]       rho[MP, L]       rho[MP, WP]
    --  no image     rho[NONE, W]     rho[NONE, L]      rho[NONE, WP]

In code a prime is the letter p: MP is m', WP is y'_w. The table is a (3, 3, B) tensor for B
records, NaN in every cell that the objective does not read.

A new objective is a function of that table and an entry in OBJECTIVES; nothing outside this file
changes (docs/forks/ has six). Departures from the paper: none in the equations; Margin has no beta,
as in the slides and the published code (see `margin`).

Papers: SymMPO (Liu et al. 2025, "Mitigating Hallucination Through Theory-Consistent Symmetric
Multimodal Preference Optimization"); mDPO (Wang et al. 2024, "mDPO: Conditional Preference
Optimization for Multimodal Large Language Models"); DPO (Rafailov et al. 2023).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

M, MP, NONE = 0, 1, 2  # images: m, m', and the prompt without one
W, L, WP = 0, 1, 2  # responses: y_w, y_l and y'_w

# --------------------------------------------------------------------------------------------------
# The derivation that all terms share
#
# The optimal policy of KL-regularised reward maximisation is
#     pi*(y|m,x) = pi_ref(y|m,x) exp(r(m,x,y) / beta) / Z(m,x),
# so a policy implies the reward
#     r(m,x,y) = beta rho(m,y) + beta log Z(m,x),
#     Z(m,x)   = sum_y pi_ref(y|m,x) exp(r(m,x,y) / beta).                                  (Eq. 12)
#
# Bradley-Terry turns a preference for a over b into the loss -log sigma(r_a - r_b). Z belongs to an
# image and a prompt, not to a response. So in r_a - r_b it cancels whenever both sides have the
# SAME image. With two images beta log Z(m,x) - beta log Z(m',x) stays, and nothing makes it zero:
# two images would need equal Z by chance. This is the whole point of this repository.
# --------------------------------------------------------------------------------------------------


def dpo_m(rho_m_w, rho_m_l, beta):
    """DPO with an image: under m, prefer y_w to y_l.                     (SymMPO L_DPOm; DPO Eq. 7)

    r(m,y_w) - r(m,y_l) = beta [rho(m,y_w) - rho(m,y_l)] + beta log Z(m,x) - beta log Z(m,x)
    One image on both sides: log Z cancels. All arguments and the result: (B,).
    """
    return -logsigmoid(beta * (rho_m_w - rho_m_l))


def vco(rho_m_w, rho_mp_w, beta, offset):
    """The image-side preference: for y_w, prefer m to m'.                               (Eq. 13)

    r(m,y_w) - r(m',y_w) = u + c   with   u = beta [rho(m,y_w) - rho(m',y_w)]
                                          c = beta log Z(m,x) - beta log Z(m',x)   (the offset)
    The images differ, so the two Z stay. c does not depend on theta, but it weighs the gradient:
        dL/dtheta = -sigma(-(u + c)) du/dtheta.                                          (Eq. 14)
    """
    return -logsigmoid(beta * (rho_m_w - rho_mp_w) + offset)


def copo(rho_m_w, rho_mp_w, beta):
    """CoPO: `vco` with the offset dropped, as mDPO does.              (SymMPO Eq. 6; mDPO Sec. 3.1)

    Its gradient is -sigma(-u) du/dtheta (Eq. 15) instead of Eq. 14: each record has a wrong weight
    unless log Z(m,x) = log Z(m',x). Notebook 1 measures by how much.
    """
    return vco(rho_m_w, rho_mp_w, beta, offset=0.0)


def pair(rho_m_w, rho_m_wp, rho_mp_wp, rho_mp_w, beta):
    """SymMPO's symmetric pair: under m prefer y_w to y'_w, under m' prefer y'_w to y_w.   (L_Pair)

    Each sigma compares two responses under ONE image, so log Z(m,x) cancels in the first and
    log Z(m',x) in the second. The images are contrasted without meeting in one difference.
    """
    under_m = -logsigmoid(beta * (rho_m_w - rho_m_wp))
    under_mp = -logsigmoid(beta * (rho_mp_wp - rho_mp_w))
    return under_m + under_mp


def margin(rho_m_w, rho_m_wp, rho_mp_wp, rho_mp_w):
    """Margin consistency: both preferences of `pair` equally strong, in nats^2.         (L_Margin)

    In each difference log Z has cancelled already, so the two can be compared. The slides use r in
    two meanings: in L_Pair it is the reward, beta rho, but in L_Margin they write Delta, a
    difference of two r, as a difference of plain log-ratios, without beta. So does the published
    code, and so do we; with beta this term would be 100 times smaller.
    """
    under_m = rho_m_w - rho_m_wp  # Delta(m, x, y_w, y'_w)
    under_mp = rho_mp_wp - rho_mp_w  # Delta(m', x, y'_w, y_w)
    return (under_m - under_mp) ** 2


def ancpo(rho, beta, delta, direction=+1):
    """Anchor: keep the reward of one cell above delta (direction +1) or below it (-1).  (L_AncPO)

    It compares with a constant, so no Z cancels: a regulariser, no Bradley-Terry model. It prevents
    that both likelihoods fall while their difference grows.               (mDPO Sec. 3.2)
    """
    return -logsigmoid(direction * (beta * rho - delta))


# --------------------------------------------------------------------------------------------------
# Objectives: weighted sums of the terms above. An ablation is a weight of zero.
# --------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """All that a loss sees of B records."""

    rho: torch.Tensor  # (3, 3, B) log-ratios in nats, by image, response and record
    logp: torch.Tensor  # (3, 3, B) the policy's log-probabilities, in nats
    length: torch.Tensor  # (3, B) tokens of each response, end token included


def weight(text):
    """A loss weight: an option of train.py, which shows this text as its help."""
    return field(default=None, metadata={"help": text})


@dataclass
class Weights:
    """The numbers in the losses; None where the objective does not read one."""

    beta: float = weight("scale of the log-ratios, 1/nats")
    lam: float = weight("weight of Pair (symmpo) or CoPO (mdpo)")
    gamma: float = weight("weight of Margin")
    eta: float = weight("weight of the anchors")
    delta: float = weight("what anchored rewards are held above, nats")
    anchors: str = weight("anchored cells, comma-separated: yw, yl, ml, yw'")


ANCHORS = {  # name: (cell, direction); the choices of mDPO's Table 4 and SymMPO's y'_w
    "yw": ((M, W), +1),
    "yl": ((M, L), -1),
    "ml": ((MP, W), -1),
    "yw'": ((MP, WP), +1),
}


def anchor_terms(rho, w):
    """L_AncPO, added up over the anchored cells."""
    total = 0.0
    for name in w.anchors.split(","):
        cell, direction = ANCHORS[name]
        total = total + ancpo(rho[cell], w.beta, w.delta, direction)
    return total


def sft_terms(table, w):
    """Plain likelihood of y_w: no preference and no reference."""
    return {"sft": -table.logp[M, W]}


def dpo_terms(table, w):
    """L_DPOm (+ eta L_AncPO)."""
    rho = table.rho
    return {
        "dpo": dpo_m(rho[M, W], rho[M, L], w.beta),
        "ancpo": w.eta * anchor_terms(rho, w),
    }


def dpo_no_image_terms(table, w):
    """DPO (No Image), mDPO's Fig. 1: the same preference, asked without the image."""
    rho = table.rho
    return {"dpo": dpo_m(rho[NONE, W], rho[NONE, L], w.beta)}


def copo_terms(table, w):
    """L_CoPO (+ eta L_AncPO)."""
    rho = table.rho
    return {
        "copo": copo(rho[M, W], rho[MP, W], w.beta),
        "ancpo": w.eta * anchor_terms(rho, w),
    }


def mdpo_terms(table, w):
    """L_mDPO = L_DPOm + lam L_CoPO + eta L_AncPO, with lam = eta = 1."""
    rho = table.rho
    return {
        "dpo": dpo_m(rho[M, W], rho[M, L], w.beta),
        "copo": w.lam * copo(rho[M, W], rho[MP, W], w.beta),
        "ancpo": w.eta * anchor_terms(rho, w),
    }


def symmpo_terms(table, w):
    """L_SymMPO = L_DPOm + lam L_Pair + gamma L_Margin + eta L_AncPO."""
    rho = table.rho
    four = rho[M, W], rho[M, WP], rho[MP, WP], rho[MP, W]
    return {
        "dpo": dpo_m(rho[M, W], rho[M, L], w.beta),
        "pair": w.lam * pair(*four, w.beta),
        "margin": w.gamma * margin(*four),
        "ancpo": w.eta * anchor_terms(rho, w),
    }


class Objective(NamedTuple):
    terms: Callable  # (table, weights) -> {name: (B,) tensor}, already weighted
    cells: list  # the cells of the table that it reads
    weights: dict  # the weights that it reads, each with its default (sources: docs/design.md)
    reference: bool = True  # False: it reads no rho, so no reference is computed


OBJECTIVES = {
    "sft": Objective(
        sft_terms,
        cells=[(M, W)],
        weights={},
        reference=False,
    ),
    "dpo": Objective(
        dpo_terms,
        cells=[(M, W), (M, L)],
        weights={"beta": 0.1, "eta": 0.0, "delta": 0.0, "anchors": "yw"},
    ),
    "dpo-no-image": Objective(
        dpo_no_image_terms,
        cells=[(NONE, W), (NONE, L)],
        weights={"beta": 0.1},
    ),
    "copo": Objective(
        copo_terms,
        cells=[(M, W), (MP, W)],
        weights={"beta": 0.1, "eta": 0.0, "delta": 0.0, "anchors": "yw"},
    ),
    "mdpo": Objective(
        mdpo_terms,
        cells=[(M, W), (M, L), (MP, W)],
        weights={"beta": 0.1, "lam": 1.0, "eta": 1.0, "delta": 0.0, "anchors": "yw"},
    ),
    "symmpo": Objective(
        symmpo_terms,
        cells=[(M, W), (M, L), (M, WP), (MP, WP), (MP, W)],
        weights={
            "beta": 0.1,
            "lam": 0.5,
            "gamma": 1e-4,
            "eta": 1.0,
            "delta": 0.0,
            "anchors": "yw,yw'",
        },
    ),
}


def weights_of(name, given):
    """An objective's weights: its own, each replaced by the given one that is not None.

    given: {weight: value or None}. Raises ValueError for a weight or an anchored cell that the
    objective does not read: a number that changes nothing is a mistake.
    """
    objective = OBJECTIVES[name]
    given = {weight: value for weight, value in given.items() if value is not None}
    for weight in given:
        if weight not in objective.weights:
            reads = ", ".join(objective.weights) or "no weight"
            raise ValueError(f"{weight}: the objective {name} does not read it; it reads {reads}")
    weights = Weights(**{**objective.weights, **given})
    if weights.eta == 0:
        for weight in ("delta", "anchors"):
            if weight in given:
                raise ValueError(f"{weight}: it has no effect while eta is 0; set eta as well")
    if "anchors" in given:
        cells = {anchor: cell for anchor, (cell, _) in ANCHORS.items() if cell in objective.cells}
        for anchor in given["anchors"].split(","):
            if anchor not in cells:
                raise ValueError(
                    f"anchors: {name} has no cell {anchor!r} to anchor; it has {', '.join(cells)}"
                )
    return weights


def weight_defaults():
    """For the help of train.py: {weight: "mdpo 1.0, symmpo 0.5"}, the objectives that read it."""
    readers = {}
    for name, objective in OBJECTIVES.items():
        for weight, default in objective.weights.items():
            readers.setdefault(weight, []).append(f"{name} {default}")
    return {weight: ", ".join(texts) for weight, texts in readers.items()}


def loss_terms(name, table, weights):
    """The weighted terms of an objective: {term: (B,)}. Their sum is the loss."""
    return OBJECTIVES[name].terms(table, weights)


def loss_at_start(name, weights):
    """The loss while policy = reference, in nats, or None where it has no closed form.

    rho is 0 there: a sigmoid of a difference costs ln 2, an anchor log(1 + exp(+-delta)). So dpo
    starts at ln 2, mdpo at 3 ln 2, symmpo at (1 + 2 lam + 2 eta) ln 2 = 4 ln 2 with its defaults.
    """
    rho = torch.zeros(3, 3, 1)
    unknown = torch.full_like(rho, math.nan)
    table = Table(rho, logp=unknown, length=torch.ones(3, 1))
    loss = sum(loss_terms(name, table, weights).values()).item()
    if math.isnan(loss):
        return None  # it reads the log-probabilities themselves
    return loss


@torch.no_grad()
def metrics(table, weights):
    """What to log, under the names of DPO and TRL: {name: (B,)}. What needs a cell that the
    objective does not read is left out, and without a reference there are no rewards."""
    rho, logp, beta = table.rho, table.logp, weights.beta
    image = M
    if logp[M, W].isnan().any():
        image = NONE  # of dpo-no-image
    found = {
        "logps/chosen": logp[image, W],
        "logps/rejected": logp[image, L],
    }
    if beta is not None:
        chosen, rejected = beta * rho[image, W], beta * rho[image, L]
        under_m = rho[M, W] - rho[M, WP]
        under_mp = rho[MP, WP] - rho[MP, W]
        found |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": is_positive(chosen - rejected),
            "rewards/chosen_contrast": beta * rho[MP, WP],
            "copo/margin": beta * (rho[M, W] - rho[MP, W]),
            "pair/margin_m": under_m,
            "pair/margin_m_contrast": under_mp,
            "pair/accuracy_m": is_positive(under_m),
            "pair/accuracy_m_contrast": is_positive(under_mp),
        }
    return {name: value for name, value in found.items() if not value.isnan().any()}


def is_positive(gap):
    """1 or 0; NaN stays NaN."""
    return torch.where(gap.isnan(), gap, (gap > 0).to(gap.dtype))


# --------------------------------------------------------------------------------------------------
# Partition functions of small response sets (Eq. 12): for the notebooks, and for `vco`.
# --------------------------------------------------------------------------------------------------


def log_partition(ref_logp, reward, beta):
    """Exact log Z = log sum_y pi_ref(y) exp(r(y) / beta) over the last dimension, in nats."""
    return torch.logsumexp(ref_logp + reward / beta, dim=-1)


def partition_offset(log_z_m, log_z_mp, beta):
    """c = beta log Z(m,x) - beta log Z(m',x), the offset of Eq. 13, in nats."""
    return beta * (log_z_m - log_z_mp)


def log_partition_mc(reward, beta):
    """Monte-Carlo log Z from the rewards (..., N) of N samples of pi_ref: (estimate, its error).

    Z is the mean of exp(r / beta) under pi_ref. The error is the delta method's, sd(weights) /
    (sqrt(N) mean(weights)): trust it only while no single sample dominates.
    """
    n = reward.shape[-1]
    log_z = torch.logsumexp(reward / beta, dim=-1) - math.log(n)
    weights = torch.exp(reward / beta - log_z.unsqueeze(-1))  # mean 1 over the samples
    return log_z, weights.std(dim=-1) / math.sqrt(n)
