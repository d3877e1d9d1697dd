"""`check_gradient`: how right are a model's adjoint gradients, at the tolerances that it has?"""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torchdiffeq
from torch import Tensor, nn
from torchdyn.core.problems import ODEProblem
from torchdyn.numerics.solvers.ode import AsynchronousLeapfrog

from torchdyn_snopt.errors import InvalidInputError, UnsupportedError, check_instance
from torchdyn_snopt.torchdyn_field import field_of
from torchdyn_snopt.torchdyn_plugin import as_sensitivity
from torchdyn_snopt.torchdyn_solvers import ButcherSolver, tableau_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torchdyn_snopt.adjoint.problem import Field
    from torchdyn_snopt.solvers import Tableau

# Tolerance of the references' own solves, and the step of the finite differences.
REFERENCE_TOLERANCE = 1e-10
DIFFERENCE_STEP = 1e-4
_SEED = 0


class GradientRow(NamedTuple):
    """One tensor's gradient.

    Attributes:
        name: the parameter's name, 'x', or 't[i]'.
        norm: Euclidean norm of the reference.
        autograd: relative error against autograd through the solve.
        differences: relative error of the derivative along one direction against central
            differences.
    """

    name: str
    norm: float
    autograd: float
    differences: float


@dataclass(frozen=True, repr=False)
class GradientReport:
    """What `check_gradient` found; printed as a table.

    Attributes:
        rows: one for x, for each parameter and for each time.
    """

    rows: tuple[GradientRow, ...]

    @property
    def worst(self) -> float:
        """The largest relative error of all."""
        return max(max(row.autograd, row.differences) for row in self.rows)

    def __getitem__(self, name: str) -> GradientRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __repr__(self) -> str:
        width = max(len("gradient for"), *(len(row.name) for row in self.rows))
        lines = [f"{'gradient for':{width}}  {'norm':>9}  {'autograd':>9}  {'differences':>11}"]
        lines += [
            f"{row.name:{width}}  {row.norm:9.3g}  {row.autograd:9.1e}  {row.differences:11.1e}"
            for row in self.rows
        ]
        return "\n".join([*lines, f"worst relative error: {self.worst:.1e}"])


