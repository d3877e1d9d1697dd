"""A cost integrated along the solve: the right terms for x0, θ, its own parameters and every t."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

from tests.adjoint.fields import TIMES, TimeDependent
from tests.reference import reference_solve, worst_error
from torchdyn_snopt import SNOptSensitivity

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = dict.fromkeys(("rtol", "atol", "rtol_adjoint", "atol_adjoint"), 1e-9)


def square(field: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: x.square()


def in_time(field: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: (1 + torch.sin(3 * t)) * x.square().sum(1)


class Learned(nn.Module):
    """A cost with parameters of its own, one of them frozen."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))
        self.offset = nn.Parameter(torch.tensor(0.1), requires_grad=False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return (self.scale * x + self.offset).square() * t


def kinetic(field: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The field's own energy: the cost depends on θ."""
    return lambda t, x: field(t, x).square()


COSTS = {"square": square, "in time": in_time, "learned": Learned, "kinetic": kinetic}


def loss_of(states: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, states.numel()).view(states.shape)
    return (weights * states.sin()).sum()


def both(
    cost_name: str, times: list[float], **options: object
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients for x0, t, θ and the cost's parameters, by the model and by the reference."""
    field = TimeDependent()
    cost = COSTS[cost_name](field)
    settings = {"solver": "dopri5", "sensitivity": "snopt", "return_t_eval": False}
    node = NeuralODE(field, integral_loss=cost, **settings | TIGHT | options)
    x = torch.randn(4, 3, requires_grad=True)
    t = torch.tensor(times, requires_grad=True)
    own = [p for p in cost.parameters() if p.requires_grad] if isinstance(cost, nn.Module) else []
    leaves = [x, t, *field.parameters(), *own]
    ours = torch.autograd.grad(loss_of(node(x, t)), leaves, allow_unused=True)
    states, integral = reference_solve(field, x, t, cost=cost)
    return list(ours), list(torch.autograd.grad(loss_of(states) + integral, leaves))


@pytest.mark.parametrize("times", ["two", "five", "five down"])
@pytest.mark.parametrize("cost", COSTS)
def test_gradients_of_loss_and_integral(cost: str, times: str) -> None:
    ours, reference = both(cost, TIMES[times])
    assert worst_error(ours, reference) < 1e-6


@pytest.mark.parametrize("cost", COSTS)
def test_the_discrete_adjoint_integrates_the_cost_too(cost: str) -> None:
    ours, reference = both(cost, TIMES["five"], sensitivity=SNOptSensitivity(adjoint="checkpoint"))
    assert worst_error(ours, reference) < 1e-6


@pytest.mark.parametrize("solver", ["tsit5", "dopri8"])
def test_other_solvers(solver: str) -> None:
    ours, reference = both("kinetic", TIMES["two"], solver=solver)
    assert worst_error(ours, reference) < 1e-6


def test_the_full_error_norm_covers_the_costs_parameters() -> None:
    ours, reference = both("learned", TIMES["two"], sensitivity=SNOptSensitivity(error_norm="full"))
    assert worst_error(ours, reference) < 1e-6


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_checkpoint_equals_torchdyns_own_augmented_autograd(solver: str) -> None:
    """torchdyn carries the integral as a first column of the state under plain autograd."""
    field, t = TimeDependent(), torch.linspace(0.0, 1.0, 4)
    x = torch.randn(4, 3, requires_grad=True)
    leaves = [x, *field.parameters()]

    def cost(t: Tensor, x: Tensor) -> Tensor:
        return (1 + torch.sin(3 * t)) * x.square().sum(1)

    ours = NeuralODE(
        field, solver, sensitivity=SNOptSensitivity(adjoint="checkpoint"), integral_loss=cost
    )
    loss = loss_of(ours(x, t)[1])
    theirs = NeuralODE(field, solver, sensitivity="autograd", integral_loss=cost)
    states = theirs(torch.cat([torch.zeros(4, 1), x], 1), t)[1]
    reference = loss_of(states[..., 1:]) + states[-1, :, 0].sum()
    gradients = (torch.autograd.grad(value, leaves) for value in (loss, reference))
    assert worst_error(*gradients) < 1e-10
