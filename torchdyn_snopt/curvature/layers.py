"""How a layer's input and output gradient become rows for the Kronecker factors A and B.

Convention: a layer maps z to h = W z (z with a 1 appended when the layer has a bias). For one
evaluation of the layer on N samples with S positions each (positions: the locations s of a
convolution, or extra dimensions of the input) the rules yield

- inputs  ``[N·S, in(+1)]`` and gradients ``[N·S, out]`` under weight sharing by 'expand',
- inputs  ``[N, in(+1)]`` (mean over positions) and gradients ``[N, out]`` (sum over positions)
  under 'reduce' (Eschenhagen et al. 2023).

A convolution with G groups is G independent layers: its rows carry a leading dimension G, and so
do its factors. Grosse & Martens 2016 for convolutions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

if TYPE_CHECKING:
    from torch import Tensor

WeightSharing: TypeAlias = Literal["expand", "reduce"]
Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

SUPPORTED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Rows:
    """Rows of one evaluation of a layer.

    Attributes:
        values: ``[rows, features]``, or ``[G, rows, features]`` for a grouped convolution.
        samples: number of samples; 1 for a layer fed without batch dimension.
        positions: rows that each sample contributed before any reduction.
    """

    values: Tensor
    samples: int
    positions: int


def is_supported(module: nn.Module) -> bool:
    """Whether a Kronecker rule exists for this module.

    Args:
        module: any module.

    Returns:
        True for Linear and Conv1d/2d/3d with a floating-point weight.
    """
    return type(module) in SUPPORTED_LAYERS and getattr(module, "weight", None) is not None


def weight_matrix(weight: Tensor, bias: Tensor | None, groups: int = 1) -> Tensor:
    """A weight-shaped and a bias-shaped tensor as the matrix that A ⊗ B acts on.

    Args:
        weight: tensor shaped like a layer's weight.
        bias: tensor shaped like its bias, or None.
        groups: of a grouped convolution.

    Returns:
        ``[out, in(+1)]``, or ``[G, out/G, in(+1)]`` for a grouped convolution.
    """
    matrix = weight.reshape(weight.shape[0], -1)
    if bias is not None:
        matrix = torch.cat([matrix, bias.unsqueeze(1)], dim=1)
    return matrix if groups == 1 else matrix.unflatten(0, (groups, -1))


def split_weight_matrix(
    matrix: Tensor, shape: torch.Size, *, has_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Undo `weight_matrix`.

    Args:
        matrix: what `weight_matrix` returns.
        shape: of the weight.
        has_bias: whether the last column belongs to the bias.

    Returns:
        Tensors shaped like the weight and like the bias (None without one).
    """
    if matrix.dim() == 3:
        matrix = matrix.flatten(0, 1)
    if not has_bias:
        return matrix.reshape(shape), None
    return matrix[:, :-1].reshape(shape), matrix[:, -1]


def input_rows(
    module: nn.Module, z: Tensor, batch: int, sharing: WeightSharing, *, bias: bool
) -> Rows:
    """Rows for the factor A.

    Args:
        module: the layer.
        z: its input.
        batch: samples in the batch of the whole model.
        sharing: 'expand' or 'reduce'.
        bias: append a 1 to each row.

    Returns:
        The rows, as the module's docstring says.
    """
    if isinstance(module, nn.Linear):
        rows = _linear_rows(z, batch)
        values = rows.values
        if sharing == "reduce" and rows.positions > 1:
            values = values.unflatten(0, (rows.samples, rows.positions)).mean(1)
    else:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        patches, samples, positions = _patches(module, z)
        if sharing == "reduce":
            # [N, out_locations..., G, in/G, kernel...] -> [G, N, in]
            values = patches.mean(tuple(range(1, 1 + _space(module))))
        else:
            values = patches
        values = values.flatten(-1 - _space(module)).flatten(0, -3).transpose(0, 1)
        values = values[0] if module.groups == 1 else values
        if values.stride(-1) != 1:
            values = values.contiguous()
        rows = Rows(values, *_assign(samples, positions, batch))
    if bias:
        values = F.pad(values, (0, 1), value=1.0)
    return Rows(values, rows.samples, rows.positions)


def gradient_rows(module: nn.Module, g: Tensor, batch: int, sharing: WeightSharing) -> Rows:
    """Rows for the factor B.

    Args:
        module: the layer.
        g: gradient of its output, with the output's shape.
        batch: samples in the batch of the whole model.
        sharing: 'expand' or 'reduce'.

    Returns:
        The rows, as the module's docstring says.
    """
    if isinstance(module, nn.Linear):
        rows = _linear_rows(g, batch)
        values = rows.values
        if sharing == "reduce" and rows.positions > 1:
            values = values.unflatten(0, (rows.samples, rows.positions)).sum(1)
        return Rows(values, rows.samples, rows.positions)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if g.dim() == _space(module) + 1:
        g = g.unsqueeze(0)
    samples, positions = g.shape[0], math.prod(g.shape[2:])
    g = g.flatten(2)  # [N, out, S]
    values = g.sum(2) if sharing == "reduce" else g.transpose(1, 2).flatten(0, 1)
    if module.groups > 1:
        values = values.unflatten(1, (module.groups, -1)).transpose(0, 1)
    return Rows(values, *_assign(samples, positions, batch))


def _space(module: Conv) -> int:
    return len(module.kernel_size)


def _linear_rows(x: Tensor, batch: int) -> Rows:
    leading = math.prod(x.shape[:-1])
    return Rows(x.reshape(leading, x.shape[-1]), *_assign(leading, 1, batch))


def _assign(leading: int, positions: int, batch: int) -> tuple[int, int]:
    """Samples and positions of ``leading`` rows: a multiple of the batch, or one unbatched sample."""
    if leading >= batch and leading % batch == 0:
        return batch, positions * (leading // batch)
    return 1, positions * leading


def _patches(module: Conv, z: Tensor) -> tuple[Tensor, int, int]:
    """A view of the padded input: [N, out_locations..., G, in/G, kernel...]."""
    space = _space(module)
    if z.dim() == space + 1:
        z = z.unsqueeze(0)
    padding = _padding(module)
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        z = F.pad(z, padding, mode=mode)
    samples, channels = z.shape[:2]
    strides = z.stride()
    locations = [
        (z.shape[2 + i] - module.dilation[i] * (module.kernel_size[i] - 1) - 1) // module.stride[i]
        + 1
        for i in range(space)
    ]
    groups = module.groups
    per_group = channels // groups
    size = (samples, *locations, groups, per_group, *module.kernel_size)
    stride = (
        strides[0],
        *(strides[2 + i] * module.stride[i] for i in range(space)),
        strides[1] * per_group,
        strides[1],
        *(strides[2 + i] * module.dilation[i] for i in range(space)),
    )
    return z.as_strided(size, stride, z.storage_offset()), samples, math.prod(locations)


def _padding(module: Conv) -> list[int]:
    """Padding as `F.pad` takes it: last dimension first, two numbers each."""
    if module.padding == "valid":
        return [0] * (2 * _space(module))
    pairs: list[int] = []
    for i in reversed(range(_space(module))):
        if module.padding == "same":
            total = module.dilation[i] * (module.kernel_size[i] - 1)
            pairs += [total // 2, total - total // 2]
        else:
            width = module.padding[i]
            assert isinstance(width, int)
            pairs += [width, width]
    return pairs
