"""Losses against hand arithmetic and closed-form gradients; partition functions by enumeration."""
import math

import pytest
import torch

import symmpo
from symmpo import M, M_, YL, YW, YW_, OBJECTIVES, loss_at_start, loss_terms

LN2 = math.log(2)


def softplus(x):
    return math.log1p(math.exp(x))


def table(**cells):
    """A (1, 2, 3) table with the named cells and NaN elsewhere."""
    names = {"mw": (0, 0), "ml": (0, 1), "mw_": (0, 2), "cw": (1, 0), "cw_": (1, 2)}
    out = torch.full((1, 2, 3), math.nan)
    for name, value in cells.items():
        out[(0, *names[name])] = value
    return out


def test_terms_by_hand():
    t = torch.tensor
    assert symmpo.dpo_m(t([2.0]), t([-1.0]), 0.1).item() == pytest.approx(softplus(-0.3))
    assert symmpo.copo(t([2.0]), t([5.0]), 0.1).item() == pytest.approx(softplus(0.3))
    assert symmpo.vco(t([2.0]), t([5.0]), 0.1, 0.7).item() == pytest.approx(softplus(-0.4))
    assert symmpo.ancpo(t([3.0]), 0.1, 0.5).item() == pytest.approx(softplus(0.2))
    assert symmpo.ancpo(t([3.0]), 0.1, 0.5, -1).item() == pytest.approx(softplus(-0.2))
    two = symmpo.pair(t([2.0]), t([1.0]), t([4.0]), t([-2.0]), 0.1)
    assert two.item() == pytest.approx(softplus(-0.1) + softplus(-0.6))
    gap = symmpo.margin(t([2.0]), t([1.0]), t([4.0]), t([-2.0]))  # (1 - 6)^2, no beta
    assert gap.item() == pytest.approx(25.0)


def test_sums_by_hand():
    rho = table(mw=2.0, ml=-1.0, mw_=1.0, cw=-2.0, cw_=4.0)
    zero = torch.zeros(1, 2, 3)
    w = OBJECTIVES["symmpo"][1]
    total = sum(loss_terms("symmpo", rho, zero, w).values()).item()
    expected = (softplus(-0.3) + 0.5 * (softplus(-0.1) + softplus(-0.6)) + 1e-4 * 25
                + softplus(-0.2) + softplus(-0.4))
    assert total == pytest.approx(expected)
    total = sum(loss_terms("mdpo", rho, zero, OBJECTIVES["mdpo"][1]).values()).item()
    assert total == pytest.approx(softplus(-0.3) + softplus(-0.4) + softplus(-0.2))
    anchors = {**OBJECTIVES["mdpo"][1], "lam": 0.0, "anchors": ("yw", "yl", "ml")}
    total = sum(loss_terms("mdpo", rho, zero, anchors).values()).item()
    assert total == pytest.approx(softplus(-0.3) + softplus(-0.2) + softplus(-0.1) + softplus(-0.2))
    logp = table(mw=-7.0)
    assert loss_terms("sft", logp, zero, OBJECTIVES["sft"][1])["sft"].item() == 7.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_read_exactly_their_cells(name):
    """NaN in every other cell must not matter; NaN in any declared cell must."""
    cells, w = OBJECTIVES[name][:2]
    w = {**w, "eta": w["eta"] or 1.0} if name != "copo" else w
    full = torch.randn(2, 2, 3)
    for missing in [None, *cells]:
        rho = torch.full((2, 2, 3), math.nan)
        for cell in cells:
            if cell != missing:
                rho[:, cell[0], cell[1]] = full[:, cell[0], cell[1]]
        total = sum(loss_terms(name, rho, torch.zeros_like(rho), w).values())
        assert total.isnan().any().item() == (missing is not None)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "sft"])
