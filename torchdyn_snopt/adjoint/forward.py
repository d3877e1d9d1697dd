"""The forward solve: x(t1) = ODESolve(x(t0), t0, t1, F), keeping what the backward pass needs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from torchdyn_snopt.adjoint.problem import segment_times
from torchdyn_snopt.errors import InvalidInputError, SolverError
from torchdyn_snopt.solvers import NO_ERROR, PROBE, Step, Stepper, System, interpolate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from torchdyn_snopt.adjoint.problem import Field, Problem


# The scaled error up to which the first step back may be longer than all steps there were.
LONGER_BELOW = 1e-2


class Checkpoint(NamedTuple):
    """An accepted forward step: where it started, how long it was, from which state."""

    t: float
    dt: float
    y: Tensor


@dataclass
class Trajectory:
    """What a forward solve leaves behind.

    Attributes:
        states: states at the evaluation times, ``[T, *x.shape]``.
        dt: of an adaptive solve, the first step to try on the way back.
        checkpoints: accepted steps of each segment between evaluation times, if asked for.
    """

    states: Tensor
    dt: float | None = None
    checkpoints: list[list[Checkpoint]] = field(default_factory=list)


class ForwardSystem(System):
    """dx/dt = F(t, x) on flat states."""

    def __init__(self, field: Field, shape: torch.Size) -> None:
        """Set up.

        Args:
            field: F.
            shape: of the state.
        """
        self.field, self.shape = field, shape
        self.on_step: Callable[[Step], None] | None = None

    def evaluate(self, stage: int, t: float, y: Tensor, out: Tensor) -> None:
        """Write F into ``out``; see `System.evaluate`.

        Args:
            stage: number of the stage.
            t: time.
            y: state [N].
            out: row [N].

        Raises:
            InvalidInputError: the field writes into its input.
        """
        version = None if y.is_inference() else y._version
        out.view(self.shape).copy_(self.field(t, y.view(self.shape)).detach())
        if version is not None and y._version != version:
            raise InvalidInputError(
                "the field changes its input in place",
                got="a state that the field has overwritten",
                allowed="a field that leaves its argument as it is",
                do="pass inplace=False to the first activation, or start with x = x.clone()",
            )

    def accepted(self, step: Step) -> None:
        """Show the step to whoever watches.

        Args:
            step: it.
        """
        if self.on_step is not None:
            self.on_step(step)


def solve_forward(problem: Problem, x0: Tensor) -> Trajectory:
    """Integrate over the evaluation times.

    Args:
        problem: what and how.
        x0: first state.

    Returns:
        States at all evaluation times, and what the backward pass needs.
    """
    method = problem.forward
    if method.foreign is not None:
        return _solve_foreign(problem, x0)
    keep = problem.sensitivity.adjoint == "checkpoint"
    system = ForwardSystem(problem.field, x0.shape)
    states = x0.new_empty(len(problem.times), *x0.shape)
    states[0] = x0
    y0 = x0.detach().reshape(-1)
    stepper = Stepper(
        system,
        # A checkpoint has to survive what the caller does to x0, and must not hold the output.
        y0.clone() if keep else y0,
        method.tableau,
        method.tolerances,
        phase="forward",
        stats=problem.stats.forward,
    )
    if method.interpolate and method.tableau.adaptive and not keep:
        return _solve_interpolating(problem, states, stepper, system)
    checkpoints: list[list[Checkpoint]] = []
    if keep:
        system.on_step = lambda step: checkpoints[-1].append(Checkpoint(step.t, step.dt, step.y0))
    for i, (start, stop) in enumerate(zip(problem.times, problem.times[1:], strict=False)):
        checkpoints.append([])
        for t in segment_times(start, stop, method.grid):
            y = stepper.advance(start, t)
            start = t
        states[i + 1] = y.view(x0.shape)
    return Trajectory(states, _step_back(stepper), checkpoints)


def _solve_interpolating(
    problem: Problem, states: Tensor, stepper: Stepper, system: ForwardSystem
) -> Trajectory:
    """One run over the whole interval; evaluation times are read off the steps' dense output."""
    times = problem.times
    direction = 1.0 if times[-1] > times[0] else -1.0
    waiting = 1

    def emit(step: Step) -> None:
        nonlocal waiting
        end = step.t + step.dt
        f1: Tensor | None = None
        while waiting < len(times) - 1 and (end - times[waiting]) * direction >= 0:
            if f1 is None:
                f1 = _slope_at_end(problem, system, step, end)
            s = (times[waiting] - step.t) / step.dt
            states[waiting] = interpolate(step, f1, s).view(states.shape[1:])
            waiting += 1

    system.on_step = emit
    states[-1] = stepper.advance(times[0], times[-1]).view(states.shape[1:])
    return Trajectory(states, _step_back(stepper))


def _step_back(stepper: Stepper) -> float | None:
    # The way back sums integrals that its error norm does not see: gradients, A and B.
    if stepper.dt is None:
        return None
    growth = math.pow(
        LONGER_BELOW / max(stepper.longest_error, NO_ERROR), 1.0 / stepper.tableau.order
    )
    return min(stepper.dt, max(growth, 1.0) * stepper.longest)


def _slope_at_end(problem: Problem, system: System, step: Step, t: float) -> Tensor:
    if step.tableau.fsal:
        return step.k[-1]
    f1 = torch.empty_like(step.y1)
    system.evaluate(PROBE, t, step.y1, f1)
    problem.stats.forward.nfe += 1
    return f1


def _solve_foreign(problem: Problem, x0: Tensor) -> Trajectory:
    assert problem.forward.foreign is not None
    counts = problem.stats.forward
    times = torch.tensor(problem.times, dtype=x0.dtype, device=x0.device)
    states = problem.forward.foreign(x0.detach(), times, counts)
    if states.shape != (len(problem.times), *x0.shape):
        raise InvalidInputError(
            "the solver does not return one state for each time",
            got=f"{list(states.shape)}",
            allowed=f"[{len(problem.times)}, {', '.join(map(str, x0.shape))}]",
            do="check the solver that was passed to the model",
        )
    if not bool(torch.isfinite(states).all()):
        raise SolverError(
            "the state is not finite",
            phase="forward",
            t=problem.times[-1],
            dt=0.0,
            steps=counts.nfe,
            norms={"state": float(torch.linalg.vector_norm(states))},
        )
    return Trajectory(states.detach())
