"""What holds for every field, shape, solver, tolerance and time, and for parameters of any kind."""

from __future__ import annotations

import copy
import io
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_snopt import SNOpt, SNOptSensitivity, odeint_snopt, record_curvature
from torchdyn_snopt.optim.eigenbasis import symmetric_eigen

pytestmark = pytest.mark.usefixtures("float64")

few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass(frozen=True)
class Case:
    """One random problem, small enough to draw many."""

    seed: int
    dim: int
    width: int
    batch: int
    tail: tuple[int, ...]
    solver: str
    adjoint: str
    times: tuple[float, ...]
    frozen: bool
    unused: bool
    shared: bool
    bias: bool

    def field(self) -> Random:
        torch.manual_seed(self.seed)
        return Random(self)

    def state(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, *self.tail, self.dim, generator=generator)


class Random(nn.Module):
    """An MLP in t and x, with parameters that are frozen, unused or shared as the case says."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.first = nn.Linear(case.dim, case.width, bias=case.bias)
        self.middle = nn.Linear(case.width, case.width)
        self.again = self.middle if case.shared else nn.Linear(case.width, case.width)
        self.last = nn.Linear(case.width, case.dim)
        self.gate = nn.Parameter(torch.randn(()))
        self.first.weight.requires_grad_(not case.frozen)
        if case.unused:
            self.idle = nn.Linear(2, 2)

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        h = torch.tanh(self.first(x) + self.gate * t)
        return self.last(torch.tanh(self.again(torch.tanh(self.middle(h)))))


times = st.sampled_from([(0.0, 0.7), (0.0, 0.2, 1.0), (1.0, 0.3), (-0.5, 0.1, 0.2)])
cases = st.builds(
    Case,
    seed=st.integers(0, 2**20),
    dim=st.integers(1, 3),
    width=st.integers(1, 4),
    batch=st.integers(1, 4),
    tail=st.sampled_from([(), (2,), (2, 3)]),
    solver=st.sampled_from(["euler", "midpoint", "rk4", "bosh3", "dopri5", "tsit5", "dopri8"]),
    adjoint=st.sampled_from(["backsolve", "checkpoint"]),
    times=times,
    frozen=st.booleans(),
    unused=st.booleans(),
    shared=st.booleans(),
    bias=st.booleans(),
)
ADAPTIVE = {"bosh3", "dopri5", "tsit5", "dopri8"}


def solve(case: Case, field: nn.Module, x: Tensor, t: Tensor, tolerance: float) -> Tensor:
    options = None if case.solver in ADAPTIVE else {"step_size": 0.01}
    return odeint_snopt(
        field, x, t, rtol=tolerance, atol=tolerance, method=case.solver, options=options,
        sensitivity=SNOptSensitivity(adjoint=case.adjoint),
    )  # fmt: skip


def by_rk4(field: nn.Module, x: Tensor, t: Tensor, steps: int = 40) -> Tensor:
    """The reference: autograd through many small steps."""
    states = [x]
    for start, stop in itertools.pairwise(t):
        h = (stop - start) / steps
        for i in range(steps):
            s = start + i * h
            k1 = field(s, x)
            k2 = field(s + h / 2, x + h / 2 * k1)
            k3 = field(s + h / 2, x + h / 2 * k2)
            k4 = field(s + h, x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        states.append(x)
    return torch.stack(states)


def gradients(field: nn.Module, states: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    weights = torch.linspace(0.5, 1.5, states.numel()).view_as(states)
    loss = (weights * states.square()).sum()
    parameters = [p for p in field.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, [*leaves, *parameters], allow_unused=True))


@few
@given(cases)
def test_gradients_are_those_of_autograd(case: Case) -> None:
    field = case.field()
    x, t = case.state().requires_grad_(), torch.tensor(case.times).requires_grad_()
    ours = gradients(field, solve(case, field, x, t, 1e-9), [x, t])
    reference = gradients(field, by_rk4(field, x, t), [x, t])
    # Euler's and the midpoint rule's steps of 0.01 are what they are.
    accuracy = {"euler": 0.1, "midpoint": 2e-3}.get(case.solver, 1e-5)
    for mine, theirs in zip(ours, reference, strict=True):
        assert (mine is None or not mine.any()) if theirs is None else mine is not None
        if theirs is not None and mine is not None:
            assert (mine - theirs).norm() <= accuracy * max(1.0, float(theirs.norm()))


@few
@given(cases, st.sampled_from(["expand", "reduce"]), st.sampled_from([1e-2, 1e-4, 1e-6]))
def test_factors_are_symmetric_and_semidefinite_once_clamped(
    case: Case, sharing: str, tolerance: float
) -> None:
    field, x, t = case.field(), case.state(), torch.tensor(case.times)
    with record_curvature(field, weight_sharing=sharing) as curvature:
        solve(case, field, x, t, tolerance)[-1].square().mean().backward()
    layers = {"middle", "last"} | ({"first"} if not case.frozen else set())
    layers |= set() if case.shared else {"again"}
    assert curvature.factors.keys() == layers
    for factors in curvature.factors.values():
        assert factors.scale == pytest.approx(1.0 / abs(case.times[-1] - case.times[0]))
        for matrix in (factors.A, factors.B):
            assert torch.allclose(matrix, matrix.mT, rtol=1e-12, atol=0.0)
            values, vectors = symmetric_eigen(matrix.clone())
            assert bool((values >= 0.0).all())
            clamped = (vectors * values) @ vectors.mT
            # What clamping takes away is what the signed quadrature weights have added.
            assert (clamped - matrix).norm() <= 0.1 * matrix.norm() + 1e-12


@few
@given(cases, st.floats(0.0, 0.95), st.floats(0.0, 0.1), st.booleans())
def test_without_curvature_kfac_is_sgd_to_the_bit(
    case: Case, momentum: float, weight_decay: float, maximize: bool
) -> None:
    """Parameters that no layer's rule covers, as those of a field called as plain functions."""
    ours, theirs = (case.field() for _ in range(2))
    options = {"lr": 0.01, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize}
    trainable = [[p for p in field.parameters() if p.requires_grad] for field in (ours, theirs)]
    optimizers = [
        SNOpt(trainable[0], preconditioner="kfac", **options),
        torch.optim.SGD(trainable[1], **options),
    ]
    t, x = torch.tensor(0.3), case.state()
    for _ in range(3):
        for field, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            field(t, x).square().sum().backward()
            optimizer.step()
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, reference)


