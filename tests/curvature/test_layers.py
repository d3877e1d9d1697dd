"""Factors of single layers against dense per-sample loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from tests.curvature.dense import input_patches, layer_moments, moments, output_gradients
from torchdyn_snopt.curvature import factors
from torchdyn_snopt.curvature.factors import CurvatureSpec, Factors, LayerSums, Use
from torchdyn_snopt.curvature.layers import is_supported, split_weight_matrix, weight_matrix
from torchdyn_snopt.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")

N = 3

# name: layer, shape of one sample's input
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 2), (4,)),
    "linear, no bias": (lambda: nn.Linear(4, 2, bias=False), (4,)),
    "linear, positions": (lambda: nn.Linear(4, 2), (5, 4)),
    "linear, two extra dimensions": (lambda: nn.Linear(4, 2), (2, 3, 4)),
    "linear, wide": (lambda: nn.Linear(300, 270), (300,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "conv1d, all at once": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (4, 9)
    ),
    "conv1d, more padding than input": (lambda: nn.Conv1d(2, 3, 5, padding=5), (2, 2)),
    "conv1d, dilation beyond the input": (
        lambda: nn.Conv1d(2, 3, 3, dilation=3, padding=3), (2, 2)
    ),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 4)),
    "conv2d, no bias": (lambda: nn.Conv2d(2, 3, 3, bias=False), (2, 5, 4)),
    "conv2d, 1x1": (lambda: nn.Conv2d(3, 2, 1), (3, 2, 3)),
    "conv2d, stride": (lambda: nn.Conv2d(2, 3, 3, stride=(2, 1)), (2, 6, 4)),
    "conv2d, padding": (lambda: nn.Conv2d(2, 3, (3, 2), padding=(1, 2)), (2, 4, 4)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), (2, 5, 4)),
    "conv2d, same, dilated": (
        lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(3, 1)), (2, 5, 4)
    ),
    "conv2d, valid": (lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 3, 3)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
    "conv2d, replicate": (
        lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="replicate"), (2, 4, 4)
    ),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "conv2d, circular, same": (
        lambda: nn.Conv2d(2, 3, (4, 3), padding="same", padding_mode="circular"), (2, 4, 5)
    ),
    "conv2d, dilation": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2), (2, 5, 5)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 3, 3)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, bias=False), (3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 2, 3, 3)),
    "conv3d, replicate": (
        lambda: nn.Conv3d(1, 2, 3, padding=1, padding_mode="replicate"), (1, 2, 3, 2)
    ),
}  # fmt: skip


def collect(
    module: nn.Module, uses: list[Use], sharing: str, *, batch: int = N, reduction: str = "sum"
) -> Factors:
    spec = CurvatureSpec(weight_sharing=sharing, reduction=reduction)
    sums = LayerSums(module, spec, bias=module.bias is not None)
    samples = sums.add(uses, batch, 1.0)
    sums.accept()
    sums.close(samples, batch, 1.0)
    factors = sums.factors()
    assert factors is not None
    return factors


def make_use(module: nn.Module, shape: tuple[int, ...]) -> Use:
    z = torch.randn(*shape)
    return Use(z, torch.randn_like(module(z)))


def check(factors: Factors, reference: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(factors.A, reference[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(factors.B, reference[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_factors_of_one_use(name: str, sharing: str) -> None:
    build, shape = LAYERS[name]
    module = build()
    use = make_use(module, (N, *shape))
    check(collect(module, [use], sharing), layer_moments(module, [use], sharing))


@pytest.mark.parametrize("name", LAYERS)
def test_the_loops_reproduce_autograds_weight_gradient(name: str) -> None:
    """Σ g zᵀ over samples and positions is the gradient: the reference gathers what it should."""
    build, shape = LAYERS[name]
    module = build()
    use = make_use(module, (N, *shape))
    module(use.z).backward(use.g)
    z, g = input_patches(module, use.z), output_gradients(module, use.g)
    gradient = torch.einsum("gnso,gnsi->goi", g, z).reshape(module.weight.shape)
    torch.testing.assert_close(gradient, module.weight.grad)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["linear", "linear, positions", "conv2d", "conv2d, groups"])
def test_several_uses_in_one_evaluation_are_further_positions(name: str, sharing: str) -> None:
    build, shape = LAYERS[name]
    module = build()
    uses = [make_use(module, (N, *shape)) for _ in range(3)]
    check(collect(module, uses, sharing), layer_moments(module, uses, sharing))


def test_uses_with_different_numbers_of_positions_weigh_by_them() -> None:
    module = nn.Conv1d(2, 3, 3)
    uses = [make_use(module, (N, 2, length)) for length in (5, 9)]
    for sharing in ("expand", "reduce"):
        check(collect(module, uses, sharing), layer_moments(module, uses, sharing))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d, groups", "conv3d"])
def test_positions_folded_into_the_batch(name: str, sharing: str) -> None:
    """A layer fed [N·T, …] sees T positions of each sample, samples first."""
    build, shape = LAYERS[name]
    module = build()
    use = make_use(module, (N * 4, *shape))
    z, g = input_patches(module, use.z), output_gradients(module, use.g)
    reference = moments(
        [z.unflatten(1, (N, 4)).flatten(2, 3)],
        [g.unflatten(1, (N, 4)).flatten(2, 3)],
        sharing,
        bias=True,
    )
    factors = collect(module, [use], sharing)
    if getattr(module, "groups", 1) == 1:
        reference = reference[0][0], reference[1][0]
    check(factors, reference)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv3d"])
def test_unbatched_input_counts_as_one_sample(name: str, sharing: str) -> None:
    """A layer that is fed t alone: its gradient is the sum over the batch."""
    build, shape = LAYERS[name]
    module = build()
    use = make_use(module, shape)
    batched = Use(use.z.unsqueeze(0), use.g.unsqueeze(0))
    check(collect(module, [use], sharing, batch=7), layer_moments(module, [batched], sharing))


def test_the_mean_over_the_batch_is_undone() -> None:
    """With reduction='mean' the gradients carry 1/N; B is that of the samples' own gradients."""
    module = nn.Linear(4, 2)
    use = make_use(module, (N, 4))
    scaled = Use(use.z, use.g / N)
    own, mean = (
        collect(module, [use], "expand"),
        collect(module, [scaled], "expand", reduction="mean"),
    )
    torch.testing.assert_close(mean.A, own.A)
    torch.testing.assert_close(mean.B, own.B)
    lone = Use(use.z[0], use.g[0] / N)
    factors = collect(module, [lone], "expand", batch=N, reduction="mean")
    torch.testing.assert_close(factors.B, torch.outer(use.g[0], use.g[0]))


