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
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeGuard

import torch
from torch import nn
from torch.nn import functional as F

from torchdyn_snopt.curvature.moments import Moment
from torchdyn_snopt.curvature.strips import StripMoment, Strips

if TYPE_CHECKING:
    from torch import Tensor

WeightSharing: TypeAlias = Literal["expand", "reduce"]
Conv: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d

LayerModule: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

# See `enough_samples`: this many multiplications take about as long as the factor's eigenvectors.
ROWS_PER_DIMENSION, CHEAP = 2, 5e8

SUPPORTED_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Rows:
    """Rows of one evaluation of a layer.

    Attributes:
        values: ``[rows, features]``, or ``[G, rows, features]`` for a grouped convolution.
        samples: number of samples; 1 for a layer fed without batch dimension.
        positions: rows that each sample contributed before any reduction.
        strips: set when the values are strips ``[lines, rows, features]`` (or ``[G, ...]``).
        stand_for: how many samples each one of those that are here stands for.
    """

    values: Tensor
    samples: int
    positions: int
    strips: Strips | None = None
    stand_for: float = 1.0

    def moment(self, *, one: bool) -> Moment | StripMoment:
        """An empty sum that takes rows like these.

        Args:
            one: append a 1 to each row.

        Returns:
            It.
        """
        if self.strips is None:
            return Moment(self.values, one=one)
        return StripMoment(self.strips, self.values, one=one)


def is_supported(module: nn.Module) -> TypeGuard[LayerModule]:
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


def input_rows(module: LayerModule, z: Tensor, batch: int, sharing: WeightSharing) -> Rows:
    """Rows for the factor A, without the 1 of the bias.

    The features of a convolution come in the order (kernel, channel), which makes the patches
    cheap to gather; `in_weight_order` puts the finished factor right.

    Args:
        module: the layer.
        z: its input.
        batch: samples in the batch of the whole model.
        sharing: 'expand' or 'reduce'.

    Returns:
        The rows, as the module's docstring says.
    """
    if isinstance(module, nn.Linear):
        rows = _linear_rows(z, batch)
        if sharing == "reduce" and rows.positions > 1:
            rows.values = _by_sample(rows).mean(-2)
        return rows
    if z.dim() == 1 + _space(module):
        z = z.unsqueeze(0)
    if sharing == "expand" and module.stride[0] == 1 and module.kernel_size[0] > 1:
        return _strips(module, z, batch)
    if sharing == "expand":
        return patch_rows(module, z, batch)
    values, samples, positions = _mean_patches(module, z)  # [N, kernel, in]
    rows = Rows(_apart_by_group(module, values), *_assign(samples, positions, batch))
    if rows.samples < samples:
        rows.values = _by_sample(rows).mean(-2)
    return rows


def enough_samples(module: LayerModule, z: Tensor, batch: int) -> int:
    """How many samples of a batch show what A is, where all of them would be a lot of work.

    That is `ROWS_PER_DIMENSION` patches for each dimension of A, or as many as `CHEAP`
    multiplications are for.

    Args:
        module: the layer.
        z: its input.
        batch: samples in the batch of the whole model.

    Returns:
        The batch itself, unless the layer is a convolution with many patches.
    """
    if isinstance(module, nn.Linear) or z.dim() != 2 + _space(module) or z.shape[0] != batch:
        return batch
    padded = [size + sum(pair) for size, pair in zip(z.shape[2:], _padding(module), strict=True)]
    geometry = zip(padded, module.kernel_size, module.stride, module.dilation, strict=True)
    positions = math.prod(_locations(*sizes) for sizes in geometry)
    size = module.in_channels // module.groups * math.prod(module.kernel_size)
    rows = max(ROWS_PER_DIMENSION * size, CHEAP / size**2)
    return min(batch, math.ceil(rows / max(positions, 1)))


