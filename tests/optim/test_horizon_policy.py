"""The feedback policy: samples, each term of Eq. 16, stability, bounds, resuming."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from tests.optim.problems import Field
from torchdyn_snopt import Horizon, HorizonPolicy, SNOpt, SNOptSensitivity, learn_horizon
from torchdyn_snopt.adjoint.horizon_derivatives import horizon_derivatives
from torchdyn_snopt.curvature.horizon import HorizonWatch, Response
from torchdyn_snopt.errors import InvalidInputError, SolverError
from torchdyn_snopt.optim.horizon_policy import HorizonMover

TIGHT = {"rtol": 1e-9, "atol": 1e-10, "rtol_adjoint": 1e-9, "atol_adjoint": 1e-10}


def node_of(field: nn.Module, adjoint: str = "backsolve", **settings: Any) -> NeuralODE:
    sensitivity = SNOptSensitivity(adjoint=adjoint, **settings)
    return NeuralODE(field, sensitivity=sensitivity, solver="dopri5", return_t_eval=False, **TIGHT)


# --- what a backward pass leaves ------------------------------------------------------------------


def squares(states: Tensor) -> Tensor:
    return 0.5 * states[1:].square().sum((0, 2)).mean()


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
@pytest.mark.parametrize("fractions", [(0.0, 1.0), (0.0, 0.3, 0.8, 1.0)], ids=["two", "four"])
@pytest.mark.usefixtures("float64")
def test_slopes_are_those_of_each_sample(adjoint: str, fractions: tuple[float, ...]) -> None:
    node, x = node_of(Field(), adjoint), torch.randn(4, 3)
    horizon = learn_horizon(node, 0.6, fractions=fractions)
    watch = HorizonWatch([horizon.t1])
    watch.active = True
    squares(node(x)).backward()
    (sample,) = watch.samples(horizon.t1)
    horizon.t1.grad = None
    single = []
    for row in x:
        squares(node(row.unsqueeze(0))).backward()
        single.append(horizon.t1.grad.item())
        horizon.t1.grad = None
    torch.testing.assert_close(len(x) * sample.slopes, torch.tensor(single), rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_times_made_by_the_user_count_by_their_derivative() -> None:
    node, x = node_of(Field()), torch.randn(4, 3)
    horizon = Horizon(0.3)
    watch = HorizonWatch([horizon.t1])
    watch.active = True
    squares(node(x, torch.stack([horizon.t1 * 0, 2 * horizon.t1]))).backward()
    (sample,) = watch.samples(horizon.t1)
    assert sample.slopes.sum().item() == pytest.approx(horizon.t1.grad.item(), rel=1e-6)


def test_nothing_is_left_while_nobody_asks() -> None:
    node, x = node_of(Field()), torch.randn(4, 3)
    horizon = learn_horizon(node, 0.6)
    watch = HorizonWatch([horizon.t1])
    squares(node(x)).backward()
    assert watch.samples(horizon.t1) == []


# --- Eq. 16 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
@pytest.mark.usefixtures("float64")
def test_feedback_equals_the_exact_mixed_derivative_where_rank_one_is_exact(adjoint: str) -> None:
    """With residuals of 1, ½(v·x − y)² has v ⊗ v as its Hessian and as its gradient's square."""
    node, x, v = node_of(Field(), adjoint), torch.randn(4, 3), torch.randn(3)
    horizon = learn_horizon(node, 0.6)
    with torch.no_grad():
        target = node(x)[-1] @ v - 1.0

    def loss(x1: Tensor) -> Tensor:
        return 0.5 * (x1 @ v - target).square().mean()

    exact = horizon_derivatives(node.vf, x, [0.0, 0.6], loss, exact=True, rtol=1e-9, atol=1e-10)
    watch = HorizonWatch([horizon.t1])
    watch.active = True
    loss(node(x)[-1]).backward()
    (sample,) = watch.samples(horizon.t1)
    step = [1e-5 * torch.randn_like(p) for p in node.vf.parameters()]
    with torch.no_grad():
        for p, d in zip(node.vf.parameters(), step, strict=True):
            p.add_(d)
    response = sample.respond()
    feedback = response.slopes.sum() + 4 * sample.slopes.dot(response.losses)
    expected = exact.QTu.dot(torch.cat([d.reshape(-1) for d in step]))
    assert feedback.item() == pytest.approx(expected.item(), rel=1e-3)
    assert 4 * sample.slopes.square().sum().item() == pytest.approx(
        horizon_derivatives(node.vf, x, [0.0, 0.6], loss).QTT.item(), rel=1e-3
    )


