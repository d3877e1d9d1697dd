"""'trust_region' against dense references: both directions, their radii, and the refreshes."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchdyn_snopt
from tests.optim.problems import (
    Classifier,
    averages,
    batch,
    flat,
    layer_with,
    loss_of,
    plain,
    spd,
    train,
)
from tests.reference import relative_error
from torchdyn_snopt import SNOpt
from torchdyn_snopt.optim import trust_region
from torchdyn_snopt.optim.trust_region import (
    AIM,
    EARLY,
    RADIUS_RANGE,
    RATE,
    SETTLE,
    STALE,
    VARIANCE_SHARE,
    TrustRegion,
    is_due,
)

if TYPE_CHECKING:
    from torchdyn_snopt.optim.layers import Layer

pytestmark = pytest.mark.usefixtures("float64", "unbounded_adam")


FLOOR, ADAM_RANGE = trust_region.FLOOR, trust_region.ADAM_RANGE


@pytest.fixture
def unbounded_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's part without floor and without a largest learning rate, which have tests apart."""
    monkeypatch.setattr(trust_region, "FLOOR", 0.0)
    monkeypatch.setattr(trust_region, "ADAM_RANGE", (1e-30, math.inf))


FREE = 1e30  # a radius that binds no step
RADII = ("kl_clip", "adam_lr")


def group_of(**settings: Any) -> dict[str, Any]:
    defaults = {
        "lr": 1.0, "momentum": 0.0, "alpha": 0.8, "damping": 1e-3, "weight_decay": 0.0,
        "kl_clip": 1e-3, "step": 0, "travelled": 0.0,
    }  # fmt: skip
    return {**defaults, **settings}


def awkward_layers(group: dict[str, Any], fisher_scale: float | None = None) -> list[Layer]:
    """Factors over eight decades whose eigenvectors have nothing in common; refreshed."""
    layers = [
        layer_with(spd(5, 1e-6, 1e2), spd(4, 1e-5, 1e1)),
        layer_with(spd(3, 1e-4, 1e3), spd(6, 1e-7, 1.0), bias=False),
    ]
    for layer in layers:
        if fisher_scale is not None:
            layer.state["fisher_scale"] = fisher_scale
        refreshed(layer, group)
    return layers


def refreshed(layer: Layer, group: dict[str, Any]) -> Layer:
    TrustRegion().refresh(layer, group)
    return layer


def updates_for(
    layers: list[Layer], gradients: list[Tensor], group: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Any]]:
    """One step as SNOpt takes it."""
    report: dict[str, Any] = {}
    with torch.no_grad():
        updates = TrustRegion().updates(layers, gradients, group, report)
    group["step"] += 1
    return updates, report


def random_gradients(layers: list[Layer]) -> list[Tensor]:
    return [torch.randn(len(layer.state["U_B"]), len(layer.state["U_A"])) for layer in layers]


def damped(layer: Layer, damping: float) -> np.ndarray:
    """The dense matrix of Martens & Grosse 2015, Section 6.3."""
    a, b = (average.numpy() for average in averages(layer.state))
    pi = math.sqrt((np.trace(a) / len(a)) / (np.trace(b) / len(b)))
    left = b + math.sqrt(damping) / pi * np.eye(len(b))
    return np.kron(left, a + math.sqrt(damping) * pi * np.eye(len(a)))


def row(matrix: Tensor) -> np.ndarray:
    return matrix.numpy().reshape(-1)


def joined(matrices: list[Tensor]) -> np.ndarray:
    return np.concatenate([row(matrix) for matrix in matrices])


def averaged(values: list[np.ndarray], decay: float) -> np.ndarray:
    """The last one counts most; decay 0 counts it alone."""
    return np.average(values, axis=0, weights=decay ** np.arange(len(values))[::-1])


class Dense:
    """A layer as numbers in a row, from all gradients that it has had, by numpy alone."""

    def __init__(self, layer: Layer, group: dict[str, Any]) -> None:
        self.beta1, self.beta2 = group["momentum"], group["alpha"]
        self.share = VARIANCE_SHARE * layer.state.get("fisher_scale", 1.0)
        a, b = averages(layer.state)
        self.basis = np.kron(*(np.linalg.eigh(factor.numpy())[1] for factor in (b, a)))
        self.kronecker = np.diag(self.basis.T @ damped(layer, group["damping"]) @ self.basis)
        self.seen: list[np.ndarray] = []

    def take(self, gradient: Tensor) -> None:
        self.seen.append(self.basis.T @ row(gradient))

    def average(self) -> np.ndarray:
        return averaged(self.seen, self.beta1)

    def fisher(self) -> np.ndarray:
        """N times the variance about what was foreseen, the share that counts."""
        surprises = [
            (g - averaged(self.seen[:i], self.beta1)) ** 2 for i, g in enumerate(self.seen) if i
        ]
        return self.share * (averaged(surprises, self.beta2) if surprises else 0.0 * self.kronecker)

    def curvature(self) -> np.ndarray:
        return np.maximum(self.kronecker, self.fisher())

    def deviation(self) -> np.ndarray:
        return np.sqrt(averaged([g * g for g in self.seen], self.beta2)) + 1e-8


