"""Derivatives of a vector field in x and u, sample by sample.

Two ways to the same numbers: torch.func (jacrev and vmap over the samples, parameters through
functional_call) for Modules that it can transform, and double backward with batched seeds for
everything else. Samples are rows: x is ``[N, D]`` here, and N = 1 for a state without batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from torchdyn_snopt.adjoint.batched import batched_vector_jacobian
from torchdyn_snopt.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchdyn_snopt.adjoint.problem import Field

RunningCost = Callable[[Tensor, Tensor, tuple[Tensor, ...]], Tensor]


class Derivatives(NamedTuple):
    """The field at one time, with its derivatives; n parameters in all.

    Attributes:
        f: F ``[N, D]``.
        fx: F_x ``[N, D, D]``, row: component of F.
        fu: F_u ``[N, D, n]``.
        hxx: a·F_xx ``[N, D, D]``, or None.
        hxu: a·F_xu ``[N, D, n]``, or None.
        huu: Σ over samples of a·F_uu ``[n, n]``, or None.
    """

    f: Tensor
    fx: Tensor
    fu: Tensor
    hxx: Tensor | None = None
    hxu: Tensor | None = None
    huu: Tensor | None = None


class CostDerivatives(NamedTuple):
    """The running cost ℓ, summed over the batch, and its derivatives.

    Attributes:
        x: ``[N, D]``.
        u: ``[n]``.
        xx: ``[N, D, D]``.
        xu: ``[N, D, n]``.
        uu: ``[n, n]``.
    """

    x: Tensor
    u: Tensor
    xx: Tensor
    xu: Tensor
    uu: Tensor


@dataclass(frozen=True)
class Layout:
    """How the state's tensor maps to rows.

    Attributes:
        shape: of the state.
        batched: whether its first dimension counts samples.
    """

    shape: torch.Size
    batched: bool

    @property
    def samples(self) -> int:
        """N."""
        return self.shape[0] if self.batched else 1

    @property
    def dims(self) -> int:
        """D, entries of one sample's state."""
        return self.shape.numel() // self.samples

    def rows(self, x: Tensor) -> Tensor:
        """A state as rows.

        Args:
            x: ``[*shape]``.

        Returns:
            ``[N, D]``.
        """
        return x.reshape(self.samples, self.dims)


