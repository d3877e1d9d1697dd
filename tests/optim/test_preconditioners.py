"""Updates against dense references with B ⊗ A, for factors that do not commute with anything."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError

from tests.optim.problems import layer_with, spd
from tests.reference import relative_error
from torchdyn_snopt import CurvatureError
from torchdyn_snopt.optim.layers import Layer
from torchdyn_snopt.optim.preconditioners import (
    EKFAC,
    FULL_EVERY,
    KFAC,
    MAX_FAILURES,
    KFEAdam,
    guarded_refresh,
    product,
    trust_factor,
)
from torchdyn_snopt.optim.trust_region import TrustRegion

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("float64", "no_grad")

GROUP: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.0,
    "damping": 0.03,
    "weight_decay": 0.0,
    "alpha": 0.75,
    "kl_clip": None,
}


@pytest.fixture
def no_grad() -> Iterator[None]:
    """As in SNOpt.step."""
    with torch.no_grad():
        yield


def step(preconditioner: Any, layers: list[Layer], group: dict[str, Any]) -> list[Tensor]:
    """Updates of layers whose gradients are in their parameters."""
    gradients = [layer.gradient(group["weight_decay"], 1.0) for layer in layers]
    return preconditioner.updates(layers, gradients, group, {})


def dense(layer: Layer) -> np.ndarray:
    """B ⊗ A, acting on the rows of the matrix one after the other."""
    return np.kron(layer.state["B"].numpy(), layer.state["A"].numpy())


def fresh_gradients(layer: Layer) -> None:
    for p in (layer.weight, layer.bias):
        if p is not None:
            p.grad = torch.randn_like(p)


# --- kfac -----------------------------------------------------------------------------------------


def tikhonov(layer: Layer, damping: float) -> np.ndarray:
    """The dense matrix of Martens & Grosse 2015, Section 6.3."""
    a, b = layer.state["A"].numpy(), layer.state["B"].numpy()
    pi = math.sqrt((np.trace(a) / len(a)) / (np.trace(b) / len(b)))
    left = b + math.sqrt(damping) / pi * np.eye(len(b))
    right = a + math.sqrt(damping) * pi * np.eye(len(a))
    return np.kron(left, right)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_kfac_is_the_dense_solve(bias: bool, weight_decay: float) -> None:
    layer = layer_with(spd(6, 1e-6, 1e3), spd(4, 1e-8, 1e-1), bias=bias)
    group = {**GROUP, "weight_decay": weight_decay}
    KFAC().refresh(layer, group)
    (update,) = step(KFAC(), [layer], group)
    q_u = layer.weight.grad + weight_decay * layer.weight
    if bias:
        shift = layer.bias.grad + weight_decay * layer.bias
        q_u = torch.cat([q_u, shift[:, None]], 1)
    q_u = q_u.numpy().reshape(-1)
    expected = np.linalg.solve(tikhonov(layer, GROUP["damping"] + weight_decay), q_u)
    np.testing.assert_allclose(update.numpy().reshape(-1), expected, rtol=1e-8)


def test_kfac_damping_is_shared_by_pi_whatever_the_scale_of_the_factors() -> None:
    """A → cA, B → B/c leaves A ⊗ B as it is, and so must be the update."""
    layer = layer_with(spd(5), spd(4))
    KFAC().refresh(layer, GROUP)
    (before,) = step(KFAC(), [layer], GROUP)
    layer.state["A"], layer.state["B"] = layer.state["A"] * 1e3, layer.state["B"] / 1e3
    KFAC().refresh(layer, GROUP)
    (after,) = step(KFAC(), [layer], GROUP)
    assert relative_error(after, before) < 1e-9


def test_kfac_with_dead_factors_is_damped_gradient_descent() -> None:
    """No gradient has arrived yet: B = 0. The damping alone divides the gradient."""
    layer = layer_with(spd(5, 1.0, 2.0), torch.zeros(4, 4))
    KFAC().refresh(layer, GROUP)
    (update,) = step(KFAC(), [layer], GROUP)
    grad = layer.gradient(0.0, 1.0)
    # π is held at 1e6, so that A is negligible against √λ π.
    assert relative_error(update, grad / GROUP["damping"]) < 1e-4
    layer.state["A"] = torch.zeros(5, 5)
    KFAC().refresh(layer, GROUP)
    (update,) = step(KFAC(), [layer], GROUP)
    assert relative_error(update, grad / GROUP["damping"]) < 1e-12


def test_kfac_of_groups_is_that_of_each_group() -> None:
    a, b = torch.stack([spd(4), spd(4)]), torch.stack([spd(2), spd(2, 1e-2, 1.0)])
    weight, bias = nn.Parameter(torch.randn(4, 3, 1)), nn.Parameter(torch.randn(4))
    weight.grad, bias.grad = torch.randn_like(weight), torch.randn_like(bias)
    layer = Layer("conv.weight", weight, bias, 2, {"A": a, "B": b})
    KFAC().refresh(layer, GROUP)
    (update,) = step(KFAC(), [layer], GROUP)
    assert update.shape == (2, 2, 4)
    for i in range(2):
        rows = slice(2 * i, 2 * i + 2)
        grad = torch.cat([weight.grad[rows, :, 0], bias.grad[rows, None]], 1)
        one = Layer("", weight, bias, 1, {"A": a[i], "B": b[i]})
        expected = np.linalg.solve(tikhonov(one, GROUP["damping"]), grad.numpy().reshape(-1))
        np.testing.assert_allclose(update[i].numpy().reshape(-1), expected, rtol=1e-8)


# --- ekfac ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_ekfac_is_algorithm_2_written_densely(bias: bool, weight_decay: float) -> None:
    layer = layer_with(spd(5, 1e-4, 1e2), spd(4, 1e-5, 1e1), bias=bias)
    group = {**GROUP, "weight_decay": weight_decay, "damping": 0.05}
    _, u_a = np.linalg.eigh(layer.state["A"].numpy())
    _, u_b = np.linalg.eigh(layer.state["B"].numpy())
    u = np.kron(u_b, u_a)
    s = np.diag(u.T @ dense(layer) @ u)
    EKFAC().refresh(layer, group)
    for _ in range(4):
        fresh_gradients(layer)
        (update,) = step(EKFAC(), [layer], group)
        grad = layer.gradient(weight_decay, 1.0).numpy().reshape(-1)
        s = 0.75 * s + 0.25 * (u.T @ grad) ** 2
        expected = u @ ((u.T @ grad) / (s + 0.05 + weight_decay))
        np.testing.assert_allclose(update.numpy().reshape(-1), expected, rtol=1e-8, atol=1e-10)


def test_ekfac_starts_anew_from_the_factors_at_a_refresh() -> None:
    layer = layer_with(spd(4), spd(3))
    EKFAC().refresh(layer, GROUP)
    step(EKFAC(), [layer], GROUP)
    layer.state["A"], layer.state["B"] = spd(4), spd(3)
    EKFAC().refresh(layer, GROUP)
    eigenvalues = np.sort(layer.state["S"].numpy().reshape(-1))
    np.testing.assert_allclose(eigenvalues, np.linalg.eigvalsh(dense(layer)), rtol=1e-6, atol=1e-12)


def test_ekfac_clamps_an_indefinite_factor() -> None:
    q = torch.linalg.qr(torch.randn(4, 4)).Q
    a = (q * torch.tensor([-0.3, 0.0, 1.0, 4.0])) @ q.T
    layer = layer_with(a, spd(3))
    EKFAC().refresh(layer, GROUP)
    assert (layer.state["S"] >= 0).all()
    (update,) = step(EKFAC(), [layer], GROUP)
    grad = layer.gradient(0.0, 1.0)
    assert float((update * grad).sum()) > 0
    assert torch.linalg.vector_norm(update) <= torch.linalg.vector_norm(grad) / GROUP["damping"]


# --- kfe_adam -------------------------------------------------------------------------------------

ADAM = {**GROUP, "momentum": 0.8, "alpha": 0.9, "damping": 1e-8}


@pytest.mark.parametrize("bias", [True, False])
def test_kfe_adam_is_adam_in_the_eigenbasis(bias: bool) -> None:
    """torch's own Adam on φ = U_Bᵀ θ U_A, with the gradients rotated likewise."""
    layer = layer_with(spd(5), spd(4), bias=bias)
    u_a = torch.from_numpy(np.linalg.eigh(layer.state["A"].numpy())[1])
    u_b = torch.from_numpy(np.linalg.eigh(layer.state["B"].numpy())[1])
    theta = layer.matrix(layer.weight, layer.bias).clone()
    phi = nn.Parameter(u_b.T @ theta @ u_a)
    adam = torch.optim.Adam([phi], lr=0.1, betas=(0.8, 0.9), eps=1e-8)
    KFEAdam().refresh(layer, ADAM)
    for _ in range(6):
        fresh_gradients(layer)
        (update,) = step(KFEAdam(), [layer], ADAM)
        layer.apply(update, 0.1)
        phi.grad = u_b.T @ layer.gradient(0.0, 1.0) @ u_a
        adam.step()
    moved = layer.matrix(layer.weight, layer.bias)
    assert relative_error(moved, u_b @ phi @ u_a.T) < 1e-10  # numpy's eigenvectors, not torch's
    assert relative_error(moved, theta) > 0.1


