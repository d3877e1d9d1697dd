"""What the functions of the theory share: their arguments, and one integration over a time span."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from torchdyn_snopt.adjoint.weighted import WeightedSum
from torchdyn_snopt.errors import (
    InvalidInputError,
    SolverError,
    check_instance,
    check_real,
)
from torchdyn_snopt.solvers import (
    PhaseStats,
    Stepper,
    System,
    Tableau,
    Tolerances,
    check_segments,
    tableau_named,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchdyn_snopt.errors import Phase

FlatRate: TypeAlias = Callable[[float, Tensor], Tensor]
# An integrator with the signature of torchdiffeq.odeint(func, y0, t): returns states [T, N].
Integrator: TypeAlias = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Span:
    """A time span with the method that crosses it, in either direction.

    Attributes:
        times: t0, …, t1; a fixed-step method steps from each to the next, others use the ends.
        tableau: the Runge–Kutta method, or None for a foreign integrator.
        tolerances: of an adaptive method.
        foreign: an integrator that is not ours, or None.
    """

    times: tuple[float, ...]
    tableau: Tableau | None
    tolerances: Tolerances
    foreign: Integrator | None = None

    def route(self, *, backward: bool) -> tuple[float, ...]:
        """The times in the order in which they are visited.

        Args:
            backward: from t1 to t0.

        Returns:
            At least two times.
        """
        times = self.times[::-1] if backward else self.times
        if self.tableau is not None and not self.tableau.adaptive:
            return times
        return times[0], times[-1]

    def integrate(
        self, rate: FlatRate, y: Tensor, *, backward: bool, phase: Phase, stats: PhaseStats
    ) -> Tensor:
        """Integrate dy/dt = rate(t, y) over the span, without a graph.

        Args:
            rate: called with the time and the flat state.
            y: first state ``[N]``.
            backward: from t1 to t0.
            phase: for messages.
            stats: counts, increased in place.

        Returns:
            The last state ``[N]``.
        """
        if self.foreign is None:
            return self.advance(_RateSystem(rate), y, backward=backward, phase=phase, stats=stats)
        return self._integrate_foreign(rate, y, backward, phase, stats)

    def advance(
        self,
        system: System,
        y: Tensor,
        *,
        backward: bool,
        phase: Phase,
        stats: PhaseStats,
        controlled: int | None = None,
    ) -> Tensor:
        """Integrate a system over the span with the Runge–Kutta method.

        Args:
            system: what to integrate.
            y: first state ``[N]``.
            backward: from t1 to t0.
            phase: for messages.
            stats: counts, increased in place.
            controlled: leading entries that the error norm covers; all when None.

        Returns:
            The last state ``[N]``.
        """
        assert self.tableau is not None
        stepper = Stepper(
            system,
            y,
            self.tableau,
            self.tolerances,
            phase=phase,
            stats=stats,
            controlled=controlled,
        )
        route = self.route(backward=backward)
        for start, stop in pairwise(route):
            y = stepper.advance(start, stop)
        return y

    def _integrate_foreign(
        self, rate: FlatRate, y: Tensor, backward: bool, phase: Phase, stats: PhaseStats
    ) -> Tensor:
        assert self.foreign is not None

        def counted(t: Tensor, state: Tensor) -> Tensor:
            stats.nfe += 1
            return rate(float(t), state)

        ends = torch.tensor(self.route(backward=backward), dtype=y.dtype, device=y.device)
        with torch.no_grad():
            last = self.foreign(counted, y.detach(), ends)[-1]
        if not bool(torch.isfinite(torch.linalg.vector_norm(last))):
            raise SolverError(
                "the state is not finite",
                phase=phase,
                t=float(ends[-1]),
                dt=0.0,
                steps=stats.nfe,
                norms={"state": float(torch.linalg.vector_norm(last))},
            )
        return last


class _RateSystem(System):
    """A plain function of time and state."""

    def __init__(self, rate: FlatRate) -> None:
        self.rate = rate

    def evaluate(self, stage: int, t: float, y: Tensor, out: Tensor) -> None:
        out.copy_(self.rate(t, y))


class StageIntegral:
    """∫ value dt over the accepted steps, by the method's own weights bᵢ.

    For quantities that do not feed back into the state. It keeps an FSAL method's last stage apart
    until its step is accepted, because that stage is the first one of the next step.
    """

    def __init__(self, tableau: Tableau) -> None:
        """Start at zero.

        Args:
            tableau: the method.
        """
        self._b, self._fsal, self._last_stage = tableau.b, tableau.fsal, tableau.stages - 1
        self._total = WeightedSum()
        self._step = WeightedSum()
        self._first: Sequence[Tensor | None] = ()
        self._carried: Sequence[Tensor | None] = ()

    def needs(self, stage: int) -> bool:
        """Whether the value of a stage will be used.

        Args:
            stage: its number, or `PROBE`.

        Returns:
            True when its weight is not 0, or when it is the next step's first stage.
        """
        if stage < 0:
            return False
        return self._b[stage] != 0.0 or (self._fsal and stage == self._last_stage)

    def note(self, stage: int, values: Sequence[Tensor | None]) -> None:
        """Take the value of a stage that is needed.

        Args:
            stage: its number.
            values: tensors that the caller does not change afterwards.
        """
        if stage == 0:
            self._first = values
            return
        if self._b[stage] != 0.0:
            self._step.add(values, self._b[stage])
        if self._fsal and stage == self._last_stage:
            self._carried = values

    def restart_step(self) -> None:
        """Forget the stages of a step that is tried again; to be called at stage 1."""
        self._step = WeightedSum()

    def accept(self, dt: float) -> None:
        """Add the step.

        Args:
            dt: its signed length.
        """
        if self._b[0] != 0.0:
            self._total.add(self._first, dt * self._b[0])
        if self._step.total is not None:
            self._total.add(self._step.total, dt)
        if self._fsal:
            self._first = self._carried
        self._step = WeightedSum()

    def values(self, count: int) -> list[Tensor | None]:
        """The integrals.

        Args:
            count: how many there are.

        Returns:
            One tensor each; None for one that was never given.
        """
        return self._total.total or [None] * count


def make_span(
    t_span: Tensor | Sequence[float], method: str | Integrator, rtol: float, atol: float
) -> Span:
    """Check the times and look the method up.

    Args:
        t_span: times from t0 to t1.
        method: name of a Runge–Kutta method, or an integrator like torchdiffeq.odeint.
        rtol: relative tolerance.
        atol: absolute tolerance.

    Returns:
        The span.
    """
    values = t_span.detach().double().tolist() if isinstance(t_span, Tensor) else t_span
    check_instance(
        "t_span",
        values,
        (list, tuple),
        allowed="a 1-d tensor, a list or a tuple of times",
        do="pass t_span=[0.0, 1.0]",
    )
    values = [check_real("a time", t, do="pass t_span=[0.0, 1.0]") for t in values]
    check_segments(values)
    tolerances = Tolerances(rtol, atol)
    times = tuple(float(t) for t in values)
    if callable(method):
        return Span(times, None, tolerances, method)
    return Span(times, tableau_named(method), tolerances)


def field_parameters(
    func: Callable[..., Tensor], params: Iterable[Tensor] | None
) -> tuple[Tensor, ...]:
    """The tensors that make up u, each once.

    Args:
        func: the field.
        params: them, or None for all trainable ones of a Module.

    Returns:
        Trainable tensors, possibly none.

    Raises:
        InvalidInputError: they are unknown, or one does not require gradients.
    """
    if params is None:
        if not isinstance(func, nn.Module):
            raise InvalidInputError(
                "the parameters to differentiate for are unknown",
                got=f"func of type {type(func).__name__} without params",
                allowed="an nn.Module, or params=…",
                do="pass params=() if there are none",
            )
        return tuple(p for p in func.parameters() if p.requires_grad)
    chosen = tuple(dict.fromkeys(params))
    for i, p in enumerate(chosen):
        if not isinstance(p, Tensor) or not p.requires_grad:
            got = (
                f"requires_grad=False, shape {list(p.shape)}" if isinstance(p, Tensor) else type(p)
            )
            raise InvalidInputError(
                f"entry {i} of params cannot be differentiated for",
                got=f"{got}",
                allowed="tensors with requires_grad=True that the field uses",
                do="leave frozen tensors out, or call requires_grad_() on them",
            )
    return chosen
