"""Parameters without curvature: SGD with momentum, or Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchdyn_snopt.optim.moments import absorb, corrections, deviations

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Group = dict[str, Any]


def sgd(params: list[Tensor], gradients: list[Tensor], states: list[Group], group: Group) -> None:
    """θ ← θ − lr · buffer, buffer ← momentum · buffer + g, as torch.optim.SGD.

    Args:
        params: θ, changed in place.
        gradients: g, weight decay included.
        states: of each parameter.
        group: lr and momentum.
    """
    if group["momentum"] != 0.0:
        for i, (state, g) in enumerate(zip(states, gradients, strict=True)):
            if "momentum_buffer" in state:
                gradients[i] = state["momentum_buffer"].mul_(group["momentum"]).add_(g)
            else:
                gradients[i] = state["momentum_buffer"] = g.clone()
    torch._foreach_add_(params, gradients, alpha=-group["lr"])


def adam(params: list[Tensor], gradients: list[Tensor], states: list[Group], group: Group) -> None:
    """Adam with β₁ = momentum and β₂ = alpha, the betas of the preconditioned layers.

    Args:
        params: θ, changed in place.
        gradients: g, weight decay included.
        states: of each parameter.
        group: lr, momentum and alpha.
    """
    absorb(states, gradients, group["momentum"], group["alpha"])
    first = [state["exp_avg"] for state in states]
    scale = deviations(states, group["alpha"])
    steps = [-group["lr"] / correction for correction in corrections(states, group["momentum"])]
    torch._foreach_addcdiv_(params, first, scale, steps)


TABLE: dict[str, Callable[[list[Tensor], list[Tensor], list[Group], Group], None]] = {
    "sgd": sgd,
    "adam": adam,
}
