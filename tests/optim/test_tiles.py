"""Wide factors as blocks on the diagonal, matrices as tiles: against the same in one piece."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.problems import averages, layer_with, spd
from tests.reference import relative_error
from torchdyn_snopt import InvalidInputError, SNOpt
from torchdyn_snopt.curvature.factors import Factors
from torchdyn_snopt.optim.layers import Layer, cut, diagonal_blocks, join, tiles_for
from torchdyn_snopt.optim.trust_region import TrustRegion

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("outputs", "inputs"), [(6, 8), (5, 7), (3, 10), (1, 2)])
@pytest.mark.parametrize("tiles", [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_joining_undoes_cutting(outputs: int, inputs: int, tiles: tuple[int, int]) -> None:
    matrix = torch.randn(outputs, inputs)
    pieces = cut(matrix, tiles)
    if tiles == (1, 1):
        assert pieces is matrix
        return
    assert pieces.shape == (*tiles, -(-outputs // tiles[0]), -(-inputs // tiles[1]))
    assert torch.equal(pieces[0, 0], matrix[: pieces.shape[2], : pieces.shape[3]]) or outputs < 2
    assert torch.equal(join(pieces, outputs, inputs), matrix)
    assert pieces.square().sum() == pytest.approx(matrix.square().sum().item())


def test_diagonal_blocks_of_an_uneven_width_are_filled_up_with_zeros() -> None:
    factor = spd(5)
    first, second = diagonal_blocks(factor, 2)
    assert torch.equal(first, factor[:3, :3])
    assert torch.equal(second[:2, :2], factor[3:, 3:])
    assert second[2].abs().sum() == second[:, 2].abs().sum() == 0.0
    assert diagonal_blocks(factor, 1) is factor


def test_the_number_of_tiles_follows_from_the_widest_factor_allowed() -> None:
    assert tiles_for(640, 641, None) == (1, 1)
    assert tiles_for(640, 641, 640) == (1, 2)
    assert tiles_for(1921, 64, 640) == (4, 1)


def test_slender_matrices_are_cut_into_more_blocks() -> None:
    """860 weights, without and with a bias, as a flow's shift and gate have."""
    assert tiles_for(860, 1, 520) == (14, 1)
    assert tiles_for(860, 2, 520) == (7, 1)
    assert tiles_for(2, 860, 520) == (1, 7)
    assert tiles_for(64, 1, 520) == (1, 1)
    assert tiles_for(860, 9, 520) == (2, 1)
    assert tiles_for(860, 1, None) == (1, 1)


def trained(layer: Layer, factors: list[Factors], gradients: list[Tensor], **group: Any) -> Tensor:
    """The last update, with a refresh before each step."""
    settings: dict[str, Any] = {
        "lr": 1.0, "momentum": 0.6, "alpha": 0.9, "damping": 1e-3, "weight_decay": 0.0,
        "kl_clip": 2e-2, "step": 0, **group,
    }  # fmt: skip
    preconditioner = TrustRegion()
    for new, gradient in zip(factors, gradients, strict=True):
        layer.weight.grad = gradient
        preconditioner.recall(layer.state)
        layer.absorb(new, 0.6)
        preconditioner.refresh(layer, settings)
        (update,) = preconditioner.updates([layer], [layer.gradient(0.0, 1.0)], settings, {})
        settings["step"] += 1
    out, inputs = layer.weight.shape
    return update if update.dim() == 2 else join(update, out, inputs)


@pytest.mark.parametrize("kl_clip", [2e-2, None])
def test_tiles_of_block_diagonal_factors_are_the_whole(kl_clip: float | None) -> None:
    """Blocks know all of factors without anything beside them; averages, damping and turns too."""
    factors = [
        Factors(torch.block_diag(spd(4), spd(4)), torch.block_diag(spd(3), spd(3)))
        for _ in range(3)
    ]
    gradients = [torch.randn(6, 8) for _ in factors]
    found = []
    for rows, columns in ((1, 1), (1, 2), (2, 1), (2, 2)):
        weight = nn.Parameter(torch.zeros(6, 8))
        state = {"tile_rows": rows, "tile_columns": columns}
        layer = Layer("wide.weight", weight, None, 1, state)
        found.append(trained(layer, factors, gradients, kl_clip=kl_clip))
    for update in found[1:]:
        assert relative_error(update, found[0]) < 1e-8


def test_uneven_tiles_are_those_of_a_matrix_with_zeros_beside_it() -> None:
    """π counts the zeros as well, which changes damping by the share of them: here by none."""
    b, blocks = spd(4), [(spd(3), spd(2)) for _ in range(3)]
    gradients = [torch.randn(4, 5) for _ in blocks]
    narrow = Layer(
        "", nn.Parameter(torch.zeros(4, 5)), None, 1, {"tile_rows": 1, "tile_columns": 2}
    )
    padded = Layer("", nn.Parameter(torch.zeros(4, 6)), None, 1, {})
    zeros = torch.zeros(1, 1)
    short = [Factors(torch.block_diag(*pair), b) for pair in blocks]
    long = [Factors(torch.block_diag(*pair, zeros), b) for pair in blocks]
    wide = [torch.cat([g, torch.zeros(4, 1)], 1) for g in gradients]
    one = trained(narrow, short, gradients, kl_clip=None)
    other = trained(padded, long, wide, kl_clip=None)
    assert relative_error(one, other[:, :5]) < 1e-8
    assert other[:, 5].abs().max() == 0.0


def test_averages_that_are_eigenvectors_and_eigenvalues_are_the_averages() -> None:
    a, b = [spd(5) for _ in range(4)], [spd(4) for _ in range(4)]
    layer = layer_with(a[0], b[0])
    layer.state.clear()
    group = {"damping": 1e-2, "weight_decay": 0.0}
    kept: dict[str, Any] = {}
    beside = Layer("", layer.weight, layer.bias, 1, kept)
    for factors in map(Factors, a, b):
        TrustRegion().recall(layer.state)
        for one in (layer, beside):
            one.absorb(factors, 0.6)
        TrustRegion().refresh(layer, group)
        assert not {"A", "B"} & layer.state.keys()
    for found, expected in zip(averages(layer.state), (kept["A"], kept["B"]), strict=True):
        assert relative_error(found, expected) < 1e-12


def wide_model(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, SNOpt]:
    monkeypatch.setattr(TrustRegion, "WIDEST", 4)
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 3))
    return model, SNOpt(model)


def steps(model: nn.Module, optimizer: SNOpt, count: int) -> float:
    x = torch.randn(32, 9, generator=torch.Generator().manual_seed(1))
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2], x.sum(1)], 1)
    loss = torch.zeros(())
    for _ in range(count):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_model_with_tiles_trains_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = wide_model(monkeypatch)
    first = steps(model, optimizer, 1)
    assert steps(model, optimizer, 40) < 0.2 * first
    state = optimizer.state[model[0].weight]
    assert (state["tile_rows"], state["tile_columns"]) == (2, 3)
    assert state["U_A"].shape == (3, 4, 4)
    assert state["U_B"].shape == (2, 1, 3, 3)
    again, resumed = wide_model(monkeypatch)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert steps(again, resumed, 5) == steps(model, optimizer, 5)


def test_a_state_of_other_tiles_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = wide_model(monkeypatch)
    steps(model, optimizer, 1)
    saved = optimizer.state_dict()
    entries = saved["state"][0]
    entries["U_A"] = entries["U_A"][:, :3, :3]
    with pytest.raises(InvalidInputError, match="U_A"):
        wide_model(monkeypatch)[1].load_state_dict(saved)
