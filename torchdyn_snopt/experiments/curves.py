"""What the logs of runs say: curves, smoothed curves, and when a target was reached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.optimizers import OPTIMIZERS
from torchdyn_snopt.experiments.runlog import Record, read_log
from torchdyn_snopt.experiments.training import LOG_NAME

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One run as its log tells it.

    Attributes:
        folder: Where the log is.
        header: The first record.
        steps: The columns of the training iterations; missing values are NaN.
        epochs: The columns of the evaluations, likewise.
        status: 'finished', 'failed' or 'interrupted'.
        reason: Why it failed.
    """

    folder: Path
    header: Record
    steps: dict[str, Array]
    epochs: dict[str, Array]
    status: str
    reason: str | None

    @property
    def optimizer(self) -> str:
        """The optimizer's name in the table of optimizers."""
        return str(self.header["config"]["optimizer"])

    @property
    def label(self) -> str:
        """The optimizer with its chosen settings."""
        return str(self.header["label"])

    @property
    def seed(self) -> int:
        """The seed."""
        return int(self.header["config"]["seed"])

    def smoothed(self, column: str, *, partial: bool = False) -> Array:
        """Running mean of a column over the task's window.

        Args:
            column: Name of a column of `steps`.
            partial: Begin with the mean of those values that there are.

        Returns:
            Values ``[iterations]``; NaN until the window is full, unless partial.
        """
        return running_mean(self.steps[column], self.header["window"], partial=partial)

    def target_iteration(self) -> int | None:
        """The first iteration at which the smoothed training loss is below the task's target."""
        below = np.flatnonzero(self.smoothed("loss") < self.header["target_loss"])
        return int(self.steps["iteration"][below[0]]) if below.size else None

    def target_seconds(self) -> float | None:
        """Seconds of training up to the end of `target_iteration`."""
        below = np.flatnonzero(self.smoothed("loss") < self.header["target_loss"])
        return float(self.steps["seconds"][below[0]]) if below.size else None


def running_mean(values: Array, window: int, *, partial: bool = False) -> Array:
    """Mean of each value and those before it.

    Args:
        values: ``[n]``.
        window: How many values each mean covers.
        partial: Begin with the mean of those values that there are.

    Returns:
        ``[n]``; NaN where there are not enough values yet, unless partial.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    if not partial:
        means[: window - 1] = np.nan
    return np.asarray(means)


def read_run(folder: Path) -> Run:
    """Read the log of one run.

    Args:
        folder: Where it is.

    Returns:
        The run; 'interrupted' if the log does not say how it ended.

    Raises:
        InvalidInputError: The log has no header.
    """
    path = folder / LOG_NAME
    kinds: dict[str, list[Record]] = {"header": [], "step": [], "epoch": [], "end": []}
    for record in read_log(path):
        kinds.setdefault(record["kind"], []).append(record)
    if not kinds["header"]:
        raise InvalidInputError(
            "a log has no header",
            got=f"{path}",
            allowed="a log whose first line describes the run",
            do="remove that run's folder",
        )
    end = kinds["end"][-1] if kinds["end"] else {"status": "interrupted", "reason": None}
    return Run(
        folder,
        kinds["header"][0],
        _columns(kinds["step"]),
        _columns(kinds["epoch"]),
        str(end["status"]),
        end["reason"],
    )


def run_folders(out: Path) -> list[Path]:
    """The folders of runs inside an output folder.

    Args:
        out: An output folder; it need not be there.

    Returns:
        Those that hold a log.
    """
    return sorted(path.parent for path in out.glob(f"*/seed-*/{LOG_NAME}"))


def read_runs(out: Path) -> list[Run]:
    """All runs of an output folder that have begun, in the order of the table of optimizers.

    Args:
        out: The folder.

    Returns:
        Runs, those of one optimizer next to each other and in the order of their seeds.
    """
    runs = [read_run(folder) for folder in run_folders(out)]
    rank = {name: number for number, name in enumerate(OPTIMIZERS)}
    return sorted(runs, key=lambda run: (rank.get(run.optimizer, len(rank)), run.label, run.seed))


def by_label(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs that differ in their seed alone.

    Args:
        runs: Any runs.

    Returns:
        The runs of each label, in the order of first appearance.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def _columns(records: list[Record]) -> dict[str, Array]:
    names = list(dict.fromkeys(name for record in records for name in record))
    return {
        name: np.array([_number(record.get(name)) for record in records])
        for name in names
        if name != "kind"
    }


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan
