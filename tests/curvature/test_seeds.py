"""Columns of the loss through heads, poolings, several times, several solves and encoders."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from torchdyn_snopt.adjoint.problem import SNOptSensitivity
from torchdyn_snopt.adjoint.second_order import second_order_adjoint
from torchdyn_snopt.curvature.factors import Factors
from torchdyn_snopt.curvature.losses import CrossEntropyLoss, MSELoss
from torchdyn_snopt.curvature.record import record_curvature
from torchdyn_snopt.solvers import SolveStats
from torchdyn_snopt.torchdiffeq_api import odeint_snopt

pytestmark = pytest.mark.usefixtures("float64")

N, D, C = 4, 2, 3


class Solve(nn.Module):
    """A field between given times; returns the states at all of them, [T, N, D]."""

    def __init__(
        self,
        field: nn.Module,
        times: tuple[float, ...] = (0.0, 1.0),
        method: str = "dopri5",
        **sensitivity: str,
    ) -> None:
        super().__init__()
        self.field, self.times, self.method = field, times, method
        self.sensitivity = SNOptSensitivity(**sensitivity)
        self.stats = SolveStats()

    def forward(self, x: Tensor) -> Tensor:
        return odeint_snopt(
            self.field,
            x,
            torch.tensor(self.times),
            rtol=1e-9,
            atol=1e-10,
            method=self.method,
            sensitivity=self.sensitivity,
            stats=self.stats,
        )


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 3), nn.Linear(3, D)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def relative(value: Tensor, reference: Tensor) -> float:
    assert value.shape == reference.shape
    return float((value - reference).norm() / reference.norm())


def through(network, h: Tensor, loss) -> Tensor:
    """mean_b J_bᵀ H_b J_b, J_b the Jacobian of a sample's outputs in its h, all by autograd."""
    h = h.detach().requires_grad_()
    out = network(h)
    jacobian = torch.stack(
        [torch.autograd.grad(out[:, c].sum(), h, retain_graph=True)[0] for c in range(C)], 1
    )
    out = out.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(out), out, create_graph=True)
    hessians = torch.stack(
        [torch.autograd.grad(g[:, c].sum(), out, retain_graph=True)[0] for c in range(C)], 1
    )
    return torch.einsum("nci,ncd,ndj->ij", jacobian, hessians, jacobian)


@pytest.mark.parametrize("adjoint", ["backsolve", "checkpoint"])
def test_an_encoder_gets_the_columns_of_two_solves_in_a_row_a_skip_and_two_times(adjoint):
    encoder, head = nn.Linear(5, D), nn.Linear(3 * D, C)
    first = Solve(Tanh(), (0.0, 0.7), adjoint=adjoint)
    second = Solve(Tanh(), (0.0, 0.4, 1.0), adjoint=adjoint)
    x, target = torch.randn(N, 5), torch.randint(C, (N,))

    def behind_encoder(h: Tensor) -> Tensor:
        z = first(torch.tanh(h))[-1]
        states = second(z)
        return head(torch.cat([states[1], states[2] ** 2, z], -1))  # a skip around the second

    model = nn.ModuleList([encoder, first, second, head])
    loss = CrossEntropyLoss()
    with record_curvature(model, curvature="ggn") as curvature:
        loss(behind_encoder(encoder(x)), target).backward()
    expected = through(behind_encoder, encoder(x), lambda out: loss(out, target))
    assert relative(curvature.factors["0"].B, expected) < 1e-6
    assert set(curvature.factors) == {
        "0", "1.field.inner", "1.field.outer", "2.field.inner", "2.field.outer", "3"
    }  # fmt: skip


def test_a_layer_that_several_solves_use_gets_the_sum_of_their_columns():
    """Not the sum of their outer products: cross terms count."""
    encoder, one, two = nn.Linear(5, D), Solve(Tanh()), Solve(Tanh())
    head = nn.Linear(D, C)
    x, target = torch.randn(N, 5), torch.randint(C, (N,))

    def behind(h: Tensor) -> Tensor:
        return head(one(h)[-1] - two(torch.sin(h))[-1])

    loss = CrossEntropyLoss()
    with record_curvature(nn.ModuleList([encoder, one, two, head]), curvature="ggn") as curvature:
        loss(behind(encoder(x)), target).backward()
    expected = through(behind, encoder(x), lambda out: loss(out, target))
    assert relative(curvature.factors["0"].B, expected) < 1e-6


def test_two_losses_stand_side_by_side():
    encoder, solve, head = nn.Linear(5, D), Solve(Tanh()), nn.Linear(D, C)
    model = nn.ModuleList([encoder, solve, head])
    x, classes, values = torch.randn(N, 5), torch.randint(C, (N,)), torch.randn(N, C)

    def behind(h: Tensor) -> Tensor:
        return head(solve(h)[-1])

    def both(out: Tensor) -> Tensor:
        return CrossEntropyLoss()(out, classes) + MSELoss()(out, values)

    with record_curvature(model, curvature="ggn") as curvature:
        both(behind(encoder(x))).backward()
    expected = through(behind, encoder(x), both)
    assert relative(curvature.factors["0"].B, expected) < 1e-6
    hessian = through(lambda h: h, head(solve(encoder(x))[-1]), both)
    assert relative(curvature.factors["2"].B, hessian) < 1e-12


