"""The exceptions of this package, and the one form that their messages take.

```
SNOptError
├── InvalidInputError  (also a ValueError)           an argument cannot work
├── UnsupportedError   (also a NotImplementedError)  a sound request that is not served here
├── SolverError        (also a RuntimeError)         an ODE solve failed; carries where and how
└── CurvatureError     (also a RuntimeError)         a curvature factor cannot be built or used
```

Every message answers four questions: *what* went wrong, what was *got*, what is *allowed*, and what
to *do*. The parts are keyword arguments, so that a call site cannot forget the order::

    raise InvalidInputError(
        "the tolerance is not positive",
        got=f"{rtol=}",
        allowed="a finite number above 0",
        do="pass rtol=1e-3, or choose a fixed-step solver, which reads no tolerance",
    )

All of them can be pickled and copied with their attributes, so they survive worker processes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

__all__ = [
    "CurvatureError",
    "InvalidInputError",
    "Phase",
    "SNOptError",
    "SolverError",
    "UnsupportedError",
    "check_instance",
    "check_real",
]

Phase: TypeAlias = Literal["forward", "backward"]

_SOLVE_ALLOWED = "a state that stays finite, and steps large enough to reach the end in max_steps"

# What to try after a failed solve, the cheapest remedy first.
_SOLVE_ADVICE: dict[Phase, tuple[str, ...]] = {
    "forward": (
        "loosen the tolerances (rtol, atol)",
        "run the model and its input in float64",
        "use a smoother activation in the field (tanh, softplus or SiLU in place of ReLU)",
        "use a fixed-step solver such as 'rk4'",
        "clip or normalize the state before the solve",
    ),
    "backward": (
        "loosen the tolerances of the adjoint (rtol_adjoint, atol_adjoint; adjoint_rtol, "
        "adjoint_atol in odeint_snopt)",
        "run the model and its input in float64",
        "use a smoother activation in the field (tanh, softplus or SiLU in place of ReLU)",
        "use a fixed-step solver such as 'rk4' for the adjoint",
        "clip or normalize the state before the solve",
    ),
}


class SNOptError(Exception):
    """Base of every exception that this package raises on its own account.

    Args:
        what: What went wrong, as the beginning of a sentence without a full stop.
        got: The offending value, best written as ``f"{name=}"``.
        allowed: What would have been accepted.
        do: What the reader can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        got: str | None = None,
        allowed: str | None = None,
        do: str | None = None,
    ) -> None:
        super().__init__(_compose(what, got=got, allowed=allowed, do=do))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


class InvalidInputError(SNOptError, ValueError):
    """An argument has a value, shape or type with which the call cannot work."""


class UnsupportedError(SNOptError, NotImplementedError):
    """A request that makes sense but is not served here; the message says what to use instead."""


class SolverError(SNOptError, RuntimeError):
    """An ODE solve met a non-finite state, too many steps, or a step too small for its time.

    No partial result accompanies it: the solution and the gradients of that solve do not exist.

    Args:
        what: What the solve met, as the beginning of a sentence without a full stop.
        phase: Which of the two solves failed, ``'forward'`` or ``'backward'``.
        t: The time that the solve had reached.
        dt: The step that it tried from there (signed).
        steps: How many steps it had tried, accepted and rejected ones together.
        norms: The norm of each part of the state, by name; parts whose norm is not finite are
            named in the message.
        allowed: What a solve has to fulfil, where the general sentence does not fit.
        do: What to do, where the general list of remedies does not fit.

    Attributes:
        phase: As the argument.
        t: As the argument.
        dt: As the argument.
        steps: As the argument.
        norms: As the argument, copied into a dictionary.
    """

    phase: Phase
    t: float
    dt: float
    steps: int
    norms: dict[str, float]

    def __init__(
        self,
        what: str,
        *,
        phase: Phase,
        t: float,
        dt: float,
        steps: int,
        norms: Mapping[str, float],
        allowed: str | None = None,
        do: str | None = None,
    ) -> None:
        self.phase, self.t, self.dt, self.steps, self.norms = phase, t, dt, steps, dict(norms)
        super().__init__(
            f"the {phase} solve failed: {what}",
            got=f"t={t:.9g}, dt={dt:.3g}, {steps} steps tried; {_describe_norms(self.norms)}",
            allowed=allowed or _SOLVE_ALLOWED,
            do=do or _enumerate(_SOLVE_ADVICE[phase]),
        )


