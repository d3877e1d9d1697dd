"""Reproductions that compare optimizers, or time them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE

from tests.experiments.tiny import TINY, load
from torchdyn_snopt.adjoint.recursive import recursive_adjoint, recursive_product
from torchdyn_snopt.experiments.bench.steps import Iterations
from torchdyn_snopt.experiments.reproduce import REPRODUCTIONS, Request, comparison, timing
from torchdyn_snopt.experiments.reproduce.solves import solves_of
from torchdyn_snopt.experiments.tasks import get_task


@pytest.fixture(autouse=True)
def _no_pictures_of_the_suite(monkeypatch):
    monkeypatch.setattr("torchdyn_snopt.experiments.report.draw_figures", lambda runs: {})


def _request(folder, **also):
    return Request(TINY, folder, range(2), epochs=1, **also)


@pytest.mark.parametrize("name", ["table4", "table6", "fig7", "fig9"])
def test_a_comparison_ends_with_table_and_picture(name, tmp_path):
    study = REPRODUCTIONS[name].run(_request(tmp_path))
    assert {path.name for path in study.files} >= {f"{name}.md", f"{name}.csv", f"{name}.png"}
    assert all(len(row) == len(study.table.head) for row in study.table.body)
    rows = 2 if name == "table6" else 3
    assert len(study.table.body) == rows
    assert len(study.results) == 2 * rows * (5 if name == "fig9" else 1)


def test_the_share_of_the_papers_budget_is_in_iterations(tmp_path):
    study = REPRODUCTIONS["table4"].run(_request(tmp_path))
    assert study.table.body[0][3] == "–"  # the paper has no such task
    runs = comparison.by_label(map(comparison.read_run, sorted(tmp_path.glob("adam/seed-*"))))
    mnist = get_task("mnist")
    assert comparison.fraction(next(iter(runs.values())), mnist) == "20.0 %"  # 1 of 5 epochs


def test_learning_rates_span_two_decades_around_each_optimizers_own():
    specs = comparison.FIGURE9.optimizers(TINY)
    rates = {}
    for spec in specs:
        rates.setdefault(spec.name, []).append(spec.chosen["lr"])
    assert {name: (min(r), max(r), len(r)) for name, r in rates.items()} == {
        "adam": (1e-3, 1e-1, 5),
        "sgd": (1e-2, 1.0, 5),
        "snopt": (0.1, 10.0, 5),
    }


def test_regularization_of_a_linear_field_is_its_frobenius_norm_and_kinetic_energy():
    a = torch.tensor([[-0.3, 0.2], [0.1, 0.4]], dtype=torch.float64)

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(a)

        def forward(self, x):
            return x @ self.weight.mT

    node = NeuralODE(
        Linear(), sensitivity="snopt", solver="dopri5", rtol=1e-8, atol=1e-8, return_t_eval=False
    )
    torch.manual_seed(0)
    x = torch.randn(4096, 2, dtype=torch.float64)
    times = torch.linspace(0, 1, comparison.REGULARIZATION_TIMES, dtype=torch.float64)
    states = torch.stack([x @ torch.linalg.matrix_exp(a * t).mT for t in times])
    kinetic = torch.trapezoid((states @ a.mT).square().sum(-1).mean(-1), times)
    expected = float(a.square().sum() + kinetic)
    # The random signs are the estimate's only error.
    assert comparison.regularization(node, x) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["fig8", "fig11"])
def test_a_timing_ends_with_table_and_picture(name, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "BLOCK", 1)
    monkeypatch.setattr(timing, "ROUNDS", (2, 2))
    monkeypatch.setattr(timing, "peak_bytes", lambda *_: 2_000_000)
    told = []
    study = REPRODUCTIONS[name].run(_request(tmp_path, seconds=0.01), told.append)
    assert told
    assert next(row[0] for row in study.table.body) == "SNOpt"
    assert all(len(row) == len(study.table.head) for row in study.table.body)
    assert {path.suffix for path in study.files} == {".md", ".csv", ".png"}


def test_the_follower_solves_the_field_that_snopt_solves(tmp_path):
    request = _request(tmp_path)
    train = request.task.load(request.data_dir).train
    iterations = {
        name: Iterations(request.task, spec, train, request.device)
        for name, spec in {**timing.SPECS, timing.FOLLOWER: timing.SPECS[timing.TORCHDYN]}.items()
    }
    turns = timing._turns(iterations)
    for _ in range(2):
        for turn in turns.values():
            turn()
    ours, follower = turns[timing.OURS], turns[timing.FOLLOWER]
    for name, weight in follower.weights.items():
        assert torch.equal(weight, ours.weights[name])
        assert not torch.equal(weight, turns[timing.TORCHDYN].weights[name])
    for turn in turns.values():  # at least a step there and back, by a method of seven stages
        assert turn.evaluations >= timing.BLOCK * 2 * 6


def test_a_recursive_product_is_a_row_of_the_recursive_hessian():
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()

    class Field(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = field

        def forward(self, t, x):
            return self.net(x)

    x = torch.randn(3, 2, dtype=torch.float64)
    module, kwargs = Field(), {"rtol": 1e-8, "atol": 1e-8}
    loss = lambda state: state.square().sum()  # noqa: E731
    whole = recursive_adjoint(module, x, [0.0, 1.0], loss, **kwargs)
    direction = [torch.randn_like(p) for p in module.parameters()]
    gradient, product = recursive_product(module, x, [0.0, 1.0], loss, direction, **kwargs)
    flat = lambda parts: torch.cat([part.flatten() for part in parts])  # noqa: E731
    assert torch.allclose(flat(gradient), whole.Qu, atol=1e-8)
    assert torch.allclose(flat(product), whole.Quu @ flat(direction), atol=1e-6)


def test_the_solves_of_a_model_are_found():
    model = TINY.build_model("snopt", 1e-2)
    x = load().train.x
    ((node, start),) = solves_of(model, x)
    assert isinstance(node, NeuralODE)
    assert torch.equal(start, model[0](x))
