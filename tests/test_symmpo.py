"""Losses against hand arithmetic and closed-form gradients; partition functions by enumeration."""

import math

import pytest
import torch

import symmpo
from symmpo import MP, OBJECTIVES, WP, L, M, Table, W, loss_at_start, loss_terms, weights_of

LN2 = math.log(2)


def softplus(x):
    return math.log1p(math.exp(x))


def cells(**values):
    """A (3, 3, 1) tensor with the named cells and NaN elsewhere."""
    names = {"mw": (M, W), "ml": (M, L), "mwp": (M, WP), "mpw": (MP, W), "mpwp": (MP, WP)}
    out = torch.full((3, 3, 1), math.nan)
    for name, value in values.items():
        out[names[name]] = value
    return out


def total(name, weights, rho=None, logp=None):
    """The loss of one record."""
    unknown = torch.full((3, 3, 1), math.nan)
    table = Table(unknown if rho is None else rho, unknown if logp is None else logp, None)
    return sum(loss_terms(name, table, weights).values()).item()


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
    rho = cells(mw=2.0, ml=-1.0, mwp=1.0, mpw=-2.0, mpwp=4.0)
    expected = softplus(-0.3) + 0.5 * (softplus(-0.1) + softplus(-0.6)) + 1e-4 * 25
    expected += softplus(-0.2) + softplus(-0.4)
    assert total("symmpo", weights_of("symmpo", {}), rho) == pytest.approx(expected)
    expected = softplus(-0.3) + softplus(-0.4) + softplus(-0.2)
    assert total("mdpo", weights_of("mdpo", {}), rho) == pytest.approx(expected)
    anchored = weights_of("mdpo", {"lam": 0.0, "anchors": "yw,yl,ml"})
    expected = softplus(-0.3) + softplus(-0.2) + softplus(-0.1) + softplus(-0.2)
    assert total("mdpo", anchored, rho) == pytest.approx(expected)
    no_image = torch.full((3, 3, 1), math.nan)
    no_image[symmpo.NONE, W], no_image[symmpo.NONE, L] = 2.0, -1.0
    found = total("dpo-no-image", weights_of("dpo-no-image", {}), no_image)
    assert found == pytest.approx(softplus(-0.3))
    assert total("sft", weights_of("sft", {}), logp=cells(mw=-7.0)) == 7.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_read_exactly_their_cells(name):
    """NaN in every other cell must not matter; NaN in any declared cell must."""
    objective = OBJECTIVES[name]
    more = {"eta": 1.0} if "eta" in objective.weights else {}
    weights = weights_of(name, more)
    full = torch.randn(3, 3, 2)
    for missing in [None, *objective.cells]:
        known = torch.full((3, 3, 2), math.nan)
        for cell in objective.cells:
            if cell != missing:
                known[cell] = full[cell]
        rho = known if objective.reference else torch.full_like(known, math.nan)
        table = Table(rho, known, torch.ones(3, 2))
        loss = sum(loss_terms(name, table, weights).values())
        assert loss.isnan().any().item() == (missing is not None)


@pytest.mark.parametrize(
    "name, pairs",
    [
        ("dpo", lambda w: 1),
        ("dpo-no-image", lambda w: 1),
        ("copo", lambda w: 1),
        ("mdpo", lambda w: 1 + w.lam),
        ("symmpo", lambda w: 1 + 2 * w.lam),
    ],
)
def test_closed_form_at_start(name, pairs):
    changes = [{}]
    if "eta" in OBJECTIVES[name].weights:
        changes += [{"delta": 0.3, "eta": 0.7}, {"anchors": "yw", "eta": 2.0}]
    for change in changes:
        weights = weights_of(name, change)
        expected = pairs(weights) * LN2
        for anchor in (weights.anchors or "").split(","):
            if anchor:
                direction = symmpo.ANCHORS[anchor][1]
                expected += weights.eta * softplus(direction * weights.delta)
        assert loss_at_start(name, weights) == pytest.approx(expected, abs=1e-6)
        assert total(name, weights, torch.zeros(3, 3, 1)) == pytest.approx(expected, abs=1e-6)


