"""What a task is made of, and the parts that several tasks share."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.nn import DepthCat

from torchdyn_snopt import SNOptSensitivity
from torchdyn_snopt.errors import InvalidInputError

Sensitivity = str | SNOptSensitivity


@dataclass(frozen=True)
class Samples:
    """Inputs and targets, matched along the first dimension.

    Attributes:
        x: Inputs, ``[samples, ...]``.
        y: Targets, ``[samples, ...]``.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise InvalidInputError(
                "inputs and targets differ in number",
                got=f"{len(self.x)} inputs, {len(self.y)} targets",
                allowed="one target for each input",
                do="check how the task loads its data",
            )

    def __len__(self) -> int:
        return len(self.x)

    def head(self, number: int) -> Samples:
        """The first samples.

        Args:
            number: How many, at most.

        Returns:
            Views of them.
        """
        return Samples(self.x[:number], self.y[:number])

    def to(self, device: torch.device) -> Samples:
        """Move both tensors.

        Args:
            device: Where to.

        Returns:
            The samples there.
        """
        return Samples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Splits:
    """The parts of a data set.

    Attributes:
        train: What is trained on.
        test: What is only evaluated.
    """

    train: Samples
    test: Samples


@dataclass(frozen=True)
class Metric:
    """A figure of merit besides the loss.

    Attributes:
        name: Its name in logs and tables.
        measure: From outputs and targets of a batch to the mean over its samples.
        unit: Printed behind the values, which are multiplied by `scale` first.
        scale: Factor from the measured value to the printed one.
    """

    name: str
    measure: Callable[[Tensor, Tensor], Tensor]
    unit: str = ""
    scale: float = 1.0


@dataclass(frozen=True)
class Task:
    """Data, model, loss and budget under one name.

    Attributes:
        name: The name on the command line.
        title: The name in tables and figures.
        load: From a data folder (or None) to the splits; the same at every call.
        build_model: From the sensitivity and the solver's tolerance (rtol and atol, forward and
            backward) to a new model, with weights drawn from torch's global generator.
        loss: From outputs and targets of a batch to the mean loss.
        metric: A second figure, or None.
        batch_size: Samples per iteration.
        epochs: The budget unless another is asked for.
        tolerance: rtol and atol of every solve.
        target_loss: The training loss whose first crossing is reported as time to target.
        window: The number of batches that the running mean of the training loss covers.
        settings: Per optimizer name, the settings that differ from the optimizer's own defaults.
        eval_batch_size: Samples per batch in evaluation.
    """

    name: str
    title: str
    load: Callable[[Path | None], Splits]
    build_model: Callable[[Sensitivity, float], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric | None
    batch_size: int
    epochs: int
    tolerance: float
    target_loss: float
    window: int
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    eval_batch_size: int = 1024


def _share_correct(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=-1) == labels).float().mean()


ACCURACY = Metric("accuracy", _share_correct, unit="%", scale=100.0)


class Last(nn.Module):
    """Keeps the state at the last evaluation time: ``[times, batch, ...]`` to ``[batch, ...]``."""

    def forward(self, states: Tensor) -> Tensor:
        """Pick the last state.

        Args:
            states: What a NeuralODE without evaluation times returns.

        Returns:
            Its last entry.
        """
        return states[-1]


def convolutional_field(channels: int) -> nn.Module:
    """The field of the image classifiers: two 3x3 convolutions with t concatenated, tanh between.

    Args:
        channels: Of the state ``[batch, channels, height, width]``.

    Returns:
        A new module.
    """
    return nn.Sequential(
        DepthCat(1),
        nn.Conv2d(channels + 1, channels, 3, padding=1),
        nn.Tanh(),
        DepthCat(1),
        nn.Conv2d(channels + 1, channels, 3, padding=1),
    )


def neural_ode(
    field_: nn.Module, sensitivity: Sensitivity, tolerance: float, *, atol: float | None = None
) -> NeuralODE:
    """A torchdyn NeuralODE over t in [0, 1] by dopri5 that returns states only.

    Args:
        field_: The vector field.
        sensitivity: How its gradient is computed.
        tolerance: rtol and atol, of the forward and of the adjoint solve.
        atol: atol where it differs from rtol.

    Returns:
        The module, from ``x [batch, ...]`` to the states ``[2, batch, ...]`` at t = 0 and 1.
    """
    atol = tolerance if atol is None else atol
    # torchdyn prints a note on every field without t; it is no news here and breaks live displays.
    with contextlib.redirect_stdout(io.StringIO()):
        return NeuralODE(
            field_,
            solver="dopri5",
            rtol=tolerance,
            atol=atol,
            sensitivity=sensitivity,
            rtol_adjoint=tolerance,
            atol_adjoint=atol,
            return_t_eval=False,
        )
