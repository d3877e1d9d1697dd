"""'trust_region' against dense references: its steps, their radius, when curvature is refreshed."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchdyn_snopt
from tests.optim.problems import Classifier, batch, flat, layer_with, loss_of, plain, spd, train
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
    TrustRegion,
    is_due,
)

if TYPE_CHECKING:
    from torchdyn_snopt.optim.layers import Layer

pytestmark = pytest.mark.usefixtures("float64")

FREE = 1e30  # a radius that binds no step


def group_of(**settings: Any) -> dict[str, Any]:
    defaults = {
        "lr": 1.0, "momentum": 0.0, "damping": 1e-3, "weight_decay": 0.0, "kl_clip": FREE,
        "step": 0, "travelled": 0.0,
    }  # fmt: skip
    return {**defaults, **settings}


def awkward_layers(group: dict[str, Any]) -> list[Layer]:
    """Factors over eight decades whose eigenvectors have nothing in common; refreshed."""
    layers = [
        layer_with(spd(5, 1e-6, 1e2), spd(4, 1e-5, 1e1)),
        layer_with(spd(3, 1e-4, 1e3), spd(6, 1e-7, 1.0), bias=False),
    ]
    for layer in layers:
        TrustRegion().refresh(layer, group)
    return layers


def refreshed(layer: Layer, group: dict[str, Any]) -> Layer:
    TrustRegion().refresh(layer, group)
    return layer


def updates_for(
    layers: list[Layer], gradients: list[Tensor], group: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Any]]:
    """One step as SNOpt takes it; the updates are copied, since the layers keep them."""
    report: dict[str, Any] = {}
    with torch.no_grad():
        updates = TrustRegion().updates(layers, gradients, group, report)
    group["step"] += 1
    return [u.clone() for u in updates], report


def random_gradients(layers: list[Layer]) -> list[Tensor]:
    return [torch.randn(layer.state["B"].shape[-1], layer.state["A"].shape[-1]) for layer in layers]


def damped(layer: Layer, damping: float) -> np.ndarray:
    """The dense C of Martens & Grosse 2015, Section 6.3."""
    a, b = layer.state["A"].numpy(), layer.state["B"].numpy()
    pi = math.sqrt((np.trace(a) / len(a)) / (np.trace(b) / len(b)))
    left = b + math.sqrt(damping) / pi * np.eye(len(b))
    return np.kron(left, a + math.sqrt(damping) * pi * np.eye(len(a)))


def naturals(layers: list[Layer], gradients: list[Tensor], damping: float) -> list[np.ndarray]:
    pairs = zip(layers, gradients, strict=True)
    return [np.linalg.solve(damped(layer, damping), row(g)) for layer, g in pairs]


def row(matrix: Tensor) -> np.ndarray:
    return matrix.numpy().reshape(-1)


def squared_length(layers: list[Layer], rows: list[np.ndarray], damping: float) -> float:
    pairs = zip(layers, rows, strict=True)
    return float(sum(d @ damped(layer, damping) @ d for layer, d in pairs))


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_a_step_within_the_radius_is_the_dense_natural_gradient(damping: float) -> None:
    group = group_of(lr=0.3, damping=damping)
    layers = awkward_layers(group)
    gradients = random_gradients(layers)
    updates, report = updates_for(layers, gradients, group)
    expected = naturals(layers, gradients, damping)
    for update, d in zip(updates, expected, strict=True):
        np.testing.assert_allclose(row(update), d, rtol=1e-6)
    assert report["clip_factor"] == 1.0
    length = squared_length(layers, expected, damping)
    assert group["travelled"] == pytest.approx(0.09 * length, rel=1e-6)


@pytest.mark.parametrize("lr", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("kappa", [1e-4, 2e-2])
def test_a_clipped_step_is_as_long_as_the_radius(lr: float, kappa: float) -> None:
    """ν² ⟨d, C d⟩ = κ over all layers together, whatever lr, and in the same direction."""
    group = group_of(lr=lr, kl_clip=kappa)
    layers = awkward_layers(group)
    gradients = random_gradients(layers)
    updates, report = updates_for(layers, gradients, group)
    assert 0.0 < report["clip_factor"] < 1.0
    rows = [lr * row(u) for u in updates]
    length = squared_length(layers, rows, group["damping"])
    assert length == pytest.approx(kappa, rel=1e-8)
    assert group["travelled"] == pytest.approx(kappa, rel=1e-12)
    nu = lr * report["clip_factor"]
    for moved, d in zip(rows, naturals(layers, gradients, group["damping"]), strict=True):
        np.testing.assert_allclose(moved, nu * d, rtol=1e-6)


def test_the_average_of_gradients_is_adams() -> None:
    group = group_of(momentum=0.7)
    layers = awkward_layers(group)
    averages = [np.zeros(g.numel()) for g in random_gradients(layers)]
    for step in range(1, 5):
        gradients = random_gradients(layers)
        averages = [0.7 * m + 0.3 * row(g) for m, g in zip(averages, gradients, strict=True)]
        group["kl_clip"] = FREE  # brought back into its range after every step
        for layer in layers:
            layer.state.pop("last_update", None)
        updates, _ = updates_for(layers, gradients, group)
        for layer, update, m in zip(layers, updates, averages, strict=True):
            expected = np.linalg.solve(damped(layer, group["damping"]), m / (1.0 - 0.7**step))
            np.testing.assert_allclose(row(update), expected, rtol=1e-6)


def test_an_infinite_radius_is_natural_gradient_with_momentum() -> None:
    """kl_clip=math.inf, which SNOpt turns into None: nothing is measured, nothing adapted."""
    group = group_of(momentum=0.7, kl_clip=None)
    layers = awkward_layers(group)
    averages = [np.zeros(g.numel()) for g in random_gradients(layers)]
    for step in range(1, 5):
        gradients = random_gradients(layers)
        averages = [0.7 * m + 0.3 * row(g) for m, g in zip(averages, gradients, strict=True)]
        updates, report = updates_for(layers, gradients, group)
        for layer, update, m in zip(layers, updates, averages, strict=True):
            expected = np.linalg.solve(damped(layer, group["damping"]), m / (1.0 - 0.7**step))
            np.testing.assert_allclose(row(update), expected, rtol=1e-6)
        assert report == {}
    assert (group["kl_clip"], group["travelled"]) == (None, 0.0)


# --- the radius -----------------------------------------------------------------------------------


def test_the_cosine_is_that_of_the_dense_metric() -> None:
    group = group_of(kl_clip=1e-3)
    layers = awkward_layers(group)
    last, report = updates_for(layers, random_gradients(layers), group)
    assert report["cosine"] == 0.0
    seen = []
    for _ in range(4):
        gradients = random_gradients(layers)
        solved = naturals(layers, gradients, group["damping"])
        slope = sum(row(g) @ row(u) for g, u in zip(gradients, last, strict=True))
        dual = sum(row(g) @ d for g, d in zip(gradients, solved, strict=True))
        length = squared_length(layers, [row(u) for u in last], group["damping"])
        last, report = updates_for(layers, gradients, group)
        assert report["cosine"] == pytest.approx(slope / math.sqrt(dual * length), rel=1e-6)
        seen.append(report["cosine"])
    assert min(seen) < 0.0 < max(seen)


def test_the_radius_follows_the_cosine_at_a_falling_rate() -> None:
    group = group_of(kl_clip=1e-4)
    layers = awkward_layers(group)
    updates_for(layers, random_gradients(layers), group)
    assert group["kl_clip"] == 1e-4
    for step in (1, 2, 30, 300):
        group["step"], group["kl_clip"], before = step, 1e-4, 1e-4
        _, report = updates_for(layers, random_gradients(layers), group)
        rate = RATE / (1.0 + step / SETTLE)
        expected = before * math.exp(rate * (report["cosine"] - AIM))
        assert group["kl_clip"] == pytest.approx(expected, rel=1e-12)
        assert report["kl_clip"] == group["kl_clip"]


@pytest.mark.parametrize(("sign", "bound"), [(1.0, RADIUS_RANGE[1]), (-1.0, RADIUS_RANGE[0])])
def test_the_radius_stays_in_its_range(sign: float, bound: float) -> None:
    """The same gradient again and again, or its opposite: the cosine is ±1."""
    group = group_of(kl_clip=1e-5, damping=1e-20)
    layer = refreshed(layer_with(spd(4, 1e-1, 1e1), spd(3, 1e-1, 1e1)), group)
    (g,) = random_gradients([layer])
    for step in range(30):
        group["step"] = 1  # at full rate
        _, report = updates_for([layer], [g * sign**step], group)
        assert RADIUS_RANGE[0] <= group["kl_clip"] <= RADIUS_RANGE[1]
    assert report["cosine"] == pytest.approx(sign, rel=1e-6)
    assert group["kl_clip"] == bound


def test_gradients_of_zero_or_not_a_number_leave_the_radius_alone() -> None:
    group = group_of(kl_clip=1e-3)
    layers = awkward_layers(group)
    gradients = random_gradients(layers)
    updates_for(layers, gradients, group)
    _, report = updates_for(layers, [g * math.inf for g in gradients], group)
    assert group["kl_clip"] == 1e-3
    assert not math.isfinite(report["cosine"])
    layers = awkward_layers(group)
    zeros = [torch.zeros_like(g) for g in gradients]
    for step in range(1, 4):
        before = group["kl_clip"]
        updates, report = updates_for(layers, zeros, group)
        assert all(not u.any() for u in updates)
        assert report["cosine"] == 0.0
        assert group["kl_clip"] <= before, step


class Quadratic:
    """½ ⟨θ − θ*, B (θ − θ*) A⟩ in the layer's own metric: a step of 1 is the way to θ*."""

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.noise, self.group = noise, group_of(damping=1e-12)
        self.layer = layer_with(self.spread(5), self.spread(4))
        refreshed(self.layer, self.group)
        state = self.layer.state
        self.roots = [torch.linalg.cholesky(state[factor]) for factor in ("A", "B")]
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
        return 0.5 * squared_length([self.layer], [row(self.apart)], self.group["damping"])

    def step(self) -> dict[str, Any]:
        state = self.layer.state
        g = state["B"] @ self.apart @ state["A"]
        if self.noise:
            g = g + self.noise * self.whitened(self.normal(), 1)
        (update,), report = updates_for([self.layer], [g], self.group)
        self.apart = self.apart - self.group["lr"] * update
        return report


