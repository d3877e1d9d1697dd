"""Independent references: a solve by extrapolation under plain autograd, and measures of error.

Nothing here uses the package, nor a Butcher tableau.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

# Substeps of the modified midpoint rule whose results are extrapolated: order 12 in a step.
_SUBSTEPS = (2, 4, 6, 8, 10, 12)


def reference_solve(
    f: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    t: Tensor,
    *,
    density: int = 4,
    cost: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Integrate by Gragg's extrapolated midpoint rule; differentiable by autograd in x0, t and θ.

    Args:
        f: field F(t, x).
        x0: first state.
        t: times ``[T]``; each segment is divided into fixed fractions, so dL/dt is exact.
        density: steps for each unit of time, at least one for each segment.
        cost: running cost ℓ(t, x), summed over its entries.

    Returns:
        States ``[T, *x0.shape]`` and the integral of the cost (0-d).
    """
    shape, n = x0.shape, x0.numel()

    def augmented(at: Tensor, y: Tensor) -> Tensor:
        x = y[:n].view(shape)
        rate = y.new_zeros(()) if cost is None else cost(at, x).sum()
        return torch.cat([f(at, x).reshape(-1), rate.reshape(1)])

    y = torch.cat([x0.reshape(-1), x0.new_zeros(1)])
    states = [y]
    for i in range(len(t) - 1):
        steps = math.ceil(density * abs(float((t[i + 1] - t[i]).detach())))
        start, h = t[i], (t[i + 1] - t[i]) / steps
        for j in range(steps):
            y = _extrapolated_step(augmented, start + j * h, y, h)
        states.append(y)
    return torch.stack([state[:n].view(shape) for state in states]), states[-1][n]


def _extrapolated_step(
    f: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor, h: Tensor
) -> Tensor:
    rows: list[Tensor] = []
    f0 = f(t, y)
    for j, substeps in enumerate(_SUBSTEPS):
        row = [_modified_midpoint(f, t, y, h, substeps, f0)]
        for k in range(1, j + 1):
            ratio = (_SUBSTEPS[j] / _SUBSTEPS[j - k]) ** 2
            row.append(row[k - 1] + (row[k - 1] - rows[k - 1]) / (ratio - 1))
        rows = row
    return rows[-1]


def _modified_midpoint(
    f: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor, h: Tensor, n: int, f0: Tensor
) -> Tensor:
    small = h / n
    before, here = y, y + small * f0
    for i in range(1, n):
        before, here = here, before + 2 * small * f(t + i * small, here)
    return here


def relative_error(value: Tensor | None, reference: Tensor | None) -> float:
    """‖value − reference‖ / ‖reference‖; None counts as zeros.

    Args:
        value: what is checked.
        reference: what it should be.

    Returns:
        The error; the plain norm of ``value`` where the reference vanishes.
    """
    if reference is None:
        return 0.0 if value is None else float(torch.linalg.vector_norm(value))
    value = torch.zeros_like(reference) if value is None else value
    assert value.shape == reference.shape
    size = float(torch.linalg.vector_norm(reference.detach()))
    error = float(torch.linalg.vector_norm((value - reference).detach()))
    return error / size if size else error


def worst_error(values: Sequence[Tensor | None], references: Sequence[Tensor | None]) -> float:
    """The largest `relative_error` of two lists of tensors.

    Args:
        values: what is checked.
        references: what they should be.

    Returns:
        The largest error.
    """
    return max(relative_error(v, r) for v, r in zip(values, references, strict=True))
