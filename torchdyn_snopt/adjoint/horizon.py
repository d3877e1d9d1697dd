"""What a backward pass tells of the horizon T at which it began: dL/dT of each sample."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from torchdyn_snopt.adjoint.forward import solve_forward
from torchdyn_snopt.curvature.horizon import Response
from torchdyn_snopt.curvature.outside import inside_solve
from torchdyn_snopt.errors import SolverError
from torchdyn_snopt.solvers import SolveStats

if TYPE_CHECKING:
    from torch import Tensor

    from torchdyn_snopt.adjoint.problem import Problem


def deposit(problem: Problem, states: Tensor, grad_states: Tensor) -> None:
    """Leave a sample for each watched horizon of a solve.

    Args:
        problem: the solve.
        states: its states ``[T, *x.shape]``.
        grad_states: dL/dx at the evaluation times, likewise.
    """
    for link in problem.horizons:
        link.deliver(SolveSample(problem, states, grad_states, link.weights))


class SolveSample:
    """Each sample's dL/dT from one backward pass, and how to see it change with the parameters."""

    def __init__(
        self,
        problem: Problem,
        states: Tensor,
        grad_states: Tensor,
        weights: tuple[float, ...],
    ) -> None:
        """Evaluate the field at the ends, once for each time that moves with the horizon.

        Args:
            problem: the solve.
            states: its states ``[T, *x.shape]``.
            grad_states: dL/dx at the evaluation times, likewise.
            weights: derivative of each evaluation time in the horizon.
        """
        self.task = torch._C._current_graph_task_id()
        self._problem, self._weights = problem, weights
        self._states, self._grad_states = states, grad_states
        #: dL/dT of each sample, as the loss weighs it, ``[N]``.
        self.slopes = self._slopes(states)
        problem.stats.backward.nfe += sum(weight != 0.0 for weight in weights)

    def respond(self) -> Response | None:
        """Solve again from the same x0 with the parameters as they are now, without a graph.

        Returns:
            The response, or None if the solve failed and failures are skipped.

        Raises:
            SolverError: the solve failed and failures are not skipped.
        """
        again = replace(self._problem, stats=SolveStats())
        try:
            with torch.no_grad(), inside_solve():
                states = solve_forward(again, self._states[0]).states
        except SolverError:
            if self._problem.sensitivity.on_failure == "skip":
                return None
            raise
        moved = ((states - self._states) * self._grad_states).transpose(0, 1)
        losses = moved.reshape(self._problem.batch, -1).sum(1)
        return Response(self._slopes(states) - self.slopes, losses)

    @torch.no_grad()
    def _slopes(self, states: Tensor) -> Tensor:
        """Σ_i dt_i/dT · a(t_i)·F(t_i, x(t_i)) of each sample; ℓ(t1) as well."""
        problem = self._problem
        total = states.new_zeros(problem.batch)
        with inside_solve():
            for t, weight, x, a in zip(
                problem.times, self._weights, states, self._grad_states, strict=True
            ):
                if weight:
                    products = problem.field(t, x) * a
                    total.add_(products.reshape(problem.batch, -1).sum(1), alpha=weight)
            if problem.field.running_cost is not None:
                cost = problem.field.cost(problem.times[-1], states[-1])
                total.add_(cost / problem.batch, alpha=self._weights[-1])
        return total