def test_a_step_beyond_the_minimum_shrinks_the_radius() -> None:
    problem = Quadratic()
    before = problem.loss()
    problem.group.update(lr=1.8, kl_clip=FREE)
    problem.step()
    assert problem.loss() == pytest.approx(0.64 * before, rel=1e-3)  # (1 − 1.8)²
    problem.group["kl_clip"] = 1e-3
    report = problem.step()
    assert report["cosine"] == pytest.approx(-1.0, abs=1e-4)
    rate = RATE / (1.0 + 1.0 / SETTLE)
    assert report["kl_clip"] == pytest.approx(1e-3 * math.exp(-rate * (1.0 + AIM)), rel=1e-3)


def test_a_step_that_is_too_short_lets_the_radius_grow() -> None:
    problem = Quadratic()
    problem.group["kl_clip"] = 1e-6
    problem.step()
    report = problem.step()
    assert report["cosine"] == pytest.approx(1.0, abs=1e-4)
    rate = RATE / (1.0 + 1.0 / SETTLE)
    assert report["kl_clip"] == pytest.approx(1e-6 * math.exp(rate * (1.0 - AIM)), rel=1e-3)


def test_the_minimum_of_a_quadratic_is_found_from_any_radius() -> None:
    for kappa in (1e-6, 1e-4, 1e-2):
        problem = Quadratic()
        problem.group["kl_clip"] = kappa
        for _ in range(100):
            problem.step()
        assert problem.loss() < 1e-12


