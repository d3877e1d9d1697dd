"""One training run: the loop that training, search and benchmarks share.

Runs of one seed start from the same weights and see the same batches in the same order, whatever
the optimizer. Seconds are those of training alone (batch, forward, backward, step); evaluation,
logging and checkpoints are left out, and so are two steps on a copy of the model before the run,
which pay for the start-up of the numerical libraries. A run that is resumed from its checkpoint
continues bit for bit on the same machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchdyn_snopt.errors import InvalidInputError, SNOptError
from torchdyn_snopt.experiments.configuration import (
    Observer,
    Position,
    RunConfig,
    RunResult,
    Status,
)
from torchdyn_snopt.experiments.environment import describe_environment
from torchdyn_snopt.experiments.horizons import AnyOptimizer, penalty_of
from torchdyn_snopt.experiments.interrupt import StopRequest
from torchdyn_snopt.experiments.meters import Clock, SolveMeter
from torchdyn_snopt.experiments.runlog import Record, RunLog, SilentLog
from torchdyn_snopt.experiments.storage import (
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from torchdyn_snopt.experiments.tasks import Metric, Samples, Splits
from torchdyn_snopt.experiments.team import Team

LOG_NAME = "log.jsonl"
CHECKPOINT_NAME = "checkpoint.pt"
FORMAT = 2  # of the checkpoint: random states of several processes
WARM_UP_STEPS = 2
EVALUATION_SEED = 0
SEED_STRIDE = 1_000_003  # keeps the orders of different seeds apart over any number of epochs


class NonFiniteLossError(SNOptError):
    """The training loss became NaN or infinite."""


class PartnerFailedError(SNOptError):
    """Another process of the team has failed in its part of a batch."""


# What ends one run as failed and lets the others go on. Everything else is a defect and is raised.
RUN_FAILURES = (
    SNOptError,
    torch.linalg.LinAlgError,
    torch.OutOfMemoryError,
)


class TrainingRun:
    """A model in training, with its log and its checkpoint in one folder."""

    def __init__(
        self, config: RunConfig, splits: Splits, folder: Path, team: Team | None = None
    ) -> None:
        """Build model and optimizer from the seed; nothing is written yet.

        Args:
            config: What to run.
            splits: The task's data.
            folder: Where log and checkpoint go.
            team: The processes that share the run; this one alone if None.
        """
        self.config, self.folder = config, folder
        self.team = team or Team(device=config.device)
        self.train, self.test = splits.train.to(config.device), splits.test.to(config.device)
        self._clock = Clock(config.device, config.clock)
        if self.team.size == 1:
            _warm_up(config, self.train)
        _seed_everything(config.seed)
        self.model, self.optimizer = _build(config)
        self._wrapped = self.team.wrap(self.model)
        if not self.team.leads:  # other masks of dropout than on the first process
            _seed_everything(config.seed + SEED_STRIDE * self.team.rank)
        self._meter = SolveMeter(self.model)
        self.position = Position()
        self._stop = StopRequest()

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.train) / self.config.samples_per_batch)

    def run(
        self,
        observers: Sequence[Observer] = (),
        stop: StopRequest | None = None,
        resume: bool = False,
    ) -> RunResult:
        """Train until the budget is used up, the run fails, or somebody asks to stop.

        A checkpoint that is damaged or of another configuration is an `InvalidInputError`.

        Args:
            observers: Who is told about it.
            stop: Looked at after every iteration.
            resume: Go on from the folder's checkpoint, if there is one.

        Returns:
            How it ended.
        """
        stop = self._stop = stop or StopRequest()
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_bytes = self._load() if resume and self._checkpoint.exists() else 0
        self.team.wait()  # all have looked before anybody writes
        with self._open_log(keep_bytes) as log:
            if not keep_bytes:
                self._begin(log)
            for observer in observers:
                observer.started(self.config, self.position, self.batches)
            status, reason = self._train(log, observers, stop)
            log.write("end", status=status, reason=reason, **_progress(self.position))
        result = RunResult(self.config, self.folder, status, reason, self.position)
        for observer in observers:
            observer.ended(result)
        return result

    def _open_log(self, keep_bytes: int) -> RunLog:
        if not self.team.leads:
            return SilentLog()
        return RunLog(self.folder / LOG_NAME, keep_bytes=keep_bytes)

    # --- the loop ---------------------------------------------------------------------------------

    def _train(
        self, log: RunLog, observers: Sequence[Observer], stop: StopRequest
    ) -> tuple[Status, str | None]:
        try:
            for rows in self._remaining_batches(stop):
                record = log.write("step", **self._iterate(rows))
                for observer in observers:
                    observer.stepped(record)
                if self.position.batch == self.batches:
                    self._finish_epoch(log, observers)
            finished = self._is_done()
            if finished and self.position.evaluated < self.position.iteration:
                self._evaluate(log, observers)
        except RUN_FAILURES as error:
            return "failed", f"{type(error).__name__}: {error}"
        self._save(log)
        return ("finished" if finished else "interrupted"), None

    def _remaining_batches(self, stop: StopRequest) -> Iterator[Tensor]:
        """Row numbers of one batch after the other, until done or stopped."""
        while not (stop.asked or self._is_done()):
            order = self._epoch_order().split(self.config.samples_per_batch)
            for rows in order[self.position.batch :]:
                yield rows
                if stop.asked or self._is_done():
                    return

    def _epoch_order(self) -> Tensor:
        seed = self.config.seed * SEED_STRIDE + self.position.epoch
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.train), generator=generator).to(self.config.device)

    def _is_done(self) -> bool:
        budget, position = self.config.budget, self.position
        out_of_epochs = budget.epochs is not None and position.epoch >= budget.epochs
        return out_of_epochs or (budget.seconds is not None and position.seconds >= budget.seconds)

    def _iterate(self, rows: Tensor) -> Record:
        started = self._clock.read()
        own = self.team.share(rows)
        targets = self.train.y[own]
        step = self._step(self.train.x[own], targets, len(own) / len(rows))
        seconds = self._clock.read() - started
        metric = self._measure(step.outputs, targets)
        if self.team.size > 1:
            # The first process's clock counts for all, and whoever is asked to stop, asks all.
            mine = seconds if self.team.leads else 0.0
            part = (metric or 0.0) * len(own) / len(rows)
            seconds, part, asked = self.team.sum([mine, part, float(self._stop.asked)])
            metric = None if metric is None else part
            if asked:
                self._stop.ask()
        self.position.advance(len(rows), seconds, step.loss, metric or 0.0)
        return {
            "iteration": self.position.iteration,
            "epoch": self.position.epoch,
            "seconds": self.position.seconds,
            "loss": step.loss,
            **self._metric_field("", metric),
            "lr": self.optimizer.param_groups[0]["lr"],
            "nfe_forward": step.nfe_forward,
            "nfe_backward": step.nfe_backward,
            "nfe_update": step.nfe_update,
            **_report(self.optimizer),
            "t1": self._meter.horizon(),  # of this iteration's solves; the report has the next one
        }

    def _step(self, inputs: Tensor, targets: Tensor, share: float = 1.0) -> _Step:
        """Forward, loss, backward and step; some optimizers repeat all but the last."""
        step = _Step()
        started = self._meter.evaluations()

        def differentiate() -> float:
            self.optimizer.zero_grad()
            before = self._meter.evaluations()
            step.outputs, loss = self._forward(inputs, targets)
            between = self._meter.evaluations()
            step.loss = self._finite(self.team.sum([share * loss.item()])[0])
            # The mean over the team is then the loss of the whole batch, however it was shared.
            (loss * (share * self.team.size) + penalty_of(self.model)).backward()
            step.nfe_forward += between - before
            step.nfe_backward += self._meter.evaluations() - between
            return step.loss

        if self.config.optimizer.row.needs_closure:
            self.optimizer.step(differentiate)
        else:
            differentiate()
            self.optimizer.step()
        total = self._meter.evaluations() - started
        step.nfe_update = total - step.nfe_forward - step.nfe_backward
        return step

    def _forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and loss; a solve that fails on one process fails the run on all."""
        failure = None
        outputs = loss = inputs
        try:
            outputs = self._wrapped(inputs)
            loss = self.config.task.loss(outputs, targets)
        except RUN_FAILURES as error:
            if self.team.size == 1:
                raise
            failure = error
        if self.team.size > 1 and self.team.sum([float(failure is not None)])[0]:
            raise failure or PartnerFailedError(
                "the run has failed on another process",
                got=f"this is process {self.team.rank} of {self.team.size}",
                do="read the other processes' messages",
            )
        return outputs, loss

    def _finite(self, loss: float) -> float:
        """The loss, checked before a backward solve that could not end well."""
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                "the training loss is not finite",
                got=f"{loss} in iteration {self.position.iteration + 1}",
                allowed="finite losses",
                do="lower the learning rate",
            )
        return loss

    def _finish_epoch(self, log: RunLog, observers: Sequence[Observer]) -> None:
        self._evaluate(log, observers)
        self.position.next_epoch()
        self._save(log)

    # --- evaluation -------------------------------------------------------------------------------

    def _evaluate(self, log: RunLog, observers: Sequence[Observer]) -> None:
        position = self.position
        test_loss, test_metric = self.evaluate(self.test)
        train_metric = position.metric_sum / position.samples
        record = log.write(
            "epoch",
            **_progress(position),
            train_loss=position.loss_sum / position.samples,
            **self._metric_field("train_", train_metric),
            test_loss=test_loss,
            **self._metric_field("test_", test_metric),
        )
        position.evaluated = position.iteration
        for observer in observers:
            observer.evaluated(record)

    @torch.no_grad()
    def evaluate(self, samples: Samples) -> tuple[float, float | None]:
        """Mean loss and metric over samples; training's random numbers are not touched.

        Args:
            samples: What to evaluate on.

        Returns:
            Loss, and the metric if the task has one.
        """
        size, loss, metric = self.config.task.eval_batch_size, 0.0, 0.0
        self.model.eval()
        with torch.random.fork_rng(devices=_cuda_devices(self.config.device)):
            torch.manual_seed(EVALUATION_SEED)
            for start in range(0, len(samples), size):
                x, y = samples.x[start : start + size], samples.y[start : start + size]
                outputs = self.model(x)
                loss += len(x) * self.config.task.loss(outputs, y).item()
                metric += len(x) * (self._measure(outputs, y) or 0.0)
        self.model.train()
        has_metric = self.config.task.metric is not None
        return loss / len(samples), metric / len(samples) if has_metric else None

    def _measure(self, outputs: Tensor, targets: Tensor) -> float | None:
        metric = self.config.task.metric
        return None if metric is None else metric.measure(outputs.detach(), targets).item()

    def _metric_field(self, prefix: str, value: float | None) -> dict[str, float | None]:
        metric = self.config.task.metric
        return {} if metric is None else {prefix + metric.name: value}

    # --- log and checkpoint -----------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path:
        return self.folder / CHECKPOINT_NAME

    def _begin(self, log: RunLog) -> None:
        # Beside a new log, a checkpoint of an earlier run would be a trap for a later --resume.
        if self.team.leads:
            self._checkpoint.unlink(missing_ok=True)
        task = self.config.task
        log.write(
            "header",
            format=FORMAT,
            config=self.config.describe(),
            label=self.config.label,
            title=task.title,
            **_describe_metric(task.metric),
            target_loss=task.target_loss,
            window=task.window,
            batches=self.batches,
            clock=self.config.clock,
            parameters=sum(p.numel() for p in self.model.parameters()),
            environment=describe_environment(self.config.device),
        )
        self._save(log)

    def _save(self, log: RunLog) -> None:
        content = {
            "format": FORMAT,
            "config": self.config.describe(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": asdict(self.position),
            "random": self.team.gather(random_state(self.config.device)),
            "log_bytes": log.size,
        }
        if self.team.leads:
            save_checkpoint(self._checkpoint, content)

    def _load(self) -> int:
        """Restore everything from the checkpoint, and return the length of the log it goes with."""
        content = load_checkpoint(self._checkpoint, self.config.device)
        own = {"format": FORMAT, **self.config.describe()}
        theirs = {"format": content.get("format"), **content.get("config", {})}
        _check_same(theirs, own, self._checkpoint)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.position = Position(**content["position"])
        if self.team.rank < len(content["random"]):
            restore_random_state(content["random"][self.team.rank], self.config.device)
        return int(content["log_bytes"])


@dataclass
class _Step:
    """What one iteration came to."""

    outputs: Tensor = field(default_factory=lambda: torch.empty(0))
    loss: float = math.nan
    nfe_forward: int = 0
    nfe_backward: int = 0
    nfe_update: int = 0  # inside the optimizer's step: the feedback of a horizon's policy


def _warm_up(config: RunConfig, train: Samples) -> None:
    """A few steps on a model that is thrown away: libraries start up outside the measured time."""
    _seed_everything(config.seed)
    model, optimizer = _build(config)
    x, y = train.x[: config.samples_per_batch], train.y[: config.samples_per_batch]

    def differentiate() -> float:
        optimizer.zero_grad()
        loss = config.task.loss(model(x), y)
        (loss + penalty_of(model)).backward()
        return loss.item()

    try:
        for _ in range(WARM_UP_STEPS):
            if config.optimizer.row.needs_closure:
                optimizer.step(differentiate)
            else:
                differentiate()
                optimizer.step()
    except RUN_FAILURES:
        return  # the run itself will meet the same failure, and record it


def _build(config: RunConfig) -> tuple[torch.nn.Module, AnyOptimizer]:
    """A new model, its weights drawn on the CPU so that they are the same for every device."""
    model = config.task.build_model(config.optimizer.sensitivity, config.task.tolerance)
    model = model.to(config.device)
    if config.horizon is not None:
        return model, config.horizon.prepare(model, config.optimizer, config.task)
    return model, config.optimizer.build(model, config.task)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (for fields of users that draw from it)


def _progress(position: Position) -> dict[str, Any]:
    return {
        "iteration": position.iteration,
        "epoch": position.epoch,
        "seconds": position.seconds,
    }


def _describe_metric(metric: Metric | None) -> dict[str, Any]:
    if metric is None:
        return {"metric": None}
    return {"metric": metric.name, "metric_unit": metric.unit, "metric_scale": metric.scale}


def _report(optimizer: AnyOptimizer) -> dict[str, float]:
    """The figures that an optimizer offers about its last step, as SNOpt does."""
    return {name: float(value) for name, value in getattr(optimizer, "report", {}).items()}


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _check_same(saved: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    different = [key for key in wanted if saved.get(key) != wanted[key]]
    if different:
        raise InvalidInputError(
            "the checkpoint belongs to another configuration",
            got=f"{path} with " + ", ".join(f"{key}={saved.get(key)!r}" for key in different),
            allowed=", ".join(f"{key}={wanted[key]!r}" for key in different),
            do="resume with the settings of the earlier run, or choose another folder",
        )
