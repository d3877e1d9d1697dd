"""The arms of a comparison: ways to arrive at a horizon, as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.search.settings import SearchSettings
from torchdyn_snopt.search.spaces import Space, fixed_t1, grid_t1, joint, one_run

Fixed: TypeAlias = dict[str, float]


def _nothing_fixed(settings: SearchSettings, index: int) -> Fixed:
    return {}


def _never(settings: SearchSettings) -> BasePruner:
    return NopPruner()


def _random(settings: SearchSettings, seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


def _tpe(settings: SearchSettings, seed: int) -> BaseSampler:
    return TPESampler(seed=seed, n_startup_trials=settings.batch)


def _nsga2(settings: SearchSettings, seed: int) -> BaseSampler:
    return NSGAIISampler(seed=seed, population_size=max(2, settings.batch))


def _depth(settings: SearchSettings) -> Space:
    return fixed_t1(settings.low, settings.high)


def _joint(settings: SearchSettings) -> Space:
    return joint(settings.low, settings.high)


@dataclass(frozen=True)
class Arm:
    """One way.

    Attributes:
        name: On the command line.
        title: In tables and legends.
        space: From the settings to what a trial chooses.
        searches: Whether it takes as many trials as are asked for; else a single one.
        sampler: From settings and seed to what proposes.
        pruner: From settings to what prunes.
        fixed: From settings and index of the trial to parameters that are not proposed.
        objectives: 1 for the penalized error, 2 for the pair of error and cost.
    """

    name: str
    title: str
    space: Callable[[SearchSettings], Space]
    searches: bool = True
    sampler: Callable[[SearchSettings, int], BaseSampler] = _random
    pruner: Callable[[SearchSettings], BasePruner] = _never
    fixed: Callable[[SearchSettings, int], Fixed] = _nothing_fixed
    objectives: int = 1


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(
            "policy",
            "SNOpt policy (one run)",
            lambda s: one_run("policy", s.t1, penalty=s.penalty, low=s.low, high=s.high),
            searches=False,
        ),
        Arm(
            "gradient",
            "gradient of t1 (one run)",
            lambda s: one_run("gradient", s.t1, penalty=s.penalty, low=s.low, high=s.high),
            searches=False,
        ),
        Arm("tpe", "depth search, TPE", _depth, sampler=_tpe),
        Arm(
            "grid",
            "depth search, grid",
            _depth,
            fixed=lambda s, index: {"t1": grid_t1(index, s.low, s.high)},
        ),
        Arm(
            "hyperband",
            "depth search, Hyperband",
            _depth,
            sampler=_tpe,
            pruner=lambda s: HyperbandPruner(min_resource=1, max_resource=s.epochs),
        ),
        Arm(
            "median",
            "depth search, median pruning",
            _depth,
            sampler=_tpe,
            pruner=lambda s: MedianPruner(n_startup_trials=s.batch, n_warmup_steps=1),
        ),
        Arm("joint", "joint search, NSGA-II", _joint, sampler=_nsga2, objectives=2),
        Arm("joint-tpe", "joint search, TPE", _joint, sampler=_tpe, objectives=2),
    )
}

DEPTH_SEARCH = ("tpe", "grid", "hyperband", "median")
DEFAULT_ARMS = SearchSettings().arms


def get_arm(name: str) -> Arm:
    """Look an arm up.

    Args:
        name: Its name in `ARMS`.

    Returns:
        The arm.

    Raises:
        InvalidInputError: There is none of that name.
    """
    if name not in ARMS:
        raise InvalidInputError(
            "there is no such arm",
            got=f"{name!r}",
            allowed=", ".join(ARMS),
            do="choose among these names",
        )
    return ARMS[name]


def directions(arm: Arm) -> list[optuna.study.StudyDirection]:
    """All minimized.

    Args:
        arm: The arm.

    Returns:
        As many as the arm has objectives.
    """
    return [optuna.study.StudyDirection.MINIMIZE] * arm.objectives
