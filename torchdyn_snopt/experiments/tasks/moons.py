"""`moons`: two interleaved half circles, the classifier of torchdyn's first tutorial.

As there, the state of a two-dimensional ODE at t = 1 is itself the pair of logits: the flow moves
the two classes apart.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import make_moons
from torch import nn

from torchdyn_snopt.experiments.tasks.base import (
    ACCURACY,
    Last,
    Samples,
    Sensitivity,
    Splits,
    Task,
    neural_ode,
)

TRAIN_SAMPLES, TEST_SAMPLES = 1024, 1024
NOISE = 0.1
HIDDEN = 64


def _samples(number: int, seed: int) -> Samples:
    x, y = make_moons(number, noise=NOISE, random_state=seed)
    return Samples(torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=torch.int64))


def load(data_dir: Path | None = None) -> Splits:
    """1,024 training and 1,024 test points, always the same ones.

    Args:
        data_dir: Not needed: the points are computed.

    Returns:
        Points ``[samples, 2]`` and labels ``[samples]``.
    """
    return Splits(_samples(TRAIN_SAMPLES, seed=0), _samples(TEST_SAMPLES, seed=1))


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-3) -> nn.Module:
    """The classifier: points ``[batch, 2]`` to logits ``[batch, 2]``, 322 parameters.

    Args:
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol and atol of every solve.

    Returns:
        A new model.
    """
    field = nn.Sequential(nn.Linear(2, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2))
    return nn.Sequential(neural_ode(field, sensitivity, tolerance), Last())


TASK = Task(
    name="moons",
    title="Moons (two half circles)",
    load=load,
    build_model=build_model,
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=128,
    epochs=40,
    tolerance=1e-3,
    target_loss=0.05,
    window=8,
    settings={
        "snopt-paper": {"lr": 0.02},
        "adam": {"lr": 1e-2},
        "adamw": {"lr": 1e-2},
        "sgd": {"lr": 0.1},
    },
)
