"""Failed solves and failed factorizations, in the midst of training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.linalg import LinAlgError

from tests.optim.problems import Classifier, flat, hooks, loss_of, plain, train
from torchdyn_snopt import CurvatureError, SNOpt, SNOptSensitivity, SolverError
from torchdyn_snopt.curvature.factors import Factors
from torchdyn_snopt.optim.layers import Layer
from torchdyn_snopt.optim.preconditioners import MAX_FAILURES

pytestmark = pytest.mark.usefixtures("float64")

PRECONDITIONERS = ("trust_region", "kfe_adam", "kfac", "ekfac")


class Flaky(Classifier):
    """Its field returns NaN while `broken` says so: at once, or in the backward solve only."""

    def __init__(self, on_failure: str = "skip") -> None:
        super().__init__(SNOptSensitivity(on_failure=on_failure))
        self.broken = ""
        field = self.node.vf.vf
        field.register_forward_hook(self.spoil)

    def spoil(self, field: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        backward = torch.is_grad_enabled()
        broken = self.broken == "always" or (self.broken == "backward" and backward)
        return output * math.nan if broken else None


# --- solves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["always", "backward"])
@pytest.mark.parametrize(
    ("preconditioner", "at"),
    [("kfe_adam", 0), ("kfac", 1), ("ekfac", 3), ("trust_region", 4)],
    ids=["first step", "between refreshes", "at a refresh", "trust region"],
)
def test_a_skipped_step_is_as_if_it_had_not_been(preconditioner: str, broken: str, at: int) -> None:
    model, clean = Flaky(), Flaky()
    clean.load_state_dict(model.state_dict())
    settings = {"preconditioner": preconditioner, "update_freq": 3, "lr": 0.01}
    optimizer, reference = SNOpt(model, **settings), SNOpt(clean, **settings)
    train(model, optimizer, range(at))
    model.broken = broken
    before = flat(model)
    train(model, optimizer, range(50, 52))
    assert optimizer.skipped_steps == 2
    assert torch.equal(flat(model), before)
    assert all(not p.grad.isfinite().all() for p in model.node.parameters())
    model.broken = ""
    train(model, optimizer, range(at, 6))
    train(clean, reference, range(6))
    assert torch.equal(flat(model), flat(clean))
    assert (optimizer.skipped_steps, reference.skipped_steps) == (2, 0)
    assert optimizer.param_groups[0]["step"] == 6


@pytest.mark.parametrize("clear", ["before the forward pass", "after it"])
def test_wherever_gradients_are_cleared_a_failed_step_is_dropped(clear: str) -> None:
    model = Flaky()
    optimizer = SNOpt(model)
    model.broken = "always"
    if clear == "before the forward pass":
        optimizer.zero_grad()
        loss = loss_of(model, 0)
    else:
        loss = loss_of(model, 0)
        optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.isfinite(flat(model)).all()


def test_a_failure_outside_of_training_drops_no_step() -> None:
    """An evaluation, or a step that the user has dropped already."""
    model = Flaky()
    optimizer = SNOpt(model, update_freq=1)
    model.broken = "always"
    with torch.no_grad():
        assert math.isnan(loss_of(model, 0).item())
    model.broken = ""
    loss_of(model, 0).backward()
    optimizer.step()
    assert optimizer.skipped_steps == 0
    model.broken = "always"
    loss_of(model, 1).backward()
    optimizer.zero_grad()
    model.broken = ""
    before = flat(model)
    train(model, optimizer, range(1))
    assert optimizer.skipped_steps == 0
    assert not torch.equal(flat(model), before)


def test_each_optimizer_of_a_model_drops_the_step() -> None:
    model = Flaky()
    field = model.node.vf.vf
    optimizers = [SNOpt(field.first), SNOpt(field.second)]
    model.broken = "backward"
    loss_of(model, 0).backward()
    before = flat(model)
    for optimizer in optimizers:
        optimizer.step()
    assert [o.skipped_steps for o in optimizers] == [1, 1]
    assert torch.equal(flat(model), before)


def test_a_closure_that_fails_is_skipped_too() -> None:
    model = Flaky()
    optimizer = SNOpt(model)
    model.broken = "always"

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    before = flat(model)
    assert math.isnan(optimizer.step(closure).item())
    assert optimizer.skipped_steps == 1
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_after_an_error_the_next_good_step_is_right(preconditioner: str) -> None:
    model, clean = Flaky("raise"), Flaky("raise")
    clean.load_state_dict(model.state_dict())
    settings = {"preconditioner": preconditioner, "update_freq": 2, "lr": 0.01}
    optimizer, reference = SNOpt(model, **settings), SNOpt(clean, **settings)
    for step, broken in enumerate(("always", "backward", "always")):
        model.broken = broken
        optimizer.zero_grad()
        with pytest.raises(SolverError):
            loss_of(model, step).backward()
        assert hooks(model) == hooks(clean)
        model.broken = ""
        train(model, optimizer, range(step, step + 1))
        train(clean, reference, range(step, step + 1))
    assert torch.equal(flat(model), flat(clean))


# --- factorizations -------------------------------------------------------------------------------


def spoil_factors(monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor) -> None:
    """The next average of a layer is not finite, as by an overflow in one batch."""
    absorb, left = Layer.absorb, [weight]

    def spoiled(layer: Layer, factors: Factors, decay: float) -> None:
        absorb(layer, factors, decay)
        if left and layer.weight is left[0]:
            left.pop()
            layer.state["B"].fill_(math.nan)

    monkeypatch.setattr(Layer, "absorb", spoiled)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_training_goes_on_with_the_last_good_factorization(
    preconditioner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain()
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=2)
    train(model, optimizer, range(2))
    weight = model[2].weight
    kept = {k: v.clone() for k, v in optimizer.state[weight].items() if "U_" in k or "_inv" in k}
    assert len(kept) == 2
    spoil_factors(monkeypatch, weight)
    before = flat(model)
    train(model, optimizer, range(2, 3))
    assert optimizer.state[weight]["failures"] == 1
    assert optimizer.state[model[0].weight]["failures"] == 0
    for key, value in kept.items():
        assert torch.equal(optimizer.state[weight][key], value)
    assert torch.isfinite(flat(model)).all()
    assert not torch.equal(flat(model), before)
    train(model, optimizer, range(3, 5))  # the average starts afresh
    assert optimizer.state[weight]["failures"] == 0
    tensors = [v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor)]
    assert all(torch.isfinite(v).all() for v in tensors)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_failures_in_a_row_end_in_an_error_with_layer_and_cause(
    preconditioner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain()
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=1)
    train(model, optimizer, range(1))

    def fail(matrix: torch.Tensor, *args: object) -> None:
        raise LinAlgError("failed to converge")

    with monkeypatch.context() as patch:
        for name in ("eigh", "qr", "cholesky_ex"):
            patch.setattr(torch.linalg, name, fail)
        train(model, optimizer, range(1, MAX_FAILURES))
        assert optimizer.state[model[0].weight]["failures"] == MAX_FAILURES - 1
        with pytest.raises(CurvatureError, match="cannot be factorized") as caught:
            train(model, optimizer, range(MAX_FAILURES, MAX_FAILURES + 1))
    assert caught.value.failures == MAX_FAILURES
    assert caught.value.layer in {"0.weight", "2.weight", "4.weight"}
    assert isinstance(caught.value.__cause__, LinAlgError)
    assert "failed to converge" in str(caught.value)
    # Whoever catches it can go on.
    train(model, optimizer, range(MAX_FAILURES + 1, MAX_FAILURES + 3))
    assert optimizer.state[model[0].weight]["failures"] == 0
    assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_first_factorization_that_fails_is_an_error_and_the_next_one_adopts(
    preconditioner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = plain()
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=2, fallback="adam")

    def fail(matrix: torch.Tensor, *args: object) -> None:
        raise LinAlgError("failed to converge")

    before = flat(model)
    with monkeypatch.context() as patch:
        for name in ("eigh", "cholesky_ex"):
            patch.setattr(torch.linalg, name, fail)
        with pytest.raises(CurvatureError, match="1 failures in a row"):
            train(model, optimizer, range(1))
    assert torch.equal(flat(model), before)
    train(model, optimizer, range(4))
    assert optimizer.state[model[0].weight]["ready"]
    assert torch.isfinite(flat(model)).all()


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_gradients_that_are_not_finite_are_found_by_the_first_refresh(preconditioner: str) -> None:
    model = plain()
    optimizer = SNOpt(model, preconditioner=preconditioner)
    (loss_of(model, 0) * math.inf).backward()
    with pytest.raises(CurvatureError) as caught:
        optimizer.step()
    assert not math.isfinite(caught.value.norms["B"])
    assert "not finite: B" in str(caught.value)
