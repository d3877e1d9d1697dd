"""`odeint_snopt`: torchdiffeq's shapes and meanings, tuple states, options, foreign methods."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
import torchdiffeq
from torch import nn

from tests.adjoint.fields import TimeDependent
from tests.reference import reference_solve, relative_error, worst_error
from torchdyn_snopt import (
    InvalidInputError,
    SNOptSensitivity,
    SolveStats,
    UnsupportedError,
    odeint_snopt,
)
from torchdyn_snopt.solvers import TORCHDIFFEQ_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")

T = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)


def loss_of(states: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, states.numel()).view(states.shape)
    return (weights * states.sin()).sum()


def make() -> tuple[TimeDependent, Tensor, list[Tensor]]:
    field, x = TimeDependent(), torch.randn(4, 3, requires_grad=True)
    return field, x, [x, *field.parameters()]


# --- against torchdiffeq itself -------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "dopri5", "dopri8", "bosh3", "adaptive_heun"])
@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], [1.0, 0.3]])
def test_adaptive_methods_agree_with_torchdiffeq(method: str | None, times: list[float]) -> None:
    field, x, leaves = make()
    t = torch.tensor(times, requires_grad=True)
    tolerance = 1e-4 if method == "adaptive_heun" else 1e-6
    how = {"rtol": tolerance, "atol": tolerance, "method": method}
    ours, theirs = (
        solve(field, x, t, **how) for solve in (odeint_snopt, torchdiffeq.odeint_adjoint)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    gradients = [torch.autograd.grad(loss_of(y), [t, *leaves]) for y in (ours, theirs)]
    assert worst_error(*gradients) < 3e-3


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
@pytest.mark.parametrize("step", [None, 0.1, 0.07])
def test_fixed_steps_agree_with_torchdiffeq(method: str, step: float | None) -> None:
    """On the last time, which both reach by steps: between grid points torchdiffeq interpolates."""
    field, x, leaves = make()
    t = torch.tensor([0.0, 1.0])
    options = None if step is None else {"step_size": step}
    ours, theirs = (
        solve(field, x, t, method=method, options=options)
        for solve in (odeint_snopt, torchdiffeq.odeint_adjoint)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(loss_of(y), leaves) for y in (ours, theirs)]
    assert worst_error(*gradients) < 1e-8


def test_each_time_is_stepped_to_exactly() -> None:
    field, x, _ = make()
    stats = SolveStats()
    states = odeint_snopt(field, x, T, method="rk4", options={"step_size": 0.25}, stats=stats)
    # The grid 0, 0.25, 0.5, 0.75, 1 and the time 0.4 between.
    assert stats.forward.accepted == 5
    middle = odeint_snopt(field, x, T[:2], method="rk4", options={"step_size": 0.25})[-1]
    torch.testing.assert_close(states[1], middle)


def test_a_grid_of_the_callers_own() -> None:
    field, x, leaves = make()
    options = {"grid_constructor": lambda func, y0, t: torch.linspace(0.0, 1.0, 11) ** 2}
    t, stats = torch.tensor([0.0, 1.0]), SolveStats()
    ours = odeint_snopt(field, x, t, method="midpoint", options=options, stats=stats)
    theirs = torchdiffeq.odeint(field, x, t, method="midpoint", options=options)
    torch.testing.assert_close(ours, theirs)
    assert stats.forward.accepted == 10
    loss_of(ours).backward()
    assert stats.backward.accepted == 10
    assert leaves[1].grad is not None


def test_grid_points_a_rounding_error_away_from_a_time_make_no_step() -> None:
    """Times in single precision hardly ever meet a grid of multiples of the step size."""
    field, x, _ = make()
    stats = SolveStats()
    t = torch.linspace(0.0, 0.7, 8, dtype=torch.float32)
    odeint_snopt(
        field, x, t, method="euler", options={"step_size": 0.1}, stats=stats
    ).sum().backward()
    assert stats.forward.accepted == 7
    assert stats.backward.accepted == 7


@pytest.mark.parametrize("method", TORCHDIFFEQ_NAMES)
def test_every_name_solves_and_differentiates(method: str) -> None:
    field, x, leaves = make()
    fixed = not TORCHDIFFEQ_NAMES[method].adaptive
    options = {"step_size": 0.02} if fixed else None
    tolerance = 1e-4 if method == "adaptive_heun" else 1e-6
    how = {"options": options, "rtol": tolerance, "atol": tolerance}
    states = odeint_snopt(field, x, T, method=method, **how)
    ours = torch.autograd.grad(loss_of(states), leaves)
    expected = torch.autograd.grad(loss_of(reference_solve(field, x, T)[0]), leaves)
    assert worst_error(ours, expected) < (0.05 if method == "euler" else 1e-3)


@pytest.mark.parametrize("method", ["implicit_adams", "explicit_adams", "scipy_solver"])
def test_other_methods_integrate_through_torchdiffeq(method: str) -> None:
    field, x, leaves = make()
    options = {"solver": "LSODA"} if method == "scipy_solver" else {"step_size": 0.02}
    stats = SolveStats()
    how = {"method": method, "options": options, "rtol": 1e-7, "atol": 1e-9}
    states = odeint_snopt(field, x, T, stats=stats, **how)
    theirs = torchdiffeq.odeint(field, x.detach(), T, **how)
    torch.testing.assert_close(states.detach(), theirs.detach(), rtol=1e-8, atol=1e-8)
    assert stats.nfe_forward > 20
    ours = torch.autograd.grad(loss_of(states), leaves)
    expected = torch.autograd.grad(loss_of(reference_solve(field, x, T)[0]), leaves)
    # torchdiffeq's explicit Adams method starts up with a low order.
    assert worst_error(ours, expected) < (0.05 if method == "explicit_adams" else 1e-4)
    assert stats.nfe_backward > 0


# --- tuple states ---------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two coupled states of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.vector, self.matrix = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = state
        return torch.tanh(self.matrix(y)).mean(1) * torch.cos(t), torch.tanh(
            self.vector(x)
        ).unsqueeze(1) - 0.1 * y


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
def test_tuple_states(adjoint: str) -> None:
    field = Pair()
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 5, 2, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], requires_grad=True)
    leaves = [x, y, t, *field.parameters()]
    gradients = []
    for solve, options in (
        (odeint_snopt, {"sensitivity": SNOptSensitivity(adjoint=adjoint)}),
        (torchdiffeq.odeint_adjoint, {}),
    ):
        a, b = solve(field, (x, y), t, rtol=1e-9, atol=1e-9, **options)
        assert (a.shape, b.shape) == ((3, 4, 3), (3, 4, 5, 2))
        gradients.append(torch.autograd.grad(loss_of(a) + loss_of(b), leaves))
    assert worst_error(*gradients) < 1e-6


def test_a_tuple_of_one() -> None:
    field, x, _ = make()
    (states,) = odeint_snopt(lambda t, y: (field(t, y[0]),), (x,), T, adjoint_params=())
    torch.testing.assert_close(states, odeint_snopt(field, x, T))


# --- options --------------------------------------------------------------------------------------


def test_adjoint_options_stand_in_for_the_forward_ones() -> None:
    field, x, leaves = make()
    t = torch.tensor([0.0, 1.0])
    stats = SolveStats()
    y = odeint_snopt(
        field, x, t, method="rk4", options={"step_size": 0.1}, stats=stats,
        adjoint_method="midpoint", adjoint_options={"step_size": 0.05},
    )  # fmt: skip
    ours = torch.autograd.grad(loss_of(y), leaves)
    assert (stats.nfe_forward, stats.nfe_backward) == (4 * 10, 2 * 20)
    theirs = torchdiffeq.odeint_adjoint(
        field, x, t, method="rk4", options={"step_size": 0.1},
        adjoint_method="midpoint", adjoint_options={"step_size": 0.05},
    )  # fmt: skip
    assert worst_error(ours, torch.autograd.grad(loss_of(theirs), leaves)) < 1e-10


def test_another_adjoint_method_does_not_inherit_the_options() -> None:
    field, x, leaves = make()
    stats = SolveStats()
    y = odeint_snopt(
        field, x, T, method="implicit_adams", options={"step_size": 0.02, "max_order": 5},
        adjoint_method="dopri5", stats=stats,
    )  # fmt: skip
    loss_of(y).backward()
    assert leaves[1].grad is not None
    assert stats.nfe_backward > 0


def test_adjoint_tolerances_steer_the_backward_solve() -> None:
    field, x, _ = make()
    counts = []
    for tolerance in (1e-3, 1e-10):
        stats = SolveStats()
        odeint_snopt(
            field, x, T, rtol=1e-5, atol=1e-5, adjoint_rtol=tolerance, adjoint_atol=tolerance,
            stats=stats,
        ).sum().backward()  # fmt: skip
        counts.append((stats.nfe_forward, stats.nfe_backward))
    assert counts[0][0] == counts[1][0]
    assert counts[0][1] < counts[1][1] / 2


def test_adjoint_params_choose_what_is_differentiated() -> None:
    field, x, _ = make()
    chosen = [field.scale]
    loss_of(odeint_snopt(field, x, T, adjoint_params=chosen)).backward()
    assert field.scale.grad is not None
    assert field.inner.weight.grad is None
    other = nn.Linear(2, 2)  # of another module: unused
    field.scale.grad = None
    odeint_snopt(
        field, x, T, adjoint_params=[*field.parameters(), *other.parameters()]
    ).sum().backward()
    assert other.weight.grad is None
    assert field.inner.weight.grad is not None


def test_max_num_steps_is_torchdiffeqs_name_for_the_limit() -> None:
    field, x, _ = make()
    with pytest.raises(RuntimeError, match="max_steps=3"):
        odeint_snopt(field, x, T, rtol=1e-10, options={"max_num_steps": 3})


def test_statistics_may_be_used_again() -> None:
    field, x, _ = make()
    stats, counts = SolveStats(), []
    for _ in range(2):
        odeint_snopt(field, x, T, stats=stats).sum().backward()
        counts.append((stats.nfe_forward, stats.nfe_backward, stats.accepted))
    assert counts[0] == counts[1]
    assert stats.status == "ok"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"event_fn": math.floor}, UnsupportedError, "events"),
        ({"options": {"jump_t": T}}, UnsupportedError, "'jump_t'"),
        ({"method": "rk45"}, InvalidInputError, "'rk45'"),
        ({"adjoint_method": "rk45"}, InvalidInputError, "'rk45'"),
        ({"rtol": torch.ones(3)}, UnsupportedError, "rtol"),
        ({"rtol": 0.0}, InvalidInputError, "rtol"),
        ({"adjoint_atol": -1.0}, InvalidInputError, "atol"),
        ({"method": "rk4", "options": {"step_size": -0.1}}, InvalidInputError, "step_size"),
        (
            {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": len}},
            InvalidInputError,
            "two grids",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    field, x, _ = make()
    calls = []
    field.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(error, match=message):
        odeint_snopt(field, x, T, **change)
    assert calls == []  # before integrating


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"x": torch.zeros(2)}, UnsupportedError),
        ([torch.zeros(2)], UnsupportedError),
        ((), UnsupportedError),
        ((torch.zeros(2), 1.0), UnsupportedError),
        (torch.zeros(2, dtype=torch.complex128), UnsupportedError),
        (torch.zeros(2, dtype=torch.long), InvalidInputError),
        (torch.zeros(0, 3), InvalidInputError),
        (1.0, UnsupportedError),
    ],
    ids=str,
)
def test_states_that_are_none(state: object, error: type[Exception]) -> None:
    with pytest.raises(error):
        odeint_snopt(lambda t, y: y, state, T, adjoint_params=())


@pytest.mark.parametrize(
    "times", [0.5, [0.0, 1.0], torch.tensor(0.5), torch.zeros(2, 2), torch.tensor([0, 1])], ids=str
)
def test_times_that_are_none(times: object) -> None:
    with pytest.raises(InvalidInputError, match="not a sequence of times"):
        odeint_snopt(lambda t, y: y, torch.zeros(2), times, adjoint_params=())


def test_a_plain_callable_has_to_name_its_parameters() -> None:
    with pytest.raises(InvalidInputError, match="adjoint_params"):
        odeint_snopt(lambda t, y: -y, torch.zeros(2), T)


def test_parameters_replaced_for_one_call_are_refused() -> None:
    field, x, _ = make()
    parameters = {k: v.detach().requires_grad_() for k, v in field.named_parameters()}

    def run(field: nn.Module, solve: Callable[..., Tensor]) -> Tensor:
        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.field = field

            def forward(self, x: Tensor) -> Tensor:
                return solve(self.field, x, T)

        named = {f"field.{k}": v for k, v in parameters.items()}
        return torch.func.functional_call(Wrapper(), named, (x,))

    with pytest.raises(UnsupportedError, match="functional_call"):
        run(field, odeint_snopt)
    assert relative_error(run(field, torchdiffeq.odeint), torchdiffeq.odeint(field, x, T)) < 1e-12
