"""SNOpt behaves as every torch optimizer: closures, groups, schedulers, copies, several of them."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from tests.optim.problems import Classifier, averages, batch, flat, hooks, loss_of, plain, train
from tests.reference import relative_error
from torchdyn_snopt import SNOpt

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")

PRECONDITIONERS = ("trust_region", "kfe_adam", "kfac", "ekfac")
# Small steps: these tests compare runs, they do not train.
SETTINGS: dict[str, Any] = {"lr": 0.01, "update_freq": 3, "kl_clip": 1e-2, "weight_decay": 1e-3}


@pytest.fixture(params=PRECONDITIONERS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    clip = {} if request.param == "kfe_adam" else {"kl_clip": 1e-2}
    return {**SETTINGS, "preconditioner": request.param, **clip}


# --- closure --------------------------------------------------------------------------------------


def test_a_closure_is_the_loop_and_its_curvature_counts_in_that_step(settings) -> None:
    ours, loop = Classifier(), Classifier()
    loop.load_state_dict(ours.state_dict())
    optimizer = SNOpt(ours, **settings)
    losses = []
    for step in range(7):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = loss_of(ours, step)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    assert losses == train(loop, SNOpt(loop, **settings), range(7))
    assert torch.equal(flat(ours), flat(loop))


def test_a_step_without_closure_returns_nothing() -> None:
    model = plain()
    optimizer = SNOpt(model)
    loss_of(model, 0).backward()
    assert optimizer.step() is None


# --- groups ---------------------------------------------------------------------------------------


def test_groups_with_settings_of_their_own_are_optimizers_of_their_own() -> None:
    together, apart = Classifier(), Classifier()
    apart.load_state_dict(together.state_dict())
    own = [
        {"preconditioner": "kfac", "lr": 0.02, "update_freq": 2, "momentum": 0.5, "kl_clip": 1e-2},
        {"preconditioner": "kfe_adam", "lr": 0.005, "alpha": 0.8, "weight_sharing": "expand"},
        {"fallback": "adam", "weight_decay": 0.1},
    ]

    def parts(model: Classifier) -> list[list[nn.Parameter]]:
        field = model.node.vf.vf
        rest = [*model.encoder.parameters(), *model.norm.parameters(), *model.head.parameters()]
        return [list(field.first.parameters()), list(field.second.parameters()), rest]

    groups = [{"params": p, **s} for p, s in zip(parts(together), own, strict=True)]
    train(together, SNOpt(groups), range(6))
    optimizers = [SNOpt(p, **s) for p, s in zip(parts(apart), own, strict=True)]
    for step in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(apart, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(flat(together), flat(apart))


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_group_added_later_is_one_given_at_once(preconditioner: str) -> None:
    once, later = Classifier(), Classifier()
    later.load_state_dict(once.state_dict())
    choice = {**SETTINGS, "preconditioner": preconditioner}

    def split(model: Classifier) -> list[dict[str, Any]]:
        rest = [*model.encoder.parameters(), *model.head.parameters()]
        return [{"params": model.node.parameters()}, {"params": rest, "lr": 0.03}]

    train(once, SNOpt(split(once), **choice), range(5))
    first, second = split(later)
    optimizer = SNOpt([first], **choice)
    optimizer.add_param_group(second)
    train(later, optimizer, range(5))
    assert torch.equal(flat(once), flat(later))


def test_a_group_added_in_training_has_its_curvature_from_its_first_step() -> None:
    model = Classifier()
    field = model.node.vf.vf
    optimizer = SNOpt(model.head.parameters(), update_freq=5)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": field.first.parameters(), "update_freq": 4})
    train(model, optimizer, range(2, 3))
    assert optimizer.state[field.first.weight]["ready"]
    assert [g["step"] for g in optimizer.param_groups] == [3, 1]


def test_unfrozen_layers_of_the_module_join_by_name() -> None:
    model = plain()
    model[0].requires_grad_(False)
    optimizer = SNOpt(model, preconditioner="kfac")
    train(model, optimizer, range(2))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.001})
    assert dict(optimizer.summary())["0.weight"] == "kfac"
    train(model, optimizer, range(2, 4))
    assert "A_inv" in optimizer.state[model[0].weight]


# --- schedulers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
        lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
        lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=8),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[2],
        ),
    ],
    ids=["StepLR", "LambdaLR", "CosineAnnealingLR", "OneCycleLR", "SequentialLR"],
)
def test_schedulers_are_followed(make: Any, recwarn: pytest.WarningsRecorder) -> None:
    """The same as setting lr (and momentum, which OneCycleLR cycles) by hand."""
    scheduled, by_hand = plain(), plain()
    by_hand.load_state_dict(scheduled.state_dict())
    one, other = (SNOpt(m, **SETTINGS, preconditioner="kfac") for m in (scheduled, by_hand))
    scheduler, seen = make(one), []
    for step in range(6):
        seen.append((one.param_groups[0]["lr"], one.param_groups[0]["momentum"]))
        train(scheduled, one, range(step, step + 1))
        scheduler.step()
    assert len(set(seen)) > 2
    for step, (lr, momentum) in enumerate(seen):
        other.param_groups[0].update(lr=lr, momentum=momentum)
        train(by_hand, other, range(step, step + 1))
    assert torch.equal(flat(scheduled), flat(by_hand))
    # torch warns if scheduler.step() is called before optimizer.step(); it must see our steps.
    assert not [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]


def test_a_plateau_scheduler_lowers_the_rate() -> None:
    model = plain()
    optimizer = SNOpt(model, 0.01)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


# --- gradients ------------------------------------------------------------------------------------


def test_clearing_gradients_to_zero_or_to_none_is_the_same(settings) -> None:
    models = [Classifier(), Classifier()]
    models[1].load_state_dict(models[0].state_dict())
    for model, set_to_none in zip(models, (True, False), strict=True):
        optimizer = SNOpt(model, **settings)
        for step in range(5):
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all((p.grad is None) == (set_to_none or step == 0) for p in model.parameters())
            loss_of(model, step).backward()
            optimizer.step()
    assert torch.equal(flat(models[0]), flat(models[1]))


def test_clearing_gradients_forgets_their_curvature(settings) -> None:
    ours, clean = Classifier(), Classifier()
    clean.load_state_dict(ours.state_dict())
    optimizer = SNOpt(ours, **settings)
    (100 * loss_of(ours, 77)).backward()  # a pass that is thrown away
    train(ours, optimizer, range(4))
    train(clean, SNOpt(clean, **settings), range(4))
    assert torch.equal(flat(ours), flat(clean))


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_equal_the_whole_batch(settings, parts: int) -> None:
    whole, micro = Classifier(), Classifier()
    micro.load_state_dict(whole.state_dict())
    one, other = SNOpt(whole, **settings), SNOpt(micro, **settings)
    for step in range(4):
        one.zero_grad()
        loss_of(whole, step).backward()
        one.step()
        other.zero_grad()
        x, y = batch(step)
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            ((micro(xs) - ys).square().sum(1).mean() / parts).backward()
        other.step()
        for p, q in zip(whole.parameters(), micro.parameters(), strict=True):
            if "groups" in one.state[p]:
                pairs = zip(averages(one.state[p]), averages(other.state[q]), strict=True)
                assert all(relative_error(found, factor) < 1e-10 for factor, found in pairs)
        assert relative_error(flat(micro), flat(whole)) < 1e-6
    assert "groups" in one.state[whole.encoder.weight]


@pytest.mark.parametrize("foreach", [None, True])
def test_tensor_by_tensor_is_the_same(settings, foreach: bool | None) -> None:
    singly, together = Classifier(), Classifier()
    together.load_state_dict(singly.state_dict())
    train(singly, SNOpt(singly, **settings, foreach=False), range(5))
    train(together, SNOpt(together, **settings, foreach=foreach), range(5))
    assert relative_error(flat(singly), flat(together)) < 1e-12


def test_maximizing_is_minimizing_the_negative(settings) -> None:
    up, down = Classifier(), Classifier()
    down.load_state_dict(up.state_dict())
    one, other = SNOpt(up, **settings, maximize=True), SNOpt(down, **settings)
    for step in range(5):
        one.zero_grad()
        loss_of(up, step).backward()
        one.step()
        other.zero_grad()
        (-loss_of(down, step)).backward()
        other.step()
    assert relative_error(flat(up), flat(down)) < 1e-12


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize(
    ("preconditioner", "steps"),
    [("kfac", 0), ("ekfac", 2), ("kfe_adam", 3), ("trust_region", 11)],
    ids=["new", "between refreshes", "at a refresh", "trust region"],
)
def test_a_copy_goes_on_alike_and_apart(preconditioner: str, way: str, steps: int) -> None:
    model, settings = Classifier(), {**SETTINGS, "preconditioner": preconditioner}
    optimizer = SNOpt(model, **settings)
    train(model, optimizer, range(steps))
    pair = (model, optimizer)
    other, copied = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert copied.summary() == optimizer.summary()
    before = flat(model)
    train(other, copied, range(steps, steps + 5))
    assert torch.equal(flat(model), before)
    train(model, optimizer, range(steps, steps + 5))
    assert torch.equal(flat(model), flat(other))
    assert not torch.equal(flat(model), before)
    assert hooks(model) == hooks(other)
    copied.add_param_group({"params": [nn.Parameter(torch.ones(2))], "preconditioner": "kfac"})
    assert copied.param_groups[1]["update_freq"] == settings["update_freq"]


def test_a_copied_model_alone_collects_nothing() -> None:
    """As weight averaging does: the copy belongs to no optimizer."""
    model = Classifier()
    optimizer = SNOpt(model, update_freq=1)
    average = torch.optim.swa_utils.AveragedModel(model)
    alone = pickle.loads(pickle.dumps(model))
    for copied in (average, alone):
        loss_of(copied, 0).backward()
        assert hooks(copied) == 0
    assert hooks(model) > 0
    assert all(not recorder._uses for recorder in optimizer._recorders)
    assert all(not collector.collected() for collector in optimizer._collectors)
    train(model, optimizer, range(2))
    average.update_parameters(model)


# --- several optimizers ---------------------------------------------------------------------------


def test_optimizers_on_disjoint_parameters_do_not_disturb_each_other() -> None:
    """Two SNOpts, and one of torch's own for the rest, against one with groups."""
    together, apart = Classifier(), Classifier()
    apart.load_state_dict(together.state_dict())

    def rest(model: Classifier) -> list[nn.Parameter]:
        return [*model.encoder.parameters(), *model.norm.parameters(), *model.head.parameters()]

    groups = [{"params": together.node.parameters()}, {"params": rest(together), "update_freq": 2}]
    train(together, SNOpt(groups, **{**SETTINGS, "momentum": 0.9}, preconditioner="kfac"), range(6))
    optimizers = [
        SNOpt(apart.node.parameters(), **SETTINGS, momentum=0.9, preconditioner="kfac"),
        torch.optim.SGD(rest(apart), SETTINGS["lr"], 0.9, weight_decay=SETTINGS["weight_decay"]),
    ]
    for step in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(apart, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(flat(together), flat(apart))


def test_two_optimizers_on_one_model_collect_the_same() -> None:
    model = Classifier()
    one = SNOpt(model, lr=0.0, preconditioner="kfac", weight_sharing="expand")
    other = SNOpt(model, lr=0.0, preconditioner="ekfac", weight_sharing="expand", update_freq=2)
    for step in range(3):
        one.zero_grad()
        other.zero_grad()
        loss_of(model, step).backward()
        one.step()
        other.step()
        if step == 0:
            for p in model.parameters():
                for factor in {"A", "B"} & one.state[p].keys():
                    assert torch.equal(one.state[p][factor], other.state[p][factor])
    assert [g["step"] for o in (one, other) for g in o.param_groups] == [3, 3]


def test_alternating_losses_keep_their_curvature_apart() -> None:
    """Generator and critic: the passes of the one run through the layers of the other."""
    both, alone = plain(), plain()
    alone.load_state_dict(both.state_dict())
    reference = SNOpt(alone[0], update_freq=1)
    lower, upper = SNOpt(both[0], update_freq=1), SNOpt(both[4], lr=0.0, update_freq=1)
    for step in range(3):
        train(alone, reference, range(step, step + 1))
        for optimizer, scale in ((lower, 1.0), (upper, 1e3)):
            lower.zero_grad()
            upper.zero_grad()
            (scale * loss_of(both, step)).backward()
            optimizer.step()
    found, expected = (
        averages(o.state[m[0].weight]) for o, m in ((lower, both), (reference, alone))
    )
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(flat(both), flat(alone))
