"""torchdyn's asynchronous leapfrog: a velocity stands behind the state, in the last dimension.

The solver integrates (x, v), and the field acts on x alone. Along the solution v(t) = F(t, x(t)),
so the adjoint solve is that of x, and a gradient with respect to v(t) passes through F to x(t), θ
and t. The first velocity, which the caller gives, is a start value of the solver: it gets the
gradient of its own appearance among the states and no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import Function

from torchdyn_snopt.adjoint.gradients import vector_jacobian
from torchdyn_snopt.adjoint.weighted import WeightedSum
from torchdyn_snopt.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

    from torchdyn_snopt.adjoint.problem import Field, ForeignSolver
    from torchdyn_snopt.solvers import PhaseStats


class Leapfrog:
    """Splits (x, v) before a solve and joins them behind it."""

    def __init__(self, integrate: ForeignSolver, x: Tensor) -> None:
        """Split.

        Args:
            integrate: solver of the pair.
            x: first pair ``[..., 2n]``.

        Raises:
            InvalidInputError: the last dimension cannot be halved.
        """
        if x.dim() == 0 or x.shape[-1] % 2:
            raise InvalidInputError(
                "asynchronous leapfrog needs a velocity beside the state",
                got=f"a state {list(x.shape)}",
                allowed="[..., 2n]: the state and its velocity, one behind the other",
                do="pass torch.cat([x, field(t0, x)], -1)",
            )
        self._integrate = integrate
        self.position, self._velocity = x.chunk(2, -1)
        self._velocities: Tensor | None = None

    def positions(self, x0: Tensor, t: Tensor, counts: PhaseStats) -> Tensor:
        """Integrate the pair and return the positions; a `ForeignSolver`.

        Args:
            x0: first position.
            t: times ``[T]``.
            counts: takes the evaluations.

        Returns:
            Positions ``[T, ..., n]``.
        """
        pairs = self._integrate(torch.cat([x0, self._velocity.detach()], -1), t, counts)
        positions, self._velocities = pairs.chunk(2, -1)
        return positions

    def join(self, field: Field, positions: Tensor, t: Tensor) -> Tensor:
        """The pairs, differentiable.

        Args:
            field: F.
            positions: what the solve returned, ``[T, ..., n]``.
            t: times ``[T]``.

        Returns:
            Pairs ``[T, ..., 2n]``; NaN velocities where the solve failed and was skipped.
        """
        values = self._velocities
        if values is None:
            values = torch.full_like(positions.detach(), float("nan"))
        later = _Velocities.apply(field, values[1:], positions[1:], t[1:], *field.parameters)
        velocities = torch.cat([self._velocity.unsqueeze(0), later])
        return torch.cat([positions, velocities], -1)


class _Velocities(Function):
    """The solver's velocities, with the gradients of F(t, x)."""

    @staticmethod
    def forward(
        ctx: Any, field: Field, values: Tensor, positions: Tensor, t: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.field = field
        ctx.save_for_backward(positions, t, *parameters)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        positions, t, *parameters = ctx.saved_tensors
        at_positions, at_times = torch.zeros_like(positions), torch.zeros_like(t)
        total = WeightedSum()
        for i in range(len(t)):
            if not bool(gradient[i].any()):
                continue
            x = positions[i].detach().requires_grad_()
            time = t[i].detach().to(x.dtype).requires_grad_()
            with torch.enable_grad():
                f = ctx.field(time, x)
            at_x, at_time, *rest = vector_jacobian([f], (x, time, *parameters), [gradient[i]])
            at_positions[i] = 0.0 if at_x is None else at_x
            at_times[i] = 0.0 if at_time is None else at_time
            total.add(rest, 1.0)
        return None, None, at_positions, at_times, *(total.total or [None] * len(parameters))
