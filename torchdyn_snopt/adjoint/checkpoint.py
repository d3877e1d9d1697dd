"""The discrete adjoint: replay each accepted step and differentiate it, last one first.

Exact for the discrete solution with its steps held fixed (as fractions of their segment, when the
times themselves are differentiated). Memory grows with the number of accepted steps, by one state
each; the graph of a single step lives at a time.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from torchdyn_snopt.adjoint.batched import batched_gradients
from torchdyn_snopt.adjoint.gradients import Gradients, vector_jacobian
from torchdyn_snopt.adjoint.weighted import WeightedSum
from torchdyn_snopt.curvature.recording import LayerTape, PassSums, Record, group_uses
from torchdyn_snopt.errors import SolverError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from torchdyn_snopt.adjoint.forward import Checkpoint, Trajectory
    from torchdyn_snopt.adjoint.problem import Problem
    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.registry import Collector


class Replay:
    """Differentiates the accepted steps of one solve."""

    def __init__(
        self, problem: Problem, shape: torch.Size, sums: PassSums, tape: LayerTape
    ) -> None:
        """Set up.

        Args:
            problem: what and how.
            shape: of the state.
            sums: takes the curvature.
            tape: records the wanted layers.
        """
        self.problem, self.shape, self.sums, self.tape = problem, shape, sums, tape
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
            x1, cost, records = self._forward(t, dt, x)
        flat = [record for _, stage in records for record in stage]
        inputs = (x, *field.parameters, *(ends or ()), *(record.edge for record in flat))
        outputs, seeds = [x1], [a]
        if cost is not None:
            outputs.append(cost)
            seeds.append(torch.ones_like(cost))
        gradients = vector_jacobian(outputs, inputs, seeds, retain_graph=self.columns is not None)
        columns: Sequence[Tensor | None] = [None] * len(flat)
        if self.columns is not None:
            edges = [record.edge for record in flat]
            of_x, *columns = batched_gradients(x1, [x, *edges], self.columns)
            self.columns = torch.zeros_like(self.columns) if of_x is None else of_x
        n_params, n_ends = len(field.parameters), len(ends or ())
        self.total.add(gradients[1 : 1 + n_params], 1.0)
        self._collect(records, gradients[1 + n_params + n_ends :], columns, abs(saved.dt))
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
    ) -> tuple[Tensor, Tensor | None, list[tuple[float, list[Record]]]]:
        tableau, field = self.tableau, self.problem.field
        k: list[Tensor] = []
        records: list[tuple[float, list[Record]]] = []
        cost: Tensor | None = None
        stages = tableau.stages - 1 if tableau.fsal else tableau.stages
        for i in range(stages):
            stage_x = x
            for a_ij, k_j in zip(tableau.a[i], k, strict=True):
                if a_ij != 0.0:
                    stage_x = stage_x + (a_ij * dt) * k_j
            stage_t = t + tableau.c[i] * dt
            k.append(field(stage_t, stage_x))
            records.append((tableau.b[i], self.tape.take()))
            if field.running_cost is not None and tableau.b[i] != 0.0:
                part = (tableau.b[i] * dt) * field.cost(stage_t, stage_x)
                cost = part if cost is None else cost + part
        self.problem.stats.backward.nfe += stages
        x1 = x
        for b_i, k_i in zip(tableau.b, k, strict=False):
            if b_i != 0.0:
                x1 = x1 + (b_i * dt) * k_i
        return x1, cost, records

    def _collect(
        self,
        records: list[tuple[float, list[Record]]],
        gradients: Sequence[Tensor | None],
        columns: Sequence[Tensor | None],
        dt: float,
    ) -> None:
        """The gradient at stage i is dt bᵢ g, so that B takes it with weight 1/(dt bᵢ)."""
        start = 0
        for b, stage in records:
            stop = start + len(stage)
            if b != 0.0 and stage:
                uses = group_uses(stage, gradients[start:stop], columns[start:stop])
                self.sums.add(uses, b * dt, 1.0 / (b * dt))
            start = stop


def replay_backward(
    problem: Problem,
    trajectory: Trajectory,
    grad_states: Tensor,
    wanted: dict[LayerModule, list[Collector]],
    *,
    time_gradients: bool,
    columns: Tensor | None = None,
) -> Gradients:
    """Differentiate the discrete solution.

    Args:
        problem: what and how.
        trajectory: states and checkpoints of the forward solve.
        grad_states: dL/dx at each evaluation time, ``[T, *x.shape]``.
        wanted: layers whose curvature is to be collected, with their takers.
        time_gradients: whether dL/dt is needed.
        columns: seeds of the terminal curvature at each time ``[R, T, *x.shape]``, or None.

    Returns:
        The gradients.

    Raises:
        SolverError: a gradient is not finite.
    """
    times = problem.times
    sums = PassSums(wanted, problem.batch)
    tape = LayerTape()
    replay = Replay(problem, grad_states.shape[1:], sums, tape)
    a = grad_states[-1]
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
    sums.deliver(problem.horizon)
    parameters = replay.total.total or [None] * len(problem.field.parameters)
    return Gradients(a, dt, parameters, replay.columns)


def _leaves(times: tuple[float, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    start, stop = (
        torch.full((), t, dtype=like.dtype, device=like.device).requires_grad_() for t in times
    )
    return start, stop
