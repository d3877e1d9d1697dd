"""The seam to torchdyn: every kind of model and solver, options, registration, copies."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torchdyn.core import MultipleShootingProblem, NeuralODE, ODEProblem
from torchdyn.models import CNF, GNF, HNN, LNN, MultipleShootingLayer
from torchdyn.nn import Augmenter, DataControl, DepthCat, GalConv2d, GalLinear
from torchdyn.nn.galerkin import Fourier, Polynomial
from torchdyn.numerics import odeint as torchdyn_odeint
from torchdyn.numerics.solvers import ode as torchdyn_solvers
from torchdyn.numerics.solvers.hyper import HyperEuler

import torchdyn_snopt
from tests.adjoint.fields import Mlp, TimeDependent, hutchinson
from tests.reference import reference_solve, relative_error, worst_error
from torchdyn_snopt import (
    InvalidInputError,
    SNOptSensitivity,
    UnsupportedError,
    register,
    solve_stats,
    unregister,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = dict.fromkeys(("rtol", "atol", "rtol_adjoint", "atol_adjoint"), 1e-9)
T = torch.tensor([0.0, 1.0], dtype=torch.float64)


def node_of(field: object, **options: object) -> NeuralODE:
    settings = {"solver": "dopri5", "sensitivity": "snopt", "return_t_eval": False}
    return NeuralODE(field, **settings | TIGHT | options)


def loss_of(states: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, states.numel()).view(states.shape)
    return (weights * states.sin()).sum()


def check(
    node: nn.Module,
    x: Tensor,
    t: Tensor = T,
    *,
    tolerance: float = 1e-6,
    density: int = 4,
    call: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """The model's gradients for x0 and θ against autograd through an independent solve."""
    x = x.clone().requires_grad_()
    leaves = [x, *node.parameters()]
    states = node(x, t) if call is None else call(x, t)
    ours = torch.autograd.grad(loss_of(states), leaves, allow_unused=True)
    reference = reference_solve(node.vf, x, t, density=density)[0]
    expected = torch.autograd.grad(loss_of(reference), leaves, allow_unused=True)
    torch.testing.assert_close(states, reference, rtol=10 * tolerance, atol=10 * tolerance)
    assert worst_error(ours, expected) < tolerance


# --- torchdyn's own layers and models -------------------------------------------------------------


def energy(dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, 6), nn.Tanh(), nn.Linear(6, 1))


