"""A column that needs no product of its own: a multiple of each sample's adjoint.

With a single seed the gradient of a sample's loss often lies along it: in the logits of two
classes both are multiples of (1, −1), in a scalar output there is no other direction, and the
draws of 'mc' seldom do. q and a then follow one linear equation from two multiples of one vector,
so that q = c a at all times, with one c for each sample. What layers see of a gives the columns
but for c, which is multiplied at the end; the backward solve costs what it does for the gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from torchdyn_snopt.adjoint.problem import Problem
    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.registry import Collector

# Largest ‖q − c a‖ / ‖q‖, in units of the rounding error.
ROUNDING = 1e3


def multiples(
    problem: Problem,
    wanted: Mapping[LayerModule, list[Collector]],
    grad_states: Tensor,
    columns: Tensor | None,
) -> Tensor | None:
    """By which multiples of the adjoint the seeds are given, where they are.

    Args:
        problem: what is solved. A running cost adds to a alone, so there must be none.
        wanted: layers with their takers, which must all want columns sample by sample.
        grad_states: dL/dx at each evaluation time, ``[T, *x.shape]``.
        columns: seeds ``[R, T, *x.shape]``, or None.

    Returns:
        c ``[N]``; None when the columns have to be carried.
    """
    if columns is None or len(columns) != 1 or grad_states.dim() < 3:
        return None
    if problem.field.running_cost is not None:
        return None
    if not all(collector.per_sample for takers in wanted.values() for collector in takers):
        return None
    a = grad_states.transpose(0, 1).flatten(1)
    q = columns[0].transpose(0, 1).flatten(1)
    squares = a.square().sum(1)
    tiny = torch.finfo(a.dtype).tiny
    factor = (a * q).sum(1) / squares.clamp(min=tiny)
    factor = torch.where(squares > tiny, factor, torch.zeros_like(factor))
    rest = torch.linalg.vector_norm(q - factor.unsqueeze(1) * a)
    allowed = ROUNDING * torch.finfo(a.dtype).eps * torch.linalg.vector_norm(q)
    return factor if bool(rest <= allowed) else None


def as_columns(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients as columns of rank 1.

    Args:
        gradients: at layers' outputs.

    Returns:
        ``[1, *shape]`` each.
    """
    return [None if g is None else g.unsqueeze(0) for g in gradients]


def times_sample(factor: Tensor, value: Tensor) -> Tensor:
    """Multiply each sample.

    Args:
        factor: ``[N]``.
        value: ``[N, ...]``.

    Returns:
        Like ``value``.
    """
    return factor.view(-1, *[1] * (value.dim() - 1)) * value
