"""What is measured beside the loss: seconds of training and evaluations of the fields."""

from __future__ import annotations

import time

import torch
from torch import nn
from torchdyn.core.problems import ODEProblem

from torchdyn_snopt import SNOptSensitivity, solve_stats


class Clock:
    """Wall-clock seconds that include everything a device has been asked to do so far."""

    def __init__(self, device: torch.device) -> None:
        """A clock for one device.

        Args:
            device: The device to wait for before reading the time.
        """
        self._device = device

    def read(self) -> float:
        """Seconds since an arbitrary moment; differences count."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class SolveMeter:
    """Counts evaluations of the fields of all torchdyn models inside a model.

    torchdyn's wrapper around each field counts its calls whatever the sensitivity, which makes the
    counts of all of them comparable; recomputation inside a backward solve counts as it happens.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find the fields.

        Args:
            model: Any module.
        """
        self._problems = [m for m in model.modules() if isinstance(m, ODEProblem)]
        self._fields = list({id(problem.vf): problem.vf for problem in self._problems}.values())

    def evaluations(self) -> int:
        """Evaluations of all fields since they were made."""
        return sum(int(field.nfe) for field in self._fields)

    def horizon(self) -> float | None:
        """t1 of the last solve, where the model has one ODE and our adjoint solves it."""
        if len(self._problems) != 1 or not _is_ours(self._problems[0].sensalg):
            return None
        return solve_stats(self._problems[0]).t1


def _is_ours(sensitivity: object) -> bool:
    return sensitivity == "snopt" or isinstance(sensitivity, SNOptSensitivity)
