"""`mnist`: the 70,000 handwritten digits of LeCun et al. (1998).

The model is that of `tasks.images`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchdyn_snopt.experiments.tasks import images
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Sensitivity, Splits, Task


def load(data_dir: Path | None = None) -> Splits:
    """60,000 training and 10,000 test images.

    Args:
        data_dir: The folder with ``mnist.npz``.

    Returns:
        Images uint8 ``[samples, 1, 28, 28]`` and labels ``[samples]``.
    """
    return images.load("mnist", data_dir)


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-3) -> nn.Module:
    """The classifier: ``[batch, 1, 28, 28]`` to logits ``[batch, 10]``, 207,498 parameters.

    Args:
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol and atol of every solve.

    Returns:
        A new model.
    """
    return images.classifier(1, sensitivity, tolerance)


TASK = Task(
    name="mnist",
    title="MNIST",
    load=load,
    build_model=build_model,
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=images.BATCH_SIZE,
    epochs=5,
    tolerance=1e-3,
    target_loss=0.3,
    window=25,
    settings={
        "snopt-paper": {"lr": 0.02},
        "adam": {"lr": 1e-3},
        "adamw": {"lr": 1e-3},
        "sgd": {"lr": 0.02},
    },
)
