"""The seam to torchdyn: ``sensitivity='snopt'`` on every ODE model of torchdyn."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchdyn.core.defunc import DEFunc, DEFuncBase
from torchdyn.core.problems import MultipleShootingProblem, ODEProblem
from torchdyn.numerics import odeint as torchdyn_odeint
from torchdyn.numerics.odeint import odeint_mshooting
from torchdyn.numerics.solvers import ode as torchdyn_solvers

from torchdyn_snopt.adjoint.problem import Field, Method, Problem, SNOptSensitivity, bounded
from torchdyn_snopt.adjoint.solve import check_state, solve
from torchdyn_snopt.errors import InvalidInputError, UnsupportedError
from torchdyn_snopt.solvers import (
    DOPRI5,
    TORCHDYN_NAMES,
    SolveStats,
    Tableau,
    Tolerances,
    tableau_named,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torchdyn_snopt.adjoint.problem import FieldCallable

HOST_SENSITIVITIES = ("autograd", "adjoint", "interpolated_adjoint")
SENSITIVITIES = (*HOST_SENSITIVITIES, "snopt")

_TABLEAU_OF = {
    torchdyn_solvers.Euler: tableau_named("euler"),
    torchdyn_solvers.Midpoint: tableau_named("midpoint"),
    torchdyn_solvers.RungeKutta4: tableau_named("rk4"),
    torchdyn_solvers.DormandPrince45: tableau_named("dopri5"),
    torchdyn_solvers.Tsitouras45: tableau_named("tsit5"),
}

_stats: weakref.WeakKeyDictionary[nn.Module, SolveStats] = weakref.WeakKeyDictionary()
_originals: dict[tuple[type, str], Any] = {}
_added_names: list[str] = []


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
    return lambda dtype=torch.float32: ButcherSolver(tableau, dtype)


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
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        signature = inspect.signature(original).bind(self, *args, **kwargs)
        ours = as_sensitivity(signature.arguments.get("sensitivity", "autograd"))
        original(self, *args, **kwargs)
        if ours is not None:
            # A non-leaf tensor among the attributes would forbid copying and pickling the model.
            self.vf_params = self.vf_params.detach()

    return __init__


def _odeint(original: Any) -> Any:
    def odeint(
        self: Any, x: Tensor, t_span: Tensor, save_at: Any = (), args: Any = None
    ) -> tuple[Tensor, Tensor]:
        sensitivity = as_sensitivity(self.sensalg)
        args = {} if args is None else args
        if sensitivity is None:
            return original(self, x, t_span, save_at, args)  # type: ignore[no-any-return]
        t = _time_tensor(t_span, x)
        times = tuple(t.detach().double().tolist())
        save = _save_indices(save_at, times)
        forward = _forward_method(self, sensitivity, args)
        problem = _problem(self, x, times, forward, sensitivity, args, save)
        states = solve(problem, x, t)
        return (t if save is None else t[list(save)]), states

    return odeint


def _odeint_shooting(original: Any) -> Any:
    def odeint(
        self: Any, x: Tensor, t_span: Tensor, B0: Tensor | None = None  # noqa: N803
    ) -> tuple[Tensor, Tensor]:
        sensitivity = as_sensitivity(self.sensalg)
        if sensitivity is None:
            return original(self, x, t_span, B0)  # type: ignore[no-any-return]
        t = _time_tensor(t_span, x)
        times = tuple(t.detach().double().tolist())

        def shoot(x0: Tensor, at: Tensor) -> Tensor:
            with torch.no_grad():
                _, states = odeint_mshooting(
                    self.vf, x0, at, self.parallel_solver, B0, self.fine_steps, self.maxiter
                )
            return states  # type: ignore[no-any-return]

        problem = _problem(self, x, times, Method(foreign=shoot), sensitivity, {}, None)
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
    check_state(x)
    stats = _stats[model] = SolveStats()
    return Problem(
        field=_field(model, args),
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
    if not isinstance(t_span, Tensor) or t_span.dim() != 1:
        shape = list(t_span.shape) if isinstance(t_span, Tensor) else type(t_span).__name__
        raise UnsupportedError(
            "the times are not one sequence shared by the batch",
            got=f"t_span {shape}",
            allowed="a 1-d tensor of times",
            do="rescale time for horizons that differ by sample: integrate over [0, 1] with the "
            "field multiplied by each sample's horizon",
        )
    return t_span.to(x.device) if isinstance(x, Tensor) else t_span


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


def _tableau(solver: object) -> Tableau | None:
    if isinstance(solver, ButcherSolver):
        return solver.butcher
    return _TABLEAU_OF.get(type(solver))


def _forward_method(model: Any, sensitivity: SNOptSensitivity, args: dict[str, Any]) -> Method:
    tableau = _tableau(model.solver)
    if tableau is None:
        return Method(foreign=_torchdyn_solver(model, args))
    tolerances = Tolerances()
    if tableau.adaptive:
        tolerances = Tolerances(float(model.rtol), float(model.atol))
    interpolate = model.interpolator is not None and tableau.mid is not None
    return Method(tableau, bounded(tolerances, sensitivity), interpolate=interpolate)


def _backward_method(model: Any, sensitivity: SNOptSensitivity) -> Method:
    solver = model.solver_adjoint
    if isinstance(solver, str):
        solver = torchdyn_solvers.str_to_solver(solver)
    tableau = _tableau(solver) or DOPRI5
    tolerances = Tolerances()
    if tableau.adaptive:
        tolerances = Tolerances(float(model.rtol_adjoint), float(model.atol_adjoint))
    return Method(tableau, bounded(tolerances, sensitivity))


def _torchdyn_solver(model: Any, args: dict[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Forward through torchdyn's own loop, for solvers that are no tableau of ours."""

    def integrate(x0: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
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


def _field(model: Any, args: dict[str, Any]) -> Field:
    cost = model.integral_loss
    parameters = list(model.vf.parameters())
    if isinstance(cost, nn.Module):
        parameters += list(cost.parameters())
    trainable = tuple(dict.fromkeys(p for p in parameters if p.requires_grad))
    return Field(_callable(model.vf, args), trainable, (model.vf,), cost)


def _callable(vf: nn.Module, args: dict[str, Any]) -> FieldCallable:
    """F(t, x), without torchdyn's scan of all modules at each evaluation where none needs t."""
    modules = list(vf.modules())
    pinned = [
        (module, name, value)
        for module in modules
        for name in ("_control", "noise")
        if isinstance(value := module.__dict__.get(name), Tensor)
    ]
    call = _unwrapped(vf, args, modules) or _whole(vf, args)
    if not pinned:
        return call

    def with_pins(t: Tensor, x: Tensor) -> Tensor:
        # Another forward call may have replaced the control or the noise before this backward.
        for module, name, value in pinned:
            setattr(module, name, value)
        return call(t, x)

    return with_pins


def _whole(vf: nn.Module, args: dict[str, Any]) -> FieldCallable:
    if _takes_args(vf):
        return lambda t, x: vf(t, x, args=args)
    return lambda t, x: vf(t, x)


def _unwrapped(
    vf: nn.Module, args: dict[str, Any], modules: list[nn.Module]
) -> FieldCallable | None:
    """What DEFunc and DEFuncBase do, with their checks made once; None if they cannot be skipped."""
    if type(vf) is not DEFunc or _is_hooked(vf) or vf.sensitivity == "autograd":
        return None
    inner = _unwrapped_base(vf.vf, args)
    timed = [module for module in modules[1:] if hasattr(module, "t")]
    counter = vf.__dict__
    order = vf.order

    def call(t: Tensor, x: Tensor) -> Tensor:
        counter["nfe"] += 1
        for module in timed:
            module.t = t
        if order == 1:
            return inner(t, x)
        size = x.shape[1] // order
        return torch.cat([x[:, size:], inner(t, x)], 1)

    return call


def _unwrapped_base(base: nn.Module, args: dict[str, Any]) -> FieldCallable:
    if type(base) is not DEFuncBase or _is_hooked(base):
        return _whole(base, args)
    vf, counter = base.vf, base.__dict__
    takes_t, takes_args = base.has_time_arg, base.has_time_arg and _takes_args(vf)

    def call(t: Tensor, x: Tensor) -> Tensor:
        counter["nfe"] += 1
        if not takes_t:
            return vf(x)
        return vf(t, x, args=args) if takes_args else vf(t, x)

    return call


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _takes_args(call: Any) -> bool:
    target = call.forward if isinstance(call, nn.Module) else call
    parameters = inspect.signature(target).parameters.values()
    return any(p.name == "args" or p.kind is p.VAR_KEYWORD for p in parameters)


def solve_stats(node: nn.Module) -> SolveStats:
    """Counts of a model's last forward solve and of its backward solve.

    Args:
        node: a torchdyn model with ``sensitivity='snopt'``, or a module that contains exactly one.

    Returns:
        The counts; the backward ones are 0 until a backward pass has run.

    Raises:
        InvalidInputError: no such model, several of them, or not called yet.
    """
    nodes = [module for module in node.modules() if module in _stats]
    if len(nodes) != 1:
        raise InvalidInputError(
            "there is no single solve to report",
            got=f"{type(node).__name__} with {len(nodes)} models that have been solved by 'snopt'",
            allowed="a torchdyn model with sensitivity='snopt' that has been called",
            do="call the model first, and pass the NeuralODE itself",
        )
    return _stats[nodes[0]]
