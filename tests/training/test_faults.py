"""Random faults in the midst of training: what is lost is the step that was hit, and nothing else.

225 injections, each drawn by its own seed: a fault (NaN, an exception, Ctrl-C, the end of the
process) at a random evaluation of the field or at a random write to the disk.
"""

from __future__ import annotations

import errno
import gc
import math
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from typer.testing import CliRunner

from tests.experiments.tiny import load, tiny_config
from tests.optim.problems import Classifier, flat, hooks, loss_of
from torchdyn_snopt import SNOpt, SNOptSensitivity, SolverError
from torchdyn_snopt.curvature.registry import active_collectors
from torchdyn_snopt.experiments import storage
from torchdyn_snopt.experiments.runlog import RunLog, read_log
from torchdyn_snopt.experiments.training import CHECKPOINT_NAME, LOG_NAME, TrainingRun

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

STEPS, UPDATE_FREQ = 4, 2
PRECONDITIONERS = ("trust_region", "kfe_adam", "kfac", "ekfac")
ADJOINTS = ("backsolve", "checkpoint")
IN_STEPS, IN_RUNS = 165, 60
EVALUATIONS = 4  # of the field, in one step of Heun forward and one back


class Killed(BaseException):
    """Ends everything at once, as the end of the process does."""


class Burst(RuntimeError):
    """An error of the user's field."""


FAULTS: dict[str, type[BaseException] | None] = {
    "nan": None,
    "exception": Burst,
    "ctrl-c": KeyboardInterrupt,
}


class Spoiled(Classifier):
    """Its field fails at one evaluation, counted from when that is set."""

    def __init__(self, adjoint: str, on_failure: str) -> None:
        super().__init__(SNOptSensitivity(adjoint=adjoint, on_failure=on_failure))
        self.countdown, self.fault = -1, ""
        # Within the field, so that it is hit wherever the field is evaluated.
        self.node.vf.vf.second.register_forward_hook(self.spoil)

    def spoil(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        self.countdown -= 1
        if self.countdown != 0:
            return None
        error = FAULTS[self.fault]
        if error is not None:
            raise error("now")
        return output * math.nan


def clean_courses() -> dict[tuple[str, str], list[torch.Tensor]]:
    """Parameters before each step, without faults."""
    courses = {}
    for preconditioner in PRECONDITIONERS:
        for adjoint in ADJOINTS:
            torch.manual_seed(0)
            model = Spoiled(adjoint, "raise")
            optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=UPDATE_FREQ)
            states = [flat(model)]
            for step in range(STEPS):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
                states.append(flat(model))
            courses[preconditioner, adjoint] = states
    return courses


@pytest.fixture(scope="module")
def courses() -> dict[tuple[str, str], list[torch.Tensor]]:
    gc.collect()  # optimizers of other tests that a cycle has kept
    return clean_courses()


def expected_hooks(preconditioner: str, step: int) -> int:
    """The one above, and those on three layers, encoder, head and field, where a refresh is due."""
    due = preconditioner == "trust_region" or step % UPDATE_FREQ == 0
    return 1 + (4 if due else 0)


@pytest.mark.parametrize("seed", range(IN_STEPS))
def test_a_fault_in_a_step_costs_that_step(
    courses: dict[tuple[str, str], list[torch.Tensor]], seed: int
) -> None:
    draw = random.Random(seed)
    preconditioner, adjoint = draw.choice(PRECONDITIONERS), draw.choice(ADJOINTS)
    fault, on_failure = draw.choice(list(FAULTS)), draw.choice(["raise", "skip"])
    hit, at = draw.randrange(STEPS), draw.randrange(1, EVALUATIONS + 1)
    torch.manual_seed(0)
    model = Spoiled(adjoint, on_failure)
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=UPDATE_FREQ)
    clean = courses[preconditioner, adjoint]
    step = faults = 0
    raised: BaseException | None = None
    while step < STEPS:
        assert torch.equal(flat(model), clean[step])
        optimizer.zero_grad()
        if step == hit and not faults:
            model.countdown, model.fault = at, fault
        try:
            loss_of(model, step).backward()
            happened = model.countdown <= 0 and step == hit and not faults
            optimizer.step()
            if happened:  # a NaN that was to be skipped
                assert (fault, on_failure) == ("nan", "skip")
                assert optimizer.skipped_steps == 1
        except (Burst, KeyboardInterrupt, SolverError) as error:
            happened, raised = True, error
        model.countdown = -1
        if happened:
            faults += 1
            assert torch.equal(flat(model), clean[step])
        else:
            step += 1
        assert hooks(model) == expected_hooks(preconditioner, step)
    assert faults == 1
    assert (raised is None) == ((fault, on_failure) == ("nan", "skip"))
    assert raised is None or isinstance(raised, FAULTS[fault] or SolverError)
    assert torch.equal(flat(model), clean[-1])
    del optimizer, model, raised
    assert not active_collectors()