class DenseStep:
    """Both directions of all layers and what they are measured by, in the layers' eigenbases."""

    def __init__(self, references: list[Dense]) -> None:
        self.references = references
        self.m = np.concatenate([one.average() for one in references])
        self.c = np.concatenate([one.curvature() for one in references])
        self.deviation = np.concatenate([one.deviation() for one in references])
        self.natural, self.adam = self.m / self.c, self.m / self.deviation

    def cosines(self, gradients: list[Tensor]) -> list[float]:
        """Of gradients that have not been taken yet."""
        pairs = zip(self.references, gradients, strict=True)
        g = np.concatenate([one.basis.T @ row(gradient) for one, gradient in pairs])
        found = []
        for metric in (self.c, self.deviation):
            left, right = g / np.sqrt(metric), self.m / np.sqrt(metric)
            found.append(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))
        return found

    def back(self, numbers: np.ndarray) -> np.ndarray:
        """From the eigenbases."""
        sizes = np.cumsum([len(one.kronecker) for one in self.references])[:-1]
        parts = zip(self.references, np.split(numbers, sizes), strict=True)
        return np.concatenate([one.basis @ part for one, part in parts])


def next_step(references: list[Dense], gradients: list[Tensor]) -> DenseStep:
    for one, gradient in zip(references, gradients, strict=True):
        one.take(gradient)
    return DenseStep(references)


# --- the natural gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_an_infinite_radius_is_the_dense_natural_gradient(
    damping: float, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kl_clip=math.inf, which SNOpt turns into None: nothing is measured, nothing adapted."""
    monkeypatch.setattr(trust_region, "VARIANCE_SHARE", 0.0)
    group = group_of(momentum=momentum, damping=damping, kl_clip=None)
    layers = awkward_layers(group)
    history: list[list[np.ndarray]] = [[], []]
    for _ in range(4):
        gradients = random_gradients(layers)
        updates, report = updates_for(layers, gradients, group)
        for layer, seen, g, update in zip(layers, history, gradients, updates, strict=True):
            seen.append(row(g))
            expected = np.linalg.solve(damped(layer, damping), averaged(seen, momentum))
            np.testing.assert_allclose(row(update), expected, rtol=1e-5)
        assert report == {}
    assert (group["kl_clip"], group["travelled"]) == (None, 0.0)
    assert "adam_lr" not in group


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("fisher_scale", [None, 64.0, 1.0 / 64.0])
def test_the_curvature_is_no_less_than_the_variance_of_the_gradients(
    momentum: float, fisher_scale: float | None
) -> None:
    group = group_of(momentum=momentum, kl_clip=None)
    layers = awkward_layers(group, fisher_scale)
    references = [Dense(layer, group) for layer in layers]
    higher = []
    for step in range(6):
        gradients = random_gradients(layers)
        expected = next_step(references, gradients)
        higher.append([np.mean(one.fisher() > one.kronecker) for one in references])
        updates, _ = updates_for(layers, gradients, group)
        assert not step or 0.0 < np.mean(higher[-1]) < 1.0
        np.testing.assert_allclose(joined(updates), expected.back(expected.natural), rtol=1e-5)
    assert higher[0] == [0.0, 0.0]  # the first gradient surprises nobody


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 8.0), ("sum", 1.0 / 8.0)])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_variance_counts_as_often_as_there_are_samples(
    reduction: str, scale: float, parts: int
) -> None:
    """Of one sample's gradient, whatever the loss and in how many parts the batch arrives."""
    model = plain()
    optimizer = SNOpt(model, reduction=reduction)
    (x, y), whole = batch(0), 8.0 if reduction == "mean" else 1.0
    for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
        ((model(part_x) - part_y).square().sum() / whole).backward()
    optimizer.step()
    for layer in model[::2]:
        assert optimizer.state[layer.weight]["fisher_scale"] == scale


def test_the_noise_of_any_number_of_samples_says_the_same_of_the_curvature() -> None:
    """A mean over N samples has an Nth of one sample's variance, a sum N times of it."""

    def last_update(shrunk: float, fisher_scale: float) -> Tensor:
        torch.manual_seed(1)
        group = group_of(momentum=0.6, kl_clip=None)
        layer = layer_with(spd(5, 1e-2, 1e1), spd(4, 1e-2, 1e1))
        layer.state["fisher_scale"] = fisher_scale
        refreshed(layer, group)
        for _ in range(8):
            (g,) = random_gradients([layer])
            ((update,), _) = updates_for([layer], [g * shrunk], group)
        return update / shrunk

    one = last_update(1.0, 1.0)
    assert relative_error(last_update(1.0 / 8.0, 64.0), one) < 1e-12
    assert relative_error(last_update(8.0, 1.0 / 64.0), one) < 1e-12
    assert relative_error(last_update(1.0 / 8.0, 1.0), one) > 1e-1


