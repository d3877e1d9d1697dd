"""Saving and loading: 16 steps are 11, a file, fresh objects, and 5 more, to the last bit."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.problems import Classifier, flat, hooks, loss_of, plain, train
from torchdyn_snopt import SNOpt

PRECONDITIONERS = ("trust_region", "kfe_adam", "kfac", "ekfac")


def make(preconditioner: str, **settings: Any) -> tuple[Classifier, SNOpt]:
    model = Classifier()
    defaults = {"lr": 0.01, "update_freq": 3, "weight_decay": 1e-3, "factor_decay": 0.8}
    return model, SNOpt(model, preconditioner=preconditioner, **{**defaults, **settings})


def through_a_file(*state_dicts: Any) -> list[Any]:
    file = io.BytesIO()
    torch.save(list(state_dicts), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize(
    ("fallback", "at"), [("adam", 11), ("sgd", 12)], ids=["between refreshes", "at a refresh"]
)
def test_a_run_is_its_two_halves(preconditioner: str, fallback: str, at: int) -> None:
    whole, reference = make(preconditioner, fallback=fallback)
    first, interrupted = make(preconditioner, fallback=fallback)
    first.load_state_dict(whole.state_dict())
    losses = train(whole, reference, range(16))
    early = train(first, interrupted, range(at))
    saved = through_a_file(first.state_dict(), interrupted.state_dict())
    second, resumed = make(preconditioner, fallback=fallback, lr=5.0)
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert early + train(second, resumed, range(at, 16)) == losses
    assert torch.equal(flat(second), flat(whole))
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        mine, theirs = reference.state[p], resumed.state[q]
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            same = torch.equal(value, theirs[key]) if isinstance(value, Tensor) else None
            assert value == theirs[key] if same is None else same, key


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_what_is_loaded_is_a_copy(preconditioner: str) -> None:
    model, optimizer = make(preconditioner)
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    frozen = through_a_file(saved)[0]
    other, loaded = make(preconditioner)
    loaded.load_state_dict(saved)
    train(other, loaded, range(2, 6))
    now = optimizer.state_dict()
    assert now["param_groups"] == frozen["param_groups"]
    for i, entries in frozen["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                assert torch.equal(now["state"][i][key], value), key
            else:
                assert now["state"][i][key] == value, key


def test_settings_come_with_the_state() -> None:
    """Also those that say what is collected."""
    model, optimizer = make("kfac", weight_sharing="expand", reduction="sum")
    train(model, optimizer, range(2))
    other, loaded = make("kfe_adam")
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["preconditioner"] == "kfac"
    (collector,) = loaded._collectors
    assert (collector.spec.weight_sharing, collector.spec.reduction) == ("expand", "sum")
    other.load_state_dict(model.state_dict())
    assert train(model, optimizer, range(2, 6)) == train(other, loaded, range(2, 6))


def test_loading_renews_the_hooks_and_forgets_pending_curvature() -> None:
    model, optimizer = make("kfac")
    train(model, optimizer, range(2))
    between = optimizer.state_dict()
    train(model, optimizer, range(2, 3))
    at_refresh = optimizer.state_dict()
    supported = hooks(model)
    assert supported == 4
    loss_of(model, 3).backward()  # collected, and then abandoned
    optimizer.load_state_dict(at_refresh)
    assert hooks(model) == supported
    assert not optimizer._collectors[0].collected()
    assert not optimizer._recorders[0]._uses
    optimizer.load_state_dict(between)
    assert hooks(model) == 0
    assert not optimizer._collectors[0].active
    optimizer.load_state_dict(at_refresh)
    assert hooks(model) == supported


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_wide_factors(
    preconditioner: str, dtype: torch.dtype
) -> None:
    def build() -> tuple[nn.Module, SNOpt]:
        model = plain().to(dtype)
        return model, SNOpt(model, 0.01, preconditioner=preconditioner, update_freq=2)

    def steps(model: nn.Module, optimizer: SNOpt, count: range) -> None:
        for step in count:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 2, generator=generator).to(dtype)
            optimizer.zero_grad()
            (model(x) - x.flip(1)).square().sum(1).mean().backward()
            optimizer.step()

    whole, reference = build()
    first, interrupted = build()
    first.load_state_dict(whole.state_dict())
    steps(whole, reference, range(6))
    steps(first, interrupted, range(3))
    saved = through_a_file(first.state_dict(), interrupted.state_dict())
    second, resumed = build()
    second.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    weight = second[0].weight
    wide = {k: v.dtype for k, v in resumed.state[weight].items() if isinstance(v, Tensor)}
    assert {"A", "B"} < wide.keys() or {"U_A", "U_B"} < wide.keys()
    assert set(wide.values()) == {torch.float32}
    steps(second, resumed, range(3, 6))
    assert torch.isfinite(flat(second)).all()
    assert torch.equal(flat(second), flat(whole))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_state_follows_the_parameters_to_another_device(preconditioner: str) -> None:
    model, optimizer = make(preconditioner)
    train(model, optimizer, range(4))
    other, loaded = make(preconditioner)
    other.cuda()
    loaded.load_state_dict(optimizer.state_dict())
    for p in other.parameters():
        for key, value in loaded.state[p].items():
            assert not isinstance(value, Tensor) or value.device == p.device, key


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_the_state_holds_numbers_and_tensors_only(preconditioner: str) -> None:
    """Nothing that ties a checkpoint to objects of this process."""
    model, optimizer = make(preconditioner)
    train(model, optimizer, range(4))
    for entries in optimizer.state_dict()["state"].values():
        for key, value in entries.items():
            assert type(value) in (Tensor, int, float, bool, type(None)), key
            if isinstance(value, Tensor):
                assert not value.requires_grad, key


def test_a_checkpoint_of_another_shape_is_refused_as_by_torch() -> None:
    _, optimizer = make("kfac")
    with pytest.raises(ValueError, match="doesn't match the size"):
        SNOpt(plain()).load_state_dict(optimizer.state_dict())


def test_a_state_without_what_the_trust_region_has_noted_is_continued() -> None:
    """The steps since the last refresh count as none, and its number as 0."""
    model, optimizer = make("trust_region")
    train(model, optimizer, range(11))
    saved = optimizer.state_dict()
    for entry in ("travelled", "refreshed"):
        assert entry in saved["param_groups"][0]
        del saved["param_groups"][0][entry]
    second, resumed = make("trust_region")
    second.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    train(second, resumed, range(11, 15))
    assert torch.isfinite(flat(second)).all()
    assert resumed.param_groups[0]["refreshed"] == 14
    assert resumed.param_groups[0]["kl_clip"] != saved["param_groups"][0]["kl_clip"]