# --- whole runs -----------------------------------------------------------------------------------


class Trap:
    """Raises at one of the calls of what it stands in for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.patch, self.error, self.countdown = monkeypatch, error, -1

    def around(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.countdown -= 1
            if self.countdown == 0:
                raise self.error
            return original(*args, **kwargs)

        self.patch.setattr(owner, name, call)


def courses_of(folder: Path) -> list[Any]:
    keys = ("iteration", "epoch", "loss", "accuracy", "nfe_forward", "nfe_backward")
    log = read_log(folder / LOG_NAME)
    return [[record[key] for key in keys] for record in log if record["kind"] == "step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Any], torch.Tensor]]:
    folder = tmp_path_factory.mktemp("whole")
    run = TrainingRun(tiny_config("snopt", epochs=3), load(), folder)
    assert run.run().status == "finished"
    return courses_of(folder), flat(run.model)


def left_over(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in {LOG_NAME, CHECKPOINT_NAME})


@pytest.mark.parametrize("seed", range(IN_RUNS))
def test_a_run_that_is_ended_anywhere_goes_on_from_its_checkpoint(
    whole: tuple[list[Any], torch.Tensor],
    seed: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In an evaluation of the field, in a step, while a log or a checkpoint is being written."""
    draw = random.Random(1000 + seed)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint.pt")
    error = draw.choice([Killed(), KeyboardInterrupt(), Burst(), full])
    places = {
        "field": (torch.nn.Tanh, "forward", 300),
        "step": (SNOpt, "step", 9),
        "log": (RunLog, "write", 14),
        "checkpoint": (torch, "save", 4),
        "flush": (storage, "_flush_to_disk", 4),
        "rename": (Path, "replace", 4),
    }
    owner, name, calls = places[draw.choice(list(places))]
    config = tiny_config("snopt", epochs=3)
    run = TrainingRun(config, load(), tmp_path)
    with monkeypatch.context() as patch:
        trap = Trap(patch, error)
        trap.around(owner, name)
        trap.countdown = draw.randrange(1, calls)
        with pytest.raises(type(error)):
            run.run()
    assert left_over(tmp_path) == []
    again = TrainingRun(config, load(), tmp_path)
    assert again.run(resume=True).status == "finished"
    losses, parameters = whole
    assert courses_of(tmp_path) == losses
    assert torch.equal(flat(again.model), parameters)
    assert left_over(tmp_path) == []


def test_there_are_enough_injections() -> None:
    assert IN_STEPS + IN_RUNS >= 200


# --- the disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")],
)
def test_the_command_says_so_and_keeps_what_was_complete(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchdyn_snopt.cli import app

    out = tmp_path / "out"
    command = ["train", "moons", "--optimizer", "sgd", "--epochs", "2", "--out", str(out)]
    with monkeypatch.context() as patch:
        trap = Trap(patch, OSError(number, os.strerror(number), "checkpoint.pt"))
        trap.around(torch, "save")
        trap.countdown = 2  # the one of the first epoch
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert "--resume" in result.output
    folder = out / "sgd" / "seed-0"
    assert left_over(folder) == []
    assert storage.load_checkpoint(folder / CHECKPOINT_NAME, torch.device("cpu"))
    assert CliRunner().invoke(app, [*command, "--resume"]).exit_code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_folder(tmp_path: Path) -> None:
    from torchdyn_snopt.cli import app

    tmp_path.chmod(0o500)
    result = CliRunner().invoke(app, ["train", "moons", "--out", str(tmp_path / "out")])
    tmp_path.chmod(0o700)
    assert result.exit_code == 1
    assert "Permission denied" in result.output
