"""Factors of fields in a solve: against a fine quadrature, by every option, and their clean-up."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

from tests.adjoint.fields import Convolution, TimeDependent
from tests.curvature.dense import input_patches, moments, output_gradients
from tests.reference import reference_solve, relative_error
from torchdyn_snopt import (
    CurvatureError,
    InvalidInputError,
    SNOptSensitivity,
    SolverError,
    odeint_snopt,
    record_curvature,
    solve_stats,
)
from torchdyn_snopt.curvature import registry
from torchdyn_snopt.curvature.factors import CurvatureSpec, Factors
from torchdyn_snopt.curvature.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")

NODES = 12  # of the Gauss–Legendre rule that the factors are compared with


class Shared(nn.Module):
    """One layer used twice in an evaluation, one applied at several positions, one gate on t."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(3, 3)
        self.positions = nn.Linear(2, 2, bias=False)
        self.gate = nn.Linear(1, 3)

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        h = self.twice(torch.tanh(self.twice(x[:, :3])))
        p = self.positions(torch.tanh(x[:, 3:]).unflatten(1, (2, 2))).flatten(1)
        return torch.cat([torch.tanh(h) * torch.sigmoid(self.gate(t.view(1))), torch.tanh(p)], 1)


class Inplace(nn.Module):
    """An activation that overwrites the output of the layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        return self.second(torch.tanh_(self.first(x)))


CASES = {
    "time": (TimeDependent, (4, 3)),
    "convolution": (Convolution, (2, 2, 3, 3)),
    "shared": (Shared, (4, 7)),
    "inplace": (Inplace, (4, 3)),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = CASES[name]
    return build(), torch.randn(*shape)


def node_of(field: nn.Module, **options: object) -> NeuralODE:
    settings = {"solver": "dopri5", "sensitivity": "snopt", "return_t_eval": False}
    tolerances = dict.fromkeys(("rtol", "atol", "rtol_adjoint", "atol_adjoint"), 1e-3)
    return NeuralODE(field, **settings | tolerances | options)


def sample_losses(x: Tensor) -> Tensor:
    return x.flatten(1).sin().sum(1) + 0.3 * x.flatten(1).square().sum(1)


def mean_loss(states: Tensor) -> Tensor:
    return sample_losses(states[-1]).mean()


def recorded(node: nn.Module, x: Tensor, t: Tensor, **options: object) -> dict[str, Factors]:
    """Factors by the names of the field's own layers."""
    with record_curvature(node, **options) as curvature:
        mean_loss(node(x, t)).backward()
    return {name.split("vf.vf.")[-1]: factors for name, factors in curvature.factors.items()}


# --- the reference --------------------------------------------------------------------------------


