"""The stepping loop: exact counts of evaluations and steps, step control, failures, restarts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from torchdyn_snopt.errors import InvalidInputError, SolverError
from torchdyn_snopt.solvers import (
    PROBE,
    TABLEAUS,
    PhaseStats,
    Step,
    Stepper,
    System,
    Tolerances,
    check_segments,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Rate = Callable[[float, Tensor], Tensor]

pytestmark = pytest.mark.usefixtures("float64")

DOPRI5 = TABLEAUS["dopri5"]
FIXED = [tableau for tableau in TABLEAUS.values() if not tableau.adaptive]
ADAPTIVE = [tableau for tableau in TABLEAUS.values() if tableau.adaptive]


class Recorder(System):
    """A system that writes down what the loop does with it."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.calls: list[tuple[int, float]] = []
        self.steps: list[tuple[float, float]] = []
        self.extra = 0.0

    def evaluate(self, stage: int, t: float, y: Tensor, out: Tensor) -> None:
        self.calls.append((stage, t))
        out.copy_(self.rate(t, y))

    def accepted(self, step: Step) -> None:
        self.steps.append((step.t, step.dt))

    def extra_error_ratio(self, dt: float) -> float:
        return self.extra


def stepper(system: System, y: Tensor, tableau: str = "dopri5", **options: object) -> Stepper:
    tolerances = Tolerances(
        *(options.pop(name, default) for name, default in (("rtol", 1e-6), ("atol", 1e-6))),
        max_steps=options.pop("max_steps", 1000),
    )
    return Stepper(
        system,
        y,
        TABLEAUS[tableau],
        tolerances,
        phase=options.pop("phase", "forward"),
        stats=options.pop("stats", PhaseStats()),
        **options,
    )


def still(t: float, y: Tensor) -> Tensor:
    return torch.zeros_like(y)


def decay(t: float, y: Tensor) -> Tensor:
    return -y


def turning(t: float, y: Tensor) -> Tensor:
    return torch.stack([y[1], -y[0]]) * (1 + 0.5 * math.sin(3 * t))


# --- fixed steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tableau", FIXED, ids=lambda t: t.name)
def test_a_fixed_step_evaluates_each_stage_once_at_its_node(tableau) -> None:
    system, stats = Recorder(decay), PhaseStats()
    loop = stepper(system, torch.ones(3), tableau.name, stats=stats)
    loop.advance(0.5, 0.75)
    loop.advance(0.75, 0.5)
    nodes = [(i, 0.5 + c * 0.25) for i, c in enumerate(tableau.c)]
    back = [(i, 0.75 - c * 0.25) for i, c in enumerate(tableau.c)]
    assert system.calls == [(i, pytest.approx(t)) for i, t in nodes + back]
    assert system.steps == [(0.5, 0.25), (0.75, -0.25)]
    assert stats == PhaseStats(nfe=2 * tableau.stages, accepted=2, rejected=0)


def test_a_fixed_step_computes_the_method() -> None:
    y = stepper(Recorder(decay), torch.tensor([1.0, -2.0]), "rk4").advance(0.0, 0.5)
    h = -0.5
    growth = 1 + h + h**2 / 2 + h**3 / 6 + h**4 / 24
    torch.testing.assert_close(y, growth * torch.tensor([1.0, -2.0]))


def test_a_fixed_step_to_infinity_is_an_error() -> None:
    system = Recorder(lambda t, y: y * 1e200)
    loop = stepper(system, torch.full((2,), 1e200), "euler")
    with pytest.raises(SolverError, match="not finite") as caught:
        loop.advance(0.0, 1.0)
    assert (caught.value.t, caught.value.dt, caught.value.steps) == (0.0, 1.0, 1)
    assert caught.value.norms == {"state": math.inf}


# --- adaptive steps: counts -----------------------------------------------------------------------


