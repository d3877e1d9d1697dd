"""The seam to torchdyn: ``sensitivity='snopt'`` on every ODE model of torchdyn."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE
from torchdyn.core.problems import MultipleShootingProblem, ODEProblem
from torchdyn.numerics.solvers import ode as torchdyn_solvers

from torchdyn_snopt.adjoint.problem import Method, Problem, SNOptSensitivity, bounded
from torchdyn_snopt.adjoint.solve import solve
from torchdyn_snopt.adjoint.state import check_state
from torchdyn_snopt.errors import (
    InvalidInputError,
    UnsupportedError,
    check_instance,
    check_real,
)
from torchdyn_snopt.horizon import Horizon
from torchdyn_snopt.solvers import DOPRI5, TORCHDYN_NAMES, SolveStats, Tableau, Tolerances
from torchdyn_snopt.torchdyn_field import field_of
from torchdyn_snopt.torchdyn_leapfrog import Leapfrog
from torchdyn_snopt.torchdyn_solvers import (
    ButcherSolver,
    shooting_solver,
    tableau_of,
    torchdyn_solver,
)

if TYPE_CHECKING:
    from collections.abc import Callable

HOST_SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")
SENSITIVITIES = (*HOST_SENSITIVITIES, "snopt")

_stats: weakref.WeakKeyDictionary[nn.Module, SolveStats] = weakref.WeakKeyDictionary()
_originals: dict[tuple[type, str], Any] = {}
_added_names: list[str] = []


def register() -> None:
    """Teach torchdyn the sensitivity 'snopt' (done once on import; repeating it changes nothing).

    Models that name another sensitivity behave as before, except that an unknown name is refused
    when the model is built. Solvers 'heun', 'bosh3' and 'dopri8' become known to torchdyn as well.
    """
    if _originals:
        return
    _wrap(ODEProblem, "__init__", _checked_init)
    _wrap(ODEProblem, "odeint", _odeint)
    _wrap(MultipleShootingProblem, "odeint", _odeint_shooting)
    _wrap(NeuralODE, "__repr__", _repr_with_horizon)
    for name, tableau in TORCHDYN_NAMES.items():
        if name not in torchdyn_solvers.SOLVER_DICT:
            torchdyn_solvers.SOLVER_DICT[name] = _factory(tableau)
            _added_names.append(name)


def unregister() -> None:
    """Undo `register`: torchdyn's classes are as they were."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()
    for name in _added_names:
        torchdyn_solvers.SOLVER_DICT.pop(name, None)
    _added_names.clear()


def _factory(tableau: Tableau) -> Callable[[torch.dtype], ButcherSolver]:
    def make(dtype: torch.dtype = torch.float32) -> ButcherSolver:
        return ButcherSolver(tableau, dtype)

    return make


