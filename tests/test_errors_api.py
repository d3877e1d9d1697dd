"""Failing well: every failure ends soon, in an error of its own name, and leaves nothing behind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torchdyn.core import MultipleShootingProblem, NeuralODE, ODEProblem
from torchdyn.numerics.solvers import ode as torchdyn_solvers

from tests.adjoint.fields import TimeDependent
from torchdyn_snopt import (
    InvalidInputError,
    SNOptError,
    SNOptSensitivity,
    SolverError,
    UnsupportedError,
    odeint_snopt,
    record_curvature,
    solve_stats,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

# No failure may hang; the limit is far above what any of them takes on the slowest machine.
pytestmark = pytest.mark.timeout(120)

T = torch.tensor([0.0, 1.0])


class Field(TimeDependent):
    """A good field that can be told to go wrong from now on."""

    def __init__(self) -> None:
        super().__init__()
        self.spoil: Callable[[Tensor, Tensor], Tensor] | None = None

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        f = super().forward(t, x)
        return f if self.spoil is None else self.spoil(t, f)


SPOILS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nan": lambda t, f: f * math.nan,
    "nan in one entry": lambda t, f: torch.cat([f[:, :2], f[:, 2:] * math.nan], 1),
    "nan in the middle": lambda t, f: f if (t - 0.5).abs() > 0.25 else f * math.nan,
    "infinite": lambda t, f: f / 0.0,
    "exploding": lambda t, f: (f + 1.0) * torch.exp(1000 * t),
}

SOLVERS = ["dopri5", "tsit5", "dopri8", "bosh3", "rk4", "euler"]


def node_of(field: Any, **options: Any) -> NeuralODE:
    settings = {"solver": "dopri5", "sensitivity": "snopt", "return_t_eval": False}
    return NeuralODE(field, **settings | options)


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def train(node: nn.Module, x: Tensor, t: Tensor = T) -> list[Tensor]:
    """One training step's gradients, with curvature collected."""
    node.zero_grad()
    with record_curvature(node) as curvature:
        node(x, t)[-1].square().mean().backward()
    assert curvature.factors
    return [p.grad.clone() for p in node.parameters()]


def check_recovery(node: nn.Module, field: Field, x: Tensor, good: list[Tensor]) -> None:
    """After a failure no hook is left, and the next good call gives the same as before."""
    field.spoil = None
    assert hooks(node) == 0
    for before, after in zip(good, train(node, x), strict=True):
        assert torch.equal(before, after)
    assert solve_stats(node).status == "ok"


# --- failing solves -------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_bad_field_in_the_forward_solve(solver: str, spoil: str) -> None:
    field, x = Field(), torch.randn(4, 3)
    node = node_of(field, solver=solver)
    t = torch.linspace(0.0, 1.0, 21) if solver in {"rk4", "euler"} else T
    good = train(node, x)
    field.spoil = SPOILS[spoil]
    with pytest.raises(SolverError, match="the forward solve failed") as caught:
        node(x, t)
    error = caught.value
    assert error.phase == "forward"
    assert 0.0 <= error.t <= 1.0
    assert 0 <= error.steps <= 10_000
    assert "state" in error.norms
    assert solve_stats(node).status.startswith("SolverError: the forward solve failed")
    check_recovery(node, field, x, good)


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
def test_a_field_that_turns_bad_before_the_backward_solve(adjoint: str, spoil: str) -> None:
    field, x = Field(), torch.randn(4, 3)
    node = node_of(field, sensitivity=SNOptSensitivity(adjoint=adjoint))
    good = train(node, x)
    node.zero_grad()
    with record_curvature(node) as curvature:
        loss = node(x, T)[-1].square().mean()
        field.spoil = SPOILS[spoil]
        with pytest.raises(SolverError, match="the backward solve failed") as caught:
            loss.backward()
        assert curvature.factors == {}
    assert caught.value.phase == "backward"
    assert "a" in caught.value.norms
    assert all(p.grad is None for p in node.parameters())  # nothing partial
    check_recovery(node, field, x, good)


@pytest.mark.parametrize("solver", ["dopri5", "euler"])
def test_a_state_that_is_not_finite_to_begin_with(solver: str) -> None:
    node = node_of(Field(), solver=solver)
    for bad in (math.nan, math.inf):
        x = torch.randn(4, 3)
        x[1, 1] = bad
        with pytest.raises(SolverError, match="not finite"):
            node(x, T)


def test_a_loss_that_is_not_finite() -> None:
    """Its gradient starts the backward solve."""
    field, x = Field(), torch.randn(4, 3)
    node = node_of(field)
    good = train(node, x)
    node.zero_grad()
    with pytest.raises(SolverError, match="the backward solve failed") as caught:
        (node(x, T)[-1].sum() * math.nan).backward()
    assert "not finite: a" in str(caught.value)
    check_recovery(node, field, x, good)