# --- both directions ------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.05, 1.0, 7.0])
@pytest.mark.parametrize("kappa", [1e-4, 2e-2])
def test_a_step_is_both_directions_each_within_its_radius(lr: float, kappa: float) -> None:
    """Over all layers together: ν² ⟨d, C d⟩ ≤ κ, and μ² ⟨d, √v d⟩ is Adam's, unless lr is less."""
    group = group_of(lr=lr, kl_clip=kappa, momentum=0.6)
    layers = awkward_layers(group, 16.0)
    references = [Dense(layer, group) for layer in layers]
    travelled, shortened = 0.0, 0
    for _ in range(6):
        gradients = random_gradients(layers)
        d = next_step(references, gradients)
        updates, report = updates_for(layers, gradients, group)
        length = d.natural @ (d.c * d.natural)
        nu = min(lr, math.sqrt(group["kl_clip"] / length))
        mu = group["adam_lr"] * min(lr, 1.0)
        assert lr * report["clip_factor"] == pytest.approx(nu, rel=1e-6)
        assert lr * report["adam_factor"] == pytest.approx(mu, rel=1e-6)
        moved = lr * joined(updates)
        np.testing.assert_allclose(moved, d.back(nu * d.natural + mu * d.adam), rtol=1e-5)
        travelled, shortened = travelled + nu**2 * length, shortened + (nu < lr)
    assert group["travelled"] == pytest.approx(travelled, rel=1e-6)
    assert shortened == 6 or lr < 1.0


@pytest.mark.parametrize("lr", [0.1, 1.0, 7.0])
def test_at_first_both_are_equally_long_in_the_metric_of_the_curvature(lr: float) -> None:
    group = group_of(lr=lr, kl_clip=1e-3)
    layers = awkward_layers(group)
    gradients = random_gradients(layers)
    d = next_step([Dense(layer, group) for layer in layers], gradients)
    _, report = updates_for(layers, gradients, group)
    nu, mu = lr * report["clip_factor"], lr * report["adam_factor"]
    assert nu**2 * (d.natural @ (d.c * d.natural)) == pytest.approx(1e-3, rel=1e-6)
    assert mu**2 * (d.adam @ (d.c * d.adam)) == pytest.approx(1e-3, rel=1e-6)
    assert mu == pytest.approx(min(lr, 1.0) * group["adam_lr"], rel=1e-6)
    assert group["kl_clip"] == 1e-3


def test_a_natural_step_is_never_longer_than_the_learning_rate() -> None:
    group = group_of(lr=0.3, kl_clip=FREE, adam_lr=0.0)
    layers = awkward_layers(group)
    gradients = random_gradients(layers)
    d = next_step([Dense(layer, group) for layer in layers], gradients)
    updates, report = updates_for(layers, gradients, group)
    np.testing.assert_allclose(joined(updates), d.back(d.natural), rtol=1e-5)
    assert (report["clip_factor"], report["adam_factor"]) == (1.0, 0.0)
    length = d.natural @ (d.c * d.natural)
    assert group["travelled"] == pytest.approx(0.09 * length, rel=1e-6)


def test_adams_part_is_torchs_adam_in_the_eigenbasis() -> None:
    group = group_of(momentum=0.6)
    layers = awkward_layers(group)
    references = [Dense(layer, group) for layer in layers]
    turned = [nn.Parameter(torch.zeros(len(one.kronecker))) for one in references]
    adam = torch.optim.Adam(turned, 1.0, betas=(0.6, 0.8), eps=1e-8)
    for _ in range(6):
        gradients = random_gradients(layers)
        d = next_step(references, gradients)
        before = [p.detach().clone() for p in turned]
        for p, one in zip(turned, references, strict=True):
            p.grad = torch.from_numpy(one.seen[-1])
        adam.step()
        direction = joined([old - p.detach() for old, p in zip(before, turned, strict=True)])
        updates, report = updates_for(layers, gradients, group)
        rest = joined(updates) - report["clip_factor"] * d.back(d.natural)
        expected = report["adam_factor"] * d.back(direction)
        np.testing.assert_allclose(rest, expected, rtol=1e-5, atol=1e-9 * abs(expected).max())


def adams_move(lr: float) -> np.ndarray:
    """A first step with next to nothing of the natural gradient."""
    torch.manual_seed(3)
    group = group_of(lr=lr, kl_clip=1e-40, adam_lr=1e-2)
    layers = awkward_layers(group)
    updates, _ = updates_for(layers, random_gradients(layers), group)
    return lr * joined(updates)