def check_gradient(
    model: nn.Module,
    x: Tensor,
    t_span: Tensor | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> GradientReport:
    """Compare a model's 'snopt' gradients with autograd and with finite differences.

    The gradients are those of the model as it is: its dtype, its tolerances, its options. The
    references are taken in float64 and with tight tolerances, so that the errors tell what loose
    tolerances cost. Fixed-step solvers keep their steps, which the references share; a solver that
    is none of the Runge–Kutta methods known here is compared with the exact solution. Costs
    integrated along the solve belong to the loss. Everything runs on copies, with one seed: the
    model, its gradients and the random state stay untouched. (torchdyn takes the control of a
    `DataControl` as constant, which the differences for x do not.)

    Args:
        model: a torchdyn model, or a module that contains some; each is checked as if its
            sensitivity were 'snopt', or with the `SNOptSensitivity` that it has. A field with
            dropout has to be in eval mode.
        x: its input.
        t_span: times ``[T]`` whose gradients are checked too; the model's own when None.
        loss: maps the model's states (the second of the pair, if it returns times as well) to a
            0-d tensor; the mean of squares when None.

    Returns:
        Relative errors for x, for every trainable parameter and for every time.
    """
    check_instance("model", model, nn.Module, allowed="a torchdyn model", do="pass a NeuralODE")
    check_instance("x", x, Tensor, allowed="a tensor, the model's input", do="pass a small batch")
    loss = loss or _mean_square
    adjoint, reference = _copy(model), _copy(model).double()
    costs: list[Tensor] = []
    for node in _nodes(adjoint):
        if as_sensitivity(node.sensalg) is None:
            _set_sensitivity(node, "snopt")
    for node in _nodes(reference):
        _set_sensitivity(node, "snopt")
        node.odeint = partial(_reference_odeint, node, costs)
    leaves = _leaves(adjoint, x, t_span)
    exact = _leaves(reference, x, t_span, torch.float64)
    gradients = _gradients(partial(_evaluate, adjoint, loss, []), leaves)
    run = partial(_evaluate, reference, loss, costs)
    expected = _gradients(run, exact)
    rows: list[GradientRow] = []
    for name, leaf in exact.items():
        if name in expected and leaf.numel():
            slope = partial(_difference, run, exact, leaf)
            rows += _rows(name, gradients[name].double(), expected[name], slope)
    return GradientReport(tuple(rows))


def _mean_square(states: Tensor) -> Tensor:
    return states.square().mean()


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; torchdyn's models hold a flattened, non-leaf copy of their parameters."""
    held = (value for module in model.modules() for value in vars(module).values())
    memo = {id(v): v.detach().clone() for v in held if isinstance(v, Tensor) and not v.is_leaf}
    return copy.deepcopy(model, memo)


def _nodes(model: nn.Module) -> list[Any]:
    nodes = [module for module in model.modules() if isinstance(module, ODEProblem)]
    if not nodes:
        raise InvalidInputError(
            "there is no ODE to check",
            got=type(model).__name__,
            allowed="a torchdyn NeuralODE or ODEProblem, or a module that contains one",
            do="use torch.autograd.gradcheck for solves by odeint_snopt",
        )
    return nodes


def _set_sensitivity(node: Any, name: str) -> None:
    node.sensalg = node.sensitivity = name
    if hasattr(node.vf, "sensitivity"):
        node.vf.sensitivity = name


def _leaves(
    model: nn.Module, x: Tensor, t_span: Tensor | None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Everything that is differentiated for, by name; x and t are copies."""
    leaves: dict[str, Tensor] = {"x": _leaf(x, dtype)}
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    if t_span is not None:
        leaves["t"] = _leaf(t_span, dtype)
    return leaves


def _leaf(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def _evaluate(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    costs: list[Tensor],
    leaves: dict[str, Tensor],
) -> Tensor:
    """The loss, with the costs that the solves have integrated."""
    costs.clear()
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        output = _call(model, leaves["x"], leaves.get("t"))
    value = loss(output[1] if isinstance(output, tuple) else output)
    if not isinstance(value, Tensor) or value.dim() > 0:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInputError(
            "the loss does not return one number",
            got=f"{got}",
            allowed="a 0-d tensor",
            do="take a sum or a mean in the loss, or leave it out for the mean of squares",
        )
    return value + sum(costs) if costs else value


def _call(model: nn.Module, x: Tensor, t: Tensor | None) -> Any:
    if t is None:
        return model(x)
    if isinstance(model, ODEProblem):
        return model(x, t)
    nodes = _nodes(model)
    if len(nodes) != 1 or not hasattr(nodes[0], "t_span"):
        raise InvalidInputError(
            "t_span belongs to no single model",
            got=f"{type(model).__name__} with {len(nodes)} ODE models",
            allowed="a module with exactly one NeuralODE",
            do="leave t_span out, or check the NeuralODE itself",
        )
    nodes[0].t_span = t
    return model(x)


def _gradients(
    run: Callable[[dict[str, Tensor]], Tensor], leaves: dict[str, Tensor]
) -> dict[str, Tensor]:
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(run(leaves), list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(wanted.items(), found, strict=True)
    }


def _rows(
    name: str, gradient: Tensor, expected: Tensor, slope: Callable[[Tensor], float]
) -> Iterator[GradientRow]:
    """One row; for times one for each of them."""
    if name != "t":
        yield _row(name, gradient, expected, _direction(expected), expected, slope)
        return
    for i, unit in enumerate(torch.eye(len(expected), dtype=expected.dtype)):
        yield _row(f"t[{i}]", gradient * unit, expected * unit, unit, expected, slope)


def _row(
    name: str,
    gradient: Tensor,
    expected: Tensor,
    direction: Tensor,
    scale: Tensor,
    slope: Callable[[Tensor], float],
) -> GradientRow:
    size = float(scale.norm()) or 1.0
    along = float((gradient * direction).sum())
    return GradientRow(
        name,
        float(expected.norm()),
        float((gradient - expected).norm()) / size,
        abs(along - slope(direction)) / size,
    )


def _direction(gradient: Tensor) -> Tensor:
    """A unit direction, mostly along the gradient (so that its size shows), and random."""
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
    noise = noise.to(gradient.device)
    direction: Tensor = noise / noise.norm()
    if bool(gradient.any()):
        direction = gradient / gradient.norm() + 0.5 * direction
    return direction.div(direction.norm())


def _difference(
    run: Callable[[dict[str, Tensor]], Tensor],
    leaves: dict[str, Tensor],
    leaf: Tensor,
    direction: Tensor,
) -> float:
    """Central difference of the loss along a unit direction of one leaf."""
    step = DIFFERENCE_STEP * max(1.0, float(leaf.detach().norm()) / math.sqrt(leaf.numel()))
    values = []
    with torch.no_grad():
        original = leaf.clone()
        for sign in (1.0, -1.0):
            leaf.copy_(original + sign * step * direction)
            values.append(float(run(leaves)))
        leaf.copy_(original)
    return (values[0] - values[1]) / (2 * step)


# --- the reference solve --------------------------------------------------------------------------


def _reference_odeint(
    node: Any,
    costs: list[Tensor],
    x: Tensor,
    t_span: Any,
    save_at: Sequence[float] | None = None,
    args: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Stands in for a model's `odeint`: plain autograd, tight tolerances, costs on the side."""
    if isinstance(node.solver, AsynchronousLeapfrog):
        raise UnsupportedError(
            "there is no reference for asynchronous leapfrog",
            got="solver='alf'",
            allowed="Runge–Kutta methods, hypersolvers, implicit Euler",
            do="compare with sensitivity='autograd' by hand",
        )
    for module in node.vf.modules():
        if isinstance(noise := module.__dict__.get("noise"), Tensor):
            module.noise = noise.to(x)  # drawn by a distribution that no .double() reaches
    t = torch.as_tensor(t_span, dtype=x.dtype, device=x.device)
    field = field_of(node, args if isinstance(args, dict) else {})
    tableau = tableau_of(node.solver)
    fixed = tableau if tableau is not None and not tableau.adaptive else None
    states, cost = _solve(field, x, t, fixed)
    if cost is not None:
        costs.append(cost)
    if save_at is not None and len(save_at):
        kept = [int((t - float(at)).abs().argmin()) for at in save_at]
        return t[kept], states[kept]
    return t, states


def _solve(
    field: Field, x: Tensor, t: Tensor, fixed: Tableau | None
) -> tuple[Tensor, Tensor | None]:
    """States at t and the integral of the cost: fixed steps from time to time, or exactly."""
    size = x.numel()

    def rate(at: Tensor, y: Tensor) -> Tensor:
        state = y[:size].view_as(x)
        parts = [field(at.reshape(()), state).reshape(-1)]
        if field.running_cost is not None:
            parts.append(field.cost(at.reshape(()), state).reshape(1))
        return torch.cat(parts)

    y = x.reshape(-1)
    if field.running_cost is not None:
        y = torch.cat([y, y.new_zeros(1)])
    states = [y]
    for start, stop in itertools.pairwise(t):
        length = stop - start
        if fixed is not None:
            y = ButcherSolver(fixed, x.dtype).step(rate, y, start, length)[1]
        else:
            # Over [0, 1], so that the ends of the segment are differentiated exactly.
            y = torchdiffeq.odeint(
                lambda s, y, start=start, length=length: length * rate(start + s * length, y),
                y,
                y.new_tensor([0.0, 1.0]),
                rtol=REFERENCE_TOLERANCE,
                atol=REFERENCE_TOLERANCE,
            )[-1]
        states.append(y)
    cost = None if field.running_cost is None else y[size]
    return torch.stack([state[:size].view_as(x) for state in states]), cost
