"""The recursive adjoint of the paper's Section 2: differentiate the adjoint solve again.

The gradient comes from one backward solve of (x, a, ∂L/∂u) (Eq. 5). Each row of the Hessian comes
from the adjoint of that solve: an ODE solve with a state more than twice as large, through a
reconstruction of a reconstruction. Chen et al. (2018) describe it, and the paper takes it as the
baseline: its cost grows with the number of rows, its errors with the recursion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchdyn_snopt.adjoint.integration import Integrator, field_parameters, make_span
from torchdyn_snopt.adjoint.jacobians import (
    Layout,
    RunningCost,
    check_running_cost,
    check_terminal_loss,
    check_terminal_value,
    flatten,
)
from torchdyn_snopt.adjoint.problem import Field
from torchdyn_snopt.adjoint.second_order import SecondOrder
from torchdyn_snopt.adjoint.state import check_state
from torchdyn_snopt.solvers import SolveStats

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchdyn_snopt.adjoint.integration import Span


def recursive_adjoint(
    func: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    t_span: Tensor | Sequence[float],
    terminal_loss: Callable[[Tensor], Tensor],
    params: Iterable[Tensor] | None = None,
    *,
    running_cost: RunningCost | None = None,
    batched: bool | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    method: str | Integrator = "dopri5",
    stats: SolveStats | None = None,
) -> SecondOrder:
    """Gradient and Hessian of Φ(x(t1)) + ∫ ℓ(t, x, u) dt by the adjoint of the adjoint.

    One solve for the gradient and two for each of the n + D rows of the Hessian: the adjoint of the
    adjoint solve, and what it leaves for the forward solve.

    Args:
        func: F(t, x), t a 0-d tensor; an nn.Module, or any callable with ``params``.
        x0: first state; its first dimension counts samples unless it is 1-d.
        t_span: times from t0 to t1; fixed-step methods step from each to the next.
        terminal_loss: Φ, from the state at t1 to a scalar: a sum or mean over samples.
        params: u; all trainable parameters of the Module when None.
        running_cost: ℓ(t, x, u), summed over its entries; u is the tuple of ``params``.
        batched: False takes a batched state as one sample; None: as its shape says.
        rtol: relative tolerance, for every solve.
        atol: absolute tolerance, for every solve.
        method: 'dopri5', 'rk4', …, or an integrator like torchdiffeq.odeint (func, y0, t).
        stats: filled with the counts of the forward solve and of all backward solves, if given.

    Returns:
        What `second_order_adjoint` returns with ``exact=True``, up to the errors of the recursion.

    Arguments that cannot work raise `InvalidInputError`, complex states
    `UnsupportedError`, a solve that fails `SolverError`.
    """
    check_state(x0)
    check_terminal_loss(terminal_loss)
    check_running_cost(running_cost)
    stats = stats if stats is not None else SolveStats()
    field = Field(func, field_parameters(func, params))
    layout = Layout(x0.shape, x0.dim() > 1 if batched is None else batched)
    span = make_span(t_span, method, rtol, atol)
    start = x0.detach().clone().requires_grad_()
    u = field.parameters
    task = _Task(_with_cost(field, x0.shape, running_cost), span, stats, depth=0)
    with torch.enable_grad():
        y1 = _Recursive.apply(task, torch.cat([start.reshape(-1), start.new_zeros(1)]), *u)
        x1 = y1[:-1].view(x0.shape)
        terminal = terminal_loss(x1)
        check_terminal_value(terminal)
        loss = terminal + y1[-1]
        qx, *qu = torch.autograd.grad(
            loss, (start, *u), create_graph=True, allow_unused=True, materialize_grads=True
        )
        qu_flat = flatten(qu, start)
    stats.t1, stats.status = span.times[-1], "ok"
    return _rows(layout, start, u, qx, qu_flat, x1)


def _rows(
    layout: Layout, x0: Tensor, u: tuple[Tensor, ...], qx: Tensor, qu: Tensor, x1: Tensor
) -> SecondOrder:
    """Differentiate the gradient once more, row by row."""
    samples, dims, n = layout.samples, layout.dims, qu.numel()
    qxx = torch.stack(
        [layout.rows(_gradient(layout.rows(qx)[:, i].sum(), (x0,))[0]) for i in range(dims)], 1
    )
    qux, quu = qx.new_zeros(samples, n, dims), qx.new_zeros(n, n)
    for j in range(n):
        of_x, *of_u = _gradient(qu[j], (x0, *u))
        qux[:, j] = layout.rows(of_x)
        quu[j] = flatten(of_u, qu)
    if not layout.batched:
        qxx, qux = qxx[0], qux[0]
    return SecondOrder(x1.detach(), qx.detach(), qu.detach(), qxx, qux.mT.contiguous(), qux, quu)


def _gradient(value: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not value.requires_grad:
        return tuple(torch.zeros_like(i) for i in inputs)
    return torch.autograd.grad(
        value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
    )


FlatField = Callable[[float, Tensor], Tensor]


def _with_cost(field: Field, shape: torch.Size, cost: RunningCost | None) -> FlatField:
    """(F, ℓ) on the flat state (x, ∫ℓ)."""

    def flat(t: float, y: Tensor) -> Tensor:
        time = torch.full((), t, dtype=y.dtype, device=y.device)
        x = y[:-1].view(shape)
        spent = y.new_zeros(1)
        if cost is not None:
            spent = cost(time, x, field.parameters).sum().reshape(1)
        return torch.cat([field(time, x).reshape(-1), spent])

    return flat


@dataclass(frozen=True)
class _Task:
    """One solve of the recursion.

    Attributes:
        field: right-hand side on flat states, differentiable in state and parameters.
        span: where and how.
        stats: counts.
        depth: 0 for the forward solve, 1 for its adjoint, 2 for the adjoint's adjoint.
    """

    field: FlatField
    span: Span
    stats: SolveStats
    depth: int

    def run(self, y: Tensor) -> Tensor:
        """Integrate; odd depths run from t1 to t0."""

        def rate(t: float, state: Tensor) -> Tensor:
            return self.field(t, state.detach()).detach()

        return self.span.integrate(
            rate,
            y.detach(),
            backward=self.depth % 2 == 1,
            phase="forward" if self.depth == 0 else "backward",
            stats=self.stats.forward if self.depth == 0 else self.stats.backward,
        )

    def adjoint(self, size: int, parameters: tuple[Tensor, ...]) -> _Task:
        """The task of Eq. 5 for this one: state (y, a, ∂L/∂u), the other way in time."""

        def augmented(t: float, state: Tensor) -> Tensor:
            with torch.enable_grad():
                tracked = state.requires_grad
                y = state[:size] if tracked else state[:size].detach().requires_grad_()
                a = state[size : 2 * size]
                f = self.field(t, y)
                gradients: tuple[Tensor, ...] = (torch.zeros_like(y),)
                gradients += tuple(torch.zeros_like(p) for p in parameters)
                if f.requires_grad:
                    gradients = torch.autograd.grad(
                        f,
                        (y, *parameters),
                        a,
                        create_graph=tracked,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                return torch.cat([f.reshape(-1), *(-g.reshape(-1) for g in gradients)])

        return _Task(augmented, self.span, self.stats, self.depth + 1)


class _Recursive(Function):
    """An ODE solve whose backward pass is again such a solve, to any depth."""

    @staticmethod
    def forward(ctx: Any, task: _Task, y0: Tensor, *parameters: Tensor) -> Tensor:
        y1 = task.run(y0)
        ctx.task = task
        ctx.save_for_backward(y1, *parameters)
        return y1

    @staticmethod
    def backward(ctx: Any, grad_y1: Tensor) -> tuple[Tensor | None, ...]:
        y1, *parameters = ctx.saved_tensors
        size, u = y1.numel(), tuple(parameters)
        task = ctx.task.adjoint(size, u)
        counts = y1.new_zeros(sum(p.numel() for p in u))
        last = _Recursive.apply(task, torch.cat([y1, grad_y1, counts]), *u)
        a, flat = last[size : 2 * size], last[2 * size :]
        parts = flat.split([p.numel() for p in u]) if u else ()
        return None, a, *(part.view_as(p) for part, p in zip(parts, u, strict=True))


def recursive_product(
    func: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    t_span: Tensor | Sequence[float],
    terminal_loss: Callable[[Tensor], Tensor],
    direction: Sequence[Tensor],
    *,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    method: str | Integrator = "dopri5",
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient of Φ(x(t1)) and its Hessian's product with one direction, by the recursion.

    The least that a second-order step by recursion costs: three solves, one forward, one for the
    gradient, and the adjoint of that with what it leaves for the forward solve.

    Args:
        func: F(t, x), an nn.Module.
        x0: first state.
        t_span: times from t0 to t1.
        terminal_loss: Φ, from the state at t1 to a scalar.
        direction: like the trainable parameters of ``func``.
        rtol: relative tolerance, for every solve.
        atol: absolute tolerance, for every solve.
        method: as of `recursive_adjoint`.

    Returns:
        The gradient and the product, each like the parameters.
    """
    check_state(x0)
    field = Field(func, field_parameters(func, None))
    span = make_span(t_span, method, rtol, atol)
    task = _Task(_with_cost(field, x0.shape, None), span, SolveStats(), depth=0)
    with torch.enable_grad():
        start = torch.cat([x0.detach().reshape(-1), x0.new_zeros(1)])
        y1 = _Recursive.apply(task, start, *field.parameters)
        gradient = torch.autograd.grad(
            terminal_loss(y1[:-1].view(x0.shape)),
            field.parameters,
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        inner = torch.stack([(g * d).sum() for g, d in zip(gradient, direction, strict=True)]).sum()
        product = _gradient(inner, field.parameters)
    return [g.detach() for g in gradient], list(product)
