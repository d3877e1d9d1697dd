"""Every setting out of range is refused, by a text that says what, got, allowed and what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from torchdyn_snopt import InvalidInputError, SNOpt, SNOptError, UnsupportedError
from torchdyn_snopt.optim.settings import DEFAULTS, PAPER, resolve

NAN, INF = math.nan, math.inf

# setting: refused values, what the message allows
RANGES: dict[str, tuple[list[Any], str]] = {
    "lr": ([-1e-3, NAN, INF, "0.1", True, torch.tensor(0.1)], "a number in [0, inf)"),
    "momentum": ([-0.1, 1.0, 1.5, NAN, "0.9"], "a number in [0, 1)"),
    "weight_decay": ([-1e-4, NAN, INF, True], "a number in [0, inf)"),
    "damping": ([0.0, -1.0, NAN, INF, [0.1]], "a number in (0, inf)"),
    "alpha": ([-0.1, 1.0, NAN, (0.9, 0.99)], "a number in [0, 1)"),
    "factor_decay": ([-0.1, 1.0, NAN], "a number in [0, 1)"),
    "kl_clip": ([0.0, -1e-3, NAN, "off"], "a number in (0, inf]"),
    "update_freq": ([0, -5, 2.5, NAN, True, "10"], "a whole number of at least 1"),
}
CHOICES: dict[str, tuple[list[Any], str]] = {
    "preconditioner": (
        ["adam", "KFAC", 1, ""],
        "'trust_region', 'kfe_adam', 'kfac', 'ekfac', 'low_rank'",
    ),
    "curvature": (["fisher", "hessian"], "'auto', 'empirical', 'mc', 'ggn'"),
    "weight_sharing": (["sum", 2], "'expand', 'reduce'"),
    "fallback": (["rmsprop", False], "'sgd', 'adam'"),
    "reduction": (["none", "batchmean"], "'mean', 'sum'"),
    "maximize": (["yes", -1], "False, True"),
    "foreach": (["auto", 2], "None, False, True"),
}
REFUSED = [
    pytest.param(name, value, allowed, id=f"{name}={value!r}")
    for table in (RANGES, CHOICES)
    for name, (values, allowed) in table.items()
    for value in values
]
ADVICE = {
    "update_freq": "pass update_freq=5",
    **{name: f"pass {name}=" for name in CHOICES},
    **{name: f"leave {name} at its default" for name in RANGES.keys() - {"update_freq"}},
}


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(2, 3))]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_a_setting_out_of_range_is_refused(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SNOpt(parameters(), **{name: value})
    what, *rest = str(caught.value).splitlines()
    assert name in what or name == "update_freq"
    assert rest[0] == f"  got: {name}={value!r}"
    assert rest[1].startswith(f"  allowed: {allowed}")
    assert rest[2].startswith(f"  do this: {ADVICE[name]}")
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_a_group_is_refused_whole(name: str, value: Any, allowed: str) -> None:
    first, second = nn.Linear(2, 3), nn.Linear(3, 2)
    optimizer = SNOpt(first.parameters(), preconditioner="kfac")
    with pytest.raises(InvalidInputError) as caught:
        optimizer.add_param_group({"params": second.parameters(), name: value})
    assert f"got: {name}={value!r}" in str(caught.value)
    assert allowed in str(caught.value)
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": second.parameters()})
    second(first(torch.randn(4, 2))).sum().backward()
    optimizer.step()
    with pytest.raises(SNOptError):
        SNOpt([{"params": parameters(), name: value}])


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0},
        {"lr": 10, "momentum": 0},
        {"momentum": 0.999, "alpha": 0.0, "factor_decay": 0.0},
        {"weight_decay": 5},
        {"damping": 1e-30},
        {"update_freq": 1},
        {"update_freq": 10**9},
        {"kl_clip": INF},
        {"kl_clip": 1e-12},
    ],
    ids=str,
)
def test_values_at_the_edge_are_taken(settings: dict[str, Any]) -> None:
    (group,) = SNOpt(parameters(), **settings).param_groups
    for name, value in settings.items():
        assert group[name] == (None if value == INF else value)


@pytest.mark.parametrize("preconditioner", list(DEFAULTS))
def test_what_is_left_out_takes_the_defaults_of_the_preconditioner(preconditioner: str) -> None:
    (group,) = SNOpt(parameters(), preconditioner=preconditioner, weight_decay=0.5).param_groups
    for name, value in DEFAULTS[preconditioner].items():
        assert group[name] == value, name
    assert group["weight_decay"] == 0.5
    (group,) = SNOpt(parameters(), 0.25, preconditioner=preconditioner, damping=7.0).param_groups
    assert (group["lr"], group["damping"]) == (0.25, 7.0)


def test_a_trust_region_can_be_switched_off() -> None:
    assert DEFAULTS["kfac"]["kl_clip"] is not None
    (group,) = SNOpt(parameters(), preconditioner="kfac", kl_clip=INF).param_groups
    assert group["kl_clip"] is None


def test_a_group_takes_the_defaults_of_its_own_preconditioner() -> None:
    groups = [
        {"params": parameters()},
        {"params": parameters(), "preconditioner": "kfe_adam"},
        {"params": parameters(), "preconditioner": "kfac"},
        {"params": parameters(), "preconditioner": "ekfac", "damping": 0.5, "lr": 3.0},
    ]
    default, kfe_adam, kfac, ekfac = SNOpt(groups, momentum=0.25).param_groups
    assert [g["momentum"] for g in (default, kfe_adam, kfac, ekfac)] == [0.25] * 4
    assert default["preconditioner"] == "trust_region"
    assert default["damping"] == DEFAULTS["trust_region"]["damping"]
    assert default["curvature"] == "auto"
    assert kfe_adam["curvature"] == "empirical"
    assert kfe_adam["damping"] == DEFAULTS["kfe_adam"]["damping"]
    assert kfac["damping"] == DEFAULTS["kfac"]["damping"]
    assert kfac["lr"] == DEFAULTS["kfac"]["lr"]
    assert (ekfac["damping"], ekfac["lr"]) == (0.5, 3.0)


def test_resolving_leaves_the_arguments_alone() -> None:
    settings = {"preconditioner": "kfac", "lr": None, "kl_clip": None}
    assert resolve(settings)["lr"] == DEFAULTS["kfac"]["lr"]
    assert settings == {"preconditioner": "kfac", "lr": None, "kl_clip": None}


def test_from_paper() -> None:
    """The paper's Section 4 and Appendix: ε 0.05, α 0.75, one refresh in 100 iterations."""
    (group,) = SNOpt.from_paper(parameters(), 0.02).param_groups
    assert group["preconditioner"] == "ekfac"
    assert (group["lr"], group["momentum"], group["damping"]) == (0.02, 0.0, 0.05)
    assert (group["update_freq"], group["alpha"], group["factor_decay"]) == (100, 0.75, 0.0)
    assert group["kl_clip"] is None
    (group,) = SNOpt.from_paper(parameters(), 0.02, update_freq=10, weight_decay=1e-3).param_groups
    assert (group["update_freq"], group["weight_decay"]) == (10, 1e-3)
    assert PAPER["update_freq"] == 100


