"""`spoken-arabic-digits`: ten spoken digits as cepstral coefficients (Hammami & Bedda 2010; UEA).

Data and model are those of `tasks.series`: series ``[samples, 93, 27]``, 70 % to train, 15 %
to test; 10,346 parameters.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from torchdyn_snopt.experiments.tasks import series
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Task

CHANNELS, CLASSES = 13, 10
HIDDEN = 32

TASK = Task(
    name="spoken-arabic-digits",
    title="SpokenArabicDigits",
    load=partial(series.load_pooled, "spoken-arabic-digits"),
    build_model=partial(series.SeriesClassifier, CHANNELS, HIDDEN, CLASSES),
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
        "sgd": {"lr": 0.01},
    },
)
