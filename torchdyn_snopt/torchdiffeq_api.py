"""The seam to torchdiffeq: `odeint_adjoint`'s signature and shapes, our backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torchdiffeq
from torch import Tensor, nn

from torchdyn_snopt.adjoint.problem import (
    Field,
    Method,
    Problem,
    SNOptSensitivity,
    bounded,
    check_parameters,
)
from torchdyn_snopt.adjoint.solve import solve
from torchdyn_snopt.adjoint.state import check_state
from torchdyn_snopt.errors import (
    InvalidInputError,
    UnsupportedError,
    check_instance,
    check_real,
)
from torchdyn_snopt.solvers import (
    DOPRI5,
    TORCHDIFFEQ_NAMES,
    SolveStats,
    Tolerances,
    check_segments,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchdyn_snopt.adjoint.problem import ForeignSolver
    from torchdyn_snopt.solvers import PhaseStats

State = Tensor | tuple[Tensor, ...]

_KNOWN_OPTIONS = ("step_size", "grid_constructor", "max_num_steps")
_MOST_GRID_STEPS = 10_000_000
_FOREIGN_METHODS = ("explicit_adams", "implicit_adams", "fixed_adams", "fehlberg2", "scipy_solver")


def odeint_snopt(
    func: Callable[..., Any],
    y0: State,
    t: Tensor,
    *,
    rtol: float = 1e-7,
    atol: float = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: object = None,
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    sensitivity: SNOptSensitivity | None = None,
    stats: SolveStats | None = None,
) -> State:
    """Solve dy/dt = func(t, y) with the SNOpt backward pass; `torchdiffeq.odeint_adjoint`'s twin.

    Fixed-step methods step on the grid of ``options['step_size']`` or
    ``options['grid_constructor']``, and to every time in t exactly.

    Args:
        func: called with t (0-d) and y; an nn.Module, or any callable with ``adjoint_params``.
        y0: first state, a tensor or a tuple of tensors.
        t: times ``[T]``, increasing or decreasing; may require gradients.
        rtol: relative tolerance.
        atol: absolute tolerance, in the units of y.
        method: a name of torchdiffeq's; 'dopri5' when None. Methods that are not Runge–Kutta
            integrate forward through torchdiffeq.
        options: 'step_size', 'grid_constructor' or 'max_num_steps'.
        event_fn: not supported; to be left at None.
        adjoint_rtol: relative tolerance of the backward solve; ``rtol`` when None.
        adjoint_atol: absolute tolerance of the backward solve; ``atol`` when None.
        adjoint_method: method of the backward solve; ``method`` when None.
        adjoint_options: options of the backward solve; when None, ``options`` where the method is
            the same.
        adjoint_params: parameters to differentiate for; all of the module when None.
        sensitivity: how the backward pass is computed; the defaults when None.
        stats: filled with the counts of both solves, if given.

    Returns:
        The states at t, ``[T, *y0.shape]``; a tuple of such tensors for a tuple y0.

    Raises:
        InvalidInputError: times, tolerances, method or parameters that cannot work.
        UnsupportedError: events, complex or dict states, unknown options.
    """
    if event_fn is not None:
        raise UnsupportedError(
            "events are not supported",
            got="event_fn",
            allowed="event_fn=None",
            do="use torchdiffeq.odeint_event",
        )
    sensitivity = sensitivity or SNOptSensitivity()
    _check_types(sensitivity, stats, options, adjoint_options)
    method = method or "dopri5"
    for name in (method, adjoint_method or method):
        check_instance("method", name, str, allowed="a name of torchdiffeq's", do="pass 'dopri5'")
    if adjoint_options is None and adjoint_method in {None, method}:
        adjoint_options = options
    state, field = _flatten(func, y0, adjoint_params)
    check_state(state)
    t = _checked_times(t, state)
    times = tuple(t.detach().double().tolist())
    first = y0[0] if isinstance(y0, tuple) else y0
    problem = Problem(
        field=field,
        times=times,
        forward=_method(field, state, t, method, rtol, atol, options, sensitivity, backward=False),
        backward=_method(
            field,
            state,
            t,
            adjoint_method or method,
            rtol if adjoint_rtol is None else adjoint_rtol,
            atol if adjoint_atol is None else adjoint_atol,
            adjoint_options,
            sensitivity,
            backward=True,
        ),
        sensitivity=sensitivity,
        batch=first.shape[0] if first.dim() > 1 else 1,
        stats=stats if stats is not None else SolveStats(),
    )
    states = solve(problem, state, t)
    return _unflatten(states, y0)


def _check_types(sensitivity: object, stats: object, *options: object) -> None:
    check_instance(
        "sensitivity",
        sensitivity,
        SNOptSensitivity,
        allowed="a SNOptSensitivity, or None for its defaults",
        do="pass sensitivity=SNOptSensitivity(adjoint='checkpoint'), say",
    )
    check_instance(
        "stats",
        stats,
        (SolveStats, type(None)),
        allowed="a SolveStats, which the solve fills, or None",
        do="pass stats=SolveStats()",
    )
    for value in options:
        check_instance(
            "options",
            value,
            (dict, type(None)),
            allowed="a dictionary with " + ", ".join(map(repr, _KNOWN_OPTIONS)) + ", or None",
            do="pass options={'step_size': 0.05}, say",
        )


def _flatten(
    func: Callable[..., Any], y0: State, adjoint_params: Iterable[Tensor] | None
) -> tuple[Tensor, Field]:
    roots = (func,) if isinstance(func, nn.Module) else ()
    if adjoint_params is None:
        if not roots:
            raise InvalidInputError(
                "the parameters to differentiate for are unknown",
                got=f"func of type {type(func).__name__} without adjoint_params",
                allowed="an nn.Module, or adjoint_params=…",
                do="pass adjoint_params=() if there are none",
            )
        adjoint_params = [p for p in roots[0].parameters() if p.requires_grad]
        check_parameters(adjoint_params)
    parameters = _trainable(adjoint_params)
    if isinstance(y0, Tensor):
        return y0, Field(func, parameters, roots)
    if not isinstance(y0, tuple) or not all(isinstance(part, Tensor) for part in y0) or not y0:
        raise UnsupportedError(
            "the state is neither a tensor nor a tuple of tensors",
            got=type(y0).__name__,
            allowed="a tensor, or a non-empty tuple of tensors",
            do="pass tuple(state.values()) for a dict",
        )
    shapes = [part.shape for part in y0]
    sizes = [part.numel() for part in y0]

    def on_flat(t: Tensor, flat: Tensor) -> Tensor:
        parts = (part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True))
        return torch.cat([part.reshape(-1) for part in func(t, tuple(parts))])

    return torch.cat([part.reshape(-1) for part in y0]), Field(on_flat, parameters, roots)


def _trainable(params: object) -> tuple[Tensor, ...]:
    chosen = tuple(params) if isinstance(params, Iterable) and not isinstance(params, str) else None
    if chosen is None or not all(isinstance(p, Tensor) for p in chosen):
        raise InvalidInputError(
            "adjoint_params are no tensors",
            got=f"adjoint_params={params!r}",
            allowed="tensors, such as func.parameters(); those that are frozen are left out",
            do="pass adjoint_params=tuple(func.parameters())",
        )
    return tuple(dict.fromkeys(p for p in chosen if p.requires_grad))


def _unflatten(states: Tensor, y0: State) -> State:
    if isinstance(y0, Tensor):
        return states
    parts = states.split([part.numel() for part in y0], dim=1)
    return tuple(
        part.reshape(len(states), *like.shape) for part, like in zip(parts, y0, strict=True)
    )


def _checked_times(t: Tensor, state: Tensor) -> Tensor:
    if not isinstance(t, Tensor) or t.dim() != 1 or not t.is_floating_point():
        got = f"{list(t.shape)} of {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
        raise InvalidInputError(
            "t is not a sequence of times",
            got=got,
            allowed="a 1-d floating-point tensor",
            do="pass t = torch.linspace(0.0, 1.0, 2)",
        )
    check_segments(t.detach().double().tolist())
    return t.to(state.device)


def _method(
    field: Field,
    state: Tensor,
    t: Tensor,
    name: str,
    rtol: float,
    atol: float,
    options: dict[str, Any] | None,
    sensitivity: SNOptSensitivity,
    *,
    backward: bool,
) -> Method:
    options = dict(options or {})
    if name in _FOREIGN_METHODS:
        if backward:
            return Method(DOPRI5, bounded(_tolerances(rtol, atol), sensitivity))
        return Method(foreign=_torchdiffeq_solver(field, name, rtol, atol, options))
    if name not in TORCHDIFFEQ_NAMES:
        raise InvalidInputError(
            "unknown method",
            got=f"{name!r}",
            allowed=", ".join([*TORCHDIFFEQ_NAMES, *_FOREIGN_METHODS]),
            do="choose one of these names",
        )
    tableau = TORCHDIFFEQ_NAMES[name]
    unknown = [key for key in options if key not in _KNOWN_OPTIONS]
    if unknown:
        raise UnsupportedError(
            "unknown solver options",
            got=", ".join(map(repr, unknown)),
            allowed=", ".join(map(repr, _KNOWN_OPTIONS)),
            do="leave them out",
        )
    if not tableau.adaptive:
        return Method(
            tableau,
            bounded(Tolerances(), sensitivity),
            grid=_grid(field, state, t, options, backward),
        )
    tolerances = bounded(_tolerances(rtol, atol), sensitivity)
    if "max_num_steps" in options:
        tolerances = Tolerances(tolerances.rtol, tolerances.atol, int(options["max_num_steps"]))
    return Method(tableau, tolerances, interpolate=tableau.mid is not None)


def _tolerances(rtol: object, atol: object) -> Tolerances:
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UnsupportedError(
                f"{name} is not one number",
                got=type(value).__name__,
                allowed="a float",
                do="pass the smallest tolerance of the parts",
            )
    return Tolerances(float(rtol), float(atol))  # type: ignore[arg-type]


def _grid(
    field: Field, state: Tensor, t: Tensor, options: dict[str, Any], backward: bool
) -> tuple[float, ...] | None:
    constructor, step_size = options.get("grid_constructor"), options.get("step_size")
    if constructor is not None and step_size is not None:
        raise InvalidInputError(
            "two grids for one solve",
            got="step_size and grid_constructor",
            allowed="one of them",
            do="leave one out",
        )
    if constructor is not None:
        return tuple(constructor(field.func, state, t.detach()).double().tolist())
    if step_size is None:
        return None
    step_size = check_real("step_size", step_size, do="pass step_size=0.05, say")
    times = t.detach().double().tolist()
    if not backward:
        return _even_grid(times[0], times[-1], float(step_size))
    segments = zip(times[1:], times, strict=False)
    return tuple(s for start, stop in segments for s in _even_grid(start, stop, float(step_size)))


def _even_grid(start: float, stop: float, step: float) -> tuple[float, ...]:
    if not 0 < step < math.inf:
        raise InvalidInputError(
            "the step size is not positive",
            got=f"step_size={step}",
            allowed="a finite number above 0, in units of t",
            do="pass step_size=0.05, say",
        )
    count = max(1, math.ceil(abs(stop - start) / step - 1e-9))
    if count > _MOST_GRID_STEPS:
        raise InvalidInputError(
            "the step size makes too many steps",
            got=f"step_size={step}, {count} steps over t = {start} to {stop}",
            allowed=f"at most {_MOST_GRID_STEPS} steps between two times",
            do="pass a greater step_size, or an adaptive method such as 'dopri5'",
        )
    direction = math.copysign(step, stop - start)
    return (*(start + i * direction for i in range(count)), stop)


def _torchdiffeq_solver(
    field: Field, name: str, rtol: float, atol: float, options: dict[str, Any]
) -> ForeignSolver:
    def integrate(x0: Tensor, t: Tensor, counts: PhaseStats) -> Tensor:
        def counted(t: Tensor, x: Tensor) -> Tensor:
            counts.nfe += 1
            return field.func(t, x)

        with torch.no_grad():
            return torchdiffeq.odeint(  # type: ignore[no-any-return]
                counted, x0, t, rtol=rtol, atol=atol, method=name, options=options
            )

    return integrate
