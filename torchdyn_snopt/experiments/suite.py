"""Several optimizers and seeds on one task, in one output folder.

The folder holds ``OPTIMIZER/seed-N/`` with the log and the checkpoint of each run, and beside them
the table and the pictures of all of them. Seeds are the outer loop and optimizers the inner one, so
that a machine that slows down slows all optimizers down alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from torchdyn_snopt.errors import InvalidInputError, SNOptError
from torchdyn_snopt.experiments.configuration import Budget, Observer, RunConfig, RunResult
from torchdyn_snopt.experiments.curves import read_run, run_folders
from torchdyn_snopt.experiments.horizons import HorizonChoice
from torchdyn_snopt.experiments.interrupt import stop_on_signal
from torchdyn_snopt.experiments.meters import Seconds
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.report import Report, write_report
from torchdyn_snopt.experiments.storage import locked_folder
from torchdyn_snopt.experiments.tables import summarize
from torchdyn_snopt.experiments.tasks import Task
from torchdyn_snopt.experiments.team import Team, team_on
from torchdyn_snopt.experiments.training import CHECKPOINT_NAME, LOG_NAME, TrainingRun


@dataclass(frozen=True)
class Suite:
    """What to run, and where.

    Attributes:
        task: The task.
        optimizers: What trains it.
        seeds: The seeds.
        budget: When each run is done.
        out: The output folder.
        device: Where to run.
        batch_size: Samples per iteration; the task's own if None.
        data_dir: A folder with data sets, for tasks that need one.
        horizons: Ways to treat t1, each run with every optimizer; None leaves it to the model.
        clock: What seconds are; see `RunConfig`.
    """

    task: Task
    optimizers: Sequence[OptimizerSpec]
    seeds: Sequence[int]
    budget: Budget
    out: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    data_dir: Path | None = None
    horizons: Sequence[HorizonChoice | None] = (None,)
    clock: Seconds = "wall"

    def runs(self) -> list[tuple[RunConfig, Path]]:
        """Every run with its folder, in the order in which they take place."""
        configs = [
            self._config(spec, seed, horizon)
            for seed in self.seeds
            for spec in self.optimizers
            for horizon in self.horizons
        ]
        return [(config, self.out / config.slug / f"seed-{config.seed}") for config in configs]

    def _config(self, spec: OptimizerSpec, seed: int, horizon: HorizonChoice | None) -> RunConfig:
        return RunConfig(
            self.task,
            spec,
            seed,
            self.budget,
            self.device,
            self.batch_size,
            horizon,
            self.clock,
        )


def run_suite(
    suite: Suite,
    observers: Sequence[Observer] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> tuple[list[RunResult], Report]:
    """Carry the runs out one after the other, then write the table and the pictures.

    Args:
        suite: What to run.
        observers: Who is told about it.
        resume: Go on from what the folder holds.
        overwrite: Remove the runs that the folder holds first.

    Returns:
        How the runs ended, up to the one that was interrupted, and the report over all runs of the
        folder.
    """
    for spec in suite.optimizers:
        for horizon in suite.horizons:
            _check_settings(spec, horizon, suite.task)
    with team_on(suite.device) as team:
        suite = replace(suite, device=team.device)
        with locked_folder(suite.out) if team.leads else contextlib.nullcontext():
            if team.leads:
                _make_room(suite, resume=resume, overwrite=overwrite)
            team.wait()
            results = _run_all(suite, observers if team.leads else (), resume, team)
            report = write_report(suite.out) if team.leads else Report(summarize([]), [])
            team.wait()
            return results, report


def _run_all(
    suite: Suite, observers: Sequence[Observer], resume: bool, team: Team
) -> list[RunResult]:
    splits = suite.task.load(suite.data_dir)
    results = []
    with stop_on_signal(supervised=team.size > 1) as stop:
        for config, folder in suite.runs():
            run = TrainingRun(config, splits, folder, team)
            results.append(run.run(observers, stop, resume))
            if results[-1].status == "interrupted":
                break
    return results


def _check_settings(spec: OptimizerSpec, horizon: HorizonChoice | None, task: Task) -> None:
    """Meet a bad learning rate before the first run and not after an hour."""
    try:
        model = task.build_model(spec.sensitivity, task.tolerance)
        spec.build(model, task) if horizon is None else horizon.prepare(model, spec, task)
    except SNOptError:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{spec.row.title} does not accept these settings",
            got=f"{spec.settings(task)}: {error}",
            allowed="what its documentation says",
            do="correct the settings behind its name",
        ) from error


def _make_room(suite: Suite, *, resume: bool, overwrite: bool) -> None:
    present = run_folders(suite.out)
    if overwrite:
        for folder in present:
            _remove_run(folder)
    elif present and not resume:
        raise InvalidInputError(
            "the output folder already holds runs",
            got=f"{suite.out} with {len(present)} runs",
            allowed="an empty or a new folder, unless told what to do with the runs",
            do="add --resume to go on, --overwrite to start anew, or --out with another folder",
        )
    else:
        _check_same_task(suite, present)


def _check_same_task(suite: Suite, present: Sequence[Path]) -> None:
    tasks = {read_run(folder).header["config"]["task"] for folder in present}
    if tasks - {suite.task.name}:
        raise InvalidInputError(
            "the output folder holds runs of another task",
            got=f"{suite.out} with {', '.join(sorted(tasks))}",
            allowed=f"runs of {suite.task.name}",
            do="choose another folder with --out",
        )


def _remove_run(folder: Path) -> None:
    """Remove what a run writes, and its folders where nothing else is in them."""
    for name in (LOG_NAME, CHECKPOINT_NAME):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody keeps a file of his own there
        folder.rmdir()
        folder.parent.rmdir()
