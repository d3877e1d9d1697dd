"""`cifar10`: the small colour images of Krizhevsky (2009).

Data and model are those of `tasks.images`:
50,000 training and 10,000 test images ``[samples, 3, 32, 32]``, or as many as the file has;
208,650 parameters.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from torchdyn_snopt.experiments.tasks import images
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Task

TASK = Task(
    name="cifar10",
    title="CIFAR-10",
    load=partial(images.load, "cifar10"),
    build_model=partial(images.classifier, 3),
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
        "sgd": {"lr": 0.03},
    },
)
