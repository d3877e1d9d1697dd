"""A single column that lies along the adjoint: the same numbers, and no product of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.curvature.test_columns import FIELDS, Collection, D, Model, N, dense, relative
from torchdyn_snopt import CrossEntropyLoss, SNOptSensitivity
from torchdyn_snopt.adjoint import along, checkpoint, solve
from torchdyn_snopt.curvature import columns as columns_module
from torchdyn_snopt.torchdiffeq_api import odeint_snopt

pytestmark = pytest.mark.usefixtures("float64")


def logits(model: Model, x: Tensor) -> Tensor:
    return model(x)[:, -1]


def matrix(model: Model, x: Tensor, y: Tensor) -> Tensor:
    model.zero_grad()
    return Collection(model).gauss_newton(CrossEntropyLoss()(logits(model, x), y))


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
@pytest.mark.parametrize("times", [[0.0, 0.4, 1.0], [0.9, -0.2]], ids=["up", "down"])
@pytest.mark.parametrize("name", FIELDS)
def test_two_classes_give_the_carried_columns_and_gradients(name, times, adjoint, monkeypatch):
    size = 6 if name in {"convolution", "image"} else D
    model = Model(FIELDS[name](), size, times, adjoint=adjoint)
    x, y = torch.randn(N, 2), torch.tensor([0, 1, 1, 0])
    found = []

    def noted(*args: object) -> Tensor | None:
        found.append(along.multiples(*args))
        return found[-1]

    monkeypatch.setattr(solve, "multiples", noted)
    actual = matrix(model, x, y)
    gradients = [p.grad for p in model.parameters()]
    assert found[0].shape == (N,)
    monkeypatch.setattr(solve, "multiples", lambda *_: None)
    carried = matrix(model, x, y)
    assert relative(actual, carried) < 1e-12
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))

    class Last(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return logits(model, x)

    last = Last()
    last.model = model
    expected = dense(last, x, lambda out: torch.nn.functional.cross_entropy(out, y))
    assert relative(actual, expected) < 1e-7


def test_nothing_is_pulled_back_twice(monkeypatch):
    """One vector-Jacobian product for a step; with three classes two."""
    calls = []

    def counted(*args: object) -> object:
        calls.append(1)
        return batched(*args)

    batched = checkpoint.batched_gradients
    monkeypatch.setattr(checkpoint, "batched_gradients", counted)
    model = Model(FIELDS["layers"](), D, [0.0, 1.0], adjoint="checkpoint")
    x, y = torch.randn(N, 2), torch.tensor([0, 1, 1, 0])
    matrix(model, x, y)
    assert len(calls) == 0
    model.head = torch.nn.Linear(D, 3)
    matrix(model, x, y)
    assert len(calls) > 0


def test_seeds_off_the_adjoint_are_carried():
    kept = along.multiples

    class Stub:
        field = type("F", (), {"running_cost": None})

    problem, a = Stub(), torch.randn(2, N, D)
    factor = torch.randn(N)
    assert torch.allclose(kept(problem, {}, a, (factor.view(1, N, 1) * a)[None]), factor)
    off = factor.view(1, N, 1) * a
    off[0, 0, 0] += 1e-6
    assert kept(problem, {}, a, off[None]) is None
    assert kept(problem, {}, a, torch.stack([a, a])) is None
    assert kept(problem, {}, a, None) is None
    # A sample without gradient whose column is not zero.
    none = a.clone()
    none[:, 1] = 0.0
    assert kept(problem, {}, none, a[None]) is None
    assert kept(problem, {}, none, none[None]).tolist() == [1.0, 0.0, 1.0, 1.0]
    problem.field = type("F", (), {"running_cost": lambda t, x: x.sum()})
    assert kept(problem, {}, a, a[None]) is None


@pytest.mark.parametrize("waiting", [1, 100, 2**20])
def test_stages_may_wait_for_their_product(waiting, monkeypatch):
    monkeypatch.setattr(columns_module, "WAITING", waiting)
    torch.manual_seed(0)
    field, x = FIELDS["layers"](), torch.randn(N, D)
    collection = Collection(field)
    state = odeint_snopt(
        field,
        x,
        torch.tensor([0.0, 1.0]),
        method="rk4",
        sensitivity=SNOptSensitivity(adjoint="checkpoint"),
    )[-1]
    y = torch.tensor([0, 1, 2, 0])
    found = collection.gauss_newton(CrossEntropyLoss()(state, y))

    class Solved(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field = field

        def forward(self, x: Tensor) -> Tensor:
            return odeint_snopt(
                field,
                x,
                torch.tensor([0.0, 1.0]),
                method="rk4",
                sensitivity=SNOptSensitivity(adjoint="checkpoint"),
            )[-1]

    expected = dense(Solved(), x, lambda out: torch.nn.functional.cross_entropy(out, y))
    assert relative(found, expected) < 1e-12
