"""Tuning of learning rates: for every optimizer the same number of short runs, by Optuna.

The first trials are a grid over the optimizer's range, evenly spaced in its logarithm, the further
ones Optuna's own. A trial is worth its time to the task's target; without the target, the whole
time and the loss that is left. It ends at the target, and when an earlier trial was faster.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import optuna
import torch

from torchdyn_snopt.experiments.configuration import Budget, Position, RunConfig, RunResult
from torchdyn_snopt.experiments.curves import read_run
from torchdyn_snopt.experiments.interrupt import StopRequest
from torchdyn_snopt.experiments.meters import Seconds
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.runlog import Record
from torchdyn_snopt.experiments.storage import write_text
from torchdyn_snopt.experiments.tasks import Splits, Task
from torchdyn_snopt.experiments.training import TrainingRun

TUNING_SEED = 1_000  # no seed of a measurement
GRID = 5
DIGITS = 2
FAILED = 1e9
SAMPLER_SEED = 0


@dataclass(frozen=True)
class Tuning:
    """How the learning rates of a task's optimizers are tuned.

    Attributes:
        task: The task.
        splits: Its data.
        trials: Runs for each optimizer.
        seconds: Of training in each of them, at most.
        folder: Where their logs go.
        device: Where to run.
        clock: What seconds are; see `RunConfig`.
        stop: Looked at after every iteration.
    """

    task: Task
    splits: Splits
    trials: int
    seconds: float
    folder: Path
    device: torch.device
    clock: Seconds = "wall"
    stop: StopRequest = field(default_factory=StopRequest)

    def tune(self, spec: OptimizerSpec, tell: Callable[[str], None] = lambda _: None) -> float:
        """The best learning rate of an optimizer; what was found before is read again.

        Args:
            spec: The optimizer; its learning rate, if it has one, is replaced.
            tell: Told about the progress.

        Returns:
            The learning rate.
        """
        path = self.folder / spec.slug / "tuned.json"
        if path.exists():
            return float(json.loads(path.read_text(encoding="utf-8"))["lr"])
        low, high = spec.row.lr_range
        # Its progress is told below; a message of Optuna's own for each trial would repeat it.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=SAMPLER_SEED))
        for lr in grid(low, high, min(GRID, self.trials)):
            study.enqueue_trial({"lr": lr})

        def objective(trial: optuna.Trial) -> float:
            lr = round_to(trial.suggest_float("lr", low, high, log=True))
            tell(f"{self.task.name}: tuning {spec.label}, lr {lr:g}")
            done = [t.value for t in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))]
            best = min((value for value in done if value is not None), default=math.inf)
            return self._worth(_with_lr(spec, lr), min(self.seconds, best))

        study.optimize(objective, n_trials=self.trials)
        lr = round_to(study.best_params["lr"])
        tried = [{"lr": round_to(t.params["lr"]), "value": t.value} for t in study.trials]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"lr": lr, "trials": tried}, indent=2) + "\n")
        return lr

    def _worth(self, spec: OptimizerSpec, seconds: float) -> float:
        budget = Budget(seconds=seconds)
        config = RunConfig(self.task, spec, TUNING_SEED, budget, self.device, clock=self.clock)
        # Its evaluations are of no interest here.
        splits = replace(self.splits, test=self.splits.test.head(1))
        folder = self.folder / spec.slug
        watch = _UntilTarget(self.task, self.stop)
        result = TrainingRun(config, splits, folder).run([watch], watch)
        if self.stop.asked:
            raise KeyboardInterrupt
        run = read_run(folder)
        reached = run.target_seconds()
        if reached is not None:
            return reached
        if result.status == "failed" or not len(run.steps.get("loss", ())):
            return FAILED
        left = float(run.smoothed("loss", partial=True)[-1]) - self.task.target_loss
        # A trial that was cut short because another was faster is not better than a whole one.
        return self.seconds + max(left, 0.0) + (self.seconds - seconds)


class _UntilTarget(StopRequest):
    """Watches a run, and asks it to stop at the target."""

    def __init__(self, task: Task, outer: StopRequest) -> None:
        super().__init__()
        self._task, self._outer = task, outer
        self._losses: list[float] = []

    def started(self, config: RunConfig, position: Position, batches: int) -> None:
        """A run begins."""

    def stepped(self, record: Record) -> None:
        """Stop at the target, and when somebody asks."""
        self._losses = [*self._losses, record["loss"]][-self._task.window :]
        reached = len(self._losses) == self._task.window and np.mean(self._losses) < (
            self._task.target_loss
        )
        if reached or self._outer.asked:
            self.ask()

    def evaluated(self, record: Record) -> None:
        """Evaluations are of no interest."""

    def ended(self, result: RunResult) -> None:
        """The run is over."""


def grid(low: float, high: float, points: int) -> Sequence[float]:
    """Evenly spaced in the logarithm, from the middle outwards.

    Args:
        low: Lowest value.
        high: Highest value.
        points: How many.

    Returns:
        The values, the middle one first.
    """
    spaced = (
        np.geomspace(low, high, points + 2)[1:-1] if points < 3 else np.geomspace(low, high, points)
    )
    middle = (points - 1) / 2
    return [float(spaced[i]) for i in sorted(range(points), key=lambda i: abs(i - middle))]


def round_to(value: float, digits: int = DIGITS) -> float:
    """A value with few significant digits, as one would write it.

    Args:
        value: Positive.
        digits: Significant digits.

    Returns:
        The rounded value.
    """
    return float(f"{value:.{digits}g}")


def _with_lr(spec: OptimizerSpec, lr: float) -> OptimizerSpec:
    return replace(spec, chosen={**spec.chosen, "lr": lr})