@pytest.mark.parametrize("sensitivity", ["backsolve", "checkpoint"])
def test_too_many_steps(sensitivity: str) -> None:
    options = SNOptSensitivity(adjoint=sensitivity, max_steps=4)
    node = node_of(Field(), sensitivity=options, rtol=1e-9, atol=1e-9)
    with pytest.raises(SolverError, match="max_steps=4") as caught:
        node(torch.randn(4, 3), T)
    assert caught.value.steps == 4


class Endless(torchdyn_solvers.DormandPrince45):
    """As torchdyn's own, in whose loop one NaN rejects every step for ever."""


def test_solvers_of_torchdyn_do_not_loop_for_ever_either() -> None:
    field, x = Field(), torch.randn(4, 3)
    node = node_of(field, solver=Endless())
    good = train(node, x)
    field.spoil = SPOILS["nan in the middle"]
    with pytest.raises(SolverError, match="the field is not finite"):
        node(x, T)
    check_recovery(node, field, x, good)
    shooting = MultipleShootingProblem(field, "mszero", sensitivity="snopt")
    field.spoil = SPOILS["nan"]
    with pytest.raises(SolverError, match="the field is not finite"):
        shooting(x, torch.linspace(0.0, 1.0, 4))
    assert hooks(shooting) == 0