def test_the_first_moment_turns_exactly_with_the_basis() -> None:
    layer = layer_with(spd(5), spd(4))
    KFEAdam().refresh(layer, ADAM)
    step(KFEAdam(), [layer], ADAM)
    state = layer.state
    for _ in range(FULL_EVERY + 1):  # both by following and by a full decomposition
        before = state["U_B"] @ state["exp_avg"] @ state["U_A"].T
        old = state["U_A"].clone(), state["U_B"].clone()
        state["A"], state["B"] = spd(5), spd(4)
        KFEAdam().refresh(layer, ADAM)
        after = state["U_B"] @ state["exp_avg"] @ state["U_A"].T
        assert relative_error(after, before) < 1e-12
        assert relative_error(state["U_A"], old[0]) > 0.1
        assert relative_error(state["U_B"], old[1]) > 0.1
        torch.testing.assert_close(state["U_A"].T @ state["U_A"], torch.eye(5))


def test_the_second_moment_turns_as_that_of_uncorrelated_coordinates() -> None:
    """E[(R x)²] for x with diagonal second moments, by the dense B ⊗ A rotation."""
    layer = layer_with(spd(5), spd(4))
    KFEAdam().refresh(layer, ADAM)
    step(KFEAdam(), [layer], ADAM)
    state = layer.state
    second = np.diag(state["exp_avg_sq"].numpy().reshape(-1))
    old = np.kron(state["U_B"].numpy(), state["U_A"].numpy())
    state["A"], state["B"] = spd(5), spd(4)
    KFEAdam().refresh(layer, ADAM)
    turn = np.kron(state["U_B"].numpy(), state["U_A"].numpy()).T @ old
    expected = np.diag(turn @ second @ turn.T)
    np.testing.assert_allclose(state["exp_avg_sq"].numpy().reshape(-1), expected, rtol=1e-10)
    assert (state["exp_avg_sq"] >= 0).all()


