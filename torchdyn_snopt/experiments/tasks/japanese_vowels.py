"""`japanese-vowels`: nine speakers by two vowels (Kudo et al. 1999; UEA).

The model is that of `tasks.series`, with 10,121 parameters. The series come with
aeon, so nothing is downloaded.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import nn

from torchdyn_snopt.experiments.download import fetch
from torchdyn_snopt.experiments.tasks import series
from torchdyn_snopt.experiments.tasks.base import ACCURACY, Splits, Task

CHANNELS, CLASSES = 12, 9
HIDDEN = 32


def load(data_dir: Path | None = None) -> Splits:
    """The official 270 training and 370 test series.

    Args:
        data_dir: The folder with ``japanese-vowels.npz``; where it is missing, aeon's own copy is
            written there.

    Returns:
        Series ``[samples, 29, 25]`` as `tasks.series` describes them, and labels.
    """
    fetch("japanese-vowels", data_dir)
    return series.load_official("japanese-vowels", data_dir)


TASK = Task(
    name="japanese-vowels",
    title="JapaneseVowels",
    load=load,
    build_model=partial(series.SeriesClassifier, CHANNELS, HIDDEN, CLASSES),
    loss=nn.functional.cross_entropy,
    metric=ACCURACY,
    batch_size=64,
    epochs=40,
    tolerance=1e-3,
    target_loss=0.2,
    window=5,
    settings={
        "snopt-paper": {"lr": 2e-2},
        "adam": {"lr": 1e-2},
        "adamw": {"lr": 1e-2},
        "sgd": {"lr": 0.1},
    },
)
