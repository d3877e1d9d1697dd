"""The recursive adjoint: right at tight tolerances, costly, and worse where the field contracts."""

from __future__ import annotations

import functools

import pytest
import torch
import torchdiffeq

from tests.adjoint.theory import Timed, Timeless, blocks, dense_reference, relative
from torchdyn_snopt.adjoint.recursive import recursive_adjoint
from torchdyn_snopt.adjoint.second_order import second_order_adjoint
from torchdyn_snopt.solvers import SolveStats

pytestmark = pytest.mark.usefixtures("float64")


def quartic(x):
    return ((x - 0.5) ** 4).reshape(-1, 2).sum(1).mean()


def cost(t, x, u):
    return 0.1 * (1 + t) * (x**2).sum() * (u[0] ** 2).sum()


@pytest.mark.parametrize(("timed", "with_cost"), [(False, False), (True, True)])
def test_it_gives_the_hessian(timed, with_cost):
    field, x0 = (Timed if timed else Timeless)(2, 2), torch.randn(2, 2)
    running = cost if with_cost else None
    dense = dense_reference(field, x0, 1.0, quartic, running)
    result = recursive_adjoint(
        field, x0, (0.0, 1.0), quartic, running_cost=running, method="dopri8", rtol=1e-6, atol=1e-7
    )
    xx, xu, uu = blocks(dense.hessian, 2, 2)
    assert relative(result.Qu, dense.gradient[4:]) < 1e-5
    assert relative(result.Qxx, xx) < 1e-5
    assert relative(result.Qxu, xu) < 1e-5
    assert relative(result.Quu, uu) < 1e-5


def test_without_a_batch():
    field, x0 = Timeless(2, 2), torch.randn(2)
    dense = dense_reference(field, x0, 1.0, quartic)
    result = recursive_adjoint(
        field, x0, (0.0, 1.0), quartic, method="dopri8", rtol=1e-6, atol=1e-7
    )
    assert relative(result.Qxx, dense.hessian[:2, :2]) < 1e-5
    assert relative(result.Quu, dense.hessian[2:, 2:]) < 1e-5


def test_it_needs_two_solves_for_each_row():
    field, stats = Timeless(2, 2), SolveStats()
    recursive_adjoint(field, torch.randn(2), (0.0, 1.0), quartic, method="rk4", stats=stats)
    n = sum(p.numel() for p in field.parameters())
    # One for the gradient; for each row the adjoint's adjoint and the adjoint of the forward solve.
    assert stats.nfe_backward == 4 * (1 + 2 * (n + 2))
    assert stats.nfe_forward == 4


def test_an_adams_method_of_torchdiffeq_can_be_passed():
    field, x0 = Timeless(2, 2), torch.randn(2)
    adams = functools.partial(
        torchdiffeq.odeint, method="implicit_adams", options={"step_size": 0.05}, rtol=1e-9
    )
    result = recursive_adjoint(field, x0, (0.0, 1.0), quartic, method=adams)
    dense = dense_reference(field, x0, 1.0, quartic)
    assert relative(result.Quu, dense.hessian[2:, 2:]) < 1e-3


class Contracting(Timeless):
    """A tanh network minus rates · x."""

    def __init__(self, *rates: float) -> None:
        super().__init__(2, 1)
        self.register_buffer("rates", torch.tensor(rates))

    def forward(self, t, x):
        return super().forward(t, x) - self.rates * x


class TimedContracting(Contracting):
    """The same, not autonomous."""

    def forward(self, t, x):
        return super().forward(t, x) * (1 + 0.5 * torch.sin(2 * t))


def errors_at_1e_3(field, t1):
    """Errors of Theorem 1 (the Hessian) and of the recursion at rtol = atol = 1e-3."""
    x0 = torch.randn(2)
    solve = functools.partial(second_order_adjoint, exact=True)
    truth = solve(field, x0, (0.0, t1), quartic, method="dopri8", rtol=1e-7, atol=1e-9).Quu
    loose = {"rtol": 1e-3, "atol": 1e-3}
    ours = solve(field, x0, (0.0, t1), quartic, **loose).Quu
    theirs = recursive_adjoint(field, x0, (0.0, t1), quartic, **loose).Quu
    return relative(ours, truth), relative(theirs, truth)


@pytest.mark.parametrize(
    ("build", "t1"),
    [
        (functools.partial(Contracting, 5.0, 5.0), 2.0),
        (functools.partial(TimedContracting, 5.0, 5.0), 2.0),
    ],
    ids=["autonomous", "driven by time"],
)
def test_where_the_field_contracts_theorem_1_is_100_times_closer_at_1e_3(build, t1):
    """The recursion follows a reconstruction of x back into the expanding direction of time."""
    torch.manual_seed(0)
    ours, theirs = errors_at_1e_3(build(), t1)
    assert ours < 1e-2
    assert theirs > 100 * ours


@pytest.mark.parametrize("build", [Timeless, Timed])
def test_where_it_does_not_contract_the_recursion_is_as_close(build):
    """The solve is as well conditioned backwards as forwards; both errors are the tolerance's."""
    torch.manual_seed(0)
    ours, theirs = errors_at_1e_3(build(2, 1), 1.0)
    assert max(ours, theirs) < 1e-3
    assert theirs < 100 * ours
