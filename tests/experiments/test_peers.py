"""The optimizers from elsewhere, and the tuning of learning rates."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.experiments.tiny import TINY, load, tiny_config
from torchdyn_snopt.errors import InvalidInputError, UnsupportedError
from torchdyn_snopt.experiments import peers, tuning
from torchdyn_snopt.experiments.configuration import Budget
from torchdyn_snopt.experiments.curves import read_run
from torchdyn_snopt.experiments.meters import Clock
from torchdyn_snopt.experiments.optimizers import OPTIMIZERS, OptimizerSpec, parse_spec
from torchdyn_snopt.experiments.training import TrainingRun

CPU = torch.device("cpu")
PEERS = ("muon", "soap", "shampoo", "lbfgs")


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_trains_and_resumes_bit_for_bit(name, tmp_path):
    splits = load()
    whole = TrainingRun(tiny_config(name, lr=1e-2), splits, tmp_path / "whole")
    assert whole.run().status == "finished"
    half = replace(tiny_config(name, lr=1e-2), budget=Budget(1))
    TrainingRun(half, splits, tmp_path / "split").run()
    TrainingRun(tiny_config(name, lr=1e-2), splits, tmp_path / "split").run(resume=True)
    losses = [read_run(tmp_path / folder).steps["loss"].tolist() for folder in ("whole", "split")]
    assert losses[0] == losses[1]
    assert losses[0][-1] != losses[0][0]


@pytest.mark.parametrize("name", PEERS)
def test_a_misspelt_setting_of_a_peer_is_refused(name):
    with pytest.raises(InvalidInputError, match="no such setting"):
        parse_spec(f"{name}:learning_rate=1")
    assert parse_spec(f"{name}:lr=0.5").chosen == {"lr": 0.5}


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'torchdyn-snopt\[experiments\]'"):
        peers.soap(nn.Linear(1, 1))


def test_muon_moves_a_convolution_as_it_moves_the_same_matrix():
    torch.manual_seed(0)
    convolution, linear = nn.Conv2d(3, 4, 2), nn.Linear(12, 4)
    with torch.no_grad():
        linear.weight.copy_(convolution.weight.view(4, 12))
        linear.bias.copy_(convolution.bias)
    g, b = torch.randn(4, 12), torch.randn(4)
    for module in (convolution, linear):
        optimizer = peers.muon(module, lr=0.1)
        for _ in range(2):
            module.weight.grad, module.bias.grad = g.view_as(module.weight).clone(), b.clone()
            optimizer.step()
    assert torch.equal(convolution.weight.view(4, 12), linear.weight)
    assert torch.equal(convolution.bias, linear.bias)
    reference = nn.Parameter(torch.zeros(4))
    adam = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.0)
    reference.grad = b
    adam.step()
    first = nn.Linear(12, 4)
    before = first.bias.detach().clone()
    first.weight.grad, first.bias.grad = g, b
    peers.muon(first, lr=0.1).step()
    assert torch.allclose(first.bias - before, reference, atol=1e-6)


def test_default_learning_rates_are_those_without_settings():
    assert OPTIMIZERS["snopt"].default_lr == 1.0
    assert OPTIMIZERS["adam"].default_lr == 1e-3
    for row in OPTIMIZERS.values():
        low, high = row.lr_range
        assert low < high
    assert OPTIMIZERS["snopt"].lr_range == (0.1, 10.0)


# --- tuning ---------------------------------------------------------------------------------------


def test_the_grid_begins_in_the_middle_and_reaches_both_ends():
    assert tuning.grid(1e-3, 1e-1, 5) == pytest.approx([1e-2, 10**-2.5, 10**-1.5, 1e-3, 1e-1])
    assert tuning.grid(1e-3, 1e-1, 1) == pytest.approx([1e-2])
    assert tuning.round_to(0.0031622) == 0.0032


def test_tuning_finds_the_fastest_rate_and_remembers_it(tmp_path, monkeypatch):
    tried = []

    def worth(self, spec, seconds):
        lr = spec.chosen["lr"]
        tried.append((lr, seconds))
        return 1.0 + abs(torch.log10(torch.tensor(lr / 0.032)).item())

    monkeypatch.setattr(tuning.Tuning, "_worth", worth)
    task = tuning.Tuning(TINY, load(), 7, 30.0, tmp_path, CPU)
    assert task.tune(OptimizerSpec("adam")) == pytest.approx(0.032, rel=0.3)
    assert len(tried) == 7
    assert tried[0] == (0.01, 30.0)
    assert tried[1][1] == pytest.approx(1.505, abs=1e-3)  # no longer than the best trial took
    written = json.loads((tmp_path / "adam" / "tuned.json").read_text())
    assert len(written["trials"]) == 7
    assert task.tune(OptimizerSpec("adam")) == written["lr"]
    assert len(tried) == 7


def test_a_trial_ends_at_the_target_and_is_worth_its_time(tmp_path):
    easy = replace(TINY, target_loss=100.0)
    task = tuning.Tuning(easy, load(), 1, 30.0, tmp_path, CPU)
    worth = task._worth(OptimizerSpec("adam", {"lr": 1e-3}), 30.0)
    run = read_run(tmp_path / "adam-lr-0.001")
    assert len(run.steps["iteration"]) == TINY.window
    assert worth == run.steps["seconds"][-1]


def test_a_trial_without_the_target_is_worth_its_time_and_the_loss_left(tmp_path):
    hard = replace(TINY, target_loss=0.01)
    task = tuning.Tuning(hard, load(), 1, 0.05, tmp_path, CPU)
    worth = task._worth(OptimizerSpec("adam", {"lr": 1e-3}), 0.05)
    run = read_run(tmp_path / "adam-lr-0.001")
    assert worth == pytest.approx(0.05 + run.smoothed("loss", partial=True)[-1] - 0.01)
    failing = OptimizerSpec("sgd", {"lr": 1e30})
    assert task._worth(failing, 30.0) == tuning.FAILED


def test_seconds_on_the_cpu_stand_still_while_a_process_sleeps():
    import time

    clock = Clock(CPU, "cpu")
    before = clock.read()
    time.sleep(0.2)
    assert clock.read() - before < 0.1
