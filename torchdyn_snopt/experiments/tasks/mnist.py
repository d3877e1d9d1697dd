"""`mnist`: the 70,000 handwritten digits of LeCun et al. (1998).

Data and model are those of `tasks.images`:
60,000 training and 10,000 test images ``[samples, 1, 28, 28]``;
207,498 parameters.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from torchdyn_snopt.experiments.tasks import images
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Task

TASK = Task(
    name="mnist",
    title="MNIST",
    load=partial(images.load, "mnist"),
    build_model=partial(images.classifier, 1),
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
        "sgd": {"lr": 0.05},
    },
)
