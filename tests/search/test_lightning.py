"""Reports from training by Lightning, under both of its names."""

from __future__ import annotations

import importlib

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchdyn_snopt.errors import InvalidInputError, UnsupportedError
from torchdyn_snopt.search import HorizonObjective, report_callback
from torchdyn_snopt.search import lightning as ours

EPOCHS = 3


def loader():
    x = torch.arange(8.0)[:, None]
    return DataLoader(TensorDataset(x, 2 * x), batch_size=4)


def module_of(package, name="val_error"):
    class Module(package.LightningModule):
        def __init__(self, t1):
            super().__init__()
            self.layer, self.t1, self.calls = nn.Linear(1, 1), t1, 0

        def training_step(self, batch, number):
            self.calls += 1
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def validation_step(self, batch, number):
            self.log(name, self.t1 / (self.current_epoch + 1))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    return Module


def measure(module):
    return {"nfe": 14, "evaluations": 40 * module.calls, "t1": module.t1}


def objective(namespace, **settings):
    package = importlib.import_module(namespace)
    kind = module_of(package)

    def train(module, choice, report):
        trainer = package.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[report_callback(report, measure, namespace=namespace, **settings)],
        )
        trainer.fit(module, loader(), loader())

    return HorizonObjective(lambda choice: kind(choice.t1), train)


def study_of(objective, trials, **settings):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), **settings)
    study.optimize(objective, n_trials=trials)
    return study


@pytest.fixture(params=ours.NAMESPACES)
def namespace(request):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param


@pytest.mark.filterwarnings("ignore")
def test_every_epoch_is_reported(namespace):
    for trial in study_of(objective(namespace), 2).trials:
        rows = trial.user_attrs["history"]
        assert [row["epoch"] for row in rows] == [1, 2, 3]
        errors = [row["error"] for row in rows]
        assert errors == pytest.approx([trial.params["t1"] / e for e in (1, 2, 3)], rel=1e-6)
        assert [row["evaluations"] for row in rows] == [80, 160, 240]
        assert trial.value == pytest.approx(errors[-1] + 1e-3 * 14, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_pruning_ends_the_training(namespace):
    pruner = optuna.pruners.ThresholdPruner(upper=0.0)
    (trial,) = study_of(objective(namespace), 1, pruner=pruner).trials
    assert trial.state is TrialState.PRUNED
    assert [row["epoch"] for row in trial.user_attrs["history"]] == [1]


@pytest.mark.filterwarnings("ignore")
def test_a_metric_that_was_not_logged_is_named(namespace):
    (trial,) = study_of(objective(namespace, monitor="val_loss"), 1).trials
    assert trial.state is TrialState.FAIL
    assert "monitored metric" in trial.user_attrs["reason"]


def test_other_names_are_refused():
    with pytest.raises(InvalidInputError, match=r"lightning\.pytorch"):
        report_callback(print, measure, namespace="torch_lightning")


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(ours.importlib, "import_module", missing)
    with pytest.raises(UnsupportedError, match="pip install lightning"):
        report_callback(print, measure, namespace="lightning.pytorch")
