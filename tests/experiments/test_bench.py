"""The benchmarks' bookkeeping; that one contender is fast is not for tests to say."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from torchdyn_snopt.experiments.bench.adjoint import AUTOGRAD, bench_adjoint, steps_for
from torchdyn_snopt.experiments.bench.cases import CASES, Case, _convolutions, _mlp
from torchdyn_snopt.experiments.bench.memory import (
    ALLOCATOR,
    LOOSE,
    MeasurementError,
    bench_memory,
    measure,
)
from torchdyn_snopt.experiments.bench.memory_worker import CLEAR_REFS
from torchdyn_snopt.experiments.bench.refresh import bench_refresh
from torchdyn_snopt.experiments.bench.timing import SHORTEST, Ratio, Timings, interleave, whole

CPU = torch.device("cpu")
SMALL = Case("small", lambda: _mlp(2, 4, 2), (3, 2))
SMALL_CONVOLUTION = Case("convolution", _convolutions, (1, 64, 2, 2), convolutional=True)


class FakeClock:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now = 0.0

    def read(self):
        return self.now


# --- timing ---------------------------------------------------------------------------------------


def test_contenders_take_turns_in_rotation_and_are_measured_each_round():
    clock, turns = FakeClock(), []

    def contender(name, seconds):
        def work():
            turns.append(name)
            clock.now += seconds

        return whole(work)

    contenders = {"a": contender("a", SHORTEST), "b": contender("b", 4 * SHORTEST)}
    timings = interleave(contenders, rounds=3, clock=clock)
    assert turns == [*"aabb", *"ab", *"ba", *"ab"]
    assert timings.seconds["a"] == pytest.approx([SHORTEST] * 3)
    assert timings.ratio("b", "a").values == pytest.approx((4.0, 4.0, 4.0))


def test_short_work_is_repeated_until_the_clock_can_tell():
    clock = FakeClock()
    calls = []

    def work():
        calls.append(1)
        clock.now += SHORTEST / 10

    timings = interleave({"a": whole(work)}, rounds=2, clock=clock)
    assert len(calls) == 2 + 2 * 10
    assert timings.seconds["a"] == pytest.approx([SHORTEST / 10] * 2)


def test_ratios_are_taken_within_rounds():
    timings = Timings({"a": [1.0, 2.0, 6.0], "b": [2.0, 4.0, 3.0]})
    ratio = timings.ratio("a", "b")
    assert ratio.values == (0.5, 0.5, 2.0)
    assert ratio.median == 0.5
    assert timings.milliseconds("a") == 2000.0


def test_a_ratio_shows_its_range():
    assert Ratio((0.5, 0.25, 2.0)).show() == "0.50 [0.25, 2.00]"


# --- adjoint --------------------------------------------------------------------------------------


def test_the_cases_are_those_of_the_documentation():
    shapes = [(case.shape, sum(p.numel() for p in case.build().parameters())) for case in CASES]
    assert shapes == [
        ((128, 64), 3 * (64 * 64 + 64)),
        ((512, 2), 2 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2),
        ((128, 64, 6, 6), 2 * (64 * 64 * 9 + 64)),
    ]


def test_all_contenders_solve_the_same_problem():
    steps = steps_for(CASES[1], CPU)
    reference = steps[AUTOGRAD].gradient()
    assert reference.norm() > 0
    for name, step in steps.items():
        torch.testing.assert_close(step.gradient(), reference, rtol=1e-3, atol=1e-6, msg=name)


def test_steps_do_not_add_up_gradients():
    step = steps_for(SMALL, CPU)["snopt"]
    assert torch.equal(step.gradient(), step.gradient())


def test_the_report_has_every_contender_with_its_counts(tmp_path):
    report = bench_adjoint(2, CPU, lambda text: None, cases=[SMALL])
    (table,) = report.tables
    assert [row[0] for row in table.body] == list(steps_for(SMALL, CPU))
    for row in report.raw:
        assert len(row["seconds"]) == 2
        assert row["nfe_forward"] > 0
        assert (row["nfe_backward"] == 0) == (row["contender"] == AUTOGRAD)
        assert row["gradient_error"] < 1e-2
    report.write(tmp_path / "new" / "adjoint.json")
    written = json.loads((tmp_path / "new" / "adjoint.json").read_text())
    assert written["measurements"] == report.raw
    assert written["environment"]["versions"]["torch"]


# --- refresh --------------------------------------------------------------------------------------


def test_collecting_reaches_every_layer_at_no_further_evaluation():
    told = []
    report = bench_refresh(1, CPU, told.append, cases=[SMALL, SMALL_CONVOLUTION])
    collecting = [row for row in report.raw if row["part"] == "collecting"]
    between = [row for row in report.raw if row["part"] == "in between"]
    assert [row["case"] for row in collecting] == [
        "small",
        "convolution, reduce",
        "convolution, expand",
    ]
    assert [row["layers"] for row in collecting] == [2, 2, 2]
    assert [row["case"] for row in between] == ["small", "convolution"]
    for row in report.raw:
        assert row["nfe"] == row["plain_nfe"] > 0
        assert len(row["ratios"]) == 1
    assert len(told) == len(report.raw)


# --- memory ---------------------------------------------------------------------------------------


# All four in one process: where the peak can be set back, as on Linux, that changes nothing, and
# the libraries are started once.
MEASURE_ALL = """
import json, torch
from torchdyn_snopt.experiments.bench.memory_worker import measure_step
jobs = [(name, rtol) for name in ("autograd", "snopt") for rtol in (1e-3, 1e-8)]
print(json.dumps([measure_step(*job, 1024, torch.device("cpu")) for job in jobs]))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="needs Linux's /proc/self/clear_refs")
def test_growth_with_the_number_of_steps_is_seen_where_there_is_one():
    finished = subprocess.run(
        [sys.executable, "-c", MEASURE_ALL],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **ALLOCATOR},
    )
    loose, tight, loose_snopt, tight_snopt = json.loads(finished.stdout.splitlines()[-1])
    assert tight["bytes"] > 2 * loose["bytes"]
    assert tight_snopt["nfe"] > 3 * loose_snopt["nfe"]
    assert 0 < tight_snopt["bytes"] < 1.05 * loose_snopt["bytes"]


def test_a_measuring_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr("torchdyn_snopt.experiments.bench.memory.WORKER", "no_such_module")
    with pytest.raises(
        MeasurementError, match=r"(?s)exit status 1.*No module named no_such_module"
    ):
        measure("snopt", LOOSE, 4, CPU)


def test_the_memory_report_compares_medians(monkeypatch):
    peaks = iter([100e6, 300e6, 200e6, 201e6, 202e6, 203e6])

    def fake(sensitivity, tolerance, batch, device):
        return {"bytes": next(peaks), "nfe": round(1 / tolerance)}

    monkeypatch.setattr("torchdyn_snopt.experiments.bench.memory.measure", fake)
    report = bench_memory(3, CPU, lambda text: None, sensitivities=["snopt"])
    assert report.tables[0].body == [["snopt", "1000", "100000000", "200.0", "202.0", "+1.0%"]]
    assert len(report.raw) == 6
