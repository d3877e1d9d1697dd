"""The one stepping loop, for fixed and for adaptive steps, in either direction of time.

The state is one flat tensor y [N]; the stages of a step are the rows of one buffer K [stages, N],
so that every combination of stages is a single matrix-vector product. What is integrated is a
`System`: it writes dy/dt into a row of K and is told which steps were accepted, so that it can sum
time integrals with the method's own weights bᵢ at no extra evaluation.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch

from torchdyn_snopt.errors import InvalidInputError, SolverError
from torchdyn_snopt.solvers.control import (
    StepController,
    Tolerances,
    first_step,
    first_step_guess,
    underflows,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from torchdyn_snopt.errors import Phase
    from torchdyn_snopt.solvers.stats import PhaseStats
    from torchdyn_snopt.solvers.tableaus import Tableau

# Stage number of an evaluation that belongs to no step (first-step probe, grid point).
PROBE = -1
# A last step this much longer than planned is taken whole rather than leaving a sliver.
STRETCH = 1.01


class System:
    """What the loop integrates. Subclasses write derivatives and may watch the steps.

    Attributes:
        at_end: set by the loop before each adaptive step: whether it would reach the segment's end.
    """

    at_end = False

    def evaluate(self, stage: int, t: float, y: Tensor, out: Tensor) -> None:
        """Write dy/dt at (t, y) into ``out``.

        Args:
            stage: number of the stage in its step, or `PROBE`.
            t: time.
            y: state [N]; not to be changed.
            out: row of the stage buffer [N].

        Raises:
            NotImplementedError: the subclass forgot to define it.
        """
        raise NotImplementedError

    def accepted(self, step: Step) -> None:
        """Called after each accepted step.

        Args:
            step: the step, valid during the call only.
        """

    def extra_error_ratio(self, dt: float) -> float:
        """Scaled error of what the system sums outside its state; none by default.

        Args:
            dt: signed step that was just tried.

        Returns:
            A ratio like that of the state, at most 1 for a good step.
        """
        return 0.0

    def norms(self, y: Tensor) -> dict[str, float]:
        """Norms of the parts of a state, for error messages.

        Args:
            y: state [N].

        Returns:
            The Euclidean norm of each part by its name.
        """
        return {"state": float(torch.linalg.vector_norm(y))}


class Step:
    """One accepted step, as a `System` sees it.

    Attributes:
        t: time at its start.
        dt: signed length.
        y0: state at its start [N].
        y1: state at its end [N].
        k: stage buffer [stages, N].
    """

    __slots__ = ("dt", "k", "t", "tableau", "y0", "y1")

    def __init__(
        self, t: float, dt: float, y0: Tensor, y1: Tensor, k: Tensor, tableau: Tableau
    ) -> None:
        """Keep references only.

        Args:
            t: time at the start.
            dt: signed length.
            y0: state at the start [N].
            y1: state at the end [N].
            k: stage buffer [stages, N].
            tableau: the method.
        """
        self.t, self.dt, self.y0, self.y1, self.k, self.tableau = t, dt, y0, y1, k, tableau


class Stepper:
    """Integrates one system over successive segments, carrying step size and stage buffer along.

    Attributes:
        longest: length of the longest adaptive step so far.
        longest_error: its scaled error.
    """

    def __init__(
        self,
        system: System,
        y: Tensor,
        tableau: Tableau,
        tolerances: Tolerances,
        *,
        phase: Phase,
        stats: PhaseStats,
        dt: float | None = None,
        controlled: int | None = None,
    ) -> None:
        """Set up the buffers.

        Args:
            system: what to integrate.
            y: first state [N]; not changed.
            tableau: the method; one without error estimate takes one step a segment.
            tolerances: tolerances and step limit.
            phase: 'forward' or 'backward', for messages.
            stats: counts, increased in place.
            dt: first step to try (its sign is ignored); estimated when None.
            controlled: the error norm covers this many leading entries of y; all when None.
        """
        self.system, self.tableau, self.tolerances = system, tableau, tolerances
        self.phase, self.stats = phase, stats
        self.y = y
        self.controlled = y.numel() if controlled is None else controlled
        self.k = y.new_empty(tableau.stages, y.numel())
        self._kt = self.k.t()
        self._coefficients = tableau.coefficients(y)
        self._controller = StepController(tableau.order)
        self._dt = None if dt is None else abs(dt)
        self.longest = self.longest_error = 0.0
        self._has_first_stage = False
        self._steps = 0

    @property
    def dt(self) -> float | None:
        """Length of the step that would be tried next; None before the first one."""
        return self._dt

    def restart(self, y: Tensor) -> None:
        """Go on from another state (after a jump); the step size is kept.

        Args:
            y: new state [N].
        """
        self.y = y
        self._has_first_stage = False

    def first_stage(self, t: float) -> Tensor:
        """The derivative at the current state, evaluated now if the last step did not leave it.

        Args:
            t: current time.

        Returns:
            Row [N] of the stage buffer, overwritten by the next step.
        """
        if not self._has_first_stage:
            self.system.evaluate(0, t, self.y, self.k[0])
            self.stats.nfe += 1
            self._has_first_stage = True
        return self.k[0]

    def advance(self, t: float, t_end: float) -> Tensor:
        """Integrate from ``t`` to ``t_end``: adaptive steps, or one fixed step.

        Args:
            t: current time.
            t_end: time to reach, on either side of ``t``.

        Returns:
            The state at ``t_end`` [N].

        Raises:
            SolverError: non-finite state, step underflow or too many steps.
        """
        if self.tableau.adaptive:
            self._advance_adaptively(t, t_end)
        else:
            self._advance_once(t, t_end)
        return self.y

    def _advance_once(self, t: float, t_end: float) -> None:
        dt = t_end - t
        self._count_step(t, dt)
        y1 = self._try_step(t, dt)
        if not bool(torch.isfinite(torch.linalg.vector_norm(y1))):
            raise self._error("the state is not finite", t, dt, y1)
        self._accept(t, dt, y1)

    def _advance_adaptively(self, t: float, t_end: float) -> None:
        direction = math.copysign(1.0, t_end - t)
        if self._dt is None:
            self._dt = self._first_step(t, t_end)
        while t != t_end:
            planned = self._dt
            remaining = abs(t_end - t)
            last = planned * STRETCH >= remaining
            if not last and underflows(planned, t, t_end):
                raise self._error("the step size underflows", t, planned, self.y)
            # Where two steps lead to the end, two equal ones err less than a long and a short one.
            length = remaining if last else min(planned, remaining / 2)
            dt = direction * length
            self.system.at_end = last
            self._count_step(t, dt)
            y1 = self._try_step(t, dt)
            ratio = self._error_ratio(y1, dt)
            if ratio <= 1.0:
                self._accept(t, dt, y1)
                if length >= self.longest:
                    self.longest, self.longest_error = length, ratio
                t = t_end if last else t + dt
                grown = length * self._controller.after_accept(ratio, length)
                # A step cut short by the segment's end says nothing against the planned one.
                self._dt = max(grown, planned) if length < planned else grown
            else:
                self._reject(t, t_end, dt, ratio, y1)

    def _try_step(self, t: float, dt: float) -> Tensor:
        self.first_stage(t)
        y, k, kt, a, c = self.y, self.k, self._kt, self._coefficients.a, self.tableau.c
        evaluate = self.system.evaluate
        stage_y = y
        for i in range(1, self.tableau.stages):
            stage_y = torch.addmv(y, kt[:, :i], a[i], alpha=dt)
            evaluate(i, t + c[i] * dt, stage_y, k[i])
        self.stats.nfe += self.tableau.stages - 1
        if self.tableau.fsal:
            return stage_y
        return torch.addmv(y, kt, self._coefficients.b, alpha=dt)

    def _error_ratio(self, y1: Tensor, dt: float) -> float:
        n = self.controlled
        e = self._coefficients.e
        if e is None:  # unreachable: only adaptive methods come here
            return 0.0
        scale = self._scale(torch.maximum(self.y[:n].abs(), y1[:n].abs()))
        error = torch.mv(self._kt[:n], e).div_(scale)
        ratio: float = abs(dt) * torch.linalg.vector_norm(error).item() / math.sqrt(max(n, 1))
        return max(ratio, self.system.extra_error_ratio(dt))

    def _scale(self, size: Tensor) -> Tensor:
        """Atol + rtol·size, in place; never 0, so that an entry that stays 0 has no error."""
        scale = size.mul_(self.tolerances.rtol).add_(self.tolerances.atol)
        if self.tolerances.atol == 0.0:
            scale.clamp_(min=torch.finfo(scale.dtype).tiny)
        return scale

    def _accept(self, t: float, dt: float, y1: Tensor) -> None:
        self.stats.accepted += 1
        self.system.accepted(Step(t, dt, self.y, y1, self.k, self.tableau))
        self.y = y1
        if self.tableau.fsal:
            self.k[0].copy_(self.k[-1])
        self._has_first_stage = self.tableau.fsal

    def _reject(self, t: float, t_end: float, dt: float, ratio: float, y1: Tensor) -> None:
        self.stats.rejected += 1
        if not math.isfinite(ratio) and not bool(
            torch.isfinite(torch.linalg.vector_norm(self.k[0]))
        ):
            raise self._error("the field is not finite", t, dt, self.y)
        self._dt = abs(dt) * self._controller.after_reject(ratio)
        if underflows(self._dt, t, t_end):
            finite = math.isfinite(ratio)
            what = "the step size underflows" if finite else "the state is not finite"
            raise self._error(what, t, self._dt, self.y if finite else y1)

    def _count_step(self, t: float, dt: float) -> None:
        limit = self.tolerances.max_steps
        if self._steps >= limit and self.tableau.adaptive:
            raise self._error(f"the solve needs more than max_steps={limit} steps", t, dt, self.y)
        self._steps += 1

    def _first_step(self, t: float, t_end: float) -> float:
        span = abs(t_end - t)
        n = self.controlled
        y, k0 = self.y[:n], self.first_stage(t)[:n]
        scale = self._scale(y.abs())
        root = math.sqrt(max(n, 1))
        norms = torch.stack(
            [torch.linalg.vector_norm(y / scale), torch.linalg.vector_norm(k0 / scale)]
        )
        d0, d1 = (value / root for value in norms.tolist())
        if not math.isfinite(d0 + d1):
            raise self._error("the field is not finite", t, 0.0, self.y)
        h0 = min(first_step_guess(d0, d1), span)
        probe = torch.empty_like(self.y)
        h0_signed = math.copysign(h0, t_end - t)
        self.system.evaluate(
            PROBE, t + h0_signed, torch.add(self.y, self.k[0], alpha=h0_signed), probe
        )
        self.stats.nfe += 1
        d2 = torch.linalg.vector_norm((probe[:n] - k0) / scale).item() / root / h0
        if not math.isfinite(d2):
            return h0
        return min(first_step(h0, d1, d2, self.tableau.order), span)

    def _error(self, what: str, t: float, dt: float, y: Tensor) -> SolverError:
        return SolverError(
            what, phase=self.phase, t=t, dt=dt, steps=self._steps, norms=self.system.norms(y)
        )


def check_segments(times: Sequence[float]) -> None:
    """Refuse times that no solve can follow.

    Args:
        times: evaluation times.

    Raises:
        InvalidInputError: fewer than two, not finite, repeated, or not monotonic.
    """
    allowed = "at least two finite times, strictly increasing or strictly decreasing"
    if len(times) < 2:
        raise InvalidInputError(
            "the times span no interval",
            got=f"t={list(times)}",
            allowed=allowed,
            do="pass t = torch.tensor([t0, t1])",
        )
    if not all(math.isfinite(t) for t in times):
        raise InvalidInputError(
            "a time is not finite",
            got=f"t={list(times)}",
            allowed=allowed,
            do="check what the times were computed from",
        )
    steps = [b - a for a, b in itertools.pairwise(times)]
    if not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
        raise InvalidInputError(
            "the times are repeated or change direction",
            got=f"t={list(times)[:8]}" + ("…" if len(times) > 8 else ""),
            allowed=allowed,
            do="remove repeated times and sort them (torch.unique does both)",
        )