def patch_rows(module: Conv, z: Tensor, batch: int) -> Rows:
    """Rows of a convolution under 'expand' that are whole patches, never strips.

    Args:
        module: the layer.
        z: its input ``[N, in, *space]``.
        batch: samples in the batch of the whole model.

    Returns:
        ``[N·S, kernel·in]``, or ``[G, N·S, kernel·in/G]`` for a grouped convolution.
    """
    values, samples, positions = _patches(module, z)  # [N·S, kernel, in]
    return Rows(_apart_by_group(module, values), *_assign(samples, positions, batch))


def _apart_by_group(module: Conv, patches: Tensor) -> Tensor:
    """``[rows, kernel, in]`` to ``[rows, kernel·in]``, or ``[G, rows, kernel·in/G]``."""
    if module.groups == 1:
        return patches.flatten(1)
    grouped: Tensor = patches.unflatten(-1, (module.groups, -1))
    return grouped.permute(2, 0, 1, 3).flatten(2)


def in_weight_order(module: LayerModule, factor: Tensor) -> Tensor:
    """A factor A with its features in the order of the weight: (channel, kernel), then the bias.

    Args:
        module: the layer.
        factor: moment of `input_rows`, ``[..., in(+1), in(+1)]``.

    Returns:
        The same matrix, reordered for a convolution.
    """
    if isinstance(module, nn.Linear):
        return factor
    kernel, size = math.prod(module.kernel_size), factor.shape[-1]
    order = torch.arange(size, device=factor.device)
    patch = module.in_channels // module.groups * kernel
    order[:patch] = order[:patch].view(kernel, -1).t().reshape(-1)
    return factor.index_select(-1, order).index_select(-2, order)


def gradient_rows(module: LayerModule, g: Tensor, batch: int, sharing: WeightSharing) -> Rows:
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
        if sharing == "reduce" and rows.positions > 1:
            rows.values = _by_sample(rows).sum(-2)
        return rows
    if g.dim() == _space(module) + 1:
        g = g.unsqueeze(0)
    samples, positions = g.shape[0], math.prod(g.shape[2:])
    g = g.flatten(2)  # [N, out, S]
    values = g.sum(2) if sharing == "reduce" else g.transpose(1, 2).flatten(0, 1)
    if module.groups > 1:
        values = values.unflatten(1, (module.groups, -1)).transpose(0, 1)
    rows = Rows(values, *_assign(samples, positions, batch))
    if sharing == "reduce" and rows.samples < samples:
        rows.values = _by_sample(rows).sum(-2)
    return rows


def _space(module: Conv) -> int:
    return len(module.kernel_size)


def _by_sample(rows: Rows) -> Tensor:
    """[..., rows, features] with the rows of each sample apart: [..., N, rows / N, features]."""
    return rows.values.unflatten(-2, (rows.samples, -1))  # type: ignore[no-any-return]


def _linear_rows(x: Tensor, batch: int) -> Rows:
    leading = math.prod(x.shape[:-1])
    return Rows(x.reshape(leading, x.shape[-1]), *_assign(leading, 1, batch))


