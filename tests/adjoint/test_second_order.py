"""Theorem 1 against dense matrices: JᵀΦ_xxJ as printed, the Hessian with ``exact=True``."""

from __future__ import annotations

import functools

import pytest
import torch
import torchdiffeq
from torch import nn

from tests.adjoint.theory import Timed, Timeless, blocks, dense_reference, relative
from torchdyn_snopt.adjoint.second_order import second_order_adjoint
from torchdyn_snopt.errors import InvalidInputError, SolverError, UnsupportedError
from torchdyn_snopt.solvers import SolveStats

pytestmark = pytest.mark.usefixtures("float64")

SAMPLES, DIMS, T1 = 3, 2, 1.0
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def quartic(x):
    target = torch.linspace(-1.0, 1.0, x.numel()).view_as(x)
    return ((x - target) ** 4).reshape(-1, DIMS).sum(1).mean()


def running_cost(t, x, u):
    """Couples x and u, depends on t, and has a part of u alone that must count once."""
    coupled = (1 + t) * (x**2).sum() * sum((p**2).sum() for p in u[:2])
    return 0.1 * coupled + 0.01 * sum((p**3).sum() for p in u)


@functools.cache
def reference(timed: bool, with_cost: bool, batched: bool = True):
    torch.manual_seed(3)
    field = (Timed if timed else Timeless)()
    x0 = torch.randn(SAMPLES, DIMS) if batched else torch.randn(DIMS)
    cost = running_cost if with_cost else None
    return field, x0, cost, dense_reference(field, x0, T1, quartic, cost)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("with_cost", [False, True])
@pytest.mark.parametrize("timed", [False, True])
def test_all_six_blocks_equal_the_dense_matrix(timed, with_cost, exact):
    field, x0, cost, dense = reference(timed, with_cost)
    result = second_order_adjoint(
        field, x0, (0.0, T1), quartic, running_cost=cost, exact=exact, **TIGHT
    )
    m = x0.numel()
    xx, xu, uu = blocks(dense.hessian if exact else dense.gauss_newton, SAMPLES, DIMS)
    errors = {
        "x1": relative(result.x1, dense.x1),
        "Qx": relative(result.Qx, dense.gradient[:m].view_as(x0)),
        "Qu": relative(result.Qu, dense.gradient[m:]),
        "Qxx": relative(result.Qxx, xx),
        "Qxu": relative(result.Qxu, xu),
        "Qux": relative(result.Qux, xu.mT),
        "Quu": relative(result.Quu, uu),
    }
    assert max(errors.values()) < 1e-9, errors


def test_the_two_matrices_differ_and_the_samples_are_uncoupled_in_the_reference():
    _, _, _, dense = reference(False, False)
    assert relative(dense.gauss_newton, dense.hessian) > 0.01
    m = SAMPLES * DIMS
    across = dense.hessian[:m, :m].view(SAMPLES, DIMS, SAMPLES, DIMS)
    assert float(across[0, :, 1].abs().max()) < 1e-12


@pytest.mark.parametrize("exact", [False, True])
def test_without_a_batch_the_sample_dimension_is_absent(exact):
    field, x0, _, dense = reference(False, False, batched=False)
    result = second_order_adjoint(field, x0, (0.0, T1), quartic, exact=exact, **TIGHT)
    matrix = dense.hessian if exact else dense.gauss_newton
    n = matrix.shape[0] - DIMS
    assert result.Qxx.shape == (DIMS, DIMS)
    assert result.Qxu.shape == (DIMS, n)
    whole = torch.cat(
        [torch.cat([result.Qxx, result.Qxu], 1), torch.cat([result.Qux, result.Quu], 1)]
    )
    assert relative(whole, matrix) < 1e-9


def test_quu_is_symmetric_to_the_last_bit():
    field, x0, cost, _ = reference(True, True)
    result = second_order_adjoint(
        field, x0, (0.0, T1), quartic, running_cost=cost, exact=True, rtol=1e-3, atol=1e-3
    )
    assert torch.equal(result.Quu, result.Quu.T)


