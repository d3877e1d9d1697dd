"""Gradients for x0, θ and every t against autograd through an independent solve."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE, ODEProblem
from torchdyn.numerics.solvers.ode import DormandPrince45, str_to_solver

from tests.adjoint.fields import FIELDS, TIMES, Mlp, TimeDependent
from tests.reference import reference_solve, relative_error, worst_error
from torchdyn_snopt import SNOptSensitivity, odeint_snopt, solve_stats
from torchdyn_snopt.adjoint.forward import solve_forward
from torchdyn_snopt.adjoint.problem import Field, Method, Problem
from torchdyn_snopt.solvers import TABLEAUS, SolveStats, Tolerances

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = dict.fromkeys(("rtol", "atol", "rtol_adjoint", "atol_adjoint"), 1e-09)
CHECKPOINT = SNOptSensitivity(adjoint="checkpoint")


def make(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = FIELDS[name]
    return build(), torch.randn(*shape)


def node_of(field: nn.Module, **options: object) -> NeuralODE:
    settings = {"solver": "dopri5", "sensitivity": "snopt", **TIGHT, **options}
    return NeuralODE(field, return_t_eval=False, **settings)


def loss_of(states: Tensor) -> Tensor:
    """Depends on every state, each with weights of its own."""
    weights = torch.linspace(0.5, 1.5, states.numel()).view(states.shape)
    return (weights * states.sin()).sum()


def gradients(
    run: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, parameters: list[Tensor]
) -> list[Tensor | None]:
    """dL/dx0, dL/dt and dL/dθ of the loss of ``run(x, t)``."""
    x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
    loss = run(x, t)
    return list(torch.autograd.grad(loss, [x, t, *parameters], allow_unused=True))


def compare(
    node: nn.Module, x: Tensor, t: Tensor, *, density: int = 4
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients by the model's sensitivity and by the reference, for x0, t and θ."""
    parameters = list(node.parameters())
    ours = gradients(lambda x, t: loss_of(node(x, t)), x, t, parameters)
    # The model's own field, with whatever the call has left in it (noise, control).
    reference = gradients(
        lambda x, t: loss_of(reference_solve(node.vf, x, t, density=density)[0]), x, t, parameters
    )
    return ours, reference


# --- the promise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", FIELDS)
def test_gradients_equal_autograd_through_a_solve_at_1e_12(name: str, times: str) -> None:
    field, x = make(name)
    ours, reference = compare(node_of(field), x, torch.tensor(TIMES[times]))
    assert worst_error(ours, reference) < 1e-6


@pytest.mark.parametrize("name", FIELDS)
def test_the_reference_itself_is_converged(name: str) -> None:
    """Twice the steps change its gradients by less than 1e-12."""
    field, x = make(name)
    node = node_of(field)
    node(x)
    coarse, fine = (
        gradients(
            lambda x, t, density=density: loss_of(
                reference_solve(node.vf, x, t, density=density)[0]
            ),
            x, torch.tensor(TIMES["two"]), list(node.parameters()),
        )
        for density in (4, 8)
    )  # fmt: skip
    assert worst_error(coarse, fine) < 1e-12


@pytest.mark.parametrize("solver", ["tsit5", "dopri8", "bosh3"])
def test_other_adaptive_solvers(solver: str) -> None:
    tolerance = 1e-8 if solver == "bosh3" else 1e-9
    field, x = make("time")
    node = node_of(field, solver=solver, **dict.fromkeys(TIGHT, tolerance))
    ours, reference = compare(node, x, torch.tensor([0.0, 0.3, 0.6]))
    assert worst_error(ours, reference) < 1e-6


@pytest.mark.parametrize("times", ["two", "five down"])
def test_odeint_snopt_gives_the_same_gradients(times: str) -> None:
    field, x = make("time")
    t = torch.tensor(TIMES[times])
    parameters = list(field.parameters())
    ours = gradients(
        lambda x, t: loss_of(odeint_snopt(field, x, t, rtol=1e-10, atol=1e-10)), x, t, parameters
    )
    reference = gradients(lambda x, t: loss_of(reference_solve(field, x, t)[0]), x, t, parameters)
    assert worst_error(ours, reference) < 1e-6


def test_time_gradients_are_computed_only_when_asked_for() -> None:
    """And cost no evaluation even then: each F(t) needed is a stage of the solve."""
    field, x = make("time")
    node = node_of(field)
    counts = []
    for wanted in (False, True):
        t = torch.tensor(TIMES["five"], requires_grad=wanted)
        loss_of(node(x, t)).backward()
        counts.append(solve_stats(node).nfe_backward)
    # F(tᵢ) is the first stage of the segment that starts there; at t0, FSAL has left it behind.
    assert counts[1] == counts[0]
    assert field.scale.grad is not None


