"""`digits`: scikit-learn's 1,797 real 8x8 images of handwritten digits, in the paper's manner.

The model has the shape of the paper's image classifiers (Section 4, "Models"): convolutions extract
features, a neural ODE of two 3x3 convolutions with t concatenated transforms them, pooling and a
linear layer classify. The data come with scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from torchdyn_snopt.experiments.tasks.base import (
    ACCURACY,
    Last,
    Samples,
    Sensitivity,
    Splits,
    Task,
    convolutional_field,
    neural_ode,
)

CLASSES = 10
CHANNELS = 32
TEST_SAMPLES = 360
SPLIT_SEED = 0


def load(data_dir: Path | None = None) -> Splits:
    """1,437 training and 360 test images, stratified by class; the split never changes.

    Args:
        data_dir: Not needed: the images come with scikit-learn.

    Returns:
        Images ``[samples, 1, 8, 8]`` in [0, 1] and labels ``[samples]``.
    """
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, labels, test_size=TEST_SAMPLES, random_state=SPLIT_SEED, stratify=labels
    )

    def samples(x: object, y: object) -> Samples:
        pixels = torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        return Samples(pixels, torch.as_tensor(y, dtype=torch.int64))

    return Splits(samples(train_x, train_y), samples(test_x, test_y))


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-3) -> nn.Module:
    """The classifier: ``[batch, 1, 8, 8]`` to logits ``[batch, 10]``, 20,682 parameters.

    Args:
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol and atol of every solve.

    Returns:
        A new model.
    """
    field = convolutional_field(CHANNELS)
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1),  # 8x8 -> 4x4
        nn.ReLU(),
        neural_ode(field, sensitivity, tolerance),
        Last(),
        nn.ReLU(),
        nn.AvgPool2d(2),  # 4x4 -> 2x2
        nn.Flatten(),
        nn.Linear(CHANNELS * 4, CLASSES),
    )


TASK = Task(
    name="digits",
    title="Digits (8×8 images)",
    load=load,
    build_model=build_model,
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=64,
    epochs=8,
    tolerance=1e-3,
    target_loss=0.1,
    window=10,
    settings={
        "snopt-paper": {"lr": 0.02},
        "adam": {"lr": 3e-3},
        "adamw": {"lr": 3e-3},
        "sgd": {"lr": 0.1},
    },
)
