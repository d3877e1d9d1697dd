"""Columns p of Proposition 2 by sample, collected in the training pass for every parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torchdyn_snopt.adjoint.problem import SNOptSensitivity
from torchdyn_snopt.curvature.columns import ColumnCollector
from torchdyn_snopt.curvature.factors import CurvatureSpec
from torchdyn_snopt.curvature.layers import is_supported
from torchdyn_snopt.curvature.losses import CrossEntropyLoss, MSELoss
from torchdyn_snopt.curvature.outside import OutsideRecorder
from torchdyn_snopt.errors import CurvatureError, UnsupportedError
from torchdyn_snopt.torchdiffeq_api import odeint_snopt

pytestmark = pytest.mark.usefixtures("float64")

N, D = 4, 3


class Layers(nn.Module):
    """Two layers, t among the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D + 1, 5), nn.Linear(5, D)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.cat([x, t.expand(len(x), 1)], 1))))


class Gated(nn.Module):
    """A gate fed with t alone, a free tensor, a layer used twice, one of them without samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate, self.twice = nn.Linear(D, D), nn.Linear(1, D), nn.Linear(1, 1)
        self.free = nn.Parameter(torch.randn(D))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(t.view(1)))
        drift = self.twice(t.view(1, 1)) + self.twice(x[:, :1])
        return gate * torch.tanh(self.layer(x)) + 0.3 * drift + self.free * torch.sin(x)


class Unmappable(Gated):
    """Control flow on data: torch.func cannot map it."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return super().forward(t, x) if bool(x.detach().sum() < 1e9) else x


class Convolution(nn.Module):
    """Grouped convolution on [N, 2, 3] (states are [N, 6])."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 2, 3, padding=1, groups=2)
        self.linear = nn.Linear(3, 3)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x.view(-1, 2, 3)))
        return self.linear(h).flatten(1)


class Image(nn.Module):
    """Convolutions on [N, 1, 2, 3]; the factors of the first are gathered line by line."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.wide = nn.Conv2d(2, 6, (2, 3), stride=(2, 1))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.wide(torch.tanh(self.conv(x.view(-1, 1, 2, 3)))).flatten(1)


FIELDS = {
    "layers": Layers,
    "gated": Gated,
    "unmappable": Unmappable,
    "convolution": Convolution,
    "image": Image,
}


class Model(nn.Module):
    """Encoder, ODE with several times, head; outputs [N, times, 2]."""

    def __init__(self, field: nn.Module, size: int, times: list[float], **sensitivity: str) -> None:
        super().__init__()
        self.encoder, self.field, self.head = nn.Linear(2, size), field, nn.Linear(size, 2)
        self.times, self.sensitivity = times, SNOptSensitivity(**sensitivity)
        self.method = "dopri5"

    def forward(self, x: Tensor) -> Tensor:
        states = odeint_snopt(
            self.field,
            torch.tanh(self.encoder(x)),
            torch.tensor(self.times),
            rtol=1e-9,
            atol=1e-10,
            method=self.method,
            sensitivity=self.sensitivity,
        )
        return self.head(states[1:].movedim(0, 1))


class Collection:
    """What SNOpt does around a backward pass, without the step."""

    def __init__(self, model: nn.Module, max_columns: int = 1000, **spec: str) -> None:
        self.model = model
        spec = {"curvature": "ggn", **spec}
        self.collector = ColumnCollector(CurvatureSpec(**spec), model.parameters(), max_columns)
        layers = [m for m in model.modules() if is_supported(m)]
        self.recorder = OutsideRecorder(self.collector, layers)
        self.collector.active = True
        self.recorder.start()

    def gauss_newton(self, *losses: Tensor) -> Tensor:
        for loss in losses:
            loss.backward()
        self.recorder.deliver()
        blocks = self.collector.blocks(self.model.parameters())
        assert list(map(id, blocks)) == list(map(id, self.model.parameters()))
        p = torch.cat(list(blocks.values()), 1)
        return p.mT @ p


def dense(model: nn.Module, x: Tensor, criterion) -> Tensor:
    """Jᵀ H J by autograd through the outputs, the solve's gradient from a check of its own."""
    parameters = dict(model.named_parameters())
    out = model(x)
    rows = [
        torch.cat(
            [
                g.reshape(-1)
                for g in torch.autograd.grad(o, list(parameters.values()), retain_graph=True)
            ]
        )
        for o in out.reshape(-1)
    ]
    jacobian = torch.stack(rows)
    flat = out.detach().reshape(-1)
    hessian = torch.autograd.functional.hessian(lambda o: criterion(o.view_as(out)), flat)
    return jacobian.mT @ hessian @ jacobian