def test_a_single_precision_time_tensor_gets_its_gradient() -> None:
    field, x = make("time")
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float32, requires_grad=True)
    loss_of(node_of(field)(x, t)).backward()
    _, reference, *_ = gradients(
        lambda x, t: loss_of(reference_solve(field, x, t)[0]), x, t.double(), []
    )
    assert t.grad is not None
    assert t.grad.dtype == torch.float32
    assert relative_error(t.grad.double(), reference) < 1e-6


# --- checkpoint -----------------------------------------------------------------------------------


def recorded_steps(
    field: nn.Module, x: Tensor, times: list[float], tolerance: float
) -> list[list[tuple[float, float]]]:
    """Start and length of the accepted steps of each segment."""
    problem = Problem(
        field=Field(lambda t, y: field(t, y), tuple(field.parameters()), (field,)),
        times=tuple(times),
        forward=Method(TABLEAUS["dopri5"], Tolerances(tolerance, tolerance)),
        backward=Method(),
        sensitivity=CHECKPOINT,
        batch=x.shape[0],
        stats=SolveStats(),
    )
    trajectory = solve_forward(problem, x)
    return [[(step.t, step.dt) for step in segment] for segment in trajectory.checkpoints]


def replayed(
    field: nn.Module, x: Tensor, t: Tensor, steps: list[list[tuple[float, float]]]
) -> Tensor:
    """The same steps by torchdyn's own solver under plain autograd, scaled with their segment."""
    solver = DormandPrince45(torch.float64)
    states = [x]
    values = t.detach().tolist()
    for i, segment in enumerate(steps):
        length = values[i + 1] - values[i]
        for start, dt in segment:
            at = t[i] + (start - values[i]) / length * (t[i + 1] - t[i])
            x = solver.step(field, x, at, dt / length * (t[i + 1] - t[i]))[1]
        states.append(x)
    return torch.stack(states)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", ["mlp", "convolution", "time", "cnf"])
def test_checkpoint_equals_autograd_through_the_same_steps(name: str, times: str) -> None:
    field, x = make(name)
    t = torch.tensor(TIMES[times])
    node = node_of(field, sensitivity=CHECKPOINT, rtol=1e-3, atol=1e-3)
    parameters = list(node.parameters())
    steps = recorded_steps(node.vf, x, TIMES[times], 1e-3)
    ours = gradients(lambda x, t: loss_of(node(x, t)), x, t, parameters)
    reference = gradients(lambda x, t: loss_of(replayed(node.vf, x, t, steps)), x, t, parameters)
    assert worst_error(ours, reference) < 1e-10
    assert solve_stats(node).backward.accepted == sum(map(len, steps))


# --- fixed steps ----------------------------------------------------------------------------------


def unrolled(solver: str, field: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
    """Fixed steps from time to time by torchdyn's own solver objects, under plain autograd."""
    steps = str_to_solver(solver, x.dtype)
    states = [x]
    for start, stop in itertools.pairwise(t):
        x = steps.step(field, x, start, stop - start)[1]
        states.append(x)
    return torch.stack(states)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4"])
def test_checkpoint_with_fixed_steps(solver: str) -> None:
    # torchdyn's own rk4 misplaces the times of its stages: compare on an autonomous field.
    field, x = make("mlp" if solver == "rk4" else "time")
    t = torch.linspace(0.1, 0.9, 5)
    node = node_of(field, sensitivity=CHECKPOINT, solver=solver)
    parameters = list(node.parameters())
    ours = gradients(lambda x, t: loss_of(node(x, t)), x, t, parameters)
    reference = gradients(lambda x, t: loss_of(unrolled(solver, node.vf, x, t)), x, t, parameters)
    assert worst_error(ours, reference) < 1e-10


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]
)
def test_backsolve_with_fixed_steps_converges_with_the_order(solver: str, order: int) -> None:
    """Forward and backward steps on t_span itself, as torchdyn's fixed solvers take it."""
    field, x = make("time")
    node = node_of(field, solver=solver)
    exact = [g for g in compare(node_of(field), x, torch.tensor([0.0, 1.0]))[1] if g is not None]

    def error(steps: int) -> float:
        t = torch.linspace(0.0, 1.0, steps + 1)
        states_loss = lambda x, t: loss_of(node(x, t)[[0, -1]])  # noqa: E731
        g = gradients(states_loss, x, t, list(node.parameters()))
        g[1] = g[1][[0, -1]]
        return worst_error(g, exact)

    coarse = 8 if solver == "rk4" else 32
    ratio = error(coarse) / error(2 * coarse)
    assert ratio > 2 ** (order - 0.35)
    assert solve_stats(node).nfe_forward == 2 * coarse * TABLEAUS[solver].stages


