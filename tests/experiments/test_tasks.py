from __future__ import annotations

import pytest
import torch

from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments.tasks import TASKS, Samples, get_task


def test_digits_are_the_real_images_split_once_and_for_all():
    splits = get_task("digits").load(None)
    assert splits.train.x.shape == (1437, 1, 8, 8)
    assert splits.test.x.shape == (360, 1, 8, 8)
    assert splits.train.x.min() == 0.0
    assert splits.train.x.max() == 1.0
    counts = torch.bincount(splits.test.y, minlength=10)
    assert counts.min() >= 34  # stratified: every digit has its tenth of the 360
    assert counts.max() <= 37
    again = get_task("digits").load(None)
    assert torch.equal(splits.test.y, again.test.y)
    assert torch.equal(splits.train.x, again.train.x)


def test_training_and_test_points_of_moons_differ():
    splits = get_task("moons").load(None)
    assert splits.train.x.shape == splits.test.x.shape == (1024, 2)
    assert not torch.isin(splits.test.x[:, 0], splits.train.x[:, 0]).any()


@pytest.mark.parametrize(("name", "outputs"), [("digits", 10), ("moons", 2)])
def test_a_model_maps_a_batch_to_logits_and_every_parameter_learns(name, outputs):
    task = get_task(name)
    train = task.load(None).train
    torch.manual_seed(0)
    model = task.build_model("snopt", task.tolerance)
    logits = model(train.x[:5])
    assert logits.shape == (5, outputs)
    task.loss(logits, train.y[:5]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), [("digits", 20_682), ("moons", 322)])
def test_models_have_the_size_that_their_docstrings_tell(name, parameters):
    task = get_task(name)
    assert sum(p.numel() for p in task.build_model("snopt", 1e-3).parameters()) == parameters
    module = __import__(f"torchdyn_snopt.experiments.tasks.{name}", fromlist=["build_model"])
    assert f"{parameters:,} parameters" in module.build_model.__doc__


def test_the_sensitivity_and_the_tolerance_reach_every_solve():
    node = next(
        m for m in get_task("moons").build_model("adjoint", 1e-5).modules() if hasattr(m, "vf")
    )
    assert node.sensalg == "adjoint"
    assert node.rtol == node.atol == node.rtol_adjoint == node.atol_adjoint == 1e-5


def test_building_a_model_prints_nothing(capsys):
    get_task("moons").build_model("snopt", 1e-3)
    assert capsys.readouterr().out == ""


def test_the_settings_of_tasks_are_those_of_known_optimizers():
    from torchdyn_snopt.experiments.optimizers import OPTIMIZERS, OptimizerSpec

    for task in TASKS.values():
        assert set(task.settings) <= set(OPTIMIZERS)
        for name in OPTIMIZERS:
            optimizer = OptimizerSpec(name).build(task.build_model("snopt", 1e-3), task)
            assert optimizer.param_groups[0]["lr"] > 0


def test_an_unknown_task_is_answered_with_the_known_ones():
    with pytest.raises(InvalidInputError, match=r"(?s)'digit'.*allowed: digits, moons"):
        get_task("digit")


def test_inputs_and_targets_must_match():
    with pytest.raises(InvalidInputError, match="3 inputs, 2 targets"):
        Samples(torch.zeros(3, 1), torch.zeros(2))
