"""Without curvature SNOpt is torch's SGD to the last bit, or its Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.problems import flat, plain, train
from tests.reference import relative_error
from torchdyn_snopt import SNOpt
from torchdyn_snopt.optim.moments import ADAM_EPS

STEPS = range(10)


def twins() -> tuple[nn.Module, nn.Module]:
    """Two networks alike, with parameters of other shapes than matrices."""
    pair = []
    for _ in range(2):
        torch.manual_seed(1)
        pair.append(nn.Sequential(plain(), nn.LayerNorm(2), nn.PReLU()))
    return pair[0], pair[1]


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"momentum": 0.0, "weight_decay": 0.3},
        {"momentum": 0.5, "weight_decay": 0.01, "maximize": True},
    ],
    ids=str,
)
def test_kfac_without_curvature_is_sgd_bit_for_bit(settings: Any, foreach: bool | None) -> None:
    ours, theirs = twins()
    optimizer = SNOpt(
        ours.parameters(), 0.02, preconditioner="kfac", foreach=foreach, update_freq=3, **settings
    )
    losses = train(ours, optimizer, STEPS)
    sgd = torch.optim.SGD(theirs.parameters(), 0.02, foreach=foreach, **settings)
    assert losses == train(theirs, sgd, STEPS)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("preconditioner", "foreach"),
    [("kfe_adam", None), ("kfe_adam", False), ("kfac", None), ("ekfac", None)],
)
@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.01}, {"weight_decay": 0.01, "maximize": True}], ids=str
)
@pytest.mark.usefixtures("float64")
def test_the_adam_fallback_is_adam(
    preconditioner: str, foreach: bool | None, settings: Any
) -> None:
    ours, theirs = (m.double() for m in twins())
    optimizer = SNOpt(
        ours.parameters(),
        0.01,
        momentum=0.8,
        alpha=0.97,
        preconditioner=preconditioner,
        fallback="adam",
        foreach=foreach,
        **settings,
    )
    start = flat(ours)
    train(ours, optimizer, STEPS)
    adam = torch.optim.Adam(
        theirs.parameters(), 0.01, betas=(0.8, 0.97), eps=ADAM_EPS, foreach=foreach, **settings
    )
    train(theirs, adam, STEPS)
    assert relative_error(flat(ours), flat(theirs)) < 1e-12
    assert relative_error(flat(ours), start) > 0.01


@pytest.mark.parametrize("fallback", ["sgd", "adam"])
def test_parameters_without_gradient_are_left_alone(fallback: str) -> None:
    used, unused, empty = (nn.Parameter(torch.ones(n)) for n in (3, 2, 0))
    optimizer = SNOpt([used, unused, empty], 0.1, fallback=fallback, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (used.sum() + empty.sum()).backward()
        optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state
    assert (used < 1).all()


def test_the_first_step_of_the_momentum_buffer_keeps_the_gradient_apart() -> None:
    """The buffer is a copy: clearing gradients in place must not touch it."""
    p = nn.Parameter(torch.ones(3))
    optimizer = SNOpt([p], 0.1, momentum=0.9, preconditioner="kfac")
    p.sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.ones(3))
    assert torch.equal(p.grad, torch.zeros(3))
