"""The objective: one training run per trial, for any ``study.optimize``."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import optuna
import torch

from torchdyn_snopt.errors import SNOptError, UnsupportedError
from torchdyn_snopt.search.outcome import Guards, Penalized, Progress, Report, Values
from torchdyn_snopt.search.spaces import Choice, Space, fixed_t1

if TYPE_CHECKING:
    from optuna.artifacts import FileSystemArtifactStore

Model = TypeVar("Model")
HISTORY, REASON = "history", "reason"  # names of user attributes
NOTED = ("t1", "error", "nfe", "evaluations", "seconds")
LOG_NAME, CHECKPOINT_NAME = "log.jsonl", "checkpoint.pt"


class TrialFailedError(SNOptError):
    """What a training function raises to end its trial, and no more than that, as failed."""


# What ends a trial as failed. Everything else is a defect, and is raised.
FAILURES = (SNOptError, ArithmeticError, MemoryError, torch.linalg.LinAlgError)


class HorizonObjective(Generic[Model]):
    """A callable for Optuna: choose, build, train, and judge.

    A trial whose training meets NaN, fails in a solve or runs out of memory ends as failed, with
    the sentence why as its user attribute 'reason'; the study goes on. What every epoch came to is
    in its user attribute 'history', also for pruned and failed trials.

    Args:
        build_model: From what the trial chose to a new model. torch's generator is seeded before,
            so that every trial of one seed starts from the same weights.
        train: Trains a model as chosen, and reports after every epoch; the report raises where the
            trial is to end, and training must let that pass.
        space: What the trial may choose.
        values: What the trial is judged by: `Penalized` for one objective (which is reported and
            pruned after every epoch), `Tradeoff` for two (which Optuna cannot prune).
        seed: Of the weights and the batches.
        guards: Limits of a trial.
        artifacts: Where a trial's log, and the best trial's checkpoint, are kept.
        checkpoint: From the trained model to what is saved of it.

    Examples:
        >>> objective = HorizonObjective(build_model, train, space=fixed_t1(0.1, 3.0))
        >>> study = optuna.create_study(pruner=optuna.pruners.MedianPruner())
        >>> study.optimize(objective, n_trials=20)
    """

    def __init__(
        self,
        build_model: Callable[[Choice], Model],
        train: Callable[[Model, Choice, Report], None],
        *,
        space: Space | None = None,
        values: Values | None = None,
        seed: int = 0,
        guards: Guards | None = None,
        artifacts: FileSystemArtifactStore | None = None,
        checkpoint: Callable[[Model], Mapping[str, Any]] | None = None,
    ) -> None:
        self._build_model, self._train = build_model, train
        self._space = fixed_t1() if space is None else space
        self._values: Values = Penalized() if values is None else values
        self._seed, self._guards = seed, guards or Guards()
        self._artifacts, self._checkpoint = artifacts, checkpoint or _state_dict

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        """Run a trial.

        Args:
            trial: Of a study with as many directions as there are values.

        Returns:
            Its value or values; NaN, which Optuna takes as failed, where training failed.

        Raises:
            TrialPruned: The study's pruner or a guard ended the trial.
            RuntimeError: Training has a defect.
        """
        self._check_directions(trial)
        course = _Course(trial, self._values, self._guards)
        try:
            choice = replace(self._space(trial), seed=self._seed)
            torch.manual_seed(self._seed)
            model = self._build_model(choice)
            self._train(model, choice, course.report)
            values = course.conclude()
        except (*FAILURES, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _ends_trial_only(error):
                raise
            trial.set_user_attr(REASON, _first_line(error))
            values = (math.nan,) * self._size
        else:
            self._keep_best(trial, model, values)
        finally:
            course.note()
            self._keep_log(trial, course)
        return values[0] if self._size == 1 else values

    @property
    def _size(self) -> int:
        return 1 if isinstance(self._values, Penalized) else 2

    def _check_directions(self, trial: optuna.Trial) -> None:
        directions = len(trial.study.directions)
        if directions != self._size:
            raise UnsupportedError(
                "the study and its objective differ in the number of values",
                got=f"a study with {directions} directions, values={self._values}",
                allowed="one direction with Penalized, two with Tradeoff",
                do="create the study with directions=['minimize', 'minimize'], or pass values=",
            )

    # --- artifacts --------------------------------------------------------------------------------

    def _keep_log(self, trial: optuna.Trial, course: _Course) -> None:
        if self._artifacts is not None and course.history:
            lines = [json.dumps({"kind": "trial", **trial.params}), *map(json.dumps, course.rows())]
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / LOG_NAME
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
                self._upload(trial, path)

    def _keep_best(self, trial: optuna.Trial, model: Model, values: tuple[float, ...]) -> None:
        """Save the model if no finished trial is better in every value."""
        if self._artifacts is None:
            return
        done = trial.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        if any(all(a <= b for a, b in zip(t.values, values, strict=True)) for t in done):
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / CHECKPOINT_NAME
            torch.save(dict(self._checkpoint(model)), path)
            self._upload(trial, path)

    def _upload(self, trial: optuna.Trial, path: Path) -> None:
        assert self._artifacts is not None
        optuna.artifacts.upload_artifact(
            artifact_store=self._artifacts, study_or_trial=trial, file_path=str(path)
        )


class _Course:
    """A trial in training: takes the reports, and ends it where that is due."""

    def __init__(self, trial: optuna.Trial, values: Values, guards: Guards) -> None:
        self._trial, self._values, self._guards = trial, values, guards
        self.history: list[Progress] = []

    def rows(self) -> list[dict[str, Any]]:
        return [progress.as_dict() for progress in self.history]

    def report(self, progress: Progress) -> None:
        """Take the state after an epoch; may raise TrialPruned or TrialFailedError."""
        self.history.append(progress)
        self._trial.set_user_attr(HISTORY, _finite(self.rows()))
        values = self._values(progress)
        _check_finite(values)
        broken = self._guards.broken(progress)
        if broken is not None:
            self._prune(broken)
        if len(values) == 1:
            self._trial.report(values[0], progress.epoch)
            if self._trial.should_prune():
                self._prune(f"pruned after epoch {progress.epoch} by the study's pruner")

    def conclude(self) -> tuple[float, ...]:
        if not self.history:
            raise TrialFailedError(
                "training ended without a report",
                got="no call of report",
                allowed="a report after every epoch",
                do="call report(Progress(...)) in the training function",
            )
        return self._values(self.history[-1])

    def note(self) -> None:
        """The figures by themselves, as the dashboard shows them."""
        for name in NOTED if self.history else ():
            value = getattr(self.history[-1], name)
            if math.isfinite(value):
                self._trial.set_user_attr(name, value)

    def _prune(self, reason: str) -> None:
        self._trial.set_user_attr(REASON, reason)
        raise optuna.TrialPruned(reason)


def _state_dict(model: Any) -> Mapping[str, Any]:
    state: Mapping[str, Any] = model.state_dict()
    return state


def _check_finite(values: tuple[float, ...]) -> None:
    if not all(map(math.isfinite, values)):
        raise TrialFailedError(
            "the validation error is not finite",
            got=", ".join(f"{value:g}" for value in values),
            allowed="finite values",
            do="lower the learning rate",
        )


def _ends_trial_only(error: RuntimeError) -> bool:
    """Failures that are RuntimeErrors: ours, factorizations, and memory, which the CPU names so."""
    text = str(error).lower()
    memory = "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, (*FAILURES, torch.OutOfMemoryError)) or memory


def _first_line(error: BaseException) -> str:
    name = "" if isinstance(error, TrialFailedError) else f"{type(error).__name__}: "
    return f"{name}{str(error).strip()}".splitlines()[0]


def _finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With None in place of NaN and infinities, which databases' JSON does not know."""
    return [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