class ConvexEnergy(nn.Module):
    """With a Hessian that can be inverted, which a Lagrangian network needs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = energy(4)

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * self.net(x) + x[..., 2:].square().sum(-1, keepdim=True)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "depth": (
        lambda: nn.Sequential(
            DepthCat(1), nn.Linear(4, 5), nn.Tanh(), DepthCat(1), nn.Linear(6, 3)
        ),
        (4, 3),
    ),
    "control": (
        lambda: nn.Sequential(DataControl(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (4, 3)
    ),
    "galerkin": (
        lambda: nn.Sequential(
            DepthCat(1), GalLinear(3, 4, expfunc=Fourier(3)), nn.Tanh(),
            DepthCat(1), GalLinear(4, 3, expfunc=Polynomial(2)),
        ),
        (4, 3),
    ),
    "galerkin convolution": (
        lambda: nn.Sequential(DepthCat(1), GalConv2d(1, 1, 3, padding=1, expfunc=Fourier(3))),
        (2, 1, 3, 3),
    ),
    "hamiltonian": (lambda: HNN(energy(4)), (3, 4)),
    "lagrangian": (lambda: LNN(ConvexEnergy()), (1, 4)),
    "gradient flow": (lambda: GNF(energy(3)), (3, 3)),
    "cnf": (lambda: CNF(Mlp(2).layers), (4, 3)),
    "hutchinson": (hutchinson, (4, 3)),
    "cnf in a sequence": (lambda: nn.Sequential(hutchinson()), (4, 3)),
}  # fmt: skip


def make(name: str) -> tuple[nn.Module, Tensor]:
    build, shape = MODELS[name]
    field = build()
    with torch.no_grad():  # Galerkin layers start at zero
        for parameter in field.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return field, torch.randn(*shape)


@pytest.mark.parametrize("name", MODELS)
def test_fields_of_torchdyn(name: str) -> None:
    field, x = make(name)
    # The Hessians of a Lagrangian network are slow, the basis of a Galerkin layer swings.
    tolerance = 1e-5 if name == "lagrangian" else 1e-6
    options = dict.fromkeys(TIGHT, 1e-8) if name == "lagrangian" else {}
    density = 8 if name == "galerkin" else 3
    check(node_of(field, **options), x, tolerance=tolerance, density=density)


@pytest.mark.parametrize("name", ["depth", "control", "hamiltonian", "cnf"])
def test_fields_of_torchdyn_by_checkpoints(name: str) -> None:
    field, x = make(name)
    check(node_of(field, sensitivity=SNOptSensitivity(adjoint="checkpoint")), x)


def test_second_order() -> None:
    """x'' = F(t, x, x'): the upper half of the state is the derivative of the lower."""
    field = nn.Sequential(DepthCat(1), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    check(node_of(field, order=2), torch.randn(4, 6))


def test_third_order() -> None:
    check(node_of(nn.Linear(6, 2), order=3), torch.randn(4, 6))


def test_augmented_pipelines_train_what_stands_before_and_behind() -> None:
    augmenter = Augmenter(augment_idx=1, augment_func=nn.Linear(2, 3))
    node, head = node_of(Mlp(5)), nn.Linear(5, 1)
    model = nn.Sequential(augmenter, node)
    x = torch.randn(4, 2)
    leaves = [*model.parameters(), *head.parameters()]
    ours = torch.autograd.grad(loss_of(head(model(x)[-1])), leaves)
    reference = reference_solve(node.vf, augmenter(x), T)[0]
    expected = torch.autograd.grad(loss_of(head(reference[-1])), leaves)
    assert worst_error(ours, expected) < 1e-6


class Last(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return states[-1]


def test_several_odes_in_one_model() -> None:
    first, second = node_of(Mlp(3)), node_of(TimeDependent(3), solver="tsit5")
    model = nn.Sequential(first, Last(), nn.Linear(3, 3), second, Last())
    x = torch.randn(4, 3)
    ours = torch.autograd.grad(loss_of(model(x)), list(model.parameters()))
    h = model[2](reference_solve(first.vf, x, T)[0][-1])
    expected = torch.autograd.grad(
        loss_of(reference_solve(second.vf, h, T)[0][-1]), list(model.parameters())
    )
    assert worst_error(ours, expected) < 1e-6
    with pytest.raises(InvalidInputError, match="2 models"):
        solve_stats(model)
    assert solve_stats(first).nfe_backward > 0


def test_one_field_shared_by_two_odes() -> None:
    field = TimeDependent(3)
    nodes = node_of(field), node_of(field, solver="tsit5")
    x, later = torch.randn(4, 3), torch.tensor([1.0, 1.5])
    leaves = list(field.parameters())
    ours = torch.autograd.grad(loss_of(nodes[1](nodes[0](x, T)[-1], later)), leaves)
    middle = reference_solve(field, x, T)[0][-1]
    expected = torch.autograd.grad(loss_of(reference_solve(field, middle, later)[0]), leaves)
    assert worst_error(ours, expected) < 1e-6


def test_one_model_called_twice_before_one_backward_pass() -> None:
    """Each backward solve sees the control, and the noise, of its own forward call."""
    for field in (
        nn.Sequential(DataControl(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)),
        hutchinson(),
    ):
        node = node_of(field)
        inputs = [torch.randn(n, 3, requires_grad=True) for n in (4, 2)]
        leaves = [*inputs, *field.parameters()]
        torch.manual_seed(1)
        ours = torch.autograd.grad(sum(loss_of(node(x)) for x in inputs), leaves)
        torch.manual_seed(1)
        single = []
        for x in inputs:
            single.append(torch.autograd.grad(loss_of(node(x)), [x, *field.parameters()]))
        assert relative_error(ours[0], single[0][0]) < 1e-12
        assert relative_error(ours[1], single[1][0]) < 1e-12
        summed = [a + b for a, b in zip(single[0][1:], single[1][1:], strict=True)]
        assert worst_error(ours[2:], summed) < 1e-12


def test_multiple_shooting() -> None:
    field, x = Mlp(2), torch.randn(3, 2)
    # Fine steps enough for 1e-6; iterations up to the number of segments make it exact.
    layer = MultipleShootingLayer(
        field, "mszero", sensitivity="snopt", maxiter=4, fine_steps=20,
        rtol_adjoint=1e-9, atol_adjoint=1e-9,
    )  # fmt: skip
    t = torch.linspace(0.0, 1.0, 6)
    check(layer, x, t, tolerance=1e-5, call=lambda x, t: layer(x, t)[1])
    guess = torchdyn_odeint(layer.vf, x, t, solver="euler")[1].detach()
    torch.testing.assert_close(layer(x, t, guess)[1], layer(x, t)[1], rtol=1e-6, atol=1e-6)
    problem = MultipleShootingProblem(field, "mszero", sensitivity="snopt")
    assert problem(x, t)[1].shape == (6, 3, 2)


# --- BatchNorm and dropout ------------------------------------------------------------------------


def test_batchnorm_in_training_mode_is_a_function_of_the_batch() -> None:
    """Gradients are right; the running statistics take in every stage of both solves."""
    field = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    node = node_of(field)
    x = torch.randn(6, 3, requires_grad=True)
    leaves = [x, *field.parameters()]
    loss = loss_of(node(x))
    seen = int(field[1].num_batches_tracked)
    assert seen == solve_stats(node).nfe_forward
    ours = torch.autograd.grad(loss, leaves)
    assert int(field[1].num_batches_tracked) == seen + solve_stats(node).nfe_backward
    expected = torch.autograd.grad(loss_of(reference_solve(node.vf, x, T)[0]), leaves)
    # The bias before a BatchNorm has no effect: its gradient is rounding in both.
    assert worst_error([*ours[:2], *ours[3:]], [*expected[:2], *expected[3:]]) < 1e-6
    assert float(ours[2].norm()) < 1e-8
    field.eval()
    before = field[1].running_mean.clone()
    node(x)
    assert torch.equal(field[1].running_mean, before)


def test_dropout_makes_the_field_random_and_adaptive_solves_fail() -> None:
    field = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 3))
    x = torch.randn(6, 3)
    with pytest.raises(torchdyn_snopt.SolverError, match=r"underflows|max_steps"):
        node_of(field, sensitivity=SNOptSensitivity(max_steps=300))(x)
    field.eval()
    check(node_of(field), x)
    field.train()
    states = node_of(field, solver="rk4")(x, torch.linspace(0.0, 1.0, 5))
    loss_of(states).backward()  # runs, though with other masks on the way back
    assert field[0].weight.grad.isfinite().all()


# --- calls ----------------------------------------------------------------------------------------


def test_arguments_reach_the_field() -> None:
    class Driven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, t: Tensor, x: Tensor, args: dict[str, float]) -> Tensor:
            return torch.tanh(self.linear(x)) * args["rate"]

    field = Driven()
    node, x = node_of(field), torch.randn(4, 3, requires_grad=True)
    states = node(x, T, args={"rate": 0.5})
    ours = torch.autograd.grad(loss_of(states), [x, *field.parameters()])
    reference = reference_solve(lambda t, x: field(t, x, {"rate": 0.5}), x, T)[0]
    expected = torch.autograd.grad(loss_of(reference), [x, *field.parameters()])
    assert worst_error(ours, expected) < 1e-6


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_save_at(solver: str) -> None:
    """Only the named times come back, in their order; the gradients are those of the named."""
    field, t = TimeDependent(), torch.linspace(0.0, 1.0, 11)
    node = NeuralODE(field, solver, sensitivity="snopt", **TIGHT)
    x = torch.randn(4, 3, requires_grad=True)
    times, saved = node(x, t, save_at=[0.3, 1.0])
    _, states = node(x, t)
    assert torch.equal(saved, states[[3, 10]])
    torch.testing.assert_close(times, torch.tensor([0.3, 1.0]))
    leaves = [x, *field.parameters()]
    ours = torch.autograd.grad(loss_of(saved), leaves)
    assert worst_error(ours, torch.autograd.grad(loss_of(states[[3, 10]]), leaves)) < 1e-12
    _, twice = node(x, t, save_at=[0.3, 0.3])
    _, states = node(x, t)
    ours = torch.autograd.grad(loss_of(twice), leaves)
    assert worst_error(ours, torch.autograd.grad(loss_of(states[[3, 3]]), leaves)) < 1e-12
    with pytest.raises(InvalidInputError, match=r"save_at=0\.35"):
        node(x, t, save_at=torch.tensor([0.35]))


