from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest
import torch
from torch import nn

from tests.experiments.tiny import BATCHES, TINY, TRAIN_SAMPLES, build_model, load, tiny_config
from torchdyn_snopt import solve_stats
from torchdyn_snopt.errors import InvalidInputError, SolverError
from torchdyn_snopt.experiments.configuration import Budget, RunConfig
from torchdyn_snopt.experiments.interrupt import StopRequest
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.runlog import read_log
from torchdyn_snopt.experiments.tasks.base import neural_ode
from torchdyn_snopt.experiments.training import CHECKPOINT_NAME, LOG_NAME, TrainingRun

# Everything that a resumed run must repeat; seconds of training are those of the clock.
MEASURED = ("loss", "accuracy", "lr", "nfe_forward", "nfe_backward", "t1", "iteration", "epoch")


def records(folder, kind):
    return [record for record in read_log(folder / LOG_NAME) if record["kind"] == kind]


def courses(folder):
    return [[record.get(key) for key in MEASURED] for record in records(folder, "step")]


def train(config, folder, *, observers=(), stop=None, resume=False):
    run = TrainingRun(config, load(), folder)
    result = run.run(observers, stop, resume)
    return run, result


class StopAfter:
    """Asks to stop once so many iterations are done, as Ctrl-C would in mid-epoch."""

    def __init__(self, iterations):
        self.iterations, self.request = iterations, StopRequest()

    def stepped(self, record):
        if record["iteration"] == self.iterations:
            self.request.ask()

    def started(self, config, position, batches): ...
    def evaluated(self, record): ...
    def ended(self, result): ...


# --- the course of a run --------------------------------------------------------------------------


def test_every_iteration_and_epoch_is_recorded(tmp_path):
    run, result = train(tiny_config(epochs=2), tmp_path)
    assert result.status == "finished"
    assert [record["iteration"] for record in records(tmp_path, "step")] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in records(tmp_path, "step")] == [0, 0, 0, 1, 1, 1]
    assert [record["epoch"] for record in records(tmp_path, "epoch")] == [0, 1]
    seconds = [record["seconds"] for record in records(tmp_path, "step")]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    (end,) = records(tmp_path, "end")
    assert (end["status"], end["iteration"]) == ("finished", 6)
    assert run.position.epoch == 2


