"""What the reproductions share: the request, the runs behind it, a table and a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from torchdyn_snopt.experiments.configuration import Budget, Observer, RunResult
from torchdyn_snopt.experiments.curves import Array, Run, read_run
from torchdyn_snopt.experiments.horizons import STUDIED, HorizonChoice
from torchdyn_snopt.experiments.meters import Seconds
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.storage import replacing, write_text
from torchdyn_snopt.experiments.suite import Suite, run_suite
from torchdyn_snopt.experiments.tasks import Task

CONFIDENCE = 0.95
PENALTY = 3.0  # c of c/2·t1² where t1 is learned: a t1 of 1 then costs as much as a loss of 1.5
DPI = 150


@dataclass(frozen=True)
class Request:
    """What to reproduce on.

    Attributes:
        task: The task.
        out: The output folder.
        seeds: The seeds.
        epochs: Passes over the training data; the task's own if None and no seconds are given.
        seconds: Seconds of training for each run, besides or instead of epochs.
        penalty: c of c/2·t1² where t1 is learned; the study's own if None.
        device: Where to run.
        data_dir: A folder with data sets, for tasks that need one.
        resume: Go on from what the folder holds.
        overwrite: Remove the runs that the folder holds first.
        clock: What seconds are; see `RunConfig`.
    """

    task: Task
    out: Path
    seeds: Sequence[int] = range(5)
    epochs: int | None = None
    seconds: float | None = None
    penalty: float | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_dir: Path | None = None
    resume: bool = False
    overwrite: bool = False
    clock: Seconds = "wall"

    @property
    def budget(self) -> Budget:
        """When each run is done."""
        limited = self.epochs is not None or self.seconds is not None
        return Budget(self.epochs if limited else self.task.epochs, self.seconds)


@dataclass(frozen=True)
class Table:
    """A small table.

    Attributes:
        title: What it shows.
        head: Titles of the columns.
        body: Cells, as text.
        notes: How to read it.
    """

    title: str
    head: list[str]
    body: list[list[str]]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table as a Markdown document."""
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.head, *self.body)]
        rule = "|---" + "|---:" * (len(self.head) - 1) + "|"
        return (
            "\n\n".join([f"# {self.title}", "\n".join([lines[0], rule, *lines[1:]]), *self.notes])
            + "\n"
        )

    def csv(self) -> str:
        """The table as comma-separated values."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.head, *self.body])
        return text.getvalue()


Arms = dict[HorizonChoice, list[Run]]


@dataclass(frozen=True)
class Column:
    """A quantity of each arm.

    Attributes:
        title: With its unit.
        show: From an arm's runs to the cell.
    """

    title: str
    show: Callable[[list[Run]], str]


def over_seeds(title: str, measure: Callable[[list[Run]], Sequence[float]], digits: int) -> Column:
    """A column of means with their intervals.

    Args:
        title: With its unit.
        measure: From an arm's runs to one value for each seed.
        digits: Behind the decimal point.

    Returns:
        The column.
    """
    return Column(title, lambda runs: interval(measure(runs), digits))


def tabulate(title: str, arms: Arms, columns: Sequence[Column], notes: tuple[str, ...]) -> Table:
    """One row for each arm.

    Args:
        title: Of the table.
        arms: Its rows.
        columns: The quantities; the number of seeds follows them.
        notes: How to read it.

    Returns:
        The table.
    """
    body = [
        [horizon.label, *(column.show(runs) for column in columns), str(len(runs))]
        for horizon, runs in arms.items()
    ]
    return Table(title, ["t1", *(column.title for column in columns), "seeds"], body, notes)


@dataclass(frozen=True)
class Study:
    """A finished reproduction.

    Attributes:
        table: Its table.
        files: What was written.
        results: How the runs ended.
    """

    table: Table
    files: list[Path]
    results: list[RunResult]


@dataclass(frozen=True)
class Reproduction:
    """A figure or a table of the paper.

    Attributes:
        name: On the command line, and of its files.
        optimizer: Name of what trains the weights.
        horizons: From the penalty (None: its own) to the arms.
        tabulate: From the runs of each arm, and the task's title, to the table.
        draw: Likewise to the picture.
    """

    name: str
    optimizer: str
    horizons: Callable[[float | None], Sequence[HorizonChoice]]
    tabulate: Callable[[Arms, str], Table]
    draw: Callable[[Arms, str], Figure]

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Settings of the optimizer that go before the task's."""
        return STUDIED if self.optimizer == "snopt" else {}

    def suite(self, request: Request) -> Suite:
        """The runs that it consists of.

        Args:
            request: What to reproduce on.

        Returns:
            A suite in the output folder.
        """
        return Suite(
            task=request.task,
            optimizers=[OptimizerSpec(self.optimizer, self.chosen)],
            seeds=request.seeds,
            budget=request.budget,
            out=request.out,
            device=request.device,
            data_dir=request.data_dir,
            clock=request.clock,
            horizons=self.horizons(request.penalty),
        )

    def run(self, request: Request, observers: Sequence[Observer] = ()) -> Study:
        """Carry out the runs, then write table and picture from their logs.

        Args:
            request: What to reproduce on.
            observers: Who is told about the runs.

        Returns:
            The study; if it was interrupted, over the runs that there are.
        """
        suite = self.suite(request)
        results, report = run_suite(
            suite, observers, resume=request.resume, overwrite=request.overwrite
        )
        arms, title = _read_arms(suite), request.task.title
        table = self.tabulate(arms, title)
        files = write_study(request.out, self.name, table, self.draw(arms, title))
        return Study(table, [*files, *report.files], results)


