"""`spiral`: the spiral of Chen et al. 2018, learned from windows of ten points.

x' = A x³ (entry by entry) from (2, 0): 1,000 points on [0, 25]. A sample is a window of ten
successive points: the model gets the first and predicts the others. It is tested on the windows of
another trajectory of the same system, from (1.5, 0), which runs between the arms of the first.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from torchdyn_snopt.curvature.losses import MSELoss
from torchdyn_snopt.experiments.tasks.base import Samples, Sensitivity, Splits, Task, neural_ode

MATRIX = ((-0.1, 2.0), (-2.0, -0.1))
POINTS, END, WINDOW = 1000, 25.0, 10
TRAIN_START, TEST_START = (2.0, 0.0), (1.5, 0.0)
HIDDEN = 50
INITIAL_STD = 0.1


def trajectory(start: tuple[float, float]) -> Tensor:
    """The true solution.

    Args:
        start: x(0).

    Returns:
        ``[1000, 2]`` in float32, at even times on [0, 25].
    """
    matrix = torch.tensor(MATRIX, dtype=torch.float64)
    times = torch.linspace(0.0, END, POINTS, dtype=torch.float64)
    x0 = torch.tensor(start, dtype=torch.float64)
    states: Tensor = odeint(lambda t, x: x**3 @ matrix, x0, times, rtol=1e-9, atol=1e-11)
    return states.float()


def windows(states: Tensor) -> Samples:
    """All windows of a trajectory.

    Args:
        states: ``[points, 2]``.

    Returns:
        First points ``[windows, 2]`` and the nine that follow ``[windows, 9, 2]``.
    """
    parts = states.unfold(0, WINDOW, 1).mT
    return Samples(parts[:, 0].contiguous(), parts[:, 1:].contiguous())


def load(data_dir: Path | None = None) -> Splits:
    """991 windows each; always the same ones.

    Args:
        data_dir: Not needed: the points are computed.

    Returns:
        Windows of the two trajectories.
    """
    return Splits(windows(trajectory(TRAIN_START)), windows(trajectory(TEST_START)))


class Cube(nn.Module):
    """x³, entry by entry, as in the example of torchdiffeq."""

    def forward(self, x: Tensor) -> Tensor:
        """Cube.

        Args:
            x: Any tensor.

        Returns:
            Its third power.
        """
        return x**3


class Predictor(nn.Module):
    """First points ``[batch, 2]`` to the nine that follow, ``[batch, 9, 2]``."""

    def __init__(self, node: nn.Module) -> None:
        """Wrap.

        Args:
            node: A NeuralODE that returns states at given times.
        """
        super().__init__()
        self.node = node
        times = torch.linspace(0.0, END, POINTS, dtype=torch.float64)[:WINDOW].float()
        self.register_buffer("times", times)

    def forward(self, x: Tensor) -> Tensor:
        """Predict.

        Args:
            x: First points.

        Returns:
            The others, batch first.
        """
        states: Tensor = self.node(x, self.times)
        return states[1:].movedim(0, 1)


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-3) -> nn.Module:
    """A field 2-50-2 on cubed states, 252 parameters, with the initial weights of torchdiffeq's.

    Args:
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol and atol of every solve.

    Returns:
        A new model.
    """
    inner, outer = nn.Linear(2, HIDDEN), nn.Linear(HIDDEN, 2)
    for layer in (inner, outer):
        nn.init.normal_(layer.weight, std=INITIAL_STD)
        nn.init.zeros_(layer.bias)
    field = nn.Sequential(Cube(), inner, nn.Tanh(), outer)
    return Predictor(neural_ode(field, sensitivity, tolerance))


TASK = Task(
    name="spiral",
    title="Spiral (windows of ten points)",
    load=load,
    build_model=build_model,
    loss=MSELoss(),
    metric=None,
    batch_size=20,
    epochs=20,
    tolerance=1e-3,
    target_loss=1e-4,
    window=10,
    settings={
        "snopt-paper": {"lr": 0.02},
        "adam": {"lr": 3e-2},
        "adamw": {"lr": 3e-2},
        "sgd": {"lr": 0.1},
    },
)
