"""Whole iterations of a task by an optimizer: what is timed, and the peak of their memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.core.defunc import DEFunc

from torchdyn_snopt.experiments.bench.memory import ALLOCATOR, MeasurementError
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.tasks import Samples, Task

WORKER = "torchdyn_snopt.experiments.bench.steps_worker"
ITERATIONS = 3
TORCHDIFFEQ = "torchdiffeq"


class Iterations:
    """A model, its optimizer, and batches that come round."""

    def __init__(
        self, task: Task, spec: OptimizerSpec, train: Samples, device: torch.device, seed: int = 0
    ) -> None:
        """Build from the seed.

        Args:
            task: The task.
            spec: The optimizer.
            train: What to train on.
            device: Where.
            seed: Of weights and batches.
        """
        torch.manual_seed(seed)
        self.task, self._train = task, train.to(device)
        self.model = model_for(task, spec.sensitivity).to(device)
        self.needs_closure = spec.row.needs_closure
        self.optimizer = spec.build(self.model, task)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        self._batches = order.to(device).split(task.batch_size)
        self._next = 0

    def __call__(self, number: int = 1) -> None:
        """Take steps.

        Args:
            number: How many.
        """
        for _ in range(number):
            self._step()

    def weights(self) -> dict[str, Any]:
        """A copy of the model's state."""
        return copy.deepcopy(self.model.state_dict())

    def start_from(self, weights: dict[str, Any]) -> None:
        """Go on from another model's state.

        Args:
            weights: As of `weights`.
        """
        self.model.load_state_dict(weights)

    def evaluations(self) -> int:
        """Field evaluations so far, forward and backward, of all neural ODEs together."""
        fields = [module for module in self.model.modules() if isinstance(module, DEFunc)]
        return sum(int(field.nfe) for field in fields)

    def _step(self) -> None:
        rows = self._batches[self._next]
        self._next = (self._next + 1) % len(self._batches)

        def differentiate() -> float:
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model(self._train.x[rows]), self._train.y[rows])
            loss.backward()
            return loss.item()

        if self.needs_closure:
            self.optimizer.step(differentiate)
        else:
            differentiate()
            self.optimizer.step()


def model_for(task: Task, sensitivity: str) -> nn.Module:
    """A task's model by any sensitivity, or with its solves by torchdiffeq.

    Args:
        task: The task.
        sensitivity: As torchdyn's, or 'torchdiffeq' for its ``odeint_adjoint`` with the seminorm.

    Returns:
        A new model.
    """
    if sensitivity != TORCHDIFFEQ:
        return task.build_model(sensitivity, task.tolerance)
    model = task.build_model("adjoint", task.tolerance)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NeuralODE):
                setattr(module, name, TorchdiffeqODE(child))
    return model


class TorchdiffeqODE(nn.Module):
    """A NeuralODE's field, times and tolerances, solved by torchdiffeq."""

    def __init__(self, node: NeuralODE) -> None:
        """Take over a model.

        Args:
            node: The model.
        """
        super().__init__()
        self.node = node

    def forward(self, x: Tensor, t_span: Tensor | None = None) -> Tensor:
        """Solve.

        Args:
            x: The initial state.
            t_span: Times, instead of the model's own.

        Returns:
            The states at the times.
        """
        node = self.node
        x, t_span = node._prep_integration(x, t_span)
        states: Tensor = torchdiffeq.odeint_adjoint(
            node.vf,
            x,
            t_span.to(x),
            rtol=node.rtol,
            atol=node.atol,
            method="dopri5",
            adjoint_rtol=node.rtol_adjoint,
            adjoint_atol=node.atol_adjoint,
            adjoint_options={"norm": "seminorm"},
        )
        return states


def peak_bytes(
    task: Task, spec: OptimizerSpec, device: torch.device, data_dir: Path | None = None
) -> int:
    """By how much a few iterations raise the memory of a fresh process, model and data apart.

    Args:
        task: The task, one of the table.
        spec: The optimizer.
        device: Whose memory.
        data_dir: A folder with data sets.

    Returns:
        Bytes at the peak.

    Raises:
        MeasurementError: The process failed.
    """
    request = {
        "task": task.name,
        "optimizer": spec.name,
        "chosen": dict(spec.chosen),
        "sensitivity": spec.sensitivity,
        "device": str(device),
        "data_dir": None if data_dir is None else str(data_dir),
        "iterations": ITERATIONS,
    }
    finished = subprocess.run(
        [sys.executable, "-m", WORKER, json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ALLOCATOR},
    )
    if finished.returncode:
        raise MeasurementError(
            "a measuring process failed",
            got=f"exit status {finished.returncode}: {finished.stderr.strip()[-400:]}",
            allowed="a process with enough memory for a few iterations",
            do="leave the measurement of memory out, or train the task to see why it fails",
        )
    measured: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return int(measured["bytes"])