@pytest.mark.parametrize("tableau", ADAPTIVE, ids=lambda t: t.name)
def test_evaluations_of_an_adaptive_solve(tableau) -> None:
    """Without error each step is ten times the last: 0.01, 0.1, then the rest of [0, 1]."""
    system, stats = Recorder(still), PhaseStats()
    loop = stepper(system, torch.ones(2), tableau.name, stats=stats, dt=0.01)
    y = loop.advance(0.0, 1.0)
    assert torch.equal(y, torch.ones(2))
    assert system.steps == [
        (0.0, 0.01),
        (0.01, pytest.approx(0.1)),
        (pytest.approx(0.11), pytest.approx(0.89)),
    ]
    # With FSAL the last stage of a step is the first of the next, and is not evaluated again.
    first_stages = 1 if tableau.fsal else 3
    assert stats == PhaseStats(first_stages + 3 * (tableau.stages - 1), 3, 0)
    assert [stage for stage, _ in system.calls].count(0) == first_stages
    assert len(system.calls) == stats.nfe


def test_the_first_step_is_estimated_by_one_probe() -> None:
    system, stats = Recorder(decay), PhaseStats()
    loop = stepper(system, torch.ones(4), stats=stats)
    assert loop.dt is None
    loop.advance(0.0, 1e-3)
    # d0 = d1 = 1/(rtol + atol), so the probe is at 0.01; but the segment is shorter than that.
    assert system.calls[:2] == [(0, 0.0), (PROBE, 1e-3)]
    assert stats == PhaseStats(nfe=2 + 6, accepted=1, rejected=0)


def test_the_probe_follows_the_scale_of_the_state() -> None:
    system = Recorder(decay)
    stepper(system, torch.ones(4)).advance(0.0, 1.0)
    assert system.calls[1] == (PROBE, pytest.approx(0.01))
    # d2 = d1 within 1 %, so the first step is (0.64 / d1)^(1/6) with d1 = 1 / 2e-6.
    assert system.steps[0][1] == pytest.approx((0.64 * 2e-6) ** (1 / 6), rel=1e-3)


def test_no_probe_when_the_step_is_given() -> None:
    system = Recorder(decay)
    stepper(system, torch.ones(2), dt=-0.05).advance(0.0, 1.0)
    assert PROBE not in [stage for stage, _ in system.calls]
    assert system.steps[0] == (0.0, 0.05)


def test_the_step_size_is_carried_to_the_next_segment() -> None:
    system = Recorder(still)
    loop = stepper(system, torch.ones(2), dt=0.4)
    loop.advance(0.0, 0.1)
    assert loop.dt == pytest.approx(1.0)  # the tenfold of the step that was cut to 0.1
    loop = stepper(Recorder(turning), torch.tensor([1.0, 0.0]), dt=0.1)
    loop.advance(0.0, 1e-6)
    assert loop.dt is not None
    assert loop.dt >= 0.1  # the cut step says nothing against the planned one


def test_a_sliver_is_not_left_over() -> None:
    """A rest up to 1 % longer than the planned step is taken in one, and otherwise in halves."""
    system = Recorder(still)
    stepper(system, torch.ones(1), dt=0.1).advance(0.0, 0.1009)
    assert system.steps == [(0.0, pytest.approx(0.1009))]
    system = Recorder(still)
    stepper(system, torch.ones(1), dt=0.1).advance(0.0, 0.102)
    assert system.steps == [(0.0, 0.051), (0.051, pytest.approx(0.051))]


# --- adaptive steps: error control ----------------------------------------------------------------


class Scripted(Recorder):
    """dy/dt = 2 t: with Heun's pair the scaled error of a step is dt², when atol = 1."""

    def __init__(self) -> None:
        super().__init__(lambda t, y: torch.full_like(y, 2 * t))


def test_rejections_and_control_exactly() -> None:
    system, stats = Scripted(), PhaseStats()
    loop = stepper(
        system, torch.zeros(5), "adaptive_heun", rtol=1e-15, atol=1.0, dt=4.0, stats=stats
    )
    loop.advance(0.0, 3.0)
    # 3 (error 9) is rejected: times 0.9 · 9^(−1/2) = 0.3, so 0.9 (error 0.81) is accepted, which
    # the next step, with 0.9 · 0.81^(−1/2) = 1, is as well; what is left then is taken in halves.
    lengths = [0.9, 0.9, 0.6, 0.6]
    assert [dt for _, dt in system.steps] == pytest.approx(lengths)
    assert (stats.accepted, stats.rejected) == (len(lengths), 1)
    # A rejected step keeps its first stage: one evaluation of two.
    assert stats.nfe == 2 + 1 + 2 * (len(lengths) - 1)
    torch.testing.assert_close(loop.y, torch.full((5,), 9.0))


