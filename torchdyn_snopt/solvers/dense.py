"""Dense output: the state inside an accepted step, without further evaluations of a long solve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from torchdyn_snopt.solvers.stepping import Step


def interpolate(step: Step, f1: Tensor, s: float) -> Tensor:
    """The state at t + s·dt inside a step.

    Quartic through both ends, both slopes and the middle where the tableau gives one (Shampine
    1986), else the cubic Hermite polynomial.

    Args:
        step: the accepted step.
        f1: derivative at its end [N].
        s: fraction of the step, within [0, 1].

    Returns:
        State [N].
    """
    y0, y1, dt = step.y0, step.y1, step.dt
    f0 = step.k[0]
    h00, h10 = (1 + 2 * s) * (1 - s) ** 2, s * (1 - s) ** 2
    h01, h11 = s * s * (3 - 2 * s), s * s * (s - 1)
    y = h00 * y0 + (h10 * dt) * f0 + h01 * y1 + (h11 * dt) * f1
    mid = step.tableau.coefficients(y0).mid
    if mid is None:
        return y
    y_mid = torch.addmv(y0, step.k.t(), mid, alpha=dt)
    hermite_mid = 0.5 * (y0 + y1) + (dt / 8) * (f0 - f1)
    return y + (16 * s * s * (1 - s) ** 2) * (y_mid - hermite_mid)