def test_a_field_that_torch_func_cannot_transform_gives_the_same_numbers():
    field, x0, _, _ = reference(True, False)

    def opaque(t, x):
        if x.sum().item() > 1e9:  # data-dependent control flow
            raise AssertionError
        return field(t, x)

    for exact in (False, True):
        a = second_order_adjoint(field, x0, (0.0, T1), quartic, exact=exact, **TIGHT)
        b = second_order_adjoint(
            opaque, x0, (0.0, T1), quartic, field.parameters(), exact=exact, **TIGHT
        )
        for one, other in zip(a, b, strict=True):
            assert relative(one, other) < 1e-12


def test_a_module_with_data_dependent_control_flow_falls_back_to_autograd():
    inner, x0, _, dense = reference(False, False)

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, t, x):
            return self.inner(t, x) if x.sum().item() < 1e9 else x

    result = second_order_adjoint(Branching(), x0, (0.0, T1), quartic, exact=True, **TIGHT)
    assert relative(result.Quu, blocks(dense.hessian, SAMPLES, DIMS)[2]) < 1e-9


def test_a_cost_that_closes_over_the_field_is_differentiated_through_it():
    field, x0, _, _ = reference(False, False)

    def kinetic(t, x, u):
        return field(t, x).square().sum()

    def as_functional(t, x, u):
        names = [name for name, _ in field.named_parameters()]
        f = torch.func.functional_call(field, dict(zip(names, u, strict=True)), (t, x))
        return f.square().sum()

    dense = dense_reference(field, x0, T1, quartic, as_functional)
    result = second_order_adjoint(
        field, x0, (0.0, T1), quartic, running_cost=kinetic, exact=True, **TIGHT
    )
    assert relative(result.Quu, blocks(dense.hessian, SAMPLES, DIMS)[2]) < 1e-9


def test_samples_of_several_dimensions_are_flattened_in_the_matrices():
    class Channels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3, padding=1)

        def forward(self, t, x):
            return torch.tanh(self.conv(x))

    field = Channels()
    x0 = torch.randn(2, 2, 3)
    result = second_order_adjoint(field, x0, (0.0, T1), lambda x: (x**3).sum(), **TIGHT)
    n = 2 * 2 * 3 + 2
    assert result.Qx.shape == (2, 2, 3)
    assert result.Qxx.shape == (2, 6, 6)
    assert result.Qxu.shape == (2, 6, n)
    dense = dense_reference(field, x0, T1, lambda x: (x**3).sum())
    xx, xu, uu = blocks(dense.gauss_newton, 2, 6)
    assert max(relative(result.Qxx, xx), relative(result.Qxu, xu), relative(result.Quu, uu)) < 1e-9


@pytest.mark.parametrize("method", ["rk4", "tsit5", "dopri8"])
def test_every_method_converges_to_the_same_matrix(method):
    field, x0, _, dense = reference(True, False)
    times = torch.linspace(0.0, T1, 41)
    result = second_order_adjoint(
        field, x0, times, quartic, exact=True, method=method, rtol=1e-8, atol=1e-9
    )
    assert relative(result.Quu, blocks(dense.hessian, SAMPLES, DIMS)[2]) < 1e-6


def test_an_adams_method_of_torchdiffeq_can_be_passed():
    field, x0, _, dense = reference(False, True)
    adams = functools.partial(
        torchdiffeq.odeint, method="implicit_adams", options={"step_size": 0.01}, rtol=1e-9
    )
    result = second_order_adjoint(
        field, x0, (0.0, T1), quartic, running_cost=running_cost, exact=True, method=adams
    )
    xx, xu, uu = blocks(dense.hessian, SAMPLES, DIMS)
    assert max(relative(result.Qxx, xx), relative(result.Qxu, xu), relative(result.Quu, uu)) < 1e-5


