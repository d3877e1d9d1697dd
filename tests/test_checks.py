"""`check_gradient`: small where gradients are right, large where they are wrong, and harmless."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torchdyn.core import MultipleShootingProblem, NeuralODE, ODEProblem

from tests.adjoint.fields import Mlp, TimeDependent, hutchinson
from torchdyn_snopt import (
    InvalidInputError,
    SNOptSensitivity,
    UnsupportedError,
    check_gradient,
)
from torchdyn_snopt.adjoint import weighted

if TYPE_CHECKING:
    from torch import Tensor

TIGHT = dict.fromkeys(("rtol", "atol", "rtol_adjoint", "atol_adjoint"), 1e-9)


class Last(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states[-1]


def node_of(field: nn.Module, tolerance: float = 1e-9, **options: Any) -> NeuralODE:
    settings = {"solver": "dopri5", "sensitivity": "snopt", "return_t_eval": False}
    return NeuralODE(field, **settings | dict.fromkeys(TIGHT, tolerance) | options)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "sensitivity", ["snopt", SNOptSensitivity(adjoint="checkpoint"), "autograd"], ids=str
)
def test_right_gradients_at_tight_tolerances(sensitivity: object) -> None:
    """A model of another sensitivity is checked as if it were 'snopt'."""
    node = node_of(TimeDependent(), sensitivity=sensitivity)
    report = check_gradient(node, torch.randn(4, 3), torch.tensor([0.0, 0.4, 1.0]))
    assert report.worst < 1e-6
    names = ["vf.vf.scale", "vf.vf.inner.weight", "vf.vf.inner.bias", "vf.vf.outer.weight"]
    assert [row.name for row in report.rows] == ["x", *names, "t[0]", "t[1]", "t[2]"]
    assert all(row.norm > 0 for row in report.rows)


def test_loose_tolerances_show_and_tighter_ones_help() -> None:
    field, x = TimeDependent(), torch.randn(4, 3)
    worst = [check_gradient(node_of(field, tolerance), x).worst for tolerance in (1e-1, 1e-6, 1e-8)]
    assert worst[0] > 5 * worst[1]
    assert worst[1] > 5 * worst[2]
    assert worst[2] < 1e-6


def test_a_wrong_adjoint_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the parameters' sums twice what they are, θ's rows would say so and x's would not."""
    add = weighted.WeightedSum.add
    monkeypatch.setattr(
        weighted.WeightedSum, "add", lambda self, g, weight: add(self, g, 1.1 * weight)
    )
    report = check_gradient(node_of(TimeDependent(), 1e-6), torch.randn(4, 3))
    assert report["vf.vf.scale"].autograd > 0.1
    assert report["vf.vf.scale"].differences > 0.05
    assert report["x"].autograd < 1e-4
    assert report["x"].differences < 1e-4


