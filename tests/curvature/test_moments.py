"""Sums of rowsᵀ rows, with steps that are accepted and rejected, against dense float64 sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.curvature.dense import input_patches
from torchdyn_snopt.curvature.columns import ColumnSums
from torchdyn_snopt.curvature.factors import CurvatureSpec, LayerSums, Use
from torchdyn_snopt.curvature.layers import input_rows
from torchdyn_snopt.curvature.moments import _GATHER, Moment, Products
from torchdyn_snopt.curvature.recording import FreeParameters
from torchdyn_snopt.curvature.strips import StripMoment

pytestmark = pytest.mark.usefixtures("float64")

# Steps of (accepted with this scale, or rejected where None; weights of its stages).
STEPS = [(0.5, [0.1, -0.7]), (None, [3.0, 2.0, -5.0]), (2.0, [1.3]), (0.25, [0.4, 0.4, -0.2])]

# Rows: gathered over all steps; flushed in the midst of a step; one product each; in blocks.
SIZES = {
    "few": (7, 5),
    "some": (_GATHER // 20, 5),
    "many": (_GATHER // 9, 5),
    "wide": (300, 290),
    "groups": (3, 11, 4),
    "many, groups": (2, _GATHER // 16, 4),
}


def dense(rows: Tensor, one: bool) -> Tensor:
    rows = torch.cat([rows, rows.new_ones(*rows.shape[:-1], 1)], -1) if one else rows
    return rows.mT @ rows


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_only_accepted_steps_count_with_their_scales(size: tuple[int, ...], one: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(*size)
    moment, expected = Moment(rows, one=one), torch.zeros(())
    for scale, weights in STEPS:
        for weight in weights:
            rows = torch.randn(*size)
            moment.add(rows, weight)
            expected = expected + (scale or 0.0) * weight * dense(rows, one)
        moment.reject() if scale is None else moment.accept(scale)
    torch.testing.assert_close(moment.full(), expected, rtol=1e-11, atol=1e-9)


def test_what_is_not_accepted_does_not_count() -> None:
    moment = Moment(torch.randn(4, 3))
    moment.add(torch.randn(4, 3), 1.0)
    assert torch.equal(moment.full(), torch.zeros(3, 3))


def test_merged_sums_are_of_both_and_the_other_is_empty() -> None:
    torch.manual_seed(0)
    few, many = torch.randn(6, 4), torch.randn(_GATHER, 4)
    for first, second in [(few, few + 1), (few, many), (many, few), (many, many - 1)]:
        one, other = Moment(first), Moment(second)
        one.add(first, 2.0)
        other.add(second, -3.0)
        one.accept()
        other.accept(0.5)
        one.merge(other)
        expected = 2.0 * first.mT @ first - 1.5 * second.mT @ second
        torch.testing.assert_close(one.full(), expected, rtol=1e-11, atol=1e-8)
        assert torch.equal(other.full(), torch.zeros(4, 4))


def test_rows_of_other_shapes_do_not_mix() -> None:
    torch.manual_seed(0)
    several = [torch.randn(n, 3) for n in (2, 5, 5, 4)]
    moment = Moment(several[0], one=True)
    for rows in several:
        moment.add(rows, 1.0)
        moment.accept()
    torch.testing.assert_close(moment.full(), dense(torch.cat(several), one=True))


def test_no_more_rows_wait_than_make_one_product() -> None:
    rows = torch.randn(_GATHER // 40, 8)
    sums = Products(Moment(rows)._total.form)
    for _ in range(50):
        sums.add(rows, 1.0)
        assert sum(part.numel() for part, _ in sums._waiting) <= _GATHER


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_strips_count_once_accepted(groups: int, bias: bool) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, padding=1, groups=groups, bias=bias)
    sums = LayerSums(module, CurvatureSpec(reduction="sum"), bias=bias)
    expected: Tensor | float = 0.0
    for scale, weights in STEPS:
        for weight in weights:
            z = torch.randn(3, 4, 5, 5)
            sums.add([Use(z, torch.randn_like(module(z)))], 3, weight)
            patches = input_patches(module, z).flatten(1, 2)  # [groups, rows, features]
            if bias:
                patches = torch.cat([patches, patches.new_ones(*patches.shape[:2], 1)], -1)
            expected = expected + (scale or 0.0) * weight * patches.mT @ patches
        sums.reject() if scale is None else sums.accept(scale)
    assert isinstance(input_rows(module, z, 3, "expand").moment(one=bias), StripMoment)
    sums.close(3, 3, 1.0)
    totals = sums.totals()
    assert totals is not None
    expected = expected if groups > 1 else expected[0]
    torch.testing.assert_close(totals.a, expected, rtol=1e-10, atol=1e-10)
    weight = sum((scale or 0.0) * sum(weights) for scale, weights in STEPS)
    assert totals.rows == pytest.approx(3 * 25 * weight)
    assert totals.row_samples == pytest.approx(3 * weight)


def test_columns_count_once_accepted() -> None:
    torch.manual_seed(0)
    free = nn.Parameter(torch.randn(5))
    sums = ColumnSums(FreeParameters([free]), [free], {})
    expected = torch.zeros(2, 3, 5)
    for scale, weights in STEPS:
        for weight in weights:
            columns = torch.randn(2, 3, 5)
            sums.add([Use(free, None, columns=columns)], 3, weight)
            expected += (scale or 0.0) * weight * columns
        sums.reject() if scale is None else sums.accept(scale)
    torch.testing.assert_close(sums.totals[0], expected)


# --- the trapezoidal rule -------------------------------------------------------------------------


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("size", [(30, 4), (200, 300), (2, 30, 4)])
def test_ends_of_steps_count_with_half_of_the_steps_beside_them(
    size: tuple[int, ...], one: bool
) -> None:
    """Two segments, with a rejected step, whose end counts nowhere."""
    lengths, total = [[0.3, 0.5], [0.2]], torch.zeros(())
    moment = Moment(torch.zeros(size), one=one)
    for segment in lengths:
        ends = [torch.randn(size) for _ in range(len(segment) + 1)]
        moment.add(ends[0], 1.0)
        moment.begin()
        for dt, first, second in zip(segment, ends, ends[1:], strict=False):
            moment.add(torch.randn(size), 1.0)
            moment.reject()
            moment.add(second, 1.0)
            moment.accept_ends(0.5 * dt)
            for end in (first, second):
                total = total + 0.5 * dt * dense(end, one)
    moment.close()
    torch.testing.assert_close(moment.full(), total, rtol=1e-10, atol=1e-10)


def by_ends(first: Tensor, second: Tensor) -> Moment:
    moment = Moment(first, one=True)
    for end, length in ((first, None), (second, 0.4)):
        moment.add(end, 1.0)
        moment.begin() if length is None else moment.accept_ends(0.5 * length)
    moment.close()
    return moment


def test_sums_of_ends_and_of_accepted_rows_are_merged() -> None:
    """A layer that two solves use, and that is also used outside of them."""
    first, second, outside = torch.randn(3, 6, 4).unbind()
    expected = 0.2 * (dense(first, True) + dense(second, True))
    alone = Moment(outside, one=True)
    alone.add(outside, 3.0)
    alone.accept()
    alone.merge(by_ends(first, second))
    torch.testing.assert_close(alone.full(), expected + 3.0 * dense(outside, True))
    both = by_ends(first, second)
    both.merge(by_ends(first, second))
    torch.testing.assert_close(both.full(), 2.0 * expected)


def test_an_end_where_nothing_was_added_counts_as_zero() -> None:
    rows = torch.randn(6, 4)
    moment = Moment(rows)
    moment.begin()
    moment.add(rows, 1.0)
    moment.accept_ends(0.5)
    torch.testing.assert_close(moment.full(), 0.5 * rows.T @ rows)