def test_the_interpolator_reads_times_off_the_steps() -> None:
    field, x = TimeDependent(), torch.randn(4, 3)
    t = torch.linspace(0.0, 1.0, 24)
    expected = reference_solve(field, x, t, density=1)[0]
    counts = {}
    for interpolator in (None, "4th"):
        options = dict.fromkeys(TIGHT, 1e-5)
        node = node_of(field, interpolator=interpolator, **options)
        states = node(x, t)
        counts[interpolator] = solve_stats(node).nfe_forward
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
        check(node, x, t[[0, 5, 6, -1]], tolerance=1e-4)
    assert counts["4th"] < counts[None] / 3
    # The same interpolation as torchdyn's.
    theirs = NeuralODE(field, "dopri5", interpolator="4th", rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x, t)[1], states, rtol=1e-4, atol=1e-4)


def test_optimizable_parameters_of_a_bound_method() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1, 1)

        def forward(self, t: Tensor, x: Tensor, u: Tensor, args: object = None) -> Tensor:
            return torch.tanh(self.linear(x + u))

    module, u = Summed(), torch.randn(1, 1)
    field = partial(module.forward, u=u)
    node = node_of(field, optimizable_params=module.parameters())
    x = torch.randn(3, 1, requires_grad=True)
    leaves = [x, *module.parameters()]
    ours = torch.autograd.grad(loss_of(node(x, T)), leaves)
    expected = torch.autograd.grad(loss_of(reference_solve(field, x, T)[0]), leaves)
    assert worst_error(ours, expected) < 1e-6