def model_of(case: Case) -> nn.Module:
    torch.manual_seed(case.seed)
    sensitivity = SNOptSensitivity(adjoint=case.adjoint)
    node = NeuralODE(
        case.field(), solver="rk4", solver_adjoint="rk4", sensitivity=sensitivity,
        return_t_eval=False,
    )  # fmt: skip
    return nn.ModuleDict({"head": nn.Linear(case.dim, 2), "node": node})


def train(model: Any, optimizer: SNOpt, case: Case, steps: range) -> None:
    for step in steps:
        x = case.state() + 0.1 * step
        optimizer.zero_grad()
        out = model["head"](model["node"](x, torch.tensor(case.times))[-1])
        out.square().mean().backward()
        optimizer.step()


@few
@given(
    cases,
    st.sampled_from(["trust_region", "kfe_adam", "kfac", "ekfac"]),
    st.integers(1, 3),
    st.sampled_from(["adam", "sgd"]),
    st.sampled_from(["expand", "reduce"]),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([0.0, 1e-3]),
    st.sampled_from([None, False]),
)
def test_a_state_that_has_been_to_a_file_goes_on_to_the_bit(
    case: Case,
    preconditioner: str,
    update_freq: int,
    fallback: str,
    sharing: str,
    momentum: float,
    weight_decay: float,
    foreach: bool | None,
) -> None:
    """10 steps are 5, a file that is read with weights_only=True, and 5 more; all options."""
    options = {
        "preconditioner": preconditioner, "update_freq": update_freq, "fallback": fallback,
        "weight_sharing": sharing, "momentum": momentum, "weight_decay": weight_decay,
        "foreach": foreach, "lr": 0.01,
    }  # fmt: skip
    whole = model_of(case)
    reference = SNOpt(whole, **options)
    train(whole, reference, case, range(10))
    first = model_of(case)
    interrupted = SNOpt(first, **options)
    train(first, interrupted, case, range(5))
    file = io.BytesIO()
    torch.save([first.state_dict(), interrupted.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second = model_of(case)
    resumed = SNOpt(second)
    second.load_state_dict(weights)
    resumed.load_state_dict(state)
    before = copy.deepcopy(resumed.state_dict())
    again = SNOpt(model_of(case))
    again.load_state_dict(before)  # a round trip changes nothing
    assert equal(again.state_dict(), before)
    train(second, resumed, case, range(5, 10))
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