def test_a_fixed_forward_solve_with_an_adaptive_backward_solve() -> None:
    field, x = make("time")
    node = node_of(field, solver="rk4", solver_adjoint="dopri5")
    t = torch.linspace(0.0, 1.0, 41)
    ours = gradients(lambda x, t: loss_of(node(x, t)[-1:]), x, t, list(node.parameters()))
    reference = gradients(
        lambda x, t: loss_of(reference_solve(field, x, t[[0, -1]])[0][-1:]),
        x, t, list(node.parameters()),
    )  # fmt: skip
    assert relative_error(ours[0], reference[0]) < 1e-6
    assert worst_error(ours[2:], reference[2:]) < 1e-6


# --- gradcheck ------------------------------------------------------------------------------------


class Oscillating(nn.Module):
    """Linear, with a matrix whose speed jumps eight-fold, so that planned steps are rejected."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[-0.2, 2.0], [-2.0, -0.1]]))

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return x @ self.matrix.T * (1 + 7 * torch.sigmoid(80 * (t - 0.5)))


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
def test_gradcheck_where_steps_are_rejected(adjoint: str) -> None:
    field, stats = Oscillating(), SolveStats()
    matrix = field.matrix

    def loss(x: Tensor, t: Tensor) -> Tensor:
        states = odeint_snopt(
            field, x, t, rtol=1e-8, atol=1e-8, method="tsit5", stats=stats,
            sensitivity=SNOptSensitivity(adjoint=adjoint),
        )  # fmt: skip
        return loss_of(states)

    def loss_at(shift: Tensor) -> float:
        with torch.no_grad():
            matrix.add_(shift)
            value = float(loss(x, t))
            matrix.sub_(shift)
        return value

    x = torch.randn(1, 2, requires_grad=True)
    t = torch.tensor([0.2, 0.6, 0.8], requires_grad=True)
    loss(x, t).backward()
    assert stats.forward.rejected > 0
    numeric = torch.zeros(4)
    for i, shift in enumerate(1e-4 * torch.eye(4).view(4, 2, 2)):
        numeric[i] = (loss_at(shift) - loss_at(-shift)) / 2e-4
    assert relative_error(matrix.grad, numeric.view(2, 2)) < 1e-5
    how = {"fast_mode": True, "check_undefined_grad": False, "nondet_tol": 0.0}
    assert torch.autograd.gradcheck(loss, (x, t), eps=1e-4, atol=1e-4, rtol=1e-4, **how)


# --- error norm -----------------------------------------------------------------------------------


def test_the_full_error_norm_controls_the_parameter_gradient() -> None:
    """At a loose tolerance the step size then obeys θ's error too: more steps, less error."""
    field, x = make("time")
    with torch.no_grad():
        field.inner.weight.mul_(3.0)
    errors, counts = [], []
    for norm in ("state", "full"):
        node = node_of(
            field,
            sensitivity=SNOptSensitivity(error_norm=norm),
            rtol_adjoint=1e-3,
            atol_adjoint=1e-6,
        )
        ours, reference = compare(node, x, torch.tensor([0.0, 2.0]), density=6)
        errors.append(worst_error(ours[2:], reference[2:]))
        counts.append(solve_stats(node).nfe_backward)
    assert counts[1] > counts[0]
    assert errors[1] < errors[0]
    assert errors[1] < 3e-3


def test_the_full_error_norm_at_tight_tolerance_is_exact() -> None:
    field, x = make("time")
    node = node_of(field, sensitivity=SNOptSensitivity(error_norm="full"))
    ours, reference = compare(node, x, torch.tensor(TIMES["five"]))
    assert worst_error(ours, reference) < 1e-6


# --- parameters of every kind ---------------------------------------------------------------------


