"""`svhn`: the street-view house numbers of Netzer et al. (2011).

The model is that of `tasks.images`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchdyn_snopt.experiments.tasks import images
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Sensitivity, Splits, Task


def load(data_dir: Path | None = None) -> Splits:
    """73,257 training and 26,032 test images.

    Args:
        data_dir: The folder with ``svhn.npz``.

    Returns:
        Images uint8 ``[samples, 3, 32, 32]`` and labels ``[samples]``.
    """
    return images.load("svhn", data_dir)


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
    name="svhn",
    title="SVHN",
    load=load,
    build_model=build_model,
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=images.BATCH_SIZE,
    epochs=10,
    tolerance=1e-3,
    target_loss=0.8,
    window=25,
    settings={
        "snopt-paper": {"lr": 0.01, "weight_decay": 1e-4},
        "adam": {"lr": 5e-4, "weight_decay": 1e-3},
        "adamw": {"lr": 5e-4},
        "sgd": {"lr": 0.02},
    },
)
