"""SNOpt(preconditioner='low_rank'): the step against a dense solve, damping, columns, resuming."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_snopt import CrossEntropyLoss, MSELoss, SNOpt, SNOptSensitivity
from torchdyn_snopt.curvature.seeds import trial
from torchdyn_snopt.errors import CurvatureError, InvalidInputError, SolverError
from torchdyn_snopt.optim.low_rank import (
    BAD,
    DAMPING_RANGE,
    GOOD,
    GROW,
    REJECTED,
    SHRINK,
    TRIALS,
    Damped,
    next_damping,
)

pytestmark = pytest.mark.usefixtures("float64")

N = 5


class Field(nn.Module):
    """A layer, a gate on time, a free tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.gate = nn.Linear(1, 3)
        self.free = nn.Parameter(torch.randn(3))

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        gate = torch.sigmoid(self.gate(t.view(1)))
        return gate * self.second(torch.tanh(self.first(x))) + self.free * torch.sin(x)


class Model(nn.Module):
    """Encoder, ODE, head, and optionally a norm that has no columns."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(2, 3), nn.Linear(3, 2)
        self.norm = nn.LayerNorm(3) if norm else nn.Identity()
        # One step, differentiated as it is: the reference then needs no tight tolerance.
        self.node = NeuralODE(
            Field(),
            solver="rk4",
            sensitivity=SNOptSensitivity(adjoint="checkpoint"),
            return_t_eval=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        times = torch.linspace(0.0, 1.0, 2)
        return self.head(self.norm(self.node(torch.tanh(self.encoder(x)), times)[-1]))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def gauss_newton(model: nn.Module, x: Tensor) -> Tensor:
    """Jᵀ H J of the mean squared error over N·2 outputs."""
    rows = []
    for output in model(x).reshape(-1):
        grads = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    jacobian = torch.stack(rows)
    return 2.0 / len(jacobian) * jacobian.mT @ jacobian


def data(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, 2, generator=generator)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 0].sin()], 1)


def backward(model: nn.Module, optimizer: SNOpt, step: int = 0) -> float:
    x, y = data(step)
    optimizer.zero_grad()
    loss = MSELoss()(model(x), y)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("damping", [1e-1, 1e-6])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_step_of_a_whole_network_is_the_dense_solve(damping, decay):
    model = Model()
    optimizer = SNOpt(model, lr=0.5, preconditioner="low_rank", damping=damping, weight_decay=decay)
    backward(model, optimizer)
    x, _ = data()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()]) + decay * flat(model)
    eye = torch.eye(len(gradient))
    expected = torch.linalg.solve(gauss_newton(model, x) + (damping + decay) * eye, gradient)
    before = flat(model)
    optimizer.step()
    step = (before - flat(model)) / 0.5
    assert (step - expected).norm() < 1e-6 * expected.norm()
    assert {how for _, how in optimizer.summary()} == {"low_rank"}


@pytest.mark.parametrize(("rows", "columns"), [(30, 80), (80, 30)], ids=["woodbury", "dense"])
@pytest.mark.parametrize(("decades", "damping"), [(4, 1e-4), (8, 1e-3), (8, 1e-7)])
def test_an_ill_conditioned_system_equals_the_dense_solve(rows, columns, decades, damping):
    """Conditions of 1e8 (squared and refined), 1e11 and 1e15 (singular values)."""
    size = min(rows, columns)
    u, v = torch.linalg.qr(torch.randn(rows, size)).Q, torch.linalg.qr(torch.randn(columns, size)).Q
    values = torch.logspace(decades / 2, -decades / 2, size)
    p = u * values @ v.mT
    g = torch.randn(columns)
    actual = Damped(list(p.split([7, columns - 7], 1))).solve(g, damping)
    # In the eigenbasis the dense solve is known to all digits, which no solver would give here.
    inner = v.mT @ g
    rest = g - v @ inner
    expected = v @ (inner / (damping + values**2)) + (rest - v @ (v.mT @ rest)) / damping
    assert (actual - expected).norm() < 1e-6 * expected.norm()
    if decades == 4:
        dense = torch.linalg.solve(damping * torch.eye(columns) + p.mT @ p, g)
        assert (actual - dense).norm() < 1e-6 * dense.norm()


def test_without_float64_nothing_is_squared():
    p = torch.randn(20, 50).float()
    system = Damped([p])
    system.dtype = torch.float32  # as on a device without float64
    g = torch.randn(50).float()
    expected = torch.linalg.solve(p.double().mT @ p.double() + 1e-3 * torch.eye(50), g.double())
    actual = system.solve(g, 1e-3)
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() < 1e-4 * expected.norm()


def test_parameters_without_columns_take_the_fallback_at_its_scale():
    model = Model(norm=True)
    optimizer = SNOpt(model, lr=0.5, preconditioner="low_rank", fallback="sgd", fallback_scale=0.01)
    backward(model, optimizer)
    before, gradient = model.norm.bias.detach().clone(), model.norm.bias.grad.clone()
    optimizer.step()
    assert torch.allclose(model.norm.bias, before - 0.005 * gradient, rtol=1e-12)
    treated = dict(optimizer.summary())
    assert treated["norm.weight"] == "sgd (fallback)"
    assert treated["node.vf.vf.free"] == treated["encoder.bias"] == "low_rank"


def test_the_damping_follows_the_reduction_ratio():
    assert next_damping(1.0, GOOD + 0.1) == SHRINK
    assert next_damping(1.0, BAD - 0.1) == GROW
    assert next_damping(1.0, 0.5) == 1.0
    assert next_damping(1.0, -0.1) == next_damping(1.0, math.nan) == REJECTED
    assert next_damping(DAMPING_RANGE[1], -1.0) == DAMPING_RANGE[1]


def test_on_a_linear_least_squares_problem_the_ratio_is_one_and_a_step_nearly_solves_it():
    model = nn.Linear(2, 2)
    optimizer = SNOpt(model, preconditioner="low_rank", damping=1e-7)
    x, y = data()
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = MSELoss()(model(x), y)
        loss.backward()
        calls.append(loss.item())
        return loss

    optimizer.step(closure)
    gradient = model.weight.grad.clone()
    assert optimizer.report["reduction_ratio"] == pytest.approx(1.0, rel=1e-9)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(SHRINK * 1e-7)
    assert len(calls) == 2
    inputs = torch.cat([x, torch.ones(N, 1)], 1)
    best = (inputs @ torch.linalg.lstsq(inputs, y).solution - y).square().mean()
    assert calls[1] == pytest.approx(float(best), rel=1e-5)
    # The gradients left behind are those of the step, not of the trial.
    assert gradient.norm() > 1e-2


def test_a_step_that_does_not_reduce_the_loss_is_tried_again_and_then_taken_back():
    model = nn.Linear(2, 2)
    optimizer = SNOpt(model, preconditioner="low_rank", damping=1e-6)
    before, (x, y), calls = flat(model), data(), []

    def closure(worse: int) -> Tensor:
        optimizer.zero_grad()
        loss = MSELoss()(model(x), y) + (10.0 if 1 <= len(calls) <= worse else 0.0)
        loss.backward()
        calls.append(loss.item())
        return loss

    optimizer.step(lambda: closure(2))
    assert optimizer.report["trials"] == 3
    assert not torch.equal(flat(model), before)
    grown = 1e-6 * REJECTED**2
    assert optimizer.param_groups[0]["damping"] in (grown * SHRINK, grown, grown * GROW)
    before, calls = flat(model), []
    optimizer.step(lambda: closure(TRIALS))
    assert torch.equal(flat(model), before)
    assert len(calls) == 1 + TRIALS


def test_a_trial_whose_solve_fails_counts_as_a_rejected_one():
    model = Model()
    optimizer = SNOpt(model, preconditioner="low_rank")
    x, y = data()
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise SolverError("x", phase="forward", t=0.0, dt=0.1, steps=1, norms={})
        optimizer.zero_grad()
        loss = MSELoss()(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.report["trials"] == 2
    assert model.head.weight.grad is not None


def test_the_closure_trains_to_far_below_what_the_schedule_starts_from():
    model = Model()
    optimizer = SNOpt(model, preconditioner="low_rank")
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = MSELoss()(model(x), y)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(12)]
    assert losses[-1] < 1e-8 < 1e-2 < losses[0]
    assert losses == sorted(losses, reverse=True)


def test_without_a_closure_the_damping_follows_its_schedule():
    model = Model()
    optimizer = SNOpt(model, preconditioner="low_rank", damping=0.5, damping_decay=0.8)
    for step in range(3):
        backward(model, optimizer, step)
        optimizer.step()
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.5 * 0.8**3)
    assert optimizer.report["damping"] == pytest.approx(0.5 * 0.8**2)


@pytest.mark.parametrize("update_freq", [1, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_five_steps_equal_three_and_two_behind_a_reload(update_freq, momentum):
    settings = {"preconditioner": "low_rank", "update_freq": update_freq, "momentum": momentum}
    model = Model(norm=True)
    other = copy.deepcopy(model)

    def steps(model: nn.Module, optimizer: SNOpt, which: range) -> None:
        for step in which:
            backward(model, optimizer, step)
            optimizer.step()

    steps(model, SNOpt(model, **settings), range(5))
    optimizer = SNOpt(other, **settings)
    steps(other, optimizer, range(3))
    fresh = Model(norm=True)
    fresh.load_state_dict(other.state_dict())
    resumed = SNOpt(fresh, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(fresh, resumed, range(3, 5))
    assert torch.equal(flat(fresh), flat(model))


def test_groups_are_systems_of_their_own():
    model = Model()
    parts = [list(model.node.parameters()), list(model.head.parameters())]
    optimizer = SNOpt(
        [{"params": parts[0]}, {"params": parts[1], "preconditioner": "kfe_adam"}],
        preconditioner="low_rank",
        curvature="ggn",
        lr=1.0,
        damping=1e-3,
    )
    backward(model, optimizer)
    sizes = [sum(p.numel() for p in some) for some in (model.encoder.parameters(), parts[0])]
    x, _ = data()
    block = slice(*(sum(p.numel() for p in model.parameters()) - n for n in (sizes[1], 0)))
    names = [n for n, _ in model.named_parameters()]
    assert names[-1].startswith("node")  # so that the field's block is the last one
    gradient = torch.cat([p.grad.reshape(-1) for p in parts[0]])
    matrix = gauss_newton(model, x)[block, block] + 1e-3 * torch.eye(sizes[1])
    before = torch.cat([p.detach().reshape(-1) for p in parts[0]])
    optimizer.step()
    step = before - torch.cat([p.detach().reshape(-1) for p in parts[0]])
    expected = torch.linalg.solve(matrix, gradient)
    assert (step - expected).norm() < 1e-6 * expected.norm()


def test_refusals():
    model = Model()
    with pytest.raises(InvalidInputError, match="seeds of a loss"):
        SNOpt(model, preconditioner="low_rank", curvature="empirical")
    with pytest.raises(InvalidInputError, match="max_columns=0"):
        SNOpt(model, preconditioner="low_rank", max_columns=0)
    optimizer = SNOpt(model, preconditioner="low_rank", max_columns=9)
    with pytest.raises(CurvatureError, match=r"5 samples × 2 seeds = 10 columns"):
        backward(model, optimizer)
    optimizer = SNOpt(model, preconditioner="low_rank")
    x, y = data()
    nn.functional.mse_loss(model(x), y).backward()
    before = flat(model)
    with pytest.raises(CurvatureError, match="no columns have arrived"):
        optimizer.step()
    assert torch.equal(flat(model), before)


def test_columns_that_are_not_finite_are_named():
    p = torch.randn(4, 9)
    p[1, 2] = math.nan
    with pytest.raises(CurvatureError, match="not finite: p"):
        Damped([p]).solve(torch.randn(9), 1e-2)


def test_cross_entropy_in_float32_and_mc():
    model = Model().float()
    torch.set_default_dtype(torch.float32)
    optimizer = SNOpt(model, preconditioner="low_rank", curvature="mc", damping=0.1)
    criterion = CrossEntropyLoss(generator=torch.Generator().manual_seed(0))
    x = torch.randn(64, 2)
    labels = (x[:, 0] > 0).long()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), labels)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(15)]
    assert losses[-1] < 0.3 * losses[0]


def counted(model: nn.Module) -> list[bool]:
    """Calls of the field, and whether autograd was recording: a replay of the backward pass."""
    calls: list[bool] = []
    hook = lambda *_: calls.append(torch.is_grad_enabled())  # noqa: E731
    model.node.vf.vf.register_forward_hook(hook)
    return calls


def test_steps_on_one_batch_are_single_steps_without_their_second_forward_pass():
    """Three steps: 3 backward and 1 + 3 forward passes, where single ones take 3 and 6."""
    model, (x, y) = Model(), data()
    other = copy.deepcopy(model)
    several = SNOpt(model, preconditioner="low_rank", damping=1.0, inner_steps=3)
    singly = SNOpt(other, preconditioner="low_rank", damping=1.0)

    def closure(model: nn.Module, optimizer: SNOpt) -> Tensor:
        optimizer.zero_grad()
        loss = MSELoss()(model(x), y)
        loss.backward()
        # A term that is no loss of this package: its gradient does not wait.
        penalty = 1e-3 * sum(p.square().sum() for p in model.head.parameters())
        penalty.backward()
        return loss + penalty

    calls, others = counted(model), counted(other)
    first = several.step(lambda: closure(model, several))
    losses = [singly.step(lambda: closure(other, singly)) for _ in range(3)]
    assert first.item() == losses[0].item()
    assert several.report["inner_steps"] == 3.0
    assert torch.allclose(flat(model), flat(other), rtol=1e-12)
    assert several.param_groups[0]["damping"] == singly.param_groups[0]["damping"]
    # rk4: four evaluations forward and four in the replay; vmap calls the field for free columns.
    forward, backward = calls.count(False), calls.count(True)
    assert others.count(True) == backward
    assert (others.count(False) - forward) % 4 == 0
    assert others.count(False) - forward == 2 * 4


def test_steps_on_one_batch_end_where_none_reduces_the_loss():
    model, (x, y), calls = nn.Linear(2, 2), data(), []
    optimizer = SNOpt(model, preconditioner="low_rank", damping=1e-6, inner_steps=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = MSELoss()(model(x), y) + (10.0 if len(calls) >= 2 else 0.0)
        loss.backward()
        calls.append(1)
        return loss

    optimizer.step(closure)
    assert optimizer.report["inner_steps"] == 1.0
    assert len(calls) == 2 + TRIALS
    with pytest.raises(InvalidInputError, match="inner_steps=0"):
        SNOpt(model, preconditioner="low_rank", inner_steps=0)


def test_a_failed_backward_pass_ends_the_steps_on_a_batch():
    model, (x, y) = Model(), data()
    optimizer = SNOpt(model, preconditioner="low_rank", inner_steps=4)
    failing: list[bool] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = MSELoss()(model(x), y)
        loss.backward()
        failing.append(True)
        return loss

    absorbed = []
    optimizer._failed = lambda: len(absorbed) > 0 or bool(absorbed.append(1) and False)
    optimizer.step(closure)
    assert optimizer.report["inner_steps"] == 1.0
    assert len(failing) == 2
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_a_trial_runs_no_backward_pass_until_it_goes_on():
    model, (x, y) = Model(), data()
    optimizer = SNOpt(model, preconditioner="low_rank")
    backward(model, optimizer)
    expected = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad()
    calls = counted(model)
    with trial() as held:
        MSELoss()(model(x), y).backward()
    assert not any(calls)
    assert all(p.grad is None for p in model.parameters())
    held.go_on()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    held.go_on()  # once only
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
