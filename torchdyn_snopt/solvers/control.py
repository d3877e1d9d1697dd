"""Step-size control on Python floats: the controller, first step, limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchdyn_snopt.errors import InvalidInputError, check_real

SAFETY = 0.9
MIN_FACTOR = 0.2
MAX_FACTOR = 10.0
# Scaled errors from which no step follows, and from which no trend follows: rounding.
NO_ERROR, SMALL_ERROR = 1e-10, 1e-4
# What the first step's length aims at. Hairer et al. have 0.01, which leaves an error of 1e-3 to
# 1e-4 of the tolerance; this is a step twice as long for a method of order 5.
FIRST_STEP = 0.64
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


class StepController:
    """Step-size control with a look ahead (Gustafsson 1994; Hairer & Wanner II, IV.8).

    After an accepted step of length h with scaled error ρ ≤ 1 the next one is 0.9 h ρ^(−1/k), k the
    order; less where ρ/h^k has grown since the step before, by h_last and ρ_last, as it may go on
    growing: 0.9 h ρ^(−1/k) · (h/h_last) (ρ_last/ρ)^(1/k). After a rejection it is 0.9 h ρ^(−1/k),
    and does not grow at the step after it.
    """

    def __init__(self, order: int) -> None:
        """Start with no history.

        Args:
            order: order of the method's solution.
        """
        self._exponent = 1.0 / order
        self._last: tuple[float, float] | None = None
        self._just_rejected = False

    def after_accept(self, ratio: float, dt: float) -> float:
        """Factor for the next step after an accepted one.

        Args:
            ratio: scaled error of the step, at most 1.
            dt: its length, above 0.

        Returns:
            The factor, within [0.2, 10].
        """
        ratio = max(ratio, NO_ERROR)
        factor = SAFETY * math.pow(ratio, -self._exponent)
        if self._last is not None:
            last_ratio, last_dt = self._last
            trend = dt / last_dt * math.pow(last_ratio / ratio, self._exponent)
            factor *= min(trend, 1.0)
        if self._just_rejected:
            factor = min(factor, 1.0)
        self._just_rejected = False
        self._last = max(ratio, SMALL_ERROR), dt
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
        return min(SAFETY, max(MIN_FACTOR, SAFETY * math.pow(ratio, -self._exponent)))


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
    """First step of Hairer, Nørsett & Wanner I, II.4, with `FIRST_STEP` for their 0.01.

    Args:
        h0: the trial step.
        d1: scaled norm of the derivative.
        d2: scaled norm of the second derivative, estimated over ``h0``.
        order: order of the method.

    Returns:
        A positive step.
    """
    steepest = max(d1, d2)
    power = 1.0 / (order + 1)
    h1 = max(1e-6, h0 * 1e-3) if steepest <= 1e-15 else (FIRST_STEP / steepest) ** power
    return min(100.0 * h0, h1)