def test_the_error_is_the_root_mean_square_over_the_controlled_part() -> None:
    """Only the leading entries count: an error elsewhere rejects nothing."""

    def rate(t: float, y: Tensor) -> Tensor:
        return torch.tensor([0.0, 1e6 * t])

    for controlled, rejected in ((1, 0), (2, 1)):
        stats = PhaseStats()
        loop = stepper(
            Recorder(rate), torch.zeros(2), "adaptive_heun", atol=1.0, dt=1.0,
            controlled=controlled, stats=stats,
        )  # fmt: skip
        loop.advance(0.0, 1.0)
        assert (stats.rejected > 0) == bool(rejected)


def test_what_the_system_sums_on_the_side_can_reject_a_step() -> None:
    system, stats = Recorder(still), PhaseStats()

    class Watching(Recorder):
        def extra_error_ratio(self, dt: float) -> float:
            return abs(dt) / 0.3

    system = Watching(still)
    stepper(system, torch.ones(1), dt=1.0, stats=stats).advance(0.0, 1.0)
    assert stats.rejected >= 1
    assert max(dt for _, dt in system.steps) <= 0.3


@pytest.mark.parametrize("tableau", ADAPTIVE, ids=lambda t: t.name)
def test_the_tolerance_is_met(tableau) -> None:
    """The angle of `turning` is known: ∫ 1 + sin(3t)/2 dt."""
    angle = 2.0 + (1 - math.cos(6.0)) / 6
    exact = torch.tensor([math.cos(angle), -math.sin(angle)])
    tolerance = 1e-3 if tableau.order == 2 else 1e-7
    loop = stepper(
        Recorder(turning), torch.tensor([1.0, 0.0]), tableau.name, rtol=tolerance, atol=tolerance
    )
    error = float((loop.advance(0.0, 2.0) - exact).norm())
    assert error < 30 * tolerance


@pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=lambda t: t.name)
def test_both_directions_take_mirrored_steps(tableau) -> None:
    up, down = Recorder(turning), Recorder(lambda t, y: -turning(-t, y))
    y0 = torch.tensor([1.0, 0.5])
    forward = stepper(up, y0, tableau.name, rtol=1e-4).advance(0.0, 1.5)
    mirrored = stepper(down, y0, tableau.name, rtol=1e-4).advance(0.0, -1.5)
    assert torch.equal(forward, mirrored)
    assert up.steps == [(-t, -dt) for t, dt in down.steps]


def test_a_zero_absolute_tolerance_with_a_zero_entry() -> None:
    """An entry that is and stays zero has no error; it must not look like a failure."""
    stats = PhaseStats()
    loop = stepper(
        Recorder(lambda t, y: torch.tensor([-1.0, 0.0]) * y),
        torch.tensor([1.0, 0.0]), rtol=1e-6, atol=0.0, stats=stats,
    )  # fmt: skip
    y = loop.advance(0.0, 1.0)
    torch.testing.assert_close(y, torch.tensor([math.exp(-1.0), 0.0]), rtol=1e-5, atol=0.0)


# --- restart and first stage ----------------------------------------------------------------------


def test_restart_keeps_the_step_size_and_drops_the_first_stage() -> None:
    system, stats = Recorder(decay), PhaseStats()
    loop = stepper(system, torch.ones(2), stats=stats, dt=0.1)
    loop.advance(0.0, 1.0)
    planned, nfe = loop.dt, stats.nfe
    loop.restart(torch.full((2,), 5.0))
    assert loop.dt == planned
    torch.testing.assert_close(loop.first_stage(1.0), torch.full((2,), -5.0))
    assert stats.nfe == nfe + 1
    system.calls.clear()
    loop.advance(1.0, 1.0 + 1e-3)
    assert [stage for stage, _ in system.calls] == [1, 2, 3, 4, 5, 6]


