"""The discrete adjoint: replay each accepted step and differentiate it, last one first.

Exact for the discrete solution with its steps held fixed (as fractions of their segment, when the
times themselves are differentiated). Memory grows with the number of accepted steps, by one state
each; the graph of a single step lives at a time.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import torch

from torchdyn_snopt.adjoint.along import as_columns, times_sample
from torchdyn_snopt.adjoint.batched import batched_gradients
from torchdyn_snopt.adjoint.free_columns import free_columns, with_owner
from torchdyn_snopt.adjoint.gradients import Gradients, vector_jacobian
from torchdyn_snopt.adjoint.weighted import WeightedSum
from torchdyn_snopt.curvature.recording import LayerTape, PassSums, Record, group_uses
from torchdyn_snopt.errors import SolverError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.autograd.graph import GradientEdge

    from torchdyn_snopt.adjoint.forward import Checkpoint, Trajectory
    from torchdyn_snopt.adjoint.free_columns import FreeColumns
    from torchdyn_snopt.adjoint.problem import Problem
    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.registry import Collector
    from torchdyn_snopt.curvature.seeds import Source


class _Stage(NamedTuple):
    """One evaluation of the field within a step: its weight, where it was, and what it gave."""

    b: float
    t: float | Tensor
    x: Tensor
    f: Tensor
    records: list[Record]


class Replay:
    """Differentiates the accepted steps of one solve."""

    def __init__(
        self,
        problem: Problem,
        shape: torch.Size,
        sums: PassSums,
        tape: LayerTape,
        free: FreeColumns | None = None,
        *,
        along: bool = False,
    ) -> None:
        """Set up.

        Args:
            problem: what and how.
            shape: of the state.
            sums: takes the curvature.
            tape: records the wanted layers.
            free: gives the columns p of parameters that no layer owns, if they are wanted.
            along: whether a itself stands for the only column; see `along.multiples`.
        """
        self.problem, self.shape, self.sums, self.tape = problem, shape, sums, tape
        self.free, self.along = free, along
        self.tableau = problem.forward.tableau
        self.total = WeightedSum()
        #: Columns of the loss's curvature, pulled back along with a, or None.
        self.columns: Tensor | None = None

    def step(
        self, saved: Checkpoint, a: Tensor, ends: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Pull a back through one step.

        Args:
            saved: the step.
            a: dL/dx at its end.
            ends: 0-d times of the segment's start and end that require gradients, or None.

        Returns:
            dL/dx at the step's start, and dL/d(ends).
        """
        field = self.problem.field
        x = saved.y.view(self.shape).detach().requires_grad_()
        with torch.enable_grad():
            t, dt = self._scaled(saved, ends)
            x1, cost, stages = self._forward(t, dt, x)
        edges = [record.edge for stage in stages for record in stage.records]
        stage_ends = [stage.f for stage in stages] if self.along and self.free else []
        inputs = (x, *field.parameters, *(ends or ()), *edges, *stage_ends)
        outputs, seeds = [x1], [a]
        if cost is not None:
            outputs.append(cost)
            seeds.append(torch.ones_like(cost))
        gradients = vector_jacobian(outputs, inputs, seeds, retain_graph=self.columns is not None)
        n_params, n_ends = len(field.parameters), len(ends or ())
        self.total.add(gradients[1 : 1 + n_params], 1.0)
        at_layers = gradients[1 + n_params + n_ends :][: len(edges)]
        columns: Sequence[Tensor | None]
        at_stages: Sequence[Tensor | None]
        if self.along:
            columns = as_columns(at_layers)
            at_stages = as_columns(gradients[len(gradients) - len(stage_ends) :])
        else:
            columns, at_stages = self._pull_columns(stages, x1, x)
        self._collect(stages, at_layers, columns, at_stages, abs(saved.dt))
        a0 = torch.zeros_like(a) if gradients[0] is None else gradients[0]
        return a0, list(gradients[1 + n_params : 1 + n_params + n_ends])

    def _scaled(
        self, saved: Checkpoint, ends: tuple[Tensor, Tensor] | None
    ) -> tuple[float | Tensor, float | Tensor]:
        """Start and length of the step; they follow the segment's ends if those are given."""
        if ends is None:
            return saved.t, saved.dt
        start, stop = ends
        start_at, length = start.item(), (stop - start).item()
        fraction = (saved.t - start_at) / length
        return start + fraction * (stop - start), (saved.dt / length) * (stop - start)

    def _forward(
        self, t: float | Tensor, dt: float | Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor | None, list[_Stage]]:
        tableau, field = self.tableau, self.problem.field
        stages: list[_Stage] = []
        cost: Tensor | None = None
        count = tableau.stages - 1 if tableau.fsal else tableau.stages
        for i in range(count):
            stage_x = x
            for a_ij, earlier in zip(tableau.a[i], stages, strict=False):
                if a_ij != 0.0:
                    stage_x = stage_x + (a_ij * dt) * earlier.f
            stage_t = t + tableau.c[i] * dt
            f = field(stage_t, stage_x)
            stages.append(_Stage(tableau.b[i], stage_t, stage_x, f, self.tape.take()))
            if field.running_cost is not None and tableau.b[i] != 0.0:
                part = (tableau.b[i] * dt) * field.cost(stage_t, stage_x)
                cost = part if cost is None else cost + part
        self.problem.stats.backward.nfe += count
        x1 = x
        for stage in stages:
            if stage.b != 0.0:
                x1 = x1 + (stage.b * dt) * stage.f
        return x1, cost, stages

    def _collect(
        self,
        stages: list[_Stage],
        gradients: Sequence[Tensor | None],
        columns: Sequence[Tensor | None],
        at_stages: Sequence[Tensor | None],
        dt: float,
    ) -> None:
        """The gradient at stage i is dt bᵢ g, so that B takes it with weight 1/(dt bᵢ).

        Columns p take it as it is, and from stages with bᵢ = 0 too: theirs is the exact derivative.
        """
        start = 0
        for stage, q in zip(stages, at_stages or [None] * len(stages), strict=True):
            stop = start + len(stage.records)
            if (stage.b != 0.0 or self.sums.per_sample) and (stage.records or self.free):
                seen = columns[start:stop]
                uses = group_uses(stage.records, gradients[start:stop], seen)
                if self.free is not None and q is not None:
                    t = float(stage.t)
                    uses.update(self.free.uses(t, stage.x, q, stage.records, seen))
                carried = 1.0 / (stage.b * dt) if stage.b != 0.0 else 0.0
                self.sums.add(uses, stage.b * dt, carried)
            start = stop
        self.sums.accept()

    def _pull_columns(
        self, stages: list[_Stage], x1: Tensor, x: Tensor
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Pull the columns through the step; return them at layers' outputs and at stages."""
        edges: list[Tensor | GradientEdge] = [r.edge for stage in stages for r in stage.records]
        if self.columns is None:
            return [None] * len(edges), [None] * len(stages)
        targets: list[Tensor | GradientEdge] = [] if self.free is None else [s.f for s in stages]
        of_x, *pulled = batched_gradients(x1, [x, *edges, *targets], self.columns)
        self.columns = torch.zeros_like(self.columns) if of_x is None else of_x
        at_stages = pulled[len(edges) :] if targets else [None] * len(stages)
        return pulled[: len(edges)], at_stages


def replay_backward(
    problem: Problem,
    trajectory: Trajectory,
    grad_states: Tensor,
    wanted: dict[LayerModule, list[Collector]],
    *,
    time_gradients: bool,
    columns: Tensor | None = None,
    ranks: dict[Source, int] | None = None,
    factor: Tensor | None = None,
) -> Gradients:
    """Differentiate the discrete solution.

    Args:
        problem: what and how.
        trajectory: states and checkpoints of the forward solve.
        grad_states: dL/dx at each evaluation time, ``[T, *x.shape]``.
        wanted: layers whose curvature is to be collected, with their takers.
        time_gradients: whether dL/dt is needed.
        columns: seeds of the terminal curvature at each time ``[R, T, *x.shape]``, or None.
        ranks: number of columns of each source.
        factor: given where the only column is that multiple of each sample's adjoint.

    Returns:
        The gradients.

    Raises:
        SolverError: a gradient is not finite.
    """
    times = problem.times
    tape, shape = LayerTape(), grad_states.shape[1:]
    free = free_columns(problem, tape, shape) if columns is not None else None
    sums = PassSums(with_owner(wanted, free), problem.batch, ranks)
    replay = Replay(problem, shape, sums, tape, free, along=factor is not None)
    a = grad_states[-1]
    if factor is not None:
        columns = None
    replay.columns = None if columns is None else columns[:, -1]
    dt = grad_states.new_zeros(len(times)) if time_gradients else None
    with ExitStack() as stack:
        if wanted:
            stack.enter_context(tape.watching(list(wanted)))
        for i in range(len(times) - 1, 0, -1):
            ends = _leaves(times[i - 1 : i + 1], grad_states) if dt is not None else None
            for saved in reversed(trajectory.checkpoints[i - 1]):
                a, grad_ends = replay.step(saved, a, ends)
                problem.stats.backward.accepted += 1
                if dt is not None:
                    for j, gradient in zip((i - 1, i), grad_ends, strict=True):
                        dt[j] += 0.0 if gradient is None else gradient
            a = a + grad_states[i - 1]
            if columns is not None and replay.columns is not None:
                replay.columns = replay.columns + columns[:, i - 1]
    if not bool(torch.isfinite(torch.linalg.vector_norm(a))):
        raise SolverError(
            "the gradient is not finite",
            phase="backward",
            t=times[0],
            dt=0.0,
            steps=problem.stats.backward.accepted,
            norms={"a": float(torch.linalg.vector_norm(a))},
        )
    sums.deliver(problem.horizon, factor)
    parameters = replay.total.total or [None] * len(problem.field.parameters)
    first = replay.columns if factor is None else times_sample(factor, a).unsqueeze(0)
    return Gradients(a, dt, parameters, first)


def _leaves(times: tuple[float, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    start, stop = (
        torch.full((), t, dtype=like.dtype, device=like.device).requires_grad_() for t in times
    )
    return start, stop
