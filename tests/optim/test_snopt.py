"""What one step does to a whole model: which layer moves how, and who is told what."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.curvature.dense import input_patches, moments, output_gradients
from tests.optim.problems import Classifier, flat, loss_of, plain, train
from tests.reference import relative_error
from torchdyn_snopt import SNOpt, record_curvature

pytestmark = pytest.mark.usefixtures("float64")

N, LR, DAMPING = 6, 0.1, 0.03
KFAC: dict[str, Any] = {
    "lr": LR,
    "preconditioner": "kfac",
    "damping": DAMPING,
    "momentum": 0.0,
    "kl_clip": math.inf,
    "weight_sharing": "expand",
}


class Single(nn.Module):
    """One layer between fixed functions, whose input and output are kept."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor) -> Tensor:
        self.z, self.h = z, self.layer(z)
        self.h.retain_grad()
        return torch.tanh(self.h)

    def loss(self, z: Tensor) -> Tensor:
        return (
            (self(z) * torch.linspace(-1.0, 2.0, self.h[0].numel()).view(self.h[0].shape))
            .pow(2)
            .flatten(1)
            .sum(1)
            .mean()
        )


LAYERS = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (4,)),
    "linear, positions": (lambda: nn.Linear(4, 3), (2, 4)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2), (2, 7)),
    "conv2d, no bias": (lambda: nn.Conv2d(2, 3, 2, bias=False), (2, 3, 3)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2, padding=1), (4, 2, 3)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 2, 3, 2)),
}


def natural(matrix: Tensor, a: Tensor, b: Tensor, damping: float) -> np.ndarray:
    """The dense solve with factored Tikhonov damping, for one group."""
    root = math.sqrt(damping)
    pi = float((a.diagonal().mean() / b.diagonal().mean()).sqrt())
    left = b.numpy() + root / pi * np.eye(len(b))
    right = a.numpy() + root * pi * np.eye(len(a))
    solved = np.linalg.solve(np.kron(left, right), matrix.numpy().reshape(-1))
    return solved.reshape(matrix.shape)


def expected_update(
    model: Single, *, bias: bool, weight_decay: float = 0.0, sharing: str = "expand"
) -> list[np.ndarray]:
    """Updates of weight and bias after a backward pass, by loops and dense matrices."""
    layer = model.layer
    patches = input_patches(layer, model.z.detach())
    gradients = output_gradients(layer, N * model.h.grad)
    a, b = moments([patches], [gradients], sharing, bias=bias)
    groups = getattr(layer, "groups", 1)
    parts = []
    for p in (layer.weight, layer.bias)[: 1 + bias]:
        parts.append((p.grad + weight_decay * p.detach()).reshape(groups, len(p) // groups, -1))
    q_u = torch.cat(parts, 2)
    update = np.stack([natural(q_u[i], a[i], b[i], DAMPING + weight_decay) for i in range(groups)])
    shape = tuple(layer.weight.shape)
    if not bias:
        return [update.reshape(shape)]
    return [update[..., :-1].reshape(shape), update[..., -1].reshape(-1)]


# --- one layer, densely ---------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", list(LAYERS))
def test_a_layer_moves_by_the_dense_solve(name: str, weight_decay: float, sharing: str) -> None:
    """γθ is in the gradient and γI in the curvature: the paper's running cost."""
    build, shape = LAYERS[name]
    model = Single(build())
    optimizer = SNOpt(model, **{**KFAC, "weight_sharing": sharing}, weight_decay=weight_decay)
    before = [p.detach().clone() for p in model.parameters()]
    model.loss(torch.randn(N, *shape)).backward()
    updates = expected_update(
        model, bias=model.layer.bias is not None, weight_decay=weight_decay, sharing=sharing
    )
    optimizer.step()
    assert len(before) == len(updates)
    for p, old, update in zip(model.parameters(), before, updates, strict=True):
        moved = ((old - p.detach()) / LR).numpy()
        np.testing.assert_allclose(moved, update, rtol=1e-7, atol=1e-10)


def test_with_a_summed_loss() -> None:
    """reduction='sum': gradients N times as large, the same factors."""
    mean, total = Single(nn.Linear(4, 3)), Single(nn.Linear(4, 3))
    total.load_state_dict(mean.state_dict())
    x = torch.randn(N, 4)
    one = SNOpt(mean, **KFAC)
    other = SNOpt(total, **{**KFAC, "lr": LR / N}, reduction="sum")
    mean.loss(x).backward()
    (total.loss(x) * N).backward()
    one.step()
    other.step()
    assert relative_error(flat(total), flat(mean)) < 1e-13


def test_a_frozen_bias_stays_out_of_the_curvature() -> None:
    model = Single(nn.Linear(4, 3))
    model.layer.bias.requires_grad_(False)
    bias = model.layer.bias.clone()
    optimizer = SNOpt(model, **KFAC)
    before = model.layer.weight.detach().clone()
    model.loss(torch.randn(N, 4)).backward()
    (update,) = expected_update(model, bias=False)
    optimizer.step()
    np.testing.assert_allclose(
        ((before - model.layer.weight.detach()) / LR).numpy(), update, rtol=1e-8
    )
    assert torch.equal(model.layer.bias, bias)
    assert optimizer.state[model.layer.weight]["A"].shape == (4, 4)


def test_the_bias_of_a_frozen_weight_takes_the_fallback() -> None:
    model = Single(nn.Linear(4, 3))
    model.layer.weight.requires_grad_(False)
    weight, bias = model.layer.weight.clone(), model.layer.bias.detach().clone()
    optimizer = SNOpt(model, **KFAC)
    model.loss(torch.randn(N, 4)).backward()
    grad = model.layer.bias.grad.clone()
    optimizer.step()
    assert torch.equal(model.layer.weight, weight)
    torch.testing.assert_close(model.layer.bias.detach(), bias - LR * grad)
    assert optimizer.summary() == [("layer.bias", "sgd (fallback)")]


def test_a_bias_in_another_group_takes_that_groups_fallback() -> None:
    model = Single(nn.Linear(4, 3))
    layer = model.layer
    # A module's layers outside of an ODE are known to SNOpt(module) only: take its layers, regroup.
    optimizer = SNOpt(nn.ModuleList([model.layer]), **KFAC)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2]
    field = Classifier()
    first = field.node.vf.vf.first
    rest = [p for p in field.parameters() if p is not first.bias]
    optimizer = SNOpt([{"params": rest}, {"params": [first.bias], "lr": 0.5}], **KFAC)
    before = first.bias.detach().clone()
    loss_of(field, 0).backward()
    grad = first.bias.grad.clone()
    optimizer.step()
    assert optimizer.state[first.weight]["A"].shape == (4, 4)
    assert torch.equal(first.bias, before - 0.5 * grad)
    assert layer.bias is not None


@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac", "ekfac"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_freezing_in_the_middle_of_training(
    preconditioner: str, frozen: str, set_to_none: bool
) -> None:
    model = plain()
    # As in torch, zeros for a gradient let weight decay go on.
    decay = 0.01 if set_to_none else 0.0
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=2, weight_decay=decay)
    train(model, optimizer, range(3))
    p = getattr(model[2], frozen)
    p.requires_grad_(False)
    kept, before = p.clone(), flat(model)
    for step in range(3, 8):
        optimizer.zero_grad(set_to_none)
        loss_of(model, step).backward()
        optimizer.step()
    assert torch.equal(p, kept)
    assert torch.isfinite(flat(model)).all()
    assert relative_error(flat(model), before) > 1e-3


