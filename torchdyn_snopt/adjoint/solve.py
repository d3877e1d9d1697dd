"""The autograd.Function that ties a forward solve to its backward solve."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.autograd import Function

from torchdyn_snopt.adjoint.backsolve import solve_backward
from torchdyn_snopt.adjoint.checkpoint import replay_backward
from torchdyn_snopt.adjoint.forward import Trajectory, solve_forward
from torchdyn_snopt.curvature.outside import inside_solve
from torchdyn_snopt.curvature.registry import active_collectors, mark_failed, wanted_layers
from torchdyn_snopt.errors import InvalidInputError, SolverError, UnsupportedError
from torchdyn_snopt.solvers import PhaseStats, check_segments

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from torchdyn_snopt.adjoint.gradients import Gradients
    from torchdyn_snopt.adjoint.problem import Problem

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
    return _Solve.apply(problem, x0, t, *problem.field.parameters)  # type: ignore[no-any-return]


def check_state(x0: Tensor) -> None:
    """Refuse states that no solve here can take.

    Args:
        x0: first state.

    Raises:
        InvalidInputError: not a floating-point tensor, or an empty one.
        UnsupportedError: complex, or under a torch.func transform.
    """
    if not isinstance(x0, torch.Tensor):
        raise UnsupportedError(
            "the state is not a tensor",
            got=type(x0).__name__,
            allowed="one floating-point tensor (odeint_snopt also takes a tuple of them)",
            do="concatenate the parts of the state, or use odeint_snopt",
        )
    if x0.is_complex():
        raise UnsupportedError(
            "complex states are not supported",
            got=f"{x0.dtype}",
            allowed="float32, float64, bfloat16, float16",
            do="integrate torch.view_as_real(x0)",
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "the solve cannot be transformed by torch.func (vmap, grad, jvp, …)",
            got="a call under such a transform",
            allowed="ordinary batched states and loss.backward()",
            do="put the mapped dimension into the batch, or use sensitivity='autograd'",
        )
    if not x0.is_floating_point() or x0.numel() == 0:
        raise InvalidInputError(
            "the state cannot be integrated",
            got=f"a tensor {list(x0.shape)} of {x0.dtype}",
            allowed="a floating-point tensor with at least one entry",
            do="check the batch; an empty one has nothing to learn from",
        )


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
        ctx.save_for_backward(trajectory.states, *parameters)
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
        states, *parameters = ctx.saved_tensors
        if problem.save is not None:
            indices = torch.tensor(problem.save, device=states.device)
            grad_states = torch.zeros_like(states).index_add_(0, indices, grad_states)
        trajectory = Trajectory(states, ctx.dt, ctx.checkpoints)
        wants_times = ctx.needs_input_grad[2]
        gradients = None
        if not ctx.failed:
            gradients = _guarded(
                problem, lambda: _differentiate(problem, trajectory, grad_states, wants_times)
            )
        if gradients is None:
            # Now, not when the forward solve failed: it may have been no part of training.
            mark_failed(problem.field.parameters)
            return _skipped(problem, states, parameters, ctx.time_like if wants_times else None)
        times = gradients.times
        if times is not None:
            dtype, device = ctx.time_like
            times = times.to(device=device, dtype=dtype)
        return None, gradients.x0, times, *gradients.parameters


def _differentiate(
    problem: Problem, trajectory: Trajectory, grad_states: Tensor, time_gradients: bool
) -> Gradients:
    collectors = active_collectors()
    wanted = wanted_layers(problem.field.modules(), collectors) if collectors else {}
    problem.stats.backward = PhaseStats()
    checkpoint = problem.sensitivity.adjoint == "checkpoint" and problem.forward.foreign is None
    differentiate = replay_backward if checkpoint else solve_backward
    return differentiate(problem, trajectory, grad_states, wanted, time_gradients=time_gradients)


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
