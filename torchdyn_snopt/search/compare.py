"""The comparison: every arm on the same data, weights and budget, in one resumable search."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import optuna
from optuna.artifacts import FileSystemArtifactStore

from torchdyn_snopt.search.arms import directions, get_arm
from torchdyn_snopt.search.liveness import Watch
from torchdyn_snopt.search.objective import HorizonObjective
from torchdyn_snopt.search.outcome import Guards, Progress, Report
from torchdyn_snopt.search.plan import Place
from torchdyn_snopt.search.results import Comparison, read_comparison
from torchdyn_snopt.search.settings import SearchSettings, read_settings
from torchdyn_snopt.search.spaces import Choice
from torchdyn_snopt.search.storage import StudyStorage, default_url, open_storage
from torchdyn_snopt.search.worker import Objective, Observer, Worker, values_of

Model = TypeVar("Model")
SETTINGS, TITLE = "settings", "title"  # user attributes of a study
ARTIFACTS = "artifacts"
_SUFFIX = {1: "", 2: " (joint)"}


class HorizonSearch(Generic[Model]):
    """A search in a storage, which any number of processes may open.

    Args:
        opened: The storage.
        name: Of the study; the arms with two objectives share another one, named after it.
        settings: What is wanted; a study that exists is extended to it.
        out: Folder of artifacts and reports.
        title: Of the problem, for readers.
    """

    def __init__(
        self,
        opened: StudyStorage,
        name: str,
        settings: SearchSettings,
        out: Path,
        *,
        title: str = "",
    ) -> None:
        self.storage, self.name, self.out, self.title = opened.storage, name, out, title
        self.settings = self._settle(settings)
        folder = out / ARTIFACTS
        folder.mkdir(parents=True, exist_ok=True)
        self.artifacts = FileSystemArtifactStore(str(folder))

    @property
    def studies(self) -> dict[int, str]:
        """Names of the studies by number of objectives."""
        sizes = {get_arm(name).objectives for name in self.settings.arms}
        return {size: self.name + _SUFFIX[size] for size in sorted(sizes)}

    def load(self, size: int = 1) -> optuna.Study:
        """One of the studies.

        Args:
            size: Its number of objectives.

        Returns:
            The study, as Optuna knows it.
        """
        return optuna.load_study(study_name=self.studies[size], storage=self.storage)

    def work(
        self,
        build_model: Callable[[Choice], Model],
        train: Callable[[Model, Choice, Report], None],
        *,
        checkpoint: Callable[[Model], Mapping[str, Any]] | None = None,
        guards: Guards | None = None,
        observer: Observer | None = None,
        stop: Callable[[], bool] = lambda: False,
        seconds: float | None = None,
        watch: Watch | None = None,
        interval: float | None = None,
    ) -> bool:
        """Take part in the search until its plan is fulfilled.

        Args:
            build_model: As for `HorizonObjective`.
            train: As for `HorizonObjective`.
            checkpoint: As for `HorizonObjective`.
            guards: Limits of each trial.
            observer: Who is told about it.
            stop: Asked between trials and after every epoch; True leaves the rest to others.
            seconds: After which no further trial is begun.
            watch: Decides which other workers have died.
            interval: Seconds between signs of life of this one.

        Returns:
            Whether the plan is fulfilled.
        """

        def objective(place: Place, listen: Callable[[Progress], None]) -> Objective:
            return HorizonObjective(
                build_model,
                _told(train, listen),
                space=place.definition.space(self.settings),
                values=values_of(place, self.settings),
                seed=place.seed,
                guards=guards,
                artifacts=self.artifacts,
                checkpoint=checkpoint,
            )

        worker = Worker(
            self.storage,
            self.studies,
            self.settings,
            objective,
            observer=observer,
            stop=stop,
            until=None if seconds is None else time.monotonic() + seconds,
            watch=watch,
            interval=interval,
        )
        return worker.work()

    def comparison(self) -> Comparison:
        """What has been found so far.

        Returns:
            The trials of all arms.
        """
        trials = [t for size in self.studies for t in self.load(size).get_trials(deepcopy=False)]
        return read_comparison(trials, self.settings, self.title)

    # --- settings ---------------------------------------------------------------------------------

    def _settle(self, wanted: SearchSettings) -> SearchSettings:
        """Create what is missing; the studies' settings are the same for every worker."""
        self.settings = wanted
        for size in self.studies:
            self._create(size)
        study = self.load(min(self.studies))
        known = study.user_attrs.get(SETTINGS)
        settings = wanted if known is None else read_settings(known).extend(wanted)
        self.settings = settings
        for size in self.studies:
            self._create(size)
            each = self.load(size)
            if each.user_attrs.get(SETTINGS) != settings.describe():
                each.set_user_attr(SETTINGS, settings.describe())
                each.set_user_attr(TITLE, self.title)
        return settings

    def _create(self, size: int) -> None:
        arms = [get_arm(name) for name in self.settings.arms]
        arm = next(arm for arm in arms if arm.objectives == size)
        optuna.create_study(
            study_name=self.studies[size],
            storage=self.storage,
            directions=directions(arm),
            load_if_exists=True,
        )


def settings_of(storage: StudyStorage, name: str) -> SearchSettings | None:
    """The settings with which a search was begun.

    Args:
        storage: Where.
        name: Of its study.

    Returns:
        The settings; None if there is no such search yet.
    """
    for suffix in _SUFFIX.values():
        try:
            study = optuna.load_study(study_name=name + suffix, storage=storage.storage)
        except KeyError:
            continue
        if SETTINGS in study.user_attrs:
            return read_settings(study.user_attrs[SETTINGS])
    return None


def compare_horizon_search(
    build_model: Callable[[Choice], Model],
    train: Callable[[Model, Choice, Report], None],
    *,
    settings: SearchSettings | None = None,
    storage: str | StudyStorage | None = None,
    name: str = "horizon",
    out: Path | str = "runs/search",
    title: str = "",
    **work: Any,
) -> Comparison:
    """Compare the policy with searches for t1, in this process.

    All arms train the same model from the same weights on the same batches, for the same number of
    epochs. Started again, it goes on where it was; other processes may join through the storage.

    Args:
        build_model: As for `HorizonObjective`.
        train: As for `HorizonObjective`.
        settings: Arms, trials, seeds, and what else determines the trials.
        storage: An Optuna URL or ``journal:FILE``, or an open storage; an SQLite file in the
            output folder if None.
        name: Of the study.
        out: Folder of artifacts and reports.
        title: Of the problem, for readers.
        **work: Of `HorizonSearch.work`.

    Returns:
        What was found.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    opened = (
        storage
        if isinstance(storage, StudyStorage)
        else open_storage(storage or default_url(folder, workers=1))
    )
    search: HorizonSearch[Model] = HorizonSearch(
        opened, name, settings or SearchSettings(), folder, title=title
    )
    search.work(build_model, train, **work)
    return search.comparison()


def _told(
    train: Callable[[Model, Choice, Report], None], listen: Callable[[Progress], None]
) -> Callable[[Model, Choice, Report], None]:
    """Training whose reports reach the worker too."""

    def told(model: Model, choice: Choice, report: Report) -> None:
        def both(progress: Progress) -> None:
            report(progress)
            listen(progress)

        train(model, choice, both)

    return told