def write_study(out: Path, name: str, table: Table, figure: Figure) -> list[Path]:
    """Write a table and a picture.

    Args:
        out: The output folder.
        name: Of the files, without their endings.
        table: The table.
        figure: The picture.

    Returns:
        The files.
    """
    files = [out / f"{name}.{ending}" for ending in ("md", "csv", "png")]
    write_text(files[0], table.markdown())
    write_text(files[1], table.csv())
    with replacing(files[2]) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)
    return files


def _read_arms(suite: Suite) -> Arms:
    arms: Arms = {horizon: [] for horizon in suite.horizons if horizon is not None}
    for config, folder in suite.runs():
        if config.horizon is not None and folder.exists():
            run = read_run(folder)
            if run.status == "finished":
                arms[config.horizon].append(run)
    return {horizon: runs for horizon, runs in arms.items() if runs}


# --- figures of merit -----------------------------------------------------------------------------


def seconds(run: Run) -> float:
    """Seconds of training.

    Args:
        run: A run.

    Returns:
        Its seconds.
    """
    return float(run.steps["seconds"][-1])


def seconds_per_iteration(run: Run) -> float:
    """Seconds of an iteration, on average.

    Args:
        run: A run.

    Returns:
        The mean; over the same number of epochs, its ratios are those of `seconds`.
    """
    return seconds(run) / float(run.steps["iteration"][-1])


def merit(run: Run) -> float:
    """The task's metric on the test set at the end, in percent where it is one; else the loss.

    Args:
        run: A run.

    Returns:
        The value.
    """
    metric = run.header["metric"]
    if metric is None:
        return float(run.epochs["test_loss"][-1])
    return float(run.header["metric_scale"]) * float(run.epochs[f"test_{metric}"][-1])


def merit_title(runs: Iterable[Run]) -> str:
    """The name of `merit`.

    Args:
        runs: Runs of one task.

    Returns:
        With its unit; empty without runs.
    """
    header = next((run.header for run in runs), None)
    if header is None:
        return ""
    metric, unit = header["metric"], header.get("metric_unit")
    return "test loss" if metric is None else f"test {metric}" + (f" [{unit}]" if unit else "")


def evaluations(run: Run) -> float:
    """Field evaluations of an iteration on average: forward, backward, and of the policy.

    Args:
        run: A run.

    Returns:
        The mean.
    """
    parts = (run.steps[f"nfe_{part}"] for part in ("forward", "backward", "update"))
    return float(sum(np.mean(part) for part in parts))


def horizon_path(run: Run) -> Array:
    """t1 used in each iteration.

    Args:
        run: A run.

    Returns:
        ``[iterations]``.
    """
    return run.steps["t1"]


def ratios(
    runs: Sequence[Run], references: Sequence[Run], measure: Callable[[Run], float]
) -> list[float]:
    """A measure of runs relative to that of the reference with the same seed.

    Args:
        runs: The runs.
        references: The references.
        measure: Of one run.

    Returns:
        One ratio for each seed that both have.
    """
    known = {run.seed: measure(run) for run in references}
    return [measure(run) / known[run.seed] for run in runs if run.seed in known]


def differences(runs: Sequence[Run], references: Sequence[Run]) -> list[float]:
    """`merit` of runs less that of the reference with the same seed.

    Args:
        runs: The runs.
        references: The references.

    Returns:
        One difference for each seed that both have.
    """
    known = {run.seed: merit(run) for run in references}
    return [merit(run) - known[run.seed] for run in runs if run.seed in known]


def interval(values: Sequence[float], digits: int) -> str:
    """Mean with Student's interval of 95 %.

    Args:
        values: One for each seed.
        digits: Behind the decimal point.

    Returns:
        As in ``0.71 ± 0.03``; the mean alone for one value.
    """
    if not values:
        return "–"
    mean = float(np.mean(values))
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    half = quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
