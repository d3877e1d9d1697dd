"""The seeding losses: torch's values and gradients, and columns that rebuild the loss's Hessian."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian

from torchdyn_snopt.curvature.losses import (
    CrossEntropyLoss,
    GaussianNLLLoss,
    MSELoss,
    _class_columns,
)
from torchdyn_snopt.curvature.record import record_curvature
from torchdyn_snopt.errors import InvalidInputError, UnsupportedError

pytestmark = pytest.mark.usefixtures("float64")

N, D, C = 4, 3, 5
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1], dtype=torch.float64)

CROSS_ENTROPY_OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "weight": {"weight": WEIGHT},
    "smoothing": {"label_smoothing": 0.2},
    "weight and smoothing": {"weight": WEIGHT, "label_smoothing": 0.2},
    "ignore": {"ignore_index": 2},
    "everything": {"weight": WEIGHT, "label_smoothing": 0.2, "ignore_index": 2},
}


def block_sum(loss, outputs: Tensor) -> Tensor:
    """Σ over samples of the loss's Hessian in one sample's outputs [C]."""
    flat = hessian(lambda z: loss(z.view_as(outputs)))(outputs.detach().reshape(-1))
    per = flat.view(len(outputs), -1, len(outputs), outputs[0].numel())
    return torch.stack([per[i, :, i] for i in range(len(outputs))]).sum(0)


def recorded_b(layer: nn.Linear, loss: nn.Module, x: Tensor, target: Tensor, kind: str) -> Tensor:
    reduction = loss.reduction
    with record_curvature(layer, curvature=kind, reduction=reduction) as curvature:
        loss(layer(x), target).backward()
    return curvature.factors[""].B


@pytest.mark.parametrize("options", CROSS_ENTROPY_OPTIONS.values(), ids=CROSS_ENTROPY_OPTIONS)
@pytest.mark.parametrize("probabilities", [False, True], ids=["classes", "probabilities"])
def test_cross_entropy_columns_rebuild_its_hessian(options, probabilities):
    if probabilities and "ignore_index" in options:
        pytest.skip("torch ignores no class when targets are probabilities")
    layer, x = nn.Linear(D, C), torch.randn(N, D)
    target = torch.rand(N, C).softmax(-1) if probabilities else torch.tensor([0, 2, 3, 4])
    ours, theirs = CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    b = recorded_b(layer, ours, x, target, "ggn")
    gradient = layer.weight.grad.clone()
    layer.zero_grad()
    theirs(layer(x), target).backward()
    assert torch.equal(gradient, layer.weight.grad)
    expected = block_sum(lambda z: theirs(z, target), layer(x))
    if ours.reduction == "sum":
        expected = expected / N
    assert torch.allclose(b, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy_of_sequences_keeps_positions_apart(reduction):
    """After a pooling over positions, columns that mix them would leave cross terms."""

    class Spread(nn.Module):
        """One row of features a sample, used at three positions with different gains."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(D, C, bias=False)
            self.gain = torch.tensor([1.0, -2.0, 0.5])

        def forward(self, x):
            return self.inner(x).unsqueeze(-1) * self.gain  # [N, C, 3]

    model, x, target = Spread(), torch.randn(N, D), torch.randint(C, (N, 3))
    loss = CrossEntropyLoss(reduction=reduction)
    with record_curvature(model, curvature="ggn", reduction=reduction) as curvature:
        loss(model(x), target).backward()

    def of_layer(h: Tensor) -> Tensor:
        plain = nn.CrossEntropyLoss(reduction=reduction)
        return plain(h.unsqueeze(-1) * model.gain, target)

    expected = block_sum(of_layer, model.inner(x)) / (N if reduction == "sum" else 1)
    assert torch.allclose(curvature.factors["inner"].B, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mse_columns_rebuild_its_hessian(reduction):
    layer, x, target = nn.Linear(D, C), torch.randn(N, D), torch.randn(N, C)
    loss = MSELoss(reduction=reduction)
    b = recorded_b(layer, loss, x, target, "ggn")
    plain = nn.MSELoss(reduction=reduction)
    assert torch.equal(loss(layer(x), target), plain(layer(x), target))
    expected = block_sum(lambda z: plain(z, target), layer(x)) / (N if reduction == "sum" else 1)
    assert torch.allclose(b, expected, rtol=1e-12)


@pytest.mark.parametrize("shared", [False, True], ids=["each", "shared"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gaussian_columns_rebuild_the_fisher_matrix(reduction, shared):
    """In mean and variance; a network gives both from one layer of outputs."""
    wide = 1 if shared else C
    layer, x, target = nn.Linear(D, C + wide), torch.randn(N, D), torch.randn(N, C)
    loss = GaussianNLLLoss(reduction=reduction)
    plain = nn.GaussianNLLLoss(reduction=reduction)
    with record_curvature(layer, curvature="ggn", reduction=reduction) as curvature:
        out = layer(x)
        mean, var = out[:, :C], out[:, C:].exp()
        value = loss(mean, target, var)
        value.backward()
    assert torch.equal(value, plain(mean, target, var))
    var = var.detach()
    count = C if shared else 1
    # d var / d output = var, and each entry of the mean over N·C entries has weight 1/(N·C).
    of_mean = (1 / var).expand(N, C)
    of_output = torch.full((N, wide), count / 2.0)
    fisher = torch.diag(torch.cat([of_mean, of_output], 1).sum(0))
    weight = 1 / (N * C) if reduction == "mean" else 1 / N
    assert torch.allclose(curvature.factors[""].B, fisher * weight, rtol=1e-12)


def test_gaussian_with_a_fixed_variance_seeds_the_mean_alone():
    layer, x, target = nn.Linear(D, C), torch.randn(N, D), torch.randn(N, C)
    with record_curvature(layer, curvature="ggn") as curvature:
        GaussianNLLLoss()(layer(x), target, 0.25).backward()
    assert torch.allclose(curvature.factors[""].B, 4.0 * torch.eye(C) / C, rtol=1e-12)


def sampled_loss(name: str, samples: int, seed: int) -> nn.Module:
    classes = {"ce": CrossEntropyLoss, "mse": MSELoss, "nll": GaussianNLLLoss}
    generator = torch.Generator().manual_seed(seed)
    return classes[name](samples=samples, generator=generator)


def sampled_b(name: str, samples: int, seed: int, kind: str = "mc") -> Tensor:
    torch.manual_seed(0)
    layer, x = nn.Linear(D, C if name != "nll" else 2 * C), torch.randn(N, D)
    loss = sampled_loss(name, samples, seed)
    with record_curvature(layer, curvature=kind) as curvature:
        out = layer(x)
        if name == "nll":
            loss(out[:, :C], torch.zeros(N, C), out[:, C:].exp()).backward()
        else:
            target = torch.zeros(N, dtype=torch.long) if name == "ce" else torch.zeros(N, C)
            loss(out, target).backward()
    return curvature.factors[""].B


@pytest.mark.parametrize("name", ["ce", "mse", "nll"])
def test_mc_tends_to_ggn_at_the_monte_carlo_rate(name):
    """The root mean square error of 100 samples over that of 10,000 is 10."""
    exact = sampled_b(name, 1, 0, "ggn")
    errors = {}
    for samples, repeats in ((100, 40), (10_000, 40)):
        distances = [
            float((sampled_b(name, samples, seed) - exact).norm() / exact.norm())
            for seed in range(repeats)
        ]
        errors[samples] = math.sqrt(sum(d * d for d in distances) / repeats)
    assert errors[10_000] < 0.03
    # 40 repeats of a matrix norm: its own scatter is well below a third.
    assert 10 / 1.4 < errors[100] / errors[10_000] < 10 * 1.4


@pytest.mark.parametrize("name", ["ce", "mse", "nll"])
def test_mc_is_reproducible_by_its_generator(name):
    one, same, other = (sampled_b(name, 3, seed) for seed in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_factor_in_front_of_the_loss_counts_like_that_of_a_mean():
    """Two micro-batches, each loss divided by 2, give the factors of the whole batch."""
    layer, x, target = nn.Linear(D, C), torch.randn(2 * N, D), torch.randint(C, (2 * N,))
    loss = CrossEntropyLoss()
    whole = recorded_b(layer, loss, x, target, "ggn")
    with record_curvature(layer, curvature="ggn") as curvature:
        for half in (slice(0, N), slice(N, 2 * N)):
            (loss(layer(x[half]), target[half]) / 2).backward()
    assert torch.allclose(curvature.factors[""].B, whole, rtol=1e-12)


def test_nothing_is_seeded_unless_somebody_asks():
    layer, x = nn.Linear(D, C), torch.randn(N, D)
    value = CrossEntropyLoss()(layer(x), torch.zeros(N, dtype=torch.long))
    assert value.grad_fn.name() == "NllLossBackward0"
    with record_curvature(layer):
        value = MSELoss()(layer(x), torch.zeros(N, C))
        assert value.grad_fn.name() == "MseLossBackward0"


def test_refusals():
    layer, x = nn.Linear(D, C), torch.randn(N, D)
    target = torch.zeros(N, dtype=torch.long)
    with pytest.raises(InvalidInputError, match="curvature='hessian'"):
        MSELoss(curvature="hessian")
    with pytest.raises(InvalidInputError, match="samples=0"):
        MSELoss(samples=0)
    with record_curvature(layer, curvature="ggn"):
        with pytest.raises(InvalidInputError, match="different curvatures"):
            CrossEntropyLoss(curvature="mc")(layer(x), target)
        with pytest.raises(UnsupportedError, match="reduction='none'"):
            CrossEntropyLoss(reduction="none")(layer(x), target)
        with (
            record_curvature(layer, curvature="mc"),
            pytest.raises(UnsupportedError, match="two kinds of seeds"),
        ):
            CrossEntropyLoss()(layer(x), target)


def test_columns_of_sure_predictions_stay_finite() -> None:
    logits = torch.tensor([[0.0, 200.0, -200.0], [300.0, 0.0, 0.0], [0.0, 0.0, 90.0]])
    columns = _class_columns(logits.softmax(-1))
    assert columns.shape == (2, 3, 3)
    p = logits.softmax(-1)
    hessian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    torch.testing.assert_close(torch.einsum("rni,rnj->nij", columns, columns), hessian)