def test_times_as_a_list_and_by_default() -> None:
    node, x = node_of(Mlp()), torch.randn(2, 3)
    assert torch.equal(node(x, [0.0, 1.0]), node(x))
    assert torch.equal(node(x, [torch.tensor(0.0), torch.tensor([1.0])]), node(x))


def test_the_result_is_a_pair_unless_told_otherwise() -> None:
    node = NeuralODE(Mlp(), sensitivity="snopt")
    t, states = node(torch.randn(2, 3), torch.linspace(0.0, 1.0, 4))
    torch.testing.assert_close(t, torch.linspace(0.0, 1.0, 4))
    assert states.shape == (4, 2, 3)


def test_trajectory_stays_torchdyns() -> None:
    node, x = node_of(Mlp(), solver="bosh3"), torch.randn(2, 3)
    torch.testing.assert_close(
        node.trajectory(x, T).detach(), node(x, T).detach(), rtol=1e-6, atol=1e-6
    )


def test_evaluations_are_counted() -> None:
    node = node_of(Mlp(), **dict.fromkeys(TIGHT, 1e-3))
    with pytest.raises(InvalidInputError, match="call the model first"):
        solve_stats(node)
    x = torch.randn(2, 3, requires_grad=True)
    loss = loss_of(node(x))
    stats = solve_stats(node)
    assert stats.nfe_forward == node.vf.nfe == node.vf.vf.nfe > 0
    assert stats.nfe_backward == 0
    loss.backward()
    assert solve_stats(node) is stats
    assert node.vf.nfe == stats.nfe_forward + stats.nfe_backward
    assert stats.accepted == stats.forward.accepted + stats.backward.accepted
    assert (stats.t1, stats.status) == (1.0, "ok")
    assert solve_stats(nn.Sequential(node)) is stats


def test_no_graph_and_no_gradient_where_none_is_wanted() -> None:
    node, x = node_of(Mlp()), torch.randn(2, 3)
    with torch.no_grad():
        assert not node(x).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(node(x), node(x.clone()))


# --- solvers that are not ours --------------------------------------------------------------------


class Own(torchdyn_solvers.SolverTemplate):
    """A user's own solver: Ralston's method."""

    def __init__(self) -> None:
        super().__init__(order=2)
        self.stepping_class = "fixed"

    def step(self, f, x, t, dt, k1=None, args=None):
        k1 = f(t, x) if k1 is None else k1
        k2 = f(t + 2 / 3 * dt, x + 2 / 3 * dt * k1)
        return None, x + dt * (k1 / 4 + 3 * k2 / 4), None


class OwnDormandPrince(torchdyn_solvers.DormandPrince45):
    """A subclass may do anything: it integrates through torchdyn."""


