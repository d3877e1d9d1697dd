"""Several workers on one storage, one of which is killed in mid-trial."""

from __future__ import annotations

import os
import signal

import pytest
from optuna.trial import TrialState

from tests.search.toy import (
    PLACES,
    SETTINGS,
    SHARED,
    SHARED_PLACES,
    build_model,
    finish,
    outcomes,
    run,
    start_worker,
    train,
    wait_for,
)
from torchdyn_snopt.search import HorizonSearch, open_storage
from torchdyn_snopt.search.liveness import PULSE, WORKER, Watch, this_worker
from torchdyn_snopt.search.plan import ABANDONED


def check(url, name, out, alone):
    """Exactly the planned trials ended, as if one worker had done everything undisturbed."""
    search = HorizonSearch(open_storage(url, shared=True), name, SHARED, out)
    comparison = search.comparison()
    assert comparison.ended == comparison.planned == SHARED_PLACES
    assert outcomes(comparison) == outcomes(alone)
    abandoned = [r for r in comparison.records if r.state == "abandoned"]
    trials = [t for size in (1, 2) for t in search.load(size).trials]
    finished = [t for t in trials if t.state in {TrialState.COMPLETE, TrialState.PRUNED}]
    assert len(finished) == SHARED_PLACES
    assert not [t for t in trials if t.state is TrialState.RUNNING]
    return abandoned, {t.user_attrs[WORKER] for t in finished}


@pytest.mark.slow
@pytest.mark.timeout(300)  # of a busy machine; on a free one some seconds
@pytest.mark.parametrize("storage", ["journal", "postgresql"])
def test_three_workers_one_of_them_killed(storage, tmp_path, request):
    if storage == "postgresql":
        url = request.getfixturevalue("postgresql")
    else:
        url = f"journal:{tmp_path / 'study.journal'}"
    alone = run(tmp_path / "alone", SHARED)

    victim = start_worker(url, "killed", tmp_path, trap="gradient/0")
    wait_for(tmp_path / "caught", [victim])
    others = [start_worker(url, "killed", tmp_path) for _ in range(2)]
    os.kill(victim.pid, signal.SIGKILL)
    finish(others)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL

    abandoned, workers = check(url, "killed", tmp_path, alone)
    died = [r for r in abandoned if r.reason == "its worker died"]
    assert [r.place.key for r in died] == ["gradient/0/0"]
    assert died[0].last("epoch") == 1  # what it has cost until then is counted
    assert len(workers) >= 2

    # The same study a second time, by three workers from the start.
    second = [start_worker(url, "again", tmp_path) for _ in range(3)]
    finish(second)
    abandoned, _ = check(url, "again", tmp_path, alone)
    assert all("added at the same moment" in r.reason for r in abandoned)


def opened(tmp_path):
    storage = open_storage(f"journal:{tmp_path / 'study.journal'}", shared=True)
    return HorizonSearch(storage, "toy", SETTINGS, tmp_path)


def begun_elsewhere(search, worker):
    """A first trial that runs in the hands of a given worker."""
    stops = iter([False, True])
    study = search.load(1)
    search.work(build_model, train, stop=lambda: next(stops, True))
    trial = next(t for t in study.trials if t.state is TrialState.WAITING or t.user_attrs)
    template = trial.user_attrs
    trial_id = search.storage.create_new_trial(study._study_id)
    for name, value in {**template, WORKER: worker, PULSE: 3}.items():
        if name != ABANDONED:
            search.storage.set_trial_user_attr(trial_id, name, value)
    return trial_id


def test_a_trial_of_a_distant_worker_is_taken_over_when_its_pulse_stands_still(tmp_path):
    search = opened(tmp_path)
    trial_id = begun_elsewhere(search, "elsewhere|boot|namespace|1")
    assert search.work(build_model, train, watch=Watch(grace=0.3))
    trial = search.storage.get_trial(trial_id)
    assert (trial.state, trial.user_attrs[ABANDONED]) == (TrialState.FAIL, "its worker died")
    assert search.comparison().ended == PLACES


def test_a_place_that_costs_three_workers_is_failed(tmp_path):
    search = opened(tmp_path)
    for _ in range(3):
        begun_elsewhere(search, "elsewhere|boot|namespace|1")
        watch = Watch(grace=-1.0)
        stops = iter([False, True])
        search.work(build_model, train, watch=watch, stop=lambda s=stops: next(s, True))
    assert search.work(build_model, train, watch=Watch(grace=0.1))
    failed = [r for r in search.comparison().records if r.state == "fail"]
    assert [(r.place.key, r.reason) for r in failed] == [
        ("policy/0/0", "3 workers died in this trial")
    ]


def test_a_worker_that_was_given_up_drops_its_result(tmp_path):
    search = opened(tmp_path)
    other = opened(tmp_path)
    taken = []

    def slow(model, choice, report):
        if not taken:
            running = next(t for t in other.load(1).trials if t.state is TrialState.RUNNING)
            other.storage.set_trial_user_attr(running._trial_id, ABANDONED, "its worker died")
            other.storage.set_trial_state_values(running._trial_id, TrialState.FAIL)
            taken.append(running.number)
        train(model, choice, report)

    assert search.work(build_model, slow)
    assert taken == [0]
    assert outcomes(search.comparison()) == outcomes(run(tmp_path / "alone"))


def test_the_own_process_is_no_dead_worker(tmp_path):
    search = opened(tmp_path)
    trial_id = begun_elsewhere(search, this_worker())
    trial = search.storage.get_trial(trial_id)
    assert not Watch().is_dead(trial)
    assert os.getpid() == int(this_worker().split("|")[-1])
