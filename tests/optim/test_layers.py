"""A layer as one matrix: its gradient, its moves, its averaged factors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.optim.problems import spd
from torchdyn_snopt.curvature.factors import Factors
from torchdyn_snopt.optim.layers import Layer

pytestmark = pytest.mark.usefixtures("float64")


def linear(*, bias: bool = True) -> Layer:
    module = nn.Linear(3, 2, bias=bias)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    return Layer("weight", module.weight, module.bias, 1, {})


# --- the matrix -----------------------------------------------------------------------------------


def test_the_matrix_has_the_bias_in_its_last_column() -> None:
    layer = linear()
    assert layer.bias is not None
    matrix = layer.matrix(layer.weight, layer.bias)
    assert torch.equal(matrix, torch.cat([layer.weight, layer.bias[:, None]], 1))
    assert torch.equal(layer.matrix(None, layer.bias)[:, :3], torch.zeros(2, 3))
    assert torch.equal(layer.matrix(layer.weight, None)[:, 3], torch.zeros(2))
    assert linear(bias=False).matrix(layer.weight, layer.bias).shape == (2, 3)


@pytest.mark.parametrize("bias", [True, False])
def test_weight_decay_is_a_running_cost_on_the_whole_matrix(bias: bool) -> None:
    layer = linear(bias=bias)
    for sign in (1.0, -1.0):
        expected = sign * layer.weight.grad + 0.25 * layer.weight
        torch.testing.assert_close(layer.gradient(0.25, sign)[:, :3], expected)
        if layer.bias is not None:
            expected = sign * layer.bias.grad + 0.25 * layer.bias
            torch.testing.assert_close(layer.gradient(0.25, sign)[:, 3], expected)


@torch.no_grad()
def test_applying_undoes_the_matrix() -> None:
    for groups in (1, 2):
        module = nn.Conv2d(4, 6, (3, 2), groups=groups)
        for p in module.parameters():
            p.grad = torch.randn_like(p)
        layer = Layer("weight", module.weight, module.bias, groups, {})
        expected = [p - 0.1 * p.grad for p in module.parameters()]
        layer.apply(layer.gradient(0.0, 1.0), 0.1)
        for p, q in zip(module.parameters(), expected, strict=True):
            torch.testing.assert_close(p, q)


@torch.no_grad()
def test_what_is_frozen_or_unused_does_not_move() -> None:
    layer = linear()
    assert layer.bias is not None
    update = torch.randn(2, 4)
    layer.weight.grad = None
    weight, bias = layer.weight.clone(), layer.bias.clone()
    assert layer.has_gradient()
    layer.apply(update, 0.1)
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer.bias, bias - 0.1 * update[:, 3])
    layer.weight.grad = torch.zeros_like(weight)  # as zero_grad(set_to_none=False) leaves it
    layer.weight.requires_grad_(False)
    layer.apply(update, 0.1)
    assert torch.equal(layer.weight, weight)
    layer.weight.grad = layer.bias.grad = None
    assert not layer.has_gradient()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_parameters_meet_float32_matrices(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2, dtype=dtype)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    layer = Layer("weight", module.weight, module.bias, 1, {})
    assert layer.gradient(0.1, 1.0).dtype == torch.float32
    before = module.weight.clone()
    layer.apply(torch.ones(2, 4, dtype=torch.float32), 0.5)
    torch.testing.assert_close(module.weight, before - torch.tensor(0.5, dtype=dtype))
    layer.absorb(Factors(torch.eye(4, dtype=dtype), torch.eye(2, dtype=dtype)), 0.5)
    layer.absorb(Factors(torch.eye(4, dtype=dtype), torch.eye(2, dtype=dtype)), 0.5)
    assert layer.state["A"].dtype == layer.state["B"].dtype == torch.float32


# --- averages -------------------------------------------------------------------------------------


def test_the_average_weighs_the_past_by_the_decay_and_the_first_whole() -> None:
    layer, decay = linear(), 0.8
    seen = [Factors(spd(4), spd(2), scale) for scale in (1.0, 0.5, 3.0)]
    for count, factors in enumerate(seen, start=1):
        layer.absorb(factors, decay)
        weights = [decay ** (count - 1 - i) for i in range(count)]
        a = sum(w * f.A for w, f in zip(weights, seen, strict=False)) / sum(weights)
        b = sum(w * f.scale * f.B for w, f in zip(weights, seen, strict=False)) / sum(weights)
        torch.testing.assert_close(layer.state["A"], a, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.state["B"], b, rtol=1e-12, atol=1e-12)


def test_without_decay_the_last_factors_count_alone() -> None:
    layer = linear()
    layer.absorb(Factors(spd(4), spd(2)), 0.0)
    last = Factors(spd(4), spd(2), 2.0)
    layer.absorb(last, 0.0)
    assert torch.equal(layer.state["A"], last.A)
    assert torch.equal(layer.state["B"], 2.0 * last.B)


def test_the_average_is_a_copy() -> None:
    layer, factors = linear(), Factors(spd(4), spd(2))
    kept = factors.A.clone()
    layer.absorb(factors, 0.9)
    layer.absorb(Factors(spd(4), spd(2)), 0.9)
    assert torch.equal(factors.A, kept)
