"""Q_T, Q_TT and Q_Tu against differences of the exact gradient and against sums over samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from tests.adjoint.theory import Timed, Timeless
from tests.reference import reference_solve, relative_error
from torchdyn_snopt.adjoint.horizon_derivatives import horizon_derivatives

if TYPE_CHECKING:
    from collections.abc import Callable

T1 = 0.7
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def loss(x: Tensor) -> Tensor:
    """A mean over samples of losses that are each sample's own."""
    return (torch.sin(x[:, 0]) * x[:, 1] + x.pow(4).sum(1) / 4).mean()


def gradients(field: nn.Module, x0: Tensor, t1: float) -> tuple[Tensor, Tensor]:
    """dL/dT and dL/du by plain autograd through the reference solve."""
    end = torch.tensor(t1, requires_grad=True)
    states, _ = reference_solve(field, x0, torch.stack([end.new_zeros(()), end]))
    parameters = list(field.parameters())
    dt, *du = torch.autograd.grad(loss(states[-1]), [end, *parameters], allow_unused=True)
    flat = [
        torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
        for g, p in zip(du, parameters, strict=True)
    ]
    return dt, torch.cat(flat)


def difference(f: Callable[[float], Tensor], at: float, step: float = 1e-3) -> Tensor:
    far, near = f(at + 2 * step) - f(at - 2 * step), f(at + step) - f(at - step)
    return (8 * near - far) / (12 * step)


@pytest.mark.parametrize("kind", [Timeless, Timed])
@pytest.mark.usefixtures("float64")
def test_all_terms_equal_differences_of_the_gradient(kind: type[nn.Module]) -> None:
    field, x0 = kind(), torch.randn(3, 2)
    found = horizon_derivatives(field, x0, [0.0, T1], loss, exact=True, **TIGHT)
    assert relative_error(found.QT, gradients(field, x0, T1)[0]) < 1e-8
    qtt = difference(lambda t: gradients(field, x0, t)[0], T1)
    assert relative_error(found.QTT, qtt) < 1e-6
    qtu = difference(lambda t: gradients(field, x0, t)[1], T1)
    assert relative_error(found.QTu, qtu) < 1e-6


@pytest.mark.parametrize("kind", [Timeless, Timed])
@pytest.mark.usefixtures("float64")
def test_gauss_newton_is_the_mean_over_samples(kind: type[nn.Module]) -> None:
    field, x0 = kind(), torch.randn(3, 2)
    found = horizon_derivatives(field, x0, [0.0, T1], loss, **TIGHT)
    single = [gradients(field, row.unsqueeze(0), T1) for row in x0]
    slopes, p = torch.stack([s for s, _ in single]), torch.stack([g for _, g in single])
    assert relative_error(found.QT, slopes.mean()) < 1e-8
    assert relative_error(found.QTT, slopes.square().mean()) < 1e-8
    assert relative_error(found.QTu, (slopes.unsqueeze(1) * p).mean(0)) < 1e-8
