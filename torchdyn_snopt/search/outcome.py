"""What training reports, and what a trial is judged by."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True)
class Progress:
    """The state of a training run after an epoch.

    Attributes:
        epoch: Finished epochs, from 1.
        error: Of the validation data: the share of wrong answers, or any figure to be minimized.
        nfe: Field evaluations of one forward solve of the validation data.
        evaluations: Field evaluations of the run so far, those of validation included.
        seconds: Seconds of the run so far.
        t1: The horizon.
        loss: Mean training loss of the epoch, where it is known.
    """

    epoch: int
    error: float
    nfe: float
    evaluations: int
    seconds: float
    t1: float
    loss: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


Report: TypeAlias = Callable[[Progress], None]


@dataclass(frozen=True)
class Penalized:
    """The single objective ``error + weight·NFE``, to be minimized.

    Attributes:
        weight: What one field evaluation of the forward solve costs, in units of the error.
    """

    weight: float = 1e-3

    def __call__(self, progress: Progress) -> tuple[float, ...]:
        """The objective's value.

        Args:
            progress: After any epoch.

        Returns:
            One number.
        """
        return (progress.error + self.weight * progress.nfe,)


@dataclass(frozen=True)
class Tradeoff:
    """The pair of error and cost, both to be minimized.

    Attributes:
        cost: 'nfe' of one forward solve, or 'seconds' of training.
    """

    cost: Literal["nfe", "seconds"] = "nfe"

    def __call__(self, progress: Progress) -> tuple[float, ...]:
        """The objectives' values.

        Args:
            progress: After any epoch.

        Returns:
            Two numbers.
        """
        return progress.error, float(getattr(progress, self.cost))


Values: TypeAlias = Penalized | Tradeoff


@dataclass(frozen=True)
class Guards:
    """Limits of a single trial; Optuna prunes none where there are several objectives.

    Attributes:
        evaluations: Field evaluations after which the trial is pruned.
        seconds: Seconds of training after which it is.
    """

    evaluations: float = math.inf
    seconds: float = math.inf

    def broken(self, progress: Progress) -> str | None:
        """What limit a run has passed.

        Args:
            progress: Of the run.

        Returns:
            A sentence, or None.
        """
        for name in ("evaluations", "seconds"):
            used, limit = getattr(progress, name), getattr(self, name)
            if used > limit:
                return f"{used:g} {_UNITS[name]}, above the guard of {limit:g}"
        return None


_UNITS = {"evaluations": "field evaluations", "seconds": "seconds of training"}