def test_adams_part_is_as_long_whatever_the_learning_rate_from_1_on() -> None:
    one = adams_move(1.0)
    assert np.linalg.norm(one) > 1e-3
    for lr in (2.0, 30.0):
        np.testing.assert_allclose(adams_move(lr), one, rtol=1e-9)


def test_adams_part_is_proportional_to_learning_rates_below_1() -> None:
    for lr in (0.5, 1e-3):
        np.testing.assert_allclose(adams_move(lr), lr * adams_move(1.0), rtol=1e-9)


def test_a_learning_rate_of_0_moves_nothing() -> None:
    model = Classifier()
    before = flat(model)
    optimizer = SNOpt(model, lr=0.0)
    train(model, optimizer, range(EARLY + 3))
    assert torch.equal(flat(model), before)
    group = optimizer.param_groups[0]
    assert all(math.isfinite(group[radius]) for radius in (*RADII, "travelled"))


# --- moments --------------------------------------------------------------------------------------


def test_moments_turn_with_the_basis() -> None:
    """The first one is the same in the weights' own basis; variances are those of a rotation."""
    group = group_of(momentum=0.6)
    layers = awkward_layers(group)
    for _ in range(5):
        updates_for(layers, random_gradients(layers), group)
    for layer in layers:
        state = layer.state
        old = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq", "variance")}
        before = np.kron(state["U_B"].numpy(), state["U_A"].numpy())
        state["A"], state["B"] = spd(len(state["U_A"])), spd(len(state["U_B"]))
        refreshed(layer, group)
        after = np.kron(state["U_B"].numpy(), state["U_A"].numpy())
        turn = after.T @ before
        assert np.linalg.norm(turn - np.eye(len(turn))) > 1.0
        np.testing.assert_allclose(after @ row(state["exp_avg"]), before @ row(old["exp_avg"]))
        for key in ("exp_avg_sq", "variance"):
            full = turn @ np.diag(row(old[key])) @ turn.T
            np.testing.assert_allclose(row(state[key]), np.diag(full), rtol=1e-10)


def test_a_layer_that_joins_later_does_not_disturb_the_others() -> None:
    group, alone_group = group_of(momentum=0.6), group_of(momentum=0.6)
    layers = awkward_layers(group)
    alone = [copy.deepcopy(layers[0])]
    references = [Dense(layer, group) for layer in layers]
    for step in range(6):
        gradients = random_gradients(layers)
        taking = 1 if step < 3 else 2
        cosines = [0.0, 0.0]
        if step:
            known = references[: 1 if step < 4 else 2]
            cosines = DenseStep(known).cosines(gradients[: len(known)])
        d = next_step(references[:taking], gradients[:taking])
        updates, report = updates_for(layers[:taking], gradients[:taking], group)
        assert report["cosine"] == pytest.approx(cosines[0], rel=1e-6)
        assert report["adam_cosine"] == pytest.approx(cosines[1], rel=1e-6)
        both = report["clip_factor"] * d.natural + report["adam_factor"] * d.adam
        np.testing.assert_allclose(joined(updates), d.back(both), rtol=1e-5)
        if step < 4:  # what it would have been without the other layer, joining included
            _, other = updates_for(alone, gradients[:1], alone_group)
            assert (group["kl_clip"], group["adam_lr"]) == pytest.approx(
                (alone_group["kl_clip"], alone_group["adam_lr"]), rel=1e-12
            )
            assert report["cosine"] == pytest.approx(other["cosine"], rel=1e-12)


# --- the radii ------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_the_cosines_are_those_of_the_dense_metrics(momentum: float) -> None:
    group = group_of(kl_clip=1e-3, momentum=momentum)
    layers = awkward_layers(group, 16.0)
    references = [Dense(layer, group) for layer in layers]
    gradients = random_gradients(layers)
    _, report = updates_for(layers, gradients, group)
    assert (report["cosine"], report["adam_cosine"]) == (0.0, 0.0)
    seen = []
    for _ in range(6):
        last = next_step(references, gradients)
        gradients = random_gradients(layers)
        expected = last.cosines(gradients)
        _, report = updates_for(layers, gradients, group)
        seen.append([report["cosine"], report["adam_cosine"]])
        assert seen[-1] == pytest.approx(expected, rel=1e-6)
    assert all(min(column) < 0.0 < max(column) for column in zip(*seen, strict=True))


def followed(radius: float, cosine: float, step: int) -> float:
    settled = 1.0 + step / SETTLE
    return radius * math.exp(RATE / settled * (cosine - AIM / settled))


def followed_lr(adam_lr: float, cosine: float, step: int) -> float:
    """Adam's learning rate, whose square does as the radius."""
    return math.sqrt(followed(adam_lr**2, cosine, step))


