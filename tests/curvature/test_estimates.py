"""Integrals of curvature from the ends of the solver's steps, where an estimate will do."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

from tests.reference import relative_error
from torchdyn_snopt import solve_stats
from torchdyn_snopt.curvature.factors import CurvatureSpec, Factors
from torchdyn_snopt.curvature.recording import PassSums
from torchdyn_snopt.curvature.registry import Collector

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")

LAST = 2.0
TIMES = [0.0, 0.3, LAST]


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x) + t))


def collected(
    *specs: CurvatureSpec, tolerance: float = 1e-9, solver: str = "dopri5", times: int = 2
) -> tuple[list[Factors], NeuralODE, Tensor]:
    """Factors of the first layer for each spec, the solved model, and the gradient."""
    torch.manual_seed(0)
    field = Field()
    node = NeuralODE(
        field, solver=solver, sensitivity="snopt", atol=tolerance, rtol=tolerance,
        atol_adjoint=tolerance, rtol_adjoint=tolerance,
        return_t_eval=False,
    )  # fmt: skip
    collectors = [Collector(spec, list(field.parameters())) for spec in specs]
    for collector in collectors:
        collector.active = True
    t = torch.tensor(TIMES[-times:] if times == 2 else TIMES)
    t = torch.linspace(0.0, LAST, 41) if solver == "rk4" else t
    node(torch.randn(5, 3), t).square().sum(-1).mean().backward()
    found = []
    for collector in collectors:
        factors = collector.factors(field.inner.weight)
        assert factors is not None
        found.append(factors)
        collector.active = False
    return found, node, field.inner.weight.grad


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The weights of all evaluations that were summed."""
    weights: list[float] = []
    original = PassSums.add

    def add(self: PassSums, uses: object, weight: float, *rest: object) -> None:
        weights.append(weight)
        original(self, uses, weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(PassSums, "add", add)
    return weights


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of the steps whose two ends were summed."""
    found: list[float] = []
    original = PassSums.accept_ends

    def accept(self: PassSums, dt: float) -> None:
        found.append(dt)
        original(self, dt)

    monkeypatch.setattr(PassSums, "accept_ends", accept)
    return found


ESTIMATE, WHOLE = CurvatureSpec(estimate=True), CurvatureSpec()


@pytest.mark.parametrize("times", [2, 3])
def test_one_evaluation_a_step_and_one_a_segment_with_weights_that_add_up_to_the_horizon(
    times: int, added: list[float], lengths: list[float]
) -> None:
    _, node, gradient = collected(ESTIMATE, times=times)
    stats = solve_stats(node)
    assert stats.backward.accepted > 2 * times
    assert added == [1.0] * (stats.backward.accepted + times - 1)
    start = TIMES[-times] if times == 2 else TIMES[0]
    assert sum(lengths) == pytest.approx(LAST - start, rel=1e-12)
    added.clear()
    _, other, same = collected(WHOLE, times=times)
    assert len(added) > 4 * stats.backward.accepted
    # Neither gradient nor evaluations depend on what is collected.
    assert torch.equal(gradient, same)
    assert solve_stats(other).nfe_backward == stats.nfe_backward


def test_the_error_falls_with_the_square_of_the_steps() -> None:
    (exact,), _, _ = collected(WHOLE, tolerance=1e-13)
    errors, steps = {"A": [], "B": []}, []
    for tolerance in (1e-6, 1e-9, 1e-12):
        (found,), node, _ = collected(ESTIMATE, tolerance=tolerance)
        steps.append(solve_stats(node).backward.accepted)
        for name, seen in errors.items():
            seen.append(relative_error(getattr(found, name), getattr(exact, name)))
    assert 3 * steps[0] < 2 * steps[1] < steps[2]
    for seen in errors.values():
        assert seen[0] < 0.1
        for (few, coarse), (many, fine) in itertools.pairwise(zip(steps, seen, strict=True)):
            assert fine < 2.0 * coarse * (few / many) ** 2


def test_who_wants_the_whole_integral_gets_it() -> None:
    (whole,), _, _ = collected(WHOLE)
    (estimate, beside), _, _ = collected(ESTIMATE, WHOLE)
    for name in ("A", "B"):
        assert torch.equal(getattr(beside, name), getattr(whole, name))
        assert torch.equal(getattr(estimate, name), getattr(whole, name))


def test_methods_without_an_evaluation_at_the_end_take_all_stages() -> None:
    (estimate,), _, _ = collected(ESTIMATE, solver="rk4")
    (whole,), _, _ = collected(WHOLE, solver="rk4")
    assert torch.equal(estimate.A, whole.A)
    assert torch.equal(estimate.B, whole.B)