@dataclass
class Stub:
    """A sample with given numbers."""

    slopes: Tensor
    response: Response | None = None
    task: int = 0

    def respond(self) -> Response | None:
        return self.response


def update(
    t1: float,
    gradient: float,
    samples: list[Stub],
    *,
    horizon: Horizon | None = None,
    maximize: bool = False,
    reduction: str = "mean",
    **policy: Any,
) -> tuple[float, dict[str, float], dict[str, Any]]:
    """One update by the policy."""
    horizon = horizon or Horizon(t1, bounds=(0.01, 10.0), penalty=0.5)
    full = {"trust": 0.9, "interval": 1, "warm_up": 0, "settle": float("inf")}
    settings = HorizonPolicy(**{**full, **policy})
    group = {
        "params": [horizon.t1],
        "horizon": settings.settings(),
        "step": 0,
        "maximize": maximize,
        "reduction": reduction,
    }
    horizon.t1.grad = torch.tensor(gradient)
    mover = HorizonMover()
    mover.watch(group)
    for sample in samples:
        mover._watches[0].absorb(horizon.t1, sample)
    state: dict[str, Any] = {}
    with torch.no_grad():
        report = mover.move([group], {horizon.t1: state}, {horizon.t1: "t1"})
    return horizon.t1.item(), report, state


def test_first_update_is_a_newton_step() -> None:
    slopes = torch.tensor([0.1, -0.3])
    response = Response(torch.tensor([0.02, 0.03]), torch.tensor([-0.4, 0.1]))
    t1, report, _ = update(2.0, 0.2, [Stub(slopes, response)])
    curvature = 2 * (0.01 + 0.09) + 0.5
    feedback = 2 * (0.1 * -0.4 + -0.3 * 0.1) + 0.05
    assert report["Q_T"] == pytest.approx(0.2)
    assert report["Q_TT"] == pytest.approx(curvature)
    assert report["t1_open_loop"] == pytest.approx(-0.2 / curvature)
    assert report["t1_feedback"] == pytest.approx(-feedback / curvature)
    assert t1 == pytest.approx(2.0 - (0.2 + feedback) / curvature)
    assert report["t1"] == t1
    alone, report, _ = update(2.0, 0.2, [Stub(slopes, response)], feedback=False, lr=0.5)
    assert alone == pytest.approx(2.0 - 0.5 * 0.2 / curvature)
    assert report["t1_feedback"] == 0.0


def test_solves_of_one_backward_pass_are_one_batch_and_passes_are_further_samples() -> None:
    one, other = torch.tensor([0.1, -0.3]), torch.tensor([0.5, 0.2])
    _, together, _ = update(2.0, 0.2, [Stub(one), Stub(other)], feedback=False)
    assert together["Q_TT"] == pytest.approx(2 * (0.6**2 + 0.1**2) + 0.5)
    _, apart, _ = update(2.0, 0.2, [Stub(one), Stub(other, task=1)], feedback=False)
    assert apart["Q_TT"] == pytest.approx(4 * (0.01 + 0.09 + 0.25 + 0.04) + 0.5)
    _, summed, _ = update(2.0, 0.2, [Stub(one)], feedback=False, reduction="sum")
    assert summed["Q_TT"] == pytest.approx(0.01 + 0.09 + 0.5)


def test_maximizing_climbs() -> None:
    slopes = torch.tensor([0.1, -0.3])
    down, _, _ = update(2.0, 0.2, [Stub(slopes)], feedback=False)
    up, report, _ = update(2.0, 0.2, [Stub(slopes)], feedback=False, maximize=True)
    assert up - 2.0 == pytest.approx(2.0 - down)
    assert report["Q_T"] == pytest.approx(0.2)


@pytest.mark.parametrize(("gradient", "end"), [(1e6, 1.6), (-1e6, 2.4)])
def test_trust_region_is_relative(gradient: float, end: float) -> None:
    t1, _, _ = update(2.0, gradient, [Stub(torch.tensor([0.1]))], feedback=False, trust=0.2)
    assert t1 == pytest.approx(end)


