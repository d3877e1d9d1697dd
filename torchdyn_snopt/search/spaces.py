"""What a trial may choose, as functions of the trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import optuna

from torchdyn_snopt.errors import InvalidInputError

Mode = Literal["fixed", "policy", "gradient"]
MODES: tuple[Mode, ...] = ("fixed", "policy", "gradient")


@dataclass(frozen=True)
class Choice:
    """What one training run is asked to do.

    Attributes:
        mode: 'fixed' keeps t1; 'policy' moves it by SNOpt's feedback policy (Eq. 16); 'gradient' by
            a first-order optimizer (Massaroli et al. 2020).
        t1: The fixed or the first value of t1.
        penalty: c of c/2·t1² in the training loss, where t1 moves.
        lr: Learning rate; the training's own if None.
        damping: Damping of SNOpt; the training's own if None.
        bounds: Smallest and largest t1, where t1 moves.
        seed: Of the initial weights and of the order of the batches.
    """

    mode: Mode
    t1: float
    penalty: float = 0.0
    lr: float | None = None
    damping: float | None = None
    bounds: tuple[float, float] = (1e-2, 10.0)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidInputError(
                "there is no such way to treat the horizon",
                got=f"mode={self.mode!r}",
                allowed=", ".join(MODES),
                do="choose one of these",
            )


Space: TypeAlias = Callable[[optuna.Trial], Choice]


def one_run(
    mode: Mode, t1: float = 1.0, *, penalty: float = 0.0, low: float = 0.05, high: float = 3.0
) -> Space:
    """A space of one point: a single training run that moves t1 itself.

    Args:
        mode: How t1 moves.
        t1: First value.
        penalty: c of c/2·t1².
        low: Smallest t1.
        high: Largest t1.

    Returns:
        A function of the trial.

    Raises:
        InvalidInputError: The bounds span no interval of positive times.
    """
    _check_bounds(low, high)
    return lambda trial: Choice(mode, t1, penalty, bounds=(low, high))


def fixed_t1(low: float = 0.05, high: float = 3.0) -> Space:
    """t1 proposed by the sampler, uniformly in its logarithm at first, and fixed in training.

    Args:
        low: Smallest t1.
        high: Largest t1.

    Returns:
        A function of the trial.

    Raises:
        InvalidInputError: The bounds span no interval of positive times.
    """
    _check_bounds(low, high)
    return lambda trial: Choice("fixed", trial.suggest_float("t1", low, high, log=True))


def joint(
    low: float = 0.05,
    high: float = 3.0,
    *,
    penalty: tuple[float, float] = (1e-3, 1.0),
    lr: tuple[float, float] = (3e-3, 3e-2),
    damping: tuple[float, float] = (1e-10, 1e-6),
) -> Space:
    """Penalty, learning rate, damping and starting t1 of a run of SNOpt's policy.

    Args:
        low: Smallest t1.
        high: Largest t1.
        penalty: Interval of c.
        lr: Interval of the learning rate; as it is, one for SNOpt's 'kfe_adam'.
        damping: Interval of the damping; likewise.

    Returns:
        A function of the trial.

    Raises:
        InvalidInputError: The bounds of t1 span no interval of positive times.
    """
    _check_bounds(low, high)

    def space(trial: optuna.Trial) -> Choice:
        return Choice(
            "policy",
            t1=trial.suggest_float("start t1", low, high, log=True),
            penalty=trial.suggest_float("penalty", *penalty, log=True),
            lr=trial.suggest_float("lr", *lr, log=True),
            damping=trial.suggest_float("damping", *damping, log=True),
            bounds=(low, high),
        )

    return space


def grid_t1(index: int, low: float, high: float) -> float:
    """The index-th point of a grid that is finer with every point: no point depends on how many.

    The points are van der Corput's in the logarithm of t1, so that any first n of them cover the
    interval evenly, and a longer search keeps those of a shorter one.

    Args:
        index: From 0.
        low: Smallest t1.
        high: Largest t1.

    Returns:
        A t1 between the bounds.
    """
    share, scale, rest = 0.0, 0.5, index + 1
    while rest:
        share += scale * (rest & 1)
        rest, scale = rest >> 1, scale / 2
    return float(low * (high / low) ** share)


def _check_bounds(low: float, high: float) -> None:
    if not 0.0 < low < high:
        raise InvalidInputError(
            "the bounds of t1 span no interval of positive times",
            got=f"low={low:g}, high={high:g}",
            allowed="0 < low < high",
            do="pass 0.05 and 3.0, say",
        )
