"""Dense output: exact at the ends, exact on polynomials, of the order that it promises."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from torchdyn_snopt.solvers import TABLEAUS, Step, interpolate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")


def take_step(
    name: str, rate: Callable[[float, Tensor], Tensor], y0: Tensor, t: float, dt: float
) -> tuple[Step, Tensor]:
    """One step, and the slope at its end."""
    tableau = TABLEAUS[name]
    k = y0.new_empty(tableau.stages, y0.numel())
    for i in range(tableau.stages):
        k[i] = rate(t + tableau.c[i] * dt, y0 + dt * (torch.tensor(tableau.a[i]) @ k[:i]))
    y1 = y0 + dt * (torch.tensor(tableau.b) @ k)
    return Step(t, dt, y0, y1, k, tableau), rate(t + dt, y1)


def rotation(t: float, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]])


@pytest.mark.parametrize("name", ["dopri5", "bosh3", "rk4"])
@pytest.mark.parametrize("dt", [0.3, -0.3])
def test_the_ends_are_exact(name: str, dt: float) -> None:
    step, f1 = take_step(name, rotation, torch.tensor([1.0, 0.2]), 0.0, dt)
    torch.testing.assert_close(interpolate(step, f1, 0.0), step.y0)
    torch.testing.assert_close(interpolate(step, f1, 1.0), step.y1)


@pytest.mark.parametrize(("name", "degree"), [("dopri5", 4), ("rk4", 3), ("dopri8", 3)])
def test_polynomials_up_to_the_degree_are_reproduced(name: str, degree: int) -> None:
    """y' = p'(t): every method here integrates it exactly, and so does its interpolant."""
    powers = torch.arange(1.0, degree + 1)

    def solution(t: float) -> Tensor:
        return t**powers

    step, f1 = take_step(name, lambda t, y: powers * t ** (powers - 1), solution(0.4), 0.4, 0.6)
    for s in (0.1, 0.37, 0.5, 0.9):
        torch.testing.assert_close(
            interpolate(step, f1, s), solution(0.4 + 0.6 * s), rtol=1e-10, atol=1e-12
        )


@pytest.mark.parametrize(("name", "order"), [("dopri5", 5), ("rk4", 4)])
def test_the_error_inside_a_step_falls_with_its_length(name: str, order: int) -> None:
    def error(dt: float) -> float:
        step, f1 = take_step(name, rotation, torch.tensor([0.0, 1.0]), 0.0, dt)
        inside = [0.15, 0.3, 0.62, 0.85]
        exact = [torch.tensor([math.sin(s * dt), math.cos(s * dt)]) for s in inside]
        return max(
            float((interpolate(step, f1, s) - y).norm()) for s, y in zip(inside, exact, strict=True)
        )

    slope = math.log2(error(0.4) / error(0.1)) / 2
    assert slope == pytest.approx(order, abs=0.4)
