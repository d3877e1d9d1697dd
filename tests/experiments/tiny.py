"""A task that trains in milliseconds, and logs made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchdyn_snopt.experiments.configuration import Budget, RunConfig
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.runlog import RunLog
from torchdyn_snopt.experiments.tasks import ACCURACY, Samples, Splits, Task
from torchdyn_snopt.experiments.tasks.base import Last, Sensitivity, neural_ode
from torchdyn_snopt.experiments.training import LOG_NAME

TRAIN_SAMPLES, BATCH_SIZE = 22, 8  # the last batch of an epoch is a smaller one
BATCHES = 3


def load(data_dir: Path | None = None) -> Splits:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(TRAIN_SAMPLES + 10, 2, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    return Splits(Samples(x[:TRAIN_SAMPLES], y[:TRAIN_SAMPLES]), Samples(x[-10:], y[-10:]))


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-2) -> nn.Module:
    field = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    node = neural_ode(field, sensitivity, tolerance)
    return nn.Sequential(nn.Linear(2, 2), node, Last(), nn.Dropout(0.1))


TINY = Task(
    name="tiny",
    title="Tiny",
    load=load,
    build_model=build_model,
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=BATCH_SIZE,
    epochs=2,
    tolerance=1e-2,
    target_loss=0.5,
    window=2,
    settings={"sgd": {"lr": 0.1}, "adam": {"lr": 1e-2}},
    eval_batch_size=4,
)


def tiny_config(
    optimizer: str = "adam", epochs: int | None = 2, seconds: float | None = None, **chosen: Any
) -> RunConfig:
    return RunConfig(TINY, OptimizerSpec(optimizer, chosen), 0, Budget(epochs, seconds))


def write_log(
    folder: Path,
    losses: Sequence[float],
    *,
    optimizer: str = "adam",
    label: str | None = None,
    seed: int = 0,
    seconds_per_step: float = 0.5,
    accuracy: float = 0.75,
    status: str | None = "finished",
    window: int = 2,
) -> None:
    """The log of a run with given losses, one epoch of all its steps."""
    folder.mkdir(parents=True)
    with RunLog(folder / LOG_NAME) as log:
        log.write(
            "header",
            config={"task": "tiny", "optimizer": optimizer, "seed": seed},
            label=label or optimizer,
            title="Tiny",
            metric="accuracy",
            metric_unit="%",
            metric_scale=100.0,
            target_loss=0.5,
            window=window,
        )
        for number, loss in enumerate(losses, start=1):
            log.write(
                "step",
                iteration=number,
                epoch=0,
                seconds=number * seconds_per_step,
                loss=loss,
                accuracy=0.5,
                lr=0.1,
                nfe_forward=14 + number,
                nfe_backward=7,
                t1=1.0,
            )
        seconds = len(losses) * seconds_per_step
        log.write(
            "epoch", iteration=len(losses), seconds=seconds, test_loss=0.3, test_accuracy=accuracy
        )
        if status is not None:
            reason = "SolverError: it exploded\n  got: t=0.5" if status == "failed" else None
            log.write("end", status=status, reason=reason, iteration=len(losses), seconds=seconds)
