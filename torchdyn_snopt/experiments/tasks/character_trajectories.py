"""`character-trajectories`: 20 letters by the motion of a pen (Williams et al. 2006; UEA).

Data and model are those of `tasks.series`: series ``[samples, 182, 7]``, 70 % to train, 15 %
to test; 8,756 parameters.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from torchdyn_snopt.experiments.tasks import series
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Task

CHANNELS, CLASSES = 3, 20
HIDDEN = 32

TASK = Task(
    name="character-trajectories",
    title="CharacterTrajectories",
    load=partial(series.load_pooled, "character-trajectories"),
    build_model=partial(series.SeriesClassifier, CHANNELS, HIDDEN, CLASSES),
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=512,
    epochs=400,
    tolerance=1e-3,
    target_loss=0.5,
    window=4,
    settings={
        "snopt-paper": {"lr": 3e-3, "weight_decay": 1e-4},
        "adam": {"lr": 3e-3},
        "adamw": {"lr": 3e-3},
        "sgd": {"lr": 0.03},
    },
)