def _wrap(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    _originals[owner, name] = original
    setattr(owner, name, make(original))


def as_sensitivity(value: object) -> SNOptSensitivity | None:
    """Our options behind a model's sensitivity.

    Args:
        value: what the user passed.

    Returns:
        The options, or None for one of torchdyn's own sensitivities.

    Raises:
        InvalidInputError: neither ours nor torchdyn's.
    """
    if isinstance(value, SNOptSensitivity):
        return value
    if value == "snopt":
        return SNOptSensitivity()
    if value in HOST_SENSITIVITIES:
        return None
    raise InvalidInputError(
        "unknown sensitivity",
        got=f"sensitivity={value!r}",
        allowed=", ".join(repr(name) for name in SENSITIVITIES) + ", or a SNOptSensitivity",
        do="pass sensitivity='snopt'",
    )


def _checked_init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        call = inspect.signature(original).bind(self, *args, **kwargs)
        ours = as_sensitivity(call.arguments.get("sensitivity", "autograd"))
        solver_adjoint = call.arguments.get("solver_adjoint")
        if ours is not None:
            _check_solvers(call.arguments)
        if ours is not None and isinstance(solver_adjoint, nn.Module):
            # torchdyn declares solver objects here, and then takes names only.
            call.arguments["solver_adjoint"] = None
        original(*call.args, **call.kwargs)
        if ours is not None:
            if isinstance(solver_adjoint, nn.Module):
                self.solver_adjoint = solver_adjoint
            # A non-leaf tensor among the attributes would forbid copying and pickling the model.
            self.vf_params = self.vf_params.detach()

    return __init__


def _repr_with_horizon(original: Any) -> Any:
    def __repr__(self: Any) -> str:
        horizon = getattr(self, "horizon", None)
        line = f"\n\t- horizon: {horizon!r}" if isinstance(horizon, Horizon) else ""
        return f"{original(self)}{line}"

    return __repr__


def _check_solvers(arguments: dict[str, Any]) -> None:
    for name in ("solver", "solver_adjoint"):
        solver = arguments.get(name)
        if isinstance(solver, str) and solver not in torchdyn_solvers.SOLVER_DICT:
            raise InvalidInputError(
                "unknown solver",
                got=f"{name}={solver!r}",
                allowed=", ".join(torchdyn_solvers.SOLVER_DICT) + ", or a solver object",
                do=f"pass {name}='dopri5'",
            )


def _odeint(original: Any) -> Any:
    def odeint(
        self: Any, x: Tensor, t_span: Tensor, save_at: Any = (), args: Any = None
    ) -> tuple[Tensor, Tensor]:
        sensitivity = as_sensitivity(self.sensalg)
        args = {} if args is None else args
        if sensitivity is None:
            return original(self, x, t_span, save_at, args)  # type: ignore[no-any-return]
        check_state(x)
        t = _time_tensor(t_span, x)
        times = tuple(t.detach().double().tolist())
        save = _save_indices(save_at, times)
        if isinstance(self.solver, torchdyn_solvers.AsynchronousLeapfrog):
            states = _leap(self, x, t, times, sensitivity, args)
            return (t, states) if save is None else (t[list(save)], states[list(save)])
        forward = _forward_method(self, sensitivity, args)
        problem = _problem(self, x, times, forward, sensitivity, args, save)
        states = solve(problem, x, t)
        return (t if save is None else t[list(save)]), states

    return odeint


def _leap(
    model: Any,
    x: Tensor,
    t: Tensor,
    times: tuple[float, ...],
    sensitivity: SNOptSensitivity,
    args: dict[str, Any],
) -> Tensor:
    leapfrog = Leapfrog(torchdyn_solver(model, args), x)
    forward = Method(foreign=leapfrog.positions)
    problem = _problem(model, leapfrog.position, times, forward, sensitivity, args, None)
    return leapfrog.join(problem.field, solve(problem, leapfrog.position, t), t)


def _odeint_shooting(original: Any) -> Any:
    def odeint(
        self: Any, x: Tensor, t_span: Tensor, B0: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        sensitivity = as_sensitivity(self.sensalg)
        if sensitivity is None:
            return original(self, x, t_span, B0)  # type: ignore[no-any-return]
        check_state(x)
        t = _time_tensor(t_span, x)
        times = tuple(t.detach().double().tolist())
        forward = Method(foreign=shooting_solver(self, B0))
        problem = _problem(self, x, times, forward, sensitivity, {}, None)
        return t, solve(problem, x, t)

    return odeint


def _problem(
    model: Any,
    x: Tensor,
    times: tuple[float, ...],
    forward: Method,
    sensitivity: SNOptSensitivity,
    args: dict[str, Any],
    save: tuple[int, ...] | None,
) -> Problem:
    stats = _stats[model] = SolveStats()
    return Problem(
        field=field_of(model, args),
        times=times,
        forward=forward,
        backward=_backward_method(model, sensitivity),
        sensitivity=sensitivity,
        batch=x.shape[0] if x.dim() > 1 else 1,
        stats=stats,
        save=save,
    )


def _time_tensor(t_span: Any, x: Tensor) -> Tensor:
    if isinstance(t_span, list | tuple):
        parts = [torch.as_tensor(t, dtype=torch.get_default_dtype()).reshape(-1) for t in t_span]
        t_span = torch.cat(parts) if parts else torch.empty(0)
    if not isinstance(t_span, Tensor) or t_span.dim() != 1 or t_span.is_complex():
        is_tensor = isinstance(t_span, Tensor)
        shape = f"{list(t_span.shape)} of {t_span.dtype}" if is_tensor else type(t_span).__name__
        raise UnsupportedError(
            "the times are not one sequence shared by the batch",
            got=f"t_span {shape}",
            allowed="a 1-d tensor of real times",
            do="rescale time for horizons that differ by sample: integrate over [0, 1] with the "
            "field multiplied by each sample's horizon",
        )
    return t_span.to(x.device)


def _save_indices(save_at: Any, times: tuple[float, ...]) -> tuple[int, ...] | None:
    wanted = [float(t) for t in save_at]
    if not wanted:
        return None
    indices = []
    for t in wanted:
        near = [i for i, known in enumerate(times) if abs(known - t) <= 1e-5 * max(1.0, abs(t))]
        if len(near) != 1:
            raise InvalidInputError(
                "save_at holds a time that is not in t_span",
                got=f"save_at={t}",
                allowed=f"times of t_span: {list(times)}",
                do="add the time to t_span",
            )
        indices += near
    return tuple(indices)


def _forward_method(model: Any, sensitivity: SNOptSensitivity, args: dict[str, Any]) -> Method:
    tableau = tableau_of(model.solver)
    if tableau is None:
        return Method(foreign=torchdyn_solver(model, args))
    tolerances = Tolerances()
    if tableau.adaptive:
        tolerances = _tolerances(rtol=model.rtol, atol=model.atol)
    interpolate = model.interpolator is not None and tableau.mid is not None
    return Method(tableau, bounded(tolerances, sensitivity), interpolate=interpolate)


def _tolerances(**values: Any) -> Tolerances:
    rtol, atol = (check_real(n, v, do=f"pass {n}=1e-3") for n, v in values.items())
    return Tolerances(rtol, atol)


def _backward_method(model: Any, sensitivity: SNOptSensitivity) -> Method:
    solver = model.solver_adjoint
    if isinstance(solver, str):
        solver = torchdyn_solvers.str_to_solver(solver)
    tableau = tableau_of(solver) or DOPRI5
    tolerances = Tolerances()
    if tableau.adaptive:
        tolerances = _tolerances(rtol_adjoint=model.rtol_adjoint, atol_adjoint=model.atol_adjoint)
    return Method(tableau, bounded(tolerances, sensitivity))


def solved_models(module: nn.Module) -> list[SolveStats]:
    """Counts of all models inside a module that have been solved by 'snopt'.

    Args:
        module: any.

    Returns:
        Those of each one's last solves.
    """
    return [_stats[part] for part in module.modules() if part in _stats]


def solve_stats(node: nn.Module) -> SolveStats:
    """Counts of a model's last forward solve and of its backward solve.

    Args:
        node: a torchdyn model with ``sensitivity='snopt'``, or a module that contains exactly one.

    Returns:
        The counts; the backward ones are 0 until a backward pass has run.

    Raises:
        InvalidInputError: no such model, several of them, or not called yet.
    """
    check_instance(
        "node",
        node,
        nn.Module,
        allowed="a torchdyn model, or a module that contains one",
        do="pass the NeuralODE itself",
    )
    nodes = [module for module in node.modules() if module in _stats]
    if len(nodes) != 1:
        raise InvalidInputError(
            "there is no single solve to report",
            got=f"{type(node).__name__} with {len(nodes)} models that have been solved by 'snopt'",
            allowed="a torchdyn model with sensitivity='snopt' that has been called",
            do="call the model first, and pass the NeuralODE itself",
        )
    return _stats[nodes[0]]
