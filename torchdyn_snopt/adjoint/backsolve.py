"""The backward solve: a(t), the gradients and the curvature in one pass (Eqs. 3–5, 13).

The ODE state holds x and a only. The parameter gradient −∫ F_θᵀ a dt and the curvature integrals do
not feed back into the state, so they are summed with the stage weights bᵢ on accepted steps: the
same numbers as carrying them in the state, at a fraction of the cost and memory.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING

import torch

from torchdyn_snopt.adjoint.along import as_columns, times_sample
from torchdyn_snopt.adjoint.batched import batched_gradients
from torchdyn_snopt.adjoint.free_columns import free_columns, with_owner
from torchdyn_snopt.adjoint.gradients import Gradients, vector_jacobian
from torchdyn_snopt.adjoint.problem import segment_times
from torchdyn_snopt.adjoint.weighted import WeightedSum
from torchdyn_snopt.curvature.recording import LayerTape, PassSums, group_uses
from torchdyn_snopt.solvers import PROBE, Step, Stepper, System, interpolate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.autograd.graph import GradientEdge

    from torchdyn_snopt.adjoint.forward import Trajectory
    from torchdyn_snopt.adjoint.free_columns import FreeColumns
    from torchdyn_snopt.adjoint.problem import Problem
    from torchdyn_snopt.curvature.factors import Use
    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.recording import Owner
    from torchdyn_snopt.curvature.registry import Collector
    from torchdyn_snopt.curvature.seeds import Source

Uses = dict["Owner", "list[Use]"]


class AdjointSystem(System):
    """dx/dt = F, da/dt = −F_xᵀ a − ℓ_x on the flat state (x, a), with the sums on the side.

    With seeds from the loss the state goes on with columns q_1, …, q_R, dq/dt = −F_xᵀ q (Eq. 11).
    """

    def __init__(
        self,
        problem: Problem,
        shape: torch.Size,
        sums: PassSums,
        tape: LayerTape,
        rank: int = 0,
        free: FreeColumns | None = None,
        *,
        along: bool = False,
    ) -> None:
        """Set up.

        Args:
            problem: what and how.
            shape: of the state x.
            sums: takes the curvature of this pass.
            tape: records the layers that somebody wants; idle if nobody does.
            rank: R, the number of columns.
            free: gives the columns p of parameters that no layer owns, if they are wanted.
            along: whether a itself stands for the only column; see `along.multiples`.
        """
        self.rank, self.free, self.along = rank, free, along
        self.field, self.shape, self.n = problem.field, shape, math.prod(shape)
        self.problem = problem
        tableau = problem.backward.tableau
        self.b, self.e, self.fsal = tableau.b, tableau.e, tableau.fsal
        self.stages = tableau.stages
        self.full_norm = problem.sensitivity.error_norm == "full"
        on_grid = problem.sensitivity.quadrature == "grid"
        self.sums, self.tape = sums, tape
        on_ends = sums.estimate and self.fsal and tableau.adaptive and not on_grid
        self.collects_ends = bool(sums.wanted) and on_ends
        self.collects_stages = bool(sums.wanted) and not (on_grid or on_ends)
        self.collects_grid = bool(sums.wanted) and on_grid
        self.total = WeightedSum()
        self.grid: list[float] = []
        self.grid_dt = 0.0
        self._first: tuple[list[Tensor | None], Uses] = ([], {})
        self._last: tuple[list[Tensor | None], Uses] = ([], {})
        self._begin_step()

    def _begin_step(self) -> None:
        self._step_sum = WeightedSum()
        self._step_error = WeightedSum()
        self.sums.reject()

    def evaluate(self, stage: int, t: float, y: Tensor, out: Tensor) -> None:
        """Write (F, −F_xᵀ a − ℓ_x) into ``out``; see `System.evaluate`.

        Args:
            stage: number of the stage.
            t: time.
            y: state (x, a, q), flat [(2 + R) N].
            out: row of that size.
        """
        if stage == 1:
            self._begin_step()
        # Behind the last step of a segment a jumps, so that its last stage starts no other step.
        weighted = stage >= 0 and (self.b[stage] != 0.0 or self.full_norm)
        last = self.fsal and stage == self.stages - 1
        carried = last and not self.at_end
        wanted = weighted or carried
        on_ends = self.collects_ends and (stage == 0 or last)
        curvature = on_ends or (wanted and self.collects_stages)
        gradients, uses = self._vjp(t, y, out, wanted, curvature)
        if on_ends:
            self.sums.add(uses, 1.0)  # and let go of: a sum is smaller than what it is made of
            uses = {}
        if stage == 0:
            if on_ends:
                self.sums.begin()
            self._first = (gradients, uses)
        elif weighted:
            self._step_sum.add(gradients, self.b[stage])
            if self.collects_stages:
                self.sums.add(uses, self.b[stage])
        if self.full_norm and self.e is not None and stage > 0:
            self._step_error.add(gradients, self.e[stage])
        if last:
            self._last = (gradients, uses)

    def _vjp(
        self, t: float, y: Tensor, out: Tensor | None, parameters: bool, curvature: bool
    ) -> tuple[list[Tensor | None], Uses]:
        """One evaluation of F, and one vector-Jacobian product with a and one with all columns."""
        n, shape, field = self.n, self.shape, self.field
        x = y[:n].view(shape).detach().requires_grad_()
        a = y[n : 2 * n].view(shape)
        thetas = field.parameters if parameters else ()
        with torch.enable_grad(), nullcontext() if curvature else self.tape.stopped():
            f = field(t, x)
            outputs, seeds = [f], [a]
            if field.running_cost is not None:
                cost = field.cost(t, x)
                outputs.append(cost)
                seeds.append(torch.ones_like(cost))
        records = self.tape.take()
        inputs: list[Tensor | GradientEdge] = [x, *thetas, *(record.edge for record in records)]
        gradients = vector_jacobian(outputs, inputs, seeds, retain_graph=self.rank > 0)
        columns: Sequence[Tensor | None] = ()
        if self.rank:
            edges = [record.edge for record in records]
            columns = self._column_products(f, x, y[2 * n :], edges, out)
        elif self.along:
            columns = as_columns(gradients[1 + len(thetas) :])
        if out is not None:
            out[:n].view(shape).copy_(f.detach())
            _write_negative(gradients[0], out[n : 2 * n])
        end = 1 + len(thetas)
        uses = group_uses(records, gradients[end:], columns)
        if self.free is not None and curvature:
            q = y[n if self.along else 2 * n :].view(-1, *shape)
            uses.update(self.free.uses(t, x, q, records, columns))
        return list(gradients[1:end]), uses

    def _column_products(
        self, f: Tensor, x: Tensor, q: Tensor, edges: list[GradientEdge], out: Tensor | None
    ) -> list[Tensor | None]:
        """Write −F_xᵀ q into ``out``; return the columns at the layers' outputs."""
        of_x, *of_layers = batched_gradients(f, [x, *edges], q.view(self.rank, *self.shape))
        if out is not None:
            _write_negative(of_x, out[2 * self.n :])
        return of_layers

    def accepted(self, step: Step) -> None:
        """Add the step to the integrals.

        Args:
            step: it; its dt is negative when the forward solve went up in time.
        """
        # dL/dθ = ∫ from t0 to t1 of F_θᵀ a dt, and the step runs the other way: weight −dt.
        if self.b[0] != 0.0:
            self.total.add(self._first[0], -step.dt * self.b[0])
        if self._step_sum.total is not None:
            self.total.add(self._step_sum.total, -step.dt)
        if self.collects_stages:
            if self.b[0] != 0.0:
                self.sums.add(self._first[1], self.b[0])
            self.sums.accept(abs(step.dt))
        if self.collects_ends:
            self.sums.accept_ends(abs(step.dt))
        if self.collects_grid:
            self._collect_on_grid(step)
        if self.fsal:
            self._first = self._last
        self._begin_step()

    def start_segment(self, t: float, t_end: float) -> None:
        """Lay the paper's grid over a segment, when it is in use.

        Args:
            t: where the segment starts.
            t_end: where it ends.
        """
        if self.collects_grid:
            length = abs(t_end - t)
            points = max(1, math.ceil(length / self.problem.sensitivity.grid_step - 1e-9))
            self.grid_dt = length / points
            self.grid = [t + (t_end - t) * (i / points) for i in range(1, points + 1)]

    def _collect_on_grid(self, step: Step) -> None:
        end = step.t + step.dt
        f1: Tensor | None = None
        slack = 1e-9 * abs(step.dt)
        while self.grid and (end - self.grid[0]) * math.copysign(1.0, step.dt) >= -slack:
            t = self.grid.pop(0)
            if f1 is None:
                f1 = step.k[-1] if self.fsal else self._slope(end, step.y1)
            y = interpolate(step, f1, min(1.0, (t - step.t) / step.dt))
            self.sums.add(self._vjp(t, y, None, False, True)[1], 1.0)
            self.sums.accept(self.grid_dt)
            self.problem.stats.backward.nfe += 1

    def _slope(self, t: float, y: Tensor) -> Tensor:
        out = torch.empty_like(y)
        self.evaluate(PROBE, t, y, out)
        self.problem.stats.backward.nfe += 1
        return out

    def extra_error_ratio(self, dt: float) -> float:
        """Scaled error of the parameter gradient, for error_norm='full'.

        Args:
            dt: signed step.

        Returns:
            Root mean square of error / (atol + rtol·|gradient|); 0 for 'state'.
        """
        if not self.full_norm or self.e is None:
            return 0.0
        tolerances = self.problem.backward.tolerances
        error, value = WeightedSum(), WeightedSum()
        error.add(self._first[0], self.e[0])
        error.add(self._step_error.total or [], 1.0)
        value.add(self._first[0], self.b[0])
        value.add(self._step_sum.total or [], 1.0)
        squares, count = 0.0, 0
        totals = self.total.total or [None] * len(self.field.parameters)
        for e, v, total in zip(error.total or [], value.total or [], totals, strict=True):
            if e is None or v is None:
                continue
            after = v * -dt if total is None else total - dt * v
            scale = torch.maximum(
                after.abs(), torch.zeros_like(after) if total is None else total.abs()
            )
            scale.mul_(tolerances.rtol).add_(tolerances.atol)
            squares += float((e * dt / scale).square().sum())
            count += e.numel()
        return math.sqrt(squares / count) if count else 0.0

    def norms(self, y: Tensor) -> dict[str, float]:
        """Norms of x and a.

        Args:
            y: state (x, a, q).

        Returns:
            Them by name.
        """
        n = self.n
        return {
            "x": float(torch.linalg.vector_norm(y[:n])),
            "a": float(torch.linalg.vector_norm(y[n : 2 * n])),
        }


