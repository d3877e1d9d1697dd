"""`torchdyn-snopt train` under torchrun: one run on two processes, and what happens if one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.training.test_ranks import ROOT, environment, torchrun
from torchdyn_snopt.experiments.runlog import read_log

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

LIMIT = 30.0  # seconds for a job to end after one of its processes has died


def train(*options: object, optimizer: str = "snopt") -> list[str]:
    command = ["-m", "torchdyn_snopt", "train", "moons", "--optimizer", optimizer]
    return [*command, *map(str, options)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )


def records(out: Path, kind: str) -> list[dict[str, float]]:
    path = next(iter(out.glob("*/seed-0/log.jsonl")), None)
    return [] if path is None else [r for r in read_log(path) if r["kind"] == kind]


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def test_two_processes_train_one_run(tmp_path: Path) -> None:
    """The batches are those of a single process, and so are the losses, up to the solver's error:
    each process chooses its own steps."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    options, optimizer = ("--epochs", 2, "--out"), "snopt:preconditioner=kfe_adam"
    done = run(torchrun(*train(*options, both, optimizer=optimizer)))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Table and pictures") == 1
    assert run([sys.executable, *train(*options, alone, optimizer=optimizer)]).returncode == 0
    for kind, count in (("step", 16), ("epoch", 2), ("end", 1)):
        assert len(records(both, kind)) == len(records(alone, kind)) == count
    pairs = list(zip(records(both, "step"), records(alone, "step"), strict=True))
    for number, (ours, theirs) in enumerate(pairs):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4 if number == 0 else 2e-2)
    assert (both / "table.md").exists()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_process_that_dies_ends_the_job_which_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = torchrun(*train("--epochs", 500, "--out", out))
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    ) as launcher:
        begun = time.monotonic()
        while len(records(out, "step")) < 20:  # past the checkpoint of an epoch
            assert launcher.poll() is None
            assert time.monotonic() - begun < 120
            time.sleep(0.1)
        os.kill(workers(launcher)[-1], signal.SIGKILL)
        killed = time.monotonic()
        _, errors = launcher.communicate(timeout=120)
        seconds = time.monotonic() - killed
    assert launcher.returncode != 0
    print(f"ended {seconds:.1f} s after the process had died")  # noqa: T201
    assert seconds < LIMIT  # what is promised to whoever waits for the job
    assert "SIGKILL" in errors
    assert not records(out, "end")
    done = run(torchrun(*train("--epochs", 4, "--out", out, "--resume")))
    assert done.returncode == 0, done.stderr[-3000:]
    steps = records(out, "step")
    assert [step["iteration"] for step in steps][:32] == list(range(1, 33))
    assert records(out, "end")[-1]["status"] == "finished"


def test_a_failure_ends_the_job_with_its_message(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(torchrun(*train("--epochs", 1, "--batch-size", 1, "--out", out)))
    assert done.returncode != 0
    assert "a batch has fewer samples than there are processes" in " ".join(done.stderr.split())
