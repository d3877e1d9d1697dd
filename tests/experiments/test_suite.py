from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from tests.experiments.tiny import BATCHES, TINY
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments import report
from torchdyn_snopt.experiments.configuration import Budget
from torchdyn_snopt.experiments.curves import read_runs
from torchdyn_snopt.experiments.optimizers import parse_specs
from torchdyn_snopt.experiments.storage import locked_folder
from torchdyn_snopt.experiments.suite import Suite, run_suite


def suite_in(out, optimizers="adam,sgd", seeds=2, epochs=1, task=TINY):
    return Suite(task, parse_specs([optimizers]), range(seeds), Budget(epochs), out)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Pictures have tests of their own, and drawing them takes longer than these runs."""
    monkeypatch.setattr(report, "draw_figures", lambda runs: {})


def test_every_optimizer_runs_with_every_seed_in_a_folder_of_its_own(tmp_path):
    results, summary = run_suite(suite_in(tmp_path / "out"))
    assert [(r.config.optimizer.name, r.config.seed) for r in results] == [
        ("adam", 0),
        ("sgd", 0),
        ("adam", 1),
        ("sgd", 1),
    ]
    assert all(result.status == "finished" for result in results)
    assert [row.runs for row in summary.table.rows] == [2, 2]
    assert [path.name for path in summary.files] == ["table.md", "table.csv"]
    assert all(path.stat().st_size > 0 for path in summary.files)


def test_a_run_that_fails_is_counted_and_the_others_go_on(tmp_path):
    def loss(outputs, targets):
        value = nn.functional.cross_entropy(outputs, targets)
        return value if value < 1e3 else value * float("nan")

    task = dataclasses.replace(TINY, loss=loss)
    suite = suite_in(tmp_path / "out", "sgd:lr=1e9,adam", seeds=1, epochs=2, task=task)
    results, summary = run_suite(suite)
    assert [result.status for result in results] == ["failed", "finished"]
    failures = {row.label: len(row.failures) for row in summary.table.rows}
    assert failures == {"Adam": 0, "SGD lr=1e+09": 1}


def test_runs_that_are_there_are_neither_mixed_up_nor_lost(tmp_path):
    out = tmp_path / "out"
    run_suite(suite_in(out, "adam", seeds=1))
    log = (out / "adam" / "seed-0" / "log.jsonl").read_bytes()
    with pytest.raises(InvalidInputError, match=r"(?s)already holds runs.*--resume.*--overwrite"):
        run_suite(suite_in(out, "adam", seeds=1))
    assert (out / "adam" / "seed-0" / "log.jsonl").read_bytes() == log


def test_resuming_adds_seeds_optimizers_and_epochs(tmp_path):
    out = tmp_path / "out"
    run_suite(suite_in(out, "adam", seeds=1, epochs=1))
    run_suite(suite_in(out, "adam,sgd", seeds=2, epochs=2), resume=True)
    runs = read_runs(out)
    assert [(run.optimizer, run.seed) for run in runs] == [
        ("adam", 0),
        ("adam", 1),
        ("sgd", 0),
        ("sgd", 1),
    ]
    assert all(len(run.steps["iteration"]) == 2 * BATCHES for run in runs)


def test_overwriting_removes_earlier_runs_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    run_suite(suite_in(out, "adam,sgd", seeds=1))
    note = out / "sgd" / "seed-0" / "note.txt"
    note.write_text("mine")
    run_suite(suite_in(out, "adam", seeds=1), overwrite=True)
    assert [run.optimizer for run in read_runs(out)] == ["adam"]
    assert note.read_text() == "mine"


def test_a_folder_of_another_task_is_refused(tmp_path):
    out = tmp_path / "out"
    run_suite(suite_in(out, "adam", seeds=1))
    other = dataclasses.replace(TINY, name="other")
    with pytest.raises(InvalidInputError, match=r"(?s)another task.*with tiny.*runs of other"):
        run_suite(suite_in(out, "adam", seeds=1, task=other), resume=True)


@pytest.mark.parametrize("spec", ["adam,sgd:lr=-1", "adam,snopt:lr=-1", "adam,adam:betas=3"])
def test_settings_that_cannot_work_are_met_before_anything_runs(tmp_path, spec):
    with pytest.raises(InvalidInputError):
        run_suite(suite_in(tmp_path / "out", spec))
    assert not (tmp_path / "out").exists()


def test_two_suites_in_one_folder_are_refused(tmp_path):
    out = tmp_path / "out"
    with locked_folder(out), pytest.raises(InvalidInputError, match="another run is writing"):
        run_suite(suite_in(out))
