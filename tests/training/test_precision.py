"""Autocast, GradScaler, compiled fields and channels-last: as the plain float32 run, or refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from tests.optim.problems import Classifier, batch, flat, loss_of, plain
from torchdyn_snopt import SNOpt, SNOptSensitivity, UnsupportedError, record_curvature
from torchdyn_snopt.horizon import learn_horizon

PRECONDITIONERS = ("trust_region", "kfe_adam", "kfac", "ekfac")


def error(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


class Wide(nn.Module):
    """Wide enough for bfloat16 to round differently everywhere."""

    def __init__(self, adjoint: str = "backsolve") -> None:
        super().__init__()
        torch.manual_seed(0)
        field = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        self.encoder = nn.Linear(2, 8)
        self.node = NeuralODE(
            field, solver="rk4", solver_adjoint="rk4", return_t_eval=False,
            sensitivity=SNOptSensitivity(adjoint=adjoint),
        )  # fmt: skip
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.node(self.encoder(x), torch.linspace(0.0, 1.0, 5))[-1])


def note(
    inputs: list[torch.dtype],
    products: list[torch.dtype],
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    inputs.append(args[0].dtype)
    products.append(output.dtype)


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
def test_gradients_and_factors_under_autocast(adjoint: str, inside: bool) -> None:
    """The backward solve evaluates the field in the same precision as the forward one."""
    x, y = batch(0, 32)
    found = []
    for cast in (False, True):
        model = Wide(adjoint)
        inputs: list[torch.dtype] = []
        products: list[torch.dtype] = []
        first = model.node.vf.vf.vf[0]
        first.register_forward_hook(partial(note, inputs, products))
        with record_curvature(model) as curvature:
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                out = model(x)
                loss = (out.float() - y).square().mean()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        assert set(inputs) == {torch.float32}  # the state
        assert set(products) == {torch.bfloat16 if cast else torch.float32}
        found.append((model, curvature.factors))
    (plain_model, factors), (cast_model, cast_factors) = found
    for p, q in zip(plain_model.parameters(), cast_model.parameters(), strict=True):
        assert q.grad.dtype == torch.float32
        assert error(q.grad, p.grad) < 3e-2
    assert factors.keys() == cast_factors.keys()
    for name, one in factors.items():
        other = cast_factors[name]
        for factor, cast_factor in ((one.A, other.A), (one.B, other.B)):
            assert cast_factor.dtype == torch.float32
            assert error(cast_factor, factor) < 5e-2


def test_autocast_is_left_as_it_was() -> None:
    model = Wide()
    with torch.autocast("cpu", torch.bfloat16):
        model(batch(0)[0]).float().sum()
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_cache_enabled()
    loss = model(batch(0)[0]).sum()
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()  # a forward pass without autocast has a backward pass without it
    again = Wide()
    again(batch(0)[0]).sum().backward()
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) or error(p.grad, q.grad) < 1e-2


def test_training_under_autocast_reaches_the_same_loss() -> None:
    losses = {}
    for cast in (False, True):
        model = Wide()
        optimizer = SNOpt(model, preconditioner="kfac", update_freq=2)
        for step in range(30):
            x, y = batch(step, 32)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                loss = (model(x).float() - y).square().mean()
            loss.backward()
            optimizer.step()
        losses[cast] = loss.item()
    assert losses[True] == pytest.approx(losses[False], rel=0.05)


# --- GradScaler -----------------------------------------------------------------------------------


def scaled_step(
    model: nn.Module, optimizer: SNOpt, scaler: Any, step: int, *, unscale: bool = False
) -> None:
    optimizer.zero_grad()
    scaler.scale(loss_of(model, step)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("horizon", [False, True], ids=["", "horizon"])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_scaled_loss_takes_the_steps_of_an_unscaled_one(
    preconditioner: str, horizon: bool
) -> None:
    """The scale is a power of two, so that not a bit differs."""

    class Model(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            times = () if horizon else (torch.linspace(0.0, 1.0, 2),)
            return self.head(self.norm(self.node(torch.tanh(self.encoder(x)), *times)[-1]))

    model = Model()
    if horizon:
        learn_horizon(model.node, 0.8)
    reference = copy.deepcopy(model)
    options = {"preconditioner": preconditioner, "update_freq": 2, "lr": 0.01}
    optimizers = SNOpt(model, **options), SNOpt(reference, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    for step in range(12):
        scaled_step(model, optimizers[0], scaler, step)
        optimizers[1].zero_grad()
        loss_of(reference, step).backward()
        optimizers[1].step()
    assert scaler.get_scale() == 2.0**13
    torch.testing.assert_close(flat(model), flat(reference), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_an_overflow_drops_the_step_and_its_curvature(preconditioner: str) -> None:
    model = plain()
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=1, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled_step(model, optimizer, scaler, 0)
    before, state = flat(model), copy.deepcopy(optimizer.state_dict())
    loss = loss_of(model, 1) * float("inf")
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(flat(model), before)
    assert optimizer.skipped_steps == 0  # GradScaler's own business
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert scaler.get_scale() == 2.0**9
    assert not optimizer._collectors[0].collected()
    scaled_step(model, optimizer, scaler, 2)
    assert flat(model).isfinite().all()
    assert not torch.equal(flat(model), before)


def test_unscaling_by_hand() -> None:
    """'kfe_adam' needs no scale; the others cannot know it any more."""
    model, reference = plain(), plain()
    reference.load_state_dict(model.state_dict())
    optimizers = [SNOpt(m, preconditioner="kfe_adam", update_freq=1) for m in (model, reference)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        scaled_step(model, optimizers[0], scaler, step, unscale=True)
        optimizers[1].zero_grad()
        loss_of(reference, step).backward()
        optimizers[1].step()
    torch.testing.assert_close(flat(model), flat(reference), rtol=1e-3, atol=1e-5)
    for preconditioner in ("trust_region", "kfac", "ekfac"):
        optimizer = SNOpt(model, preconditioner=preconditioner)
        scaler = torch.amp.GradScaler("cpu")
        with pytest.raises(UnsupportedError, match="loss scale that is no longer known") as caught:
            scaled_step(model, optimizer, scaler, 0, unscale=True)
        assert "leave out scaler.unscale_" in str(caught.value)
        assert f"a step of {preconditioner!r}" in str(caught.value)


# --- torch.compile --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["torch.compile(field)", "field.compile()"])
def test_a_compiled_field_is_recorded(how: str) -> None:
    """Hooks that come after compilation are not seen in it: recorded passes run uncompiled."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        field: Any = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        if compiled and how == "field.compile()":
            field.compile(backend="eager")
        elif compiled:
            field = torch.compile(field, backend="eager")
        fixed = {"solver": "rk4", "solver_adjoint": "rk4", "sensitivity": "snopt"}
        node = NeuralODE(field, **fixed, return_t_eval=False)
        optimizer = SNOpt(node, preconditioner="kfac", update_freq=2)
        t = torch.linspace(0.0, 1.0, 3)
        node(batch(0)[0], t)[-1].square().mean().backward()  # compiled without hooks
        for step in range(4):
            optimizer.zero_grad()
            node(batch(step)[0], t)[-1].square().mean().backward()
            optimizer.step()
        assert all(how == "kfac" for _, how in optimizer.summary())
        found.append(flat(node))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_outside_the_ode_take_the_fallback_by_name() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), nn.Linear(2, 2))
    optimizer = SNOpt(model)
    how = dict(optimizer.summary())
    assert how["0._orig_mod.weight"] == "adam (fallback)"
    assert how["1.weight"] == "trust_region"


# --- memory formats -------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_channels_last(sharing: str) -> None:
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        field = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))
        fixed = {"solver": "rk4", "solver_adjoint": "rk4", "sensitivity": "snopt"}
        node = NeuralODE(field, **fixed, return_t_eval=False).to(memory_format=memory_format)
        model = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1).to(memory_format=memory_format), node])
        optimizer = SNOpt(model, preconditioner="kfac", weight_sharing=sharing, update_freq=2)
        t = torch.linspace(0.0, 1.0, 3)
        for step in range(4):
            x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            out = node(model[0](x.to(memory_format=memory_format)), t)[-1]
            out.square().mean().backward()
            optimizer.step()
        found.append(flat(model))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)