def test_the_tolerance_means_the_same_for_every_scale_of_the_loss():
    field, x0, _, dense = reference(False, False)
    _, _, uu = blocks(dense.hessian, SAMPLES, DIMS)
    errors = []
    for scale in (1.0, 1e-6, 1e6):
        result = second_order_adjoint(
            field,
            x0,
            (0.0, T1),
            lambda x, s=scale: s * quartic(x),
            exact=True,
            rtol=1e-6,
            atol=1e-6,
        )
        errors.append(relative(result.Quu / scale, uu))
    assert max(errors) < 1e-4
    assert max(errors) / min(errors) < 1.001


def test_one_backward_solve_whatever_the_number_of_parameters():
    counts = []
    for width in (3, 12):
        stats = SolveStats()
        second_order_adjoint(
            Timeless(width=width), torch.randn(2, 2), (0.0, T1), quartic, method="rk4", stats=stats
        )
        counts.append(stats.nfe_backward)
    assert counts == [4, 4]


def test_backwards_in_time():
    field, x0, _, _ = reference(True, False)
    there = second_order_adjoint(
        field, x0, (0.5, 0.0), quartic, exact=True, method="dopri8", rtol=1e-8, atol=1e-9
    )

    class Mirrored(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = field

        def forward(self, t, x):
            return -self.inner(0.5 - t, x)

    same = second_order_adjoint(
        Mirrored(), x0, (0.0, 0.5), quartic, exact=True, method="dopri8", rtol=1e-8, atol=1e-9
    )
    assert relative(there.Quu, same.Quu) < 1e-6


def test_a_field_or_a_loss_that_couples_samples_is_refused_and_batched_false_takes_it():
    field, x0, _, _ = reference(False, False)

    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = field

        def forward(self, t, x):
            return self.inner(t, x - x.mean(0))

    with pytest.raises(UnsupportedError, match="mixes the samples"):
        second_order_adjoint(Centred(), x0, (0.0, T1), quartic)
    with pytest.raises(UnsupportedError, match="terminal loss couples"):
        second_order_adjoint(field, x0, (0.0, T1), lambda x: x.sum() ** 2)
    result = second_order_adjoint(
        Centred(), x0, (0.0, T1), lambda x: x.sum() ** 2, exact=True, batched=False, **TIGHT
    )
    dense = dense_reference(Centred(), x0, T1, lambda x: x.sum() ** 2)
    m = x0.numel()
    assert result.Qxx.shape == (m, m)
    assert relative(result.Qxx, dense.hessian[:m, :m]) < 1e-8
    assert relative(result.Quu, dense.hessian[m:, m:]) < 1e-8


def test_no_parameters_leave_the_state_blocks():
    def linear(t, x):
        return -x

    result = second_order_adjoint(linear, torch.ones(2), (0.0, 1.0), lambda x: (x**2).sum(), ())
    assert result.Quu.shape == (0, 0)
    assert relative(result.Qxx, 2 * torch.exp(torch.tensor(-2.0)) * torch.eye(2)) < 1e-4


def test_refusals():
    field, x0, _, _ = reference(False, False)
    with pytest.raises(InvalidInputError, match="params=…"):
        second_order_adjoint(lambda t, x: x, x0, (0.0, 1.0), quartic)
    with pytest.raises(InvalidInputError, match="entry 0 of params"):
        second_order_adjoint(field, x0, (0.0, 1.0), quartic, [torch.ones(1)])
    with pytest.raises(InvalidInputError, match="unknown Runge"):
        second_order_adjoint(field, x0, (0.0, 1.0), quartic, method="bdf")
    with pytest.raises(UnsupportedError, match="complex"):
        second_order_adjoint(field, x0.to(torch.complex128), (0.0, 1.0), quartic)

    def exploding(t, x):
        return x**3

    with pytest.raises(SolverError, match="forward"):
        second_order_adjoint(exploding, 10 * torch.ones(2), (0.0, 1.0), quartic, ())
