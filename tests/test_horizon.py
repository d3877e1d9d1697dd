"""The horizon as a parameter: gradients against differences, bounds, attachment to models."""

from __future__ import annotations

import copy
import io
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_snopt import Horizon, SNOptSensitivity, learn_horizon, odeint_snopt, solve_stats
from torchdyn_snopt.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

TIGHT = {"rtol": 1e-10, "atol": 1e-11, "rtol_adjoint": 1e-10, "atol_adjoint": 1e-11}
FIVE = (0.0, 0.2, 0.45, 0.5, 1.0)


class Autonomous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return self.net(x)


class Timed(Autonomous):
    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return self.net(x) * (1 + torch.sin(3 * t))


def model_of(field: nn.Module, adjoint: str = "backsolve", **settings: Any) -> NeuralODE:
    sensitivity = SNOptSensitivity(adjoint=adjoint)
    return NeuralODE(
        field, solver="dopri5", sensitivity=sensitivity, return_t_eval=False, **settings
    )


def scalar(states: Tensor) -> Tensor:
    """A loss in which every evaluation time has its own weight."""
    weights = torch.linspace(0.5, 1.5, len(states)).view(-1, *[1] * (states.dim() - 1))
    return (weights * torch.sin(states)).mean() * len(states)


def difference(f: Callable[[float], float], at: float, step: float = 1e-3) -> float:
    """A central difference of order 4."""
    far, near = f(at + 2 * step) - f(at - 2 * step), f(at + step) - f(at - step)
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("field", [Autonomous, Timed])
@pytest.mark.parametrize("fractions", [(0.0, 1.0), FIVE], ids=["two", "five"])
@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
@pytest.mark.usefixtures("float64")
def test_gradient_in_t1_equals_a_difference(
    field: type[nn.Module], fractions: tuple[float, ...], adjoint: str
) -> None:
    node, x = model_of(field(), adjoint, **TIGHT), torch.randn(4, 3)
    horizon = learn_horizon(node, 0.8, fractions=fractions)
    scalar(node(x)).backward()

    @torch.no_grad()
    def loss(t1: float) -> float:
        return scalar(node(x, torch.tensor([t1 * f for f in fractions]))).item()

    assert horizon.t1.grad.item() == pytest.approx(difference(loss, 0.8), rel=1e-6)


@pytest.mark.parametrize("field", [Autonomous, Timed])
@pytest.mark.parametrize("times", [[0.1, 0.9], [0.1, 0.3, 0.35, 0.6, 0.9]], ids=["two", "five"])
@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
@pytest.mark.usefixtures("float64")
def test_gradient_in_each_end_equals_a_difference(
    field: type[nn.Module], times: list[float], adjoint: str
) -> None:
    node, x = model_of(field(), adjoint, **TIGHT), torch.randn(4, 3)
    t_span = torch.tensor(times, requires_grad=True)
    scalar(node(x, t_span)).backward()
    for end in (0, -1):

        @torch.no_grad()
        def loss(t: float, end: int = end) -> float:
            moved = torch.tensor(times)
            moved[end] = t
            return scalar(node(x, moved)).item()

        assert t_span.grad[end].item() == pytest.approx(difference(loss, times[end]), rel=1e-6)


@pytest.mark.usefixtures("float64")
def test_gradient_by_odeint_snopt_is_the_same() -> None:
    field, x = Timed(), torch.randn(4, 3)
    node = model_of(field, **TIGHT)
    horizon = learn_horizon(node, 0.7)
    scalar(node(x)).backward()
    other = Horizon(0.7)
    scalar(odeint_snopt(field, x, other.t_span(), rtol=1e-10, atol=1e-11)).backward()
    assert other.t1.grad.item() == pytest.approx(horizon.t1.grad.item(), rel=1e-9)


def test_a_torch_optimizer_descends_by_the_gradient_and_the_penalty() -> None:
    horizon = Horizon(0.5, penalty=0.4)
    (horizon.t_span()[1] * 3.0 + horizon.penalty()).backward()
    assert horizon.t1.grad.item() == pytest.approx(3.0 + 0.4 * 0.5)
    torch.optim.SGD(horizon.parameters(), lr=0.1).step()
    assert horizon.t1.item() == pytest.approx(0.5 - 0.1 * 3.2)


# --- evaluation times -----------------------------------------------------------------------------


def test_the_last_time_is_t1_without_rounding() -> None:
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 9.8 + 0.1
    fractions = [i / 7 for i in range(7)] + [1.0]
    for value in values.tolist():
        horizon = Horizon(value, t0=-0.3)
        t = horizon.t_span(fractions)
        assert t[-1].item() == horizon.t1.item()
        assert t[0].item() == horizon.t1.new_tensor(-0.3).item()
        assert bool((t[1:] > t[:-1]).all())


@pytest.mark.parametrize("solver", ["dopri5", "rk4", "euler", "tsit5"])
def test_a_learned_t1_never_misses_its_last_evaluation(solver: str) -> None:
    node = NeuralODE(Autonomous(), solver=solver, sensitivity="snopt", return_t_eval=False)
    horizon = learn_horizon(node)
    x = torch.randn(2, 3)
    generator = torch.Generator().manual_seed(1)
    for value in (torch.rand(20, generator=generator) * 3 + 0.011).tolist():
        with torch.no_grad():
            horizon.t1.fill_(value)
        states = node(x)
        assert states.shape == (2, 2, 3)
        assert not torch.equal(states[0], states[1])
        assert solve_stats(node).t1 == horizon.t1.item()


