"""Small training problems, and factors that are awkward on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torchdyn.core import NeuralODE

from torchdyn_snopt.optim.layers import Layer
from torchdyn_snopt.optim.trust_region import TrustRegion

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from torchdyn_snopt import SNOpt


def spd(size: int, low: float = 1e-6, high: float = 1e2) -> Tensor:
    """A positive definite matrix with a random basis and eigenvalues over many decades."""
    q = torch.linalg.qr(torch.randn(size, size)).Q
    return (q * torch.logspace(0, 1, size, base=high / low).mul(low)) @ q.T


def layer_with(a: Tensor, b: Tensor, *, bias: bool = True) -> Layer:
    """A layer as the optimizer sees it, of the size of its factors, with random gradients."""
    out, inputs = b.shape[-1], a.shape[-1] - bias
    weight = nn.Parameter(torch.randn(out, inputs))
    weight.grad = torch.randn_like(weight)
    shift = nn.Parameter(torch.randn(out)) if bias else None
    if shift is not None:
        shift.grad = torch.randn_like(shift)
    return Layer("some.weight", weight, shift, 1, {"A": a, "B": b, "factor_weight": 1.0})


class Field(nn.Module):
    """A field with t among the inputs of its first layer."""

    def __init__(self, dim: int = 3, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim + 1, width), nn.Linear(width, dim)

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return self.second(torch.tanh(self.first(torch.cat([x, t.expand(len(x), 1)], 1))))


class Classifier(nn.Module):
    """Encoder, ODE, a norm that has no curvature, head."""

    def __init__(self, sensitivity: object = "snopt") -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 3)
        self.node = NeuralODE(
            Field(),
            solver="heun",
            sensitivity=sensitivity,
            solver_adjoint="heun",
            return_t_eval=False,
        )
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        times = torch.linspace(0.0, 1.0, 2, dtype=x.dtype)
        return self.head(self.norm(self.node(torch.tanh(self.encoder(x)), times)[-1]))


def plain() -> nn.Sequential:
    """A network without an ODE."""
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def batch(step: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """The data of one step, the same each time it is asked for."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 2, generator=generator)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 0].sin()], 1)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    return (model(x) - y).square().sum(1).mean()


def train(
    model: nn.Module,
    optimizer: SNOpt | torch.optim.Optimizer,
    steps: range,
    *,
    after: Callable[[int], None] | None = None,
) -> list[float]:
    """The ordinary loop; returns the losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if after is not None:
            after(step)
    return losses


def flat(model: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def hooks(model: nn.Module) -> int:
    """Forward hooks on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def averages(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A and B of a layer, also where 'trust_region' has them as eigenvectors and eigenvalues."""
    recalled = dict(state)
    TrustRegion().recall(recalled)
    return recalled["A"], recalled["B"]
