"""Theorem 1: first and second derivatives of the loss in one backward solve (Eqs. 9a–9c).

As printed, Theorem 1 linearizes the dynamics: the terms with F_xx, F_xu and F_uu are absent from
Eqs. 9b and 9c. What it integrates is therefore not the Hessian of the loss but the generalized
Gauss–Newton matrix Jᵀ Φ_xx J with J = dx(t1)/d(x0, u), plus ∫ Jᵀ ℓ'' J dt for a running cost; both
coincide where F is linear in (x, u) jointly, or where Q_x vanishes along the path. With
``exact=True`` the missing terms Q_x·F_xx, Q_x·F_xu and Q_x·F_uu are added, and the result is the
Hessian.

Q_u and Q_uu do not feed back into the others, so the solver's stage weights integrate them beside
the state (x, Q_x, Q_xx, Q_xu); Q_ux is the transpose of Q_xu.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchdyn_snopt.adjoint.integration import (
    Integrator,
    StageIntegral,
    field_parameters,
    make_span,
)
from torchdyn_snopt.adjoint.jacobians import (
    Differentiator,
    Layout,
    RunningCost,
    check_running_cost,
    check_terminal_loss,
    cost_derivatives,
    terminal_derivatives,
)
from torchdyn_snopt.adjoint.problem import Field
from torchdyn_snopt.adjoint.state import check_state
from torchdyn_snopt.solvers import SolveStats, Step, System

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torchdyn_snopt.adjoint.integration import Span


class SecondOrder(NamedTuple):
    """Derivatives of the loss at t0, in x0 and in the parameters u (n entries in all).

    N samples of D entries each. Without a batch the leading N is absent.

    Attributes:
        x1: state at t1, shaped like x0.
        Qx: dL/dx0, shaped like x0.
        Qu: dL/du ``[n]``, parameters in their order, each flattened.
        Qxx: ``[N, D, D]``, the diagonal blocks; blocks between samples are zero.
        Qxu: ``[N, D, n]``.
        Qux: ``[N, n, D]``.
        Quu: ``[n, n]``, summed over samples, symmetric.
    """

    x1: Tensor
    Qx: Tensor
    Qu: Tensor
    Qxx: Tensor
    Qxu: Tensor
    Qux: Tensor
    Quu: Tensor


def second_order_adjoint(
    func: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    t_span: Tensor | Sequence[float],
    terminal_loss: Callable[[Tensor], Tensor],
    params: Iterable[Tensor] | None = None,
    *,
    running_cost: RunningCost | None = None,
    exact: bool = False,
    batched: bool | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    method: str | Integrator = "dopri5",
    stats: SolveStats | None = None,
) -> SecondOrder:
    """All first and second derivatives of Φ(x(t1)) + ∫ ℓ(t, x, u) dt by Theorem 1.

    Args:
        func: F(t, x), t a 0-d tensor; an nn.Module, or any callable with ``params``.
        x0: first state; its first dimension counts samples unless it is 1-d.
        t_span: times from t0 to t1; fixed-step methods step from each to the next.
        terminal_loss: Φ, from the state at t1 to a scalar: a sum or mean over samples.
        params: u; all trainable parameters of the Module when None.
        running_cost: ℓ(t, x, u), summed over its entries; u is the tuple of ``params``. It counts
            once for the batch, so a weight decay in it is not multiplied by N.
        exact: False for Theorem 1 as printed, the generalized Gauss–Newton matrix; True for the
            Hessian.
        batched: False takes a batched state as one sample; None: as its shape says.
        rtol: relative tolerance, for both directions.
        atol: absolute tolerance, for both directions.
        method: 'dopri5', 'rk4', …, or an integrator like torchdiffeq.odeint (func, y0, t).
        stats: filled with the counts of both solves, if given.

    Returns:
        The derivatives at t0.

    Arguments that cannot work raise `InvalidInputError`, complex states and coupled samples
    `UnsupportedError`, a solve that fails `SolverError`.
    """
    check_state(x0)
    check_terminal_loss(terminal_loss)
    check_running_cost(running_cost)
    stats = stats if stats is not None else SolveStats()
    span = make_span(t_span, method, rtol, atol)
    field = Field(func, field_parameters(func, params))
    layout = Layout(x0.shape, x0.dim() > 1 if batched is None else batched)
    differentiator = Differentiator(field, layout, exact=exact)
    x_rows = layout.rows(x0.detach())
    differentiator.calibrate(span.times[0], x_rows)

    def rate(t: float, y: Tensor) -> Tensor:
        return differentiator.value(t, y.view_as(x_rows)).reshape(-1)

    y1 = span.integrate(
        rate, x_rows.reshape(-1), backward=False, phase="forward", stats=stats.forward
    )
    stats.t1, stats.status = span.times[-1], "ok"
    x1 = y1.view_as(x_rows)
    return _solve_back(differentiator, running_cost, span, x1, terminal_loss, stats)


def _solve_back(
    differentiator: Differentiator,
    cost: RunningCost | None,
    span: Span,
    x1: Tensor,
    terminal_loss: Callable[[Tensor], Tensor],
    stats: SolveStats,
) -> SecondOrder:
    layout, n = differentiator.layout, differentiator.n
    phi_x, phi_xx = terminal_derivatives(terminal_loss, x1, layout)
    equations = _Equations(differentiator, cost, _unit(phi_x), _unit(phi_xx))
    first = equations.pack(x1, phi_x, phi_xx, x1.new_zeros(layout.samples, layout.dims, n))
    if span.foreign is None:
        assert span.tableau is not None
        system = _SecondOrderSystem(equations, StageIntegral(span.tableau))
        last = span.advance(system, first, backward=True, phase="backward", stats=stats.backward)
        qu, quu = system.integral.values(2)
        assert qu is not None
        assert quu is not None
        # The step runs from t1 to t0, the integrals from t0 to t1.
        qu, quu = -qu, -quu
    else:
        first = torch.cat([first, first.new_zeros(n + n * n)])
        last = span.integrate(
            equations.everything, first, backward=True, phase="backward", stats=stats.backward
        )
        last, qu, quu = last.split([last.numel() - n - n * n, n, n * n])
        quu = quu.view(n, n)
    _, qx, qxx, qxu = equations.unpack(last)
    if not layout.batched:
        qxx, qxu = qxx[0], qxu[0]
    shape = layout.shape
    return SecondOrder(x1.reshape(shape), qx.reshape(shape), qu, qxx, qxu, qxu.mT.contiguous(), quu)


def _unit(terminal: Tensor) -> float:
    """The root mean square of a terminal condition: the unit in which its error is measured."""
    return float(terminal.square().mean().sqrt()) or 1.0


class _Equations:
    """The right-hand sides of Eqs. 1 and 9a–9c.

    The equations are linear in Q, so Q_x, Q_xx and Q_xu are carried in units of their terminal
    conditions: the absolute tolerance then means the same for every loss, whatever its scale.
    """

    def __init__(
        self, differentiator: Differentiator, cost: RunningCost | None, qx: float, qxx: float
    ) -> None:
        self.differentiator, self.cost = differentiator, cost
        self.units = (1.0, qx, qxx, qxx)
        layout, n = differentiator.layout, differentiator.n
        samples, dims = layout.samples, layout.dims
        self.shapes = (
            (samples, dims),
            (samples, dims),
            (samples, dims, dims),
            (samples, dims, n),
        )
        self.sizes = [samples * dims, samples * dims, samples * dims**2, samples * dims * n]

    def pack(self, *parts: Tensor) -> Tensor:
        """The flat state from x, Q_x, Q_xx and Q_xu."""
        scaled = [p.reshape(-1) / unit for p, unit in zip(parts, self.units, strict=True)]
        return torch.cat(scaled)

    def unpack(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, Q_x, Q_xx and Q_xu from the flat state."""
        parts = zip(y.split(self.sizes), self.shapes, self.units, strict=True)
        x, qx, qxx, qxu = (part.view(shape) * unit for part, shape, unit in parts)
        return x, qx, qxx, qxu

    def rates(self, t: float, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """d/dt of the flat state, and minus d/dt of Q_u and Q_uu."""
        x, qx, qxx, qxu = self.unpack(y)
        d = self.differentiator(t, x, qx)
        minus_x = torch.einsum("nij,ni->nj", d.fx, qx)
        half = d.fx.mT @ qxx
        minus_xx = half + half.mT
        minus_xu = qxx @ d.fu + d.fx.mT @ qxu
        minus_u = torch.einsum("nij,ni->j", d.fu, qx)
        half = torch.einsum("nij,nik->jk", d.fu, qxu)
        minus_uu = half + half.mT
        if d.hxx is not None and d.hxu is not None and d.huu is not None:
            minus_xx, minus_xu = minus_xx + d.hxx, minus_xu + d.hxu
            minus_uu = minus_uu + (d.huu + d.huu.mT) / 2
        if self.cost is not None:
            u = self.differentiator.field.parameters
            c = cost_derivatives(self.cost, t, x, u, self.differentiator.layout)
            minus_x, minus_u = minus_x + c.x, minus_u + c.u
            minus_xx, minus_xu = minus_xx + c.xx, minus_xu + c.xu
            minus_uu = minus_uu + (c.uu + c.uu.mT) / 2
        return self.pack(d.f, -minus_x, -minus_xx, -minus_xu), minus_u, minus_uu

    def everything(self, t: float, y: Tensor) -> Tensor:
        """d/dt of the state with Q_u and Q_uu in it, for integrators that are not ours."""
        rate, minus_u, minus_uu = self.rates(t, y[: sum(self.sizes)])
        return torch.cat([rate, -minus_u, -minus_uu.reshape(-1)])


class _SecondOrderSystem(System):
    """Eqs. 9a–9c on the flat state, Q_u and Q_uu on the side."""

    def __init__(self, equations: _Equations, integral: StageIntegral) -> None:
        self.equations, self.integral = equations, integral

    def evaluate(self, stage: int, t: float, y: Tensor, out: Tensor) -> None:
        if stage == 1:
            self.integral.restart_step()
        rate, minus_u, minus_uu = self.equations.rates(t, y)
        out.copy_(rate)
        if self.integral.needs(stage):
            self.integral.note(stage, [minus_u, minus_uu])

    def accepted(self, step: Step) -> None:
        self.integral.accept(step.dt)

    def norms(self, y: Tensor) -> dict[str, float]:
        names = ("x", "Qx", "Qxx", "Qxu")
        parts = self.equations.unpack(y)
        return {n: float(torch.linalg.vector_norm(p)) for n, p in zip(names, parts, strict=True)}
