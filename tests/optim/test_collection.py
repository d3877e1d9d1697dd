"""When curvature is collected, from which passes, and that nothing of it stays behind."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

from tests.curvature.dense import input_patches, moments, output_gradients
from tests.optim.problems import Classifier, Field, batch, flat, hooks, loss_of, plain, train
from tests.reference import relative_error
from torchdyn_snopt import SNOpt, UnsupportedError, solve_stats
from torchdyn_snopt.curvature import registry
from torchdyn_snopt.curvature.factors import LayerSums

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def quick_gc() -> Iterator[None]:
    """The many objects of the imported libraries are left out of collections and counts."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layer of each sum that is added to, in order."""
    layers: list[nn.Module] = []
    original = LayerSums.add

    def add(self: LayerSums, *args: object, **kwargs: object) -> int:
        layers.append(self.module)
        return original(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LayerSums, "add", add)
    return layers


# --- when -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("update_freq", [1, 3, 100])
def test_curvature_is_collected_on_refresh_iterations_only(
    added: list[nn.Module], update_freq: int
) -> None:
    model = Classifier()
    optimizer = SNOpt(model, preconditioner="kfe_adam", update_freq=update_freq, lr=1e-3)
    evaluations = []
    for step in range(7):
        due = step % update_freq == 0
        # Encoder, head, and both layers of the field, which know that a solve is running.
        assert hooks(model) == (4 if due else 0)
        assert [c.active for c in optimizer._collectors] == [due]
        added.clear()
        train(model, optimizer, range(step, step + 1))
        evaluations.append(solve_stats(model.node).nfe_backward)
        # Each layer of the field once at each of the two stages of heun, those outside once.
        assert len(added) == (6 if due else 0)
    # A collecting solve evaluates the field as often as a plain one.
    assert len(set(evaluations)) == 1


def test_evaluation_and_no_grad_passes_collect_nothing(added: list[nn.Module]) -> None:
    model = Classifier()
    optimizer = SNOpt(model, update_freq=1)
    with torch.no_grad():
        model(batch(0)[0])
    loss_of(model, 0)  # no backward pass
    for recorder in optimizer._recorders:
        recorder.deliver()
    assert added == []
    assert not optimizer._collectors[0].collected()


def test_a_graph_that_outlives_its_iteration_adds_nothing_later() -> None:
    model = plain()
    optimizer = SNOpt(model, preconditioner="kfe_adam", update_freq=3)
    loss = loss_of(model, 0)
    optimizer.step()  # without gradients nothing moves, and the next refresh is two steps away
    loss.backward()
    assert not optimizer._recorders[0]._uses


@pytest.mark.usefixtures("quick_gc")
def test_a_dropped_optimizer_leaves_no_hook_and_no_request(added: list[nn.Module]) -> None:
    """As when a notebook cell is run again."""
    model = Classifier()
    before = len(registry._collectors)
    for _ in range(3):
        optimizer = SNOpt(model, update_freq=1)
    gc.collect()
    assert hooks(model) == 4
    assert len(registry._collectors) == before + 1
    train(model, optimizer, range(1))
    assert len(added) == 6
    del optimizer
    gc.collect()
    assert hooks(model) == 0
    assert len(registry._collectors) == before
    added.clear()
    loss_of(model, 1).backward()
    assert added == []


# --- what stays behind ----------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_gc")
@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac", "ekfac"])
@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_dropping_model_and_optimizer_leaves_nothing(preconditioner: str, first: str) -> None:
    gc.collect()
    before = len(registry._collectors), len(registry._failed)
    model = Classifier()
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=2)
    train(model, optimizer, range(3))
    loss_of(model, 3).backward()  # curvature that nobody takes
    refs = [weakref.ref(model), weakref.ref(optimizer), *map(weakref.ref, model.parameters())]
    refs += [weakref.ref(c) for c in optimizer._collectors]
    if first == "model":
        del model
        gc.collect()
        optimizer.zero_grad()
        del optimizer
    else:
        del optimizer
        gc.collect()
        assert all(not m._forward_hooks for m in model.modules())
        del model
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
    assert (len(registry._collectors), len(registry._failed)) == before


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.usefixtures("quick_gc")
@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac", "ekfac"])
def test_two_hundred_iterations_keep_the_number_of_tensors(preconditioner: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = SNOpt(model, 1e-3, preconditioner=preconditioner, update_freq=4)
    train(model, optimizer, range(8))
    optimizer.zero_grad()
    before = tensors()
    train(model, optimizer, range(8, 200))
    optimizer.zero_grad()
    assert tensors() == before


@pytest.mark.usefixtures("quick_gc")
def test_solves_keep_the_number_of_tensors() -> None:
    model = Classifier()
    optimizer = SNOpt(model, 1e-3, update_freq=2)
    train(model, optimizer, range(4))
    optimizer.zero_grad()
    before = tensors()
    train(model, optimizer, range(4, 24))
    optimizer.zero_grad()
    assert tensors() == before


# --- from which passes ----------------------------------------------------------------------------


class Euler(nn.Module):
    """x ← x + dt·F(t, x), by hand, keeping what goes into and comes out of each layer."""

    def __init__(self, field: Field, steps: int) -> None:
        super().__init__()
        self.field, self.steps = field, steps
        self.calls: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls = {self.field.first: [], self.field.second: []}
        for i in range(self.steps):
            t = torch.full((len(x), 1), i / self.steps)
            h = self.keep(self.field.first, torch.cat([x, t], 1))
            x = x + self.keep(self.field.second, torch.tanh(h)) / self.steps
        return x

    def keep(self, layer: nn.Module, z: Tensor) -> Tensor:
        h = layer(z)
        h.retain_grad()
        self.calls[layer].append((z.detach(), h))
        return h


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_a_network_with_sensitivity_autograd(sharing: str) -> None:
    """A layer is called at each step of one pass: these are further positions of its samples."""
    steps, x = 5, torch.randn(6, 3)
    times = torch.linspace(0.0, 1.0, steps + 1)
    field = Field()
    start = copy.deepcopy(field.state_dict())
    node = NeuralODE(field, solver="euler", sensitivity="autograd", return_t_eval=False)
    optimizer = SNOpt(node, preconditioner="kfac", weight_sharing=sharing, factor_decay=0.0)
    loss = node(x, times)[-1].square().sum(1).mean()
    loss.backward()
    optimizer.step()
    field.load_state_dict(start)
    by_hand = Euler(field, steps)
    expected = by_hand(x).square().sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    expected.backward()
    for layer, calls in by_hand.calls.items():
        patches = [input_patches(layer, z) for z, _ in calls]
        gradients = [output_gradients(layer, len(x) * h.grad) for _, h in calls]
        assert len(calls) == steps
        a, b = moments(patches, gradients, sharing, bias=True)
        assert relative_error(optimizer.state[layer.weight]["A"], a[0]) < 1e-12
        assert relative_error(optimizer.state[layer.weight]["B"], b[0]) < 1e-12


@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac"])
def test_a_network_with_sensitivity_autograd_trains(preconditioner: str) -> None:
    model = Classifier(sensitivity="autograd")
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=3)
    before = sum(loss_of(model, step).item() for step in range(100, 105))
    train(model, optimizer, range(25))
    after = sum(loss_of(model, step).item() for step in range(100, 105))
    assert after < 0.7 * before
    treated = dict(optimizer.summary())
    assert treated["node.vf.vf.first.weight"] == preconditioner
    assert optimizer.state[model.node.vf.vf.first.weight]["ready"]


