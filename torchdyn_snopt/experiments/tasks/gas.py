"""`gas`: readings of eight gas sensors (Fonollosa et al. 2015; Papamakarios et al. 2017).

The model is that of `tasks.flows`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchdyn_snopt.experiments.tasks import flows
from torchdyn_snopt.experiments.tasks.base import Sensitivity, Splits, Task

FEATURES = 8
WIDTHS = (FEATURES, 160, 160, 160, FEATURES)


def load(data_dir: Path | None = None) -> Splits:
    """A tenth of the training and test points, as in the authors' experiments.

    Args:
        data_dir: The folder with ``gas.npz``.

    Returns:
        Points ``[samples, 8]``.
    """
    return flows.load("gas", data_dir)


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-6) -> nn.Module:
    """Five flows of four layers with tanh, 278,560 parameters.

    Args:
        sensitivity: How the gradients of the ODEs are computed.
        tolerance: rtol of every solve; atol is a hundredth of it.

    Returns:
        A new model.
    """
    return flows.flow(WIDTHS, nn.Tanh, sensitivity, tolerance, steps=5)


TASK = Task(
    name="gas",
    title="Gas",
    load=load,
    build_model=build_model,
    loss=flows.negative_log_likelihood,
    metric=None,
    batch_size=1000,
    epochs=30,
    tolerance=1e-6,
    target_loss=-2.0,
    window=20,
    settings={
        "snopt-paper": {"lr": 1e-2, "momentum": 0.9, "update_freq": 250},
        "adam": {"lr": 2e-3},
        "adamw": {"lr": 2e-3},
        "sgd": {"lr": 0.01},
    },
)
