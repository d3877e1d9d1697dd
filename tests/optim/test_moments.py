"""Adam's moments against torch's Adam and against sums over all gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from torchdyn_snopt.optim.moments import ADAM_EPS, absorb, corrections, deviations

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")

SHAPES = ((3, 4), (5,), (2, 3, 2))
BETAS = [(0.9, 0.999), (0.6, 0.95), (0.0, 0.5), (0.7, 0.0)]


def gradients_like(states: list[dict[str, Any]]) -> list[Tensor]:
    """Of very different sizes."""
    sizes = (1.0, 1e-3, 1e4)[: len(states)]
    return [size * torch.randn(shape) for size, shape in zip(sizes, SHAPES, strict=False)]


def weighted_sum(values: list[Tensor], beta: float) -> np.ndarray:
    """(1 − β) Σ βⁿ⁻ⁱ gᵢ."""
    return sum(
        (1.0 - beta) * beta ** (len(values) - 1 - i) * value.numpy()
        for i, value in enumerate(values)
    )


@pytest.mark.parametrize(("beta1", "beta2"), BETAS)
def test_moments_are_sums_over_all_gradients(beta1: float, beta2: float) -> None:
    states: list[dict[str, Any]] = [{}, {}, {}]
    seen: list[list[Tensor]] = [[], [], []]
    for step in range(1, 6):
        gradients = gradients_like(states)
        absorb(states, gradients, beta1, beta2)
        for state, history, g in zip(states, seen, gradients, strict=True):
            history.append(g.clone())
            squares = [old.square() for old in history]
            np.testing.assert_allclose(state["exp_avg"], weighted_sum(history, beta1), rtol=1e-9)
            np.testing.assert_allclose(state["exp_avg_sq"], weighted_sum(squares, beta2))
            assert state["adam_step"] == step


@pytest.mark.parametrize(("beta1", "beta2"), BETAS)
def test_a_step_of_theirs_is_torchs_adam(beta1: float, beta2: float) -> None:
    """States that join later among them: each is corrected for the steps of its own."""
    params = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    adam = torch.optim.Adam(params, 1.0, betas=(beta1, beta2), eps=ADAM_EPS)
    states: list[dict[str, Any]] = [{}, {}, {}]
    for step in range(9):
        taking = 1 + step // 3
        before = [p.detach().clone() for p in params]
        gradients = gradients_like(states)[:taking]
        for p, g in zip(params, gradients, strict=False):
            p.grad = g.clone()
        adam.step()
        absorb(states[:taking], gradients, beta1, beta2)
        ours = [
            state["exp_avg"] / correction / deviation
            for state, correction, deviation in zip(
                states[:taking],
                corrections(states[:taking], beta1),
                deviations(states[:taking], beta2),
                strict=True,
            )
        ]
        for move, p, old in zip(ours, params, before, strict=False):
            torch.testing.assert_close(old - p.detach(), move, rtol=1e-10, atol=1e-12)
    assert [state["adam_step"] for state in states] == [9, 6, 3]


def test_corrections_are_those_of_each_states_own_steps() -> None:
    states = [{"adam_step": steps} for steps in (1, 2, 1000)]
    assert corrections(states, 0.9) == pytest.approx([0.1, 0.19, 1.0], rel=1e-12)
    assert corrections(states, 0.0) == [1.0, 1.0, 1.0]


def test_an_average_of_equal_gradients_is_that_gradient() -> None:
    """From the first step on, and the deviation is its size, with ε added to it."""
    (g,) = gradients_like([{}])
    states: list[dict[str, Any]] = [{}]
    for _ in range(4):
        absorb(states, [g], 0.9, 0.99)
        (correction,) = corrections(states, 0.9)
        torch.testing.assert_close(states[0]["exp_avg"] / correction, g)
        for eps in (1e-8, 0.5):
            torch.testing.assert_close(deviations(states, 0.99, eps)[0], g.abs() + eps)


def test_moments_grow_in_place_and_leave_the_gradients_alone() -> None:
    states: list[dict[str, Any]] = [{}, {}]
    gradients = gradients_like(states)
    kept = [g.clone() for g in gradients]
    absorb(states, gradients, 0.0, 0.5)
    first = [state["exp_avg"] for state in states]
    second = [state["exp_avg_sq"] for state in states]
    before = [m.clone() for m in second]
    found = deviations(states, 0.5)
    for deviation in found:
        deviation.zero_()  # a tensor of its own
    assert all(torch.equal(m, old) for m, old in zip(second, before, strict=True))
    absorb(states, [2.0 * g for g in gradients], 0.0, 0.5)
    for state, m, v, g in zip(states, first, second, kept, strict=True):
        assert state["exp_avg"] is m
        assert state["exp_avg_sq"] is v
        torch.testing.assert_close(m, 2.0 * g)
        torch.testing.assert_close(v, 2.25 * g.square())
    assert all(torch.equal(g, old) for g, old in zip(gradients, kept, strict=True))
