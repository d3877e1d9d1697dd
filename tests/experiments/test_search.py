"""Tasks as problems of a horizon search, and the command, on tasks that train in milliseconds."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from optuna.trial import TrialState
from typer.testing import CliRunner

from tests.experiments.tiny import TINY
from torchdyn_snopt import cli
from torchdyn_snopt.experiments import search as rooms
from torchdyn_snopt.experiments.horizons import STUDIED
from torchdyn_snopt.experiments.meters import SolveMeter
from torchdyn_snopt.experiments.search import TaskProblem, hold_out
from torchdyn_snopt.experiments.tasks import TASKS, Samples
from torchdyn_snopt.search import Choice, TrialFailedError, open_storage, settings_of
from torchdyn_snopt.search import report as reports
from torchdyn_snopt.search.compare import HorizonSearch

CPU = torch.device("cpu")
EPOCHS = 5  # beyond the policy's warm-up
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(TASKS, "tiny", TINY)


@pytest.fixture
def _no_pictures(monkeypatch):
    monkeypatch.setattr(reports, "plot_comparison", lambda comparison: {})


@pytest.fixture
def problem():
    return TaskProblem(TINY, EPOCHS, CPU, None)


def trained(problem, choice):
    run, reported = problem.build_model(choice), []
    meter = SolveMeter(run.model)
    problem.train(run, choice, reported.append)
    return run, reported, meter


# --- problem --------------------------------------------------------------------------------------


def test_validation_data_are_held_out_of_the_training_data():
    samples = Samples(torch.arange(40.0), torch.arange(40.0))
    splits = hold_out(samples)
    assert (len(splits.train), len(splits.test)) == (30, 10)
    assert sorted([*splits.train.x.tolist(), *splits.test.x.tolist()]) == samples.x.tolist()
    assert torch.equal(hold_out(samples).test.x, splits.test.x)
    assert torch.equal(splits.test.x, splits.test.y)


@pytest.mark.parametrize("mode", ["fixed", "policy", "gradient"])
def test_every_evaluation_is_counted_and_t1_moves_where_it_should(problem, mode):
    choice = Choice(mode, 0.8, penalty=0.5, seed=3)
    run, reported, meter = trained(problem, choice)
    assert [progress.epoch for progress in reported] == [1, 2, 3, 4, 5]
    assert reported[-1].evaluations == meter.evaluations()
    assert (reported[-1].t1 == pytest.approx(0.8)) == (mode == "fixed")
    assert 0.0 <= reported[-1].error <= 1.0
    before = meter.evaluations()
    run.evaluate(problem.splits.test)
    batches = -(-len(problem.splits.test) // TINY.eval_batch_size)
    assert (meter.evaluations() - before) / batches == pytest.approx(reported[-1].nfe, abs=6)
    assert not run.folder.exists()


def test_arms_of_a_seed_share_weights_and_runs_repeat(problem):
    first = problem.build_model(Choice("fixed", 0.5, seed=1)).model.state_dict()
    second = problem.build_model(Choice("policy", 2.0, seed=1)).model.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first if not k.endswith("t1"))
    choice = Choice("policy", 1.0, seed=2)
    again = [[(p.error, p.t1, p.loss) for p in trained(problem, choice)[1]] for _ in range(2)]
    assert again[0] == again[1]


def test_choices_reach_the_optimizer_and_bounds_the_horizon(problem):
    run = problem.build_model(Choice("policy", 0.4, 0.1, 0.02, 1e-6, bounds=(0.3, 0.5)))
    group = run.optimizer.param_groups[0]
    assert (group["lr"], group["damping"]) == (0.02, 1e-6)
    assert group["preconditioner"] == "kfe_adam"
    (horizon,) = [m for m in run.model.modules() if hasattr(m, "spec") and hasattr(m, "t1")]
    assert horizon.spec.bounds == (0.3, 0.5)
    assert horizon.spec.penalty == 0.1


def test_the_policy_trains_as_the_studies_of_the_horizon_do(problem):
    group = problem.build_model(Choice("policy", 1.0)).optimizer.param_groups[0]
    assert {name: group[name] for name in STUDIED} == {"preconditioner": "kfe_adam", "lr": 0.01}
    assert problem.build_model(Choice("fixed", 1.0)).config.optimizer.chosen == {}


def test_a_failed_run_says_why(problem):
    with pytest.raises(TrialFailedError, match=r"NonFiniteLossError|SolverError"):
        trained(problem, Choice("policy", 1.0, lr=1e30))


# --- command --------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["search", *map(str, arguments)])


def plain(text):
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", "", text))


def test_the_command_ends_with_table_report_and_pictures_and_adds_nothing_again(tmp_path):
    options = ["tiny", "--arms", "policy,tpe", "--arms", "joint", "--trials", 2, "--epochs", 1]
    result = invoke(*options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "[1/5] SNOpt policy (one run), seed 0, no. 0: complete" in result.output
    assert "5 of 5 trials" in plain(result.output)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"report.md", "trials.csv", "comparison.png", "study.db", "artifacts"}
    assert "Nothing was added" not in result.output

    again = invoke("tiny", "--out", tmp_path)
    assert again.exit_code == 0, again.output
    assert "Nothing was added: all 5 trials of study 'tiny' had ended" in again.output
    assert "complete  error" not in again.output


@pytest.mark.usefixtures("_no_pictures")
def test_the_settings_of_the_study_hold_for_later_starts(tmp_path):
    options = ["tiny", "--arms", "policy,tpe", "--trials", 1, "--epochs", 1, "--penalty", 0.3]
    assert invoke(*options, "--out", tmp_path).exit_code == 0
    grown = invoke("tiny", "--trials", 2, "--out", tmp_path)
    assert "3 of 3 trials" in plain(grown.output)
    other = invoke("tiny", "--penalty", 0.4, "--out", tmp_path)
    assert other.exit_code == 2
    assert "penalty=0.3" in other.output


@pytest.mark.usefixtures("_no_pictures")
def test_no_time_leaves_a_search_that_goes_on(tmp_path):
    options = ["tiny", "--arms", "policy", "--epochs", 1, "--out", tmp_path]
    stopped = invoke(*options, "--seconds", 0)
    assert stopped.exit_code == 0
    assert "The time is up; nothing is lost." in stopped.output
    assert "1 of 1 trials" in plain(invoke(*options).output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms", "policy,bayes"], "there is no such arm"),
        (["--storage", "sqlite:///x.db", "--jobs", 2], "serves one process only"),
        (["--storage", "sqlite:///x.db", "--worker"], "serves one process only"),
        (["--storage", "nonsense"], "the storage is no URL"),
    ],
)
def test_wrong_requests_are_answered_by_a_sentence(tmp_path, options, message):
    result = invoke("tiny", *options, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in plain(result.output)


def test_the_own_failures_of_a_problem_do_not_end_the_search(tmp_path, monkeypatch):
    train = TaskProblem.train

    def diverging(self, run, choice, report):
        if choice.mode == "fixed":
            raise TrialFailedError("it diverged")
        train(self, run, choice, report)

    monkeypatch.setattr(TaskProblem, "train", diverging)
    options = ["--arms", "policy,tpe", "--trials", 2, "--epochs", 1, "--out", tmp_path]
    result = invoke("tiny", *options)
    assert result.exit_code == 0, result.output
    assert result.output.count("fail    (it diverged)") == 2
    assert "it diverged" in (tmp_path / "report.md").read_text()


def start(tmp_path, *options):
    command = [sys.executable, "-m", "torchdyn_snopt", "search", "moons", "--out", tmp_path]
    return subprocess.Popen(
        [str(word) for word in [*command, *options]],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ctrl_c_leaves_a_study_that_two_jobs_finish(tmp_path):
    journal = f"journal:{tmp_path / 'study.journal'}"
    options = ["--arms", "policy,tpe", "--trials", 3, "--epochs", 2, "--storage", journal]
    first = start(tmp_path, *options, "--epochs", 2)
    search = None
    until = time.monotonic() + 120
    while search is None or not search.comparison().ended:
        assert time.monotonic() < until
        assert first.poll() is None
        time.sleep(0.1)
        storage = open_storage(journal)
        settings = settings_of(storage, "moons")
        if settings is not None:
            search = HorizonSearch(storage, "moons", settings, tmp_path)
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == rooms.INTERRUPTED, said
    assert "Stopped; nothing is lost. To go on:" in said

    second = start(tmp_path, *options, "--jobs", 2)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 0, said
    comparison = search.comparison()
    assert comparison.ended == comparison.planned == 4
    trials = search.load(1).trials
    assert not [t for t in trials if t.state in {TrialState.RUNNING, TrialState.WAITING}]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_dashboard_stays_after_the_search_until_ctrl_c(tmp_path):
    pytest.importorskip("optuna_dashboard", reason="the extra 'dashboard' is not installed")
    process = start(tmp_path, "--arms", "policy,joint", "--trials", 1, "--epochs", 1, "--dashboard")
    said = ""
    while "the dashboard stays" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    (address,) = set(re.findall(r"http://127\.0\.0\.1:\d+/dashboard", said))
    with urllib.request.urlopen(address.replace("dashboard", "api/studies"), timeout=20) as answer:
        studies = json.load(answer)["study_summaries"]
    assert {study["study_name"] for study in studies} == {"moons", "moons (joint)"}
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "2 of 2 trials" in plain(said)