def test_the_header_tells_configuration_and_environment(tmp_path):
    train(tiny_config("sgd", epochs=1, lr=0.5), tmp_path)
    (header,) = records(tmp_path, "header")
    assert header["config"]["settings"] == {"momentum": 0.9, "lr": 0.5}
    assert header["batches"] == BATCHES
    assert header["parameters"] == sum(p.numel() for p in build_model().parameters())
    assert header["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert header["environment"]["device"] == "cpu"


def test_training_equals_the_loop_that_a_user_would_write(tmp_path):
    run, _ = train(tiny_config("sgd", epochs=2), tmp_path)

    torch.manual_seed(0)
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_set, losses = load().train, []
    for epoch in range(2):
        order = torch.randperm(TRAIN_SAMPLES, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(8):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(train_set.x[rows]), train_set.y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert [record["loss"] for record in records(tmp_path, "step")] == losses
    for mine, theirs in zip(run.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_optimizers_of_one_seed_begin_alike_and_other_seeds_do_not(tmp_path):
    losses = {}
    for name in ("sgd", "adam", "snopt"):
        train(tiny_config(name, epochs=1), tmp_path / name)
        losses[name] = records(tmp_path / name, "step")[0]["loss"]
    assert losses["sgd"] == losses["adam"] == losses["snopt"]
    train(dataclasses.replace(tiny_config("sgd", epochs=1), seed=1), tmp_path / "seed")
    assert records(tmp_path / "seed", "step")[0]["loss"] != losses["sgd"]


def test_field_evaluations_are_those_of_the_solves(tmp_path):
    run, _ = train(tiny_config("adam", epochs=1), tmp_path)
    step = run._step(run.train.x[:8], run.train.y[:8])
    stats = solve_stats(run.model[1])
    assert (step.nfe_forward, step.nfe_backward) == (stats.nfe_forward, stats.nfe_backward)
    assert min(stats.nfe_forward, stats.nfe_backward) > 0
    assert records(tmp_path, "step")[-1]["t1"] == 1.0


@pytest.mark.parametrize("sensitivity", ["adjoint", "autograd"])
def test_other_sensitivities_are_counted_by_the_same_measure(tmp_path, sensitivity):
    spec = OptimizerSpec("adam", sensitivity=sensitivity)
    train(RunConfig(TINY, spec, 0, Budget(epochs=1)), tmp_path)
    first = records(tmp_path, "step")[0]
    assert first["nfe_forward"] > 0
    assert (first["nfe_backward"] == 0) == (sensitivity == "autograd")
    assert first["t1"] is None


def test_an_epochs_training_figures_are_means_over_its_samples(tmp_path):
    train(tiny_config("adam", epochs=1), tmp_path)
    losses = [record["loss"] for record in records(tmp_path, "step")]
    (epoch,) = records(tmp_path, "epoch")
    assert epoch["train_loss"] == pytest.approx(
        (8 * losses[0] + 8 * losses[1] + 6 * losses[2]) / 22
    )


def test_evaluation_is_of_the_whole_test_set_and_leaves_training_alone(tmp_path):
    run = TrainingRun(tiny_config("adam"), load(), tmp_path)
    before = torch.get_rng_state()
    loss, accuracy = run.evaluate(run.test)  # in batches of 4, 4 and 2
    assert torch.equal(torch.get_rng_state(), before)
    assert run.model.training
    run.model.eval()
    logits = run.model(run.test.x).detach()
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, run.test.y).item(), abs=1e-3)
    assert accuracy == pytest.approx((logits.argmax(1) == run.test.y).float().mean().item())


# --- budgets --------------------------------------------------------------------------------------


def test_seconds_end_a_run_in_mid_epoch_with_an_evaluation(tmp_path):
    _, result = train(tiny_config(epochs=None, seconds=1e-9), tmp_path)
    assert result.status == "finished"
    assert result.position.iteration == 1
    (epoch,) = records(tmp_path, "epoch")
    assert epoch["iteration"] == 1


def test_the_nearer_limit_counts(tmp_path):
    _, result = train(tiny_config(epochs=1, seconds=1e9), tmp_path)
    assert result.position.iteration == BATCHES


@pytest.mark.parametrize(("epochs", "seconds"), [(None, None), (0, None), (2, 0.0), (-1, 3.0)])
def test_a_budget_of_nothing_is_refused(epochs, seconds):
    with pytest.raises(InvalidInputError, match="--epochs or --seconds"):
        Budget(epochs, seconds)


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "snopt"])
def test_two_and_two_epochs_equal_four_to_the_last_bit(tmp_path, optimizer):
    whole, _ = train(tiny_config(optimizer, epochs=4), tmp_path / "whole")
    train(tiny_config(optimizer, epochs=2), tmp_path / "parts")
    torch.rand(5)  # whatever else happens in between
    parts, result = train(tiny_config(optimizer, epochs=4), tmp_path / "parts", resume=True)
    assert result.status == "finished"
    assert courses(tmp_path / "parts") == courses(tmp_path / "whole")
    for mine, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    ends = [records(tmp_path / name, "epoch")[-1] for name in ("parts", "whole")]
    assert ends[0]["test_loss"] == ends[1]["test_loss"]
    assert [record["status"] for record in records(tmp_path / "parts", "end")] == ["finished"]


def test_a_run_stopped_in_mid_epoch_goes_on_to_the_last_bit(tmp_path):
    train(tiny_config("adam", epochs=3), tmp_path / "whole")
    stopper = StopAfter(iterations=5)
    _, stopped = train(
        tiny_config("adam", epochs=3), tmp_path / "parts", observers=[stopper], stop=stopper.request
    )
    assert (stopped.status, stopped.position.iteration) == ("interrupted", 5)
    assert records(tmp_path / "parts", "end")[0]["status"] == "interrupted"
    train(tiny_config("adam", epochs=3), tmp_path / "parts", resume=True)
    assert courses(tmp_path / "parts") == courses(tmp_path / "whole")
    train_losses = [
        [record["train_loss"] for record in records(tmp_path / name, "epoch")]
        for name in ("parts", "whole")
    ]
    assert train_losses[0] == train_losses[1]


class Killed(BaseException):
    """Ends a run as a kill would: nothing is written after it."""


class KillAfter(StopAfter):
    def stepped(self, record):
        if record["iteration"] == self.iterations:
            raise Killed


