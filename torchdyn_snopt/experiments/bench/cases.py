"""The three fields on which the benchmarks run, and one training step on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from torchdyn_snopt.experiments.tasks.base import Sensitivity, neural_ode

TOLERANCE = 1e-3
SEED = 0


def _mlp(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1), nn.Tanh(), nn.Conv2d(64, 64, 3, padding=1)
    )


@dataclass(frozen=True)
class Case:
    """A field with the shape of its states.

    Attributes:
        name: Its name in tables.
        build: Makes the field.
        shape: Shape of a batch of states.
        convolutional: Whether weights are shared over positions.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    convolutional: bool = False

    def field(self, device: torch.device) -> nn.Module:
        """The field, with the same weights at every call.

        Args:
            device: Where to put it.

        Returns:
            A new module.
        """
        torch.manual_seed(SEED)
        return self.build().to(device)

    def states(self, device: torch.device) -> Tensor:
        """Initial states that want a gradient, as behind an encoder; always the same ones.

        Args:
            device: Where to put them.

        Returns:
            A leaf tensor of the case's shape.
        """
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(self.shape, generator=generator).to(device).requires_grad_()


CASES = (
    Case("MLP 64-64-64-64, batch 128", lambda: _mlp(64, 64, 64, 64), (128, 64)),
    Case("MLP 2-64-64-2, batch 512", lambda: _mlp(2, 64, 64, 2), (512, 2)),
    Case("2 convolutions 3×3, 64 channels, 6×6, batch 128", _convolutions, (128, 64, 6, 6), True),
)


def node_for(field: nn.Module, sensitivity: Sensitivity, tolerance: float = TOLERANCE) -> nn.Module:
    """The NeuralODE of the experiments around a field.

    Args:
        field: The field.
        sensitivity: How its gradient is computed.
        tolerance: rtol and atol, forward and backward.

    Returns:
        From states ``[batch, ...]`` to ``[2, batch, ...]``.
    """
    node: nn.Module = neural_ode(field, sensitivity, tolerance)
    return node


def loss_of(states: Tensor) -> Tensor:
    """The benchmarks' loss.

    Args:
        states: A trajectory ``[times, batch, ...]``.

    Returns:
        The mean square of the last state.
    """
    return states[-1].square().mean()
