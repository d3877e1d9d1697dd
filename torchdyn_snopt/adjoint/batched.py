"""Several vector-Jacobian products of one output in one backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.autograd.graph import GradientEdge


def batched_gradients(
    output: Tensor, inputs: Sequence[Tensor | GradientEdge], seeds: Tensor
) -> list[Tensor | None]:
    """One vector-Jacobian product for each seed; the graph is kept.

    They run as one backward pass under vmap; where an operation of the graph cannot be mapped, one
    after the other.

    Args:
        output: a tensor.
        inputs: leaves, or edges in the graph.
        seeds: ``[R, *output.shape]``.

    Returns:
        ``[R, *input.shape]`` for each input; None for one that the output does not depend on.
    """
    if not output.requires_grad or seeds.shape[0] == 0:
        return [None] * len(inputs)
    if seeds.shape[0] == 1:
        return _one_by_one(output, inputs, seeds)  # a third of the time of vmap's machinery
    try:
        return list(
            torch.autograd.grad(
                output,
                inputs,  # type: ignore[arg-type]  # tensors and edges may be mixed
                seeds,
                is_grads_batched=True,
                allow_unused=True,
                retain_graph=True,
            )
        )
    except RuntimeError:  # no batching rule; a genuine failure repeats itself below
        return _one_by_one(output, inputs, seeds)


def _one_by_one(
    output: Tensor, inputs: Sequence[Tensor | GradientEdge], seeds: Tensor
) -> list[Tensor | None]:
    columns = [
        torch.autograd.grad(
            output,
            inputs,  # type: ignore[arg-type]
            seed,
            allow_unused=True,
            retain_graph=True,
        )
        for seed in seeds
    ]
    return [_stack(column) for column in zip(*columns, strict=True)]


def _stack(column: tuple[Tensor | None, ...]) -> Tensor | None:
    present = [entry for entry in column if entry is not None]
    if len(present) == 1:
        return present[0].unsqueeze(0)
    return torch.stack(present) if present else None


def batched_vector_jacobian(
    output: Tensor, inputs: Sequence[Tensor], seeds: Tensor
) -> list[Tensor]:
    """`batched_gradients` for tensors, with zeros where there is no dependence.

    Args:
        output: a tensor.
        inputs: leaves.
        seeds: ``[R, *output.shape]``.

    Returns:
        ``[R, *input.shape]`` for each input.
    """
    gradients = batched_gradients(output, inputs, seeds)
    return [
        i.new_zeros(seeds.shape[0], *i.shape) if g is None else g
        for i, g in zip(inputs, gradients, strict=True)
    ]
