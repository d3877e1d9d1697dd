"""Proposition 2: the low-rank form of Theorem 1, R columns in one backward solve (Eq. 11).

With Φ_xx = Σ_r y_r ⊗ y_r and no running cost, Q_xx = Σ q_r ⊗ q_r, Q_xu = Σ q_r ⊗ p_r and
Q_uu = Σ p_r ⊗ p_r, where −dq_r/dt = F_xᵀ q_r from q_r(t1) = y_r, and p_r = ∫ F_uᵀ q_r dt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchdyn_snopt.adjoint.batched import batched_vector_jacobian
from torchdyn_snopt.adjoint.integration import (
    Integrator,
    StageIntegral,
    field_parameters,
    make_span,
)
from torchdyn_snopt.adjoint.problem import Field
from torchdyn_snopt.adjoint.state import check_state
from torchdyn_snopt.errors import InvalidInputError, check_instance
from torchdyn_snopt.solvers import SolveStats, Step, System

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchdyn_snopt.adjoint.integration import Span

Seeds = Tensor | Callable[[Tensor], Tensor]


class LowRank(NamedTuple):
    """Columns at t0.

    Attributes:
        q: ``[R, *x.shape]``.
        p: ``[R, n]``, parameters in their order, each flattened; ``[R, N, n]`` by sample.
    """

    q: Tensor
    p: Tensor


def low_rank_adjoint(
    func: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    t_span: Tensor | Sequence[float],
    seeds: Seeds,
    params: Iterable[Tensor] | None = None,
    *,
    per_sample: bool = False,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    method: str | Integrator = "dopri5",
    stats: SolveStats | None = None,
) -> LowRank:
    """Carry R columns from t1 to t0 together, with one batched product for each evaluation of F.

    The step sizes obey the error of x and of one probing column with entries ±1, which is carried
    along; so the count of evaluations does not depend on the seeds or on R.

    Args:
        func: F(t, x), t a 0-d tensor; an nn.Module, or any callable with ``params``.
        x0: first state.
        t_span: times from t0 to t1; fixed-step methods step from each to the next.
        seeds: y_r ``[R, *x.shape]``, or a function of the state at t1 that returns them. One seed
            is one column for the whole batch; for the blocks of a batch loss give every sample
            its own, zero elsewhere, or ask for ``per_sample``.
        params: u; all trainable parameters of the Module when None.
        per_sample: keep the contribution of each sample to p apart; for a field that acts on each
            sample alone. A seed may then be shared by all samples at no loss.
        rtol: relative tolerance, for both directions.
        atol: absolute tolerance, for both directions.
        method: 'dopri5', 'rk4', …, or an integrator like torchdiffeq.odeint (func, y0, t).
        stats: filled with the counts of both solves, if given.

    Returns:
        q and p at t0.

    Arguments that cannot work raise `InvalidInputError`, complex states
    `UnsupportedError`, a solve that fails `SolverError`.
    """
    check_state(x0)
    stats = stats if stats is not None else SolveStats()
    span = make_span(t_span, method, rtol, atol)
    field = Field(func, field_parameters(func, params))
    shape = x0.shape

    def rate(t: float, y: Tensor) -> Tensor:
        with torch.no_grad():
            return field(t, y.view(shape)).reshape(-1)

    y1 = span.integrate(
        rate, x0.detach().reshape(-1), backward=False, phase="forward", stats=stats.forward
    )
    stats.t1, stats.status = span.times[-1], "ok"
    columns = _checked_seeds(seeds, y1.view(shape))
    equations = _Columns(field, shape, len(columns), per_sample=per_sample)
    return _solve_back(equations, span, y1, columns, stats)


def _checked_seeds(seeds: Seeds, x1: Tensor) -> Tensor:
    columns = seeds(x1) if callable(seeds) else seeds
    check_instance(
        "seeds",
        columns,
        Tensor,
        allowed="a tensor [R, *x.shape], or a function of the state at t1 that returns one",
        do="stack the columns with torch.stack",
    )
    if columns.dim() != x1.dim() + 1 or columns.shape[1:] != x1.shape or len(columns) == 0:
        raise InvalidInputError(
            "the seeds are no columns of the state's shape",
            got=f"{list(columns.shape)} for a state {list(x1.shape)}",
            allowed="[R, *x.shape] with R of at least 1",
            do="stack the seeds along a new first dimension",
        )
    return columns.detach().to(x1)


def _solve_back(
    equations: _Columns, span: Span, y1: Tensor, columns: Tensor, stats: SolveStats
) -> LowRank:
    size, rank = y1.numel(), len(columns)
    probe = y1.new_ones(size)
    probe[1::2] = -1.0
    first = torch.cat([y1, probe, columns.reshape(-1)])
    if span.foreign is None:
        assert span.tableau is not None
        system = _ColumnSystem(equations, StageIntegral(span.tableau))
        last = span.advance(
            system,
            first,
            backward=True,
            phase="backward",
            stats=stats.backward,
            controlled=2 * size,
        )
        (p,) = system.integral.values(1)
        assert p is not None
        p = -p
    else:
        counts = first.new_zeros(rank * equations.width)
        last = span.integrate(
            equations.everything,
            torch.cat([first, counts]),
            backward=True,
            phase="backward",
            stats=stats.backward,
        )
        p = last[first.numel() :].view(equations.p_shape)
    q = last[2 * size : 2 * size + columns.numel()].view_as(columns)
    return LowRank(q, p)


class _Columns:
    """The right-hand sides of Eqs. 1 and 11 on the flat state (x, probe, q_1, …, q_R)."""

    def __init__(self, field: Field, shape: torch.Size, rank: int, *, per_sample: bool) -> None:
        self.field, self.shape, self.rank, self.size = field, shape, rank, shape.numel()
        n = sum(p.numel() for p in field.parameters)
        self.per_sample = per_sample
        self.p_shape = (rank, shape[0], n) if per_sample else (rank, n)
        self.width = shape[0] * n if per_sample else n

    def rates(self, t: float, y: Tensor, *, parameters: bool) -> tuple[Tensor, Tensor | None]:
        """d/dt of the flat state, and minus d/dt of p when asked for."""
        x = y[: self.size].view(self.shape).detach().requires_grad_()
        q = y[self.size : (self.rank + 2) * self.size].view(self.rank + 1, *self.shape)
        u = self.field.parameters if parameters and not self.per_sample else ()
        with torch.enable_grad():
            f = self.field(t, x)
        minus_q, *minus_p = batched_vector_jacobian(f, (x, *u), q)
        rate = torch.cat([f.detach().reshape(-1), -minus_q.reshape(-1)])
        if not parameters:
            return rate, None
        if self.per_sample:
            return rate, self._by_sample(f, q[1:])
        parts = [part[1:].reshape(self.rank, -1) for part in minus_p]
        return rate, torch.cat(parts, 1) if parts else y.new_zeros(self.rank, 0)

    def _by_sample(self, f: Tensor, q: Tensor) -> Tensor:
        """F_uᵀ q for each sample alone: R·N seeds, each zero outside its sample."""
        samples = self.shape[0]
        mask = torch.eye(samples, dtype=q.dtype, device=q.device)
        mask = mask.view(1, samples, samples, *[1] * (len(self.shape) - 1))
        seeds = (q.unsqueeze(1) * mask).flatten(0, 1)
        parts = batched_vector_jacobian(f, self.field.parameters, seeds)
        flat = [part.reshape(self.rank, samples, -1) for part in parts]
        return torch.cat(flat, 2) if flat else q.new_zeros(self.p_shape)

    def everything(self, t: float, y: Tensor) -> Tensor:
        """d/dt of the state with p in it, for integrators that are not ours."""
        rate, minus_p = self.rates(t, y, parameters=True)
        assert minus_p is not None
        return torch.cat([rate, -minus_p.reshape(-1)])


class _ColumnSystem(System):
    """Eq. 11 for all columns, p on the side."""

    def __init__(self, equations: _Columns, integral: StageIntegral) -> None:
        self.equations, self.integral = equations, integral

    def evaluate(self, stage: int, t: float, y: Tensor, out: Tensor) -> None:
        if stage == 1:
            self.integral.restart_step()
        needed = self.integral.needs(stage)
        rate, minus_p = self.equations.rates(t, y, parameters=needed)
        out.copy_(rate)
        if needed:
            self.integral.note(stage, [minus_p])

    def accepted(self, step: Step) -> None:
        self.integral.accept(step.dt)

    def norms(self, y: Tensor) -> dict[str, float]:
        size = self.equations.size
        return {
            "x": float(torch.linalg.vector_norm(y[:size])),
            "q": float(torch.linalg.vector_norm(y[2 * size :])),
        }
