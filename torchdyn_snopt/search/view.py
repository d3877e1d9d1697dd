"""A study as a single trial sees it: the results of the batches before its own, and no others.

What a sampler or a pruner makes of a study depends on which of its trials have ended by then, and
so, with several workers, on chance. Here each trial is given a study that holds exactly the trials
of all earlier batches of its arm and seed, numbered by their place in the plan. Its proposals and
its pruning are then a function of that place and of the sampler's seed, whoever runs it and when.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState


def trial_in_view(
    storage: BaseStorage,
    study_name: str,
    trial_id: int,
    *,
    number: int,
    earlier: Sequence[FrozenTrial],
    name: str,
    sampler: BaseSampler,
    pruner: BasePruner,
) -> optuna.Trial:
    """A running trial that knows of earlier trials only.

    Args:
        storage: The real one; what the trial writes goes there.
        study_name: Name of the real study.
        trial_id: Of the trial in the storage.
        number: The trial's place in its arm.
        earlier: The finished trials that it may know of, in the order of their places.
        name: Of the study in the view; samplers may draw on it.
        sampler: What proposes.
        pruner: What prunes.

    Returns:
        The trial, for an objective.
    """
    study_id = storage.get_study_id_from_name(study_name)
    known = [_numbered(trial, place) for place, trial in enumerate(earlier)]
    view = _View(storage, study_id, trial_id, number, known)
    study = optuna.load_study(study_name=name, storage=view, sampler=sampler, pruner=pruner)
    return optuna.Trial(study, trial_id)


def _numbered(trial: FrozenTrial, number: int) -> FrozenTrial:
    numbered = copy.copy(trial)
    numbered.number = number
    return numbered


class _View(BaseStorage):
    """One study and one running trial of another storage, with a fixed set of other trials."""

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        trial_id: int,
        number: int,
        known: list[FrozenTrial],
    ) -> None:
        self._real, self._study_id = storage, study_id
        self._trial_id, self._number, self._known = trial_id, number, known
        # What samplers note of a study (NSGA-II its parents) follows from the trials in view.
        self._notes: dict[str, Any] = {}

    # --- read: the study in view ------------------------------------------------------------------

    def get_trial(self, trial_id: int) -> FrozenTrial:
        if trial_id != self._trial_id:
            return next(trial for trial in self._known if trial._trial_id == trial_id)
        return _numbered(self._real.get_trial(trial_id), self._number)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self._known if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials

    def get_study_id_from_name(self, study_name: str) -> int:
        return self._study_id

    def get_study_name_from_id(self, study_id: int) -> str:
        return self._real.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        return self._real.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._real.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return dict(self._notes)

    def get_all_studies(self) -> list[Any]:
        return self._real.get_all_studies()

    # --- write: the running trial -----------------------------------------------------------------

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        self._real.set_study_user_attr(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self._notes[key] = value

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        self._real.set_trial_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        return self._real.set_trial_state_values(trial_id, state, values)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        self._real.set_trial_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._real.set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._real.set_trial_system_attr(trial_id, key, value)

    # --- not of a single trial's concern ----------------------------------------------------------

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        raise NotImplementedError

    def delete_study(self, study_id: int) -> None:
        raise NotImplementedError

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        raise NotImplementedError
