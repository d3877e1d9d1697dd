"""Second derivatives in the end time T and in u (Eq. 15), in the forms that Eq. 16 can use.

With Φ(x(T)) at the end of the solve and F the field there,

    Q_T  = Φ_x·F,
    Q_TT = Fᵀ Φ_xx F + Φ_x·(F_t + F_x F),
    Q_Tu = (Φ_xx F + F_xᵀ Φ_x)ᵀ x_u + Φ_x·F_u.

The Gauss–Newton form keeps the terms with Φ_xx alone, and takes them from the batch: Φ_xx of a
sample is a ⊗ a. Then Q_TT = mean (a·F)² and Q_Tu = mean (a·F) p, with p the sample's gradient in u.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from torchdyn_snopt.adjoint.integration import Integrator, field_parameters, make_span
from torchdyn_snopt.adjoint.low_rank import low_rank_adjoint
from torchdyn_snopt.adjoint.problem import Field

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class HorizonDerivatives(NamedTuple):
    """Derivatives of the loss in the end time T and in u.

    Attributes:
        QT: dL/dT, 0-d.
        QTT: second derivative in T, 0-d.
        QTu: mixed derivative ``[n]``, parameters in their order, each flattened.
    """

    QT: Tensor
    QTT: Tensor
    QTu: Tensor


def horizon_derivatives(
    func: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    t_span: Tensor | Sequence[float],
    terminal_loss: Callable[[Tensor], Tensor],
    params: Iterable[Tensor] | None = None,
    *,
    exact: bool = False,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    method: str | Integrator = "dopri5",
) -> HorizonDerivatives:
    """Q_T, Q_TT and Q_Tu at t0 (Eq. 16), by one forward and one backward solve.

    Args:
        func: F(t, x), t a 0-d tensor; an nn.Module, or any callable with ``params``.
        x0: first state ``[N, ...]``; each entry of its first dimension is a sample.
        t_span: times from t0 to T.
        terminal_loss: Φ, from x(T) to one number, the mean over the samples of losses that are
            each sample's own.
        params: u; all trainable parameters of the Module when None.
        exact: all terms, the true derivatives; otherwise the Gauss–Newton form, with a ⊗ a of each
            sample as its Φ_xx.
        rtol: relative tolerance.
        atol: absolute tolerance.
        method: 'dopri5', 'rk4', …, or an integrator like torchdiffeq.odeint (func, y0, t).

    Returns:
        The derivatives.
    """
    field = Field(func, field_parameters(func, params))
    span = make_span(t_span, method, rtol, atol)
    end = _End(field, span.times[-1], terminal_loss, exact)
    columns = low_rank_adjoint(
        func, x0, t_span, end.seed, field.parameters, rtol=rtol, atol=atol, method=method
    )
    assert end.derivatives is not None
    first = end.derivatives
    return HorizonDerivatives(first.QT, first.QTT, first.QTu + columns.p[0])


class _End:
    """The derivatives at (T, x(T)) itself, and the column whose adjoint completes Q_Tu."""

    def __init__(
        self, field: Field, t1: float, loss: Callable[[Tensor], Tensor], exact: bool
    ) -> None:
        self.field, self.t1, self.loss, self.exact = field, t1, loss, exact
        self.derivatives: HorizonDerivatives | None = None

    def seed(self, x1: Tensor) -> Tensor:
        """Q_Tx, as the one column ``[1, *x.shape]``."""
        return self._exact(x1) if self.exact else self._gauss_newton(x1)

    def _gauss_newton(self, x1: Tensor) -> Tensor:
        x = x1.detach().requires_grad_()
        with torch.enable_grad():
            (a,) = torch.autograd.grad(self.loss(x), x)
        samples = len(x1)
        with torch.no_grad():
            slopes = (a * self.field(self.t1, x1)).reshape(samples, -1).sum(1)
        n = sum(p.numel() for p in self.field.parameters)
        self.derivatives = HorizonDerivatives(
            slopes.sum(), samples * slopes.square().sum(), x1.new_zeros(n)
        )
        weights = (samples * slopes).view(-1, *[1] * (x1.dim() - 1))
        return (weights * a).unsqueeze(0)

    def _exact(self, x1: Tensor) -> Tensor:
        x = x1.detach().requires_grad_()
        t = torch.full((), self.t1, dtype=x.dtype, device=x.device).requires_grad_()
        with torch.enable_grad():
            (a,) = torch.autograd.grad(self.loss(x), x, create_graph=True)
            f = self.field(t, x)
            qt = (a * f).sum()
        inputs = (x, t, *self.field.parameters)
        gradients = torch.autograd.grad(qt, inputs, allow_unused=True)
        qx, qt_t, *qu = (
            torch.zeros_like(i) if g is None else g for g, i in zip(gradients, inputs, strict=True)
        )
        flat = [g.reshape(-1) for g in qu]
        self.derivatives = HorizonDerivatives(
            qt.detach(),
            qt_t + (qx * f.detach()).sum(),
            torch.cat(flat) if flat else x1.new_zeros(0),
        )
        return qx.unsqueeze(0)
