"""`bench optimizers`: time to target, loss at equal time and the rest, against tuned peers.

Per task: every optimizer but SNOpt is tuned over its learning rates by the same small budget, SNOpt
takes its one set of defaults. Then all of them train for the same number of seconds from the same
weights on the same batches, seeds in the outer loop. All use this package's adjoint; Adam also
torchdyn's own, with the same learning rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable
from torchdyn_snopt.experiments.bench.steps import peak_bytes
from torchdyn_snopt.experiments.configuration import Budget
from torchdyn_snopt.experiments.curves import Run, by_label, read_runs
from torchdyn_snopt.experiments.environment import describe_environment
from torchdyn_snopt.experiments.figures import draw_tasks
from torchdyn_snopt.experiments.interrupt import StopRequest, stop_on_signal
from torchdyn_snopt.experiments.meters import Seconds
from torchdyn_snopt.experiments.optimizers import OptimizerSpec, parse_specs
from torchdyn_snopt.experiments.storage import replacing
from torchdyn_snopt.experiments.suite import Suite, run_suite
from torchdyn_snopt.experiments.tables import Spread
from torchdyn_snopt.experiments.tasks import Task, get_task
from torchdyn_snopt.experiments.tuning import Tuning

OURS = "snopt"
ADAM = "adam"
CONTENDERS = "snopt,snopt-paper,adam,adam:sensitivity=adjoint,adamw,sgd,muon,soap,shampoo,lbfgs"
TUNING_SHARE = 0.5  # of the seconds of a measurement, for a trial
MEGABYTE = 1e6
DPI = 150
HEAD = [
    "optimizer",
    "time to target [s]",
    "SNOpt takes",
    "loss at half time",
    "final loss",
    "final test",
    "NFE",
    "iterations",
    "MB",
    "failed",
]


@dataclass(frozen=True)
class Contest:
    """What to compare, and on what.

    Attributes:
        tasks: Names of tasks.
        out: The output folder.
        seconds: Of training, for each run.
        seeds: How many.
        trials: Of tuning, for each optimizer; 0 takes the tasks' settings.
        optimizers: As on the command line.
        device: Where to run.
        data_dir: A folder with data sets.
        clock: What seconds are; see `RunConfig`.
        memory: Whether to measure memory, in processes of their own.
        resume: Go on from what the folder holds.
        overwrite: Remove the runs that the folder holds first.
    """

    tasks: Sequence[str]
    out: Path
    seconds: float
    seeds: int = 5
    trials: int = 5
    optimizers: Sequence[str] = (CONTENDERS,)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data_dir: Path | None = None
    clock: Seconds = "wall"
    memory: bool = True
    resume: bool = False
    overwrite: bool = False


def bench_optimizers(contest: Contest, tell: Callable[[str], None]) -> BenchReport:
    """Tune, train, compare.

    Args:
        contest: What to compare.
        tell: Told about the progress.

    Returns:
        A table for each task, and one over all of them.
    """
    tasks = [get_task(name) for name in contest.tasks]
    specs = parse_specs(contest.optimizers)
    results: list[_Result] = []
    for task in tasks:
        results.append(_contend(contest, task, specs, tell))
    tables = [result.table() for result in results]
    if any(spec.name == OURS for spec in specs):
        tables.append(_overall(results))
    _draw(contest.out, results)
    return BenchReport(
        "optimizers",
        tables,
        _note(contest),
        describe_environment(contest.device),
        [row for result in results for row in result.raw()],
    )


def _contend(
    contest: Contest, task: Task, specs: Sequence[OptimizerSpec], tell: Callable[[str], None]
) -> _Result:
    folder = contest.out / task.name
    with stop_on_signal() as stop:
        tuned = _tuned(contest, task, specs, folder, stop, tell)
    tell(f"{task.name}: {len(tuned)} optimizers, {contest.seeds} seeds, {contest.seconds:g} s each")
    suite = Suite(
        task=task,
        optimizers=tuned,
        seeds=range(contest.seeds),
        budget=Budget(seconds=contest.seconds),
        out=folder,
        device=contest.device,
        data_dir=contest.data_dir,
        clock=contest.clock,
    )
    results, _ = run_suite(suite, resume=contest.resume, overwrite=contest.overwrite)
    if results and results[-1].status == "interrupted":
        raise KeyboardInterrupt
    peaks = {}
    for spec in tuned if contest.memory else ():
        tell(f"{task.name}: memory of {spec.label}")
        peaks[spec.label] = peak_bytes(task, spec, contest.device, contest.data_dir)
    labels = {spec.label for spec in tuned}
    runs = [run for run in read_runs(folder) if run.label in labels]
    return _Result(task, contest.seconds, by_label(runs), peaks)


def _tuned(
    contest: Contest,
    task: Task,
    specs: Sequence[OptimizerSpec],
    folder: Path,
    stop: StopRequest,
    tell: Callable[[str], None],
) -> list[OptimizerSpec]:
    """Learning rates for all but SNOpt and those that name one themselves."""
    if not contest.trials:
        return list(specs)
    tuning = Tuning(
        task,
        task.load(contest.data_dir),
        contest.trials,
        TUNING_SHARE * contest.seconds,
        folder / "tuning",
        contest.device,
        contest.clock,
        stop,
    )
    tuned = []
    for spec in specs:
        if spec.name == OURS or "lr" in spec.chosen:
            tuned.append(spec)
            continue
        # Gradients are those of the same loss: other sensitivities take the same learning rate.
        lr = tuning.tune(OptimizerSpec(spec.name, spec.chosen), tell)
        tuned.append(replace(spec, chosen={**spec.chosen, "lr": lr}))
    return tuned


# --- what came out --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    """The runs of one task."""

    task: Task
    seconds: float
    runs: dict[str, list[Run]]
    peaks: dict[str, int]

    @property
    def ours(self) -> list[Run]:
        return next((runs for runs in self.runs.values() if runs[0].optimizer == OURS), [])

    def times(self, runs: Sequence[Run]) -> Spread:
        """Seconds to the target; infinite where it was not reached."""
        return Spread(tuple(_or_infinite(run.target_seconds()) for run in runs))

    def ratio(self, runs: Sequence[Run]) -> float:
        """Median time of SNOpt to that of a contender: 0 where only SNOpt arrives."""
        ours, theirs = self.times(self.ours).median, self.times(runs).median
        if math.isinf(ours):
            return math.inf if math.isfinite(theirs) else math.nan
        return ours / theirs

    def peers(self) -> dict[str, list[Run]]:
        """Everybody else who uses this package's adjoint."""
        return {
            label: runs
            for label, runs in self.runs.items()
            if not runs[0].optimizer.startswith("snopt")
            and runs[0].header["config"]["sensitivity"] == "snopt"
        }

    def best_peer(self) -> str | None:
        """Whose median time is the shortest; None if no peer arrives."""
        medians = {label: self.times(runs).median for label, runs in self.peers().items()}
        best = min(medians, key=lambda label: medians[label], default=None)
        return None if best is None or math.isinf(medians[best]) else best

    def table(self) -> BenchTable:
        title = (
            f"{self.task.title}: {self.seconds:g} s a run, target: mean loss of "
            f"{self.task.window} batches below {self.task.target_loss:g}"
        )
        return BenchTable(title, HEAD, [self._row(label) for label in self.runs])

    def _row(self, label: str) -> list[str]:
        runs = self.runs[label]
        whole = [run for run in runs if run.status != "failed"]
        peak = self.peaks.get(label)
        return [
            label,
            self.times(runs).show(2),
            "–" if runs is self.ours or not self.ours else show_ratio(self.ratio(runs)),
            Spread(tuple(loss_at(run, 0.5 * self.seconds) for run in whole)).show(3),
            Spread(tuple(loss_at(run, self.seconds) for run in whole)).show(3),
            Spread(tuple(final_test(run) for run in whole)).show(2),
            Spread(tuple(evaluations(run) for run in whole)).show(0),
            Spread(tuple(float(run.steps["iteration"][-1]) for run in whole)).show(0),
            "–" if peak is None else f"{peak / MEGABYTE:.1f}",
            str(len(runs) - len(whole)),
        ]

    def raw(self) -> list[dict[str, Any]]:
        return [
            {
                "task": self.task.name,
                "optimizer": run.optimizer,
                "label": label,
                "seed": run.seed,
                "settings": run.header["config"]["settings"],
                "sensitivity": run.header["config"]["sensitivity"],
                "status": run.status,
                "seconds_to_target": run.target_seconds(),
                "iterations_to_target": run.target_iteration(),
                "loss_at_half_time": _or_none(loss_at(run, 0.5 * self.seconds)),
                "final_loss": _or_none(loss_at(run, self.seconds)),
                "final_test": _or_none(final_test(run)),
                "evaluations_per_iteration": _or_none(evaluations(run)),
                "iterations": len(run.steps.get("iteration", ())),
                "peak_bytes": self.peaks.get(label),
            }
            for label, runs in self.runs.items()
            for run in runs
        ]