def test_the_radius_finds_its_way_from_starts_two_decades_apart() -> None:
    """With gradients that are noisy, as those of batches are."""
    radii, losses = [], []
    for kappa in (1e-4, 1e-2):
        problem = Quadratic(noise=0.3)
        problem.group.update(kl_clip=kappa, momentum=0.7)
        for _ in range(150):
            problem.step()
        radii.append(problem.group["kl_clip"])
        losses.append(problem.loss())
    assert 1.0 / 3.0 < radii[0] / radii[1] < 3.0
    assert 1.0 / 3.0 < losses[0] / losses[1] < 3.0


def test_the_path_does_not_depend_on_the_units_of_a_layer() -> None:
    """Inputs 1000 times as large, weights a thousandth: the same functions, where λ is nothing."""
    scale = 1000.0
    one = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
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
        assert {"A_inv", "B_inv"} < optimizer.state[layer.weight].keys()
    for p, q in zip(auto.parameters(), mc.parameters(), strict=True):
        for key in {"A_inv", "B_inv"} & reference.state[q].keys():
            assert torch.equal(optimizer.state[p][key], reference.state[q][key])
    assert torch.equal(flat(auto), flat(mc))
    empirical, _ = run(seeded(), curvature="empirical")
    assert relative_error(flat(auto), flat(empirical)) > 1e-4


def test_auto_is_empirical_with_any_other_loss() -> None:
    (auto, optimizer), (empirical, _) = run(nn.MSELoss()), run(nn.MSELoss(), curvature="empirical")
    for layer in (auto.encoder, auto.head, auto.node.vf.vf.first, auto.node.vf.vf.second):
        assert {"A_inv", "B_inv"} < optimizer.state[layer.weight].keys()
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
        assert "A_inv" in optimizer.state[model.encoder.weight]
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
    assert "A_inv" in optimizer.state[model.node.vf.vf.first.weight]
    assert "A_inv" not in optimizer.state[model.head.weight]
    for p, old in zip(model.head.parameters(), before, strict=True):  # Adam's first step
        moved = (p.detach() - old).abs()
        np.testing.assert_allclose(moved.numpy(), 0.01, rtol=1e-3)
    first = loss_of(model, 100).item()
    train(model, optimizer, range(1, 25))
    assert loss_of(model, 100).item() < 0.7 * first