def relative(value: Tensor, reference: Tensor) -> float:
    assert value.shape == reference.shape
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], [0.9, -0.2]], ids=["up", "down"])
@pytest.mark.parametrize("name", FIELDS)
def test_the_columns_rebuild_the_gauss_newton_matrix_of_the_network(name, times, adjoint):
    size = 6 if name in {"convolution", "image"} else D
    model = Model(FIELDS[name](), size, times, adjoint=adjoint)
    x, y = torch.randn(N, 2), torch.randn(N, len(times) - 1, 2)
    criterion = MSELoss()
    expected = dense(model, x, lambda out: nn.functional.mse_loss(out, y))
    actual = Collection(model).gauss_newton(criterion(model(x), y))
    assert relative(actual, expected) < 1e-7


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_the_discrete_adjoint_gives_the_columns_of_the_discrete_solution(method):
    """Coarse steps: to rounding, the stages without weight included."""
    field, x, y = Gated(), torch.randn(N, D), torch.randn(N, D)
    options = {"rtol": 1e-2, "atol": 1e-2, "method": method}
    sensitivity = SNOptSensitivity(adjoint="checkpoint")

    class Solve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, x: Tensor) -> Tensor:
            times = torch.tensor([0.0, 0.7, 1.5])
            return odeint_snopt(self.field, x, times, sensitivity=sensitivity, **options)[-1]

    model = Solve()
    expected = dense(model, x, lambda out: nn.functional.mse_loss(out, y))
    actual = Collection(model).gauss_newton(MSELoss()(model(x), y))
    assert relative(actual, expected) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_and_two_losses(reduction):
    model = Model(Layers(), D, [0.0, 1.0])
    x, y, classes = torch.randn(2 * N, 2), torch.randn(2 * N, 1, 2), torch.randint(2, (2 * N,))
    mse, cross = MSELoss(reduction=reduction), CrossEntropyLoss(reduction=reduction)
    share = 0.5 if reduction == "mean" else 1.0

    def both(out: Tensor, rows: slice) -> Tensor:
        return mse(out, y[rows]) + cross(out[:, 0], classes[rows])

    whole = slice(None)
    expected = dense(model, x, lambda out: both(out, whole))
    collection = Collection(model, reduction=reduction)
    parts = [slice(0, N), slice(N, None)]
    actual = collection.gauss_newton(*(share * both(model(x[rows]), rows) for rows in parts))
    assert relative(actual, expected) < 1e-7


def test_mc_tends_to_the_same_matrix():
    model = Model(Layers(), D, [0.0, 1.0])
    x, y = torch.randn(N, 2), torch.randn(N, 1, 2)
    expected = dense(model, x, lambda out: nn.functional.mse_loss(out, y))
    criterion = MSELoss(samples=400)
    actual = Collection(model, 2000, curvature="mc").gauss_newton(criterion(model(x), y))
    assert relative(actual, expected) < 0.2  # about 1/√400 times a small number of entries


def test_too_many_columns_are_refused_before_the_backward_pass():
    model = Model(Layers(), D, [0.0, 1.0])
    collection = Collection(model, 7)
    with pytest.raises(
        CurvatureError, match=r"(?s)4 samples × 2 seeds = 8 columns of .*max_columns=7"
    ):
        MSELoss()(model(torch.randn(N, 2)), torch.zeros(N, 1, 2))
    assert not collection.collector.seeded


def test_times_in_front_of_the_batch_are_refused():
    field, x = Layers(), torch.randn(N, D)
    collection = Collection(field)
    states = odeint_snopt(field, x, torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(CurvatureError, match="movedim"):
        collection.gauss_newton(MSELoss()(states, torch.zeros_like(states)))


def test_a_state_without_a_batch_is_refused():
    field = nn.Linear(D, D)
    collection = Collection(field)
    states = odeint_snopt(
        lambda t, x: field(x),
        torch.randn(D),
        torch.tensor([0.0, 1.0]),
        adjoint_params=tuple(field.parameters()),
    )
    with pytest.raises(UnsupportedError, match="batch dimension"):
        collection.gauss_newton(MSELoss()(states[-1:], torch.zeros(1, D)))