@pytest.mark.parametrize(
    ("solver", "tolerance", "evaluations"),
    [
        (lambda: HyperEuler(lambda t, x: torch.zeros_like(x)), 2e-2, 50),
        (Own, 1e-3, 100),
        (OwnDormandPrince, 1e-6, None),
        (lambda: "ieuler", 3e-2, None),
    ],
    ids=["hypersolver", "own", "subclass", "implicit euler"],
)
def test_solvers_that_integrate_through_torchdyn(
    solver: Callable[[], object], tolerance: float, evaluations: int | None
) -> None:
    field, t = Mlp(2, 3), torch.linspace(0.0, 1.0, 51)
    node = node_of(field, solver=solver())
    x = torch.randn(2, 2, requires_grad=True)
    states = node(x, t)[[0, -1]]
    theirs = torchdyn_odeint(node.vf, x, t, solver(), atol=1e-9, rtol=1e-9)[1][[0, -1]]
    torch.testing.assert_close(states.detach(), theirs.detach(), rtol=1e-9, atol=1e-9)
    counted = solve_stats(node).nfe_forward
    assert counted == evaluations if evaluations else counted > 50
    leaves = [x, *field.parameters()]
    ours = torch.autograd.grad(loss_of(states), leaves)
    expected = torch.autograd.grad(loss_of(reference_solve(node.vf, x, T)[0]), leaves)
    assert worst_error(ours, expected) < tolerance
    assert not node.vf._forward_hooks


def test_a_hypersolver_uses_the_backward_solver_that_it_is_given() -> None:
    field = Mlp(2, 3)
    node = node_of(field, solver=HyperEuler(lambda t, x: torch.zeros_like(x)), solver_adjoint="rk4")
    loss_of(node(torch.randn(2, 2), torch.linspace(0.0, 1.0, 6))).backward()
    assert solve_stats(node).nfe_backward == 4 * 5


@pytest.mark.parametrize("solver", ["tsit5", torchdyn_solvers.Tsitouras45()], ids=type)
def test_the_backward_solver_by_name_or_as_an_object(solver: object) -> None:
    node = node_of(TimeDependent(), solver_adjoint=solver)
    check(node, torch.randn(4, 3))
    assert isinstance(node.solver_adjoint, torchdyn_solvers.Tsitouras45)


def test_asynchronous_leapfrog() -> None:
    """The state carries a velocity, F(t, x) along the solution; F acts on the other half."""
    field, t = TimeDependent(2), torch.linspace(0.0, 1.0, 101)
    node = node_of(field, solver="alf")
    x = torch.randn(3, 2, requires_grad=True)
    leaves = [x, *field.parameters()]

    def states_of(states: Tensor) -> Tensor:
        return states[[0, 50, -1]]

    start = torch.cat([x, field(t[0], x)], 1)
    ours = states_of(node(start, t))
    theirs = states_of(torchdyn_odeint(node.vf, start, t, "alf")[1])
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(loss_of(ours), leaves, retain_graph=True)
    expected = torch.autograd.grad(loss_of(theirs), leaves)
    assert worst_error(gradients, expected) < 1e-3
    _, saved = NeuralODE(field, "alf", sensitivity="snopt")(start.detach(), t, save_at=[0.5, 1.0])
    assert torch.equal(saved, ours[1:])
    times = torch.linspace(0.0, 1.0, 101, requires_grad=True)
    node(start.detach(), times)[-1].sin().sum().backward()
    inner = times.detach().requires_grad_()
    states = reference_solve(field, x, inner[[0, -1]])[0]
    end = torch.cat([states[-1], field(inner[-1], states[-1])], 1)
    expected = torch.autograd.grad(end.sin().sum(), inner)[0]
    assert relative_error(times.grad[[0, -1]], expected[[0, -1]]) < 1e-3
    with pytest.raises(InvalidInputError, match="needs a velocity"):
        node(torch.randn(2, 3), t)


# --- options and registration ---------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["heun", "bosh3", "dopri8"])
def test_names_that_torchdyn_lacks_work_with_its_own_sensitivities(solver: str) -> None:
    field, x = TimeDependent(), torch.randn(4, 3, requires_grad=True)
    t = torch.linspace(0.0, 1.0, 41)
    node = NeuralODE(field, solver, sensitivity="autograd", rtol=1e-7, atol=1e-7)
    expected = reference_solve(field, x, T)[0][-1]
    torch.testing.assert_close(node(x, t)[1][-1], expected, rtol=1e-3, atol=1e-3)


