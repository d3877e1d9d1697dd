"""Kronecker factors by loops over samples and positions, independent of the package."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from torchdyn_snopt.curvature.factors import Use


def input_patches(module: nn.Module, z: Tensor) -> Tensor:
    """What each weight entry is multiplied with: ``[G, N, S, in]``, in the weight's own order.

    The layer itself is asked, with one weight entry at a time set to 1.
    """
    if isinstance(module, nn.Linear):
        return z.reshape(1, z.shape[0], -1, z.shape[-1])
    probe = copy.deepcopy(module)
    probe.bias = None
    first = torch.arange(module.groups) * (module.out_channels // module.groups)
    columns = []
    with torch.no_grad():
        for index in itertools.product(*map(range, module.weight.shape[1:])):
            probe.weight.zero_()
            probe.weight[(slice(None), *index)] = 1.0
            columns.append(probe(z)[:, first].flatten(2))  # [N, G, S]
    return torch.stack(columns, -1).transpose(0, 1)


def output_gradients(module: nn.Module, g: Tensor) -> Tensor:
    """Gradients of a layer's output: ``[G, N, S, out/G]``."""
    if isinstance(module, nn.Linear):
        return g.reshape(1, g.shape[0], -1, g.shape[-1])
    return g.flatten(2).unflatten(1, (module.groups, -1)).permute(1, 0, 3, 2)


def moments(
    patches: list[Tensor], gradients: list[Tensor], sharing: str, *, bias: bool
) -> tuple[Tensor, Tensor]:
    """A and B of one evaluation with several uses, before any quadrature weight: ``[G, d, d]``.

    Args:
        patches: ``[G, N, S, in]`` for each use.
        gradients: ``[G, N, S, out]`` for each use.
        sharing: 'expand' or 'reduce'.
        bias: append a 1 to the inputs.

    Returns:
        mean_b Σ_s z zᵀ and mean_b mean_s g gᵀ; or those of the mean of z and the sum of g.
    """
    z, g = torch.cat(patches, 2), torch.cat(gradients, 2)
    if bias:
        z = torch.cat([z, torch.ones_like(z[..., :1])], -1)
    groups, samples, positions = z.shape[:3]
    a = z.new_zeros(groups, z.shape[-1], z.shape[-1])
    b = g.new_zeros(groups, g.shape[-1], g.shape[-1])
    for group in range(groups):
        for n in range(samples):
            if sharing == "reduce":
                mean = sum(z[group, n, s] for s in range(positions)) / positions
                total = sum(g[group, n, s] for s in range(positions))
                a[group] += torch.outer(mean, mean) / samples
                b[group] += torch.outer(total, total) / samples
                continue
            for s in range(positions):
                a[group] += torch.outer(z[group, n, s], z[group, n, s]) / samples
                b[group] += torch.outer(g[group, n, s], g[group, n, s]) / (samples * positions)
    return a, b


def layer_moments(
    module: nn.Module, uses: list[Use], sharing: str = "expand"
) -> tuple[Tensor, Tensor]:
    """A and B of one evaluation of a layer by `moments`; of one group, as matrices."""
    a, b = moments(
        [input_patches(module, use.z) for use in uses],
        [output_gradients(module, use.g) for use in uses],
        sharing,
        bias=module.bias is not None,
    )
    return (a, b) if getattr(module, "groups", 1) > 1 else (a[0], b[0])
