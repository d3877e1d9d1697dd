"""Fields, losses and dense references for the tests of the paper's Section 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from tests.reference import reference_solve

if TYPE_CHECKING:
    from collections.abc import Callable

DENSITY = 3  # steps of the reference, of order 12; its error is below 1e-11 on the fields here


class Timeless(nn.Module):
    """A small tanh network."""

    def __init__(self, dims: int = 2, width: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dims, width), nn.Tanh(), nn.Linear(width, dims))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x)


class Timed(Timeless):
    """The same, not autonomous, with a free parameter that no layer owns."""

    def __init__(self, dims: int = 2, width: int = 3) -> None:
        super().__init__(dims, width)
        self.frequency = nn.Parameter(torch.tensor(2.0))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(x) * (1 + torch.sin(self.frequency * t))


class Dense(NamedTuple):
    """Gradient and second derivatives in (x0, u), as one dense vector and matrix."""

    x1: Tensor
    gradient: Tensor
    hessian: Tensor
    gauss_newton: Tensor


def hessian(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return jacrev(jacrev(f))


def path_end(rate: Callable[[Tensor, Tensor], Tensor], y: Tensor, t1: float) -> Tensor:
    return reference_solve(rate, y, torch.tensor([0.0, t1]), density=DENSITY)[0][-1]


def dense_reference(
    field: nn.Module,
    x0: Tensor,
    t1: float,
    loss: Callable[[Tensor], Tensor],
    cost: Callable[..., Tensor] | None = None,
) -> Dense:
    """Everything by autograd through a fine fixed-step solve.

    The Gauss–Newton matrix of a running cost is ∫ Jᵀ ℓ'' J dt, with J that of (x(t), u).
    """
    names = [name for name, _ in field.named_parameters()]
    shapes = [p.shape for p in field.parameters()]
    sizes = [p.numel() for p in field.parameters()]
    m = x0.numel()

    def split(z: Tensor) -> dict[str, Tensor]:
        parts = z[m:].split(sizes)
        return {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}

    def rate(z: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return functional_call(field, split(z), (t, x.view_as(x0))).reshape(-1)

    def spent(t: Tensor, x: Tensor, z: Tensor) -> Tensor:
        assert cost is not None
        return cost(t, x.view_as(x0), tuple(split(z).values())).sum()

    def endpoint(z: Tensor) -> Tensor:
        return path_end(lambda t, x: rate(z, t, x), z[:m], t1)

    def total(z: Tensor) -> Tensor:
        if cost is None:
            return loss(endpoint(z).view_as(x0))

        def both(t: Tensor, y: Tensor) -> Tensor:
            return torch.cat([rate(z, t, y[:m]), spent(t, y[:m], z).view(1)])

        y = path_end(both, torch.cat([z[:m], z.new_zeros(1)]), t1)
        return loss(y[:m].view_as(x0)) + y[m]

    z = torch.cat([x0.reshape(-1), *(p.detach().reshape(-1) for p in field.parameters())])
    x1 = endpoint(z)
    jacobian = jacrev(endpoint)(z)
    phi = hessian(lambda x: loss(x.view_as(x0)))(x1)
    gauss_newton = jacobian.T @ phi @ jacobian
    if cost is not None:
        gauss_newton = gauss_newton + _cost_gauss_newton(rate, spent, z, m, t1)
    return Dense(x1.view_as(x0), jacrev(total)(z), hessian(total)(z), gauss_newton)


def _cost_gauss_newton(rate, spent, z: Tensor, m: int, t1: float) -> Tensor:
    """∫ Kᵀ ℓ'' K dt with K = d(x(t), u)/dz, where dJ/dt = F_x J + F_z is integrated forwards."""
    n = z.numel()
    lower = torch.eye(n)[m:]

    def both(t: Tensor, y: Tensor) -> Tensor:
        x, j, _ = y.split([m, m * n, n * n])
        j = j.view(m, n)
        fx = jacrev(lambda v: rate(z, t, v))(x)
        fz = jacrev(lambda v: rate(v, t, x))(z)
        second = hessian(lambda v: spent(t, v[:m], torch.cat([z[:m], v[m:]])))(
            torch.cat([x, z[m:]])
        )
        k = torch.cat([j, lower])
        return torch.cat([rate(z, t, x), (fx @ j + fz).reshape(-1), (k.T @ second @ k).reshape(-1)])

    start = torch.cat([z[:m], torch.eye(m, n).reshape(-1), z.new_zeros(n * n)])
    return path_end(both, start, t1)[-n * n :].view(n, n)


def blocks(matrix: Tensor, samples: int, dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Qxx [N, D, D], Qxu [N, D, n] and Quu [n, n] out of a dense matrix in (x0, u)."""
    m = samples * dims
    xx = matrix[:m, :m].view(samples, dims, samples, dims)
    diagonal = torch.stack([xx[i, :, i] for i in range(samples)])
    return diagonal, matrix[:m, m:].view(samples, dims, -1), matrix[m:, m:]


def relative(value: Tensor, reference: Tensor) -> float:
    assert value.shape == reference.shape
    return float((value - reference).norm() / reference.norm())
