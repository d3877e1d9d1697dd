"""Columns p of the parameters of a field that no layer's rule covers: F_uᵀ q, sample by sample.

Gates, Galerkin coefficients, free tensors, norms: their columns need the field's own Jacobian. For
a Module that torch.func can transform, one vmap over the samples gives them; any other field is
differentiated with seeds that are zero outside one sample, which costs N times more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from torchdyn_snopt.adjoint.batched import batched_vector_jacobian
from torchdyn_snopt.curvature.columns import apart
from torchdyn_snopt.curvature.factors import Use
from torchdyn_snopt.curvature.recording import FreeParameters, group_uses
from torchdyn_snopt.curvature.registry import seeded_collectors
from torchdyn_snopt.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchdyn_snopt.adjoint.problem import Problem
    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.recording import LayerTape, Owner, Record
    from torchdyn_snopt.curvature.registry import Collector


class FreeColumns:
    """Finds the free parameters of a field at its first evaluation, and their columns at each."""

    def __init__(self, problem: Problem, takers: list[Collector], tape: LayerTape) -> None:
        """Start without having seen the field.

        Args:
            problem: what is solved.
            takers: the active collectors that want columns by sample.
            tape: recording the field's layers; it is stopped while the field is transformed.
        """
        self.field, self.batch, self.tape, self.takers = problem.field, problem.batch, tape, takers
        self._watched = [p for p in problem.field.parameters if any(c.watches(p) for c in takers)]
        self.key = FreeParameters(())
        self._chosen = False
        self._names: list[str] | None = None

    def uses(
        self,
        t: float,
        x: Tensor,
        q: Tensor,
        records: Sequence[Record],
        columns: Sequence[Tensor | None],
    ) -> dict[Owner, list[Use]]:
        """The columns of the free parameters at one evaluation.

        Args:
            t: time.
            x: state.
            q: columns at F ``[R, *x.shape]``.
            records: the calls of layers in this evaluation.
            columns: columns at their outputs.

        Returns:
            One use with columns ``[R, N, n]``; nothing when there are no free parameters.
        """
        if not self._chosen:
            self._choose(records, columns)
        if not self.key.parameters:
            return {}
        x = x.detach()
        found = None if self._names is None else self._mapped(t, x, q)
        if found is None:
            found = self._masked(t, x, q)
        return {self.key: [Use(x, None, columns=found)]}

    def _choose(self, records: Sequence[Record], columns: Sequence[Tensor | None]) -> None:
        """All watched parameters except those of layers each of whose calls is by sample."""
        covered: set[int] = set()
        for uses in group_uses(records, [None] * len(records), columns).values():
            if all(apart(use, self.batch) for use in uses):
                modules = [use.module for use in uses if use.module is not None]
                covered |= {id(p) for module in modules for p in (module.weight, module.bias)}
        free = tuple(p for p in self._watched if id(p) not in covered)
        self.key.parameters = free
        self._chosen = True
        if free and isinstance(self.field.func, nn.Module):
            names = {id(p): name for name, p in self.field.func.named_parameters()}
            found = [names[id(p)] for p in free if id(p) in names]
            self._names = found if len(found) == len(free) else None

    def _mapped(self, t: float, x: Tensor, q: Tensor) -> Tensor | None:
        """By one vmap over the samples; None when the field cannot be transformed."""
        names, func = self._names, self.field.func
        assert names is not None
        assert isinstance(func, nn.Module)
        time = torch.full((), t, dtype=x.dtype, device=x.device)
        own = {name: p.detach() for name, p in zip(names, self.key.parameters, strict=True)}

        def of_sample(row: Tensor, seeds: Tensor) -> tuple[Tensor, ...]:
            def f(u: dict[str, Tensor]) -> Tensor:
                value: Tensor = functional_call(func, u, (time, row.unsqueeze(0)))
                return value.squeeze(0)

            pull = vjp(f, own)[1]
            products = vmap(pull)(seeds)[0]
            return tuple(products[name] for name in names)

        try:
            with self.tape.stopped():
                parts = vmap(of_sample, in_dims=(0, 1), out_dims=1)(x, q)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            self._names = None
            return None
        lead = (len(q), self.batch, -1)
        return torch.cat([part.reshape(lead) for part in parts], 2)

    def _masked(self, t: float, x: Tensor, q: Tensor) -> Tensor:
        """By R·N seeds, each zero outside its sample: right for any field."""
        with torch.enable_grad(), self.tape.stopped():
            f = self.field(t, x)
        rank = len(q)
        mask = torch.eye(self.batch, dtype=q.dtype, device=q.device)
        mask = mask.view(1, self.batch, self.batch, *[1] * (f.dim() - 1))
        seeds = (q.unsqueeze(1) * mask).flatten(0, 1)
        parts = batched_vector_jacobian(f, self.key.parameters, seeds)
        return torch.cat([part.reshape(rank, self.batch, -1) for part in parts], 2)


def free_columns(problem: Problem, tape: LayerTape, shape: torch.Size) -> FreeColumns | None:
    """What is needed when an active collector wants columns by sample.

    Args:
        problem: what is solved.
        tape: of the pass.
        shape: of the state.

    Returns:
        None when nobody does.

    Raises:
        UnsupportedError: a state without a batch dimension.
    """
    takers = [c for c in seeded_collectors() if c.per_sample]
    if not takers:
        return None
    if len(shape) < 2:
        raise UnsupportedError(
            "columns by sample need a batch dimension",
            got=f"a state of shape {list(shape)}",
            allowed="states [N, ...]",
            do="pass x.unsqueeze(0)",
        )
    return FreeColumns(problem, takers, tape)


def with_owner(
    wanted: Mapping[LayerModule, list[Collector]], free: FreeColumns | None
) -> dict[Owner, list[Collector]]:
    """The takers of layers, and those of the free parameters.

    Args:
        wanted: layers with their takers.
        free: or None.

    Returns:
        Both in one.
    """
    owners: dict[Owner, list[Collector]] = dict(wanted.items())
    if free is not None:
        owners[free.key] = free.takers
    return owners