def test_the_radii_follow_the_cosines_at_a_falling_rate_and_aim() -> None:
    group = group_of(kl_clip=1e-4)
    layers = awkward_layers(group)
    updates_for(layers, random_gradients(layers), group)
    assert group["kl_clip"] == 1e-4
    for step in (1, 2, 30, 300, 3000):
        group |= {"step": step, "kl_clip": 1e-4, "adam_lr": 3e-4}
        _, report = updates_for(layers, random_gradients(layers), group)
        assert report["cosine"] != pytest.approx(report["adam_cosine"], rel=1e-3)
        expected = (
            followed(1e-4, report["cosine"], step),
            followed_lr(3e-4, report["adam_cosine"], step),
        )
        assert (group["kl_clip"], group["adam_lr"]) == pytest.approx(expected, rel=1e-12)
        assert [report[radius] for radius in RADII] == [group[radius] for radius in RADII]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_radii_stay_in_their_ranges(sign: float) -> None:
    """The same gradient again and again, or its opposite: the cosines are ±1."""
    group = group_of(kl_clip=1e-5, damping=1e-20)
    layer = refreshed(layer_with(spd(4, 1e-1, 1e1), spd(3, 1e-1, 1e1)), group)
    (g,) = random_gradients([layer])
    updates_for([layer], [g], group)
    adam = group["adam_lr"]
    for step in range(1, 31):
        group["step"] = 1  # at full rate
        _, report = updates_for([layer], [g * sign**step], group)
        assert RADIUS_RANGE[0] <= group["kl_clip"] <= RADIUS_RANGE[1]
        adam = followed_lr(adam, sign, 1)
        assert group["adam_lr"] == pytest.approx(adam, rel=1e-6)
    assert [report["cosine"], report["adam_cosine"]] == pytest.approx([sign, sign], rel=1e-6)
    assert group["kl_clip"] == RADIUS_RANGE[1 if sign > 0.0 else 0]
    # Of Adam's, nobody knows the unit.
    assert group["adam_lr"] > 1e5 if sign > 0.0 else group["adam_lr"] < RADIUS_RANGE[0]


def test_gradients_of_zero_or_not_a_number_leave_the_radii_alone() -> None:
    group = group_of()
    layers = awkward_layers(group)
    gradients = random_gradients(layers)
    updates_for(layers, gradients, group)
    before = [group[radius] for radius in RADII]
    zeros = [torch.zeros_like(g) for g in gradients]
    for new in (zeros, zeros, gradients):  # after a step of zero, no gradient speaks of it
        updates, report = updates_for(layers, new, group)
        assert all(u.any() == (new is gradients) for u in updates)
        assert (report["cosine"], report["adam_cosine"]) == (0.0, 0.0)
        assert [group[radius] for radius in RADII] == before
    _, report = updates_for(layers, [g * math.inf for g in gradients], group)
    assert not math.isfinite(report["cosine"])
    assert not math.isfinite(report["adam_cosine"])
    assert [group[radius] for radius in RADII] == before
    updates_for(layers, gradients, group)
    assert [group[radius] for radius in RADII] == before


def test_a_gradient_with_nothing_of_the_last_step_leaves_the_radii_alone() -> None:
    """The one in the first layer, the other in the second: the cosine is exactly 0."""
    group = group_of()
    layers = awkward_layers(group)
    first, second = random_gradients(layers)
    updates_for(layers, [first, torch.zeros_like(second)], group)
    before = [group[radius] for radius in RADII]
    updates, report = updates_for(layers, [torch.zeros_like(first), second], group)
    assert (report["cosine"], report["adam_cosine"]) == (0.0, 0.0)
    assert [group[radius] for radius in RADII] == before
    assert updates[1].any()


class Quadratic:
    """½ ⟨θ − θ*, B (θ − θ*) A⟩ in the layer's own metric: a natural step of 1 is the way to θ*."""

    def __init__(self, noise: float = 0.0, seed: int = 0, **settings: Any) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.noise, self.group = noise, group_of(**{"damping": 1e-12, **settings})
        self.layer = layer_with(self.spread(5), self.spread(4))
        refreshed(self.layer, self.group)
        self.metric = damped(self.layer, self.group["damping"])
        self.roots = [torch.linalg.cholesky(average) for average in averages(self.layer.state)]
        self.apart = self.whitened(self.normal(), -1)  # one nat from the minimum, about

    def spread(self, size: int) -> Tensor:
        q = torch.linalg.qr(torch.randn(size, size, generator=self.generator)).Q
        return (q * torch.logspace(-2, 1, size)) @ q.T

    def normal(self) -> Tensor:
        return torch.randn(4, 5, generator=self.generator)

    def whitened(self, matrix: Tensor, power: int) -> Tensor:
        """A matrix with covariance I to one with covariance (B ⊗ A)^power."""
        a, b = self.roots
        if power == 1:
            return b @ matrix @ a.T
        return torch.linalg.inv(b).T @ matrix @ torch.linalg.inv(a)

    def loss(self) -> float:
        return float(0.5 * row(self.apart) @ self.metric @ row(self.apart))

    def step(self) -> dict[str, Any]:
        a, b = averages(self.layer.state)
        g = b @ self.apart @ a
        if self.noise:
            g = g + self.noise * self.whitened(self.normal(), 1)
        (update,), report = updates_for([self.layer], [g], self.group)
        self.apart = self.apart - self.group["lr"] * update
        return report


