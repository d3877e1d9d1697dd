"""Adam's moments of the gradients (Kingma & Ba 2015), in whatever basis these are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

Group = dict[str, Any]
ADAM_EPS = 1e-8


def absorb(states: list[Group], gradients: list[Tensor], beta1: float, beta2: float) -> None:
    """Average: m ← β₁ m + (1 − β₁) g, v ← β₂ v + (1 − β₂) g², in place, both from zero.

    Args:
        states: of each parameter; m is 'exp_avg', v 'exp_avg_sq', 'adam_step' counts.
        gradients: g, shaped as m and v.
        beta1: decay of m.
        beta2: decay of v.
    """
    for state, g in zip(states, gradients, strict=True):
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
            state["adam_step"] = 0
        state["adam_step"] += 1
    second = [state["exp_avg_sq"] for state in states]
    torch._foreach_lerp_([state["exp_avg"] for state in states], gradients, 1.0 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, value=1.0 - beta2)


def corrections(states: list[Group], beta: float) -> list[float]:
    """1 − βⁿ, by which averages over n steps that start at zero are too small.

    Args:
        states: after n ≥ 1 steps.
        beta: decay of the average.

    Returns:
        One number each.
    """
    return [1.0 - beta ** state["adam_step"] for state in states]


def deviations(states: list[Group], beta2: float, eps: float = ADAM_EPS) -> list[Tensor]:
    """√v̂ + ε, what Adam divides by.

    Args:
        states: after at least one step.
        beta2: decay of v.
        eps: ε.

    Returns:
        New tensors, one each.
    """
    scale = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
    torch._foreach_div_(scale, [c**0.5 for c in corrections(states, beta2)])
    torch._foreach_add_(scale, eps)
    return list(scale)
