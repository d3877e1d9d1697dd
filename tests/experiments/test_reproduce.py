"""The reproductions on a task that trains in milliseconds, and their figures of merit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.experiments.tiny import BATCHES, TINY
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments import report
from torchdyn_snopt.experiments.curves import Run
from torchdyn_snopt.experiments.reproduce import REPRODUCTIONS, Request, fig10, get_reproduction
from torchdyn_snopt.experiments.reproduce.study import (
    PENALTY,
    differences,
    evaluations,
    interval,
    merit,
    ratios,
    seconds_per_iteration,
)


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch):
    """Those of the runs themselves are tested elsewhere."""
    monkeypatch.setattr(report, "draw_figures", lambda runs: {})


def made(seed, seconds, accuracy, nfe=(10, 8, 2), iterations=4):
    ones = np.ones(iterations)
    steps = {
        "iteration": np.arange(1.0, iterations + 1),
        "seconds": np.linspace(0, seconds, iterations + 1)[1:],
        "t1": ones,
        **{
            f"nfe_{part}": count * ones
            for part, count in zip(("forward", "backward", "update"), nfe, strict=True)
        },
    }
    header = {
        "config": {"seed": seed},
        "metric": "accuracy",
        "metric_unit": "%",
        "metric_scale": 100.0,
    }
    return Run(None, header, steps, {"test_accuracy": np.array([0.1, accuracy])}, "finished", None)


def test_ratios_and_differences_pair_the_seeds():
    fixed = [made(0, 8.0, 0.90), made(1, 4.0, 0.80), made(2, 1.0, 0.5)]
    learned = [made(1, 3.0, 0.81), made(0, 4.0, 0.89), made(7, 1.0, 0.1)]
    assert ratios(learned, fixed, seconds_per_iteration) == [0.75, 0.5]
    assert differences(learned, fixed) == [pytest.approx(1.0), pytest.approx(-1.0)]
    assert merit(fixed[0]) == pytest.approx(90.0)


def test_a_run_that_did_more_in_its_seconds_is_compared_by_iteration():
    assert ratios(
        [made(0, 8.0, 0.9, iterations=8)], [made(0, 8.0, 0.9)], seconds_per_iteration
    ) == [0.5]


def test_evaluations_count_those_of_the_policy():
    assert evaluations(made(0, 1.0, 0.9)) == 20.0


def test_the_interval_is_students():
    # Four values with standard deviation 1: half width 3.1824/2.
    values = [1 - 1.5**0.5, 1 + 1.5**0.5, 1.0, 1.0]
    assert interval(values, 3) == "1.000 ± 1.591"
    assert interval([2.0], 1) == "2.0"
    assert interval([], 1) == "–"


def test_the_spread_is_of_the_last_quarter():
    path = np.array([9.0, 5.0, 1.0, 3.0, 2.0, 2.0, 1.9, 2.0])
    assert fig10.spread(path) == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["fig10", "table5"])
def test_the_studies_of_the_horizon_keep_the_settings_that_they_were_measured_with(tmp_path, name):
    (spec,) = get_reproduction(name).suite(Request(TINY, tmp_path)).optimizers
    assert spec.settings(TINY) == {"preconditioner": "kfe_adam", "lr": 0.01}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("fig5", ["t1=0.05", "t1=0.1", "t1=0.2", "t1=0.4", "t1=0.6", "t1=0.8", "t1=1"]),
        (
            "fig10",
            [
                "policy from t1=1, c=3",
                "policy from t1=0.05, c=3",
                "gradient from t1=1, c=3",
                "gradient from t1=0.05, c=3",
            ],
        ),
        ("table5", ["t1=1", "gradient from t1=1, c=3", "policy from t1=1, c=3"]),
    ],
)
def test_a_reproduction_leaves_a_table_and_a_picture(tmp_path, name, rows):
    study = get_reproduction(name)
    request = Request(TINY, tmp_path, seeds=range(2), epochs=1)
    outcome = study.run(request)
    assert [row[0] for row in outcome.table.body] == rows
    assert {row[-1] for row in outcome.table.body} == {"2"}
    assert all(len(row) == len(outcome.table.head) for row in outcome.table.body)
    for ending in ("md", "csv", "png"):
        assert (tmp_path / f"{name}.{ending}").stat().st_size > 100
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert len(outcome.results) == 2 * len(rows)
    if name != "fig10":
        reference = next(row for row in outcome.table.body if row[0] == "t1=1")
        assert reference[1:3] == ["1.000 ± 0.000"] * 2


def test_a_study_goes_on_where_it_was_left(tmp_path):
    study = get_reproduction("table5")
    first = study.run(Request(TINY, tmp_path, seeds=range(1), epochs=1))
    with pytest.raises(InvalidInputError, match="already holds runs"):
        study.run(Request(TINY, tmp_path, seeds=range(1), epochs=1))
    second = study.run(Request(TINY, tmp_path, seeds=range(2), epochs=1, resume=True))
    assert {row[-1] for row in first.table.body} == {"1"}
    assert {row[-1] for row in second.table.body} == {"2"}


def test_the_budget_is_the_tasks_unless_another_is_asked_for(tmp_path):
    def budget(**limits):
        return REPRODUCTIONS["fig10"].suite(Request(TINY, tmp_path, **limits)).budget

    assert (budget().epochs, budget().seconds) == (TINY.epochs, None)
    assert (budget(seconds=3.0).epochs, budget(seconds=3.0).seconds) == (None, 3.0)
    assert budget(epochs=7).epochs == 7


def test_the_penalty_can_be_chosen(tmp_path):
    study = REPRODUCTIONS["fig10"]
    request = Request(TINY, tmp_path)
    assert {h.penalty for h in study.suite(request).horizons} == {PENALTY}
    chosen = dataclasses.replace(request, penalty=0.0)
    assert {h.penalty for h in study.suite(chosen).horizons} == {0.0}


def test_an_unknown_name_is_refused():
    with pytest.raises(InvalidInputError, match="fig5, fig10, table5"):
        get_reproduction("fig99")


def test_seconds_end_the_runs(tmp_path):
    study = get_reproduction("table5")
    outcome = study.run(Request(TINY, tmp_path, seeds=range(1), seconds=1e-9))
    assert {result.position.iteration for result in outcome.results} == {1}
    assert BATCHES > 1
