"""A layer as the optimizer sees it: one matrix [out, in(+1)], its gradient and its state.

Where a factor is very wide, a preconditioner may take blocks on its diagonal for the whole, which
need less memory and much less time. The matrix is then cut in tiles of one size, those on the edges
filled up with zeros: ``[rows, columns, out/rows, in/columns]``, with A ``[columns, …]`` and B
``[rows, 1, …]``, so that all products are those of a single matrix.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F

from torchdyn_snopt.curvature.layers import split_weight_matrix, weight_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from torchdyn_snopt.curvature.factors import Factors

#: How often a matrix is cut: rows and columns of tiles.
Tiles: TypeAlias = "tuple[int, int]"
# Blocks of a factor, where it is cut, are at most so many times as wide as the matrix is long.
SLENDER = 64


class Layer:
    """Weight and bias of a layer with curvature, as the matrix that A ⊗ B acts on."""

    def __init__(
        self, name: str, weight: Tensor, bias: Tensor | None, groups: int, state: dict[str, Any]
    ) -> None:
        """Keep references.

        Args:
            name: of the weight, for messages.
            weight: the layer's weight.
            bias: its bias, if that belongs to the curvature.
            groups: of a grouped convolution.
            state: the optimizer's state of the weight, where everything of the layer is kept.
        """
        self.name, self.weight, self.bias = name, weight, bias
        self.groups, self.state = groups, state
        self.tiles: Tiles = (state.get("tile_rows", 1), state.get("tile_columns", 1))

    def matrix(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Weight- and bias-shaped tensors as one matrix, in at least float32.

        Args:
            weight: e.g. the weight's gradient; None counts as zero.
            bias: e.g. the bias's gradient; None counts as zero.

        Returns:
            ``[out, in(+1)]`` (with a leading dimension of groups for a grouped convolution), or
            its tiles.
        """
        weight = torch.zeros_like(self.weight) if weight is None else weight
        if self.bias is not None and bias is None:
            bias = torch.zeros_like(self.bias)
        matrix = weight_matrix(weight, None if self.bias is None else bias, self.groups)
        wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
        return cut(wide, self.tiles)

    def has_gradient(self) -> bool:
        """Whether the layer took part in the last backward pass.

        Returns:
            True if its weight or its bias has a gradient.
        """
        bias = self.bias
        return self.weight.grad is not None or (bias is not None and bias.grad is not None)

    def gradient(self, weight_decay: float, sign: float) -> Tensor:
        """Q_u + γθ (the paper's running cost for weight decay).

        Args:
            weight_decay: γ.
            sign: −1 to maximize.

        Returns:
            As `matrix`.
        """
        gradient = self.matrix(self.weight.grad, None if self.bias is None else self.bias.grad)
        if sign < 0:
            gradient = -gradient
        if weight_decay:
            gradient = gradient.add(self.matrix(self.weight, self.bias), alpha=weight_decay)
        return gradient

    def apply(self, update: Tensor, lr: float) -> None:
        """θ ← θ − lr · update, except for what is frozen or has no gradient.

        Args:
            update: as `matrix`.
            lr: learning rate.
        """
        shape, has_bias = self.weight.shape, self.bias is not None
        if self.tiles != (1, 1):
            update = join(update, shape[0], math.prod(shape[1:]) + has_bias)
        weight, bias = split_weight_matrix(update, shape, has_bias=has_bias)
        for p, part in ((self.weight, weight), (self.bias, bias)):
            if p is not None and part is not None and p.requires_grad and p.grad is not None:
                p.add_(part.to(p.dtype), alpha=-lr)

    def absorb(self, factors: Factors, decay: float) -> None:
        """Take new factors into the exponential average kept in the state.

        Args:
            factors: A, B and the scale, freshly collected.
            decay: weight of the past; the first factors count whole.
        """
        state = self.state
        seen = state.get("factor_weight", 0.0)
        weight = decay * seen + (1.0 - decay)
        share = (1.0 - decay) / weight
        rows, columns = self.tiles
        a, b = diagonal_blocks(factors.A, columns), diagonal_blocks(factors.B, rows)
        if self.tiles != (1, 1):
            a, b = a.reshape(columns, *a.shape[-2:]), b.reshape(rows, 1, *b.shape[-2:])
        for key, new in (("A", a), ("B", b * factors.scale)):
            new = new.float() if new.dtype in (torch.float16, torch.bfloat16) else new
            if key in state:
                state[key].lerp_(new, share)
            else:
                state[key] = new.clone()
        state["factor_weight"], state["fisher_scale"] = weight, factors.fisher_scale


def tiles_for(outputs: int, inputs: int, widest: int | None) -> Tiles:
    """How often a matrix has to be cut so that no factor is wider than that.

    Of a slender matrix, as the 860 weights by which a flow's layer depends on time, the larger
    factor would have hundreds of times the entries of the matrix; it is cut into more blocks.

    Args:
        outputs: rows.
        inputs: columns.
        widest: of A and B; None for no limit.

    Returns:
        Rows and columns of tiles.
    """
    if widest is None:
        return 1, 1
    rows = math.ceil(outputs / min(widest, SLENDER * inputs))
    return rows, math.ceil(inputs / min(widest, SLENDER * outputs))


def cut(matrix: Tensor, tiles: Tiles) -> Tensor:
    """A matrix in tiles; the matrix itself where it is one.

    Args:
        matrix: ``[out, in]``.
        tiles: rows and columns.

    Returns:
        ``[rows, columns, ⌈out/rows⌉, ⌈in/columns⌉]``.
    """
    if tiles == (1, 1):
        return matrix
    rows, columns = tiles
    height, width = (math.ceil(n / k) for n, k in zip(matrix.shape, tiles, strict=True))
    margins = (0, columns * width - matrix.shape[1], 0, rows * height - matrix.shape[0])
    return F.pad(matrix, margins).view(rows, height, columns, width).transpose(1, 2)


def join(tiles: Tensor, outputs: int, inputs: int) -> Tensor:
    """Undo `cut`.

    Args:
        tiles: what it returned.
        outputs: rows of the matrix.
        inputs: columns of the matrix.

    Returns:
        ``[outputs, inputs]``.
    """
    rows, columns, height, width = tiles.shape
    whole = tiles.transpose(1, 2).reshape(rows * height, columns * width)
    return whole[:outputs, :inputs]


def diagonal_blocks(factor: Tensor, number: int) -> Tensor:
    """Blocks of one size on the diagonal; the factor itself where it is one.

    Args:
        factor: ``[d, d]``.
        number: of blocks.

    Returns:
        ``[number, ⌈d/number⌉, ⌈d/number⌉]``.
    """
    if number == 1:
        return factor
    blocks = cut(factor, (number, number))
    return blocks.diagonal(dim1=0, dim2=1).movedim(-1, 0)
