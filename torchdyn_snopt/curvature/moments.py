"""Second moments of rows: M = Σ w rows ⊗ rows, in few and large products."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Below this width one product is faster than several on half of the blocks.
_WHOLE_UP_TO = 256
_BLOCK = 128
# Small matrices of rows wait until together they make one product of about this many entries.
_GATHER = 1 << 18


class Moment:
    """A running weighted sum of rowsᵀ rows, with a 1 appended to each row for a layer with bias.

    Small rows are gathered and multiplied together; of wide ones only the blocks on and above the
    diagonal are computed. `full` completes both.
    """

    def __init__(self, rows: Tensor, *, one: bool = False) -> None:
        """Start at zero.

        Args:
            rows: ``[..., rows, d]``, for dimensions, dtype and device.
            one: append a 1 to each row.
        """
        self.width, self.one = rows.shape[-1], one
        size = self.width + one
        self._sum = rows.new_zeros((*rows.shape[:-2], size, size))
        d = self.width
        self._starts = [0] if d <= _WHOLE_UP_TO else list(range(0, d, _BLOCK))
        self._waiting: list[Tensor] = []
        self._weights: list[float] = []

    def add(self, rows: Tensor, weight: float) -> None:
        """Add weight · rowsᵀ rows.

        Args:
            rows: ``[..., rows, d]``; not to be changed afterwards.
            weight: may be negative (quadrature weights are signed).
        """
        if 2 * rows.numel() > _GATHER:
            self._add_large(rows, weight)
            return
        if self._waiting and (
            self._waiting[0].shape != rows.shape
            or (len(self._waiting) + 1) * rows.numel() > _GATHER
        ):
            self._flush()
        self._waiting.append(rows)
        self._weights.append(weight)

    def _flush(self) -> None:
        if not self._waiting:
            return
        d = self.width
        rows = torch.cat(self._waiting, -2)
        count = rows.shape[-2] // len(self._waiting)
        weights = rows.new_tensor(self._weights).repeat_interleave(count)
        left = (rows * weights.unsqueeze(-1)).mT
        target = self._sum[..., :d, :d]
        if rows.dim() == 2:
            target.addmm_(left, rows)
        else:
            target.baddbmm_(left, rows)
        if self.one:
            sums = rows.mT @ weights
            self._sum[..., :d, d].add_(sums)
            self._sum[..., d, :d].add_(sums)
            self._sum[..., d, d] += count * math.fsum(self._weights)
        self._waiting, self._weights = [], []

    def _add_large(self, rows: Tensor, weight: float) -> None:
        batched, d = rows.dim() == 3, self.width
        for start, stop in zip(self._starts, [*self._starts[1:], d], strict=True):
            target = self._sum[..., start:stop, start:d]
            left, right = rows[..., start:stop].mT, rows[..., start:]
            if batched:
                target.baddbmm_(left, right, alpha=weight)
            else:
                target.addmm_(left, right, alpha=weight)
        if self.one:
            # Above the diagonal only, as the blocks; `full` mirrors it.
            self._sum[..., :d, d].add_(rows.sum(-2), alpha=weight)
            self._sum[..., d, d] += weight * rows.shape[-2]
            if len(self._starts) == 1:
                self._sum[..., d, :d].add_(rows.sum(-2), alpha=weight)

    def merge(self, other: Moment) -> None:
        """Add another sum of the same shape.

        Args:
            other: sum over other rows.
        """
        other._flush()
        self._sum.add_(other._sum)

    def full(self) -> Tensor:
        """The symmetric matrix.

        Returns:
            ``[..., d, d]``.
        """
        self._flush()
        if len(self._starts) == 1:
            return self._sum
        upper = torch.triu(self._sum)
        return upper + torch.triu(self._sum, 1).mT