# --- failures that are skipped --------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
def test_a_skipped_forward_solve_is_nan_throughout(adjoint: str) -> None:
    field, x = Field(), torch.randn(4, 3, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    node = node_of(field, sensitivity=SNOptSensitivity(adjoint=adjoint, on_failure="skip"))
    good = train(node, x)
    node.zero_grad()
    field.spoil = SPOILS["nan in the middle"]
    states = node(x, t)
    assert states.shape == (3, 4, 3)
    assert states.isnan().all()
    assert solve_stats(node).status.startswith("SolverError")
    x.grad = None
    states.sum().backward()
    for leaf in (x, t, *node.parameters()):
        assert leaf.grad.isnan().all()
        assert leaf.grad.shape == leaf.shape
    check_recovery(node, field, x, good)


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
def test_a_skipped_backward_solve_gives_nan_gradients(adjoint: str) -> None:
    field, x = Field(), torch.randn(4, 3, requires_grad=True)
    node = node_of(field, sensitivity=SNOptSensitivity(adjoint=adjoint, on_failure="skip"))
    good = train(node, x)
    node.zero_grad()
    x.grad = None
    loss = node(x, T)[-1].sum()
    field.spoil = SPOILS["exploding"]
    loss.backward()
    assert loss.isfinite()
    for leaf in (x, *node.parameters()):
        assert leaf.grad.isnan().all()
    assert solve_stats(node).status.startswith("SolverError: the backward solve failed")
    check_recovery(node, field, x, good)


def test_an_error_of_the_fields_own_is_not_skipped() -> None:
    field, x = Field(), torch.randn(4, 3)
    node = node_of(field, sensitivity=SNOptSensitivity(on_failure="skip"))
    good = train(node, x)

    def burst(t: Tensor, f: Tensor) -> Tensor:
        raise KeyError("burst")

    field.spoil = burst
    with pytest.raises(KeyError, match="burst"):
        node(x, T)
    assert solve_stats(node).status == "KeyError: 'burst'"
    check_recovery(node, field, x, good)


# --- wrong arguments ------------------------------------------------------------------------------


def refused(
    error: type[SNOptError], message: str, run: Callable[[NeuralODE, Tensor], Any], **options: Any
) -> SNOptError:
    """The call is refused before the field is called, and the next good call works."""
    field, x = Field(), torch.randn(4, 3)
    calls: list[int] = []
    field.register_forward_pre_hook(lambda *_: calls.append(1))
    node = node_of(field, **options)
    with pytest.raises(error, match=message) as caught:
        run(node, x)
    assert calls == []
    text = str(caught.value)
    assert "  got: " in text
    assert "  allowed: " in text
    assert "  do this: " in text
    return caught.value


@pytest.mark.parametrize("name", ["rtol", "atol", "rtol_adjoint", "atol_adjoint"])
@pytest.mark.parametrize("value", [-1e-3, math.nan, math.inf])
def test_tolerances(name: str, value: float) -> None:
    refused(InvalidInputError, name[:4], lambda node, x: node(x, T), **{name: value})


@pytest.mark.parametrize("name", ["rtol", "rtol_adjoint"])
def test_a_relative_tolerance_of_zero(name: str) -> None:
    refused(InvalidInputError, "rtol=0", lambda node, x: node(x, T), **{name: 0.0})


def test_fixed_steps_read_no_tolerance() -> None:
    node = node_of(Field(), solver="rk4", rtol=0.0, atol=0.0, rtol_adjoint=0.0)
    assert node(torch.randn(4, 3), T).isfinite().all()


@pytest.mark.parametrize(
    "times",
    [
        [],
        [0.5],
        [0.5, 0.5],
        [0.0, 0.5, 0.5, 1.0],
        [0.0, 1.0, 0.5],
        [0.0, math.nan],
        [0.0, math.inf],
    ],
    ids=str,
)
def test_times(times: list[float]) -> None:
    refused(InvalidInputError, r"time|interval", lambda node, x: node(x, torch.tensor(times)))


@pytest.mark.parametrize("times", [torch.tensor(1.0), torch.zeros(4, 2), 1.0], ids=str)
def test_times_that_are_no_sequence(times: object) -> None:
    refused(UnsupportedError, "one sequence", lambda node, x: node(x, times))


def test_an_empty_batch() -> None:
    refused(InvalidInputError, "at least one entry", lambda node, x: node(x[:0], T))


def test_integer_states() -> None:
    refused(InvalidInputError, "floating-point", lambda node, x: node(x.long(), T))


def test_complex_states() -> None:
    refused(UnsupportedError, "complex", lambda node, x: node(x.to(torch.complex64), T))


@pytest.mark.parametrize("state", [{"x": torch.zeros(4, 3)}, [torch.zeros(4, 3)], None], ids=type)
def test_states_that_are_no_tensor(state: object) -> None:
    refused(UnsupportedError, "not a tensor", lambda node, _: node(state, T))


def test_vmap_over_the_solve() -> None:
    def mapped(node: NeuralODE, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: node(row.unsqueeze(0), T))(x)

    error = refused(UnsupportedError, r"torch\.func", mapped)
    assert "autograd" in str(error)
    refused(
        UnsupportedError, r"torch\.func",
        lambda node, x: torch.func.grad(lambda x: node(x, T).sum())(x),
    )  # fmt: skip
    refused(
        UnsupportedError, r"torch\.func",
        lambda node, x: torch.vmap(lambda end: node(x, torch.stack([T[0], end])))(T[1:] + T),
    )  # fmt: skip


def test_functional_call() -> None:
    def called(node: NeuralODE, x: Tensor) -> Tensor:
        replaced = {k: v.detach().requires_grad_() for k, v in node.named_parameters()}
        return torch.func.functional_call(node, replaced, (x, T))

    refused(UnsupportedError, "functional_call", called)


def test_double_backward() -> None:
    field, x = Field(), torch.randn(4, 3, requires_grad=True)
    node = node_of(field)
    good = train(node, x)
    with pytest.raises(UnsupportedError, match="create_graph=True") as caught:
        torch.autograd.grad(node(x, T).sum(), x, create_graph=True)
    assert "second_order_adjoint" in str(caught.value)
    check_recovery(node, field, x, good)


@pytest.mark.parametrize("model", [NeuralODE, ODEProblem])
def test_a_string_that_is_no_sensitivity(model: type) -> None:
    with pytest.raises(InvalidInputError, match="'snopt_adjoint'") as caught:
        model(Field(), "dopri5", sensitivity="snopt_adjoint")
    assert "'snopt'" in str(caught.value)


def test_events() -> None:
    with pytest.raises(UnsupportedError, match="events"):
        odeint_snopt(Field(), torch.randn(4, 3), T, event_fn=lambda t, y: y.sum())


# --- fields that are none -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (lambda f: f[:2], r"\[2, 3\] for a state \[4, 3\]"),
        (lambda f: f[:, :1], r"\[4, 1\]"),
        (lambda f: f.sum(), r"\[\]"),
        (lambda f: (f, f), "tuple"),
        (lambda f: None, "NoneType"),
    ],
    ids=["batch", "broadcastable", "scalar", "tuple", "none"],
)
@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_fields_that_return_something_else(
    solver: str, result: Callable[[Tensor], Any], got: str
) -> None:
    field, x = Field(), torch.randn(4, 3)
    node = node_of(field, solver=solver)
    good = train(node, x)
    field.spoil = lambda t, f: result(f)
    with pytest.raises(InvalidInputError, match=got):
        node(x, T)
    check_recovery(node, field, x, good)


def test_a_field_that_overwrites_its_input() -> None:
    """Silently wrong states otherwise: the solver's own state would change under it."""
    node = node_of(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)))
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(InvalidInputError, match="in place") as caught,
        ):
            node(torch.randn(4, 3), T)
        assert "inplace=False" in str(caught.value)


def test_a_state_of_the_wrong_width() -> None:
    """The field's own complaint passes through untouched."""
    node = node_of(Field())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        node(torch.randn(4, 5), T)
    assert hooks(node) == 0
    assert solve_stats(node).status.startswith("RuntimeError")