def test_the_curvature_in_log_t_is_averaged_and_steps_become_shorter() -> None:
    horizon, mover, group, state = Horizon(2.0), HorizonMover(), {}, {}
    policy = HorizonPolicy(interval=1, warm_up=0, decay=0.6, settle=2.0, feedback=False, trust=0.9)
    group |= {"params": [horizon.t1], "horizon": policy, "step": 0, "maximize": False}
    group["reduction"] = "mean"
    mover.watch(group)
    assert group["horizon"] == policy.settings()
    average, t1 = 0.0, 2.0
    for k, (slope, gradient) in enumerate([(0.3, 0.1), (-0.7, -0.2), (0.4, 0.05)], start=1):
        mover._watches[0].absorb(horizon.t1, Stub(torch.tensor([slope])))
        horizon.t1.grad = torch.tensor(gradient)
        with torch.no_grad():
            mover.move([group], {horizon.t1: state}, {})
        share = 0.4 / (1 - 0.6**k)
        average += share * (t1**2 * slope**2 - average)
        t1 -= t1**2 * gradient / average * math.exp(-((k / 2) ** 2))
        assert horizon.t1.item() == pytest.approx(t1, rel=1e-5)
    assert state == {"horizon_updates": 3, "horizon_curvature": pytest.approx(average, rel=1e-5)}


def test_steps_that_have_become_short_are_not_taken() -> None:
    policy = HorizonPolicy(interval=3, warm_up=4, settle=10.0)
    due = [step for step in range(200) if policy.due(step)]
    # exp(-(k/10)²) falls below 0.02 between k = 19 and k = 20.
    assert due == [4 + 3 * k for k in range(19)]
    assert policy.share(10) == pytest.approx(math.exp(-1))
    endless = HorizonPolicy(interval=3, warm_up=4, settle=math.inf)
    assert [step for step in range(10**6, 10**6 + 6) if endless.due(step)] == [10**6, 10**6 + 3]


def test_a_failed_response_leaves_the_open_loop() -> None:
    t1, report, _ = update(2.0, 0.2, [Stub(torch.tensor([0.1, -0.3]), None)])
    assert report["t1_feedback"] == 0.0
    assert t1 == pytest.approx(2.0 - 0.2 / 0.7)


def test_without_samples_the_batch_stands_in_for_them() -> None:
    _, report, _ = update(2.0, 0.4 + 0.5 * 2.0, [])
    assert report["Q_TT"] == pytest.approx(0.4**2 + 0.5)


def test_settings_out_of_range_are_refused() -> None:
    names = {"lr": -1.0, "interval": 0, "decay": 1.0, "trust": 0.0, "warm_up": -1, "settle": 0.0}
    for wrong in [{name: value} for name, value in names.items()]:
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            HorizonPolicy(**wrong)  # type: ignore[arg-type]


# --- in SNOpt -------------------------------------------------------------------------------------


class Growth(nn.Module):
    """dx/dt = x: x(T) = eᵀ x0, so that the best T is known."""

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return x


BEST = 0.4


def grow(t1: float, steps: int, noise: float, penalty: float = 0.0) -> list[float]:
    """Fit T to e^0.4 from noisy batches."""
    node = NeuralODE(Growth(), solver="dopri5", sensitivity="snopt", return_t_eval=False)
    horizon = learn_horizon(node, t1, penalty=penalty)
    optimizer = SNOpt([horizon.t1], lr=0.0, horizon=HorizonPolicy(interval=1, warm_up=0))
    generator = torch.Generator().manual_seed(0)
    path = []
    for _ in range(steps):
        x = 1.0 + 0.3 * torch.randn(16, 1, generator=generator)
        target = x * torch.tensor(BEST).exp()
        target = target + noise * torch.randn(16, 1, generator=generator)
        optimizer.zero_grad()
        loss = 0.5 * (node(x)[-1] - target).square().mean() + horizon.penalty()
        loss.backward()
        optimizer.step()
        path.append(horizon.t1.item())
    return path


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_both_starts_end_at_the_best_horizon_and_stay(noise: float) -> None:
    paths = [grow(t1, 160, noise) for t1 in (1.0, 0.05)]
    for path in paths:
        last = path[-40:]
        assert (max(last) - min(last)) / path[-1] <= 0.05
        assert path[-1] == pytest.approx(BEST, rel=0.1)
    assert paths[0][-1] == pytest.approx(paths[1][-1], rel=0.05)


class Small(nn.Module):
    """Encoder, ODE with a learned horizon, head."""

    def __init__(self, t1: float = 1.0, **settings: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(2, 3)
        self.node = NeuralODE(
            Field(), solver="dopri5", sensitivity="snopt", return_t_eval=False, atol_adjoint=1e-3
        )
        self.horizon = learn_horizon(self.node, t1, **settings)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.node(torch.tanh(self.encoder(x)))[-1])


