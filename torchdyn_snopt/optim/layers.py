"""A layer as the optimizer sees it: one matrix [out, in(+1)], its gradient and its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchdyn_snopt.curvature.layers import split_weight_matrix, weight_matrix

if TYPE_CHECKING:
    from torch import Tensor

    from torchdyn_snopt.curvature.factors import Factors


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

    def matrix(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Weight- and bias-shaped tensors as one matrix, in at least float32.

        Args:
            weight: e.g. the weight's gradient; None counts as zero.
            bias: e.g. the bias's gradient; None counts as zero.

        Returns:
            ``[out, in(+1)]`` (with a leading dimension of groups for a grouped convolution).
        """
        weight = torch.zeros_like(self.weight) if weight is None else weight
        if self.bias is not None and bias is None:
            bias = torch.zeros_like(self.bias)
        matrix = weight_matrix(weight, None if self.bias is None else bias, self.groups)
        return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix

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
        for key, new in (("A", factors.A), ("B", factors.B * factors.scale)):
            new = new.float() if new.dtype in (torch.float16, torch.bfloat16) else new
            if key in state:
                state[key].lerp_(new, share)
            else:
                state[key] = new.clone()
        state["factor_weight"], state["fisher_scale"] = weight, factors.fisher_scale
