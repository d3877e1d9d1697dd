"""Runs with a chosen horizon: what is attached, what moves it, what is logged, how it resumes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.experiments.tiny import BATCHES, TINY, load, tiny_config
from torchdyn_snopt import Horizon, HorizonPolicy
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.configuration import Budget, RunConfig
from torchdyn_snopt.experiments.curves import read_run
from torchdyn_snopt.experiments.horizons import HorizonChoice, horizon_choice, penalty_of
from torchdyn_snopt.experiments.interrupt import StopRequest
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.training import TrainingRun

EPOCHS = 4
PARTS = ("Q_T", "Q_TT", "t1_open_loop", "t1_feedback")
ALWAYS = {"horizon": HorizonPolicy(interval=1, warm_up=0)}


def config(choice, optimizer="snopt", chosen=ALWAYS):
    spec = OptimizerSpec(optimizer, chosen if optimizer == "snopt" else {})
    return RunConfig(TINY, spec, 0, Budget(EPOCHS), horizon=choice)


def run(choice, folder, **options):
    training = TrainingRun(config(choice, **options), load(), folder)
    assert training.run().status == "finished"
    return training, read_run(folder).steps


def test_a_fixed_horizon_stays_and_is_no_trained_parameter(tmp_path):
    training, steps = run(HorizonChoice("fixed", 0.5), tmp_path, optimizer="adam")
    assert set(steps["t1"]) == {0.5}
    assert not next(m for m in training.model.modules() if isinstance(m, Horizon)).t1.requires_grad
    assert set(steps["nfe_update"]) == {0.0}


def test_the_policy_moves_t1_and_logs_each_part(tmp_path):
    training, steps = run(HorizonChoice("policy", 0.5, 0.2), tmp_path)
    assert steps["t1"][0] == 0.5
    assert len(set(steps["t1"])) == EPOCHS * BATCHES
    for part in PARTS:
        assert len(steps[part]) == EPOCHS * BATCHES
        assert bool((steps[part] == steps[part]).all())
    assert (steps["Q_TT"] >= 0.2 - 1e-6).all()
    # The t1 of a record is the one it was solved with: the next one follows from its parts.
    change = steps["t1"][1] - steps["t1"][0]
    wanted = steps["t1_open_loop"][0] + steps["t1_feedback"][0]
    limit = HorizonPolicy().trust * 0.5
    assert change == pytest.approx(min(max(wanted, -limit), limit), rel=1e-4)
    # Each feedback solves the batch again, which is counted.
    assert (steps["nfe_update"] > 0).all()
    horizon = next(m for m in training.model.modules() if isinstance(m, Horizon))
    assert horizon.spec.penalty == 0.2


@pytest.mark.parametrize("optimizer", ["snopt", "adam"])
def test_the_baseline_is_adam_on_t1_alone(tmp_path, optimizer):
    training, steps = run(HorizonChoice("gradient", 0.5), tmp_path, optimizer=optimizer)
    # Adam's first step is the learning rate, whatever the gradient.
    assert abs(steps["t1"][1] - 0.5) == pytest.approx(1e-2, rel=1e-3)
    assert (steps["nfe_update"] == 0).all()
    assert "Q_TT" not in steps
    groups = training.optimizer.param_groups
    assert sum(p.ndim == 0 for group in groups for p in group["params"]) == 1


@pytest.mark.parametrize("mode", ["policy", "gradient"])
def test_a_resumed_run_is_the_whole_one_to_the_last_bit(tmp_path, mode):
    choice = HorizonChoice(mode, 0.5, 0.2)
    whole, _ = run(choice, tmp_path / "whole")
    stop = StopRequest()

    class AfterFive:
        def stepped(self, record):
            if record["iteration"] == 5:
                stop.ask()

        def started(self, config, position, batches): ...
        def evaluated(self, record): ...
        def ended(self, result): ...

    first = TrainingRun(config(choice), load(), tmp_path / "parts")
    assert first.run([AfterFive()], stop).status == "interrupted"
    second = TrainingRun(config(choice), load(), tmp_path / "parts")
    assert second.run(resume=True).status == "finished"
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])
    a, b = (read_run(tmp_path / name).steps for name in ("whole", "parts"))
    assert a["t1"].tolist() == b["t1"].tolist()
    assert a["loss"].tolist() == b["loss"].tolist()


def test_a_checkpoint_of_another_horizon_is_refused(tmp_path):
    run(HorizonChoice("policy", 0.5, 0.2), tmp_path)
    other = TrainingRun(config(HorizonChoice("policy", 0.5, 0.3)), load(), tmp_path)
    with pytest.raises(InvalidInputError, match="another configuration"):
        other.run(resume=True)


def test_the_penalty_is_the_sum_over_all_horizons():
    model = nn.ModuleList([Horizon(2.0, penalty=0.5), Horizon(3.0, penalty=0.1), Horizon()])
    assert penalty_of(model).item() == pytest.approx(0.25 * 4 + 0.05 * 9)
    assert penalty_of(nn.Linear(1, 1)) == 0.0


def test_folders_and_labels_tell_choices_apart():
    choices = [
        HorizonChoice("fixed", 0.5),
        HorizonChoice("gradient", 0.5, 1.0),
        HorizonChoice("policy", 0.5, 1.0),
        HorizonChoice("policy", 0.5, 2.0),
        HorizonChoice("policy", 0.6, 2.0),
    ]
    assert len({config(choice).slug for choice in choices}) == len(choices)
    assert len({choice.label for choice in choices}) == len(choices)
    assert tiny_config().slug == "adam"


def test_choices_that_make_no_sense_are_refused():
    with pytest.raises(InvalidInputError, match="feedback policy"):
        TrainingRun(config(HorizonChoice("policy"), "adam"), load(), None)
    with pytest.raises(InvalidInputError, match="no such way"):
        HorizonChoice("newton")
    with pytest.raises(InvalidInputError, match="no such way"):
        horizon_choice("fixed", None, 0.0)
    with pytest.raises(InvalidInputError, match="not learned"):
        horizon_choice(None, 0.5, 0.1)
    with pytest.raises(InvalidInputError, match="no horizon to choose"):
        HorizonChoice("fixed").prepare(nn.Linear(1, 1), OptimizerSpec("adam"), TINY)
    assert horizon_choice(None, None, 0.0) is None
    assert horizon_choice(None, 0.5, 0.0) == HorizonChoice("fixed", 0.5)
    assert horizon_choice("policy", None, 0.3) == HorizonChoice("policy", 1.0, 0.3)
