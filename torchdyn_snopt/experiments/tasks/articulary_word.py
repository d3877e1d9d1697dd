"""`articulary-word`: 25 words by the motion of tongue and lips (ArticularyWordRecognition; UEA).

Data and model are those of `tasks.series`: series ``[samples, 144, 19]``, 70 % to train, 15 %
to test; 34,457 parameters.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from torchdyn_snopt.experiments.tasks import series
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Task

CHANNELS, CLASSES = 9, 25
HIDDEN = 64

TASK = Task(
    name="articulary-word",
    title="ArticularyWordRecognition",
    load=partial(series.load_pooled, "articulary-word"),
    build_model=partial(series.SeriesClassifier, CHANNELS, HIDDEN, CLASSES),
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=256,
    epochs=600,
    tolerance=1e-3,
    target_loss=0.5,
    window=4,
    settings={
        "snopt-paper": {"lr": 3e-3, "damping": 0.1},
        "adam": {"lr": 1e-2},
        "adamw": {"lr": 1e-2},
        "sgd": {"lr": 0.01},
    },
)
