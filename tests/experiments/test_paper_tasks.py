"""The paper's tasks: what their models compute, and a short run of each."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchdyn.models import CNF, hutch_trace

from tests.experiments import made_up_data
from torchdyn_snopt import SNOpt
from torchdyn_snopt.experiments.configuration import Budget
from torchdyn_snopt.experiments.curves import read_runs
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.suite import Suite, run_suite
from torchdyn_snopt.experiments.tasks import TASKS, flows, get_task, images, series

WITH_PICTURES = ("mnist", "gas")
EASY = {"tolerance": 1e-2, "batch_size": 4}  # the steps need not be good ones here


def _light(name):
    task = replace(get_task(name), **EASY)
    if name != "miniboone":
        return task
    narrow = lambda sensitivity, tolerance: flows.flow(  # noqa: E731
        (43, 12, 12, 43), nn.Softplus, sensitivity, tolerance
    )
    return replace(task, build_model=narrow)


@pytest.mark.parametrize("name", [*made_up_data.NAMES, "circle"])
def test_a_task_trains_resumes_and_reports(name, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHANNELS", 8)
    if name not in WITH_PICTURES:
        monkeypatch.setattr("torchdyn_snopt.experiments.report.draw_figures", lambda runs: {})
    if name == "circle":
        monkeypatch.setattr("torchdyn_snopt.experiments.tasks.circle.TRAIN_SAMPLES", 8)
        monkeypatch.setattr("torchdyn_snopt.experiments.tasks.circle.TEST_SAMPLES", 4)
    else:
        made_up_data.write(tmp_path, name)

    def suite(epochs, out, *optimizers):
        return Suite(
            _light(name), optimizers, [0], Budget(epochs), tmp_path / out, data_dir=tmp_path
        )

    snopt, adam = OptimizerSpec("snopt", {"lr": 1e-3}), OptimizerSpec("adam", {"lr": 1e-3})
    run_suite(suite(1, "split", snopt))
    results, _ = run_suite(suite(2, "split", snopt), resume=True)
    whole, report = run_suite(suite(2, "whole", snopt, adam))
    assert [result.status for result in (*results, *whole)] == ["finished"] * 3, whole[0].reason
    resumed, uninterrupted = (read_runs(tmp_path / out)[0] for out in ("split", "whole"))
    assert resumed.steps["loss"].tolist() == uninterrupted.steps["loss"].tolist()
    assert len(report.table.rows) == 2
    assert (".png" in {file.suffix for file in report.files}) == (name in WITH_PICTURES)
    assert (uninterrupted.steps["nfe_backward"] > 0).all()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_models_have_the_size_that_their_docstrings_tell(name):
    task = get_task(name)
    parameters = sum(p.numel() for p in task.build_model("snopt", 1e-3).parameters())
    place = f"torchdyn_snopt.experiments.tasks.{name.replace('-', '_')}"
    module = __import__(place, fromlist=["TASK"])
    described = getattr(module, "build_model", module)  # the module, where others build its model
    assert f"{parameters:,} parameters" in described.__doc__


# --- time series ----------------------------------------------------------------------------------


def test_the_gated_unit_is_torchs():
    torch.manual_seed(0)
    unit, theirs = series.GatedUnit(3, 4).double(), nn.GRUCell(3, 4).double()
    with torch.no_grad():
        gates = torch.cat([theirs.weight_ih[:8], theirs.weight_hh[:8]], dim=1)
        unit.gates.weight.copy_(gates)
        unit.gates.bias.copy_(theirs.bias_ih[:8] + theirs.bias_hh[:8])
        unit.from_input.weight.copy_(theirs.weight_ih[8:])
        unit.from_input.bias.copy_(theirs.bias_ih[8:])
        unit.from_state.weight.copy_(theirs.weight_hh[8:])
        unit.from_state.bias.copy_(theirs.bias_hh[8:])
    x, h = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    assert torch.allclose(unit(x, h), theirs(x, h), atol=1e-12)


def test_what_lies_behind_the_end_of_a_series_is_not_seen():
    torch.manual_seed(0)
    model = series.SeriesClassifier(2, 4, 3, "snopt", 1e-6)
    values = torch.randn(2, 6, 2)
    values[0, 3:] = math.nan
    whole = model(series.observations(values))
    alone = model(series.observations(values[:1, :3]))
    assert torch.allclose(whole[0], alone[0], atol=1e-5)


def test_every_layer_of_the_series_classifier_is_preconditioned():
    torch.manual_seed(0)
    model = series.SeriesClassifier(2, 4, 3, "snopt", 1e-2)
    optimizer = SNOpt(model)
    x = series.observations(torch.randn(4, 3, 2))
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    assert {how for _, how in optimizer.summary()} == {"trust_region"}


# --- flows ----------------------------------------------------------------------------------------


def test_the_likelihood_of_a_linear_flow_is_that_of_its_gaussian():
    """dx/dt = A x takes N(0, Σ) with Σ = exp(−A) exp(−A)ᵀ to N(0, I)."""
    a = torch.tensor([[0.5, 0.2], [-0.1, 0.3]], dtype=torch.float64)
    model = flows.flow((2, 2), nn.Tanh, "snopt", 1e-8).double()
    layer = next(m for m in model.modules() if isinstance(m, flows.ConcatSquash))
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.layer.weight.copy_(2 * a)  # its gate is σ(0) = 1/2
    x = torch.randn(20, 2, dtype=torch.float64)
    # Signs make the estimate of tr A equal tr A + a₁₂ v₁v₂ + a₂₁ v₁v₂; their mean is exact.
    torch.manual_seed(0)
    losses = [flows.negative_log_likelihood(model(x), x).item() for _ in range(40)]
    root = torch.linalg.matrix_exp(-a)
    gaussian = torch.distributions.MultivariateNormal(
        torch.zeros(2, dtype=torch.float64), root @ root.mT
    )
    assert sum(losses) / 40 == pytest.approx(-gaussian.log_prob(x).mean().item(), abs=0.02)


@pytest.mark.parametrize("activation", list(flows.ACTIVATIONS))
def test_a_flow_is_torchdyns_with_hutchinsons_estimator(activation):
    """Rates and all gradients, the tangent carried forward against second derivatives."""
    torch.manual_seed(0)
    ours = flows._field((3, 5, 5, 3), activation).double()

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ours.net

        def forward(self, x):
            for module in self.net:
                if isinstance(module, flows.ConcatSquash):
                    gate = module.gate(module.t).sigmoid()
                    x = module.layer(x) * gate + module.shift(module.t)
                else:
                    x = activation()(x)
            return x

    for module in ours.net:
        module.t = torch.full((1, 1), 0.7, dtype=torch.float64)
    theirs = CNF(Plain(), trace_estimator=hutch_trace, noise_dist=flows.Signs(3))
    theirs.noise = ours.noise = flows.Signs(3).double().sample((6,))
    state, weights = torch.randn(2, 6, 4, dtype=torch.float64)
    gradients = []
    for field in (ours, theirs):
        x = state.clone().requires_grad_()
        rate = field(x)
        parameters = list(ours.parameters())
        gradients.append([rate, *torch.autograd.grad((rate * weights).sum(), [x, *parameters])])
    for mine, reference in zip(*gradients, strict=True):
        assert torch.allclose(mine, reference, atol=1e-12)


def test_tolerances_and_horizon_of_a_flow_are_those_of_the_paper():
    nodes = [m for m in get_task("circle").build_model("snopt", 1e-6).modules() if hasattr(m, "vf")]
    node = next(m for m in nodes if hasattr(m, "rtol"))
    assert (node.rtol, node.atol, node.rtol_adjoint, node.atol_adjoint) == (1e-6, 1e-8, 1e-6, 1e-8)
    assert node.t_span.tolist() == [0.0, 10.0]
    gas = get_task("gas").build_model("snopt", 1e-6)
    assert sum(hasattr(m, "rtol") for m in gas.modules()) == 5


def test_signs_are_signs():
    torch.manual_seed(0)
    drawn = flows.Signs(3).double().sample((400,))
    assert drawn.shape == (400, 3)
    assert drawn.dtype == torch.float64
    assert drawn.abs().eq(1).all()
    assert abs(drawn.mean().item()) < 0.1