def test_a_bias_that_is_unfrozen_joins_its_layer() -> None:
    model = Single(nn.Linear(4, 3))
    optimizer = SNOpt(model, **KFAC, update_freq=1)
    model.layer.bias.requires_grad_(False)
    x = torch.randn(N, 4)
    for trainable, size in ((False, 4), (True, 5), (False, 4)):
        model.layer.bias.requires_grad_(trainable)
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        assert optimizer.state[model.layer.weight]["A"].shape == (size, size)


# --- a whole network ------------------------------------------------------------------------------

FIELD = {
    f"node.vf.vf.{layer}.{part}" for layer in ("first", "second") for part in ("weight", "bias")
}
OUTSIDE = {"encoder.weight", "encoder.bias", "head.weight"}


def treatment(optimizer: SNOpt) -> dict[str, set[str]]:
    by_kind: dict[str, set[str]] = {}
    for name, how in optimizer.summary():
        by_kind.setdefault(how, set()).add(name)
    return by_kind


@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac", "ekfac"])
def test_a_module_has_encoder_and_head_preconditioned(preconditioner: str) -> None:
    model = Classifier()
    optimizer = SNOpt(model, preconditioner=preconditioner, fallback="sgd")
    expected = {preconditioner: FIELD | OUTSIDE, "sgd (fallback)": {"norm.weight", "norm.bias"}}
    assert treatment(optimizer) == expected
    train(model, optimizer, range(2))
    assert treatment(optimizer) == expected
    for name, p in model.named_parameters():
        covered = name.endswith("weight") and not name.startswith("norm")
        assert ("groups" in optimizer.state[p]) == covered, name


def test_parameters_alone_have_the_fields_layers_preconditioned() -> None:
    model = Classifier()
    optimizer = SNOpt(model.named_parameters(), preconditioner="kfac", fallback="adam")
    names = {name for name, _ in model.named_parameters()}
    assert treatment(optimizer) == {"adam (fallback)": names}
    train(model, optimizer, range(1))
    assert treatment(optimizer) == {"kfac": FIELD, "adam (fallback)": names - FIELD}


def test_names_where_there_are_none() -> None:
    model = Classifier()
    optimizer = SNOpt([{"params": model.head.parameters()}, {"params": model.norm.parameters()}])
    assert [name for name, _ in optimizer.summary()] == [
        "group 0, #0",
        "group 1, #0",
        "group 1, #1",
    ]


