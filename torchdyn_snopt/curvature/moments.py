"""Second moments of rows: M = Σ w rows ⊗ rows, in few and large products."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

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
    diagonal are computed. `full` completes both. Rows count once they are accepted. The ends of
    steps, which live through a whole solve, are kept as upper triangles.
    """

    def __init__(self, rows: Tensor, *, one: bool = False) -> None:
        """Start at zero.

        Args:
            rows: ``[..., rows, d]``, for dimensions, dtype and device.
            one: append a 1 to each row.
        """
        batch, width = rows.shape[:-2], rows.shape[-1]
        form = Form((*batch, width + one, width + one), width, rows.new_empty(0))
        self._total, self._step = Products(form), Products(form)
        self._ends: Tensor | None = None  # the integral over steps, [..., d (d + 1) / 2]
        self._end: Tensor | None = None  # the first end of the next one

    def add(self, rows: Tensor, weight: float) -> None:
        """Add weight · rowsᵀ rows, for the time being.

        Args:
            rows: ``[..., rows, d]``; not to be changed afterwards.
            weight: may be negative (quadrature weights are signed).
        """
        self._step.add(rows, weight)

    def accept(self, scale: float = 1.0) -> None:
        """Keep what was added since the last call.

        Args:
            scale: of its weights.
        """
        self._total.take(self._step, scale)

    def reject(self) -> None:
        """Forget what was added since the last `accept`."""
        self._step.clear()

    def begin(self) -> None:
        """What was added since the last call is the first end of the next step."""
        self._end = self._step.triangle()
        self._step.clear()

    def accept_ends(self, scale: float) -> None:
        """Keep what was added as the second end of a step, and again its first one.

        Args:
            scale: of their weights, half of the step's length.
        """
        first = self._end
        self.begin()
        for end in (first, self._end):
            if end is not None:
                self._ends = torch.zeros_like(end) if self._ends is None else self._ends
                self._ends.add_(end, alpha=scale)

    def close(self) -> None:
        """There is no next step."""
        self._end = None

    def merge(self, other: Moment) -> None:
        """Add another sum of the same shape.

        Args:
            other: sum over other rows; left empty.
        """
        other._total.flush()  # rows wait for others of their own pass only
        self._total.take(other._total, 1.0)
        ends, other._ends = other._ends, None
        if self._ends is None:
            self._ends = ends
        elif ends is not None:
            self._ends += ends

    def full(self) -> Tensor:
        """The symmetric matrix of what was accepted.

        Returns:
            ``[..., d, d]``.
        """
        total = self._total.symmetric()
        if self._ends is None:
            return total
        upper = torch.zeros_like(total)
        places = upper_places(total.shape[-1], total.device)
        upper.flatten(-2).index_copy_(-1, places.long(), self._ends)
        return total.add_(_mirrored(upper))


@functools.lru_cache(maxsize=32)
def upper_places(width: int, device: torch.device) -> Tensor:
    """Where a flat matrix has its upper triangle.

    Args:
        width: d.
        device: of the matrix.

    Returns:
        Row by row, ``[d (d + 1) / 2]``.
    """
    rows, columns = torch.triu_indices(width, width, dtype=torch.int32).unbind()
    return (rows * width + columns).to(device)


class Form(NamedTuple):
    """Of products.

    Attributes:
        shape: of their sum, with the appended 1.
        width: of rows, without it.
        like: for dtype and device.
    """

    shape: tuple[int, ...]
    width: int
    like: Tensor

    @property
    def one(self) -> bool:
        """Whether a 1 is appended."""
        return self.shape[-1] > self.width

    @property
    def starts(self) -> list[int]:
        """First columns of the blocks."""
        return [0] if self.width <= _WHOLE_UP_TO else list(range(0, self.width, _BLOCK))