class Assorted(nn.Module):
    """Frozen, unused, shared and empty parameters beside ordinary ones."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3)
        self.frozen.weight.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.shared = nn.Linear(3, 3, bias=False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.shared.weight
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        h = torch.tanh(self.frozen(torch.tanh(self.used(x)))) + self.empty.sum(0)
        return self.tied(torch.tanh(self.shared(h)))


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
def test_frozen_unused_shared_and_empty_parameters(adjoint: str) -> None:
    field, x = Assorted(), torch.randn(4, 3)
    node = node_of(field, sensitivity=SNOptSensitivity(adjoint=adjoint))
    loss_of(node(x, torch.tensor([0.0, 1.0]))).backward()
    ours = {name: p.grad for name, p in field.named_parameters()}
    field.zero_grad(set_to_none=True)
    loss_of(reference_solve(field, x, torch.tensor([0.0, 1.0]))[0]).backward()
    for name, parameter in field.named_parameters():
        if parameter.grad is None:
            assert ours[name] is None, name
        else:
            assert relative_error(ours[name], parameter.grad) < 1e-6, name
    assert ours["frozen.weight"] is None
    assert ours["unused.weight"] is None
    assert ours["empty"].shape == (0, 3)


def test_a_field_without_parameters() -> None:
    node = node_of(nn.Tanh())
    ours, reference = compare(node, torch.randn(3, 2), torch.tensor([0.0, 1.0]))
    assert worst_error(ours[:2], reference[:2]) < 1e-6


def test_a_field_that_does_not_depend_on_the_state() -> None:
    rate = nn.Parameter(torch.tensor([1.0, 2.0]))
    x = torch.zeros(3, 2, requires_grad=True)
    y = odeint_snopt(
        lambda t, y: rate.expand_as(y) * t, x, torch.tensor([0.0, 2.0]), adjoint_params=(rate,)
    )
    y[-1].sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, 2))
    torch.testing.assert_close(rate.grad, torch.full((2,), 6.0))


def test_parameters_that_change_before_backward_are_noticed() -> None:
    """As in plain autograd: an optimizer step between forward and backward is an error."""
    field = Mlp()
    loss = loss_of(node_of(field)(torch.randn(2, 3)))
    with torch.no_grad():
        field.layers[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_graph_can_be_used_twice() -> None:
    field, x = make("time")
    loss = loss_of(node_of(field)(x))
    first = torch.autograd.grad(loss, list(field.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(field.parameters()))
    assert worst_error(first, second) == 0.0


def test_only_some_of_the_states_enter_the_loss() -> None:
    field, x = make("time")
    node, t = node_of(field), torch.tensor(TIMES["five"])
    for index in (0, 2, -1):
        ours = gradients(lambda x, t, i=index: loss_of(node(x, t)[i]), x, t, [field.scale])
        reference = gradients(
            lambda x, t, i=index: loss_of(reference_solve(field, x, t)[0][i]), x, t, [field.scale]
        )
        assert worst_error(ours, reference) < 1e-6


def test_a_plain_problem_without_the_model_class() -> None:
    field, x = make("time")
    problem = ODEProblem(field, "dopri5", sensitivity="snopt", **TIGHT)
    t = torch.tensor(TIMES["five"])
    ours = gradients(lambda x, t: loss_of(problem(x, t)[1]), x, t, list(field.parameters()))
    reference = gradients(
        lambda x, t: loss_of(reference_solve(field, x, t)[0]), x, t, list(field.parameters())
    )
    assert worst_error(ours, reference) < 1e-6


def test_time_dependence_reaches_a_field_given_as_a_lambda() -> None:
    for model in (NeuralODE, ODEProblem):
        problem = model(lambda t, x: torch.cos(t) * x, "dopri5", sensitivity="snopt", **TIGHT)
        x = torch.randn(2, 2, requires_grad=True)
        _, states = problem(x, torch.tensor([0.0, 1.0]))
        torch.testing.assert_close(states[-1], x * torch.exp(torch.sin(torch.tensor(1.0))))


def test_memory_is_released_after_the_backward_pass() -> None:
    """The graph of a solve holds the states and goes away with the loss."""
    import gc
    import weakref

    field, x = make("mlp")
    states = node_of(field, sensitivity=CHECKPOINT)(x)
    watch = weakref.ref(states.grad_fn)
    loss_of(states).backward()
    del states
    gc.collect()
    assert watch() is None


def test_the_time_dependent_field_without_batch_dimension() -> None:
    field, x = TimeDependent(), torch.randn(3)
    t = torch.tensor([0.0, 1.0])
    ours = gradients(
        lambda x, t: loss_of(odeint_snopt(field, x, t, rtol=1e-10, atol=1e-10)), x, t, []
    )
    reference = gradients(lambda x, t: loss_of(reference_solve(field, x, t)[0]), x, t, [])
    assert worst_error(ours, reference) < 1e-6
