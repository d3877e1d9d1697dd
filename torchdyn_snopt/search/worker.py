"""A worker: takes one place of the plan after the other until all have ended.

Everything that workers agree upon goes through the storage. A place is claimed by Optuna's one
atomic step from WAITING to RUNNING, which every storage offers, and a place is tried again where
its trial was abandoned, so that any number of workers may come, go and die at any time.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from torchdyn_snopt.search.liveness import Pulse, Watch
from torchdyn_snopt.search.objective import REASON
from torchdyn_snopt.search.outcome import Penalized, Progress, Tradeoff, Values
from torchdyn_snopt.search.plan import (
    ABANDONED,
    Ledger,
    Place,
    needed_before,
    places,
    waiting_trial,
)
from torchdyn_snopt.search.settings import SearchSettings
from torchdyn_snopt.search.view import trial_in_view

POLL = 0.5  # seconds between looks at the storage while others work
DEATHS = 3  # workers that a place may cost before it is failed
STOPPED = "stopped by the user"
Objective = Callable[[optuna.Trial], float | tuple[float, ...]]


class StoppedError(Exception):
    """The user wants the search to stop; the trial in hand is left to others."""


@dataclass(frozen=True)
class Ending:
    """How a trial ended.

    Attributes:
        state: 'complete', 'pruned', 'fail', 'stopped', or 'lost' to another worker.
        values: Of a completed trial.
        reason: Why, where it was not completed.
    """

    state: str
    values: tuple[float, ...] | None = None
    reason: str | None = None


class Observer(Protocol):
    """Who is told about the course of a search."""

    def planned(self, ended: int, total: int) -> None:
        """So many places have ended, of so many."""

    def began(self, place: Place) -> None:
        """This worker has begun a trial."""

    def progressed(self, place: Place, progress: Progress) -> None:
        """It has finished an epoch."""

    def ended(self, place: Place, ending: Ending) -> None:
        """It has ended."""


class Silent:
    """An observer that says nothing."""

    def planned(self, ended: int, total: int) -> None:
        """Nothing."""

    def began(self, place: Place) -> None:
        """Nothing."""

    def progressed(self, place: Place, progress: Progress) -> None:
        """Nothing."""

    def ended(self, place: Place, ending: Ending) -> None:
        """Nothing."""


class Worker:
    """Takes trials, runs them, and takes over those of workers that died.

    Args:
        storage: Shared by all workers.
        studies: Names of the studies, by the number of objectives.
        settings: Of the search.
        objective: From a place to Optuna's objective for it.
        observer: Who is told.
        stop: Asked between trials and after every epoch; True ends the work.
        until: Monotonic time after which no trial is begun.
        watch: Decides which workers have died.
        interval: Seconds between beats of the own pulse.
    """

    def __init__(
        self,
        storage: BaseStorage,
        studies: dict[int, str],
        settings: SearchSettings,
        objective: Callable[[Place, Callable[[Progress], None]], Objective],
        *,
        observer: Observer | None = None,
        stop: Callable[[], bool] = lambda: False,
        until: float | None = None,
        watch: Watch | None = None,
        interval: float | None = None,
    ) -> None:
        self._storage, self._names, self._settings = storage, studies, settings
        self._ids = {size: storage.get_study_id_from_name(name) for size, name in studies.items()}
        self._objective, self._observer = objective, observer or Silent()
        self._stop, self._watch = stop, watch or Watch()
        self._until = math.inf if until is None else until
        self._pulse = {} if interval is None else {"interval": interval}
        self._places = list(places(settings))

    def work(self) -> bool:
        """Until every place has ended, or the user stops.

        Returns:
            Whether every place has ended.
        """
        while not self._stop():
            ledger = self._read()
            ended = sum(map(ledger.has_ended, self._places))
            self._observer.planned(ended, len(self._places))
            if ended == len(self._places):
                return True
            if time.monotonic() >= self._until:
                return False
            if self._give_up_dead(ledger):
                continue
            claimed = self._claim(ledger)
            if claimed is None:
                time.sleep(POLL)
            else:
                self._run(*claimed)
        return False

    # --- the storage ------------------------------------------------------------------------------

    def _read(self) -> Ledger:
        trials: list[FrozenTrial] = []
        for study_id in self._ids.values():
            trials += self._storage.get_all_trials(study_id, deepcopy=False)
        return Ledger(trials)

    def _study_id(self, place: Place) -> int:
        return self._ids[place.definition.objectives]

    def _claim(self, ledger: Ledger) -> tuple[Place, int] | None:
        """The first place that waits and may begin, and the trial that is now ours."""
        for place in self._places:
            trial = ledger.trial(place)
            if trial is not None and trial.state is not TrialState.WAITING:
                continue
            if not all(map(ledger.has_ended, needed_before(place, self._settings))):
                continue
            trial_id = self._add(place) if trial is None else trial._trial_id
            if trial_id is not None and self._take(trial_id):
                return place, trial_id
        return None

    def _add(self, place: Place) -> int | None:
        """A waiting trial for a place; None if another worker was quicker."""
        template = waiting_trial(place, self._settings)
        trial_id = self._storage.create_new_trial(self._study_id(place), template)
        current = self._read().trial(place)
        assert current is not None
        if current._trial_id != trial_id:
            self._abandon(trial_id, f"the same as trial {current.number}, added at the same moment")
            return None
        return trial_id

    def _take(self, trial_id: int) -> bool:
        try:
            return self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _give_up_dead(self, ledger: Ledger) -> bool:
        """Abandon what dead workers have left, so that it is tried again."""
        dead = [trial for trial in ledger.running() if self._watch.is_dead(trial)]
        for trial in dead:
            lost = ledger.abandoned.get(trial.user_attrs["key"], [])
            deaths = sum(t.user_attrs[ABANDONED] != STOPPED for t in lost) + 1
            if deaths < DEATHS:
                self._abandon(trial._trial_id, "its worker died")
            else:
                self._fail(trial._trial_id, f"{deaths} workers died in this trial")
        return bool(dead)

    def _abandon(self, trial_id: int, reason: str) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, ABANDONED, reason)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _fail(self, trial_id: int, reason: str) -> None:
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, REASON, reason)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)

    # --- a trial ----------------------------------------------------------------------------------

    def _run(self, place: Place, trial_id: int) -> None:
        self._observer.began(place)
        try:
            ending = self._evaluate(place, trial_id)
            if ending.state != "stopped":
                state = TrialState[ending.state.upper()]
                self._storage.set_trial_state_values(trial_id, state, ending.values)
        except UpdateFinishedTrialError:
            ending = Ending("lost", reason="another worker took this trial over")
        self._observer.ended(place, ending)

    def _evaluate(self, place: Place, trial_id: int) -> Ending:
        with self._left_to_others(trial_id), Pulse(self._storage, trial_id, **self._pulse):
            trial = self._in_view(place, trial_id)
            try:
                result = self._objective(place, self._listener(place))(trial)
            except optuna.TrialPruned as pruned:
                last = self._storage.get_trial(trial_id)
                value = last.intermediate_values.get(last.last_step or 0)
                return Ending("pruned", None if value is None else (value,), str(pruned))
            except StoppedError:
                self._abandon(trial_id, STOPPED)
                return Ending("stopped", reason=STOPPED)
        values = result if isinstance(result, tuple) else (result,)
        if all(map(math.isfinite, values)):
            return Ending("complete", values)
        reason = self._storage.get_trial(trial_id).user_attrs.get(REASON)
        return Ending("fail", reason=reason)

    @contextlib.contextmanager
    def _left_to_others(self, trial_id: int) -> Iterator[None]:
        """What interrupts the program, or a defect, leaves no trial that seems to run."""
        try:
            yield
        except KeyboardInterrupt:
            self._abandon(trial_id, STOPPED)
            raise
        except UpdateFinishedTrialError:
            raise
        except Exception as error:
            self._abandon(trial_id, f"a defect: {type(error).__name__}: {error}")
            raise

    def _in_view(self, place: Place, trial_id: int) -> optuna.Trial:
        arm, ledger = place.definition, self._read()
        earlier = [ledger.trial(each) for each in needed_before(place, self._settings)]
        return trial_in_view(
            self._storage,
            self._names[arm.objectives],
            trial_id,
            number=place.index,
            earlier=[trial for trial in earlier if trial is not None],
            name=f"{place.arm}/{place.seed}",
            sampler=arm.sampler(self._settings, self._settings.sampler_seed(place.key)),
            pruner=arm.pruner(self._settings),
        )

    def _listener(self, place: Place) -> Callable[[Progress], None]:
        def listen(progress: Progress) -> None:
            self._observer.progressed(place, progress)
            if self._stop():
                raise StoppedError

        return listen


def values_of(place: Place, settings: SearchSettings) -> Values:
    """What the trials of a place are judged by.

    Args:
        place: Which.
        settings: Of the search.

    Returns:
        The objective's value or values.
    """
    if place.definition.objectives == 1:
        return Penalized(settings.nfe_weight)
    return Tradeoff(settings.tradeoff)
