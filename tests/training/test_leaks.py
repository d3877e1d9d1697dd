"""Nothing grows over 2,000 steps, and a model that is dropped leaves nothing behind."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import pytest
import torch
from torch import nn

from tests.optim.problems import Classifier, loss_of, train
from torchdyn_snopt import SNOpt, record_curvature
from torchdyn_snopt.curvature import horizon, registry
from torchdyn_snopt.torchdyn_plugin import _stats

STEPS = 2_000


def living_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac", "ekfac"])
def test_two_thousand_steps_hold_as_much_as_the_first_hundred(preconditioner: str) -> None:
    """Tensors to the last one, and Python's own memory to a few kilobytes."""
    layer = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = SNOpt(layer, lr=1e-3, preconditioner=preconditioner, update_freq=3)
    train(layer, optimizer, range(100))
    tensors = living_tensors()
    train(layer, optimizer, range(STEPS - 500))
    assert abs(living_tensors() - tensors) <= 2
    tracemalloc.start()
    train(layer, optimizer, range(100))
    before = traced()
    train(layer, optimizer, range(400))
    grown = traced() - before
    tracemalloc.stop()
    assert grown < 40_000  # of 400 steps; torch's own Adam shows as much


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_steps_of_a_neural_ode_hold_nothing() -> None:
    model = Classifier()
    optimizer = SNOpt(model, lr=1e-3, update_freq=3)
    train(model, optimizer, range(10))
    tensors = living_tensors()
    train(model, optimizer, range(200))
    assert living_tensors() <= tensors + 2


def test_failed_and_abandoned_steps_hold_nothing() -> None:
    model = Classifier()
    optimizer = SNOpt(model, lr=1e-3, update_freq=1)
    train(model, optimizer, range(3))
    tensors = living_tensors()
    for step in range(30):
        loss_of(model, step)  # never differentiated
        loss_of(model, step).backward()  # never stepped
        optimizer.zero_grad()
    assert living_tensors() <= tensors + 2


def test_dropped_models_leave_nothing_in_the_registries() -> None:
    gc.collect()
    counts = len(registry._collectors), len(_stats), len(horizon._specs), len(horizon._watches)
    gone = []
    for step in range(20):
        model = Classifier()
        optimizer = SNOpt(model, update_freq=1)
        with record_curvature(model):
            loss_of(model, step).backward()
        optimizer.step()
        gone += [weakref.ref(model), weakref.ref(optimizer), weakref.ref(model.head.weight)]
        del model, optimizer
    gc.collect()
    assert all(reference() is None for reference in gone)
    left = len(registry._collectors), len(_stats), len(horizon._specs), len(horizon._watches)
    assert left == counts
    assert not registry._failed