@pytest.mark.parametrize("quadrature", ["stages", "grid"])
def test_b_of_a_linear_field_is_the_integral_of_its_adjoint_flow(quadrature):
    """F = W x: q(t) = exp(Wᵀ(1 − t)) y, B = ∫ mean_b Σ_r q q ᵀ dt."""
    layer = nn.Linear(D, D, bias=False)

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.layer(x)

    solve = Solve(Linear(), quadrature=quadrature)
    with record_curvature(solve, curvature="ggn") as curvature:
        MSELoss()(solve(torch.randn(N, D))[-1], torch.zeros(N, D)).backward()
    grid = torch.linspace(0.0, 1.0, 2001)
    flows = torch.stack([torch.matrix_exp(layer.weight.detach().T * (1 - t)) for t in grid])
    expected = torch.trapezoid(flows @ flows.mT * (2 / D), grid, dim=0)
    limit = 1e-6 if quadrature == "stages" else 2e-2
    assert relative(curvature.factors["field.layer"].B, expected) < limit
    assert curvature.factors["field.layer"].scale == 1.0


def test_gradients_and_steps_are_those_of_a_plain_pass():
    solve, head = Solve(Tanh()), nn.Linear(D, C)
    x, target = torch.randn(N, D), torch.randint(C, (N,))
    results = []
    for kind in ("none", "ggn"):
        for p in (*solve.parameters(), *head.parameters()):
            p.grad = None
        if kind == "none":
            CrossEntropyLoss()(head(solve(x)[-1]), target).backward()
        else:
            with record_curvature(nn.ModuleList([solve, head]), curvature="ggn"):
                CrossEntropyLoss()(head(solve(x)[-1]), target).backward()
        grads = [p.grad.clone() for p in (*solve.parameters(), *head.parameters())]
        results.append((grads, solve.stats.nfe_backward, solve.stats.accepted))
    assert results[0][1:] == results[1][1:]
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert relative(one, other) < 1e-14


def test_an_operation_that_cannot_be_mapped_is_carried_column_by_column():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2.0 * x

        @staticmethod
        def backward(ctx, g):
            if g.abs().sum().item() < 0:  # .item() cannot be mapped
                raise AssertionError
            return 2.0 * g

    encoder, solve, head = nn.Linear(5, D), Solve(Tanh()), nn.Linear(D, C)
    x, target = torch.randn(N, 5), torch.randint(C, (N,))

    def behind(h: Tensor) -> Tensor:
        return head(Opaque.apply(solve(Opaque.apply(h))[-1]))

    loss = CrossEntropyLoss()
    with record_curvature(nn.ModuleList([encoder, solve, head]), curvature="ggn") as curvature:
        loss(behind(encoder(x)), target).backward()
    expected = through(behind, encoder(x), lambda out: loss(out, target))
    assert relative(curvature.factors["0"].B, expected) < 1e-6


def test_an_empirical_recording_beside_it_is_not_disturbed():
    encoder, solve, head = nn.Linear(5, D), Solve(Tanh()), nn.Linear(D, C)
    model = nn.ModuleList([encoder, solve, head])
    x, target = torch.randn(N, 5), torch.randint(C, (N,))

    def run() -> None:
        CrossEntropyLoss()(head(solve(encoder(x))[-1]), target).backward()

    with record_curvature(model) as alone:
        run()
    with record_curvature(model) as beside, record_curvature(model, curvature="ggn"):
        run()
    assert set(alone.factors) == set(beside.factors)
    for name, factors in alone.factors.items():
        assert relative(beside.factors[name].B, factors.B) < 1e-13
        assert relative(beside.factors[name].A, factors.A) < 1e-13


def test_a_pass_that_is_recorded_keeps_no_graph_alive():
    solve, head = Solve(Tanh()), nn.Linear(D, C)
    with record_curvature(nn.ModuleList([solve, head]), curvature="ggn"):
        out = head(solve(torch.randn(N, D))[-1])
        dead = weakref.ref(out)
        CrossEntropyLoss()(out, torch.zeros(N, dtype=torch.long)).backward()
        del out
        gc.collect()
        assert dead() is None


# -- where A ⊗ B is the exact block ---------------------------------------------------------------


def kronecker(factors: Factors) -> Tensor:
    """A ⊗ B for parameters in the order weight [out, in] row by row, then bias."""
    full = torch.kron(factors.B, factors.A)
    return in_parameter_order(full, len(factors.B), len(factors.A))


def in_parameter_order(matrix: Tensor, size: int, columns: int) -> Tensor:
    index = torch.arange(size * columns).view(size, columns)
    order = torch.cat([index[:, :-1].reshape(-1), index[:, -1]])
    return matrix[order][:, order]