class Differentiator:
    """Evaluates the field with all derivatives that Theorem 1 needs."""

    def __init__(self, field: Field, layout: Layout, *, exact: bool) -> None:
        """Choose nothing yet: see `calibrate`.

        Args:
            field: F.
            layout: of the state.
            exact: also take a·F_xx, a·F_xu and a·F_uu.
        """
        self.field, self.layout, self.exact = field, layout, exact
        self.n = sum(p.numel() for p in field.parameters)
        self._names = _parameter_names(field)
        self.uses_func = False

    def calibrate(self, t: float, x: Tensor) -> None:
        """Try torch.func once, and check that the field treats samples apart.

        Args:
            t: a time.
            x: rows ``[N, D]``.

        A field that mixes samples raises `UnsupportedError`.
        """
        a = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=_generator(x))
        reference = self._by_autograd(t, x, a)
        if self._names is not None:
            try:
                trial = self._by_func(t, x, a)
            except (RuntimeError, TypeError, ValueError, NotImplementedError):
                trial = None  # the field cannot be transformed; autograd serves any field
            self.uses_func = trial is not None and all(
                _agree(one, other) for one, other in zip(trial, reference, strict=True)
            )
        self._check_apart(t, x, a, reference.fx)

    def _check_apart(self, t: float, x: Tensor, a: Tensor, fx: Tensor) -> None:
        """With blocks summed over rows of other samples, only an apart field matches its VJP."""
        if self.layout.samples == 1:
            return
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            f = self._rows(t, leaf)
        whole = torch.zeros_like(x)
        if f.requires_grad:
            (whole,) = torch.autograd.grad(f, leaf, a, allow_unused=True, materialize_grads=True)
        if not _agree(torch.einsum("nij,ni->nj", fx, a), whole):
            raise UnsupportedError(
                "the field mixes the samples of a batch, so its Jacobian is not block-diagonal",
                got=f"a state {list(self.layout.shape)} taken as {self.layout.samples} samples",
                allowed="a field that acts on each sample alone (no batch normalization in it)",
                do="pass batched=False to take the whole state as one sample",
            )

    def __call__(self, t: float, x: Tensor, a: Tensor) -> Derivatives:
        """Evaluate.

        Args:
            t: time.
            x: rows ``[N, D]``.
            a: Q_x, rows ``[N, D]``.

        Returns:
            All derivatives.
        """
        return self._by_func(t, x, a) if self.uses_func else self._by_autograd(t, x, a)

    def value(self, t: float, x: Tensor) -> Tensor:
        """F alone.

        Args:
            t: time.
            x: rows ``[N, D]``.

        Returns:
            ``[N, D]``.
        """
        with torch.no_grad():
            return self._rows(t, x)

    def _rows(self, t: float, x: Tensor) -> Tensor:
        return self.layout.rows(self.field(t, x.reshape(self.layout.shape)))

    # -- double backward ---------------------------------------------------------------------------

    def _by_autograd(self, t: float, x: Tensor, a: Tensor) -> Derivatives:
        """The Jacobian of (∂h/∂x, ∂h/∂u) in (a, x, u), where h = Σ a·F: everything is in it."""
        x, a = x.detach().requires_grad_(), a.detach().requires_grad_()
        u = self.field.parameters
        with torch.enable_grad():
            f = self._rows(t, x)
            h = (f * a).sum()
            hx, *hu = torch.autograd.grad(
                h, (x, *u), create_graph=True, allow_unused=True, materialize_grads=True
            )
            hu_flat = flatten(hu, x)
        wrt = (a, x, *u) if self.exact else (a,)
        of_x = batched_vector_jacobian(hx, wrt, _tiled_identity(x))
        of_u = batched_vector_jacobian(hu_flat, wrt, _identity(self.n, x))
        fx = of_x[0].permute(1, 2, 0)
        fu = of_u[0].permute(1, 2, 0)
        if not self.exact:
            return Derivatives(f.detach(), fx, fu)
        huu = _side_by_side(of_u[2:], x)
        return Derivatives(
            f.detach(), fx, fu, of_x[1].transpose(0, 1), of_u[1].permute(1, 2, 0), huu
        )

    # -- torch.func --------------------------------------------------------------------------------

    def _by_func(self, t: float, x: Tensor, a: Tensor) -> Derivatives:
        x, a = x.detach(), a.detach()
        u = flatten(self.field.parameters, x).detach()
        time = torch.full((), t, dtype=x.dtype, device=x.device)

        def with_value(row: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
            f = self._one(time, row, flat)
            return f, f

        jacobian = vmap(jacrev(with_value, argnums=(0, 1), has_aux=True), in_dims=(0, None))
        (fx, fu), f = jacobian(x, u)
        if not self.exact:
            return Derivatives(f, fx, fu)

        def h(row: Tensor, adjoint: Tensor, flat: Tensor) -> Tensor:
            return self._one(time, row, flat).dot(adjoint)

        def total(flat: Tensor) -> Tensor:
            return vmap(h, in_dims=(0, 0, None))(x, a, flat).sum()

        second = vmap(jacrev(grad(h), argnums=(0, 2)), in_dims=(0, 0, None))
        hxx, hxu = second(x, a, u)
        return Derivatives(f, fx, fu, hxx, hxu, jacrev(grad(total))(u))

    def _one(self, t: Tensor, row: Tensor, flat: Tensor) -> Tensor:
        """F of one sample [D], the parameters given as one vector [n]."""
        assert self._names is not None
        shape = self.layout.shape
        x = row.view(1, *shape[1:]) if self.layout.batched else row.view(shape)
        parts = flat.split([p.numel() for p in self.field.parameters])
        u = {
            name: part.view(p.shape)
            for name, part, p in zip(self._names, parts, self.field.parameters, strict=True)
        }
        assert isinstance(self.field.func, nn.Module)
        f: Tensor = functional_call(self.field.func, u, (t, x))
        return f.reshape(-1)


def cost_derivatives(
    cost: RunningCost, t: float, x: Tensor, u: tuple[Tensor, ...], layout: Layout
) -> CostDerivatives:
    """All first and second derivatives of the batch's running cost.

    Args:
        cost: ℓ(t, x, u), summed over its entries.
        t: time.
        x: rows ``[N, D]``.
        u: the parameters.
        layout: of the state.

    Returns:
        Them.
    """
    x = x.detach().requires_grad_()
    time = torch.full((), t, dtype=x.dtype, device=x.device)
    with torch.enable_grad():
        value = cost(time, x.reshape(layout.shape), u).sum()
        lx, *lu = torch.autograd.grad(
            value, (x, *u), create_graph=True, allow_unused=True, materialize_grads=True
        )
        lu_flat = flatten(lu, x)
    of_x = batched_vector_jacobian(lx, (x,), _tiled_identity(x))
    of_u = batched_vector_jacobian(lu_flat, (x, *u), _identity(lu_flat.numel(), x))
    uu = _side_by_side(of_u[1:], x)
    return CostDerivatives(
        lx.detach(), lu_flat.detach(), of_x[0].transpose(0, 1), of_u[0].permute(1, 2, 0), uu
    )


def terminal_derivatives(
    loss: Callable[[Tensor], Tensor], x1: Tensor, layout: Layout
) -> tuple[Tensor, Tensor]:
    """Φ_x and the diagonal blocks of Φ_xx.

    Args:
        loss: Φ, from the state ``[*shape]`` to a scalar.
        x1: rows ``[N, D]``.
        layout: of the state.

    Returns:
        ``[N, D]`` and ``[N, D, D]``.

    Raises:
        UnsupportedError: the loss couples the samples.
    """
    x = x1.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(x.reshape(layout.shape))
        check_terminal_value(value)
        (lx,) = torch.autograd.grad(
            value, x, create_graph=True, allow_unused=True, materialize_grads=True
        )
    (blocks,) = batched_vector_jacobian(lx, (x,), _tiled_identity(x))
    blocks = blocks.transpose(0, 1)
    if layout.samples > 1:
        v = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=_generator(x))
        (whole,) = batched_vector_jacobian(lx, (x,), v.unsqueeze(0))
        if not _agree(torch.einsum("nij,nj->ni", blocks, v), whole[0]):
            raise UnsupportedError(
                "the terminal loss couples the samples of a batch",
                got=f"a state {list(layout.shape)} taken as {layout.samples} samples",
                allowed="a loss that is a sum or a mean over samples",
                do="pass batched=False to take the whole state as one sample",
            )
    return lx.detach(), blocks