def test_a_killed_run_goes_on_from_its_last_epoch_and_the_log_has_each_step_once(tmp_path):
    train(tiny_config("adam", epochs=3), tmp_path / "whole")
    with pytest.raises(Killed):
        train(tiny_config("adam", epochs=3), tmp_path / "parts", observers=[KillAfter(5)])
    with (tmp_path / "parts" / LOG_NAME).open("ab") as log:
        log.write(b'{"kind": "step", "iter')
    train(tiny_config("adam", epochs=3), tmp_path / "parts", resume=True)
    assert courses(tmp_path / "parts") == courses(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    train(tiny_config("adam", epochs=2), tmp_path)
    log = (tmp_path / LOG_NAME).read_bytes()
    _, result = train(tiny_config("adam", epochs=2), tmp_path, resume=True)
    assert result.status == "finished"
    assert (tmp_path / LOG_NAME).read_bytes() == log


def test_without_resume_a_run_begins_anew(tmp_path):
    train(tiny_config("adam", epochs=2), tmp_path)
    train(tiny_config("adam", epochs=1), tmp_path)
    assert len(records(tmp_path, "step")) == BATCHES
    assert len(records(tmp_path, "header")) == 1


def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(tmp_path):
    train(tiny_config("sgd", epochs=1, lr=0.5), tmp_path)
    checkpoint = (tmp_path / CHECKPOINT_NAME).read_bytes()
    with pytest.raises(
        InvalidInputError, match=r"(?s)another configuration.*'lr': 0.5.*'lr': 0.25"
    ):
        train(tiny_config("sgd", epochs=2, lr=0.25), tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT_NAME).read_bytes() == checkpoint


# --- failures -------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_with_its_iteration(tmp_path):
    task = dataclasses.replace(TINY, loss=lambda outputs, targets: outputs.sum() * float("nan"))
    config = dataclasses.replace(tiny_config("adam"), task=task)
    _, result = train(config, tmp_path)
    assert result.status == "failed"
    assert "NonFiniteLossError" in result.reason
    assert "nan in iteration 1" in result.reason
    (end,) = records(tmp_path, "end")
    assert (end["status"], end["reason"]) == ("failed", result.reason)
    assert records(tmp_path, "step") == []


class Exploding(nn.Module):
    """A field that turns into NaN after a number of calls."""

    def __init__(self, calls):
        super().__init__()
        self.layer, self.calls = nn.Linear(2, 2), calls

    def forward(self, t, x):
        self.calls -= 1
        return self.layer(x) * (1.0 if self.calls > 0 else float("nan"))


def test_a_solve_that_fails_ends_the_run_with_the_solvers_reason(tmp_path):
    def build(sensitivity, tolerance):
        return nn.Sequential(neural_ode(Exploding(200), sensitivity, tolerance), nn.Flatten(0, 1))

    task = dataclasses.replace(
        TINY, build_model=build, loss=lambda outputs, targets: outputs.square().mean(), metric=None
    )
    _, result = train(dataclasses.replace(tiny_config("adam", epochs=50), task=task), tmp_path)
    assert result.status == "failed"
    assert result.reason.startswith(SolverError.__name__)
    assert len(records(tmp_path, "step")) == result.position.iteration > 0


def test_a_model_that_cannot_be_evaluated_at_the_end_has_failed(tmp_path, monkeypatch):
    def evaluate(self, samples):
        raise InvalidInputError("not finite", got="inf", allowed="finite states", do="try less")

    monkeypatch.setattr(TrainingRun, "evaluate", evaluate)
    config = dataclasses.replace(tiny_config("adam"), budget=Budget(seconds=1e-9))
    _, result = train(config, tmp_path)
    assert result.status == "failed"
    assert "not finite" in result.reason
    assert len(records(tmp_path, "step")) == 1


def test_a_defect_is_not_taken_for_a_failed_run(tmp_path):
    def broken(outputs, targets):
        raise AttributeError("a mistake in the program")

    task = dataclasses.replace(TINY, loss=broken)
    with pytest.raises(AttributeError, match="a mistake"):
        train(dataclasses.replace(tiny_config("adam"), task=task), tmp_path)


def test_a_task_without_a_metric_has_its_loss_alone(tmp_path):
    task = dataclasses.replace(TINY, metric=None)
    train(dataclasses.replace(tiny_config("adam", epochs=1), task=task), tmp_path)
    assert "accuracy" not in records(tmp_path, "step")[0]
    assert set(records(tmp_path, "epoch")[0]) >= {"train_loss", "test_loss"}
    assert records(tmp_path, "header")[0]["metric"] is None


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_a_cuda_device_finishes_and_goes_on(tmp_path):
    config = dataclasses.replace(tiny_config("snopt", epochs=1), device=torch.device("cuda"))
    run, result = train(config, tmp_path)
    assert result.status == "finished"
    assert all(p.device.type == "cuda" for p in run.model.parameters())
    longer = dataclasses.replace(config, budget=Budget(epochs=2))
    _, result = train(longer, tmp_path, resume=True)
    assert result.position.iteration == 2 * BATCHES