class Products:
    """Σ w rowsᵀ rows, in a matrix and in rows that still wait for their product.

    Of the appended 1 the matrix has the last column only, and `symmetric` the rest.
    """

    def __init__(self, form: Form) -> None:
        """Start empty.

        Args:
            form: of the rows.
        """
        self.form = form
        self._matrix: Tensor | None = None
        self._count = 0.0  # Σ w, over rows
        self._waiting: list[tuple[Tensor, float]] = []

    def add(self, rows: Tensor, weight: float) -> None:
        """Add weight · rowsᵀ rows.

        Args:
            rows: ``[..., rows, d]``.
            weight: w.
        """
        if 2 * rows.numel() > _GATHER:
            self._multiply(rows, weight)
        else:
            self._wait([(rows, weight)])

    def _wait(self, more: list[tuple[Tensor, float]]) -> None:
        """Rows of one shape, together with those that wait already if they are not too many."""
        rows = more[0][0]
        if self._waiting and (
            self._waiting[0][0].shape != rows.shape
            or (len(self._waiting) + len(more)) * rows.numel() > _GATHER
        ):
            self.flush()
        self._waiting += more

    def take(self, other: Products, scale: float) -> None:
        """Add scale times other products, which are left empty.

        Args:
            other: of the same form.
            scale: of their weights.
        """
        if other._matrix is not None and self._matrix is not None:
            self._matrix.add_(other._matrix, alpha=scale)
        elif other._matrix is not None:
            self._matrix = other._matrix.mul_(scale)
        self._count += scale * other._count
        waiting = [(rows, scale * weight) for rows, weight in other._waiting]
        other.clear()
        if waiting:
            self._wait(waiting)

    def clear(self) -> None:
        """Forget everything."""
        self._matrix, self._count, self._waiting = None, 0.0, []

    def _sums(self) -> Tensor:
        if self._matrix is None:
            self._matrix = self.form.like.new_zeros(self.form.shape)
        return self._matrix

    def flush(self) -> None:
        """One product of all that waits."""
        if not self._waiting:
            return
        parts, numbers = zip(*self._waiting, strict=True)
        self._waiting, d, sums = [], self.form.width, self._sums()
        rows = torch.cat(parts, -2)
        count = parts[0].shape[-2]
        weights = rows.new_tensor(numbers).repeat_interleave(count)
        left = (rows * weights.unsqueeze(-1)).mT
        target = sums[..., :d, :d]
        if rows.dim() == 2:
            target.addmm_(left, rows)
        else:
            target.baddbmm_(left, rows)
        if self.form.one:
            sums[..., :d, d].add_(rows.mT @ weights)
            self._count += count * math.fsum(numbers)

    def _multiply(self, rows: Tensor, weight: float) -> None:
        batched, d, sums = rows.dim() == 3, self.form.width, self._sums()
        starts = self.form.starts
        for start, stop in zip(starts, [*starts[1:], d], strict=True):
            target = sums[..., start:stop, start:d]
            left, right = rows[..., start:stop].mT, rows[..., start:]
            if batched:
                target.baddbmm_(left, right, alpha=weight)
            else:
                target.addmm_(left, right, alpha=weight)
        if self.form.one:
            sums[..., :d, d].add_(rows.sum(-2), alpha=weight)
            self._count += weight * rows.shape[-2]

    def triangle(self) -> Tensor | None:
        """The upper triangle, row by row.

        Returns:
            ``[..., d (d + 1) / 2]``, or None where nothing was added.
        """
        self.flush()
        if self._matrix is None:
            return None
        if self.form.one:
            self._matrix[..., -1, -1] = self._count
        places = upper_places(self.form.shape[-1], self._matrix.device)
        return self._matrix.flatten(-2).index_select(-1, places)

    def symmetric(self) -> Tensor:
        """The whole matrix.

        Returns:
            ``[..., d, d]``.
        """
        self.flush()
        sums, d = self._sums(), self.form.width
        if self.form.one:
            sums[..., d, d] = self._count
            sums[..., d, :d] = sums[..., :d, d]
        if len(self.form.starts) == 1:
            return sums
        return _mirrored(sums.triu_())


def _mirrored(upper: Tensor) -> Tensor:
    """An upper triangular matrix, made symmetric in place."""
    return upper.add_(torch.triu(upper, 1).mT)
