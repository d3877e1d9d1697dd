"""What is measured beside the loss: seconds of training and evaluations of the fields."""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch import nn
from torchdyn.core.problems import ODEProblem

from torchdyn_snopt import SNOptSensitivity, solve_stats

Seconds = Literal["wall", "cpu"]


class Clock:
    """Seconds that include everything a device has been asked to do so far.

    Wall-clock seconds, or seconds of this process on the CPU, which do not grow while other
    programs have it; with one thread the two agree on an idle machine.
    """

    def __init__(self, device: torch.device, seconds: Seconds = "wall") -> None:
        """A clock for one device.

        Args:
            device: The device to wait for before reading the time.
            seconds: 'wall' or 'cpu'.
        """
        self._device = device
        self._now = time.perf_counter if seconds == "wall" else time.process_time

    def read(self) -> float:
        """Seconds since an arbitrary moment; differences count."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._now()


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
