"""`mnist`: 70,000 images of handwritten digits (LeCun et al. 1998), in the paper's manner.

Convolutions extract features, a neural ODE of two 3x3 convolutions with t concatenated transforms
them, pooling and a linear layer classify (Section 4, "Models"; the sizes are those of torchdiffeq's
example on MNIST). The data are read from the user's folder.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torchdyn.nn import DepthCat

from torchdyn_snopt.experiments.tasks.base import (
    ACCURACY,
    Last,
    Sensitivity,
    Splits,
    Task,
    load_images,
    neural_ode,
)

CLASSES = 10
CHANNELS = 64


def load(data_dir: Path | None = None) -> Splits:
    """60,000 training and 10,000 test images, from ``mnist.npz``.

    Args:
        data_dir: The folder; the environment variable TORCHDYN_SNOPT_DATA names it if None.

    Returns:
        Images ``[samples, 1, 28, 28]`` in [0, 1] and labels ``[samples]``.
    """
    return load_images("mnist", data_dir)


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-3) -> nn.Module:
    """The classifier: ``[batch, 1, 28, 28]`` to logits ``[batch, 10]``, 207,498 parameters.

    Args:
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol and atol of every solve.

    Returns:
        A new model.
    """
    field = nn.Sequential(
        DepthCat(1),
        nn.Conv2d(CHANNELS + 1, CHANNELS, 3, padding=1),
        nn.Tanh(),
        DepthCat(1),
        nn.Conv2d(CHANNELS + 1, CHANNELS, 3, padding=1),
    )
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3),  # 28x28 -> 26x26
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 4, stride=2, padding=1),  # 26x26 -> 13x13
        nn.ReLU(),
        nn.Conv2d(CHANNELS, CHANNELS, 4, stride=2, padding=1),  # 13x13 -> 6x6
        neural_ode(field, sensitivity, tolerance),
        Last(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, CLASSES),
    )


TASK = Task(
    name="mnist",
    title="MNIST",
    load=load,
    build_model=build_model,
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=128,
    epochs=1,
    tolerance=1e-3,
    target_loss=0.1,
    window=25,
    settings={
        "snopt": {"lr": 3e-3},
        "snopt-paper": {"lr": 0.02},
        "adam": {"lr": 1e-3},
        "adamw": {"lr": 1e-3},
        "sgd": {"lr": 0.02},
    },
)