def test_torchdyns_own_sensitivities_are_as_they_were() -> None:
    field, x = Mlp(), torch.randn(4, 3, requires_grad=True)
    results = {}
    for registered in (True, False):
        if not registered:
            unregister()
        try:
            for name in ("autograd", "adjoint", "interpolated_adjoint"):
                node = NeuralODE(field, "dopri5", sensitivity=name, rtol=1e-6, atol=1e-6)
                loss = loss_of(node(x, torch.linspace(0.0, 1.0, 5))[1])
                results.setdefault(name, []).append(torch.autograd.grad(loss, x)[0])
        finally:
            register()
    for with_us, without in results.values():
        assert torch.equal(with_us, without)


@pytest.fixture
def _registered_again() -> Iterator[None]:
    yield
    register()


@pytest.mark.usefixtures("_registered_again")
def test_registering_is_idempotent_and_undone_cleanly() -> None:
    wrapped = ODEProblem.odeint, ODEProblem.__init__, MultipleShootingProblem.odeint
    register()
    assert (ODEProblem.odeint, ODEProblem.__init__, MultipleShootingProblem.odeint) == wrapped
    assert "dopri8" in torchdyn_solvers.SOLVER_DICT
    unregister()
    unregister()
    for method in (ODEProblem.odeint, ODEProblem.__init__, MultipleShootingProblem.odeint):
        assert method.__module__.startswith("torchdyn.")
    assert not {"dopri8", "bosh3", "heun"} & torchdyn_solvers.SOLVER_DICT.keys()
    with pytest.raises(TypeError, match="NoneType"):
        NeuralODE(Mlp(), sensitivity="snopt")(torch.randn(2, 3))
    register()
    assert NeuralODE(Mlp(), sensitivity="snopt", return_t_eval=False)(torch.randn(2, 3)).shape


@pytest.mark.parametrize("model", [NeuralODE, ODEProblem])
@pytest.mark.parametrize("name", ["snopts", "SNOpt", "", None, 3])
def test_an_unknown_sensitivity_is_refused_with_the_valid_ones(model: type, name: object) -> None:
    with pytest.raises(InvalidInputError, match=r"'autograd', 'adjoint'(.|\n)*'snopt'"):
        model(Mlp(), "dopri5", sensitivity=name)


@pytest.mark.parametrize(
    "wrong",
    [
        {"adjoint": "direct"},
        {"quadrature": "simpson"},
        {"grid_step": 0.0},
        {"grid_step": float("nan")},
        {"error_norm": "max"},
        {"max_steps": 0},
        {"on_failure": "ignore"},
    ],
    ids=str,
)
def test_wrong_options_are_refused_by_name(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(InvalidInputError) as caught:
        SNOptSensitivity(**wrong)
    assert name in str(caught.value)


@pytest.mark.parametrize("other", [{"quadrature": "grid"}, {"error_norm": "full"}], ids=str)
def test_options_that_exclude_each_other(other: dict[str, str]) -> None:
    with pytest.raises(UnsupportedError, match="checkpoint"):
        SNOptSensitivity(adjoint="checkpoint", **other)


# --- copies ---------------------------------------------------------------------------------------


def copies(model: nn.Module) -> Iterator[nn.Module]:
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    yield torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("solver", ["dopri5", "bosh3"])
@pytest.mark.parametrize(
    "sensitivity", ["snopt", SNOptSensitivity(adjoint="checkpoint")], ids=["name", "options"]
)
def test_models_are_copied_before_and_after_training_steps(
    solver: str, sensitivity: object
) -> None:
    field = nn.Sequential(DepthCat(1), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    loose = dict.fromkeys(TIGHT, 1e-4)
    node = node_of(field, solver=solver, sensitivity=sensitivity, **loose)
    model = nn.Sequential(nn.Linear(2, 3), node)
    x = torch.randn(4, 2)
    for _ in range(2):
        for other in copies(model):
            assert other[1].sensitivity == sensitivity
            ours = torch.autograd.grad(loss_of(other(x)), list(other.parameters()))
            expected = torch.autograd.grad(loss_of(model(x)), list(model.parameters()))
            assert worst_error(ours, expected) == 0.0
        t = torch.tensor([0.0, 1.0], requires_grad=True)
        loss_of(model[1](model[0](x), t)).backward()
    assert t.grad is not None
