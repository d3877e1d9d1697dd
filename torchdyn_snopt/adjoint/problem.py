"""What is to be solved and how: the field, the options, and their checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn

from torchdyn_snopt.adjoint.precision import Precision
from torchdyn_snopt.errors import InvalidInputError, UnsupportedError, check_real
from torchdyn_snopt.solvers import (
    DEFAULT_MAX_STEPS,
    DOPRI5,
    PhaseStats,
    SolveStats,
    Tableau,
    Tolerances,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torchdyn_snopt.curvature.horizon import HorizonLink

FieldCallable: TypeAlias = Callable[[Tensor, Tensor], Tensor]
# A solver that is not ours: from x0 and all times to the states [T, *x.shape], without gradients;
# it counts its field evaluations.
ForeignSolver: TypeAlias = Callable[[Tensor, Tensor, PhaseStats], Tensor]

_CHOICES: dict[str, tuple[str, ...]] = {
    "adjoint": ("backsolve", "checkpoint"),
    "quadrature": ("stages", "grid"),
    "error_norm": ("state", "full"),
    "on_failure": ("raise", "skip"),
}


@dataclass(frozen=True)
class SNOptSensitivity:
    """How the backward pass is computed; accepted wherever the string 'snopt' is.

    Attributes:
        adjoint: 'backsolve' integrates x back together with a(t) (Eqs. 4, 5; memory constant in
            depth); 'checkpoint' keeps the accepted states and replays each step, which gives the
            exact gradient of the discrete solution.
        quadrature: 'stages' takes the time integrals of Eq. 13 with the solver's own weights bᵢ
            (for SNOpt's 'trust_region', which is content with an estimate, by the trapezoidal rule
            over the solver's steps: one evaluation in place of five); 'grid' is the paper's Riemann
            sum over an even grid (line 5 of Algorithm 1).
        grid_step: Δt of that grid, in units of t.
        error_norm: the step size obeys the error of x and a ('state'), or that of the parameter
            gradient as well ('full').
        max_steps: limit on the steps of one solve in one direction.
        on_failure: 'raise' a SolverError, or 'skip': the solution (or the gradients) of a failed
            solve are NaN, `solve_stats` says why, and SNOpt drops the step and counts it.

    Raises:
        InvalidInputError: a value outside those named.
        UnsupportedError: 'checkpoint' together with 'grid' or error_norm='full'.
    """

    adjoint: Literal["backsolve", "checkpoint"] = "backsolve"
    quadrature: Literal["stages", "grid"] = "stages"
    grid_step: float = 0.01
    error_norm: Literal["state", "full"] = "state"
    max_steps: int = DEFAULT_MAX_STEPS
    on_failure: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidInputError(
                    f"unknown {name}",
                    got=f"{name}={value!r}",
                    allowed=", ".join(repr(choice) for choice in allowed),
                    do=f"pass {name}={allowed[0]!r}",
                )
        grid_step = check_real("grid_step", self.grid_step, do="pass grid_step=0.01")
        if not 0 < grid_step < math.inf:
            raise InvalidInputError(
                "the grid of the curvature quadrature has no positive step",
                got=f"grid_step={self.grid_step!r}",
                allowed="a finite number above 0, in units of t",
                do="pass grid_step=0.01",
            )
        Tolerances(max_steps=self.max_steps)
        if self.adjoint == "checkpoint" and self.quadrature == "grid":
            raise UnsupportedError(
                "the paper's grid has no meaning for the discrete adjoint",
                got="adjoint='checkpoint', quadrature='grid'",
                allowed="quadrature='stages' with adjoint='checkpoint'",
                do="leave quadrature at 'stages', or use adjoint='backsolve'",
            )
        if self.adjoint == "checkpoint" and self.error_norm == "full":
            raise UnsupportedError(
                "a replayed step has no error to control",
                got="adjoint='checkpoint', error_norm='full'",
                allowed="error_norm='state' with adjoint='checkpoint'",
                do="leave error_norm at 'state', or use adjoint='backsolve'",
            )


@dataclass
class Field:
    """The vector field F(t, x, θ), with what it depends on.

    Attributes:
        func: called with t (0-d, of the state's dtype) and x.
        parameters: θ, the trainable parameters to differentiate for.
        roots: modules in which layers are looked for when curvature is wanted.
        running_cost: ℓ(t, x), summed over entries and integrated into the loss (Eq. 6), or None.
        precision: autocast, the same at every evaluation.
    """

    func: FieldCallable
    parameters: tuple[Tensor, ...] = ()
    roots: tuple[nn.Module, ...] = ()
    running_cost: FieldCallable | None = None
    precision: Precision = field(default_factory=Precision.current)

    def __call__(self, t: float | Tensor, x: Tensor) -> Tensor:
        """Evaluate the field.

        Args:
            t: time, a number or a 0-d tensor.
            x: state.

        Returns:
            dx/dt, shaped like x.

        Raises:
            InvalidInputError: the field returns something that is no derivative of x.
        """
        if not isinstance(t, Tensor):
            t = torch.full((), t, dtype=x.dtype, device=x.device)
        f = self._evaluate(self.func, t, x)
        if not isinstance(f, Tensor) or f.shape != x.shape:
            got = list(f.shape) if isinstance(f, Tensor) else type(f).__name__
            raise InvalidInputError(
                "the field does not return dx/dt with the shape of the state",
                got=f"{got} for a state {list(x.shape)}",
                allowed="one tensor shaped like the state",
                do="check the last layer of the field",
            )
        return f if f.dtype == x.dtype else f.to(x.dtype)

    def _evaluate(self, func: FieldCallable, t: Tensor, x: Tensor) -> Tensor:
        if self.precision.is_plain:
            return func(t, x)
        with self.precision.restored():
            return func(t, x)

    def cost(self, t: float | Tensor, x: Tensor) -> Tensor:
        """The running cost ℓ, summed.

        Args:
            t: time.
            x: state.

        Returns:
            0-d tensor.
        """
        assert self.running_cost is not None
        if not isinstance(t, Tensor):
            t = torch.full((), t, dtype=x.dtype, device=x.device)
        return self._evaluate(self.running_cost, t, x).sum().to(x.dtype)

    def modules(self) -> Iterator[nn.Module]:
        """All modules below the roots.

        Yields:
            Each once per root.
        """
        for root in self.roots:
            yield from root.modules()


@dataclass(frozen=True)
class Method:
    """How one direction is integrated.

    Attributes:
        tableau: the Runge–Kutta method.
        tolerances: for an adaptive method.
        foreign: a solver that is not ours and replaces the tableau (forward only), or None.
        grid: times of the fixed steps, containing all evaluation times; None: those themselves.
        interpolate: evaluation times inside a step are interpolated rather than stepped to.
    """

    tableau: Tableau = DOPRI5
    tolerances: Tolerances = field(default_factory=Tolerances)
    foreign: ForeignSolver | None = None
    grid: tuple[float, ...] | None = None
    interpolate: bool = False


@dataclass(frozen=True)
class Problem:
    """One solve with its backward pass.

    Attributes:
        field: F.
        times: evaluation times on the host, in float64.
        forward: method of the forward solve.
        backward: method of the backward solve.
        sensitivity: how the backward pass is computed.
        batch: samples in the batch.
        stats: filled by both solves.
        save: indices of the times whose states are returned; None: all.
        horizons: watched parameters on which the times depend.
    """

    field: Field
    times: tuple[float, ...]
    forward: Method
    backward: Method
    sensitivity: SNOptSensitivity
    batch: int
    stats: SolveStats
    save: tuple[int, ...] | None = None
    horizons: tuple[HorizonLink, ...] = ()

    @property
    def horizon(self) -> float:
        """|t1 − t0|."""
        return abs(self.times[-1] - self.times[0])


def check_parameters(parameters: Iterable[Tensor]) -> None:
    """Refuse parameters that stand in for a module's own during one call only.

    The backward solve evaluates the field again, when `torch.func.functional_call` has put the
    module's own parameters back; its gradients would be those at other parameters.

    Args:
        parameters: trainable parameters of a module.

    Raises:
        UnsupportedError: one of them is no nn.Parameter.
    """
    if not all(isinstance(parameter, nn.Parameter) for parameter in parameters):
        raise UnsupportedError(
            "the field's parameters are replaced for this call only (torch.func.functional_call)",
            got="tensors that are no nn.Parameter",
            allowed="the module's own parameters",
            do="use sensitivity='autograd', or load the values into the module",
        )


def bounded(tolerances: Tolerances, sensitivity: SNOptSensitivity) -> Tolerances:
    """Tolerances with the step limit of the sensitivity.

    Args:
        tolerances: rtol and atol.
        sensitivity: gives max_steps.

    Returns:
        Both together.
    """
    return replace(tolerances, max_steps=sensitivity.max_steps)


def segment_times(start: float, stop: float, grid: Sequence[float] | None) -> list[float]:
    """Grid times of one segment, in its direction, without its start and with its end.

    A grid time that differs from an end by no more than the rounding of times in single precision
    is that end: it makes no step of its own.

    Args:
        start: first time.
        stop: last time, on either side.
        grid: times of fixed steps, in any order, or None.

    Returns:
        At least ``[stop]``.
    """
    low, high = min(start, stop), max(start, stop)
    slack = 2e-7 * max(abs(low), abs(high))
    inner = [] if grid is None else sorted(t for t in grid if low + slack < t < high - slack)
    return [*(inner if start < stop else reversed(inner)), stop]