def check_terminal_loss(loss: object) -> None:
    """Refuse what cannot be called, before anything is integrated.

    Args:
        loss: Φ.

    Raises:
        InvalidInputError: nothing that can be called.
    """
    if not callable(loss):
        raise InvalidInputError(
            "the terminal loss is no function",
            got=f"terminal_loss of type {type(loss).__name__}",
            allowed="a function from the state at t1 to a scalar tensor",
            do="pass terminal_loss=lambda x: criterion(x, y)",
        )


def check_running_cost(cost: object) -> None:
    """Refuse what cannot be called, before anything is integrated.

    Args:
        cost: ℓ, or None.

    Raises:
        InvalidInputError: nothing that can be called.
    """
    if cost is not None and not callable(cost):
        raise InvalidInputError(
            "the running cost is no function",
            got=f"running_cost of type {type(cost).__name__}",
            allowed="a function of (t, x, u), or None",
            do="pass running_cost=lambda t, x, u: ...",
        )


def check_terminal_value(value: object) -> None:
    """Refuse what no derivatives can be taken of.

    Args:
        value: what a terminal loss has returned.

    Raises:
        InvalidInputError: no tensor with one entry, or one without a graph.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        if isinstance(value, Tensor) and value.numel() == 1:
            got = "a value that does not depend on the state"
        raise InvalidInputError(
            "the terminal loss does not return one number that depends on the state",
            got=got,
            allowed="a tensor with one entry, computed from the state by torch",
            do="take a sum or a mean, and use no .item() or .detach() in the loss",
        )


def flatten(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """One vector from several tensors.

    Args:
        parts: them, possibly none.
        like: gives dtype and device of an empty result.

    Returns:
        ``[n]``.
    """
    return torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_zeros(0)


def _side_by_side(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """A matrix [n, n] from its column blocks, one for each parameter."""
    return torch.cat([part.reshape(len(part), -1) for part in parts] or [like.new_zeros(0, 0)], 1)


def _tiled_identity(x: Tensor) -> Tensor:
    """Seed k selects component k of every sample, ``[D, N, D]``."""
    samples, dims = x.shape
    return _identity(dims, x).unsqueeze(1).expand(dims, samples, dims)


def _identity(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def _generator(like: Tensor) -> torch.Generator:
    return torch.Generator(like.device).manual_seed(0)


def _agree(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    scale = float(torch.linalg.vector_norm(other))
    tolerance = torch.finfo(other.dtype).eps ** 0.5
    distance = float(torch.linalg.vector_norm(one - other))
    limit: float = tolerance * max(scale, 1e-12)
    return distance <= limit


def _parameter_names(field: Field) -> list[str] | None:
    """Names of u in the field's module; None when it is no module or some are not its own."""
    if not isinstance(field.func, nn.Module):
        return None
    names = {id(p): name for name, p in field.func.named_parameters()}
    found = [names.get(id(p)) for p in field.parameters]
    return [name for name in found if name is not None] if None not in found else None