def test_the_first_stage_after_a_step_is_free_with_fsal_only() -> None:
    for name, extra in (("dopri5", 0), ("dopri8", 1)):
        stats = PhaseStats()
        loop = stepper(Recorder(decay), torch.ones(2), name, stats=stats, dt=0.1)
        y = loop.advance(0.0, 0.1)
        nfe = stats.nfe
        torch.testing.assert_close(loop.first_stage(0.1), -y)
        assert stats.nfe == nfe + extra


def test_the_first_state_is_not_changed() -> None:
    y = torch.ones(3)
    stepper(Recorder(decay), y).advance(0.0, 1.0)
    assert torch.equal(y, torch.ones(3))


# --- failures -------------------------------------------------------------------------------------


def test_max_steps_counts_accepted_and_rejected_steps() -> None:
    system, stats = Recorder(turning), PhaseStats()
    loop = stepper(system, torch.tensor([1.0, 0.0]), max_steps=7, dt=1e-3, rtol=1e-9, stats=stats)
    with pytest.raises(SolverError, match="max_steps=7") as caught:
        loop.advance(0.0, 100.0)
    assert stats.accepted + stats.rejected == 7
    assert caught.value.steps == 7
    assert caught.value.phase == "forward"
    assert caught.value.t == pytest.approx(system.steps[-1][0] + system.steps[-1][1])


def test_max_steps_bounds_the_whole_solve_not_each_segment() -> None:
    loop = stepper(Recorder(still), torch.ones(1), max_steps=3, dt=1.0)
    for i in range(3):
        loop.advance(float(i), i + 1.0)
    with pytest.raises(SolverError, match="max_steps=3"):
        loop.advance(3.0, 4.0)


def test_a_field_that_is_not_finite_at_the_start() -> None:
    system = Recorder(lambda t, y: y * math.nan)
    with pytest.raises(SolverError, match="the field is not finite") as caught:
        stepper(system, torch.ones(2)).advance(0.0, 1.0)
    assert (caught.value.t, caught.value.steps) == (0.0, 0)
    with pytest.raises(SolverError, match="the field is not finite"):
        stepper(system, torch.ones(2), dt=0.1).advance(0.0, 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_field_that_is_not_finite_later_on(bad: float) -> None:
    """The loop closes in on the wall at 0.5 and gives up there."""
    system = Recorder(lambda t, y: torch.full_like(y, bad if t > 0.5 else 1.0))
    with pytest.raises(SolverError, match="not finite") as caught:
        stepper(system, torch.ones(2), phase="backward").advance(0.0, 1.0)
    assert caught.value.t == pytest.approx(0.5, abs=1e-6)
    assert caught.value.phase == "backward"
    assert caught.value.steps < 150


def test_a_solution_that_explodes() -> None:
    """y' = y² from 1 leaves every bound at t = 1."""
    with pytest.raises(SolverError, match=r"underflows|not finite") as caught:
        stepper(Recorder(lambda t, y: y**2), torch.ones(1)).advance(0.0, 2.0)
    assert caught.value.t == pytest.approx(1.0, abs=1e-3)
    assert caught.value.steps < 600


def test_a_field_without_any_smoothness_underflows() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = Recorder(lambda t, y: 1e30 * torch.randn(y.shape, generator=generator))
    with pytest.raises(SolverError, match="the step size underflows") as caught:
        stepper(noise, torch.ones(3)).advance(0.0, 1.0)
    assert abs(caught.value.dt) < 1e-14
    assert "norms state=" in str(caught.value)


def test_the_loop_works_in_single_precision() -> None:
    y = stepper(Recorder(decay), torch.ones(3, dtype=torch.float32), rtol=1e-4).advance(0.0, 1.0)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, torch.full((3,), math.exp(-1), dtype=torch.float32))


# --- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0, 0.0], [0.0, 0.1, 5.0], [3.0, -1.0, -1.5]])
def test_monotonic_times_pass(times: list[float]) -> None:
    check_segments(times)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], "no interval"),
        ([0.0], "no interval"),
        ([0.0, math.nan], "not finite"),
        ([0.0, math.inf], "not finite"),
        ([0.0, 0.0], "repeated"),
        ([0.0, 1.0, 1.0], "repeated"),
        ([0.0, 1.0, 0.5], "change direction"),
    ],
)
def test_other_times_are_refused(times: list[float], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        check_segments(times)