def train(model: Small, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    path = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 2, generator=generator)
        labels = (x[:, 0] * x[:, 1] > 0).long()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels) + model.horizon.penalty()
        loss.backward()
        optimizer.step()
        path.append(model.horizon.t1.item())
    return path


def test_without_a_penalty_t1_comes_to_rest_between_the_bounds() -> None:
    for t1 in (1.0, 0.05):
        torch.manual_seed(1)
        model = Small(t1)
        last = train(model, SNOpt(model, preconditioner="kfe_adam"), range(150))[-40:]
        low, high = model.horizon.spec.bounds
        assert 5 * low < min(last) <= max(last) < 0.9 * high
        assert (max(last) - min(last)) / last[-1] <= 0.25


def test_bounds_hold_exactly_and_a_bound_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Small(1.0, penalty=50.0, bounds=(0.3, 2.0))
    low = model.horizon.t1.new_tensor(0.3).item()
    with caplog.at_level(logging.WARNING, logger="torchdyn_snopt"):
        path = train(model, SNOpt(model), range(60))
    assert min(path) == low == path[-1]
    assert len(caplog.records) == 1


def test_only_the_policy_moves_t1() -> None:
    model = Small()
    quiet = HorizonPolicy(lr=0.0)
    path = train(model, SNOpt(model, weight_decay=0.1, horizon=quiet), range(4))
    assert path == [1.0] * 4
    late = HorizonPolicy(warm_up=3, interval=2)
    optimizer = SNOpt(model, horizon=late)
    path = [1.0, *train(model, optimizer, range(8))]
    moved = [after != before for before, after in itertools.pairwise(path)]
    assert moved == [False, False, False, True, False, True, False, True]
    assert ("node.horizon.t1", "horizon policy") in optimizer.summary()


def test_the_report_names_every_part() -> None:
    model = Small()
    optimizer = SNOpt(model, horizon=HorizonPolicy(interval=1, warm_up=0))
    (path,) = train(model, optimizer, range(1))
    assert optimizer.report["t1"] == path
    assert {"Q_T", "Q_TT", "t1_open_loop", "t1_feedback"} <= optimizer.report.keys()


@pytest.mark.parametrize("at", [5, 6])
def test_ten_steps_are_five_and_five(at: int) -> None:
    def make(lr: float = 0.02) -> tuple[Small, SNOpt]:
        model = Small(penalty=0.1)
        policy = HorizonPolicy(interval=2, warm_up=0)
        return model, SNOpt(model, lr=lr, update_freq=3, horizon=policy)

    whole, reference = make()
    first, interrupted = make()
    first.load_state_dict(whole.state_dict())
    path = train(whole, reference, range(10))
    early = train(first, interrupted, range(at))
    file = io.BytesIO()
    torch.save([first.state_dict(), interrupted.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, resumed = make(lr=5.0)
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert early + train(second, resumed, range(at, 10)) == path
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    mine, theirs = reference.state[whole.horizon.t1], resumed.state[second.horizon.t1]
    assert mine == theirs
    assert mine["horizon_updates"] == 5


def test_a_copied_pair_goes_on_alike() -> None:
    model = Small()
    optimizer = SNOpt(model, horizon=HorizonPolicy(interval=1, warm_up=0))
    train(model, optimizer, range(3))
    twin, other = copy.deepcopy((model, optimizer))
    assert train(twin, other, range(3, 6)) == train(model, optimizer, range(3, 6))
    assert other.state[twin.horizon.t1]["horizon_updates"] == 6


class Fragile(nn.Module):
    """Refuses to be evaluated when its parameter has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0))

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return x * (self.rate if self.rate.item() == 1.0 else self.rate / 0.0)


@pytest.mark.parametrize("on_failure", ["raise", "skip"])
def test_a_failing_response_follows_the_policy_of_the_solve(on_failure: str) -> None:
    node = node_of(Fragile(), on_failure=on_failure)
    horizon = learn_horizon(node, 0.5)
    optimizer = SNOpt(node, lr=0.1, horizon=HorizonPolicy(interval=1, warm_up=0))
    node(torch.ones(2, 1))[-1].square().mean().backward()
    if on_failure == "raise":
        with pytest.raises(SolverError):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.report["t1_feedback"] == 0.0
        assert horizon.t1.item() != 0.5
