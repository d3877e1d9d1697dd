"""`circle`: the density of two noisy circles, a flow over t in [0, 10] (Chen et al. 2018).

The model is that of `tasks.flows`; the points are computed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import make_circles
from torch import nn

from torchdyn_snopt.experiments.tasks import flows
from torchdyn_snopt.experiments.tasks.base import Samples, Sensitivity, Splits, Task

TRAIN_SAMPLES, TEST_SAMPLES = 8192, 2048
NOISE, FACTOR = 0.06, 0.5
WIDTHS = (2, 64, 64, 64, 2)
T1 = 10.0


def _samples(number: int, seed: int) -> Samples:
    x, _ = make_circles(number, noise=NOISE, factor=FACTOR, random_state=seed)
    return flows.points(torch.as_tensor(x))


def load(data_dir: Path | None = None) -> Splits:
    """8,192 training and 2,048 test points, always the same ones.

    Args:
        data_dir: Not needed: the points are computed.

    Returns:
        Points ``[samples, 2]``.
    """
    return Splits(_samples(TRAIN_SAMPLES, seed=0), _samples(TEST_SAMPLES, seed=1))


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-6) -> nn.Module:
    """One flow of four layers with tanh, 9,224 parameters.

    Args:
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol of every solve; atol is a hundredth of it.

    Returns:
        A new model.
    """
    return flows.flow(WIDTHS, nn.Tanh, sensitivity, tolerance, t1=T1)


TASK = Task(
    name="circle",
    title="Circle (two noisy circles)",
    load=load,
    build_model=build_model,
    loss=flows.negative_log_likelihood,
    metric=None,
    batch_size=128,
    epochs=10,
    tolerance=1e-6,
    target_loss=1.5,
    window=10,
    settings={
        "snopt-paper": {"lr": 0.01, "momentum": 0.9},
        "adam": {"lr": 1e-2},
        "adamw": {"lr": 1e-2},
        "sgd": {"lr": 3e-4},
    },
)
