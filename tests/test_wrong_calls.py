"""Wrong calls over the public API: each is refused by its own error, before anything is integrated.

`test_errors_api.py` holds what goes wrong in a solve; here are the calls that cannot work.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE, ODEProblem

from torchdyn_snopt import (
    CrossEntropyLoss,
    CurvatureError,
    GaussianNLLLoss,
    Horizon,
    HorizonPolicy,
    InvalidInputError,
    MSELoss,
    SNOpt,
    SNOptError,
    SNOptSensitivity,
    UnsupportedError,
    check_gradient,
    learn_horizon,
    low_rank_adjoint,
    odeint_snopt,
    record_curvature,
    recursive_adjoint,
    second_order_adjoint,
    solve_stats,
)

if TYPE_CHECKING:
    from collections.abc import Callable

T = torch.tensor([0.0, 1.0])
X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)


class Timed(nn.Module):
    """A field that says how often it was called."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        Timed.calls += 1
        return self.linear(x)


class Mixing(Timed):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.linear(x) - x.mean(0)


def node(**options: Any) -> NeuralODE:
    settings = {"solver": "dopri5", "sensitivity": "snopt", "return_t_eval": False}
    return NeuralODE(Timed(), **settings | options)


def linear() -> nn.Linear:
    return nn.Linear(3, 3)


def decay(t: Tensor, x: Any) -> Any:
    return -x


def square(x: Tensor) -> Tensor:
    return x.square().sum()


def solve(**options: Any) -> Any:
    return odeint_snopt(decay, X, T, **{"adjoint_params": (), **options})


def adjoint(**options: Any) -> Any:
    given = {"func": Timed(), "x0": X, "t_span": T, "terminal_loss": square, **options}
    return second_order_adjoint(**given)


def trained_state(module: nn.Linear) -> dict[str, Any]:
    optimizer = SNOpt(module)
    module(torch.randn(5, module.in_features)).square().mean().backward()
    optimizer.step()
    return optimizer.state_dict()


def seeded(loss: nn.Module, kind: str) -> Tensor:
    with record_curvature(model := linear(), curvature=kind):
        return loss(model(X), torch.tensor([0, 1, 2, 0]))