def test_full_decompositions_come_every_so_many_refreshes(monkeypatch) -> None:
    layer = layer_with(spd(5), spd(4))
    original, calls = torch.linalg.eigh, []

    def eigh(matrix: Tensor) -> object:
        calls.append(done)
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    for done in range(2 * FULL_EVERY + 1):  # noqa: B007 (read by eigh)
        KFEAdam().refresh(layer, ADAM)
    assert calls == [0, 0, FULL_EVERY, FULL_EVERY, 2 * FULL_EVERY, 2 * FULL_EVERY]


# --- trust region and momentum --------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", [KFAC(), EKFAC()])
def test_the_predicted_change_stays_within_the_trust_region(preconditioner: Any) -> None:
    layers = [layer_with(spd(5), spd(4)), layer_with(spd(3), spd(6), bias=False)]
    for layer in layers:
        preconditioner.refresh(layer, GROUP)
    free = step(preconditioner, layers, GROUP)
    group = {**GROUP, "kl_clip": 1e-3}
    for layer in layers:
        preconditioner.refresh(layer, GROUP)
    clipped = step(preconditioner, layers, group)
    gradients = [layer.gradient(0.0, 1.0) for layer in layers]
    change = [float((u * g).sum()) * 0.1**2 for u, g in zip(free, gradients, strict=True)]
    assert sum(change) > 1e-3
    factor = math.sqrt(1e-3 / sum(change))
    for u, v in zip(clipped, free, strict=True):
        assert relative_error(u, factor * v) < 1e-12
    # ν is one for all layers; the bound lr² Σ ⟨C⁻¹g, g⟩ ν² ≤ clip holds with equality.
    bound = sum(c * factor**2 for c in change)
    assert bound == pytest.approx(1e-3, rel=1e-12)


