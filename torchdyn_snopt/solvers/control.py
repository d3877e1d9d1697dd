"""Step-size control on Python floats: PI controller, first step, limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchdyn_snopt.errors import InvalidInputError, check_real

SAFETY = 0.9
MIN_FACTOR = 0.2
MAX_FACTOR = 10.0
DEFAULT_MAX_STEPS = 10_000
# A step below this multiple of the time's spacing in float64 no longer moves the time.
UNDERFLOW_ULPS = 16.0


@dataclass(frozen=True)
class Tolerances:
    """What an adaptive solve has to meet, and where it gives up.

    Attributes:
        rtol: relative tolerance, above 0.
        atol: absolute tolerance in the units of the state, at least 0.
        max_steps: limit on accepted and rejected steps together, per solve.
    """

    rtol: float = 1e-3
    atol: float = 1e-3
    max_steps: int = DEFAULT_MAX_STEPS

    def __post_init__(self) -> None:
        for name, value, low_ok in (("rtol", self.rtol, False), ("atol", self.atol, True)):
            check_real(name, value, do=f"pass {name}=1e-3")
            if not math.isfinite(value) or value < 0 or (value == 0 and not low_ok):
                raise InvalidInputError(
                    f"the tolerance {name} cannot steer an adaptive solve",
                    got=f"{name}={value!r}",
                    allowed="a finite number " + ("of at least 0" if low_ok else "above 0"),
                    do=f"pass {name}=1e-3, or choose a fixed-step solver such as 'rk4'",
                )
        if not _is_count(self.max_steps):
            raise InvalidInputError(
                "max_steps leaves no room for a step",
                got=f"max_steps={self.max_steps!r}",
                allowed="a whole number of at least 1",
                do=f"leave it at its default, {DEFAULT_MAX_STEPS}",
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class PIController:
    """Proportional–integral step-size control (Gustafsson 1991; Hairer & Wanner II, IV.2).

    After an accepted step with scaled error ρ ≤ 1 the next step is the last one times
    0.9 ρ^(−0.7/k) ρ_last^(0.4/k), k the order; after a rejection, times 0.9 ρ^(−1/k) and no growth
    at the step after it.
    """

    def __init__(self, order: int) -> None:
        """Start with no history.

        Args:
            order: order of the method's solution.
        """
        self._alpha = 0.7 / order
        self._beta = 0.4 / order
        self._reject = 1.0 / order
        self._last_ratio = 1.0
        self._just_rejected = False

    def after_accept(self, ratio: float) -> float:
        """Factor for the next step after an accepted one.

        Args:
            ratio: scaled error of the step, at most 1.

        Returns:
            The factor, within [0.2, 10].
        """
        if ratio == 0.0:
            factor = MAX_FACTOR
        else:
            factor = SAFETY * math.pow(ratio, -self._alpha) * math.pow(self._last_ratio, self._beta)
        if self._just_rejected:
            factor = min(factor, 1.0)
        self._just_rejected = False
        self._last_ratio = max(ratio, 1e-4)
        return min(MAX_FACTOR, max(MIN_FACTOR, factor))

    def after_reject(self, ratio: float) -> float:
        """Factor for the repetition of a rejected step.

        Args:
            ratio: scaled error of the step, above 1 or not finite.

        Returns:
            The factor, within [0.2, 0.9].
        """
        self._just_rejected = True
        if not math.isfinite(ratio):
            return MIN_FACTOR
        return min(SAFETY, max(MIN_FACTOR, SAFETY * math.pow(ratio, -self._reject)))


def underflows(dt: float, t: float, t_end: float) -> bool:
    """Whether a step is too small to move the time reliably.

    Args:
        dt: the signed step.
        t: current time.
        t_end: last time of the solve.

    Returns:
        True when |dt| is below 16 units in the last place of the larger time.
    """
    scale = max(abs(t), abs(t_end), 1e-300)
    return abs(dt) < UNDERFLOW_ULPS * math.ulp(scale)


def first_step_guess(d0: float, d1: float) -> float:
    """First trial step of Hairer, Nørsett & Wanner I, II.4: 1 % of the scale of change.

    Args:
        d0: scaled norm of the state.
        d1: scaled norm of its derivative.

    Returns:
        A positive step.
    """
    if d0 < 1e-5 or d1 < 1e-5:
        return 1e-6
    return 0.01 * d0 / d1


def first_step(h0: float, d1: float, d2: float, order: int) -> float:
    """First step of Hairer, Nørsett & Wanner I, II.4.

    Args:
        h0: the trial step.
        d1: scaled norm of the derivative.
        d2: scaled norm of the second derivative, estimated over ``h0``.
        order: order of the method.

    Returns:
        A positive step.
    """
    steepest = max(d1, d2)
    h1 = max(1e-6, h0 * 1e-3) if steepest <= 1e-15 else (0.01 / steepest) ** (1.0 / (order + 1))
    return min(100.0 * h0, h1)
