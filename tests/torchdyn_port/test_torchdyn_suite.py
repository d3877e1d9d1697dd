"""What torchdyn 1.0.6 checks of its own adjoints, checked of 'snopt'.

Written anew from what torchdyn's test_sensitivity.py, test_problem.py, test_ode.py and
test_normalizing_flows.py assert, with their tolerances or tighter ones.
"""

from __future__ import annotations

import pytest
import torch
import torchdiffeq
from torch import nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE, ODEProblem
from torchdyn.models import CNF, hutch_trace
from torchdyn.nn import Augmenter, DepthCat
from torchdyn.numerics import VanDerPol

import torchdyn_snopt as snopt

ADJOINTS = [snopt.SNOptSensitivity(), snopt.SNOptSensitivity(adjoint="checkpoint")]
T_SPAN = torch.linspace(0, 1, 40)


def tolerances(forward: float, backward: float) -> dict[str, float]:
    return {
        "atol": forward,
        "rtol": forward,
        "atol_adjoint": backward,
        "rtol_adjoint": backward,
    }


@pytest.fixture
def states() -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(256, 2, generator=generator, requires_grad=True)


@pytest.mark.parametrize("sensitivity", ADJOINTS, ids=lambda s: s.adjoint)
@pytest.mark.parametrize("solver", ["dopri5", "tsit5"])
@pytest.mark.parametrize("stiffness", [0.1, 0.5])
def test_gradient_on_van_der_pol_beats_torchdiffeq(sensitivity, solver, stiffness, states):
    f = VanDerPol(stiffness)
    problem = ODEProblem(f, solver, sensitivity=sensitivity, **tolerances(1e-4, 1e-4))
    _, ours = problem.odeint(states, T_SPAN)
    theirs = torchdiffeq.odeint_adjoint(f, states, T_SPAN, method="dopri5", atol=1e-4, rtol=1e-4)
    truth = torchdiffeq.odeint(
        f, states.double(), T_SPAN.double(), method="dopri5", atol=1e-9, rtol=1e-9
    )
    gradients = [
        torch.autograd.grad(solution[-1].sum(), states)[0] for solution in (ours, theirs, truth)
    ]
    error, their_error = ((g - gradients[2]).abs().sum(1) for g in gradients[:2])
    assert error.max() <= 1e-3
    assert error.mean() <= their_error.mean()


@pytest.mark.parametrize("sensitivity", ADJOINTS, ids=lambda s: s.adjoint)
@pytest.mark.parametrize("stiffness", [0.5])
def test_integral_loss_equals_the_augmented_state(sensitivity, stiffness, states):
    f = VanDerPol(stiffness)

    def reg_term(t, x):
        return 0.1 * x[:, :1]

    augmented = NeuralODE(f, sensitivity="autograd", solver="rk4", integral_loss=reg_term)
    _, solution = augmented(torch.cat([torch.zeros(len(states), 1), states], 1), T_SPAN)
    (expected,) = torch.autograd.grad(solution[-1, :, 0].sum(), states)

    node = NeuralODE(
        f,
        sensitivity=sensitivity,
        solver="dopri5",
        interpolator="4th",
        integral_loss=reg_term,
        **tolerances(1e-4, 1e-5),
    )
    _, solution = node(states, T_SPAN)
    (gradient,) = torch.autograd.grad(0.0 * solution[-1].sum(), states)
    assert (gradient - expected).abs().mean() <= 1e-5


@pytest.mark.parametrize("problem", [ODEProblem, NeuralODE])
@pytest.mark.parametrize("solver", ["dopri5", "tsit5"])
def test_a_model_survives_saving(problem, solver, tmp_path):
    f = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    model = problem(f, sensitivity="snopt", solver=solver)
    x, t = torch.randn(5, 1), torch.linspace(0, 1, 2)
    _, expected = model(x, t)
    torch.save(model, tmp_path / "model.pt")
    _, found = torch.load(tmp_path / "model.pt", weights_only=False)(x, t)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("sensitivity", ADJOINTS, ids=lambda s: s.adjoint)
def test_trained_moons_classifier_has_autograds_gradient(sensitivity):
    torch.manual_seed(0)
    x = torch.randn(512, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    f = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
    gradients = []
    for chosen in (sensitivity, "autograd"):
        node = NeuralODE(
            f, "dopri5", sensitivity=chosen, return_t_eval=False, **tolerances(1e-6, 1e-6)
        )
        loss = nn.functional.cross_entropy(node(x)[-1], y)
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, f.parameters())])
        )
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "dopri5", "tsit5"])
def test_a_depth_variant_field_trains(solver, order):
    torch.manual_seed(1)
    f = nn.Sequential(DepthCat(1), nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4 // order))
    node = NeuralODE(f, solver, order=order, sensitivity="snopt", return_t_eval=False)
    x, t = torch.randn(32, 4), torch.linspace(0, 1, 20)
    optimizer = snopt.SNOpt(node)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = node(x, t)[-1].square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("hutchinson", [False, True], ids=["autograd_trace", "hutch_trace"])
@pytest.mark.usefixtures("float64")
def test_a_normalizing_flow_has_autograds_gradient(hutchinson):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 64), nn.Softplus(), nn.Linear(64, 2))
    if hutchinson:
        noise = MultivariateNormal(torch.zeros(2), torch.eye(2))
        flow = nn.Sequential(CNF(net, trace_estimator=hutch_trace, noise_dist=noise))
    else:
        flow = CNF(net)
    x = torch.randn(64, 2)
    gradients = []
    # Softplus for torchdyn's ELU, whose kinks in the trace cost autograd itself 1e-4 at 1e-6.
    for sensitivity, tolerance in (("snopt", 1e-6), ("autograd", 1e-9)):
        node = NeuralODE(
            flow,
            "dopri5",
            sensitivity=sensitivity,
            return_t_eval=False,
            **tolerances(tolerance, tolerance),
        )
        torch.manual_seed(3)  # the same noise
        out = nn.Sequential(Augmenter(augment_idx=1, augment_dims=1), node)(x)[-1]
        assert out.shape == (64, 3)
        # A sum: atol_adjoint is compared with a as it is, and a mean would make a 64 times smaller.
        loss = (out[:, 0] + out[:, 1:].square().sum(1)).sum()
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, net.parameters())])
        )
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error <= 1e-5