def test_a_natural_step_beyond_the_minimum_shrinks_its_radius() -> None:
    problem = Quadratic(lr=1.8, kl_clip=FREE, adam_lr=0.0)
    before = problem.loss()
    problem.step()
    assert problem.loss() == pytest.approx(0.64 * before, rel=1e-3)  # (1 − 1.8)²
    problem.group["kl_clip"] = 1e-3
    report = problem.step()
    assert report["cosine"] == pytest.approx(-1.0, abs=1e-4)
    assert report["kl_clip"] == pytest.approx(followed(1e-3, -1.0, 1), rel=1e-3)


def test_an_adam_step_beyond_the_minimum_shrinks_its_radius() -> None:
    problem = Quadratic(kl_clip=1e-40, adam_lr=1e8)
    before = problem.loss()
    problem.step()
    assert problem.loss() > before
    report = problem.step()
    assert report["adam_cosine"] < -0.1
    expected = followed_lr(1e8, report["adam_cosine"], 1)
    assert report["adam_lr"] == pytest.approx(expected, rel=1e-9)
    assert report["adam_lr"] < 0.9e8


def test_steps_that_are_too_short_let_both_radii_grow() -> None:
    problem = Quadratic(kl_clip=1e-9)
    problem.step()
    adam = problem.group["adam_lr"]
    report = problem.step()
    assert [report["cosine"], report["adam_cosine"]] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert report["kl_clip"] == pytest.approx(followed(1e-9, 1.0, 1), rel=1e-2)
    assert report["adam_lr"] == pytest.approx(followed_lr(adam, 1.0, 1), rel=1e-2)


def test_the_minimum_of_a_quadratic_is_found_from_any_radius() -> None:
    for kappa in (1e-6, 1e-4, 1e-2):
        problem = Quadratic(kl_clip=kappa)
        before = problem.loss()
        for _ in range(100):
            problem.step()
        assert problem.loss() < 1e-6 * before


def test_the_radii_find_their_way_from_starts_two_decades_apart() -> None:
    """With gradients that are noisy, as those of batches are."""
    radii, losses = [], []
    for kappa in (1e-4, 1e-2):
        problem = Quadratic(noise=0.3, kl_clip=kappa, momentum=0.6, alpha=0.95)
        before = problem.loss()
        for _ in range(150):
            problem.step()
        radii.append([problem.group[radius] for radius in RADII])
        losses.append(problem.loss())
    for one, other in zip(*radii, strict=True):
        assert 1.0 / 3.0 < one / other < 3.0
    assert 1.0 / 3.0 < losses[0] / losses[1] < 3.0
    assert max(losses) < 0.1 * before