def test_repr_tells_how_each_parameter_is_treated() -> None:
    model = Classifier()
    text = repr(SNOpt(model, preconditioner="ekfac", damping=0.125))
    assert text.startswith("SNOpt (\nParameter Group 0\n")
    assert "    damping: 0.125\n" in text
    assert "    node.vf.vf.first.weight: ekfac\n" in text
    assert "    norm.bias: sgd (fallback)\n" in text
    bare = repr(SNOpt(model.parameters()))
    assert "    group 0, #0: adam (fallback)\n" in bare


def test_a_bias_in_another_group_shows_in_the_summary() -> None:
    model = plain()
    optimizer = SNOpt(model, preconditioner="kfac")
    model[0].bias.requires_grad_(False)
    assert dict(optimizer.summary())["0.bias"] == "sgd (fallback)"
    assert dict(optimizer.summary())["0.weight"] == "kfac"


def test_the_fields_layers_move_by_the_recorded_factors() -> None:
    """What SNOpt collects from a solve is what record_curvature shows, and the solve is dense."""
    model = Classifier()
    optimizer = SNOpt(model, **KFAC)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with record_curvature(model) as recorded:
        loss_of(model, 0).backward()
    factors = recorded.factors
    optimizer.step()
    layers = {"encoder", "head", "node.vf.vf.first", "node.vf.vf.second"}
    assert set(factors) == layers
    moved = {name: (before[name] - p.detach()) / LR for name, p in model.named_parameters()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    for layer in layers:
        parts = [f"{layer}.weight", f"{layer}.bias"][: 1 + (layer != "head")]
        stack = [torch.cat([t[n].view(len(t[n]), -1) for n in parts], 1) for t in (grads, moved)]
        f = factors[layer]
        update = natural(stack[0], f.A, f.scale * f.B, DAMPING)
        np.testing.assert_allclose(stack[1].numpy(), update, rtol=1e-6, atol=1e-10)
    for name in ("norm.weight", "norm.bias"):
        torch.testing.assert_close(moved[name], grads[name])


@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac", "ekfac"])
def test_training_goes_down(preconditioner: str) -> None:
    model = Classifier()
    settings = {"momentum": 0.0, "lr": 0.05} if preconditioner == "ekfac" else {}
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=3, **settings)
    before = sum(loss_of(model, step).item() for step in range(100, 105))
    train(model, optimizer, range(25))
    after = sum(loss_of(model, step).item() for step in range(100, 105))
    assert after < 0.7 * before


# --- trust region ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("foreach", [None, False])
def test_the_trust_region_spans_all_layers(preconditioner: str, foreach: bool | None) -> None:
    free, clipped = plain(), plain()
    clipped.load_state_dict(free.state_dict())
    settings = {"preconditioner": preconditioner, "momentum": 0.0, "foreach": foreach}
    one = SNOpt(free, LR, kl_clip=math.inf, **settings)
    other = SNOpt(clipped, LR, kl_clip=1e-4, **settings)
    start = flat(free)
    for model in (free, clipped):
        loss_of(model, 0).backward()
    grad = torch.cat([p.grad.reshape(-1) for p in free.parameters()])
    one.step()
    other.step()
    assert one.report == {}
    factor = float(other.report["clip_factor"])
    step, clipped_step = start - flat(free), start - flat(clipped)
    # lr² Σ ⟨C⁻¹g, g⟩ of the free step, from the parameters' own moves.
    predicted = LR * float(step.dot(grad))
    assert predicted > 1e-4
    assert factor == pytest.approx(math.sqrt(1e-4 / predicted), rel=1e-9)
    assert relative_error(clipped_step, factor * step) < 1e-9
    assert LR * float(clipped_step.dot(grad)) * factor == pytest.approx(1e-4, rel=1e-9)


# --- degenerate layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac", "ekfac"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Linear(1, 1), (1,)),
        (lambda: nn.Linear(1, 1, bias=False), (1,)),
        (lambda: nn.Linear(0, 2), (0,)),
        (lambda: nn.Conv2d(2, 2, 1, groups=2), (2, 1, 1)),
    ],
)
def test_the_smallest_layers(preconditioner: str, layer: Any, shape: tuple[int, ...]) -> None:
    model = Single(layer())
    for p in model.parameters():
        nn.init.normal_(p)
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=2)
    before = flat(model)
    for _ in range(4):
        optimizer.zero_grad()
        model.loss(torch.randn(N, *shape)).backward()
        optimizer.step()
    assert torch.isfinite(flat(model)).all()
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac", "ekfac"])
def test_a_gradient_of_zero_moves_nothing(preconditioner: str) -> None:
    model = Single(nn.Linear(4, 3))
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=1)
    before = flat(model)
    for _ in range(3):
        optimizer.zero_grad()
        (0.0 * model.loss(torch.randn(N, 4))).backward()
        optimizer.step()
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac", "ekfac"])
def test_a_single_sample_and_constant_inputs(preconditioner: str) -> None:
    """Factors of rank one."""
    model = Single(nn.Linear(4, 3))
    optimizer = SNOpt(model, preconditioner=preconditioner, update_freq=1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model.loss(torch.ones(1, 4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