class CurvatureError(SNOptError, RuntimeError):
    """A layer's curvature could not be collected, or its factors could not be factorized.

    Args:
        what: What went wrong, as the beginning of a sentence without a full stop.
        layer: The name of the layer that it concerns, where there is one.
        failures: How many times in a row the factorization has failed.
        norms: The norm of each factor, by name, where they exist.
        got: What else was met, as for `SNOptError`.
        allowed: What would have been accepted.
        do: What the reader can do about it.

    Attributes:
        layer: As the argument.
        failures: As the argument.
        norms: As the argument, copied into a dictionary (empty if there are none).
    """

    layer: str | None
    failures: int
    norms: dict[str, float]

    def __init__(
        self,
        what: str,
        *,
        layer: str | None = None,
        failures: int = 0,
        norms: Mapping[str, float] | None = None,
        got: str | None = None,
        allowed: str | None = None,
        do: str | None = None,
    ) -> None:
        self.layer, self.failures, self.norms = layer, failures, dict(norms or {})
        super().__init__(what, got=self._describe(got), allowed=allowed, do=do)

    def _describe(self, got: str | None) -> str | None:
        parts = [] if got is None else [got]
        if self.layer is not None:
            parts.append(f"layer {self.layer!r}")
        if self.failures:
            parts.append(f"{self.failures} failures in a row")
        if self.norms:
            parts.append(_describe_norms(self.norms))
        return ", ".join(parts) or None


def check_instance(
    name: str, value: object, kinds: type | tuple[type, ...], *, allowed: str, do: str
) -> None:
    """Refuse an argument of another type.

    Args:
        name: Of the argument.
        value: Of the argument.
        kinds: The types that are accepted.
        allowed: The same in words.
        do: What the reader can do about it.

    Raises:
        InvalidInputError: Another type.
    """
    if not isinstance(value, kinds):
        got = value.__name__ if isinstance(value, type) else f"type {type(value).__name__}"
        raise InvalidInputError(
            f"{name} is nothing that this call can work with",
            got=f"{name} of {got}" if not isinstance(value, type) else f"the class {got} itself",
            allowed=allowed,
            do=do,
        )


def check_real(name: str, value: object, *, do: str) -> float:
    """Refuse what is no real number.

    Args:
        name: Of the argument.
        value: Of the argument; tensors and arrays with one entry count as numbers.
        do: What the reader can do about it.

    Returns:
        The number.

    Raises:
        InvalidInputError: No number: text, None, a flag, several numbers.
    """
    if not isinstance(value, bool | str | bytes):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return float(value)  # type: ignore[arg-type]  # that is what is being found out
    raise InvalidInputError(
        f"{name} is not a number",
        got=f"{name} of type {type(value).__name__}",
        allowed="one real number",
        do=do,
    )


def _compose(what: str, *, got: str | None, allowed: str | None, do: str | None) -> str:
    """Join the four parts; a part that is missing leaves no trace."""
    parts = {"got": got, "allowed": allowed, "do this": do}
    lines = [f"  {name}: {text}" for name, text in parts.items() if text is not None]
    return "\n".join([what, *lines])


def _describe_norms(norms: Mapping[str, float]) -> str:
    """Print norms by name, and repeat the names of those that are not finite."""
    if not norms:
        return "no norms recorded"
    text = "norms " + ", ".join(f"{name}={value:.3g}" for name, value in norms.items())
    bad = [name for name, value in norms.items() if not math.isfinite(value)]
    return f"{text}; not finite: {', '.join(bad)}" if bad else text


def _enumerate(advice: tuple[str, ...]) -> str:
    numbered = "; ".join(f"({number}) {text}" for number, text in enumerate(advice, start=1))
    return f"try in this order: {numbered}"


def _restore(
    cls: type[SNOptError], args: tuple[object, ...], attributes: dict[str, object]
) -> SNOptError:
    """Rebuild a pickled or copied exception without running its constructor again."""
    error = cls.__new__(cls, *args)
    error.__dict__.update(attributes)
    return error