# name: the call, its error, and words of the message: what is wrong and what to do.
Case = tuple["Callable[[], Any]", type[SNOptError], str, str]
OPTIMIZER: dict[str, Case] = {
    "nothing": (lambda: SNOpt(None), InvalidInputError, "nothing to optimize", "SNOpt(model"),
    "a name": (lambda: SNOpt("model"), InvalidInputError, "nothing to optimize", "SNOpt(model"),
    "a class": (lambda: SNOpt(nn.Linear), InvalidInputError, "the class Linear", "SNOpt(model"),
    "an optimizer": (
        lambda: SNOpt(torch.optim.SGD(linear().parameters(), 0.1)),
        InvalidInputError, "a SGD", "pass the model itself",
    ),
    "integers": (
        lambda: SNOpt([torch.zeros(3, dtype=torch.long)]),
        InvalidInputError, "torch.int64", "register it as a buffer",
    ),
    "complex": (
        lambda: SNOpt([nn.Parameter(torch.zeros(3, dtype=torch.cfloat))]),
        UnsupportedError, "complex parameters", "torch.view_as_real",
    ),
    "a policy that is none": (
        lambda: SNOpt(linear(), horizon={"lr": 1.0}),
        InvalidInputError, "horizon of type dict", "pass horizon=HorizonPolicy",
    ),
    "a policy that is a number": (
        lambda: SNOpt(linear(), horizon=1.0),
        InvalidInputError, "horizon of type float", "pass horizon=HorizonPolicy",
    ),
    "lr in words": (
        lambda: SNOpt(linear(), lr="fast"), InvalidInputError, "lr='fast'", "leave lr at its",
    ),
    "choices": (
        lambda: SNOpt(linear(), curvature=["mc"]),
        InvalidInputError, "unknown curvature", "pass curvature=",
    ),
    "preconditioners": (
        lambda: SNOpt(linear(), preconditioner=["kfac"]),
        InvalidInputError, "unknown preconditioner", "pass preconditioner=",
    ),
    "no weight decay": (
        lambda: SNOpt(linear(), weight_decay=None),
        InvalidInputError, "weight_decay=None", "leave weight_decay at its default",
    ),
    "from_paper with a negative lr": (
        lambda: SNOpt.from_paper(linear(), -1.0), InvalidInputError, "lr=-1.0", "leave lr at",
    ),
    "no state": (
        lambda: SNOpt(linear()).load_state_dict({"model": 1}),
        InvalidInputError, "no state of an optimizer", "the optimizer's entry",
    ),
    "None as state": (
        lambda: SNOpt(linear()).load_state_dict(None),
        InvalidInputError, "no state of an optimizer", "the optimizer's entry",
    ),
    "the state of Adam": (
        lambda: SNOpt(linear()).load_state_dict(
            torch.optim.Adam(linear().parameters()).state_dict()
        ),
        InvalidInputError, "but with amsgrad, betas", "load the weights of the model alone",
    ),
    "the state of SGD": (
        lambda: SNOpt(linear()).load_state_dict(
            torch.optim.SGD(linear().parameters(), 0.1).state_dict()
        ),
        InvalidInputError, "another optimizer", "load the weights of the model alone",
    ),
    "the state of more layers": (
        lambda: SNOpt(linear()).load_state_dict(
            SNOpt(nn.Sequential(linear(), linear())).state_dict()
        ),
        InvalidInputError, "groups of [4] parameters", "build model and optimizer as they were",
    ),
    "the state of wider layers": (
        lambda: SNOpt(linear()).load_state_dict(trained_state(nn.Linear(3, 4))),
        InvalidInputError, "parameter 0 with U_B [4, 4]", "build the model as it was",
    ),
    "the state of deeper layers": (
        lambda: SNOpt(linear()).load_state_dict(trained_state(nn.Linear(5, 3))),
        InvalidInputError, "parameter 0 with U_A [6, 6]", "build the model as it was",
    ),
}  # fmt: skip
HORIZON: dict[str, Case] = {
    "interval": (
        lambda: HorizonPolicy(interval=0), InvalidInputError, "interval=0", "leave interval",
    ),
    "warm-up": (
        lambda: HorizonPolicy(warm_up=1.5), InvalidInputError, "warm_up=1.5", "leave warm_up",
    ),
    "trust": (lambda: HorizonPolicy(trust=2.0), InvalidInputError, "trust=2.0", "leave trust"),
    "decay": (lambda: HorizonPolicy(decay=1.0), InvalidInputError, "decay=1.0", "leave decay"),
    "lr of the policy": (
        lambda: HorizonPolicy(lr=math.inf), InvalidInputError, "lr=inf", "leave lr",
    ),
    "lr of the policy in words": (
        lambda: HorizonPolicy(lr="1"), InvalidInputError, "lr of type str", "leave lr",
    ),
    "t1 in words": (lambda: Horizon("late"), InvalidInputError, "t1 is not a number", "t1=1.0"),
    "t1 not finite": (lambda: Horizon(math.nan), InvalidInputError, "t1=nan", "another t1"),
    "t1 out of bounds": (lambda: Horizon(20.0), InvalidInputError, "t1=20", "widen the bounds"),
    "t0 behind t1": (
        lambda: Horizon(1.0, t0=5.0), InvalidInputError, "span no interval", "pass bounds=",
    ),
    "bounds reversed": (
        lambda: Horizon(1.0, bounds=(2.0, 1.0)), InvalidInputError, "(2, 1)", "pass bounds=",
    ),
    "one bound": (
        lambda: Horizon(1.0, bounds=(2.0,)), InvalidInputError, "are no pair", "pass bounds=",
    ),
    "a number as bounds": (
        lambda: Horizon(1.0, bounds=3.0), InvalidInputError, "are no pair", "pass bounds=",
    ),
    "a negative penalty": (
        lambda: Horizon(1.0, penalty=-1.0), InvalidInputError, "penalty=-1.0", "pass penalty=",
    ),
    "fractions beyond 1": (
        lambda: Horizon(1.0).t_span((0.0, 2.0)),
        InvalidInputError, "no fractions of the horizon", "pass fractions=",
    ),
    "fractions without 0": (
        lambda: learn_horizon(node(), fractions=(0.5, 1.0)),
        InvalidInputError, "no fractions of the horizon", "pass fractions=",
    ),
    "a model around the model": (
        lambda: learn_horizon(nn.Sequential(node())),
        UnsupportedError, "takes no t_span", "pass the NeuralODE itself",
    ),
    "no model": (
        lambda: learn_horizon(None), InvalidInputError, "type NoneType", "pass the NeuralODE",
    ),
    "t1 of a model in words": (
        lambda: learn_horizon(node(), "1 s"), InvalidInputError, "t1 is not a number", "t1=1.0",
    ),
}  # fmt: skip
SENSITIVITY: dict[str, Case] = {
    "adjoint": (
        lambda: SNOptSensitivity(adjoint="backprop"),
        InvalidInputError, "adjoint='backprop'", "pass adjoint='backsolve'",
    ),
    "a list of adjoints": (
        lambda: SNOptSensitivity(adjoint=["backsolve"]),
        InvalidInputError, "unknown adjoint", "pass adjoint='backsolve'",
    ),
    "quadrature": (
        lambda: SNOptSensitivity(quadrature="simpson"),
        InvalidInputError, "quadrature='simpson'", "pass quadrature='stages'",
    ),
    "error norm": (
        lambda: SNOptSensitivity(error_norm="max"),
        InvalidInputError, "error_norm='max'", "pass error_norm='state'",
    ),
    "on_failure": (
        lambda: SNOptSensitivity(on_failure="ignore"),
        InvalidInputError, "on_failure='ignore'", "pass on_failure='raise'",
    ),
    "grid_step": (
        lambda: SNOptSensitivity(grid_step=0.0),
        InvalidInputError, "grid_step=0.0", "pass grid_step=0.01",
    ),
    "grid_step in words": (
        lambda: SNOptSensitivity(grid_step="fine"),
        InvalidInputError, "grid_step is not a number", "pass grid_step=0.01",
    ),
    "grid_step infinite": (
        lambda: SNOptSensitivity(grid_step=math.inf),
        InvalidInputError, "grid_step=inf", "pass grid_step=0.01",
    ),
    "max_steps": (
        lambda: SNOptSensitivity(max_steps=0), InvalidInputError, "max_steps=0", "its default",
    ),
    "max_steps None": (
        lambda: SNOptSensitivity(max_steps=None), InvalidInputError, "max_steps=None", "default",
    ),
    "max_steps in halves": (
        lambda: SNOptSensitivity(max_steps=1.5), InvalidInputError, "max_steps=1.5", "default",
    ),
    "a grid for replayed steps": (
        lambda: SNOptSensitivity(adjoint="checkpoint", quadrature="grid"),
        UnsupportedError, "quadrature='grid'", "leave quadrature at 'stages'",
    ),
    "the error of replayed steps": (
        lambda: SNOptSensitivity(adjoint="checkpoint", error_norm="full"),
        UnsupportedError, "error_norm='full'", "leave error_norm at 'state'",
    ),
}  # fmt: skip
MODEL: dict[str, Case] = {
    "a misspelt sensitivity": (
        lambda: node(sensitivity="snpot"), InvalidInputError, "'snpot'", "sensitivity='snopt'",
    ),
    "no sensitivity": (
        lambda: node(sensitivity=None), InvalidInputError, "sensitivity=None", "'snopt'",
    ),
    "the class of sensitivities": (
        lambda: node(sensitivity=SNOptSensitivity), InvalidInputError, "unknown", "'snopt'",
    ),
    "an unknown solver": (
        lambda: node(solver="dopri6"), InvalidInputError, "solver='dopri6'", "solver='dopri5'",
    ),
    "an unknown solver of the adjoint": (
        lambda: node(solver_adjoint="rk5"), InvalidInputError, "'rk5'", "solver_adjoint='dopri5'",
    ),
    "rtol in words": (
        lambda: node(rtol="fine")(X, T), InvalidInputError, "rtol is not a number", "rtol=1e-3",
    ),
    "no rtol": (
        lambda: node(rtol=None)(X, T), InvalidInputError, "rtol of type NoneType", "rtol=1e-3",
    ),
    "tolerances by entry": (
        lambda: node(atol=torch.ones(3))(X, T), InvalidInputError, "atol is not", "atol=1e-3",
    ),
    "a negative tolerance of the adjoint": (
        lambda: node(atol_adjoint=-1.0)(X, T), InvalidInputError, "atol=-1.0", "pass atol=1e-3",
    ),
    "one number as time": (
        lambda: node()(X, 1.0), UnsupportedError, "t_span float", "integrate over [0, 1]",
    ),
    "letters as times": (
        lambda: node()(X, "ab"), UnsupportedError, "t_span str", "integrate over [0, 1]",
    ),
    "times of each sample": (
        lambda: node()(X, torch.zeros(4, 2)), UnsupportedError, "[4, 2]", "rescale time",
    ),
    "complex times": (
        lambda: node()(X, T.to(torch.cfloat)), UnsupportedError, "complex64", "rescale time",
    ),
    "times to and fro": (
        lambda: node()(X, torch.tensor([0.0, 1.0, 0.5])),
        InvalidInputError, "change direction", "sort them",
    ),
    "a time to save that is none": (
        lambda: ODEProblem(Timed(), "dopri5", sensitivity="snopt").odeint(
            X, T, save_at=torch.tensor([0.5])
        ),
        InvalidInputError, "save_at=0.5", "add the time to t_span",
    ),
    "an array": (lambda: node()(X.numpy(), T), UnsupportedError, "ndarray", "concatenate"),
    "a sparse state": (
        lambda: node()(X.to_sparse(), T), UnsupportedError, "sparse", "call to_dense()",
    ),
    "a state without data": (
        lambda: node()(X.to("meta"), T), UnsupportedError, "a tensor on meta", "to a device",
    ),
    "statistics of nothing": (
        lambda: solve_stats(None), InvalidInputError, "type NoneType", "the NeuralODE itself",
    ),
    "statistics of a model that was not called": (
        lambda: solve_stats(node()), InvalidInputError, "no single solve", "call the model first",
    ),
    "a check of a name": (
        lambda: check_gradient("model", X), InvalidInputError, "model of type str", "NeuralODE",
    ),
    "a check without an ODE": (
        lambda: check_gradient(nn.ReLU(), X), InvalidInputError, "no ODE to check", "gradcheck",
    ),
    "a check of an array": (
        lambda: check_gradient(node(), X.numpy()), InvalidInputError, "ndarray", "a small batch",
    ),
    "a check of many losses": (
        lambda: check_gradient(node(), X, T, loss=lambda states: states),
        InvalidInputError, "one number", "take a sum or a mean",
    ),
}  # fmt: skip
TORCHDIFFEQ: dict[str, Case] = {
    "no field": (
        lambda: odeint_snopt(None, X, T), InvalidInputError, "type NoneType", "adjoint_params=()",
    ),
    "a function without parameters": (
        lambda: odeint_snopt(decay, X, T), InvalidInputError, "function", "adjoint_params=()",
    ),
    "a list of times": (
        lambda: odeint_snopt(Timed(), X, [0.0, 1.0]),
        InvalidInputError, "not a sequence of times", "torch.linspace",
    ),
    "an unknown method": (
        lambda: solve(method="rk5"), InvalidInputError, "'rk5'", "one of these names",
    ),
    "an unknown method back": (
        lambda: solve(adjoint_method="rk5"), InvalidInputError, "'rk5'", "one of these names",
    ),
    "a list of methods": (
        lambda: solve(method=["rk4"]), InvalidInputError, "method of type list", "'dopri5'",
    ),
    "an unknown option": (
        lambda: solve(options={"first_step": 0.1}), UnsupportedError, "'first_step'", "leave",
    ),
    "a list of options": (
        lambda: solve(options=["step_size"]), InvalidInputError, "type list", "pass options={",
    ),
    "a negative step": (
        lambda: solve(method="rk4", options={"step_size": -0.1}),
        InvalidInputError, "step_size=-0.1", "pass step_size=0.05",
    ),
    "a step in words": (
        lambda: solve(method="rk4", options={"step_size": "small"}),
        InvalidInputError, "step_size is not a number", "pass step_size=0.05",
    ),
    "steps that would fill the memory": (
        lambda: solve(method="rk4", options={"step_size": 1e-12}),
        InvalidInputError, "1000000000000 steps", "a greater step_size",
    ),
    "two grids": (
        lambda: solve(
            method="rk4", options={"step_size": 0.1, "grid_constructor": lambda f, y, t: t}
        ),
        InvalidInputError, "two grids", "leave one out",
    ),
    "no steps": (
        lambda: solve(options={"max_num_steps": 0}), InvalidInputError, "max_steps=0", "default",
    ),
    "tolerances by part": (
        lambda: solve(rtol=torch.ones(3)), UnsupportedError, "got: Tensor", "smallest tolerance",
    ),
    "a flag as tolerance": (
        lambda: solve(atol=True), UnsupportedError, "got: bool", "smallest tolerance",
    ),
    "a name as sensitivity": (
        lambda: solve(sensitivity="snopt"), InvalidInputError, "type str", "SNOptSensitivity(",
    ),
    "a dictionary for counts": (
        lambda: solve(stats={}), InvalidInputError, "stats of type dict", "stats=SolveStats()",
    ),
    "a number as parameters": (
        lambda: solve(adjoint_params=3), InvalidInputError, "adjoint_params=3", "func.parameters",
    ),
    "names as parameters": (
        lambda: solve(adjoint_params=["weight"]), InvalidInputError, "'weight'", "func.param",
    ),
    "a list of states": (
        lambda: odeint_snopt(decay, [X, X], T, adjoint_params=()),
        UnsupportedError, "neither a tensor nor a tuple", "tuple(state.values())",
    ),
    "a tuple with a number": (
        lambda: odeint_snopt(decay, (X, 1.0), T, adjoint_params=()),
        UnsupportedError, "neither a tensor nor a tuple", "tuple(state.values())",
    ),
    "an event": (
        lambda: solve(event_fn=lambda t, y: y.sum()),
        UnsupportedError, "events", "torchdiffeq.odeint_event",
    ),
}  # fmt: skip
CURVATURE: dict[str, Case] = {
    "of nothing": (
        lambda: record_curvature(None).__enter__(),
        InvalidInputError, "module of type NoneType", "the whole model",
    ),
    "of no layers": (
        lambda: record_curvature(nn.ReLU()).__enter__(),
        CurvatureError, "no layer to record", "the whole model",
    ),
    "of an unknown kind": (
        lambda: record_curvature(linear(), curvature="fisher").__enter__(),
        InvalidInputError, "curvature='fisher'", "pass curvature='auto'",
    ),
    "shared in an unknown way": (
        lambda: record_curvature(linear(), weight_sharing="sum").__enter__(),
        InvalidInputError, "weight_sharing='sum'", "pass weight_sharing='expand'",
    ),
    "of an unknown reduction": (
        lambda: record_curvature(linear(), reduction="none").__enter__(),
        InvalidInputError, "reduction='none'", "pass reduction='mean'",
    ),
    "a loss of an unknown kind": (
        lambda: CrossEntropyLoss(curvature="fisher"),
        InvalidInputError, "curvature='fisher'", "leave curvature at None",
    ),
    "a loss of no kind": (
        lambda: GaussianNLLLoss(curvature="empirical"),
        InvalidInputError, "curvature='empirical'", "leave curvature at None",
    ),
    "no samples": (
        lambda: CrossEntropyLoss(samples=0), InvalidInputError, "samples=0", "samples at 1",
    ),
    "samples in halves": (
        lambda: MSELoss(samples=1.5), InvalidInputError, "samples=1.5", "leave samples at 1",
    ),
    "samples in words": (
        lambda: MSELoss(samples="one"), InvalidInputError, "samples='one'", "samples at 1",
    ),
    "a loss of another kind": (
        lambda: seeded(CrossEntropyLoss(curvature="mc"), "ggn"),
        InvalidInputError, "asked for 'ggn'", "SNOpt(curvature='ggn')",
    ),
    "a loss without reduction": (
        lambda: seeded(CrossEntropyLoss(reduction="none"), "ggn"),
        UnsupportedError, "reduction='none'", "let the loss reduce",
    ),
}  # fmt: skip
THEORY: dict[str, Case] = {
    "no field for Theorem 1": (
        lambda: adjoint(func=None), InvalidInputError, "type NoneType", "pass params=()",
    ),
    "parameters that are none": (
        lambda: adjoint(params=[3]), InvalidInputError, "entry 0 of params", "frozen tensors",
    ),
    "a method that is none": (
        lambda: adjoint(method="foo"), InvalidInputError, "'foo'", "one of these names",
    ),
    "no loss": (
        lambda: adjoint(terminal_loss=None), InvalidInputError, "terminal_loss of type", "lambda",
    ),
    "a loss of many values": (
        lambda: adjoint(terminal_loss=lambda x: x),
        InvalidInputError, "shape [4, 3]", "take a sum or a mean",
    ),
    "a loss of floats": (
        lambda: adjoint(terminal_loss=lambda x: 1.0), InvalidInputError, "float", "no .item()",
    ),
    "a constant loss": (
        lambda: adjoint(terminal_loss=lambda x: torch.tensor(1.0)),
        InvalidInputError, "does not depend on the state", "no .item() or .detach()",
    ),
    "a loss that couples samples": (
        lambda: adjoint(terminal_loss=lambda x: x.sum().square()),
        UnsupportedError, "couples the samples", "pass batched=False",
    ),
    "a field that mixes samples": (
        lambda: adjoint(func=Mixing()), UnsupportedError, "mixes the samples", "batched=False",
    ),
    "a running cost that is none": (
        lambda: adjoint(running_cost=3), InvalidInputError, "running_cost of type int", "lambda",
    ),
    "one time": (lambda: adjoint(t_span=[1.0]), InvalidInputError, "span no interval", "t0, t1"),
    "a time instead of times": (
        lambda: adjoint(t_span=1.0), InvalidInputError, "t_span of type float", "[0.0, 1.0]",
    ),
    "times in words": (
        lambda: adjoint(t_span=["now", "then"]), InvalidInputError, "not a number", "[0.0, 1.0]",
    ),
    "tolerance in words": (
        lambda: adjoint(rtol="fine"), InvalidInputError, "rtol is not a number", "rtol=1e-3",
    ),
    "complex numbers": (
        lambda: adjoint(x0=X.to(torch.cfloat)), UnsupportedError, "complex64", "view_as_real",
    ),
    "many values, recursively": (
        lambda: recursive_adjoint(Timed(), X, T, lambda x: x),
        InvalidInputError, "shape [4, 3]", "take a sum or a mean",
    ),
    "no loss, recursively": (
        lambda: recursive_adjoint(Timed(), X, T, None),
        InvalidInputError, "terminal_loss of type NoneType", "lambda",
    ),
    "seeds of another shape": (
        lambda: low_rank_adjoint(Timed(), X, T, torch.randn(2, 3)),
        InvalidInputError, "[2, 3] for a state [4, 3]", "stack the seeds",
    ),
    "a list of seeds": (
        lambda: low_rank_adjoint(Timed(), X, T, [X, X]),
        InvalidInputError, "seeds of type list", "torch.stack",
    ),
    "no seeds": (
        lambda: low_rank_adjoint(Timed(), X, T, None),
        InvalidInputError, "seeds of type NoneType", "torch.stack",
    ),
    "a function that returns no seeds": (
        lambda: low_rank_adjoint(Timed(), X, T, lambda x: 3),
        InvalidInputError, "seeds of type int", "torch.stack",
    ),
}  # fmt: skip

