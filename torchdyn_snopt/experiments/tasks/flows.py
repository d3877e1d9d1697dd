"""What `circle`, `gas` and `miniboone` share: FFJORD's continuous normalizing flows.

Points flow to a standard normal distribution, and the trace of the field's Jacobian is integrated
along (Chen et al. 2018), estimated by Hutchinson's method with signs drawn once for each solve
(Grathwohl et al. 2019). The state is ``[batch, 1 + features]``: the integral of minus the trace
comes first, as in torchdyn's CNF. rtol is the task's tolerance and atol a hundredth of it: 1e-6 and
1e-8 in the authors' experiments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torchdyn.models import CNF, hutch_trace
from torchdyn.nn import Augmenter

from torchdyn_snopt.experiments.data import load_arrays
from torchdyn_snopt.experiments.tasks.base import Last, Samples, Sensitivity, Splits, neural_ode

ATOL_SHARE = 1e-2


def load(name: str, data_dir: Path | None = None) -> Splits:
    """The splits of a data set of points; the points are their own targets.

    Args:
        name: Of the data set.
        data_dir: The folder with its file.

    Returns:
        Points ``[samples, features]``.
    """
    arrays = load_arrays(name, "points", data_dir)
    return Splits(points(torch.as_tensor(arrays.x_train)), points(torch.as_tensor(arrays.x_test)))


def points(x: Tensor) -> Samples:
    """Points without labels: what is asked for is their density.

    Args:
        x: ``[samples, features]``.

    Returns:
        Samples whose targets are the points.
    """
    x = x.float()
    return Samples(x, x)


def negative_log_likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean of −log p(x) = −log N(z; 0, I) − ∫ tr dt, in nats.

    Args:
        outputs: ``[batch, 1 + features]``: −∫ tr dt, then z.
        targets: Not needed.

    Returns:
        0-d tensor.
    """
    minus_trace, z = outputs[:, 0], outputs[:, 1:]
    log_normal = -0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))
    return (minus_trace - log_normal).mean()


class ConcatSquash(nn.Module):
    """FFJORD's layer: (W x + b) · σ(gate(t)) + shift(t).

    torchdyn sets the attribute ``t`` before each evaluation of the field.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        """New weights.

        Args:
            inputs: Width of x.
            outputs: Width of what is returned.
        """
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.gate = nn.Linear(1, outputs)
        self.shift = nn.Linear(1, outputs, bias=False)
        self.t: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """At the time that was set.

        Args:
            x: ``[batch, inputs]``.

        Returns:
            ``[batch, outputs]``.
        """
        t = torch.as_tensor(self.t, dtype=x.dtype, device=x.device).reshape(1, 1)
        y: Tensor = self.layer(x) * self.gate(t).sigmoid() + self.shift(t)
        return y


class Signs(nn.Module):
    """Random signs, the noise of Hutchinson's estimator; on the device that the model is on."""

    def __init__(self, features: int) -> None:
        """A source of signs.

        Args:
            features: How many are drawn for each sample.
        """
        super().__init__()
        self.register_buffer("like", torch.zeros(features), persistent=False)

    def sample(self, shape: tuple[int, ...]) -> Tensor:
        """Draw from torch's generator.

        Args:
            shape: Leading dimensions.

        Returns:
            −1 or 1 with equal probability, ``[*shape, features]``.
        """
        like: Tensor = self.get_buffer("like")
        bits = torch.randint(2, (*shape, *like.shape), device=like.device)
        return bits.to(like.dtype).mul_(2).sub_(1)


def flow(
    widths: Sequence[int],
    activation: type[nn.Module],
    sensitivity: Sensitivity,
    tolerance: float,
    *,
    steps: int = 1,
    t1: float = 1.0,
) -> nn.Module:
    """Points ``[batch, features]`` to ``[batch, 1 + features]``.

    Args:
        widths: Of the field's layers, from the features on and back to them.
        activation: Between the layers.
        sensitivity: How the gradients of the ODEs are computed.
        tolerance: rtol of every solve.
        steps: How many neural ODEs follow each other.
        t1: Each is integrated over [0, t1].

    Returns:
        A new model.
    """
    modules: list[nn.Module] = [Augmenter(augment_idx=1, augment_dims=1)]
    for _ in range(steps):
        node = neural_ode(
            _field(widths, activation), sensitivity, tolerance, atol=ATOL_SHARE * tolerance
        )
        node.t_span = torch.tensor([0.0, t1])
        modules += [node, Last()]
    return nn.Sequential(*modules)


def _field(widths: Sequence[int], activation: type[nn.Module]) -> CNF:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [ConcatSquash(inputs, outputs), activation()]
    net = nn.Sequential(*layers[:-1])
    return CNF(net, trace_estimator=hutch_trace, noise_dist=Signs(widths[0]))
