"""Which storages are opened, which are refused, and who counts as dead."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import optuna
import pytest
from optuna.storages import InMemoryStorage, JournalStorage
from optuna.trial import TrialState

from torchdyn_snopt.errors import InvalidInputError, UnsupportedError
from torchdyn_snopt.search import default_url, open_storage
from torchdyn_snopt.search.liveness import PULSE, WORKER, Pulse, Watch, this_worker


def test_one_process_gets_sqlite_and_several_a_journal(tmp_path):
    assert default_url(tmp_path, workers=1) == f"sqlite:///{tmp_path / 'study.db'}"
    url = default_url(tmp_path, workers=2)
    assert url == f"journal:{tmp_path / 'study.journal'}"
    assert isinstance(open_storage(url, shared=True).storage, JournalStorage)
    # Once begun on a journal, the search goes on there with one process, too.
    assert default_url(tmp_path, workers=1) == url


def test_sqlite_is_created_with_its_folder(tmp_path):
    opened = open_storage(f"sqlite:///{tmp_path / 'deep' / 'study.db'}")
    optuna.create_study(storage=opened.storage)
    assert (tmp_path / "deep" / "study.db").exists()


def test_sqlite_with_several_workers_is_refused_with_the_reason(tmp_path):
    with pytest.raises(UnsupportedError, match=r"one process only[\s\S]*database is locked"):
        open_storage(f"sqlite:///{tmp_path / 'study.db'}", shared=True)


def test_what_is_no_url_is_refused():
    with pytest.raises(InvalidInputError, match="no URL"):
        open_storage("study.db")


def test_a_server_that_does_not_answer_is_named_without_its_password(monkeypatch):
    pytest.importorskip("psycopg")
    monkeypatch.setattr("torchdyn_snopt.search.storage.OPENING_PAUSE", 0.0)
    with pytest.raises(InvalidInputError) as caught:
        open_storage("postgresql://somebody:secret@127.0.0.1:1/nothing")
    assert "cannot be opened" in str(caught.value)
    assert "secret" not in str(caught.value)


def _hold(path, held, go):
    storage = open_storage(f"journal:{path}").storage
    storage._backend._lock.acquire()
    held.set()
    go.wait()
    os.kill(os.getpid(), 9)


def test_a_killed_process_does_not_keep_the_journal(tmp_path):
    context = multiprocessing.get_context("fork")
    held, go = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "journal", held, go))
    process.start()
    assert held.wait(20)
    go.set()
    process.join(20)
    assert process.exitcode == -9
    storage = open_storage(f"journal:{tmp_path / 'journal'}").storage
    optuna.create_study(storage=storage)  # Optuna's own lock would wait for 30 s


# --- liveness -------------------------------------------------------------------------------------


@pytest.fixture
def running():
    storage = InMemoryStorage()
    study = optuna.create_study(storage=storage)
    return storage, study.ask()._trial_id


def marked(running, worker, pulse):
    storage, trial_id = running
    storage.set_trial_user_attr(trial_id, WORKER, worker)
    storage.set_trial_user_attr(trial_id, PULSE, pulse)
    return storage.get_trial(trial_id)


def test_a_pulse_that_stands_still_for_longer_than_the_grace(running):
    now = [1000.0]
    watch = Watch(grace=30.0, clock=lambda: now[0])
    trial = marked(running, "far|boot|pid|7", 1)
    assert not watch.is_dead(trial)
    now[0] += 29.0
    assert not watch.is_dead(trial)
    trial = marked(running, "far|boot|pid|7", 2)  # it beats
    assert not watch.is_dead(trial)
    now[0] += 30.0
    assert not watch.is_dead(trial)
    now[0] += 1.0
    assert watch.is_dead(trial)


def test_a_trial_that_was_claimed_by_a_worker_that_died_at_once(running):
    now = [0.0]
    watch = Watch(grace=30.0, clock=lambda: now[0])
    trial = running[0].get_trial(running[1])
    assert not watch.is_dead(trial)
    now[0] = 31.0
    assert watch.is_dead(trial)


def test_a_process_of_this_machine_that_is_gone(running):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    place, _, _ = this_worker().rpartition("|")
    assert Watch().is_dead(marked(running, f"{place}|{gone.pid}", 0))
    assert not Watch().is_dead(marked(running, f"elsewhere{place}|{gone.pid}", 0))
    assert not Watch().is_dead(marked(running, this_worker(), 0))


def test_the_pulse_beats_and_notices_that_the_trial_was_taken(running):
    storage, trial_id = running
    with Pulse(storage, trial_id, interval=0.01) as pulse:
        while storage.get_trial(trial_id).user_attrs[PULSE] < 3:
            pass
        storage.set_trial_state_values(trial_id, TrialState.FAIL)
        pulse._thread.join(timeout=20)
    assert pulse.lost
    assert storage.get_trial(trial_id).user_attrs[WORKER] == this_worker()