def test_fractions_are_refused_unless_they_increase_from_0_to_1() -> None:
    for fractions in [(0.0,), (0.1, 1.0), (0.0, 0.9), (0.0, 0.5, 0.5, 1.0)]:
        with pytest.raises(InvalidInputError, match="fractions of the horizon"):
            Horizon().t_span(fractions)


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("push", "bound"), [(1e3, 0.2), (-1e3, 1.7)])
def test_bounds_hold_exactly_and_are_logged_once(
    push: float, bound: float, caplog: pytest.LogCaptureFixture
) -> None:
    horizon = Horizon(1.0, bounds=(0.2, 1.7))
    optimizer = torch.optim.Adam(horizon.parameters(), lr=0.5)
    with caplog.at_level(logging.WARNING, logger="torchdyn_snopt"):
        for _ in range(10):
            optimizer.zero_grad()
            (push * horizon.t_span()[1]).backward()
            optimizer.step()
            saved = horizon.state_dict()["t1"]
            assert horizon.t1.new_tensor(0.2) <= saved <= horizon.t1.new_tensor(1.7)
    assert horizon.t_span()[1] == horizon.t1.new_tensor(bound)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{bound:g}" in caplog.text
    # The gradient at the bound is that of the loss, and leads away from it again.
    for _ in range(30):
        optimizer.zero_grad()
        (-push * horizon.t_span()[1]).backward()
        optimizer.step()
    assert horizon.t_span()[1] != horizon.t1.new_tensor(bound)


def test_values_that_span_no_interval_are_refused() -> None:
    for arguments in [{"t1": 20.0}, {"t1": 0.5, "t0": 0.6}, {"bounds": (2.0, 1.0)}]:
        with pytest.raises(InvalidInputError, match="horizon"):
            Horizon(**arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="penalty"):
        Horizon(penalty=-1.0)


def test_a_horizon_that_is_no_number_is_refused() -> None:
    horizon = Horizon()
    with torch.no_grad():
        horizon.t1.fill_(float("nan"))
    with pytest.raises(InvalidInputError, match="not a number"):
        horizon.t_span()


# --- as a part of a model -------------------------------------------------------------------------


def test_calls_without_times_use_it_and_calls_with_times_do_not() -> None:
    node = NeuralODE(Autonomous(), sensitivity="snopt")
    x = torch.randn(2, 3)
    learn_horizon(node, 0.6, fractions=(0.0, 0.5, 1.0))
    torch.testing.assert_close(node(x)[0].detach(), torch.tensor([0.0, 0.3, 0.6]))
    torch.testing.assert_close(node(x, None)[0].detach(), torch.tensor([0.0, 0.3, 0.6]))
    torch.testing.assert_close(node(x, torch.tensor([0.0, 0.2]))[0], torch.tensor([0.0, 0.2]))
    learn_horizon(node, 0.9)
    torch.testing.assert_close(node(x)[0].detach(), torch.tensor([0.0, 0.9]))
    assert [name for name, _ in node.named_parameters() if "horizon" in name] == ["horizon.t1"]


def test_it_is_saved_copied_moved_and_shown() -> None:
    node = model_of(Autonomous())
    horizon = learn_horizon(node, 0.6, penalty=0.25, bounds=(0.1, 5.0))
    assert node.state_dict()["horizon.t1"].item() == pytest.approx(0.6)
    assert "t1=0.6, t0=0, penalty=0.25, bounds=(0.1, 5)" in repr(nn.Sequential(node))
    twin = copy.deepcopy(node)
    with torch.no_grad():
        twin.horizon.t1.fill_(2.0)
    assert (horizon.t1.item(), twin(torch.randn(2, 3)).shape) == (pytest.approx(0.6), (2, 2, 3))
    assert (solve_stats(twin).t1, twin.horizon.spec) == (2.0, horizon.spec)
    twin.load_state_dict(node.state_dict())
    assert twin.horizon.t1.item() == horizon.t1.item()
    assert node.double().horizon.t1.dtype == torch.float64
    file = io.BytesIO()
    torch.save(horizon, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).t1.item() == horizon.t1.item()


def test_a_narrow_model_keeps_a_wide_horizon() -> None:
    horizon = Horizon(0.123456)
    assert nn.Sequential(horizon).bfloat16()[0].t1.dtype == torch.float32
    assert horizon.t1.item() == pytest.approx(0.123456, rel=1e-6)


def test_models_share_a_horizon_or_have_their_own() -> None:
    class Last(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            return states[-1]

    first, second = model_of(Autonomous()), model_of(Autonomous())
    model = nn.Sequential(first, Last(), second, Last())
    x = torch.randn(2, 3)
    one, other = learn_horizon(first, 0.5), learn_horizon(second, 0.25)
    model(x).sum().backward()
    assert (solve_stats(first).t1, solve_stats(second).t1) == (0.5, 0.25)
    separate = one.t1.grad, other.t1.grad
    assert all(gradient.item() != 0.0 for gradient in separate)

    with torch.no_grad():
        one.t1.fill_(0.25)
    one.t1.grad = other.t1.grad = None
    model(x).sum().backward()
    parts = one.t1.grad.item() + other.t1.grad.item()
    shared = learn_horizon(second, one)
    assert shared is one
    one.t1.grad = None
    model(x).sum().backward()
    assert one.t1.grad.item() == pytest.approx(parts, rel=1e-5)


def test_a_model_without_times_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="takes no t_span"):
        learn_horizon(nn.Sequential(model_of(Autonomous())))