def factors_of(optimizer: SNOpt, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    for recorder in optimizer._recorders:
        recorder.deliver()
    factors = optimizer._collectors[0].factors(layer.weight)
    assert factors is not None
    optimizer.zero_grad()
    return factors.A, factors.B


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_an_unbatched_input_is_one_sample(sharing: str) -> None:
    layer, x = nn.Linear(4, 3), torch.randn(4)
    optimizer = SNOpt(layer, weight_sharing=sharing)
    layer(x).square().sum().backward()
    single = factors_of(optimizer, layer)
    layer(x[None]).square().sum(1).mean().backward()
    batched = factors_of(optimizer, layer)
    for one, other in zip(single, batched, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_calls_with_batches_of_different_sizes_are_different_samples(sharing: str) -> None:
    layer, x = nn.Linear(4, 3), torch.randn(5, 4)
    optimizer = SNOpt(layer, weight_sharing=sharing)
    (layer(x[:2]).square().sum() + layer(x[2:]).square().sum()).div(5).backward()
    apart = factors_of(optimizer, layer)
    layer(x).square().sum(1).mean().backward()
    together = factors_of(optimizer, layer)
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other)


def test_an_empty_batch_adds_nothing() -> None:
    layer = nn.Linear(4, 3)
    optimizer = SNOpt(layer, preconditioner="kfac")
    before = flat(layer)
    layer(torch.randn(0, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(flat(layer), before)
    assert "A" not in optimizer.state[layer.weight]


def test_an_input_given_by_keyword_is_not_recorded() -> None:
    layer = nn.Linear(4, 3)
    optimizer = SNOpt(layer, 0.1, preconditioner="kfac")
    before = layer.weight.detach().clone()
    layer(input=torch.randn(5, 4)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight, before - 0.1 * layer.weight.grad)


def test_layers_that_share_a_weight() -> None:
    class Tied(nn.Module):
        def __init__(self, *biases: bool) -> None:
            super().__init__()
            self.one, self.two = (nn.Linear(3, 3, bias=bias) for bias in biases)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.tanh(self.one(x)))

    tied, x = Tied(False, False), torch.randn(6, 3)
    optimizer = SNOpt(tied, preconditioner="kfac", factor_decay=0.0)
    tied(x).square().sum(1).mean().backward()
    optimizer.step()
    assert torch.isfinite(tied.one.weight).all()
    assert optimizer.state[tied.one.weight]["A"].shape == (3, 3)
    unlike = Tied(True, False)
    optimizer = SNOpt(unlike, preconditioner="kfac")
    unlike(x).square().sum(1).mean().backward()
    with pytest.raises(UnsupportedError, match="share a weight") as caught:
        optimizer.step()
    assert "give both layers a bias or none" in str(caught.value)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_calls_of_a_checkpointed_layer_are_positions_of_its_samples(sharing: str) -> None:
    model = nn.ModuleDict({"first": nn.Linear(3, 4), "cell": nn.Linear(4, 4)})
    x = torch.randn(5, 3)
    seen = {}
    for checkpointed in (False, True):
        optimizer = SNOpt(model, preconditioner="kfac", update_freq=1, weight_sharing=sharing)
        optimizer.zero_grad()
        h = torch.tanh(model["first"](x))
        for _ in range(2):  # each call has its gradient before the other one is even recomputed
            if checkpointed:
                h = torch.utils.checkpoint.checkpoint(model["cell"], h, use_reentrant=False)
            else:
                h = model["cell"](h)
            h = torch.tanh(h)
        h.square().sum().backward()
        for recorder in optimizer._recorders:
            recorder.deliver()
        seen[checkpointed] = optimizer._collectors[0].factors(model["cell"].weight)
    assert relative_error(seen[True].A, seen[False].A) < 1e-12
    assert relative_error(seen[True].B, seen[False].B) < 1e-12
