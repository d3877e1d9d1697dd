"""torchdyn's tutorial models, trained as there but for two lines: sensitivity and optimizer.

Depth-invariant, Galerkin, data-controlled and augmented classifiers (the cookbook), a continuous
normalizing flow, a Hamiltonian network, an image classifier.
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sklearn.datasets import load_digits, make_moons
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.models import CNF, hutch_trace
from torchdyn.nn import Augmenter, DataControl, DepthCat, GalLinear
from torchdyn.nn.galerkin import Fourier

from torchdyn_snopt import SNOpt, solve_stats

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 25
SOLVES = {"sensitivity": "snopt", "rtol": 1e-3, "atol": 1e-3}
TIMES = torch.linspace(0.0, 1.0, 2)


class Node(nn.Module):
    """The NeuralODE's last state, as the tutorials' learners take it."""

    def __init__(self, field: nn.Module, **options: Any) -> None:
        super().__init__()
        with contextlib.redirect_stdout(io.StringIO()):
            self.node = NeuralODE(field, solver="dopri5", **SOLVES, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.node(x, TIMES.to(x))[1][-1]


def moons() -> tuple[Tensor, Tensor]:
    x, y = make_moons(128, noise=0.1, random_state=0)
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)


def classify(model: nn.Module) -> tuple[nn.Module, Callable[[], Tensor]]:
    x, y = moons()
    return model, lambda: nn.functional.cross_entropy(model(x), y)


def depth_invariant() -> tuple[nn.Module, Callable[[], Tensor]]:
    return classify(Node(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))))


def galerkin() -> tuple[nn.Module, Callable[[], Tensor]]:
    """Depth-variant by GalLinear, whose coefficients take the fallback."""
    field = nn.Sequential(
        DepthCat(1), GalLinear(2, 16, expfunc=Fourier(3)), nn.Tanh(), nn.Linear(16, 2)
    )
    return classify(Node(field))


def data_controlled() -> tuple[nn.Module, Callable[[], Tensor]]:
    field = nn.Sequential(DataControl(), nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    return classify(Node(field))


def augmented() -> tuple[nn.Module, Callable[[], Tensor]]:
    field = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 5))
    model = nn.Sequential(Augmenter(augment_idx=1, augment_dims=3), Node(field), nn.Linear(5, 2))
    return classify(model)


def flow() -> tuple[nn.Module, Callable[[], Tensor]]:
    """Maximum likelihood of the moons under a normalizing flow with Hutchinson's trace."""
    net = nn.Sequential(nn.Linear(2, 16), nn.Softplus(), nn.Linear(16, 2))
    noise = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    field = CNF(net, trace_estimator=hutch_trace, noise_dist=noise)
    model = nn.Sequential(Augmenter(augment_idx=1, augment_dims=1), Node(field))
    x, _ = moons()
    x = (x - x.mean(0)) / x.std(0)

    def loss() -> Tensor:
        out = model(x)
        return -(noise.log_prob(out[:, 1:]) - out[:, 0]).mean()

    return model, loss


class Hamiltonian(nn.Module):
    """dq/dt = ∂H/∂p, dp/dt = −∂H/∂q of a learned energy."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))

    def forward(self, t: Tensor, x: Tensor, args: Any = None) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            h = self.energy(x).sum()
            (slope,) = torch.autograd.grad(h, x, create_graph=True)
        return torch.cat([slope[:, 1:], -slope[:, :1]], 1)


def hamiltonian() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A pendulum's states one second later."""
    q = torch.linspace(-1.0, 1.0, 32)
    x = torch.stack([q, q.flip(0)], 1)
    c, s = torch.cos(torch.tensor(1.0)), torch.sin(torch.tensor(1.0))
    y = torch.stack([c * x[:, 0] + s * x[:, 1], c * x[:, 1] - s * x[:, 0]], 1)
    model = Node(Hamiltonian())
    return model, lambda: nn.functional.mse_loss(model(x), y)


def images() -> tuple[nn.Module, Callable[[], Tensor]]:
    field = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1))
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.GroupNorm(4, 8), Node(field),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    pixels, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(pixels[:96], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.as_tensor(labels[:96])
    return model, lambda: nn.functional.cross_entropy(model(x), y)


# model: the factor by which 25 steps bring its loss down, and whether some parameters fall back.
MODELS = {
    "depth-invariant": (depth_invariant, 0.6, False),
    "Galerkin": (galerkin, 0.6, True),
    "data-controlled": (data_controlled, 0.6, False),
    "augmented": (augmented, 0.6, False),
    "CNF": (flow, 0.95, False),
    "Hamiltonian": (hamiltonian, 0.2, False),
    "images": (images, 0.5, True),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_tutorial_model_trains(name: str) -> None:
    make, factor, falls_back = MODELS[name]
    model, loss_of = make()
    optimizer = SNOpt(model)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < factor * losses[0]
    assert solve_stats(model).status == "ok"
    how = [treatment for _, treatment in optimizer.summary()]
    assert "trust_region" in how
    assert any("fallback" in treatment for treatment in how) == falls_back