# --- what is no setting ---------------------------------------------------------------------------


def test_complex_parameters_are_refused() -> None:
    bad = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match="complex") as caught:
        SNOpt([bad])
    assert "torch.complex64" in str(caught.value)
    assert "view_as_real" in str(caught.value)
    optimizer = SNOpt(parameters())
    with pytest.raises(UnsupportedError):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


@pytest.mark.parametrize("fallback", ["sgd", "adam"])
def test_sparse_gradients_are_refused(fallback: str) -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = SNOpt(embedding, fallback=fallback)
    embedding(torch.tensor([1, 3])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(UnsupportedError, match="sparse gradients") as caught:
        optimizer.step()
    assert "shape [5, 2]" in str(caught.value)
    assert "sparse=False" in str(caught.value)
    assert torch.equal(embedding.weight, before)


@pytest.mark.parametrize("params", [[], nn.ReLU()], ids=["no parameters", "a module without any"])
def test_nothing_to_optimize_is_refused_as_by_torch(params: Any) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        SNOpt(params)


def test_wrong_parameters_are_refused_as_by_torch() -> None:
    p = parameters()[0]
    with pytest.raises(TypeError, match="iterable"):
        SNOpt(p)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        SNOpt([1.0])
    with pytest.raises(ValueError, match="non-leaf"):
        SNOpt([p * 2])
    with pytest.raises(ValueError, match="more than one parameter group"):
        SNOpt([{"params": [p]}, {"params": [p]}])
