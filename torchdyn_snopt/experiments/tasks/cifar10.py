"""`cifar10`: the small colour images of Krizhevsky (2009).

The model is that of `tasks.images`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchdyn_snopt.experiments.tasks import images
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Sensitivity, Splits, Task


def load(data_dir: Path | None = None) -> Splits:
    """50,000 training and 10,000 test images, or as many as the file has.

    Args:
        data_dir: The folder with ``cifar10.npz``.

    Returns:
        Images uint8 ``[samples, 3, 32, 32]`` and labels ``[samples]``.
    """
    return images.load("cifar10", data_dir)


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-3) -> nn.Module:
    """The classifier: ``[batch, 3, 32, 32]`` to logits ``[batch, 10]``, 208,650 parameters.

    Args:
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol and atol of every solve.

    Returns:
        A new model.
    """
    return images.classifier(3, sensitivity, tolerance)


TASK = Task(
    name="cifar10",
    title="CIFAR-10",
    load=load,
    build_model=build_model,
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=images.BATCH_SIZE,
    epochs=20,
    tolerance=1e-3,
    target_loss=1.4,
    window=25,
    settings={
        "snopt-paper": {"lr": 0.01, "damping": 0.03},
        "adam": {"lr": 1e-3, "weight_decay": 1e-3},
        "adamw": {"lr": 1e-3},
        "sgd": {"lr": 0.01},
    },
)
