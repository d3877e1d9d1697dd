"""A of a large convolution from some samples of a batch: how many, and what comes of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torchdyn.core import NeuralODE

import torchdyn_snopt
from tests.curvature.dense import input_patches, layer_moments, moments
from tests.curvature.test_layers import LAYERS
from tests.optim.problems import averages
from torchdyn_snopt import SNOpt
from torchdyn_snopt.curvature import layers
from torchdyn_snopt.curvature.factors import CurvatureSpec, LayerSums, Use
from torchdyn_snopt.curvature.layers import enough_samples

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")

N = 7

# name: shape of one sample's input
SHAPES = {
    "1d": (2, 8), "1d, all at once": (4, 9), "2d": (2, 5, 4), "2d, no bias": (2, 5, 4),
    "2d, stride": (2, 7, 5), "2d, padding": (2, 3, 2), "2d, same": (2, 3, 4),
    "2d, same, dilated": (2, 3, 2), "2d, valid": (2, 3, 3), "2d, reflect": (2, 3, 2),
    "2d, groups": (4, 3, 3), "2d, depthwise": (3, 4, 4), "3d": (2, 2, 2, 2),
}  # fmt: skip
# name: layer, shape
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d, 1x1": (lambda: nn.Conv2d(6, 2, 1), (6, 2, 2)),
    **{name: (LAYERS[f"conv{name}"][0], shape) for name, shape in SHAPES.items()},
}
# Less than N samples of these have two patches for each dimension of A.
FEW = ["1d", "2d", "2d, no bias", "2d, stride", "2d, same", "2d, groups", "1d, all at once"]


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """No number of multiplications is cheap."""
    monkeypatch.setattr(layers, "CHEAP", 0.0)


def make(name: str, batch: int = N) -> tuple[nn.Module, Use]:
    build, shape = CONVOLUTIONS[name]
    module = build()
    z = torch.randn(batch, *shape)
    return module, Use(z, torch.randn_like(module(z)))


def needed(module: nn.Module, use: Use) -> int:
    """By what the layer itself returns: twice as many patches as A has dimensions."""
    locations, size = math.prod(use.g.shape[2:]), module.weight[0].numel()
    return math.ceil(2 * size / locations)


def sums_of(
    module: nn.Module, evaluations: list[list[Use]], batch: int = N, **spec: Any
) -> LayerSums:
    """Evaluations with the weights 1, 2, … of a quadrature."""
    spec = {"estimate": True, "reduction": "sum", **spec}
    sums = LayerSums(module, CurvatureSpec(**spec), bias=module.bias is not None)
    for number, uses in enumerate(evaluations, start=1):
        samples = sums.add(uses, batch, float(number))
    sums.accept()
    sums.close(samples, batch, 1.0)
    return sums


def evenly(module: nn.Module, use: Use) -> Use:
    some = needed(module, use)
    step = len(use.z) // some
    return Use(use.z[::step][:some], use.g[::step][:some])


def close(value: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-12)


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_as_many_as_have_two_patches_for_each_dimension(name: str) -> None:
    module, use = make(name, 50)
    some = enough_samples(module, use.z, 50)
    assert some == needed(module, use)
    assert 1 <= some < 50
    for batch in (1, some, some + 1):
        assert enough_samples(module, use.z[:batch], batch) == min(batch, some)


def test_what_decides_is_the_greater_of_two_numbers_of_patches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, z = nn.Conv2d(2, 3, 3), torch.randn(50, 2, 5, 4)  # 6 locations, 18 dimensions
    counts = {(2, 0.0): 6, (4, 0.0): 12, (1, 100 * 18**2): 17, (4, 70 * 18**2): 12, (1, 1e9): 50}
    for (rows, cheap), count in counts.items():
        monkeypatch.setattr(layers, "ROWS_PER_DIMENSION", rows)
        monkeypatch.setattr(layers, "CHEAP", cheap)
        assert enough_samples(module, z, 50) == count


@pytest.mark.parametrize(
    ("channels", "groups", "size", "batch", "few"),
    [
        (8, 1, 28, 64, False),  # cheap
        (64, 1, 28, 64, True),
        (256, 1, 14, 128, True),
        (256, 64, 14, 128, False),  # many small factors
        (64, 1, 28, 2, False),  # no more than are needed
    ],
)
def test_by_default_large_convolutions_take_a_part(
    channels: int, groups: int, size: int, batch: int, few: bool
) -> None:
    module = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, device="meta")
    z = torch.empty(batch, channels, size, size, device="meta")
    some = enough_samples(module, z, batch)
    assert (some < batch) is few
    if few:
        assert some * size**2 >= 2 * 9 * channels


@pytest.mark.usefixtures("eager")
def test_layers_without_samples_to_choose_from_take_all() -> None:
    linear = nn.Linear(3, 2)
    for shape in ((50, 3), (50, 40, 3), (3,)):
        assert enough_samples(linear, torch.randn(shape), 50) == 50
    module = nn.Conv2d(2, 3, 3)
    for shape in ((2, 5, 4), (100, 2, 5, 4), (1, 2, 5, 4)):  # unbatched, folded, another batch
        assert enough_samples(module, torch.randn(shape), 50) == 50
    assert enough_samples(module, torch.randn(50, 2, 5, 4), 50) == 6


# --- what comes of it -----------------------------------------------------------------------------


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_is_that_of_some_samples_and_b_that_of_all(name: str) -> None:
    module, use = make(name)
    assert needed(module, use) < N or name not in FEW
    factors = sums_of(module, [[use]]).factors()
    close(factors.A, layer_moments(module, [evenly(module, use)])[0])
    close(factors.B, layer_moments(module, [use])[1])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_else_is_as_if_all_samples_had_been_taken(name: str, reduction: str) -> None:
    module, use = make(name)
    _, other = make(name)
    evaluations = [[use], [other, use]]
    some = sums_of(module, evaluations, reduction=reduction)
    whole = sums_of(module, evaluations, reduction=reduction, estimate=False)
    assert some.totals().numbers() == pytest.approx(whole.totals().numbers(), rel=1e-12)
    left, right = some.factors(), whole.factors()
    assert torch.equal(left.B, right.B)
    assert (left.scale, left.fisher_scale) == (right.scale, right.fisher_scale)
    assert (left.A - right.A).norm() > 1e-2 * right.A.norm()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", ["2d", "2d, stride", "2d, groups"])
def test_evaluations_and_uses_add_up(name: str) -> None:
    """Uses of one geometry and of another one, of which other numbers of samples are enough."""
    module, one = make(name)
    z = torch.randn(N, *(size + 2 * (i > 0) for i, size in enumerate(one.z.shape[1:])))
    other = Use(z, torch.randn_like(module(z)))
    assert needed(module, other) < needed(module, one) < N
    factors = sums_of(module, [[one], [other, one], [other]]).factors()
    parts = [layer_moments(module, [evenly(module, use)])[0] for use in (one, other)]
    close(factors.A, (1.0 + 2.0) * parts[0] + (2.0 + 3.0) * parts[1])


@pytest.mark.usefixtures("eager")
def test_passes_over_two_batches_count_by_their_samples() -> None:
    module, use = make("2d")
    _, last = make("2d", N + 3)
    sums = sums_of(module, [[use]])
    sums.absorb(sums_of(module, [[last]], N + 3))
    parts = [layer_moments(module, [evenly(module, one)])[0] for one in (use, last)]
    close(sums.factors().A, (N * parts[0] + (N + 3) * parts[1]) / (2 * N + 3))


@pytest.mark.usefixtures("eager")
def test_the_other_samples_do_not_matter_for_a() -> None:
    module, use = make("2d")
    z = use.z.clone()
    z[needed(module, use) :] = math.nan
    assert torch.equal(
        sums_of(module, [[use._replace(z=z)]]).factors().A, sums_of(module, [[use]]).factors().A
    )


@pytest.mark.usefixtures("eager")
def test_columns_of_a_loss_are_taken_of_all_samples() -> None:
    module, use = make("2d")
    columns = torch.randn(2, *use.g.shape)
    seeded = [[use._replace(columns=columns)]]
    some = sums_of(module, seeded, curvature="ggn")
    whole = sums_of(module, seeded, curvature="ggn", estimate=False)
    assert torch.equal(some.factors().B, whole.factors().B)
    close(some.factors().A, layer_moments(module, [evenly(module, use)])[0])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", FEW)
def test_reduce_takes_all_samples(name: str) -> None:
    module, use = make(name)
    factors = sums_of(module, [[use]], weight_sharing="reduce").factors()
    a, b = layer_moments(module, [use], "reduce")
    close(factors.A, a)
    close(factors.B, b)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("shape", [(N, 4), (N, 30, 4)])
def test_linear_layers_take_all_samples(shape: tuple[int, ...]) -> None:
    module = nn.Linear(4, 2)
    z = torch.randn(shape)
    use = Use(z, torch.randn_like(module(z)))
    close(sums_of(module, [[use]]).factors().A, layer_moments(module, [use])[0])


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", FEW)
def test_unbatched_and_folded_input_is_left_whole(name: str) -> None:
    module, use = make(name, 2 * N)
    lone = Use(use.z[0], use.g[0])
    close(
        sums_of(module, [[lone]]).factors().A, layer_moments(module, [Use(use.z[:1], use.g[:1])])[0]
    )
    # 2 N evaluated for N samples: two positions each.
    close(sums_of(module, [[use]]).factors().A, 2.0 * layer_moments(module, [use])[0])


# --- the optimizer --------------------------------------------------------------------------------


class Images(nn.Module):
    """A convolution before an ODE, and one within it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 2, 3)
        self.field = nn.Conv2d(2, 2, 3, padding=1)
        settings = {"solver": "heun", "solver_adjoint": "heun", "return_t_eval": False}
        self.node = NeuralODE(nn.Sequential(self.field, nn.Tanh()), sensitivity="snopt", **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.node(self.encoder(x), torch.linspace(0.0, 1.0, 2))[-1]


def first_curvature(samples: int = 20, **settings: Any) -> tuple[Images, Tensor, dict[str, Tensor]]:
    """A after one step, by layers, and the input that it came from."""
    torch.manual_seed(4)
    model, x = Images(), torch.randn(samples, 1, 7, 6)
    optimizer = SNOpt(model, **settings)
    torchdyn_snopt.MSELoss()(model(x), torch.zeros(samples, 2, 5, 4)).backward()
    optimizer.step()
    names = {"encoder": model.encoder, "field": model.field}
    return model, x, {name: averages(optimizer.state[m.weight])[0] for name, m in names.items()}


@pytest.mark.usefixtures("eager")
def test_the_trust_region_takes_a_part() -> None:
    model, x, found = first_curvature()
    some = math.ceil(2 * 9 / 20)
    patches = input_patches(model.encoder, x[:: len(x) // some][:some])
    close(found["encoder"], moments([patches], [patches], "expand", bias=True)[0][0])
    _, _, fewer = first_curvature(2)
    assert not torch.equal(fewer["field"], found["field"])


@pytest.mark.parametrize("preconditioner", ["kfac", "kfe_adam", "ekfac"])
def test_the_others_never_do(preconditioner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"preconditioner": preconditioner, "weight_sharing": "expand"}
    model, x, whole = first_curvature(**settings)
    patches = input_patches(model.encoder, x)
    close(whole["encoder"], moments([patches], [patches], "expand", bias=True)[0][0])
    monkeypatch.setattr(layers, "CHEAP", 0.0)
    _, _, found = first_curvature(**settings)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def stack_and_loss(loss: nn.Module) -> tuple[nn.Module, Any]:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3)
    )
    x = torch.randn(20, 1, 12, 12)
    return model, lambda: loss(model(x), torch.zeros(20, 2, 6, 6))


@pytest.mark.usefixtures("eager")
def test_inputs_are_let_go_of_as_the_graph_does() -> None:
    """But for the last one that was kept, behind which no layer has come yet."""
    model, loss_of = stack_and_loss(nn.MSELoss())
    inputs: dict[nn.Module, StorageWeakRef] = {}
    for layer in (model[2], model[4]):
        layer.register_forward_pre_hook(
            lambda layer, args: inputs.update({layer: StorageWeakRef(args[0].untyped_storage())})
        )
    optimizer = SNOpt(model)
    loss = loss_of()
    assert not any(z.expired() for z in inputs.values())
    loss.backward()
    assert loss.grad_fn is not None  # and with it the hooks that were left in the graph
    assert all(z.expired() for z in inputs.values())
    optimizer.step()
    whole = SNOpt(model, preconditioner="kfac", weight_sharing="expand")
    loss = loss_of()
    loss.backward()
    assert not any(z.expired() for z in inputs.values())
    whole.step()


@pytest.mark.usefixtures("eager")
def test_a_second_pass_through_the_graph_adds_the_same_part_again() -> None:
    found = []
    for passes in (1, 2):
        model, loss_of = stack_and_loss(nn.MSELoss())
        optimizer = SNOpt(model)
        loss = loss_of()
        for number in range(passes):
            loss.backward(retain_graph=number + 1 < passes)
        optimizer.step()
        found.append([averages(optimizer.state[layer.weight])[0] for layer in model[::2]])
    for once, twice in zip(*found, strict=True):
        close(twice, once)


def test_what_the_collectors_are_asked_for() -> None:
    asked = {
        name: SNOpt(Images(), preconditioner=name)._collectors[0].spec.estimate
        for name in ("trust_region", "kfe_adam", "kfac", "ekfac", "low_rank")
    }
    assert asked == {**dict.fromkeys(asked, False), "trust_region": True}
    assert not CurvatureSpec().estimate