def _overall(results: Sequence[_Result]) -> BenchTable:
    head = ["task", "SNOpt [s]", "Adam [s]", "to Adam", "best peer", "its time [s]", "to best peer"]
    body = []
    for result in results:
        adam = next((r for r in result.peers().values() if r[0].optimizer == ADAM), [])
        best = result.best_peer()
        best_runs = result.runs[best] if best else []
        body.append(
            [
                result.task.name,
                result.times(result.ours).show(2),
                result.times(adam).show(2),
                show_ratio(result.ratio(adam)) if adam else "–",
                best or "none arrives",
                result.times(best_runs).show(2),
                show_ratio(result.ratio(best_runs)) if best_runs else "–",
            ]
        )
    return BenchTable("SNOpt at its defaults against tuned peers: time to target", head, body)


def show_ratio(ratio: float) -> str:
    """A ratio of times as text.

    Args:
        ratio: 0 where the denominator is infinite, NaN where both are.

    Returns:
        Two digits behind the point, or who arrived.
    """
    if math.isnan(ratio):
        return "neither arrives"
    if math.isinf(ratio):
        return "SNOpt does not arrive"
    return "only SNOpt arrives" if ratio == 0.0 else f"{ratio:.2f}"


def loss_at(run: Run, seconds: float) -> float:
    """The smoothed training loss at a time of training.

    Args:
        run: A run.
        seconds: The time.

    Returns:
        The mean of the last batches up to then, of as many as the task's window; NaN before the
        first iteration.
    """
    times = run.steps.get("seconds", np.empty(0))
    count = int(np.searchsorted(times, seconds, side="right"))
    # An iteration that the end of the budget fell into counts as well.
    count = min(count + 1, len(times)) if count < len(times) and count == 0 else count
    if not count:
        return math.nan
    return float(run.smoothed("loss", partial=True)[count - 1])


