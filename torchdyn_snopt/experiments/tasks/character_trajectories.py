"""`character-trajectories`: 20 letters by the motion of a pen (Williams et al. 2006; UEA).

The model is that of `tasks.series`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchdyn_snopt.experiments.tasks import series
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Sensitivity, Splits, Task

CHANNELS, CLASSES = 3, 20
HIDDEN = 32


def load(data_dir: Path | None = None) -> Splits:
    """Of all series 70 % train and 15 % test, as `series.load_pooled` says.

    Args:
        data_dir: The folder with ``character-trajectories.npz``.

    Returns:
        Series ``[samples, 182, 7]`` as `tasks.series` describes them, and labels.
    """
    return series.load_pooled("character-trajectories", data_dir)


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-3) -> nn.Module:
    """The classifier: series to logits ``[batch, 20]``, 8,756 parameters.

    Args:
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol and atol of every solve.

    Returns:
        A new model.
    """
    return series.SeriesClassifier(CHANNELS, HIDDEN, CLASSES, sensitivity, tolerance)


TASK = Task(
    name="character-trajectories",
    title="CharacterTrajectories",
    load=load,
    build_model=build_model,
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=512,
    epochs=400,
    tolerance=1e-3,
    target_loss=0.5,
    window=4,
    settings={
        "snopt-paper": {"lr": 3e-3, "weight_decay": 1e-4},
        "adam": {"lr": 1e-3},
        "adamw": {"lr": 1e-3},
        "sgd": {"lr": 0.1},
    },
)
