"""The objective as a plain callable of any study, and how trials end."""

from __future__ import annotations

import json
import math

import optuna
import pytest
import torch
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta
from optuna.trial import TrialState

from tests.search.toy import build_model, progress, train
from torchdyn_snopt.errors import InvalidInputError, SolverError, UnsupportedError
from torchdyn_snopt.search import (
    Choice,
    Guards,
    HorizonObjective,
    Penalized,
    Tradeoff,
    fixed_t1,
    joint,
    one_run,
)
from torchdyn_snopt.search.spaces import grid_t1


def optimize(objective, trials=4, directions=("minimize",), **settings):
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(directions=list(directions), sampler=sampler, **settings)
    study.optimize(objective, n_trials=trials)
    return study


def failing(error, after=1):
    def train(model, choice, report):
        for epoch in range(1, after + 1):
            report(progress(choice, epoch))
        raise error

    return train


# --- values ---------------------------------------------------------------------------------------


def test_the_value_is_error_and_weighted_evaluations_of_the_last_epoch():
    study = optimize(HorizonObjective(build_model, train, values=Penalized(0.01)))
    for trial in study.trials:
        last = progress(Choice("fixed", trial.params["t1"]), 4)
        assert trial.value == pytest.approx(last.error + 0.01 * last.nfe, rel=1e-12)
        assert trial.user_attrs["evaluations"] == last.evaluations
        assert [row["epoch"] for row in trial.user_attrs["history"]] == [1, 2, 3, 4]
        assert set(trial.intermediate_values) == {1, 2, 3, 4}


@pytest.mark.parametrize("cost", ["nfe", "seconds"])
def test_two_values_for_two_directions(cost):
    objective = HorizonObjective(build_model, train, space=joint(), values=Tradeoff(cost))
    study = optimize(objective, directions=("minimize", "minimize"))
    for trial in study.trials:
        row = trial.user_attrs["history"][-1]
        assert trial.values == [row["error"], row[cost]]
        assert set(trial.params) == {"start t1", "penalty", "lr", "damping"}


def test_directions_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedError, match="two with Tradeoff"):
        optimize(HorizonObjective(build_model, train), directions=("minimize", "minimize"))


def test_every_trial_of_a_seed_starts_from_the_same_weights():
    drawn = []
    objective = HorizonObjective(
        lambda choice: drawn.append(torch.rand(3)) or build_model(choice), train, seed=5
    )
    optimize(objective, trials=2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    assert all(torch.equal(each, expected) for each in drawn)


# --- endings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        SolverError("it exploded", phase="forward", t=0.5, dt=0.1, steps=3, norms={}),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError("no memory"),
        torch.linalg.LinAlgError("singular"),
        ZeroDivisionError("division by zero"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("values", [Penalized(), Tradeoff()], ids=["one", "two"])
def test_failures_end_the_trial_and_not_the_study(error, values):
    size = 1 if isinstance(values, Penalized) else 2
    objective = HorizonObjective(build_model, failing(error), values=values)
    study = optimize(objective, trials=2, directions=("minimize",) * size)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 2
    reason = study.trials[0].user_attrs["reason"]
    assert reason.startswith(type(error).__name__)
    assert str(error).splitlines()[0] in reason
    assert len(study.trials[0].user_attrs["history"]) == 1


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), KeyError("x")])
def test_defects_are_raised(error):
    with pytest.raises(type(error)):
        optimize(HorizonObjective(build_model, failing(error)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_error_that_is_not_finite_fails_the_trial(bad):
    def train(model, choice, report):
        report(progress(choice, 1, error=bad))

    (trial,) = optimize(HorizonObjective(build_model, train), trials=1).trials
    assert trial.state is TrialState.FAIL
    assert "not finite" in trial.user_attrs["reason"]
    assert trial.user_attrs["history"][0]["error"] is None


def test_training_without_a_report_fails_the_trial():
    objective = HorizonObjective(build_model, lambda model, choice, report: None)
    (trial,) = optimize(objective, trials=1).trials
    assert "without a report" in trial.user_attrs["reason"]


@pytest.mark.parametrize("size", [1, 2])
def test_guards_prune_with_one_value_and_with_two(size):
    values = (Penalized(), Tradeoff())[size - 1]
    guards = Guards(seconds=0.25)
    objective = HorizonObjective(build_model, train, values=values, guards=guards)
    study = optimize(objective, trials=2, directions=("minimize",) * size)
    for trial in study.trials:
        assert trial.state is TrialState.PRUNED
        assert len(trial.user_attrs["history"]) == 3  # 0.1 s an epoch
        assert "above the guard of 0.25" in trial.user_attrs["reason"]


def test_the_studys_pruner_is_asked_after_every_epoch():
    class Second(optuna.pruners.BasePruner):
        def prune(self, study, trial):
            return trial.last_step == 2

    study = optimize(HorizonObjective(build_model, train), pruner=Second())
    assert [trial.state for trial in study.trials] == [TrialState.PRUNED] * 4
    assert all(len(trial.user_attrs["history"]) == 2 for trial in study.trials)


# --- artifacts ------------------------------------------------------------------------------------


def test_every_trial_keeps_its_log_and_the_best_one_its_checkpoint(tmp_path):
    store = FileSystemArtifactStore(str(tmp_path))
    study = optimize(HorizonObjective(build_model, train, artifacts=store), trials=6)
    kept = {
        trial.number: {m.filename: m for m in get_all_artifact_meta(trial, storage=study._storage)}
        for trial in study.trials
    }
    assert all("log.jsonl" in files for files in kept.values())
    assert "checkpoint.pt" in kept[study.best_trial.number]
    worse = [t.number for t in study.trials if t.value > study.trials[0].value]
    assert not any("checkpoint.pt" in kept[number] for number in worse)
    meta = kept[study.best_trial.number]
    lines = (tmp_path / meta["log.jsonl"].artifact_id).read_text().splitlines()
    assert [json.loads(line).get("epoch") for line in lines] == [None, 1, 2, 3, 4]
    state = torch.load(tmp_path / meta["checkpoint.pt"].artifact_id)
    assert state == {"t1": study.best_params["t1"]}


# --- spaces ---------------------------------------------------------------------------------------


def test_spaces_are_functions_of_the_trial():
    trial = optuna.trial.FixedTrial(
        {"t1": 0.5, "start t1": 2.0, "penalty": 0.01, "lr": 0.01, "damping": 1e-8}
    )
    assert fixed_t1(0.1, 3.0)(trial) == Choice("fixed", 0.5)
    assert one_run("policy", 0.7, penalty=0.2)(trial) == Choice(
        "policy", 0.7, 0.2, bounds=(0.05, 3.0)
    )
    assert joint()(trial) == Choice("policy", 2.0, 0.01, 0.01, 1e-8, (0.05, 3.0))


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("space", [fixed_t1, joint])
def test_bounds_without_positive_times_are_refused(space, bounds):
    with pytest.raises(InvalidInputError, match="no interval"):
        space(*bounds)


def test_an_unknown_mode_is_refused():
    with pytest.raises(InvalidInputError, match="fixed, policy, gradient"):
        Choice("free", 1.0)


def test_the_grid_is_nested_and_even():
    points = [grid_t1(index, 0.1, 10.0) for index in range(7)]
    shares = [math.log10(point) / 2 + 0.5 for point in points]
    assert shares == pytest.approx([4 / 8, 2 / 8, 6 / 8, 1 / 8, 5 / 8, 3 / 8, 7 / 8], abs=1e-12)