@pytest.mark.parametrize("bias", [True, False])
def test_the_natural_path_does_not_depend_on_the_units_of_a_layer(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs 1000 times as large, weights a thousandth: the same functions, where λ is nothing.

    With a bias that changes the eigenbasis, and the variance within it.
    """

    def infinite(states: list[dict[str, Any]], beta2: float) -> list[Tensor]:
        return [torch.full_like(state["exp_avg_sq"], math.inf) for state in states]

    monkeypatch.setattr(trust_region, "deviations", infinite)  # Adam's part is nothing
    if bias:
        monkeypatch.setattr(trust_region, "VARIANCE_SHARE", 0.0)
    scale = 1000.0
    one = nn.Sequential(nn.Linear(2, 3, bias=bias), nn.Tanh(), nn.Linear(3, 2))
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[0].weight /= scale
    settings = {"damping": 1e-24, "curvature": "empirical", "factor_decay": 0.0}
    optimizers = [SNOpt(model, **settings) for model in (one, other)]
    start = flat(one)
    for step in range(12):
        x, y = batch(step, 64)
        outputs = []
        for model, optimizer, inputs in zip((one, other), optimizers, (x, scale * x), strict=True):
            optimizer.zero_grad()
            outputs.append(model(inputs))
            (outputs[-1] - y).square().sum(1).mean().backward()
            optimizer.step()
        assert relative_error(outputs[1].detach(), outputs[0].detach()) < 1e-6
    assert relative_error(flat(one), start) > 1e-2
    radii = [optimizer.param_groups[0]["kl_clip"] for optimizer in optimizers]
    assert radii[0] == pytest.approx(radii[1], rel=1e-5)
    assert radii[0] != SNOpt(plain()).param_groups[0]["kl_clip"]


# --- refreshes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "since", "travelled", "due"),
    [
        (0, None, None, True),
        (EARLY - 1, EARLY - 2, 0.0, True),
        (EARLY, EARLY - 1, 0.0, False),
        (EARLY + 10, EARLY - 1, 0.99 * STALE, False),
        (EARLY + 10, EARLY - 1, STALE, True),
        (EARLY + 18, EARLY - 1, 0.0, False),
        (EARLY + 19, EARLY - 1, 0.0, True),
        (EARLY + 5, None, None, False),
        (1000, None, None, True),
    ],
)
def test_when_a_refresh_is_due(
    step: int, since: int | None, travelled: float | None, due: bool
) -> None:
    group = {"step": step, "update_freq": 20}
    if since is not None:
        group |= {"refreshed": since, "travelled": travelled}
    assert is_due(group) is due


def refreshes(model: nn.Module, optimizer: SNOpt, steps: int) -> list[int]:
    """Numbers of the steps that refresh the curvature."""
    found = []
    for step in range(steps):
        if optimizer._collectors[0].active:
            found.append(step)
        train(model, optimizer, range(step, step + 1))
        assert optimizer.param_groups[0]["refreshed"] == found[-1]
    return found


@pytest.mark.parametrize("settings", [{"lr": 1e-6}, {"kl_clip": math.inf, "lr": 1e-3}], ids=str)
def test_short_steps_let_the_curvature_be_as_old_as_it_may(settings: dict[str, float]) -> None:
    model = plain()
    found = refreshes(model, SNOpt(model, **settings, update_freq=7), 40)
    first = EARLY - 1
    assert found == [*range(EARLY), first + 7, first + 14, first + 21, first + 28]


def test_the_lengths_of_steps_call_for_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A radius that stays: two fifths of STALE with every step, so that three make it old."""
    monkeypatch.setattr(trust_region, "RATE", 0.0)
    model = plain()
    optimizer = SNOpt(model, kl_clip=0.4 * STALE, lr=100.0)
    assert refreshes(model, optimizer, 24) == [*range(EARLY), 12, 15, 18, 21]
    assert float(optimizer.report["clip_factor"]) < 1.0
    assert optimizer.param_groups[0]["travelled"] == pytest.approx(1.2 * STALE, rel=1e-9)


# --- curvature='auto' -----------------------------------------------------------------------------


def run(loss_fn: Any, steps: int = 14, between: Any = None, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Classifier()
    optimizer = SNOpt(model, **settings)
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        if between is not None:
            between(optimizer)
        loss.backward()
        optimizer.step()
    return model, optimizer


def seeded(**options: Any) -> nn.Module:
    return torchdyn_snopt.MSELoss(generator=torch.Generator().manual_seed(5), **options)


def test_auto_is_mc_with_losses_that_have_seeds() -> None:
    """In the field and outside of it, to the bit, with the same draws."""
    (auto, optimizer), (mc, reference) = run(seeded()), run(seeded(), curvature="mc")
    assert optimizer.param_groups[0]["curvature"] == "auto"
    field = auto.node.vf.vf
    for layer in (auto.encoder, auto.head, field.first, field.second):
        assert {"U_A", "U_B"} < optimizer.state[layer.weight].keys()
    for p, q in zip(auto.parameters(), mc.parameters(), strict=True):
        for key in {"U_A", "U_B"} & reference.state[q].keys():
            assert torch.equal(optimizer.state[p][key], reference.state[q][key])
    assert torch.equal(flat(auto), flat(mc))
    empirical, _ = run(seeded(), curvature="empirical")
    assert relative_error(flat(auto), flat(empirical)) > 1e-4


def test_auto_is_empirical_with_any_other_loss() -> None:
    (auto, optimizer), (empirical, _) = run(nn.MSELoss()), run(nn.MSELoss(), curvature="empirical")
    for layer in (auto.encoder, auto.head, auto.node.vf.vf.first, auto.node.vf.vf.second):
        assert {"U_A", "U_B"} < optimizer.state[layer.weight].keys()
    assert torch.equal(flat(auto), flat(empirical))


def test_auto_takes_the_curvature_that_the_loss_speaks_of() -> None:
    loss = torchdyn_snopt.MSELoss(curvature="ggn")
    (auto, _), (ggn, _) = run(loss), run(torchdyn_snopt.MSELoss(), curvature="ggn")
    assert torch.equal(flat(auto), flat(ggn))


def test_gradients_may_be_cleared_between_loss_and_backward_pass() -> None:
    def clear(optimizer: SNOpt) -> None:
        optimizer.zero_grad()

    (cleared, _), (usual, _) = run(seeded(), between=clear), run(seeded())
    assert torch.equal(flat(cleared), flat(usual))


def test_a_loss_without_reduction_seeds_nothing_where_nobody_insists() -> None:
    def mean_of(loss_fn: nn.Module) -> Any:
        return lambda output, y: loss_fn(output, y).mean()

    ours, _ = run(mean_of(torchdyn_snopt.MSELoss(reduction="none")))
    torchs, _ = run(mean_of(nn.MSELoss(reduction="none")))
    assert torch.equal(flat(ours), flat(torchs))


def test_the_loss_of_another_model_leaves_the_curvature_alone() -> None:
    """Evaluated while this one waits for its own, which has no seeds."""
    other, (x, y) = plain(), batch(0)

    def run_with(evaluate: bool) -> Tensor:
        torch.manual_seed(0)
        model = Classifier()
        optimizer = SNOpt(model)
        for step in range(6):
            if evaluate:
                torchdyn_snopt.MSELoss()(other(x), y).backward()
            train(model, optimizer, range(step, step + 1))
        assert "U_A" in optimizer.state[model.encoder.weight]
        return flat(model)

    assert torch.equal(run_with(True), run_with(False))


def test_an_optimizer_that_waits_does_not_stop_a_low_rank_one() -> None:
    """As in a notebook, where the one of an earlier cell is still there."""
    waiting = plain()
    first = SNOpt(waiting)
    train(waiting, first, range(3))
    model = plain()
    second = SNOpt(model, preconditioner="low_rank", damping=1.0)
    x, y = batch(0)
    losses = []
    for _ in range(2):
        second.zero_grad()
        loss = torchdyn_snopt.MSELoss()(model(x), y)
        loss.backward()
        second.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    train(waiting, first, range(3, 5))
    assert first.param_groups[0]["refreshed"] == 4


# --- parameters without a module ------------------------------------------------------------------


def test_layers_that_only_a_module_would_show_take_a_hundredth_of_the_rate() -> None:
    model = Classifier()
    optimizer = SNOpt(model.parameters())
    before = [p.detach().clone() for p in model.head.parameters()]
    train(model, optimizer, range(1))
    assert "U_A" in optimizer.state[model.node.vf.vf.first.weight]
    assert "U_A" not in optimizer.state[model.head.weight]
    for p, old in zip(model.head.parameters(), before, strict=True):  # Adam's first step
        moved = (p.detach() - old).abs()
        np.testing.assert_allclose(moved.numpy(), 0.01, rtol=1e-3)
    first = loss_of(model, 100).item()
    train(model, optimizer, range(1, 25))
    assert loss_of(model, 100).item() < 0.7 * first


def test_gradients_of_zero_at_first_leave_adams_radius_open() -> None:
    """As behind a head that starts at zero: it is chosen with the first gradient that is not."""
    group = group_of(kl_clip=1e-3)
    layers = awkward_layers(group)
    gradients = random_gradients(layers)
    updates_for(layers, [torch.zeros_like(g) for g in gradients], group)
    assert "adam_lr" not in group
    updates_for(layers, gradients, group)
    assert group["adam_lr"] > 0.0


def test_a_radius_that_binds_no_step_lengthens_adams_no_further() -> None:
    """Adam's first step is as long as the natural one is, or as the widest radius."""
    starts = []
    for kappa in (RADIUS_RANGE[1], 1e2, 1e6):
        torch.manual_seed(3)
        group = group_of(kl_clip=kappa)
        layers = awkward_layers(group)
        updates_for(layers, random_gradients(layers), group)
        assert group["travelled"] >= RADIUS_RANGE[1] * (1.0 - 1e-9)
        starts.append(group["adam_lr"])
    assert starts[1:] == pytest.approx(2 * [starts[0]], rel=1e-9)


def test_adams_learning_rate_has_an_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loss falls along every step, as that of separable classes does."""
    monkeypatch.setattr(trust_region, "ADAM_RANGE", ADAM_RANGE)
    group = group_of(kl_clip=1e-3)
    layers = awkward_layers(group)
    gradients = random_gradients(layers)
    for _ in range(60):
        updates_for(layers, gradients, group)
    assert group["adam_lr"] == ADAM_RANGE[1]


def test_steps_end_as_gradients_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """ε is a share of the largest root mean square of a layer's gradients so far."""
    monkeypatch.setattr(trust_region, "FLOOR", FLOOR)
    group = group_of(kl_clip=1e-3, alpha=0.5)
    layers = awkward_layers(group)
    gradients = random_gradients(layers)
    updates_for(layers, gradients, group)
    largest = max(float(g.square().mean().sqrt()) for g in gradients)
    floor = FLOOR * largest
    assert group["adam_floor"] == pytest.approx(floor, rel=1e-9)
    lengths = []
    for _ in range(60):
        gradients = [g * 0.5 for g in gradients]
        updates_for(layers, gradients, group)
        group |= {"adam_lr": 1e-2, "kl_clip": 1e-3}
        m = [layer.state["exp_avg"] for layer in layers]
        lengths.append(max(float(a.abs().max()) for a in m))
    assert group["adam_floor"] == pytest.approx(floor, rel=1e-9)
    states = [layer.state for layer in layers]
    adam = TrustRegion()._metrics(states, group, group["adam_floor"]).adam
    assert float(adam.min()) >= floor
    assert lengths[-1] / floor < 1e-6