def test_a_small_step_is_not_clipped_and_the_factor_is_reported() -> None:
    layer, report = layer_with(spd(4), spd(3)), {}
    KFAC().refresh(layer, GROUP)
    gradients = [layer.gradient(0.0, 1.0)]
    free = KFAC().updates([layer], gradients, GROUP, report)
    assert report == {}
    group = {**GROUP, "kl_clip": 1e9}
    (update,) = KFAC().updates([layer], gradients, group, report)
    assert float(report["clip_factor"]) == 1.0
    assert torch.equal(update, free[0])


def test_the_trust_factor_of_zero_gradients_and_a_zero_rate_is_one() -> None:
    g = [torch.randn(3, 2)]
    assert float(trust_factor(torch.tensor(0.0), 0.1, 1e-3)) == 1.0
    assert float(trust_factor(product(g, g), 0.0, 1e-3)) == 1.0
    assert float(trust_factor(product(g, [-u for u in g]), 0.1, 1e-3)) == 1.0


@pytest.mark.parametrize("preconditioner", [KFAC(), EKFAC()])
def test_momentum_is_heavy_ball_on_the_clipped_updates(preconditioner: Any) -> None:
    with_momentum = layer_with(spd(4), spd(3))
    without = Layer("", with_momentum.weight, with_momentum.bias, 1, {**with_momentum.state})
    group = {**GROUP, "kl_clip": 1e-3}
    expected = torch.zeros(3, 4)
    for layer in (with_momentum, without):
        preconditioner.refresh(layer, group)
    for _ in range(4):
        fresh_gradients(without)
        (u,) = step(preconditioner, [without], group)
        expected = 0.9 * expected + u
        (update,) = step(preconditioner, [with_momentum], {**group, "momentum": 0.9})
        assert relative_error(update, expected) < 1e-13


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", [TrustRegion(), KFEAdam(), KFAC(), EKFAC()])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_failure_keeps_the_last_good_state(preconditioner: Any, factor: str, bad: float) -> None:
    layer = layer_with(spd(5), spd(4))
    assert guarded_refresh(preconditioner, layer, ADAM)
    good = step(preconditioner, [layer], ADAM)[0].clone()
    kept = {k: v.clone() for k, v in layer.state.items() if isinstance(v, Tensor)}
    for failures in range(1, MAX_FAILURES):
        layer.state.update(A=spd(5), B=spd(4), factor_weight=1.0)
        layer.state[factor][0, 0] = bad
        assert not guarded_refresh(preconditioner, layer, ADAM)
        assert layer.state["failures"] == failures
        for key in kept.keys() - {"A", "B"}:
            assert torch.equal(layer.state[key], kept[key]), key
    # The averages that went bad are dropped, and a good refresh sets the count back.
    assert not {"A", "B", "factor_weight"} & layer.state.keys()
    layer.state.update(A=spd(5), B=spd(4), factor_weight=1.0)
    assert guarded_refresh(preconditioner, layer, ADAM)
    assert layer.state["failures"] == 0
    (update,) = step(preconditioner, [layer], ADAM)
    assert torch.isfinite(update).all()
    assert relative_error(update, good) > 1e-3


@pytest.mark.parametrize("preconditioner", [TrustRegion(), KFEAdam(), KFAC(), EKFAC()])
def test_too_many_failures_in_a_row_are_an_error_with_its_cause(preconditioner: Any) -> None:
    layer = layer_with(spd(5), spd(4))
    guarded_refresh(preconditioner, layer, ADAM)

    def spoil() -> None:
        layer.state.update(A=spd(5), B=torch.full((4, 4), math.nan), factor_weight=1.0)

    for _ in range(MAX_FAILURES - 1):
        spoil()
        guarded_refresh(preconditioner, layer, ADAM)
    spoil()
    with pytest.raises(CurvatureError, match="cannot be factorized") as caught:
        guarded_refresh(preconditioner, layer, ADAM)
    error = caught.value
    assert isinstance(error.__cause__, LinAlgError)
    assert (error.layer, error.failures) == ("some.weight", MAX_FAILURES)
    assert math.isnan(error.norms["B"])
    assert error.norms["A"] > 0
    for text in (
        "layer 'some.weight'",
        "5 failures in a row",
        "not finite: B",
        "do this: look for",
    ):
        assert text in str(error)


def test_a_first_refresh_that_fails_is_an_error_at_once() -> None:
    layer = layer_with(spd(3), torch.full((2, 2), math.nan))
    with pytest.raises(CurvatureError, match="1 failures in a row"):
        guarded_refresh(KFAC(), layer, GROUP)
    assert "ready" not in layer.state