def test_closed_forms_of_the_papers():
    assert loss_at_start("symmpo", weights_of("symmpo", {})) == pytest.approx(4 * LN2)
    assert loss_at_start("mdpo", weights_of("mdpo", {})) == pytest.approx(3 * LN2)
    assert loss_at_start("sft", weights_of("sft", {})) is None


@pytest.mark.parametrize(
    "name, given, reason",
    [
        ("dpo", {"lam": 3.0}, "lam: the objective dpo does not read it; it reads beta, eta"),
        ("sft", {"beta": 0.2}, "beta: the objective sft does not read it; it reads no weight"),
        (
            "symmpo",
            {"gamma": 1.0, "eta": 0.0, "delta": 1.0},
            "delta: it has no effect while eta is 0",
        ),
        ("dpo", {"anchors": "yw"}, "anchors: it has no effect while eta is 0"),
        (
            "dpo",
            {"eta": 1.0, "anchors": "yw,yl,ml"},
            "anchors: dpo has no cell 'ml' to anchor; it has yw, yl",
        ),
        ("mdpo", {"anchors": "foo"}, "no cell 'foo'"),
    ],
)
def test_weights_that_would_change_nothing_are_refused(name, given, reason):
    with pytest.raises(ValueError, match=reason):
        weights_of(name, given)


def test_help_comes_from_the_registry(monkeypatch):
    assert symmpo.weight_defaults()["gamma"] == "symmpo 0.0001"
    new = OBJECTIVES["dpo"]._replace(weights={"gamma": 7.0})
    monkeypatch.setitem(OBJECTIVES, "new", new)
    assert symmpo.weight_defaults()["gamma"] == "symmpo 0.0001, new 7.0"


def test_gradients_eq_14_and_15():
    rho = torch.tensor([1.5, -0.4], dtype=torch.float64, requires_grad=True)
    beta, c = 0.1, torch.tensor(0.8, dtype=torch.float64)
    u = (beta * (rho[0] - rho[1])).detach()
    for offset, loss in [
        (c, symmpo.vco(rho[0], rho[1], beta, c)),
        (0 * c, symmpo.copo(rho[0], rho[1], beta)),
    ]:
        (grad,) = torch.autograd.grad(loss, rho)
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
    assert torch.allclose(beta * (rho[M, W] - rho[M, L]), reward[M, W] - reward[M, L])
    assert torch.allclose(beta * (rho[MP, WP] - rho[MP, W]), reward[MP, WP] - reward[MP, W])
    c = symmpo.partition_offset(log_z[0], log_z[1], beta)
    assert abs(c) > 0.01
    assert torch.allclose(beta * (rho[M, W] - rho[MP, W]) + c, reward[M, W] - reward[MP, W])


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
    policy, weights = cells(mw=-3.0, ml=-6.0), weights_of("dpo", {})
    table = Table(policy - cells(mw=-4.0, ml=-5.0), policy, None)
    found = symmpo.metrics(table, weights)
    assert found["rewards/chosen"].item() == pytest.approx(0.1)
    assert found["rewards/accuracies"].item() == 1.0
    assert found["rewards/margins"].item() == pytest.approx(0.2)
    assert not any(name.startswith("pair") for name in found)
    without_reference = Table(torch.full_like(policy, math.nan), policy, None)
    assert set(symmpo.metrics(without_reference, weights)) == {"logps/chosen", "logps/rejected"}


def test_metrics_of_a_prompt_without_an_image():
    rho = torch.full((3, 3, 1), math.nan)
    rho[symmpo.NONE, W], rho[symmpo.NONE, L] = 3.0, 1.0
    found = symmpo.metrics(Table(rho, rho, None), weights_of("dpo-no-image", {}))
    assert found["rewards/margins"].item() == pytest.approx(0.2)
    assert found["rewards/accuracies"].item() == 1.0
