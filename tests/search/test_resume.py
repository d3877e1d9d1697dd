"""A search that is stopped and started again equals one that was not."""

from __future__ import annotations

import dataclasses

import optuna
import pytest
from optuna.trial import TrialState

from tests.search.toy import PLACES, SETTINGS, memory, outcomes, run, train
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.search.plan import ABANDONED


class Stops:
    """Becomes true at the n-th question."""

    def __init__(self, after):
        self.left = after

    def __call__(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("after", [1, 2, 3, 60, 61, 100])
def test_stopped_between_and_within_trials(after, tmp_path):
    whole = run(tmp_path / "whole")
    storage = memory()
    part = run(tmp_path / "part", storage=storage, stop=Stops(after))
    assert part.ended < PLACES
    again = run(tmp_path / "part", storage=storage)
    assert again.ended == again.planned == PLACES
    assert outcomes(again) == outcomes(whole)
    assert {r.reason for r in again.records if r.state == "abandoned"} <= {"stopped by the user"}


def test_an_interrupt_leaves_no_trial_that_seems_to_run(tmp_path):
    def interrupted(model, choice, report):
        if choice.mode == "fixed":
            raise KeyboardInterrupt
        train(model, choice, report)

    storage = memory()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, train=interrupted, storage=storage)
    study = optuna.load_study(study_name="horizon", storage=storage.storage)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2 + [TrialState.FAIL]
    assert study.trials[-1].user_attrs[ABANDONED] == "stopped by the user"
    again = run(tmp_path, storage=storage)
    assert outcomes(again) == outcomes(run(tmp_path / "whole"))


def test_trials_are_a_total_and_a_finished_search_adds_nothing(tmp_path):
    arms, out = ("policy", "tpe"), tmp_path / "out"
    few, many = (dataclasses.replace(SETTINGS, arms=arms, trials=n) for n in (2, 5))
    first = run(out, few, storage=None)  # an SQLite file in the folder
    assert first.ended == first.planned == 1 + 2
    again = run(out, few, storage=None)
    assert [r.number for r in again.records] == [r.number for r in first.records]
    more = run(out, many, storage=None)
    assert more.ended == 1 + 5
    assert outcomes(more) == outcomes(run(tmp_path / "whole", many))


def test_arms_and_seeds_may_be_added(tmp_path):
    storage, first = memory(), dataclasses.replace(SETTINGS, arms=("policy", "tpe"))
    run(tmp_path, first, storage=storage)
    second = dataclasses.replace(SETTINGS, arms=("joint", "grid"), seeds=2)
    grown = run(tmp_path, second, storage=storage)
    assert grown.settings.arms == ("policy", "tpe", "joint", "grid")
    assert grown.ended == grown.planned == 2 * (1 + 3 * 7)


def test_other_settings_are_refused_with_both_values(tmp_path):
    storage, one = memory(), dataclasses.replace(SETTINGS, arms=("policy",))
    run(tmp_path, one, storage=storage)
    with pytest.raises(InvalidInputError, match=r"nfe_weight=0\.5[\s\S]*nfe_weight=0\.001"):
        run(tmp_path, dataclasses.replace(one, nfe_weight=0.5), storage=storage)


def test_no_trial_is_begun_after_the_time_is_up(tmp_path):
    assert run(tmp_path, seconds=0.0).ended == 0


def test_the_number_of_the_batch_does_not_reach_one_run_arms(tmp_path):
    wide = run(tmp_path / "a", dataclasses.replace(SETTINGS, arms=("policy",), batch=5))
    narrow = run(tmp_path / "b", dataclasses.replace(SETTINGS, arms=("policy",), batch=1))
    assert outcomes(wide) == outcomes(narrow)
