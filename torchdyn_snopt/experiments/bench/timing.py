"""Timing of contenders against each other on a machine whose speed wavers.

In every round each contender is measured once, one right after the other, in an order that rotates
from round to round. What is reported are ratios within a round: a machine that is slow for a while
is slow for all. One measurement repeats the work until it lasts long enough for the clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torchdyn_snopt.experiments.meters import Clock

SHORTEST = 0.05  # seconds of one measurement

Contender = Callable[[Clock], float]
"""Does its work once and returns the seconds that the measured part of it took."""


@dataclass(frozen=True)
class Ratio:
    """Ratios of two contenders, one per round.

    Attributes:
        values: One ratio per round.
    """

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over rounds."""
        return statistics.median(self.values)

    def show(self) -> str:
        """Median and range."""
        return f"{self.median:.2f} [{min(self.values):.2f}, {max(self.values):.2f}]"


@dataclass(frozen=True)
class Timings:
    """Measurements of several contenders.

    Attributes:
        seconds: Per contender, seconds per repetition in each round.
    """

    seconds: Mapping[str, list[float]]

    def milliseconds(self, name: str) -> float:
        """The median time of a contender.

        Args:
            name: Which one.

        Returns:
            Milliseconds per repetition.
        """
        return 1e3 * statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> Ratio:
        """One contender's time relative to another's.

        Args:
            name: The numerator.
            reference: The denominator.

        Returns:
            Their ratio in every round.
        """
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return Ratio(tuple(mine / other for mine, other in pairs))


def whole(work: Callable[[], object]) -> Contender:
    """A contender all of whose work is measured.

    Args:
        work: What to do.

    Returns:
        The contender.
    """

    def measure(clock: Clock) -> float:
        started = clock.read()
        work()
        return clock.read() - started

    return measure


def interleave(contenders: Mapping[str, Contender], rounds: int, clock: Clock) -> Timings:
    """Let contenders take turns.

    Args:
        contenders: Who takes part, by name.
        rounds: How many times each is measured.
        clock: The clock.

    Returns:
        All measurements.
    """
    repetitions = _warm_up(contenders, clock)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            total = sum(contenders[name](clock) for _ in range(repetitions))
            seconds[name].append(total / repetitions)
    return Timings(seconds)


def _warm_up(contenders: Mapping[str, Contender], clock: Clock) -> int:
    """Run everything twice, and see how often to repeat so that the fastest lasts long enough."""
    fastest = min(min(run(clock), run(clock)) for run in contenders.values())
    return max(1, round(SHORTEST / max(fastest, 1e-9)))
