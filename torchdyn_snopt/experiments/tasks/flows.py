"""What `circle`, `gas` and `miniboone` share: FFJORD's continuous normalizing flows.

Points flow to a standard normal distribution, and the trace of the field's Jacobian is integrated
along (Chen et al. 2018), estimated by Hutchinson's method with signs drawn once for each solve
(Grathwohl et al. 2019). The state is ``[batch, 1 + features]``: the integral of minus the trace
comes first, as in torchdyn's CNF. rtol is the task's tolerance and atol a hundredth of it: 1e-6 and
1e-8 in the authors' experiments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torchdyn.nn import Augmenter

from torchdyn_snopt.experiments.data import load_arrays
from torchdyn_snopt.experiments.tasks.base import Last, Samples, Sensitivity, Splits, neural_ode

ATOL_SHARE = 1e-2

Activation = Callable[..., Tensor]

# Each activation with its derivative, from the argument and the value.
ACTIVATIONS: dict[type[nn.Module], tuple[Activation, Activation]] = {
    nn.Tanh: (torch.tanh, lambda x, y: 1.0 - y * y),
    nn.Softplus: (nn.functional.softplus, lambda x, y: x.sigmoid()),
}


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
    """FFJORD's layer: (W x + b) · σ(gate(t)) + shift(t), with the tangent of x carried along.

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

    def forward(self, pair: Tensor) -> Tensor:
        """At the time that was set.

        Args:
            pair: x and its tangent, ``[batch, 2, inputs]``.

        Returns:
            The layer's value and its tangent, ``[batch, 2, outputs]``.
        """
        t = torch.as_tensor(self.t, dtype=pair.dtype, device=pair.device).reshape(1, 1)
        gate, shift = self.gate(t).sigmoid(), self.shift(t)
        # The layer adds its bias to the tangent as well, which has none.
        offset = torch.cat([shift, -self.layer.bias * gate])
        return torch.addcmul(offset, self.layer(pair), gate)


class WithTangent(nn.Module):
    """An activation, with the tangent of its argument carried along."""

    def __init__(self, value: Activation, slope: Activation) -> None:
        """Of any smooth activation.

        Args:
            value: From the argument to the value.
            slope: From the argument and the value to the derivative.
        """
        super().__init__()
        self._value, self._slope = value, slope

    def forward(self, pair: Tensor) -> Tensor:
        """Value and tangent.

        Args:
            pair: Argument and its tangent, ``[batch, 2, width]``.

        Returns:
            The same shape.
        """
        x, v = pair.unbind(1)
        y = self._value(x)
        return torch.stack([y, v * self._slope(x, y)], 1)


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


class Flow(nn.Module):
    """The right-hand side of a continuous normalizing flow: (−v·J v, F) at (·, x).

    What torchdyn's CNF with `hutch_trace` computes, from the same noise v. That differentiates
    the field, so that every gradient of the trace is a second derivative; here the tangent J v goes
    forward through the layers beside x, each weight acting on both. A layer then sees the tangent
    as a further position of its input, which is what its curvature has to know of the trace.
    """

    def __init__(self, net: nn.Module, noise_dist: Signs) -> None:
        """Around a network.

        Args:
            net: From pairs ``[batch, 2, features]`` to pairs.
            noise_dist: Where the noise of each solve comes from.
        """
        super().__init__()
        # The names by which torchdyn's NeuralODE knows a flow and hands it its noise.
        self.net, self.noise_dist, self.noise = net, noise_dist, torch.empty(0)
        self.trace_estimator = "tangent"

    def forward(self, state: Tensor) -> Tensor:
        """The rate of change.

        Args:
            state: ``[batch, 1 + features]``.

        Returns:
            The same shape.
        """
        rate, tangent = self.net(torch.stack([state[:, 1:], self.noise], 1)).unbind(1)
        return torch.cat([-(self.noise * tangent).sum(1, keepdim=True), rate], 1)


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
        activation: Between the layers, one of `ACTIVATIONS`.
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


def _field(widths: Sequence[int], activation: type[nn.Module]) -> Flow:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [ConcatSquash(inputs, outputs), WithTangent(*ACTIVATIONS[activation])]
    return Flow(nn.Sequential(*layers[:-1]), Signs(widths[0]))
