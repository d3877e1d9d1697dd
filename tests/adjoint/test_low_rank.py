"""Proposition 2 against Theorem 1 and against autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.adjoint.theory import Timed, Timeless, relative
from torchdyn_snopt.adjoint.low_rank import low_rank_adjoint
from torchdyn_snopt.adjoint.second_order import second_order_adjoint
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.solvers import SolveStats

pytestmark = pytest.mark.usefixtures("float64")

DIMS, T1 = 4, 1.0
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("rank", [1, 2, 3, DIMS])
def test_the_columns_rebuild_theorem_1(rank):
    field, x0 = Timed(DIMS, 5), torch.randn(DIMS)
    y = torch.randn(rank, DIMS)

    def loss(x):
        return 0.5 * (y @ x).square().sum()

    columns = low_rank_adjoint(field, x0, (0.0, T1), y, **TIGHT)
    full = second_order_adjoint(field, x0, (0.0, T1), loss, **TIGHT)
    assert relative(columns.p.T @ columns.p, full.Quu) < 1e-8
    assert relative(columns.q.T @ columns.p, full.Qxu) < 1e-8
    assert relative(columns.q.T @ columns.q, full.Qxx) < 1e-8


def test_per_sample_columns_rebuild_the_quu_of_a_batch():
    field, x0 = Timed(2, 5), torch.randn(3, 2)

    def loss(x):
        return 0.5 * x.square().sum()

    seeds = torch.eye(2).unsqueeze(1).expand(2, 3, 2)
    columns = low_rank_adjoint(field, x0, (0.0, T1), seeds, per_sample=True, **TIGHT)
    n = sum(p.numel() for p in field.parameters())
    assert columns.p.shape == (2, 3, n)
    flat = columns.p.flatten(0, 1)
    full = second_order_adjoint(field, x0, (0.0, T1), loss, **TIGHT)
    assert relative(flat.T @ flat, full.Quu) < 1e-8
    summed = low_rank_adjoint(field, x0, (0.0, T1), seeds, **TIGHT)
    assert relative(columns.p.sum(1), summed.p) < 1e-12


def test_seeds_may_be_a_function_of_the_last_state():
    field, x0 = Timeless(2, 3), torch.randn(3, 2)
    seen = []

    def seeds(x1):
        seen.append(x1)
        return torch.stack([x1.cos()])

    result = low_rank_adjoint(field, x0, (0.0, T1), seeds)
    same = low_rank_adjoint(field, x0, (0.0, T1), torch.stack([seen[0].cos()]))
    assert torch.equal(result.p, same.p)


@pytest.mark.parametrize("rtol", [1e-3, 1e-7])
def test_the_number_of_evaluations_does_not_depend_on_the_rank_or_on_the_seeds(rtol):
    torch.manual_seed(1)
    field, x0 = Timed(DIMS, 5), torch.randn(6, DIMS)
    calls = []
    field.register_forward_hook(lambda *_: calls.append(1))
    counts, reported = [], []
    for rank, scale in ((1, 1.0), (2, 1e3), (8, 1.0), (24, 1e-3)):
        calls.clear()
        stats = SolveStats()
        seeds = scale * torch.randn(rank, 6, DIMS)
        low_rank_adjoint(field, x0, (0.0, T1), seeds, rtol=rtol, atol=rtol, stats=stats)
        counts.append(len(calls))
        reported.append(stats.nfe_forward + stats.nfe_backward)
    assert len(set(counts)) == 1
    assert counts == reported


def test_the_steps_also_follow_the_linearized_dynamics_at_an_equilibrium():
    """x stays at 0, where its own error says nothing about q' = −Jᵀq."""

    class Stiff(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor([1.0, 8.0]))

        def forward(self, t, x):
            return -self.rate * x

    result = low_rank_adjoint(
        Stiff(), torch.zeros(2), (0.0, 1.0), torch.eye(2), rtol=1e-8, atol=1e-10
    )
    assert relative(result.q.diagonal(), torch.exp(-torch.tensor([1.0, 8.0]))) < 1e-6


def test_an_operation_without_batching_rule_is_served_column_by_column():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            if g.abs().sum().item() < 0:  # .item() cannot be mapped
                raise AssertionError
            return g * x.cos()

    inner, x0 = Timeless(2, 3), torch.randn(3, 2)
    seeds = torch.randn(4, 3, 2)

    def plain(t, x):
        return inner(t, x).sin()

    def opaque(t, x):
        return Opaque.apply(inner(t, x))

    for per_sample in (False, True):
        a, b = (
            low_rank_adjoint(f, x0, (0.0, T1), seeds, inner.parameters(), per_sample=per_sample)
            for f in (plain, opaque)
        )
        assert relative(a.p, b.p) < 1e-13
        assert relative(a.q, b.q) < 1e-13


def test_unused_parameters_have_zero_columns():
    field = Timeless(2, 3)
    extra = nn.Parameter(torch.ones(2))
    result = low_rank_adjoint(
        field, torch.randn(2), (0.0, 1.0), torch.eye(2), [*field.parameters(), extra]
    )
    assert result.p.shape == (2, 17 + 2)
    assert torch.equal(result.p[:, -2:], torch.zeros(2, 2))
    assert float(result.p[:, :-2].abs().min(1).values.max()) > 0


@pytest.mark.parametrize("shape", [(2, 3), (0, 3, 2), (1, 2, 3)])
def test_seeds_of_another_shape_are_refused(shape):
    with pytest.raises(InvalidInputError, match=r"\[R, \*x.shape\]"):
        low_rank_adjoint(Timeless(2, 3), torch.randn(3, 2), (0.0, 1.0), torch.zeros(shape))
