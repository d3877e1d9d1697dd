"""How a training command shows its course: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from torchdyn_snopt.experiments.configuration import Observer, Position, RunConfig, RunResult
from torchdyn_snopt.experiments.runlog import Record
from torchdyn_snopt.experiments.suite import Suite


@contextmanager
def observer_for(suite: Suite, console: Console) -> Iterator[Observer]:
    """The display that suits a console.

    Args:
        suite: What will be run.
        console: Where to show it.

    Yields:
        An observer for the runs; the display ends with the block.
    """
    runs = len(suite.runs())
    if not console.is_terminal:
        yield PlainLines(console, runs)
        return
    with _live_progress(console) as progress:
        yield LiveBars(progress, runs)


class _Course:
    """What both displays need to know about the run in hand."""

    def __init__(self, runs: int) -> None:
        self.runs, self.number = runs, 0
        self.config: RunConfig | None = None
        self.batches = 1

    def begin(self, config: RunConfig, batches: int) -> None:
        self.number += 1
        self.config, self.batches = config, batches

    @property
    def title(self) -> str:
        assert self.config is not None
        label, seed = self.config.label, self.config.seed
        return f"[{self.number}/{self.runs}] {label}, seed {seed}"

    def share_done(self, iteration: int, seconds: float) -> float:
        """The part of the budget that is used up, by the limit that is nearest."""
        assert self.config is not None
        budget = self.config.budget
        shares = [0.0]
        if budget.epochs is not None:
            shares.append(iteration / (budget.epochs * self.batches))
        if budget.seconds is not None:
            shares.append(seconds / budget.seconds)
        return min(1.0, max(shares))

    def figures(self, record: Record, prefix: str = "") -> str:
        """Loss and metric of a record."""
        assert self.config is not None
        parts = [f"{prefix}loss {record[prefix + 'loss']:.4f}"]
        metric = self.config.task.metric
        if metric is not None:
            value = metric.scale * record[prefix + metric.name]
            parts.append(f"{prefix}{metric.name} {value:.1f}{metric.unit}")
        return "  ".join(parts).replace("_", " ")

    def solves(self, record: Record) -> str:
        """Field evaluations of an iteration, and t1 where the run has chosen it."""
        assert self.config is not None
        nfe = f"NFE {record['nfe_forward']}+{record['nfe_backward']}"
        if self.config.horizon is None or record["t1"] is None:
            return nfe
        return f"{nfe}  t1 {record['t1']:.3g}"


class PlainLines:
    """One line per epoch, for files and pipes."""

    def __init__(self, console: Console, runs: int) -> None:
        """A display.

        Args:
            console: Where to print.
            runs: How many runs there will be.
        """
        self._console, self._course = console, _Course(runs)
        self._nfe = ""

    def started(self, config: RunConfig, position: Position, batches: int) -> None:
        """A run begins or goes on."""
        self._course.begin(config, batches)
        going_on = f", from iteration {position.iteration}" if position.iteration else ""
        self._print(f"{self._course.title}{going_on}")

    def stepped(self, record: Record) -> None:
        """An iteration is done."""
        self._nfe = self._course.solves(record)

    def evaluated(self, record: Record) -> None:
        """An evaluation is done."""
        train, test = (self._course.figures(record, prefix) for prefix in ("train_", "test_"))
        seconds = f"{record['seconds']:7.1f} s"
        self._print(f"  epoch {record['epoch'] + 1:3d}  {seconds}  {train}  {test}  {self._nfe}")

    def ended(self, result: RunResult) -> None:
        """The run is over."""
        if result.status != "finished":
            self._print(f"  {result.status} after {result.position.iteration} iterations")

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)


class LiveBars:
    """A bar for each run with loss, metric, field evaluations and the time left."""

    def __init__(self, progress: Progress, runs: int) -> None:
        """A display.

        Args:
            progress: Where to draw.
            runs: How many runs there will be.
        """
        self._progress, self._course = progress, _Course(runs)
        self._bar = progress.add_task("", total=1.0, figures="", test="", visible=False)
        self._test = ""

    def started(self, config: RunConfig, position: Position, batches: int) -> None:
        """A run begins or goes on."""
        self._course.begin(config, batches)
        self._test = ""
        done = self._course.share_done(position.iteration, position.seconds)
        self._bar = self._progress.add_task(self._course.title, total=1.0, figures="", test="")
        self._progress.update(self._bar, completed=done)

    def stepped(self, record: Record) -> None:
        """An iteration is done."""
        nfe = self._course.solves(record)
        self._progress.update(
            self._bar,
            completed=self._course.share_done(record["iteration"], record["seconds"]),
            figures=f"{self._course.figures(record)}  {nfe}",
        )

    def evaluated(self, record: Record) -> None:
        """An evaluation is done."""
        self._progress.update(self._bar, test=self._course.figures(record, "test_"))

    def ended(self, result: RunResult) -> None:
        """The run is over."""
        if result.status == "finished":
            self._progress.update(self._bar, completed=1.0)
        else:
            self._progress.update(self._bar, test=result.status)
        self._progress.stop_task(self._bar)


def _live_progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[figures]}"),
        TextColumn("{task.fields[test]}", style="green"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,  # drawing shares the processor with what is being timed
    )
