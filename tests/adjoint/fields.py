"""Small fields on which gradients are checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torchdyn.models import CNF, autograd_trace, hutch_trace

if TYPE_CHECKING:
    from torch import Tensor


class Mlp(nn.Module):
    """An autonomous field that takes x alone."""

    def __init__(self, dim: int = 3, width: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Convolution(nn.Module):
    """Two convolutions with t as a further channel, as in the paper."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, 4, 3, padding=1)
        self.second = nn.Conv2d(5, channels, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        h = torch.tanh(self.first(self.with_time(t, x)))
        return self.second(self.with_time(t, h))

    @staticmethod
    def with_time(t: Tensor, x: Tensor) -> Tensor:
        return torch.cat([x, t.expand(x.shape[0], 1, *x.shape[2:])], 1)


class TimeDependent(nn.Module):
    """Explicit dependence on t, in a layer's input and outside of it."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim + 1, 5), nn.Linear(5, dim, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        h = torch.tanh(self.inner(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1)))
        return self.outer(h) * (1 + self.scale * torch.sin(2 * t)) - self.scale * x


def cnf(dim: int = 2) -> CNF:
    return CNF(Mlp(dim).layers, trace_estimator=autograd_trace)


def hutchinson(dim: int = 2) -> CNF:
    """The noise is drawn when the model is called, and then held for the solve."""
    noise = MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    return CNF(Mlp(dim).layers, trace_estimator=hutch_trace, noise_dist=noise)


# name: field, shape of its state
FIELDS = {
    "mlp": (Mlp, (4, 3)),
    "convolution": (Convolution, (3, 2, 3, 3)),
    "time": (TimeDependent, (4, 3)),
    "cnf": (cnf, (4, 3)),
    "hutchinson": (hutchinson, (4, 3)),
}

TIMES = {
    "two": [0.0, 1.0],
    "two down": [0.8, -0.1],
    "five": [0.0, 0.2, 0.45, 0.5, 1.0],
    "five down": [1.0, 0.7, 0.65, 0.3, -0.2],
}
