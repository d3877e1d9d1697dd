"""The autograd.Function that ties a forward solve to its backward solve."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.autograd import Function

from torchdyn_snopt.adjoint.along import multiples
from torchdyn_snopt.adjoint.backsolve import solve_backward
from torchdyn_snopt.adjoint.checkpoint import replay_backward
from torchdyn_snopt.adjoint.forward import Trajectory, solve_forward
from torchdyn_snopt.adjoint.horizon import deposit
from torchdyn_snopt.adjoint.state import check_state
from torchdyn_snopt.curvature.horizon import wanted_horizons
from torchdyn_snopt.curvature.outside import inside_solve
from torchdyn_snopt.curvature.registry import (
    active_collectors,
    mark_failed,
    may_be_seeded,
    wanted_layers,
)
from torchdyn_snopt.curvature.seeds import SolveStation, carry
from torchdyn_snopt.errors import SolverError, UnsupportedError
from torchdyn_snopt.solvers import PhaseStats, check_segments

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from torchdyn_snopt.adjoint.gradients import Gradients
    from torchdyn_snopt.adjoint.problem import Field, Problem
    from torchdyn_snopt.curvature.seeds import Source

Result = TypeVar("Result")


def solve(problem: Problem, x0: Tensor, t: Tensor) -> Tensor:
    """Integrate, differentiably in x0, t and θ.

    Args:
        problem: what and how.
        x0: first state.
        t: the problem's times as the tensor that may require gradients, ``[T]``.

    Returns:
        States at the times, ``[T, *x0.shape]`` (or at those of ``problem.save``).

    Raises:
        InvalidInputError: a state or times that cannot be integrated.
        UnsupportedError: a complex state, or a call under a torch.func transform.
        SolverError: the solve failed and ``on_failure`` is 'raise'.
    """
    check_state(x0)
    check_segments(problem.times)
    x0 = problem.field.precision.state(x0)
    problem = replace(problem, horizons=wanted_horizons(t))
    return _Solve.apply(problem, x0, t, *problem.field.parameters)  # type: ignore[no-any-return]


class _Solve(Function):
    """x(t0), t, θ ↦ x at the evaluation times."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, x0: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        stats = problem.stats
        stats.forward, stats.backward, stats.status = PhaseStats(), PhaseStats(), "running"
        trajectory = _guarded(problem, lambda: solve_forward(problem, x0))
        ctx.failed = trajectory is None
        if trajectory is None:
            stats.t1 = problem.times[-1]
            nan = x0.new_full((len(problem.times), *x0.shape), float("nan"))
            trajectory = Trajectory(nan)
        ctx.problem, ctx.dt, ctx.checkpoints = problem, trajectory.dt, trajectory.checkpoints
        ctx.time_like = (t.dtype, t.device)
        # The parameters are saved for autograd's check that nobody changed them before backward.
        # x0 leads on to what stands before the solve, where columns of the loss have to go too.
        ctx.snopt_station = SolveStation() if may_be_seeded() else None
        start = () if ctx.snopt_station is None else (x0,)
        ctx.save_for_backward(trajectory.states, *parameters, *start)
        states = trajectory.states
        return states if problem.save is None else states[list(problem.save)]

    @staticmethod
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "second derivatives through the solve are not supported",
                got="a backward pass with create_graph=True",
                allowed="first derivatives",
                do="use sensitivity='autograd', or second_order_adjoint for the Hessian",
            )
        problem: Problem = ctx.problem
        station: SolveStation | None = ctx.snopt_station
        if station is not None and station.closed:
            return (None,) * len(ctx.needs_input_grad)
        states, *parameters = ctx.saved_tensors
        x0 = None if station is None else parameters.pop()
        arrived = {} if station is None else station.take()
        columns = torch.cat(list(arrived.values())) if arrived else None
        ranks = {source: len(part) for source, part in arrived.items()}
        if problem.save is not None:
            grad_states = _at_saved(problem.save, grad_states, states)
            if columns is not None:
                columns = torch.stack([_at_saved(problem.save, c, states) for c in columns])
        trajectory = Trajectory(states, ctx.dt, ctx.checkpoints)
        wants_times = ctx.needs_input_grad[2]
        gradients = None
        if not ctx.failed:
            gradients = _guarded(
                problem,
                lambda: _differentiate(
                    problem, trajectory, grad_states, wants_times, columns, ranks
                ),
            )
        if gradients is None:
            # Now, not when the forward solve failed: it may have been no part of training.
            mark_failed(problem.field.parameters)
            return _skipped(problem, states, parameters, ctx.time_like if wants_times else None)
        if gradients.columns is not None and x0 is not None:
            carry([x0], [gradients.columns], ranks)
        deposit(problem, states, grad_states)
        times = gradients.times
        if times is not None:
            dtype, device = ctx.time_like
            times = times.to(device=device, dtype=dtype)
        return None, gradients.x0, times, *gradients.parameters


def _differentiate(
    problem: Problem,
    trajectory: Trajectory,
    grad_states: Tensor,
    time_gradients: bool,
    columns: Tensor | None,
    ranks: dict[Source, int],
) -> Gradients:
    collectors = active_collectors()
    wanted = wanted_layers(problem.field.modules(), collectors) if collectors else {}
    problem.stats.backward = PhaseStats()
    factor = multiples(problem, wanted, grad_states, columns)
    checkpoint = problem.sensitivity.adjoint == "checkpoint" and problem.forward.foreign is None
    differentiate = replay_backward if checkpoint else solve_backward
    with _hooks_seen(problem.field) if wanted else nullcontext():
        return differentiate(
            problem,
            trajectory,
            grad_states,
            wanted,
            time_gradients=time_gradients,
            columns=columns,
            ranks=ranks,
            factor=factor,
        )


def _hooks_seen(field: Field) -> AbstractContextManager[Any]:
    """Compiled modules run uncompiled while they are recorded: compiled ones ignore new hooks."""
    for module in field.modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]
    return nullcontext()


def _at_saved(save: Sequence[int], gradients: Tensor, states: Tensor) -> Tensor:
    """Gradients of the returned states as gradients of all of them."""
    indices = torch.tensor(save, device=states.device)
    return torch.zeros_like(states).index_add_(0, indices, gradients)


def _guarded(problem: Problem, run: Callable[[], Result]) -> Result | None:
    """Run one direction; None when it failed and failures are to be skipped."""
    stats = problem.stats
    try:
        with inside_solve():
            result = run()
    except Exception as error:
        stats.status = f"{type(error).__name__}: {error}"
        if isinstance(error, SolverError) and problem.sensitivity.on_failure == "skip":
            return None
        raise
    stats.status, stats.t1 = "ok", problem.times[-1]
    return result


def _skipped(
    problem: Problem,
    states: Tensor,
    parameters: list[Tensor],
    time_like: tuple[torch.dtype, torch.device] | None,
) -> tuple[Tensor | None, ...]:
    """NaN for everything: a failed solve has no gradient, not a partial one."""
    nan = float("nan")
    times = None
    if time_like is not None:
        dtype, device = time_like
        times = torch.full((len(problem.times),), nan, dtype=dtype, device=device)
    return (
        None,
        torch.full_like(states[0], nan),
        times,
        *(torch.full_like(p, nan) for p in parameters),
    )
