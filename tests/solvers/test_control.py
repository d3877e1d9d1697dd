"""Step-size control: tolerances, the controller's formula, the first step, underflow."""

from __future__ import annotations

import math

import pytest

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.solvers.control import (
    StepController,
    Tolerances,
    first_step,
    first_step_guess,
    underflows,
)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rtol": 0.0},
        {"rtol": -1e-3},
        {"rtol": math.nan},
        {"rtol": math.inf},
        {"atol": -1e-9},
        {"atol": math.nan},
        {"max_steps": 0},
    ],
    ids=str,
)
def test_tolerances_that_steer_nothing_are_refused_by_name(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(InvalidInputError, match=name):
        Tolerances(**wrong)


def test_a_purely_relative_tolerance_is_allowed() -> None:
    assert Tolerances(rtol=1e-3, atol=0.0).atol == 0.0


def test_the_factor_after_the_first_step_follows_from_its_error_alone() -> None:
    assert StepController(order=5).after_accept(0.5, 0.1) == pytest.approx(0.9 * 0.5**-0.2)


def test_an_error_that_grows_faster_than_the_step_is_expected_to_go_on_growing() -> None:
    controller = StepController(order=5)
    controller.after_accept(0.01, 0.2)
    # With half the step the error is 2⁵ times as large: ρ/h⁵ has grown by 4⁵, and may do so again.
    assert controller.after_accept(0.32, 0.1) == pytest.approx(0.9 * 0.32**-0.2 / 4.0)


def test_an_error_that_grows_slower_than_the_step_promises_nothing() -> None:
    controller = StepController(order=5)
    controller.after_accept(0.5, 0.1)
    assert controller.after_accept(0.25, 0.1) == pytest.approx(0.9 * 0.25**-0.2)
    assert controller.after_accept(0.25, 0.2) == pytest.approx(0.9 * 0.25**-0.2)


def test_the_factors_are_bounded() -> None:
    assert StepController(5).after_accept(0.0, 1.0) == 10.0
    assert StepController(1).after_accept(1e-9, 1.0) == 10.0
    assert StepController(1).after_reject(1e9) == 0.2
    assert StepController(5).after_reject(1.0 + 1e-12) == pytest.approx(0.9)
    assert StepController(5).after_reject(2.0) == pytest.approx(0.9 * 2.0**-0.2)


@pytest.mark.parametrize("ratio", [math.nan, math.inf])
def test_an_error_that_is_not_finite_shrinks_the_step_most(ratio: float) -> None:
    assert StepController(5).after_reject(ratio) == 0.2


def test_the_step_does_not_grow_right_after_a_rejection() -> None:
    controller = StepController(5)
    controller.after_reject(3.0)
    assert controller.after_accept(1e-3, 0.1) == 1.0
    assert controller.after_accept(1e-3, 0.1) > 1.0


def test_underflow_is_measured_in_units_of_the_larger_time() -> None:
    assert underflows(15 * math.ulp(1.0), 0.0, 1.0)
    assert not underflows(-17 * math.ulp(1.0), 0.0, 1.0)
    assert underflows(1e-9, 1e9, 1e9 + 1)
    assert not underflows(1e-20, 0.0, 1e-10)


def test_the_first_step_follows_hairer_norsett_and_wanner_with_another_aim() -> None:
    assert first_step_guess(2.0, 4.0) == pytest.approx(0.005)
    assert first_step_guess(1e-6, 4.0) == 1e-6
    assert first_step_guess(2.0, 0.0) == 1e-6
    assert first_step(0.005, 4.0, 100.0, order=5) == pytest.approx((0.64 / 100) ** (1 / 6))
    assert first_step(1e-4, 4.0, 0.0, order=5) == pytest.approx(1e-2)
    assert first_step(1e-6, 0.0, 0.0, order=5) == 1e-6
