from __future__ import annotations

import os
import pickle
import random
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.storage import (
    HOLDER_NAME,
    LOCK_NAME,
    load_checkpoint,
    locked_folder,
    random_state,
    replacing,
    restore_random_state,
    save_checkpoint,
    write_text,
)

CPU = torch.device("cpu")


def test_a_file_is_replaced_whole_and_readable_for_others(tmp_path):
    path = tmp_path / "table.md"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ordinary", "table.md"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "checkpoint.pt"
    write_text(path, "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n", encoding="utf-8")
            raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        fail()
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_comes_back(tmp_path):
    path = tmp_path / "checkpoint.pt"
    content = {"w": torch.arange(3.0), "n": 2, "random": random_state(CPU)}
    save_checkpoint(path, content)
    loaded = load_checkpoint(path, CPU)
    assert torch.equal(loaded["w"], content["w"])
    assert loaded["n"] == 2
    assert loaded["random"]["python"] == random.getstate()


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_that_would_execute_something_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    torch.save({"w": Payload()}, path)
    with pytest.raises(InvalidInputError, match=r"(?s)cannot be read.*checkpoint\.pt"):
        load_checkpoint(path, CPU)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_checkpoint(path, CPU)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_cut_short_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"w": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_checkpoint(path, CPU)


def test_random_generators_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand(2).tolist()  # noqa: NPY002

    save_checkpoint(tmp_path / "state.pt", random_state(CPU))
    expected = draw()
    draw()
    restore_random_state(load_checkpoint(tmp_path / "state.pt", CPU), CPU)
    assert draw() == expected


# --- the lock on a folder -------------------------------------------------------------------------

HOLDER = """
import os, sys, time
from pathlib import Path
import filelock
folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
lock = filelock.FileLock(folder / sys.argv[2])
lock.acquire(timeout=0)
(folder / sys.argv[3]).write_text(str(os.getpid()))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder, as a run does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out"), LOCK_NAME, HOLDER_NAME],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_with_the_process_that_holds_it(tmp_path, holder):
    message = rf"(?s)another run.*held by process {holder.pid}.*--out"
    with pytest.raises(InvalidInputError, match=message), locked_folder(tmp_path / "out"):
        pytest.fail("the lock was granted twice")


def test_a_lock_dies_with_its_process(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked_folder(tmp_path / "out"):
        assert (tmp_path / "out" / HOLDER_NAME).read_text() == str(os.getpid())


def test_a_folder_is_free_again_after_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError), locked_folder(tmp_path / "out"):
        raise ZeroDivisionError
    with locked_folder(tmp_path / "out"):
        pass
    assert not (tmp_path / "out" / HOLDER_NAME).exists()