def final_test(run: Run) -> float:
    """The task's metric on the test set at the end, scaled, or the test loss.

    Args:
        run: A run.

    Returns:
        NaN for a run without evaluation.
    """
    metric = run.header["metric"]
    values = run.epochs.get("test_loss" if metric is None else f"test_{metric}", np.empty(0))
    scale = 1.0 if metric is None else float(run.header["metric_scale"])
    return scale * float(values[-1]) if values.size else math.nan


def evaluations(run: Run) -> float:
    """Field evaluations of an iteration, forward and backward, on average.

    Args:
        run: A run.

    Returns:
        The mean; NaN without an iteration.
    """
    if not len(run.steps.get("iteration", ())):
        return math.nan
    return float(np.mean(run.steps["nfe_forward"] + run.steps["nfe_backward"]))


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _note(contest: Contest) -> str:
    tuning = (
        f"learning rates of all but SNOpt tuned by {contest.trials} runs each of up to "
        f"{TUNING_SHARE * contest.seconds:g} s"
        if contest.trials
        else "learning rates are the tasks' own"
    )
    seconds = "of training" if contest.clock == "wall" else "of the process on the CPU, in training"
    return (
        f"Median [minimum, maximum] over {contest.seeds} seeds; {tuning}, SNOpt at its defaults. "
        f"Seconds are {seconds}. SNOpt takes: its median time to the target relative to the "
        "contender's. Losses are means over the task's window of batches. NFE: field evaluations "
        "of an iteration, forward and backward. MB: peak memory of a few iterations in a process "
        "of its own, beyond model and data. The best peer is the fastest of those that are not "
        "SNOpt and use the same adjoint."
    )


def _draw(out: Path, results: Sequence[_Result]) -> None:
    runs = [
        [
            _without_lr(run)
            for group in result.runs.values()
            for run in group
            if len(run.steps.get("loss", ()))
        ]
        for result in results
    ]
    for name, figure in draw_tasks([each for each in runs if each]).items():
        with replacing(out / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=DPI)


def _without_lr(run: Run) -> Run:
    """Under a label that is the same for all tasks, whatever the tuned learning rate."""
    label = re.sub(r" lr=\S+", "", run.label)
    return replace(run, header={**run.header, "label": label})
