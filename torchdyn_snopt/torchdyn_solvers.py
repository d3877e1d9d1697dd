"""Solvers across the seam: ours for torchdyn's own loops, torchdyn's for our forward solve."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchdyn.numerics import odeint as torchdyn_odeint
from torchdyn.numerics.odeint import odeint_mshooting
from torchdyn.numerics.solvers import ode as torchdyn_solvers

from torchdyn_snopt.errors import SolverError
from torchdyn_snopt.solvers import Tableau, tableau_named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import nn

    from torchdyn_snopt.adjoint.problem import ForeignSolver
    from torchdyn_snopt.solvers import PhaseStats

_TABLEAU_OF = {
    torchdyn_solvers.Euler: tableau_named("euler"),
    torchdyn_solvers.Midpoint: tableau_named("midpoint"),
    torchdyn_solvers.RungeKutta4: tableau_named("rk4"),
    torchdyn_solvers.DormandPrince45: tableau_named("dopri5"),
    torchdyn_solvers.Tsitouras45: tableau_named("tsit5"),
}


class ButcherSolver(torchdyn_solvers.SolverTemplate):  # type: ignore[misc]
    """A tableau of ours as a torchdyn solver, for the names that torchdyn lacks."""

    def __init__(self, tableau: Tableau, dtype: torch.dtype = torch.float32) -> None:
        """Wrap a tableau.

        Args:
            tableau: the method.
            dtype: kept for torchdyn; coefficients follow the state.
        """
        super().__init__(order=tableau.order)
        self.butcher, self.dtype = tableau, dtype
        self.stepping_class = "adaptive" if tableau.adaptive else "fixed"

    def step(
        self,
        f: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        dt: Tensor,
        k1: Tensor | None = None,
        args: Any = None,
    ) -> tuple[Any, ...]:
        """One step, as torchdyn's own loops call it.

        Args:
            f: field.
            x: state.
            t: time.
            dt: step.
            k1: first stage if known.
            args: unused, as in torchdyn's solvers.

        Returns:
            First stage of the next step (or None), new state, error estimate, stages.
        """
        tableau = self.butcher
        k = [f(t, x) if k1 is None else k1]
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            k.append(f(t + c * dt, x + dt * _combine(row, k)))
        x1 = x + dt * _combine(tableau.b, k)
        if tableau.e is None:
            return None, x1, None
        last = k[-1] if tableau.fsal else f(t + dt, x1)
        return last, x1, dt * _combine(tableau.e, k), tuple(k)


def _combine(weights: Iterable[float], k: list[Tensor]) -> Tensor:
    return sum(w * k_i for w, k_i in zip(weights, k, strict=False) if w != 0.0)  # type: ignore[return-value]


def tableau_of(solver: object) -> Tableau | None:
    """Our tableau for a torchdyn solver.

    Args:
        solver: a solver object.

    Returns:
        The tableau, or None for a solver that is none of torchdyn's Runge–Kutta methods (a
        hypersolver, an implicit one, a subclass, the user's own).
    """
    if isinstance(solver, ButcherSolver):
        return solver.butcher
    return _TABLEAU_OF.get(type(solver))


def torchdyn_solver(model: Any, args: dict[str, Any]) -> ForeignSolver:
    """Forward through torchdyn's own loop, for solvers that are no tableau of ours.

    Args:
        model: a torchdyn problem or model.
        args: further arguments of the field.

    Returns:
        The solver.
    """

    def integrate(x0: Tensor, t: Tensor, counts: PhaseStats) -> Tensor:
        with torch.no_grad(), _counting(model.vf, counts):
            _, states = torchdyn_odeint(
                model.vf,
                x0,
                t,
                model.solver,
                atol=model.atol,
                rtol=model.rtol,
                interpolator=model.interpolator,
                args=args,
            )
        return states  # type: ignore[no-any-return]

    return integrate


def shooting_solver(model: Any, first_guess: Tensor | None) -> ForeignSolver:
    """Forward through torchdyn's multiple shooting.

    Args:
        model: a torchdyn multiple shooting problem or layer.
        first_guess: shooting parameters to start from, or None.

    Returns:
        The solver.
    """

    def integrate(x0: Tensor, t: Tensor, counts: PhaseStats) -> Tensor:
        # Some of torchdyn's root finders differentiate the field while they solve.
        with torch.enable_grad(), _counting(model.vf, counts):
            _, states = odeint_mshooting(
                model.vf,
                x0,
                t,
                model.parallel_solver,
                first_guess,
                model.fine_steps,
                model.maxiter,
            )
        return states.detach()  # type: ignore[no-any-return]

    return integrate


@contextmanager
def _counting(vf: nn.Module, counts: PhaseStats) -> Iterator[None]:
    """Count evaluations, and stop at one that would keep an adaptive loop going for ever."""

    def count(_: nn.Module, inputs: tuple[Any, ...], f: Tensor) -> None:
        counts.nfe += 1
        if bool(torch.isnan(f).any()):
            raise SolverError(
                "the field is not finite",
                phase="forward",
                t=float(inputs[0].detach().reshape(-1)[0]),
                dt=0.0,
                steps=counts.nfe,
                norms={"state": float(torch.linalg.vector_norm(inputs[1].detach()))},
            )

    handle = vf.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
