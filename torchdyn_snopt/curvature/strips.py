"""The moment of a convolution's patches, without taking most of its products twice.

A patch [kernel lines, rest] at output line s is made of the strips Y at the input lines s + k d:

    A[k, k'] = Σ_s Y[s + k d]ᵀ Y[s + k' d] = Σ_i Y[i]ᵀ Y[i + (k' − k) d],  i = k d, …, k d + S − 1.

Blocks with one shift k' − k are sums over ranges of lines that differ at their ends only. So each
shift's products are taken once, in pieces cut where the ranges begin and end; lines of zeros, which
padding adds, are left out. For a 3×3 kernel that is less than half of the work of the upper
triangle, on strips a third as wide as the patches.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Strips(NamedTuple):
    """How a convolution with stride 1 along its first dimension of space reads lines.

    Attributes:
        kernel: K, lines of a patch.
        dilation: d, lines from one to the next.
        locations: S, output lines.
        lines: input lines, without those of zeros.
        before: lines of zeros before the first.
    """

    kernel: int
    dilation: int
    locations: int
    lines: int
    before: int

    def window(self, k: int, shift: int = 0) -> tuple[int, int]:
        """Lines i that block (k, k + shift) sums over.

        Args:
            k: line of the patch.
            shift: k' − k.

        Returns:
            The first, and the one behind the last.
        """
        start = k * self.dilation - self.before
        stop = min(start + self.locations, self.lines - shift * self.dilation)
        return max(start, 0), stop

    def pieces(self) -> list[tuple[int, int, int]]:
        """Ranges of lines that every block takes wholly or not at all.

        Returns:
            (shift, first line, line behind the last).
        """
        found = []
        for shift in range(self.kernel):
            windows = [self.window(k, shift) for k in range(self.kernel - shift)]
            cuts = sorted({cut for start, stop in windows if start < stop for cut in (start, stop)})
            found += [
                (shift, start, stop)
                for start, stop in itertools.pairwise(cuts)
                if any(first <= start and stop <= last for first, last in windows)
            ]
        return found


class StripMoment:
    """A running weighted sum of patchesᵀ patches, with a 1 appended for a layer with bias.

    Patches count once they are accepted.
    """

    def __init__(self, strips: Strips, rows: Tensor, *, one: bool = False) -> None:
        """Start at zero.

        Args:
            strips: the geometry.
            rows: ``[..., lines, rows, d]``, for dimensions, dtype and device.
            one: append a 1 to each patch.
        """
        self.strips, self.one, self.width = strips, one, rows.shape[-1]
        self._pieces = strips.pieces()
        # Of each piece; then, for the 1, of the lines, and how many patches there are.
        square = (*rows.shape[:-3], self.width, self.width)
        shapes = [square] * len(self._pieces) + [(*rows.shape[:-2], self.width), (1,)] * one
        self._total = [rows.new_zeros(shape) for shape in shapes]
        self._step: list[Tensor] = []
        self._end: list[Tensor] = []

    def add(self, rows: Tensor, weight: float) -> None:
        """Add weight · patchesᵀ patches, for the time being.

        Args:
            rows: strips ``[..., lines, rows, d]``.
            weight: may be negative (quadrature weights are signed).
        """
        self._step = self._step or [torch.zeros_like(total) for total in self._total]
        for (shift, start, stop), product in zip(self._pieces, self._step, strict=False):
            offset = shift * self.strips.dilation
            left = rows[..., start:stop, :, :].flatten(-3, -2)
            right = rows[..., start + offset : stop + offset, :, :].flatten(-3, -2)
            if product.dim() == 2:
                product.addmm_(left.mT, right, alpha=weight)
            else:
                product.baddbmm_(left.mT, right, alpha=weight)
        if self.one:
            lines, count = self._step[-2:]
            lines.add_(rows.sum(-2), alpha=weight)
            count += weight * rows.shape[-2] * self.strips.locations

    def accept(self, scale: float = 1.0) -> None:
        """Keep what was added since the last call.

        Args:
            scale: of its weights.
        """
        if self._step:
            torch._foreach_add_(self._total, self._step, alpha=scale)
        self._step = []

    def reject(self) -> None:
        """Forget what was added since the last `accept`."""
        self._step = []

    def begin(self) -> None:
        """What was added since the last call is the first end of the next step."""
        self._end, self._step = self._step, []

    def accept_ends(self, scale: float) -> None:
        """Keep what was added as the second end of a step, and again its first one.

        Args:
            scale: of their weights, half of the step's length.
        """
        for end in filter(None, (self._end, self._step)):
            torch._foreach_add_(self._total, end, alpha=scale)
        self.begin()

    def close(self) -> None:
        """There is no next step."""
        self._end = []

    def merge(self, other: StripMoment) -> None:
        """Add another sum of the same geometry.

        Args:
            other: sum over other rows.
        """
        torch._foreach_add_(self._total, other._total)

    def full(self) -> Tensor:
        """The symmetric matrix of what was accepted, its features in the order (line, strip).

        Returns:
            ``[..., K d (+1), K d (+1)]``.
        """
        kernel, width = self.strips.kernel, self.width
        batch = self._total[0].shape[:-2]
        size = kernel * width + self.one
        total = self._total[0].new_zeros((*batch, size, size))
        for (shift, start, stop), product in zip(self._pieces, self._total, strict=False):
            for k in range(kernel - shift):
                first, last = self.strips.window(k, shift)
                if first <= start and stop <= last:
                    row, column = k * width, (k + shift) * width
                    total[..., row : row + width, column : column + width].add_(product)
        upper = torch.triu(total)
        if self.one:
            lines, count = self._total[-2:]
            for k in range(kernel):
                first, last = self.strips.window(k)
                sums = lines[..., first : max(first, last), :].sum(-2)
                upper[..., k * width : (k + 1) * width, -1] = sums
            upper[..., -1, -1] = count
        return upper + torch.triu(upper, 1).mT
