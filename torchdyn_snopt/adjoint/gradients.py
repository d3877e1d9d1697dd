"""Gradients of a solve, and the one way to ask autograd for several at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.autograd.graph import GradientEdge


class Gradients(NamedTuple):
    """Gradients of the loss.

    Attributes:
        x0: dL/dx(t0), shaped like the state.
        times: dL/dt for each evaluation time ``[T]``, or None.
        parameters: dL/dθ for each parameter; None for those that the field does not use.
        columns: the columns q at t0 ``[R, *x.shape]`` (Eq. 11), or None when none are carried.
    """

    x0: Tensor
    times: Tensor | None
    parameters: Sequence[Tensor | None]
    columns: Tensor | None = None


def vector_jacobian(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    seeds: Sequence[Tensor],
    *,
    retain_graph: bool = False,
) -> Sequence[Tensor | None]:
    """Σ seedᵀ ∂output/∂input; outputs that depend on nothing contribute nothing.

    Args:
        outputs: tensors.
        inputs: leaves, or edges in the graph.
        seeds: one for each output.
        retain_graph: keep the graph.

    Returns:
        One tensor for each input, None for an input that no output depends on.
    """
    live = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o.requires_grad]
    if not live:
        return [None] * len(inputs)
    return torch.autograd.grad(
        [o for o, _ in live],
        inputs,  # type: ignore[arg-type]  # tensors and edges may be mixed
        [s for _, s in live],
        allow_unused=True,
        retain_graph=retain_graph,
    )
