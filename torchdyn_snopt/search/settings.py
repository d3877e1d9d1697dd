"""What determines the trials of a search."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np

from torchdyn_snopt.errors import InvalidInputError


@dataclass(frozen=True)
class SearchSettings:
    """What determines the trials of a search: equal settings, equal trials.

    Attributes:
        arms: Names of the arms.
        trials: Trials of each searching arm and seed, in total over all starts and workers.
        seeds: Repetitions with other weights, batches and proposals: 0, 1, ...
        epochs: Passes over the training data in every run that is not pruned.
        nfe_weight: Weight of the forward solve's field evaluations in the objective.
        penalty: c of c/2·t1², where t1 moves.
        t1: First value of t1, where it moves.
        low: Smallest t1 that a search proposes.
        high: Largest t1 that a search proposes.
        batch: Trials of an arm that are proposed together, from the results of all earlier
            batches. It bounds how many workers share an arm, and makes what is proposed
            independent of their number.
        tradeoff: The second objective of the joint arms.
        seed: Of all proposals.
        problem: What is trained, as plain values.
    """

    arms: tuple[str, ...] = ("policy", "gradient", "tpe", "hyperband", "joint")
    trials: int = 8
    seeds: int = 1
    epochs: int = 3
    nfe_weight: float = 1e-3
    penalty: float = 2.0
    t1: float = 1.0
    low: float = 0.05
    high: float = 3.0
    batch: int = 4
    tradeoff: Literal["nfe", "seconds"] = "nfe"
    seed: int = 0
    problem: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fine = {
            "arms": (len(self.arms) > 0, "at least one arm"),
            "trials": (self.trials >= 1, "a whole number of at least 1"),
            "seeds": (self.seeds >= 1, "a whole number of at least 1"),
            "epochs": (self.epochs >= 1, "a whole number of at least 1"),
            "batch": (self.batch >= 1, "a whole number of at least 1"),
            "low": (0.0 < self.low < self.high, "0 < low < high"),
            "t1": (self.low <= self.t1 <= self.high, "a t1 between low and high"),
            "nfe_weight": (self.nfe_weight >= 0.0, "a number of at least 0"),
            "penalty": (self.penalty >= 0.0, "a number of at least 0"),
        }
        for name, (is_fine, allowed) in fine.items():
            if not is_fine:
                raise InvalidInputError(
                    f"{name} of the search is out of range",
                    got=f"{name}={getattr(self, name)!r}",
                    allowed=allowed,
                    do=f"leave {name} at its default",
                )

    def describe(self) -> dict[str, Any]:
        """As plain values, for a study's attributes."""
        return {**asdict(self), "arms": list(self.arms), "problem": dict(self.problem)}

    def extend(self, wanted: SearchSettings) -> SearchSettings:
        """These settings of a study, with what a further start may add: arms, trials and seeds.

        Args:
            wanted: The settings of that start.

        Returns:
            The settings that hold from then on.

        Raises:
            InvalidInputError: They differ in something that determines a trial.
        """
        different = [f.name for f in fields(self) if f.name not in _EXTENDABLE]
        different = [name for name in different if getattr(self, name) != getattr(wanted, name)]
        if different:
            raise InvalidInputError(
                "the study was begun with other settings",
                got=", ".join(f"{name}={getattr(wanted, name)!r}" for name in different),
                allowed=", ".join(f"{name}={getattr(self, name)!r}" for name in different),
                do="go on with the settings of the study, or choose another name with --study",
            )
        arms = tuple(dict.fromkeys((*self.arms, *wanted.arms)))
        trials, seeds = max(self.trials, wanted.trials), max(self.seeds, wanted.seeds)
        return replace(self, arms=arms, trials=trials, seeds=seeds)

    def sampler_seed(self, key: str) -> int:
        """The seed of a trial's proposal: a function of the trial's place, not of its worker.

        Args:
            key: Of the trial's place in the plan.

        Returns:
            A number below 2³².
        """
        entropy = np.random.SeedSequence([self.seed, zlib.crc32(key.encode())])
        return int(entropy.generate_state(1)[0])


_EXTENDABLE = {"arms", "trials", "seeds"}


def read_settings(described: Mapping[str, Any]) -> SearchSettings:
    """Settings from a study's attributes.

    Args:
        described: What `SearchSettings.describe` returned.

    Returns:
        The settings.
    """
    known = {f.name for f in fields(SearchSettings)}
    values = {name: value for name, value in described.items() if name in known}
    return SearchSettings(**{**values, "arms": tuple(described["arms"])})