class Misled(torch.autograd.Function):
    """The identity with a wrong derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 1.5 * g


def test_a_field_with_a_wrong_derivative_is_found_by_differences_alone() -> None:
    class Wrong(TimeDependent):
        def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
            return super().forward(t, Misled.apply(x))

    report = check_gradient(node_of(Wrong(), 1e-6), torch.randn(4, 3))
    assert report["x"].autograd < 1e-4
    assert report["x"].differences > 1e-2


@pytest.mark.usefixtures("float64")
def test_a_whole_pipeline_with_its_loss() -> None:
    model = nn.Sequential(nn.Linear(2, 3), node_of(Mlp()), Last(), nn.Linear(3, 2))
    target = torch.tensor([0, 1, 1, 0])
    report = check_gradient(
        model, torch.randn(4, 2), torch.tensor([0.0, 1.5]),
        loss=lambda out: nn.functional.cross_entropy(out, target),
    )  # fmt: skip
    assert report.worst < 1e-6
    assert {"x", "0.weight", "3.bias", "t[1]"} <= {row.name for row in report.rows}


@pytest.mark.usefixtures("float64")
def test_integrated_costs_with_parameters() -> None:
    class Cost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return (self.scale * x).square() * t

    node = node_of(TimeDependent(), integral_loss=Cost())
    report = check_gradient(node, torch.randn(4, 3), torch.tensor([0.0, 1.0]))
    assert report.worst < 1e-6
    assert any(row.name.endswith("integral_loss.scale") for row in report.rows)


@pytest.mark.usefixtures("float64")
def test_fixed_steps_are_compared_with_the_same_steps() -> None:
    """So the discrete adjoint is exact, and the continuous one shows its discretization."""
    t, x = torch.linspace(0.0, 1.0, 5), torch.randn(4, 3)
    exact = node_of(TimeDependent(), solver="rk4", sensitivity=SNOptSensitivity("checkpoint"))
    assert check_gradient(exact, x, t).worst < 1e-7
    continuous = node_of(TimeDependent(), solver="rk4")
    assert 1e-7 < check_gradient(continuous, x, t).worst < 1e-2


def test_problems_and_solvers_of_every_kind() -> None:
    field, x, t = Mlp(), torch.randn(4, 3), torch.linspace(0.0, 1.0, 21)
    problem = ODEProblem(field, "dopri5", sensitivity="snopt", **dict.fromkeys(TIGHT, 1e-5))
    assert check_gradient(problem, x, t).worst < 1e-3
    shooting = MultipleShootingProblem(field, "mszero", sensitivity="snopt", fine_steps=8)
    assert check_gradient(shooting, x, t).worst < 1e-2
    implicit = node_of(field, 1e-5, solver="ieuler")
    assert check_gradient(implicit, x, t).worst < 0.2
    assert check_gradient(node_of(hutchinson(), 1e-6), x).worst < 1e-3


def test_unused_frozen_and_integer_inputs() -> None:
    field = TimeDependent()
    field.outer.weight.requires_grad_(False)
    field.unused = nn.Parameter(torch.ones(2))
    field.empty = nn.Parameter(torch.ones(0))
    model = nn.Sequential(nn.Embedding(5, 3), node_of(field, 1e-5))
    report = check_gradient(model, torch.tensor([0, 2, 2]))
    names = [row.name for row in report.rows]
    assert names == [
        "0.weight", "1.vf.vf.scale", "1.vf.vf.unused", "1.vf.vf.inner.weight",
        "1.vf.vf.inner.bias",
    ]  # fmt: skip
    assert report["1.vf.vf.unused"] == ("1.vf.vf.unused", 0.0, 0.0, 0.0)
    assert report.worst < 1e-3


def test_nothing_of_the_model_changes() -> None:
    field = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    node = node_of(field, 1e-3, sensitivity="adjoint")
    before = {name: value.clone() for name, value in node.state_dict().items()}
    state = torch.get_rng_state()
    check_gradient(node, torch.randn(6, 3, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in node.state_dict().items())
    assert all(p.grad is None for p in node.parameters())
    assert (node.sensitivity, node.sensalg, node.t_span) == ("adjoint", "adjoint", None)


def test_the_report_is_a_table() -> None:
    report = check_gradient(node_of(TimeDependent(), 1e-5), torch.randn(4, 3))
    lines = repr(report).splitlines()
    assert lines[0].split() == ["gradient", "for", "norm", "autograd", "differences"]
    assert [line.split()[0] for line in lines[1:-1]] == [row.name for row in report.rows]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert f"{report.worst:.1e}" in lines[-1]
    with pytest.raises(KeyError):
        report["nothing"]


def test_what_cannot_be_checked_is_refused_by_name() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(InvalidInputError, match="no ODE"):
        check_gradient(nn.Linear(3, 3), x)
    pair = nn.Sequential(node_of(Mlp(), 1e-3), Last(), node_of(Mlp(), 1e-3))
    assert check_gradient(pair, x).worst < 0.1
    with pytest.raises(InvalidInputError, match="2 ODE models"):
        check_gradient(pair, x, torch.tensor([0.0, 1.0]))
    with pytest.raises(UnsupportedError, match="leapfrog"):
        check_gradient(node_of(Mlp(2), solver="alf"), torch.randn(2, 4))
