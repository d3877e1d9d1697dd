"""The plan of a search: its places, and what has become of each.

A place is one planned trial. In the storage it may be tried several times: a worker that dies
leaves a trial behind that is marked as abandoned, and the place gets another one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState, create_trial

from torchdyn_snopt.search.arms import Arm, get_arm
from torchdyn_snopt.search.settings import SearchSettings

KEY, ABANDONED = "key", "abandoned"  # names of user attributes
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class Place:
    """One planned trial.

    Attributes:
        arm: Name of its arm.
        seed: Of weights and batches.
        index: Number within arm and seed.
    """

    arm: str
    seed: int
    index: int

    @property
    def key(self) -> str:
        """Its identity in the storage."""
        return f"{self.arm}/{self.seed}/{self.index}"

    @property
    def title(self) -> str:
        """For readers."""
        return f"{self.definition.title}, seed {self.seed}, no. {self.index}"

    @property
    def definition(self) -> Arm:
        """The arm."""
        return get_arm(self.arm)

    def attributes(self, settings: SearchSettings) -> dict[str, Any]:
        """What the trial says of itself from the start.

        Args:
            settings: Of the search.

        Returns:
            User attributes.
        """
        return {
            KEY: self.key,
            "name": self.title,
            "arm": self.arm,
            "seed": self.seed,
            "index": self.index,
            "sampler_seed": settings.sampler_seed(self.key),
        }


def places(settings: SearchSettings) -> Iterator[Place]:
    """All places, in the order in which they are taken.

    Args:
        settings: Of the search.

    Yields:
        Places; those of one arm and seed in the order of their indices.
    """
    for seed in range(settings.seeds):
        for name in settings.arms:
            count = settings.trials if get_arm(name).searches else 1
            for index in range(count):
                yield Place(name, seed, index)


def needed_before(place: Place, settings: SearchSettings) -> list[Place]:
    """The places whose results a place's proposal draws on.

    Args:
        place: Any.
        settings: Of the search.

    Returns:
        Those of all earlier batches of its arm and seed.
    """
    begin = place.index - place.index % settings.batch
    return [Place(place.arm, place.seed, index) for index in range(begin)]


def waiting_trial(place: Place, settings: SearchSettings) -> FrozenTrial:
    """A trial for a place that waits for a worker.

    Args:
        place: Which.
        settings: Of the search.

    Returns:
        A trial to be added to the study.
    """
    fixed = place.definition.fixed(settings, place.index)
    return create_trial(
        state=TrialState.WAITING,
        user_attrs=place.attributes(settings),
        system_attrs={"fixed_params": fixed} if fixed else {},
    )


class Ledger:
    """What a study's trials say about the places."""

    def __init__(self, trials: Sequence[FrozenTrial]) -> None:
        """Read the trials.

        Args:
            trials: Of the studies of a search.
        """
        self._current: dict[str, FrozenTrial] = {}
        self.abandoned: dict[str, list[FrozenTrial]] = {}
        for trial in trials:
            key = trial.user_attrs.get(KEY)
            if key is None:  # not ours: somebody has added it by other means
                continue
            if ABANDONED in trial.user_attrs:
                self.abandoned.setdefault(key, []).append(trial)
            else:
                # Of two that workers have added at the same moment, the first one counts.
                self._current.setdefault(key, trial)

    def trial(self, place: Place) -> FrozenTrial | None:
        """The trial that stands for a place.

        Args:
            place: Which.

        Returns:
            It, or None if there is none yet.
        """
        return self._current.get(place.key)

    def has_ended(self, place: Place) -> bool:
        """Whether a place has its result.

        Args:
            place: Which.

        Returns:
            True if completed, pruned or failed.
        """
        trial = self.trial(place)
        return trial is not None and trial.state in ENDED

    def running(self) -> list[FrozenTrial]:
        """Trials in the hands of a worker, or of one that has died."""
        return [t for t in self._current.values() if t.state is TrialState.RUNNING]
