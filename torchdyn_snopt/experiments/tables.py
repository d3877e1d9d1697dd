"""The summary of runs: one row per optimizer, medians and ranges over its seeds."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from torchdyn_snopt.experiments.curves import Run, by_label

NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Spread:
    """Median and range over seeds; infinite values stand for a target that was not reached."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median; infinite if half of the runs or more did not reach the target."""
        return statistics.median(self.values) if self.values else math.nan

    def show(self, digits: int) -> str:
        """Median, and the range if there are several values.

        Args:
            digits: Digits behind the decimal point.

        Returns:
            As in ``4.1 [3.9, 4.4]``.
        """
        if not self.values:
            return "–"
        median = _show(self.median, digits)
        low, high = (_show(edge, digits) for edge in (min(self.values), max(self.values)))
        if len(self.values) == 1 or low == high == NOT_REACHED:
            return median
        return f"{median} [{low}, {high}]"


@dataclass(frozen=True)
class Quantity:
    """A column of the table.

    Attributes:
        key: Its name in the CSV file.
        title: Its title elsewhere.
        measure: From a run to the value; None leaves the run out.
        digits: Digits behind the decimal point.
    """

    key: str
    title: str
    measure: Callable[[Run], float | None]
    digits: int


def _mean_step(column: str) -> Callable[[Run], float | None]:
    return lambda run: float(np.mean(run.steps[column]))


def _milliseconds(run: Run) -> float | None:
    return 1e3 * float(run.steps["seconds"][-1]) / float(run.steps["iteration"][-1])


def _final_loss(run: Run) -> float | None:
    loss = run.steps["loss"][-int(run.header["window"]) :]
    return None if run.status == "failed" else float(np.mean(loss))


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else float(value)


def _final_test(name: str, scale: float) -> Callable[[Run], float | None]:
    def measure(run: Run) -> float | None:
        values = run.epochs.get(f"test_{name}", np.empty(0))
        return scale * float(values[-1]) if values.size else None

    return measure


def _quantities(header: dict[str, object]) -> list[Quantity]:
    target, metric = header["target_loss"], header["metric"]
    merit = Quantity("test_loss", "test loss", _final_test("loss", 1.0), 4)
    if metric is not None:
        unit = f" [{header['metric_unit']}]" if header["metric_unit"] else ""
        scale = float(str(header["metric_scale"]))
        merit = Quantity(
            f"test_{metric}", f"test {metric}{unit}", _final_test(str(metric), scale), 2
        )
    return [
        Quantity(
            "seconds_to_target",
            f"time to loss {target:g} [s]",
            lambda run: _or_infinite(run.target_seconds()),
            2,
        ),
        Quantity(
            "iterations_to_target",
            f"iterations to loss {target:g}",
            lambda run: _or_infinite(run.target_iteration()),
            0,
        ),
        Quantity("final_loss", "final training loss", _final_loss, 4),
        merit,
        Quantity("milliseconds", "ms per iteration", _milliseconds, 1),
        Quantity("nfe_forward", "NFE forward", _mean_step("nfe_forward"), 1),
        Quantity("nfe_backward", "NFE backward", _mean_step("nfe_backward"), 1),
    ]


@dataclass(frozen=True)
class SummaryRow:
    """One optimizer.

    Attributes:
        label: The optimizer with its chosen settings.
        spreads: One entry per quantity.
        runs: How many runs there are.
        failures: Why runs failed, one entry per failed run.
    """

    label: str
    spreads: tuple[Spread, ...]
    runs: int
    failures: tuple[str, ...]


@dataclass(frozen=True)
class SummaryTable:
    """All optimizers.

    Attributes:
        title: What was trained.
        notes: How to read the figures.
        quantities: The columns.
        rows: The rows.
    """

    title: str
    notes: tuple[str, ...]
    quantities: tuple[Quantity, ...]
    rows: tuple[SummaryRow, ...]

    @property
    def head(self) -> list[str]:
        """The titles of the columns."""
        return ["optimizer", *(q.title for q in self.quantities), "runs", "failed"]

    def body(self) -> list[list[str]]:
        """The cells, as text."""
        return [
            [
                row.label,
                *(s.show(q.digits) for q, s in zip(self.quantities, row.spreads, strict=True)),
                str(row.runs),
                str(len(row.failures)),
            ]
            for row in self.rows
        ]

    def markdown(self) -> str:
        """The table as a Markdown document."""
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.head, *self.body())]
        rule = "|---" + "|---:" * (len(self.head) - 1) + "|"
        failures = [f"- {row.label}: {text}" for row in self.rows for text in row.failures]
        parts = [f"# {self.title}", "\n".join([lines[0], rule, *lines[1:]]), *self.notes]
        if failures:
            parts.append("\n".join(["Failed runs:", "", *failures]))
        return "\n\n".join(parts) + "\n"

    def csv(self) -> str:
        """One line per optimizer, with median, minimum and maximum of every quantity."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        parts = ("median", "min", "max")
        columns = [f"{q.key}_{part}" for q in self.quantities for part in parts]
        writer.writerow(["optimizer", *columns, "runs", "failed"])
        for row in self.rows:
            cells = [value for spread in row.spreads for value in _three(spread)]
            writer.writerow([row.label, *cells, row.runs, len(row.failures)])
        return text.getvalue()


def summarize(runs: Sequence[Run]) -> SummaryTable:
    """Medians and ranges over the seeds of every optimizer.

    Args:
        runs: Runs of one task, each with at least one iteration.

    Returns:
        The table; empty if there are no runs.
    """
    if not runs:
        return SummaryTable("No runs", (), (), ())
    header = runs[0].header
    quantities = tuple(_quantities(header))
    rows = tuple(_row(label, group, quantities) for label, group in by_label(runs).items())
    notes = (
        f"Median [minimum, maximum] over the runs. The target is reached when the mean training "
        f"loss of the last {header['window']} batches first falls below "
        f"{header['target_loss']:g}; the final training loss is the same mean at the end. Seconds "
        f"are of training alone: batch, forward, backward and step, without evaluation, logging "
        f"and checkpoints. NFE: evaluations of the field per iteration, forward and backward.",
    )
    return SummaryTable(str(header["title"]), notes, quantities, rows)


def _row(label: str, runs: Sequence[Run], quantities: Sequence[Quantity]) -> SummaryRow:
    spreads = []
    for quantity in quantities:
        values = [quantity.measure(run) for run in runs]
        spreads.append(Spread(tuple(value for value in values if value is not None)))
    failures = tuple(
        f"seed {run.seed}: {_first_lines(run.reason)}" for run in runs if run.status == "failed"
    )
    return SummaryRow(label, tuple(spreads), len(runs), failures)


def _first_lines(reason: str | None) -> str:
    """What and got of a message, on one line."""
    return "; ".join(line.strip() for line in (reason or "unknown reason").splitlines()[:2])


def _three(spread: Spread) -> tuple[float, float, float]:
    if not spread.values:
        return math.nan, math.nan, math.nan
    return spread.median, min(spread.values), max(spread.values)


def _show(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else NOT_REACHED
