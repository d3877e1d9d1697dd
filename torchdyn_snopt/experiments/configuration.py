"""What determines a run, how far it has come, how it ended, and who is told about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.horizons import HorizonChoice
from torchdyn_snopt.experiments.meters import Seconds
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.runlog import Record
from torchdyn_snopt.experiments.tasks import Task

Status = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Budget:
    """When a run is done: at the first of the limits that are given.

    Attributes:
        epochs: Passes over the training data.
        seconds: Seconds of training.
    """

    epochs: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.epochs, self.seconds) if limit is not None]
        if not limits or min(limits) <= 0:
            raise InvalidInputError(
                "the training budget is no positive amount",
                got=f"epochs={self.epochs}, seconds={self.seconds}",
                allowed="a positive number of epochs, of seconds, or of both",
                do="pass --epochs or --seconds with a number above 0",
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Attributes:
        task: What is trained.
        optimizer: What trains it.
        seed: Determines the initial weights and the order of the batches.
        budget: When it is done.
        device: Where it runs.
        batch_size: Samples per iteration; the task's own if None.
        horizon: How t1 is treated; the model's own horizon if None.
        clock: What seconds are: of the wall's clock, or of this process on the CPU.
    """

    task: Task
    optimizer: OptimizerSpec
    seed: int
    budget: Budget
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int | None = None
    horizon: HorizonChoice | None = None
    clock: Seconds = "wall"

    @property
    def samples_per_batch(self) -> int:
        """The batch size in force."""
        return self.batch_size or self.task.batch_size

    def describe(self) -> dict[str, Any]:
        """What must be equal for a run to go on from a checkpoint: all but the budget."""
        return {
            "task": self.task.name,
            "optimizer": self.optimizer.name,
            "settings": _plain(self.optimizer.settings(self.task)),
            "sensitivity": self.optimizer.sensitivity,
            "tolerance": self.task.tolerance,
            "seed": self.seed,
            "batch_size": self.samples_per_batch,
            "device": self.device.type,
            **({} if self.horizon is None else {"horizon": self.horizon.describe()}),
        }

    @property
    def label(self) -> str:
        """Optimizer and horizon, for tables and legends."""
        parts = [self.optimizer.label, *([] if self.horizon is None else [self.horizon.label])]
        return ", ".join(parts)

    @property
    def slug(self) -> str:
        """Optimizer and horizon, as the name of a folder."""
        return "-".join(
            [self.optimizer.slug, *([] if self.horizon is None else [self.horizon.slug])]
        )


@dataclass
class Position:
    """How far a run has come.

    Attributes:
        epoch: Finished epochs.
        batch: Finished batches of the current epoch.
        iteration: Finished iterations.
        seconds: Seconds of training.
        loss_sum: Sum over the current epoch's samples of their loss.
        metric_sum: Likewise of the metric.
        samples: Samples of the current epoch seen.
        evaluated: Finished iterations at the last evaluation.
    """

    epoch: int = 0
    batch: int = 0
    iteration: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    metric_sum: float = 0.0
    samples: int = 0
    evaluated: int = 0

    def advance(self, samples: int, seconds: float, loss: float, metric: float) -> None:
        """Count one finished iteration.

        Args:
            samples: Samples in its batch.
            seconds: Seconds it took.
            loss: Mean loss of the batch.
            metric: Mean metric of the batch.
        """
        self.batch += 1
        self.iteration += 1
        self.seconds += seconds
        self.samples += samples
        self.loss_sum += samples * loss
        self.metric_sum += samples * metric

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch += 1
        self.batch = self.samples = 0
        self.loss_sum = self.metric_sum = 0.0


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        config: What was run.
        folder: Where its log and checkpoint are.
        status: 'finished' (the budget is used up), 'failed' or 'interrupted'.
        reason: Why, for a failed run.
        position: How far it came.
    """

    config: RunConfig
    folder: Path
    status: Status
    reason: str | None
    position: Position


class Observer(Protocol):
    """What is told about the course of a run; it may raise in order to end the run."""

    def started(self, config: RunConfig, position: Position, batches: int) -> None:
        """A run begins or goes on, with so many batches an epoch."""

    def stepped(self, record: Record) -> None:
        """An iteration is done."""

    def evaluated(self, record: Record) -> None:
        """An evaluation is done."""

    def ended(self, result: RunResult) -> None:
        """The run is over."""


def _plain(value: Any) -> Any:
    """Settings as they come back from a checkpoint or a log."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, bool | int | float | str | None) else repr(value)