def test_a_use_without_gradient_counts_for_the_inputs_only() -> None:
    module = nn.Linear(4, 2)
    used, dead = make_use(module, (N, 4)), make_use(module, (N, 4))
    factors = collect(module, [used, Use(dead.z, None)], "expand")
    a = layer_moments(module, [used], "expand")[0] + layer_moments(module, [dead], "expand")[0]
    torch.testing.assert_close(factors.A, a)


def test_non_contiguous_inputs() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1)
    z = torch.randn(N, 4, 5, 2).permute(0, 3, 2, 1)
    g = torch.randn(N, 5, 4, 3).permute(0, 3, 1, 2)
    linear = nn.Linear(4, 2)
    wide = Use(torch.randn(4, N).t(), torch.randn(1, 2).expand(N, 2))
    for layer, use in ((module, Use(z, g)), (linear, wide)):
        for sharing in ("expand", "reduce"):
            check(collect(layer, [use], sharing), layer_moments(layer, [use], sharing))


@pytest.mark.parametrize(
    ("module", "supported"),
    [
        (nn.Linear(2, 2), True),
        (nn.Conv3d(1, 1, 1), True),
        (nn.ConvTranspose1d(1, 1, 1), False),
        (nn.Bilinear(2, 2, 2), False),
        (nn.BatchNorm1d(2), False),
        (nn.LazyLinear(2), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_supported_layers(module: nn.Module, supported: bool) -> None:
    assert is_supported(module) is supported


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_matrix_and_back(groups: int, bias: bool) -> None:
    layer = nn.Conv2d(4, 6, 3, groups=groups, bias=bias)
    matrix = weight_matrix(layer.weight, layer.bias, groups)
    assert matrix.shape == ((6, 36 + bias) if groups == 1 else (2, 3, 18 + bias))
    weight, back = split_weight_matrix(matrix, layer.weight.shape, has_bias=bias)
    assert torch.equal(weight, layer.weight)
    assert (back is None) if not bias else torch.equal(back, layer.bias)


@pytest.mark.parametrize(
    ("name", "value"),
    [("curvature", "fisher"), ("weight_sharing", "sum"), ("reduction", "none")],
)
def test_unknown_choices_are_refused(name: str, value: str) -> None:
    with pytest.raises(InvalidInputError, match=f"unknown {name}"):
        CurvatureSpec(**{name: value})


@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("conv")])
def test_rows_of_large_gradients_are_made_in_parts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = LAYERS[name]
    module = make()
    use = make_use(module, (N, *shape))
    whole = collect(module, [use], "expand")
    made = []
    original = factors.gradient_rows

    def gradient_rows(module: nn.Module, g: Tensor, *rest: object) -> object:
        made.append(len(g))
        return original(module, g, *rest)

    monkeypatch.setattr(factors, "gradient_rows", gradient_rows)
    monkeypatch.setattr(factors, "LARGE", 2 * use.g[0].numel())
    parts = collect(module, [use], "expand")
    assert made == [2] * (N // 2) + [1] * (N % 2)
    torch.testing.assert_close(parts.B, whole.B, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.A, whole.A, rtol=0, atol=0)