GROUPS = {
    "optimizer": OPTIMIZER,
    "horizon": HORIZON,
    "sensitivity": SENSITIVITY,
    "model": MODEL,
    "torchdiffeq": TORCHDIFFEQ,
    "curvature": CURVATURE,
    "theory": THEORY,
}
CASES = [
    pytest.param(*case, id=f"{group}: {name}")
    for group, cases in GROUPS.items()
    for name, case in cases.items()
]


def test_there_are_many_of_them() -> None:
    assert len(CASES) >= 120


@pytest.mark.parametrize(("call", "error", "what", "do"), CASES)
def test_a_wrong_call_is_refused_with_what_to_do(
    call: Callable[[], Any], error: type[SNOptError], what: str, do: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    text = str(caught.value)
    advice = text.partition("  do this: ")[2]
    assert what in text
    assert do in advice
    for part in ("\n  got: ", "\n  allowed: ", "\n  do this: "):
        assert part in text


@pytest.mark.parametrize(("call", "error", "what", "do"), CASES)
def test_a_wrong_call_leaves_nothing_behind(
    call: Callable[[], Any], error: type[SNOptError], what: str, do: str
) -> None:
    """No collector stays active, and the next model trains as if nothing had happened."""
    from torchdyn_snopt.curvature.registry import active_collectors

    before = len(active_collectors())
    with pytest.raises(error):
        call()
    assert len(active_collectors()) <= before


def test_refusals_come_before_the_field_is_called() -> None:
    """Those that concern the call itself; a loss is only known by its value."""
    for group in (OPTIMIZER, HORIZON, SENSITIVITY, TORCHDIFFEQ):
        for call, error, _, _ in group.values():
            Timed.calls = 0
            with pytest.raises(error):
                call()
            assert Timed.calls == 0
