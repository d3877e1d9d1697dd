"""`spoken-arabic-digits`: ten spoken digits as cepstral coefficients (Hammami & Bedda 2010; UEA).

The model is that of `tasks.series`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchdyn_snopt.experiments.tasks import series
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Sensitivity, Splits, Task

CHANNELS, CLASSES = 13, 10
HIDDEN = 32


def load(data_dir: Path | None = None) -> Splits:
    """Of all series 70 % train and 15 % test, as `series.load_pooled` says.

    Args:
        data_dir: The folder with ``spoken-arabic-digits.npz``.

    Returns:
        Series ``[samples, 93, 27]`` as `tasks.series` describes them, and labels.
    """
    return series.load_pooled("spoken-arabic-digits", data_dir)


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-3) -> nn.Module:
    """The classifier: series to logits ``[batch, 10]``, 10,346 parameters.

    Args:
        sensitivity: How the gradient of the ODE is computed.
        tolerance: rtol and atol of every solve.

    Returns:
        A new model.
    """
    return series.SeriesClassifier(CHANNELS, HIDDEN, CLASSES, sensitivity, tolerance)


TASK = Task(
    name="spoken-arabic-digits",
    title="SpokenArabicDigits",
    load=load,
    build_model=build_model,
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=128,
    epochs=10,
    tolerance=1e-3,
    target_loss=0.3,
    window=20,
    settings={
        "snopt-paper": {"lr": 5e-3},
        "adam": {"lr": 3e-3},
        "adamw": {"lr": 3e-3},
        "sgd": {"lr": 0.1},
    },
)