def at_nodes(
    field: nn.Module, x: Tensor, t: Tensor, nodes: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """x(tⱼ), and the gradient of each sample's own loss there, by autograd through the solve."""
    times = torch.cat([t[:1], torch.tensor(list(nodes)), t[-1:]])
    states = [x.clone().requires_grad_()]
    for start, stop in itertools.pairwise(times):
        states.append(reference_solve(field, states[-1], torch.stack([start, stop]))[0][-1])
    gradients = torch.autograd.grad(sample_losses(states[-1]).sum(), states[1:-1])
    return list(zip((s.detach() for s in states[1:-1]), gradients, strict=True))


def evaluated(
    field: nn.Module, t: float, x: Tensor, a: Tensor
) -> dict[nn.Module, list[tuple[Tensor, Tensor]]]:
    """Input and output gradient of every layer's every use, in one evaluation of the field."""
    uses: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    outputs: list[tuple[nn.Module, Tensor, Tensor]] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.append((module, inputs[0].detach().clone(), output))
        return output.clone()  # an activation in place then spares the output itself

    layers = [m for m in field.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    f = field(torch.tensor(t), x)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(f, [output for _, _, output in outputs], a)
    for (module, z, _), g in zip(outputs, gradients, strict=True):
        uses.setdefault(module, []).append((z, g))
    return uses


def fine_quadrature(
    field: nn.Module, x: Tensor, t: Tensor, sharing: str = "expand"
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by Gauss–Legendre quadrature over [t0, t1]."""
    low, high = sorted((float(t[0]), float(t[-1])))
    points, weights = np.polynomial.legendre.leggauss(NODES)
    nodes = low + (high - low) * (points + 1) / 2
    weights = weights * (high - low) / 2
    if t[-1] < t[0]:
        nodes, weights = nodes[::-1], weights[::-1]
    return riemann(field, x, t, nodes.tolist(), weights.tolist(), sharing)


def riemann(
    field: nn.Module,
    x: Tensor,
    t: Tensor,
    nodes: Sequence[float],
    weights: Sequence[float],
    sharing: str,
) -> dict[str, tuple[Tensor, Tensor]]:
    names = {module: name for name, module in field.named_modules()}
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for node, weight, (state, a) in zip(nodes, weights, at_nodes(field, x, t, nodes), strict=True):
        for module, uses in evaluated(field, node, state, a).items():
            if uses[0][0].dim() == 1:  # fed without batch dimension: one sample
                uses = [(z[None], g[None]) for z, g in uses]
            one = moments(
                [input_patches(module, z) for z, _ in uses],
                [output_gradients(module, g) for _, g in uses],
                sharing,
                bias=module.bias is not None,
            )
            known = sums.get(names[module], (0.0, 0.0))
            sums[names[module]] = (known[0] + weight * one[0][0], known[1] + weight * one[1][0])
    return sums


def check(
    factors: dict[str, Factors], reference: dict[str, tuple[Tensor, Tensor]], tolerance: float
) -> None:
    assert factors.keys() == reference.keys()
    for name, (a, b) in reference.items():
        assert relative_error(factors[name].A, a) < tolerance, f"A of {name}"
        assert relative_error(factors[name].B, b) < tolerance, f"B of {name}"


# --- the promise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_stage_quadrature_is_within_1e_4_of_a_fine_one(name: str, sharing: str) -> None:
    field, x = make(name)
    t = torch.tensor([0.0, 1.0])
    reference = fine_quadrature(field, x, t, sharing)
    check(recorded(node_of(field), x, t, weight_sharing=sharing), reference, 1e-4)


@pytest.mark.parametrize("times", [[0.9, -0.2], [0.0, 0.3, 0.35, 1.0]])
def test_stage_quadrature_down_in_time_and_over_segments(times: list[float]) -> None:
    field, x = make("time")
    t = torch.tensor(times)
    factors = recorded(node_of(field), x, t)
    check(factors, fine_quadrature(field, x, t), 1e-4)
    assert factors["inner"].scale == pytest.approx(1 / abs(times[-1] - times[0]))


@pytest.mark.parametrize("solver", ["tsit5", "bosh3", "dopri8"])
def test_other_solvers(solver: str) -> None:
    field, x = make("time")
    t = torch.tensor([0.0, 1.0])
    check(recorded(node_of(field, solver=solver), x, t), fine_quadrature(field, x, t), 5e-3)


def test_fixed_steps() -> None:
    field, x = make("time")
    t = torch.linspace(0.0, 1.0, 21)
    check(recorded(node_of(field, solver="rk4"), x, t), fine_quadrature(field, x, t), 1e-5)


def test_checkpoint_collects_the_same_integrals() -> None:
    """The gradients of the discrete stages, divided by dt·bᵢ, are a(t) at the stages."""
    field, x = make("time")
    t = torch.tensor([0.0, 1.0])
    node = node_of(field, sensitivity=SNOptSensitivity(adjoint="checkpoint"), rtol=1e-6, atol=1e-6)
    check(recorded(node, x, t), fine_quadrature(field, x, t), 1e-3)


def test_odeint_snopt_records_too() -> None:
    field, x = make("time")
    t = torch.tensor([0.0, 1.0])
    with record_curvature(field) as curvature:
        mean_loss(odeint_snopt(field, x, t, rtol=1e-4, atol=1e-4)).backward()
    check(curvature.factors, fine_quadrature(field, x, t), 1e-4)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.4, 0.0]])
def test_the_grid_is_the_papers_riemann_sum(times: list[float], sharing: str) -> None:
    """Each segment is cut into even pieces, and sampled where the backward solve leaves them."""
    field, x = make("time")
    t = torch.tensor(times)
    node = node_of(
        field,
        sensitivity=SNOptSensitivity(quadrature="grid", grid_step=0.1),
        **dict.fromkeys(("rtol", "atol", "rtol_adjoint", "atol_adjoint"), 1e-8),
    )
    factors = recorded(node, x, t, weight_sharing=sharing)
    direction = 1.0 if times[-1] > times[0] else -1.0
    nodes = [times[0] + direction * 0.1 * j for j in range(10)]
    # The reference wants nodes apart from the ends; t0 itself stands a hair inside.
    nodes[0] += direction * 1e-9
    check(factors, riemann(field, x, t, nodes, [0.1] * 10, sharing), 1e-6)


def test_the_grid_costs_its_evaluations_and_the_stages_none() -> None:
    field, x = make("time")
    counts = {}
    for quadrature in ("stages", "grid"):
        sensitivity = SNOptSensitivity(quadrature=quadrature, grid_step=0.05)
        node = node_of(field, sensitivity=sensitivity)
        mean_loss(node(x, torch.tensor([0.0, 1.0]))).backward()
        plain = solve_stats(node).nfe_backward
        recorded(node, x, torch.tensor([0.0, 1.0]))
        counts[quadrature] = solve_stats(node).nfe_backward - plain
    assert counts == {"stages": 0, "grid": 20}


def test_recording_leaves_the_gradients_alone() -> None:
    for sensitivity in (
        SNOptSensitivity(),
        SNOptSensitivity(quadrature="grid", grid_step=0.1),
        SNOptSensitivity(adjoint="checkpoint"),
        SNOptSensitivity(error_norm="full"),
    ):
        field, x = make("shared")
        node = node_of(field, sensitivity=sensitivity)
        mean_loss(node(x)).backward()
        plain = [p.grad.clone() for p in field.parameters()]
        field.zero_grad()
        recorded(node, x, torch.tensor([0.0, 1.0]))
        for parameter, gradient in zip(field.parameters(), plain, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", ["time", "convolution", "inplace"])
def test_micro_batches_equal_the_whole_batch(name: str) -> None:
    field, x = make(name)
    t = torch.linspace(0.0, 1.0, 6)
    node = node_of(field, solver="rk4")  # samples share their steps only if these are fixed
    whole = recorded(node, x, t)
    half = len(x) // 2
    with record_curvature(field) as curvature:
        for part in (x[:half], x[half:]):
            (mean_loss(node(part, t)) / 2).backward()
    for layer, factors in curvature.factors.items():
        torch.testing.assert_close(factors.A, whole[layer].A)
        torch.testing.assert_close(factors.B, whole[layer].B)
        assert factors.scale == whole[layer].scale


def test_a_sum_over_the_batch() -> None:
    field, x = make("time")
    t, node = torch.tensor([0.0, 1.0]), node_of(field, solver="rk4")
    mean = recorded(node, x, t)
    with record_curvature(field, reduction="sum") as curvature:
        sample_losses(node(x, t)[-1]).sum().backward()
    torch.testing.assert_close(curvature.factors["inner"].B, mean["inner"].B)


def test_a_running_cost_enters_the_adjoint_that_is_collected() -> None:
    """∫ ℓ dt in the loss changes a(t), and so B but not A."""
    field, x = make("time")
    t = torch.tensor([0.0, 1.0])
    plain = recorded(node_of(field), x, t)
    costly = recorded(node_of(field, integral_loss=lambda t, x: x.square()), x, t)
    assert relative_error(costly["inner"].A, plain["inner"].A) < 1e-3
    assert relative_error(costly["inner"].B, plain["inner"].B) > 0.1


# --- outside of the ODE ---------------------------------------------------------------------------


def test_layers_around_the_ode_are_recorded() -> None:
    encoder, head = nn.Linear(2, 3), nn.Linear(3, 2)
    field, _ = make("time")
    node = node_of(field)
    model = nn.Sequential(encoder, node)
    x = torch.randn(5, 2)
    whole = nn.ModuleList([model, head])
    with record_curvature(whole) as curvature:
        h = encoder(x)
        states = node(h, torch.tensor([0.0, 1.0]))
        out = head(states[-1])
        h.retain_grad()
        out.retain_grad()
        sample_losses(out).mean().backward()
        early = curvature.factors
    factors = curvature.factors
    assert early.keys() == factors.keys()
    assert set(factors) == {"0.0", "0.1.vf.vf.inner", "0.1.vf.vf.outer", "1"}
    for name, z, g, bias in (("0.0", x, h.grad, True), ("1", states[-1], out.grad, True)):
        a, b = moments([z.detach()[None, :, None]], [5 * g[None, :, None]], "expand", bias=bias)
        torch.testing.assert_close(factors[name].A, a[0])
        torch.testing.assert_close(factors[name].B, b[0])
        assert factors[name].scale == 1.0
    # The same layer may serve inside and outside; here none inside was taken twice.
    with record_curvature(field) as inside:
        sample_losses(head(node(encoder(x), torch.tensor([0.0, 1.0]))[-1])).mean().backward()
    torch.testing.assert_close(inside.factors["inner"].B, factors["0.1.vf.vf.inner"].B)


# --- clean-up -------------------------------------------------------------------------------------


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_without_a_request_nothing_is_hooked_or_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchdyn_snopt.curvature import recording

    field, x = make("time")
    node = node_of(field)
    idle = Collector(CurvatureSpec(), list(field.parameters()))

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("curvature work without a request")

    monkeypatch.setattr(recording.LayerTape, "watching", forbidden)
    monkeypatch.setattr(recording.LayerTape, "_hook", forbidden)
    monkeypatch.setattr(recording.PassSums, "add", forbidden)
    mean_loss(node(x)).backward()
    assert idle not in registry.active_collectors()
    assert idle.collected() == []
    idle.active = True
    with pytest.raises(AssertionError, match="without a request"):
        mean_loss(node(x)).backward()


def test_hooks_live_only_while_the_solve_runs() -> None:
    field, x = make("time")
    node = node_of(field)
    loss = mean_loss(node(x))
    seen = []
    field.inner.register_forward_pre_hook(lambda *_: seen.append(len(field.inner._forward_hooks)))
    with record_curvature(node) as curvature:
        outside = len(field.inner._forward_hooks)
        loss.backward()
    assert set(seen) == {outside + 1}
    assert len(field.inner._forward_hooks) == 0
    assert set(curvature.factors) == {"vf.vf.inner", "vf.vf.outer"}


class Bursting(TimeDependent):
    """Raises at its n-th evaluation from now."""

    countdown = -1

    def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
        f = super().forward(t, x, args)
        self.countdown -= 1
        if self.countdown == 0:
            raise KeyError("burst")
        return f


@pytest.mark.parametrize("at", [1, 2, 5, 7, 8, 12])
@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
def test_an_exception_at_any_stage_leaves_nothing_behind(adjoint: str, at: int) -> None:
    field, x = Bursting(), torch.randn(4, 3)
    node = node_of(field, sensitivity=SNOptSensitivity(adjoint=adjoint))
    good = recorded(node, x, torch.tensor([0.0, 1.0]))
    with record_curvature(node) as curvature:
        field.countdown = at
        with pytest.raises(KeyError, match="burst"):  # in the forward solve
            node(x)
        loss = mean_loss(node(x))
        field.countdown = at
        with pytest.raises(KeyError, match="burst"):
            loss.backward()
        assert curvature.factors == {}
    assert hooks(node) == 0
    again = recorded(node, x, torch.tensor([0.0, 1.0]))
    for name, factors in good.items():
        torch.testing.assert_close(again[name].B, factors.B)
        torch.testing.assert_close(again[name].A, factors.A)


def test_a_failed_solve_delivers_nothing() -> None:
    field, x = make("time")
    tight = {"rtol_adjoint": 1e-10, "atol_adjoint": 1e-10}
    node = node_of(field, sensitivity=SNOptSensitivity(max_steps=5), **tight)
    with record_curvature(node) as curvature:
        loss = mean_loss(node(x))
        with pytest.raises(SolverError, match="max_steps=5"):
            loss.backward()
        assert curvature.factors == {}
    assert hooks(node) == 0


def test_the_registry_keeps_nothing_alive() -> None:
    field, x = make("time")
    node = node_of(field)
    collector = Collector(CurvatureSpec(), list(field.parameters()))
    collector.active = True
    mean_loss(node(x)).backward()
    assert len(collector.collected()) == 2
    collector.clear()
    watched = weakref.ref(field.inner.weight)
    del field, node
    gc.collect()
    assert watched() is None
    gone = weakref.ref(collector)
    del collector
    gc.collect()
    assert gone() is None


def test_a_recording_can_be_read_when_its_model_is_gone() -> None:
    field, x = make("time")
    with record_curvature(field) as curvature:
        mean_loss(node_of(field)(x)).backward()
    watched = weakref.ref(field.inner.weight)
    kept = curvature.factors
    del field, curvature
    gc.collect()
    assert watched() is None
    assert kept["inner"].A.shape == (5, 5)


def test_two_recordings_at_once() -> None:
    field, x = make("time")
    node = node_of(field)
    with record_curvature(field.inner) as inner, record_curvature(node) as both:
        mean_loss(node(x)).backward()
    assert set(inner.factors) == {""}
    torch.testing.assert_close(inner.factors[""].B, both.factors["vf.vf.inner"].B)


def test_frozen_layers_are_left_out() -> None:
    field, x = make("time")
    field.inner.weight.requires_grad_(False)
    field.outer.requires_grad_(True)
    assert set(recorded(node_of(field), x, torch.tensor([0.0, 1.0]))) == {"outer"}


def test_a_frozen_bias_does_not_belong_to_the_factors() -> None:
    field, x = make("time")
    field.inner.bias.requires_grad_(False)
    assert recorded(node_of(field), x, torch.tensor([0.0, 1.0]))["inner"].A.shape == (4, 4)


def test_wrong_requests_are_refused_by_name() -> None:
    with pytest.raises(CurvatureError, match="no layer to record"), record_curvature(nn.Tanh()):
        pass
    with (
        pytest.raises(InvalidInputError, match="'empirical', 'mc', 'ggn'"),
        record_curvature(nn.Linear(1, 1), curvature="hessian"),
    ):
        pass


def test_a_layer_called_with_a_keyword() -> None:
    class Keyword(TimeDependent):
        def forward(self, t: Tensor, x: Tensor, args: object = None) -> Tensor:
            return self.outer(input=torch.tanh(self.inner(input=torch.cat([x, x[:, :1]], -1))))

    field, x = Keyword(), torch.randn(4, 3)
    assert set(recorded(node_of(field), x, torch.tensor([0.0, 1.0]))) == {"inner", "outer"}


def test_tied_layers_count_as_further_uses_of_one() -> None:
    """Two modules with one weight are one layer used twice."""

    class Tied(Inplace):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

    class Twice(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.second = self.first

    tied, twice = Tied(), Twice()
    twice.load_state_dict(tied.state_dict())
    x, t = torch.randn(4, 3), torch.tensor([0.0, 1.0])
    one, other = recorded(node_of(tied), x, t), recorded(node_of(twice), x, t)
    torch.testing.assert_close(one["first"].A, other["first"].A)
    torch.testing.assert_close(one["first"].B, other["first"].B)
    assert one["second"].A is not None
