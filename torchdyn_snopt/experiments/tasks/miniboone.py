"""`miniboone`: events of the MiniBooNE experiment (Roe et al. 2005; Papamakarios et al. 2017).

The model is that of `tasks.flows`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchdyn_snopt.experiments.tasks import flows
from torchdyn_snopt.experiments.tasks.base import Sensitivity, Splits, Task

FEATURES = 43
WIDTHS = (FEATURES, 860, 860, FEATURES)


def load(data_dir: Path | None = None) -> Splits:
    """The points of the file, standardized.

    Args:
        data_dir: The folder with ``miniboone.npz``.

    Returns:
        Points ``[samples, 43]``.
    """
    return flows.load("miniboone", data_dir)


def build_model(sensitivity: Sensitivity = "snopt", tolerance: float = 1e-6) -> nn.Module:
    """One flow of three layers with softplus, 820,612 parameters.

    Args:
        sensitivity: How the gradients of the ODEs are computed.
        tolerance: rtol of every solve; atol is a hundredth of it.

    Returns:
        A new model.
    """
    return flows.flow(WIDTHS, nn.Softplus, sensitivity, tolerance)


TASK = Task(
    name="miniboone",
    title="MiniBooNE",
    load=load,
    build_model=build_model,
    loss=flows.negative_log_likelihood,
    metric=None,
    batch_size=128,
    epochs=20,
    tolerance=1e-6,
    target_loss=30.0,
    window=20,
    settings={
        "snopt-paper": {"lr": 5e-3, "momentum": 0.9, "update_freq": 250, "damping": 0.1},
        "adam": {"lr": 3e-3},
        "adamw": {"lr": 3e-3},
        "sgd": {"lr": 0.01},
    },
)