def _assign(leading: int, positions: int, batch: int) -> tuple[int, int]:
    """Samples and positions of rows: a multiple of the batch, or one unbatched sample."""
    if leading >= batch and leading % batch == 0:
        return batch, positions * (leading // batch)
    return 1, positions * leading


def _strips(module: Conv, z: Tensor, batch: int) -> Rows:
    """Patches along all dimensions of space but the first, [lines, N·S', kernel'·in]."""
    padding, zeros = _padding(module), (0, 0)
    if module.padding_mode == "zeros":
        zeros, padding[0] = padding[0], (0, 0)  # lines of zeros need not be there
    if any(map(any, padding)):
        z = _pad(module, z, padding)
    kernel, dilation, lines = module.kernel_size[0], module.dilation[0], z.shape[2]
    locations = _locations(lines + sum(zeros), kernel, 1, dilation)
    last = z.movedim(2, 0).movedim(2, -1).contiguous()  # [lines, N, *space', in]
    values, rest = _unfold(last, module, range(1, _space(module)))
    if module.groups == 1:
        values = values.flatten(2)
    else:
        values = values.unflatten(-1, (module.groups, -1)).permute(3, 0, 1, 2, 4).flatten(3)
    samples, positions = _assign(z.shape[0], locations * rest, batch)
    strips = Strips(kernel, dilation, locations, lines, before=zeros[0])
    return Rows(values, samples, positions, strips)


def _patches(module: Conv, z: Tensor) -> tuple[Tensor, int, int]:
    """All patches [N·S, kernel, in]; channels innermost, so that whole runs are copied."""
    padding = _padding(module)
    if any(map(any, padding)):
        z = _pad(module, z, padding)
    last = z.movedim(1, -1).contiguous().unsqueeze(0)
    values, positions = _unfold(last, module, range(_space(module)))
    return values[0], z.shape[0], positions


def _unfold(last: Tensor, module: Conv, dimensions: range) -> tuple[Tensor, int]:
    """Patches along some dimensions of space of a padded input ``[lines, N, *space, in]``.

    Args:
        last: contiguous; channels innermost, so that whole runs are copied.
        module: the layer.
        dimensions: those that are left in ``last``.

    Returns:
        ``[lines, N·S, kernel, in]``, and S.
    """
    outer, inner = last.stride()[:2], last.stride()[2:-1]
    kernel, steps, dilations = (
        [sizes[i] for i in dimensions]
        for sizes in (module.kernel_size, module.stride, module.dilation)
    )
    geometry = zip(last.shape[2:-1], kernel, steps, dilations, strict=True)
    locations = [_locations(*sizes) for sizes in geometry]
    size = (*last.shape[:2], *locations, *kernel, last.shape[-1])
    stride = (
        *outer,
        *(along * step for along, step in zip(inner, steps, strict=True)),
        *(along * dilation for along, dilation in zip(inner, dilations, strict=True)),
        1,
    )
    positions = math.prod(locations)
    rows = last.as_strided(size, stride)
    lines, samples, features = last.shape[0], last.shape[1], last.shape[-1]
    return rows.reshape(lines, samples * positions, math.prod(kernel), features), positions


def _mean_patches(module: Conv, z: Tensor) -> tuple[Tensor, int, int]:
    """The mean patch of each sample [N, kernel, in]: one product with a matrix of averages."""
    padding = _padding(module)
    if module.padding_mode != "zeros" and any(map(any, padding)):
        z = _pad(module, z, padding)
        padding = [(0, 0)] * _space(module)
    geometry = zip(
        z.shape[2:], module.kernel_size, module.stride, module.dilation, padding, strict=True
    )
    averages, positions = _averaging(tuple(geometry), z.dtype, z.device)
    return (z.flatten(2) @ averages).mT, z.shape[0], positions


@lru_cache(maxsize=64)
def _averaging(
    geometry: tuple[tuple[int, int, int, int, tuple[int, int]], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, int]:
    """[input locations, kernel]: how often each location meets each kernel offset, over S."""
    averages, positions = torch.ones(1, 1, dtype=dtype), 1
    for size, kernel, stride, dilation, (before, after) in geometry:
        count = _locations(size + before + after, kernel, stride, dilation)
        along = torch.zeros(size, kernel, dtype=dtype)
        for k in range(kernel):
            for location in range(count):
                u = location * stride + k * dilation - before
                if 0 <= u < size:
                    along[u, k] += 1.0 / count
        averages, positions = torch.kron(averages, along), positions * count
    return averages.to(device), positions


def _pad(module: Conv, z: Tensor, padding: list[tuple[int, int]]) -> Tensor:
    widths = [width for pair in reversed(padding) for width in pair]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(z, widths, mode=mode)


def _locations(size: int, kernel: int, stride: int, dilation: int) -> int:
    """Output locations along one dimension of padded input."""
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def _padding(module: Conv) -> list[tuple[int, int]]:
    """Padding before and after each dimension of space."""
    if module.padding == "valid":
        return [(0, 0)] * _space(module)
    pairs = []
    for i in range(_space(module)):
        if module.padding == "same":
            total = module.dilation[i] * (module.kernel_size[i] - 1)
            pairs.append((total // 2, total - total // 2))
        else:
            width = module.padding[i]
            assert isinstance(width, int)
            pairs.append((width, width))
    return pairs
