"""`svhn`: the street-view house numbers of Netzer et al. (2011).

Data and model are those of `tasks.images`:
73,257 training and 26,032 test images ``[samples, 3, 32, 32]``;
208,650 parameters.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from torchdyn_snopt.experiments.tasks import images
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Task

TASK = Task(
    name="svhn",
    title="SVHN",
    load=partial(images.load, "svhn"),
    build_model=partial(images.classifier, 3),
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