class Driven(nn.Module):
    """Independent of x: q is constant in time. The layer's input depends on the sample or not."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs.shape[1], D)
        self.register_buffer("inputs", inputs)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layer(self.inputs) + 0.0 * x


class Shallow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.sin(self.layer(x)) * x


def exact_and_kronecker(field: nn.Module, x: Tensor, loss, **solve) -> tuple[Tensor, Tensor]:
    method = solve.get("method", "dopri5")
    exact = second_order_adjoint(
        field, x, (0.0, 1.0), loss, method=method, batched=False, rtol=1e-9, atol=1e-10
    ).Quu
    node = Solve(field, **solve)
    with record_curvature(node, curvature="ggn") as curvature:
        loss(node(x)[-1]).backward()
    return exact, kronecker(curvature.factors["field.layer"])


def mse(x: Tensor) -> Tensor:
    return MSELoss()(x, torch.zeros_like(x))


def cross_entropy(x: Tensor) -> Tensor:
    return CrossEntropyLoss()(x, torch.zeros(len(x), dtype=torch.long))


EXACT = {
    # One sample, a field that does not depend on x: z and q are constant in time.
    "one sample, constant in time": lambda: (Driven(torch.randn(1, 3)), 1, cross_entropy, {}),
    # q the same for all samples (quadratic loss, F_x = 0): A averages over z alone.
    "quadratic loss, F_x = 0": lambda: (Driven(torch.randn(N, 3)), N, mse, {}),
    # z the same for all samples: B averages over q alone.
    "one input for all samples, F_x = 0": lambda: (
        Driven(torch.randn(1, 3).expand(N, 3).clone()), N, cross_entropy, {}
    ),
    # One evaluation of a nonlinear field: a single Euler step with one sample.
    "one Euler step, one sample": lambda: (
        Shallow(), 1, cross_entropy, {"method": "euler", "adjoint": "checkpoint"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("regime", EXACT.values(), ids=EXACT)
def test_the_factors_are_the_exact_block(regime):
    field, samples, loss, solve = regime()
    x = torch.randn(samples, D)
    if solve.get("method") == "euler":
        exact = euler_block(field, x, loss)
        node = Solve(field, **solve)
        with record_curvature(node, curvature="ggn") as curvature:
            loss(node(x)[-1]).backward()
        approximate = kronecker(curvature.factors["field.layer"])
    else:
        exact, approximate = exact_and_kronecker(field, x, loss, **solve)
    assert relative(approximate, exact) < 1e-9


def euler_block(field: nn.Module, x: Tensor, loss) -> Tensor:
    """Jᵀ Φ_xx J of one explicit Euler step."""
    u = list(field.parameters())
    x1 = x + field(torch.zeros(()), x)
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(x1[0, i], u, retain_graph=True)])
        for i in range(D)
    ]
    jacobian = torch.stack(rows)
    phi = torch.autograd.functional.hessian(lambda z: loss(z.view(1, D)), x1.detach().reshape(-1))
    return jacobian.T @ phi @ jacobian


def test_outside_the_ode_a_quadratic_loss_makes_an_encoder_of_a_linear_network_exact():
    """A deep linear network with an ODE in it: q is the same for all samples (Bernacchia 2018)."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(D, D)

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.inner(x)

    encoder, solve = nn.Linear(3, D), Solve(Linear())
    x = torch.randn(N, 3)
    with record_curvature(nn.ModuleList([encoder, solve]), curvature="ggn") as curvature:
        mse(solve(encoder(x))[-1]).backward()
    approximate = kronecker(curvature.factors["0"])
    flow = torch.matrix_exp(solve.field.inner.weight.detach())
    z = torch.cat([x, torch.ones(N, 1)], 1)
    exact = torch.kron(flow.T @ flow * (2 / D), z.T @ z / N)
    assert relative(approximate, in_parameter_order(exact, D, 4)) < 1e-7


def test_elsewhere_they_differ():
    exact, approximate = exact_and_kronecker(Shallow(), torch.randn(N, D), cross_entropy)
    assert 0.01 < relative(approximate, exact) < 1.0


def test_mc_through_a_solve_tends_to_ggn_at_the_monte_carlo_rate():
    node, head = Solve(Tanh(), method="rk4"), nn.Linear(D, C)
    x, target = torch.randn(N, D), torch.zeros(N, dtype=torch.long)

    def b(kind: str, samples: int = 1, seed: int = 0) -> Tensor:
        loss = CrossEntropyLoss(samples=samples, generator=torch.Generator().manual_seed(seed))
        with record_curvature(nn.ModuleList([node, head]), curvature=kind) as curvature:
            loss(head(node(x)[-1]), target).backward()
        return curvature.factors["0.field.inner"].B

    exact = b("ggn")
    errors = {
        samples: sum(relative(b("mc", samples, s), exact) ** 2 for s in range(12)) ** 0.5
        for samples in (100, 10_000)
    }
    assert errors[10_000] / 12**0.5 < 0.03
    assert 5 < errors[100] / errors[10_000] < 20
