"""Sums of parameter gradients over stages and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class WeightedSum:
    """Σ wᵢ gradsᵢ over the stages of a step, then over the accepted steps.

    Parameters that the field does not use have no gradient at any stage and stay None.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.total: list[Tensor | None] | None = None

    def add(self, gradients: Sequence[Tensor | None], weight: float) -> None:
        """Add weight · gradients.

        Args:
            gradients: one tensor or None for each parameter.
            weight: a factor, may be negative.
        """
        if self.total is None:
            self.total = [None] * len(gradients)
        both: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i, (mine, new) in enumerate(zip(self.total, gradients, strict=True)):
            if new is None:
                continue
            if mine is None:
                self.total[i] = new * weight
            else:
                both[0].append(mine)
                both[1].append(new)
        if both[0]:
            torch._foreach_add_(both[0], both[1], alpha=weight)
