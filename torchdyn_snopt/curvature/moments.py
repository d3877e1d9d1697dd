"""Second moments of rows: Σ rows ⊗ rows, computed by the upper block triangle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Below this width one product is faster than several on half of the blocks.
_WHOLE_UP_TO = 256
_BLOCK = 128


class Moment:
    """A running weighted sum M = Σ w rowsᵀ rows, symmetric by construction.

    Only the blocks on and above the diagonal are computed for wide rows; `full` mirrors them.
    """

    def __init__(self, rows: Tensor) -> None:
        """Start at zero.

        Args:
            rows: ``[..., rows, d]``, for dimensions, dtype and device.
        """
        d = rows.shape[-1]
        self._sum = rows.new_zeros((*rows.shape[:-2], d, d))
        self._starts = [0] if d <= _WHOLE_UP_TO else list(range(0, d, _BLOCK))

    def add(self, rows: Tensor, weight: float) -> None:
        """Add weight · rowsᵀ rows.

        Args:
            rows: ``[..., rows, d]``.
            weight: may be negative (quadrature weights are signed).
        """
        batched = rows.dim() == 3
        for start, stop in zip(self._starts, [*self._starts[1:], rows.shape[-1]], strict=True):
            target = self._sum[..., start:stop, start:]
            left, right = rows[..., start:stop].mT, rows[..., start:]
            if batched:
                target.baddbmm_(left, right, alpha=weight)
            else:
                target.addmm_(left, right, alpha=weight)

    def merge(self, other: Moment) -> None:
        """Add another sum of the same shape.

        Args:
            other: sum over other rows.
        """
        self._sum.add_(other._sum)

    def full(self) -> Tensor:
        """The symmetric matrix.

        Returns:
            ``[..., d, d]``.
        """
        if len(self._starts) == 1:
            return self._sum
        upper = torch.triu(self._sum)
        return upper + torch.triu(self._sum, 1).mT