def _write_negative(value: Tensor | None, out: Tensor) -> None:
    if value is None:
        out.zero_()
    else:
        torch.neg(value.reshape(-1), out=out)


def solve_backward(
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
    """Integrate x and a from t1 to t0, and with them the columns if there are any.

    Args:
        problem: what and how.
        trajectory: what the forward solve left.
        grad_states: dL/dx at each evaluation time, ``[T, *x.shape]``.
        wanted: layers whose curvature is to be collected, with their takers.
        time_gradients: whether dL/dt is needed.
        columns: seeds of the terminal curvature at each time ``[R, T, *x.shape]``, or None; they
            are no part of the error norm.
        ranks: number of columns of each source.
        factor: given where the only column is that multiple of each sample's adjoint.

    Returns:
        The gradients.
    """
    states, times = trajectory.states, problem.times
    shape = states.shape[1:]
    n = math.prod(shape)
    tape = LayerTape()
    free = free_columns(problem, tape, shape) if columns is not None else None
    sums = PassSums(with_owner(wanted, free), problem.batch, ranks)
    if factor is not None:
        columns = None
    rank = 0 if columns is None else len(columns)
    system = AdjointSystem(problem, shape, sums, tape, rank, free, along=factor is not None)

    def arriving(i: int) -> Tensor:
        """What the loss adds to (a, q) at a time."""
        a = grad_states[i].reshape(-1)
        return a if columns is None else torch.cat([a, columns[:, i].reshape(-1)])

    y = torch.cat([states[-1].reshape(-1), arriving(-1)])
    stepper = Stepper(
        system,
        y,
        problem.backward.tableau,
        problem.backward.tolerances,
        phase="backward",
        stats=problem.stats.backward,
        dt=trajectory.dt,
        controlled=2 * n if rank else None,
    )
    dt = states.new_zeros(len(times)) if time_gradients else None
    with ExitStack() as stack:
        if wanted:
            stack.enter_context(tape.watching(list(wanted)))
        for i in range(len(times) - 1, 0, -1):
            if dt is not None:
                dt[i] = stepper.first_stage(times[i])[:n].dot(grad_states[i].reshape(-1))
            start = times[i]
            system.start_segment(start, times[i - 1])
            for t in segment_times(start, times[i - 1], problem.backward.grid):
                y = stepper.advance(start, t)
                start = t
            if i > 1:
                y = torch.cat([states[i - 1].reshape(-1), y[n:] + arriving(i - 1)])
                stepper.restart(y)
        if dt is not None:
            dt[0] = -stepper.first_stage(times[0])[:n].dot(y[n : 2 * n])
            if problem.field.running_cost is not None:
                dt[-1] += problem.field.cost(times[-1], states[-1])
                dt[0] -= problem.field.cost(times[0], states[0])
    sums.deliver(times[-1] - times[0], factor)
    parameters = system.total.total or [None] * len(problem.field.parameters)
    adjoints = (y[n:] + arriving(0)).view(1 + rank, *shape)
    first = adjoints[1:] if rank else None
    if factor is not None:
        first = times_sample(factor, adjoints[0]).unsqueeze(0)
    return Gradients(adjoints[0], dt, parameters, first)
