"""`articulary-word`: 25 words by the motion of tongue and lips (ArticularyWordRecognition; UEA).

The model is that of `tasks.series`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchdyn_snopt.experiments.tasks import series
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Sensitivity, Splits, Task

CHANNELS, CLASSES = 9, 25
HIDDEN = 64


def load(data_dir: Path | None = None) -> Splits:
    """Of all series 70 % train and 15 % test, as `series.load_pooled` says.

    Args:
        data_dir: The folder with ``articulary-word.npz``.

    Returns:
        Series ``[samples, 144, 19]`` as `tasks.series` describes them, and labels.
    """
    return series.load_pooled("articulary-word", data_dir)


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-3) -> nn.Module:
    """The classifier: series to logits ``[batch, 25]``, 34,457 parameters.

    Args:
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol and atol of every solve.

    Returns:
        A new model.
    """
    return series.SeriesClassifier(CHANNELS, HIDDEN, CLASSES, sensitivity, tolerance)


TASK = Task(
    name="articulary-word",
    title="ArticularyWordRecognition",
    load=load,
    build_model=build_model,
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=256,
    epochs=600,
    tolerance=1e-3,
    target_loss=0.5,
    window=4,
    settings={
        "snopt-paper": {"lr": 3e-3, "damping": 0.1},
        "adam": {"lr": 1e-3},
        "adamw": {"lr": 1e-3},
        "sgd": {"lr": 0.1},
    },
)
