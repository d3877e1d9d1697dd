"""Parameters without curvature: SGD with momentum, or Adam."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Group = dict[str, Any]
ADAM_EPS = 1e-8


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
    beta1, beta2 = group["momentum"], group["alpha"]
    for state, g in zip(states, gradients, strict=True):
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
            state["adam_step"] = 0
        state["adam_step"] += 1
    first = [state["exp_avg"] for state in states]
    second = [state["exp_avg_sq"] for state in states]
    torch._foreach_lerp_(first, gradients, 1.0 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, value=1.0 - beta2)
    scale = torch._foreach_sqrt(second)
    torch._foreach_div_(scale, [(1.0 - beta2 ** s["adam_step"]) ** 0.5 for s in states])
    torch._foreach_add_(scale, ADAM_EPS)
    steps = [-group["lr"] / (1.0 - beta1 ** s["adam_step"]) for s in states]
    torch._foreach_addcdiv_(params, first, scale, steps)


TABLE: dict[str, Callable[[list[Tensor], list[Tensor], list[Group], Group], None]] = {
    "sgd": sgd,
    "adam": adam,
}