def test_closed_form_at_start(name):
    zero = torch.zeros(3, 2, 3)
    for change in ({}, {"delta": 0.3, "eta": 0.7, "lam": 0.25},
                   {"anchors": ("yw", "yl"), "eta": 2}):
        w = {**OBJECTIVES[name][1], **change}
        pairs = {"dpo": 1, "copo": 1, "mdpo": 1 + w["lam"], "symmpo": 1 + 2 * w["lam"]}[name]
        anchors = sum(softplus(symmpo.ANCHORS[a][2] * w["delta"]) for a in w["anchors"])
        assert loss_at_start(name, w) == pytest.approx(pairs * LN2 + w["eta"] * anchors, abs=1e-6)
        total = sum(loss_terms(name, zero, zero, w).values())
        assert total.tolist() == pytest.approx([loss_at_start(name, w)] * 3, abs=1e-6)
    assert loss_at_start("symmpo", OBJECTIVES["symmpo"][1]) == pytest.approx(4 * LN2)
    assert loss_at_start("mdpo", OBJECTIVES["mdpo"][1]) == pytest.approx(3 * LN2)
    assert math.isnan(loss_at_start("sft", OBJECTIVES["sft"][1]))


def test_gradients_eq_14_and_15():
    rho = torch.tensor([1.5, -0.4], dtype=torch.float64, requires_grad=True)
    beta, c = 0.1, torch.tensor(0.8, dtype=torch.float64)
    u = (beta * (rho[0] - rho[1])).detach()
    for offset, loss in [(c, symmpo.vco(rho[0], rho[1], beta, c)),
                         (0 * c, symmpo.copo(rho[0], rho[1], beta))]:
        grad, = torch.autograd.grad(loss, rho)
        weight = torch.sigmoid(-(u + offset))  # Eq. 14 with c, Eq. 15 without
        assert torch.allclose(grad, -weight * beta * torch.tensor([1.0, -1.0]).double(), atol=1e-12)


def test_partition_cancels_where_the_text_says():
    """With the exact optimal policy every same-image difference equals the reward difference,
    and CoPO's difference is off by exactly c."""
    torch.manual_seed(0)
    beta, reward = 0.5, torch.randn(2, 3).double()  # (image, response)
    ref = torch.randn(2, 3).double().log_softmax(-1)
    log_z = symmpo.log_partition(ref, reward, beta)
    policy = ref + reward / beta - log_z[:, None]  # log pi*, normalised
    assert torch.allclose(policy.exp().sum(-1), torch.ones(2).double())
    rho = policy - ref
    assert torch.allclose(beta * (rho[M, YW] - rho[M, YL]), reward[M, YW] - reward[M, YL])
    assert torch.allclose(beta * (rho[M_, YW_] - rho[M_, YW]), reward[M_, YW_] - reward[M_, YW])
    c = symmpo.partition_offset(log_z[0], log_z[1], beta)
    assert abs(c) > 0.01
    assert torch.allclose(beta * (rho[M, YW] - rho[M_, YW]) + c, reward[M, YW] - reward[M_, YW])


def test_monte_carlo_partition():
    torch.manual_seed(1)
    ref = torch.randn(6).double().log_softmax(-1)
    reward, beta = torch.randn(6).double(), 0.8
    exact = symmpo.log_partition(ref, reward, beta)
    samples = reward[torch.multinomial(ref.exp(), 200 * 500, replacement=True).view(200, 500)]
    estimate, error = symmpo.log_partition_mc(samples, beta)
    score = (estimate - exact) / error  # 200 independent z-scores
    assert score.mean().abs() < 0.3 and 0.8 < score.std() < 1.25


def test_metrics_leave_out_what_was_not_computed():
    policy = table(mw=-3.0, ml=-6.0)
    found = symmpo.metrics(policy, table(mw=-4.0, ml=-5.0), beta=0.1)
    assert found["rewards/chosen"].item() == pytest.approx(0.1)
    assert found["rewards/accuracies"].item() == 1.0
    assert found["rewards/margins"].item() == pytest.approx(0.2)
    assert not any(name.startswith("pair") for name in found)
