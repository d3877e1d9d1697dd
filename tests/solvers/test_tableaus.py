"""Butcher tableaus: order conditions by rooted trees, embedded weights, the hosts' own steps."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchdiffeq
from torchdyn.numerics.solvers import ode as torchdyn_solvers

from tests.reference import reference_solve
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.solvers import (
    TABLEAUS,
    TORCHDIFFEQ_NAMES,
    TORCHDYN_NAMES,
    Tableau,
    tableau_named,
)

TORCHDIFFEQ_SOLVERS = importlib.import_module("torchdiffeq._impl.odeint").SOLVERS

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# A rooted tree is the sorted tuple of its subtrees; () is the single vertex.
Tree = tuple

EMBEDDED_ORDER = {"adaptive_heun": 1, "bosh3": 2, "dopri5": 4, "tsit5": 4, "dopri8": 7}
ADAPTIVE = [tableau for tableau in TABLEAUS.values() if tableau.adaptive]
# Prince and Dormand give dopri8 as rationals that hold to about 1e-13.
TOLERANCE = 1e-12
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


@functools.cache
def trees(order: int) -> tuple[Tree, ...]:
    """All rooted trees with that many vertices."""
    if order == 1:
        return ((),)
    return tuple({tuple(sorted(forest)) for forest in forests(order - 1, order - 1)})


@functools.cache
def forests(vertices: int, largest: int) -> tuple[tuple[Tree, ...], ...]:
    """All multisets of trees with that many vertices together, none above ``largest``."""
    if vertices == 0:
        return ((),)
    return tuple(
        (tree, *rest)
        for size in range(min(vertices, largest), 0, -1)
        for tree in trees(size)
        for rest in forests(vertices - size, size)
    )


def size(tree: Tree) -> int:
    return 1 + sum(size(child) for child in tree)


def density(tree: Tree) -> int:
    """γ(tree): the product of the sizes of all subtrees."""
    return size(tree) * math.prod(density(child) for child in tree)


def weights(tableau: Tableau) -> tuple[np.ndarray, np.ndarray]:
    a = np.zeros((tableau.stages, tableau.stages))
    for i, row in enumerate(tableau.a):
        a[i, : len(row)] = row
    return a, np.array(tableau.b)


def derivative_weight(a: np.ndarray, tree: Tree) -> np.ndarray:
    """Φᵢ(tree) = Π over children of Σⱼ aᵢⱼ Φⱼ(child)."""
    product = np.ones(len(a))
    for child in tree:
        product = product * (a @ derivative_weight(a, child))
    return product


def residuals(tableau: Tableau, b: np.ndarray, order: int, theta: float = 1.0) -> list[float]:
    """Σ bᵢ Φᵢ(tree) − θ^order / γ(tree) for every tree of that order."""
    a, _ = weights(tableau)
    return [
        float(b @ derivative_weight(a, tree)) - theta**order / density(tree)
        for tree in trees(order)
    ]


def test_the_trees_are_all_there() -> None:
    assert [len(trees(order)) for order in range(1, 9)] == [1, 1, 2, 4, 9, 20, 48, 115]


@pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=lambda t: t.name)
def test_order_conditions_hold_up_to_the_order_and_no_further(tableau: Tableau) -> None:
    _, b = weights(tableau)
    for order in range(1, tableau.order + 1):
        assert max(map(abs, residuals(tableau, b, order))) < TOLERANCE
    assert max(map(abs, residuals(tableau, b, tableau.order + 1))) > 1e-7


@pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=lambda t: t.name)
def test_rows_sum_to_the_nodes(tableau: Tableau) -> None:
    a, _ = weights(tableau)
    assert [len(row) for row in tableau.a] == list(range(tableau.stages))
    assert np.abs(a.sum(1) - np.array(tableau.c)).max() < TOLERANCE
    assert tableau.c[0] == 0.0


@pytest.mark.parametrize("tableau", ADAPTIVE, ids=lambda t: t.name)
def test_error_weights_are_those_of_an_embedded_method(tableau: Tableau) -> None:
    _, b = weights(tableau)
    e = np.array(tableau.e)
    assert abs(e.sum()) < TOLERANCE
    embedded = EMBEDDED_ORDER[tableau.name]
    for order in range(1, embedded + 1):
        assert max(map(abs, residuals(tableau, b - e, order))) < TOLERANCE
    # Were the embedded method of the full order, the estimate would vanish with the error.
    assert max(map(abs, residuals(tableau, b - e, embedded + 1))) > 1e-6


def test_the_middle_of_a_dopri5_step_is_of_order_four() -> None:
    tableau = TABLEAUS["dopri5"]
    assert tableau.mid is not None
    for order in range(1, 5):
        assert max(map(abs, residuals(tableau, np.array(tableau.mid), order, 0.5))) < 1e-10
    assert [t.name for t in TABLEAUS.values() if t.mid is not None] == ["dopri5"]


def test_fsal_methods_are_recognized() -> None:
    assert {t.name for t in TABLEAUS.values() if t.fsal} == {"bosh3", "dopri5", "tsit5"}


def step(
    tableau: Tableau, t: float, x: torch.Tensor, dt: float, f: Field | None = None
) -> torch.Tensor:
    """One step by the definition, stage by stage."""
    f = f or field
    k: list[torch.Tensor] = []
    for c, row in zip(tableau.c, tableau.a, strict=True):
        increment = sum(a * stage for a, stage in zip(row, k, strict=True))
        k.append(f(torch.tensor(t + c * dt), x + dt * increment))
    return x + dt * sum(b * stage for b, stage in zip(tableau.b, k, strict=True))


def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.sin(3 * t) * x - 0.4 * x.flip(-1) ** 2 + torch.cos(t)


@functools.cache
def solution() -> tuple[torch.Tensor, torch.Tensor]:
    x0 = torch.tensor([0.7, -0.3], dtype=torch.float64)
    return x0, reference_solve(field, x0, torch.tensor([0.0, 1.0]), density=10)[0][-1]


@pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=lambda t: t.name)
def test_the_error_falls_with_the_order(tableau: Tableau, float64: None) -> None:
    """A quarter of the step divides the error of a nonlinear problem by 4^order."""
    x0, exact = solution()

    def error(steps: int) -> float:
        x = x0
        for i in range(steps):
            x = step(tableau, i / steps, x, 1 / steps)
        return float((x - exact).norm())

    coarse = {1: 64, 2: 32, 3: 16, 4: 16, 5: 16, 8: 4}[tableau.order]
    slope = math.log2(error(coarse) / error(4 * coarse)) / 2
    assert tableau.order - 0.3 < slope < tableau.order + 1.2


def autonomous(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return field(torch.tensor(0.4), x)


@pytest.mark.parametrize("name", TORCHDYN_NAMES)
def test_names_of_torchdyn_mean_torchdyns_steps(name: str, float64: None) -> None:
    solver = torchdyn_solvers.str_to_solver(name, torch.float64)
    x, t, dt = torch.tensor([[0.7, -0.3]]), torch.tensor(0.2), torch.tensor(0.3)
    x, _ = solver.sync_device_dtype(x, t)
    # torchdyn 1.0.6 evaluates the stages of 'rk4' at shifted times, and so is of order one on a
    # field that depends on time; on an autonomous field it is Kutta's method.
    f = autonomous if TORCHDYN_NAMES[name] is TABLEAUS["rk4"] else field
    theirs = solver.step(f, x, t, dt)[1]
    torch.testing.assert_close(step(TORCHDYN_NAMES[name], 0.2, x, 0.3, f), theirs, **CLOSE)


# Both hosts scale the error estimate of dopri5 by 2/3.
@pytest.mark.parametrize(
    ("name", "scale"), [("dopri5", 1.5), ("tsit5", 1.0), ("bosh3", 1.0), ("dopri8", 1.0)]
)
def test_error_estimates_agree_with_torchdyn(name: str, scale: float, float64: None) -> None:
    solver = torchdyn_solvers.str_to_solver(name, torch.float64)
    x, t, dt = torch.tensor([[0.7, -0.3]]), torch.tensor(0.2), torch.tensor(0.3)
    x, _ = solver.sync_device_dtype(x, t)
    k_last, x1, error, stages = solver.step(field, x, t, dt)
    e = TORCHDYN_NAMES[name].e
    assert e is not None
    ours = 0.3 * sum(w * k for w, k in zip(e, stages, strict=True))
    torch.testing.assert_close(ours, scale * error, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(k_last, field(t + dt, x1), **CLOSE)


@pytest.mark.parametrize("name", TORCHDIFFEQ_NAMES)
def test_names_of_torchdiffeq_mean_torchdiffeqs_steps(name: str, float64: None) -> None:
    if name not in TORCHDIFFEQ_SOLVERS:
        pytest.skip(f"this torchdiffeq knows no {name!r}")
    tableau = TORCHDIFFEQ_NAMES[name]
    x, t = torch.tensor([0.7, -0.3]), torch.tensor([0.2, 0.5])
    # Tolerances so loose that the one step of the given length is taken as it is.
    how = {"rtol": 1e6, "atol": 1e6, "options": {"first_step": 0.3}} if tableau.adaptive else {}
    theirs = torchdiffeq.odeint(field, x, t, method=name, **how)[-1]
    torch.testing.assert_close(step(tableau, 0.2, x, 0.3), theirs, **CLOSE)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InvalidInputError, match=r"'rk5'(.|\n)*dopri5"):
        tableau_named("rk5")
    assert tableau_named("rk4") is TABLEAUS["rk4"]


def test_coefficients_are_made_once_for_each_dtype() -> None:
    tableau = TABLEAUS["dopri5"]
    single, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    assert tableau.coefficients(single) is tableau.coefficients(torch.ones(3))
    assert tableau.coefficients(double).b.dtype == torch.float64
    assert tableau.coefficients(double).b.tolist() == list(tableau.b)
