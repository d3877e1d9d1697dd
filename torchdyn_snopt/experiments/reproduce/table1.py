"""Table 1: errors of first and second derivatives by solver, with and without recursion.

The paper's table shows that differentiating the adjoint solve again loses two to six orders of
magnitude against the first derivative. Here Theorem 1 (with the terms that make it the Hessian)
stands beside it, on fields small enough for a dense ground truth: the Hessian by autograd through
a Runge-Kutta solution with six times the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call

from torchdyn_snopt import recursive_adjoint, second_order_adjoint
from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable
from torchdyn_snopt.experiments.environment import describe_environment
from torchdyn_snopt.experiments.reproduce.measured import Measured

TOLERANCE = 1e-3
STEPS, TRUTH_STEPS = 20, 120
SEEDS = 3
DIMS, WIDTH, SAMPLES = 2, 3, 1

HEAD = [
    "field", "solver", "∂L/∂θ, adjoint", "∂²L/∂θ², recursive", "∂²L/∂θ², Theorem 1", "ratio",
]  # fmt: skip
NOTE = (
    "Relative errors (Frobenius), median over draws of the weights; float64. Theorem 1: "
    "second_order_adjoint(exact=True), the Hessian. Ratio: recursive over Theorem 1. rk4 and "
    f"implicit_adams (torchdiffeq) take {STEPS} steps; dopri5 works at rtol = atol = "
    f"{TOLERANCE:g}. F = tanh network 2-3-2; 'contracting' subtracts 5x, 'timed' multiplies by "
    "1 + sin 2t."
)


class _Field(nn.Module):
    """A tanh network with what a case adds to it."""

    def __init__(self, wrap: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(DIMS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, DIMS))
        self.wrap = wrap

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.wrap(self.net(x), t, x)


@dataclass(frozen=True)
class FieldCase:
    """A field and how long it runs.

    Attributes:
        name: In the table.
        wrap: From the network's output, t and x to F.
        t1: End of the integration.
    """

    name: str
    wrap: Callable[[Tensor, Tensor, Tensor], Tensor]
    t1: float


FIELDS = (
    FieldCase("autonomous", lambda f, t, x: f, 1.0),
    FieldCase("timed", lambda f, t, x: f * (1.0 + torch.sin(2.0 * t)), 1.0),
    FieldCase("contracting", lambda f, t, x: f - 5.0 * x, 3.0),
)
SOLVERS = ("rk4", "implicit_adams", "dopri5")


def loss(x: Tensor) -> Tensor:
    """A terminal loss whose Hessian is not constant, summed over samples."""
    return (x**4 / 4 + x.sin()).sum() + 0.5 * x.prod(-1).sum()


def run_table1(tell: Callable[[str], None], seeds: int = SEEDS) -> Measured:
    """Measure every field with every solver.

    Args:
        tell: Told about the progress.
        seeds: Draws of the weights.

    Returns:
        Table and picture.
    """
    raw = []
    for case in FIELDS:
        for seed in range(seeds):
            tell(f"{case.name}, draw {seed + 1} of {seeds}")
            raw += _measure(case, seed)
    rows = [_median(raw, case.name, solver) for case in FIELDS for solver in SOLVERS]
    body = [
        [
            row["field"],
            row["solver"],
            *(f"{row[key]:.1e}" for key in ("first", "recursive", "theorem1")),
            f"{row['recursive'] / row['theorem1']:.1f}",
        ]
        for row in rows
    ]
    table = BenchTable("Errors of first and second derivatives by solver", HEAD, body)
    report = BenchReport("table1", [table], NOTE, describe_environment(torch.device("cpu")), raw)
    return Measured(report, _draw(rows))


def _measure(case: FieldCase, seed: int) -> list[dict[str, Any]]:
    generator = torch.random.fork_rng()
    with generator:
        torch.manual_seed(seed)
        field = _Field(case.wrap).double()
        x0 = torch.randn(SAMPLES, DIMS, dtype=torch.float64)
    gradient, matrix = _truth(field, x0, case.t1)
    results = []
    for solver in SOLVERS:
        method, times, options = _solver(solver, case.t1)
        ours = second_order_adjoint(field, x0, times, loss, method=method, exact=True, **options)
        theirs = recursive_adjoint(field, x0, times, loss, method=method, **options)
        errors = {
            "first": _relative(theirs.Qu, gradient),
            "recursive": _relative(theirs.Quu, matrix),
            "theorem1": _relative(ours.Quu, matrix),
        }
        results.append({"field": case.name, "solver": solver, "seed": seed, **errors})
    return results


def _solver(name: str, t1: float) -> tuple[Any, list[float], dict[str, Any]]:
    """Method, times and tolerances."""
    grid = [t1 * i / STEPS for i in range(STEPS + 1)]
    if name == "implicit_adams":
        adams = functools.partial(
            torchdiffeq.odeint, method=name, options={"step_size": t1 / STEPS}, rtol=TOLERANCE
        )
        return adams, [0.0, t1], {}
    if name == "rk4":
        return name, grid, {}
    return name, [0.0, t1], {"rtol": TOLERANCE, "atol": TOLERANCE}


def _truth(field: nn.Module, x0: Tensor, t1: float) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian in θ by autograd through a fine solution."""
    names = [name for name, _ in field.named_parameters()]
    shapes = [p.shape for p in field.parameters()]
    theta = torch.cat([p.detach().reshape(-1) for p in field.parameters()])
    times = torch.tensor([0.0, t1], dtype=torch.float64)

    def total(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        own = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        states = torchdiffeq.odeint(
            lambda t, x: functional_call(field, own, (t, x)),
            x0,
            times,
            method="rk4",
            options={"step_size": t1 / TRUTH_STEPS},
        )
        return loss(states[-1])

    flat = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(flat), flat)
    matrix: Tensor = hessian(total, theta, vectorize=True)
    return gradient, matrix


def _relative(value: Tensor, truth: Tensor) -> float:
    return float((value - truth).norm() / truth.norm())


def _median(raw: list[dict[str, Any]], field: str, solver: str) -> dict[str, Any]:
    chosen = [r for r in raw if r["field"] == field and r["solver"] == solver]
    keys = ("first", "recursive", "theorem1")
    medians = {k: float(torch.tensor([r[k] for r in chosen]).median()) for k in keys}
    return {"field": field, "solver": solver, **medians}


def _draw(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    (axes,) = figure.subplots(1, len(FIELDS), sharey=True, squeeze=False)
    kinds = {
        "first": ("∂L/∂θ, adjoint", "#ffffff", ""),
        "recursive": ("∂²L/∂θ², recursive", "#D55E00", "//"),
        "theorem1": ("∂²L/∂θ², Theorem 1", "#009E73", ""),
    }
    for axis, case in zip(axes, FIELDS, strict=True):
        for shift, (key, (label, color, hatch)) in enumerate(kinds.items()):
            heights = [row[key] for row in rows if row["field"] == case.name]
            places = [i + 0.27 * (shift - 1) for i in range(len(SOLVERS))]
            axis.bar(
                places, heights, 0.25, label=label, color=color, hatch=hatch, edgecolor="black"
            )
        axis.set_yscale("log")
        axis.set_xticks(range(len(SOLVERS)), [solver.replace("_", "\n") for solver in SOLVERS])
        axis.set_title(case.name)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_ylabel("relative error")
    axes[0].legend(fontsize="small")
    return figure
