"""Lightning's Trainer, in both namespaces: it does what the plain loop does, to the bit."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchdyn.core import NeuralODE

from tests.optim.problems import Field
from torchdyn_snopt import InvalidInputError, SNOpt, learn_horizon
from torchdyn_snopt.experiments.tasks import get_task
from torchdyn_snopt.lightning import NAMESPACES, SNOptMonitor

if TYPE_CHECKING:
    from pathlib import Path

BATCH, CLIP, ACCUMULATE = 32, 0.5, 2
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=NAMESPACES)
def lightning(request: pytest.FixtureRequest) -> Any:
    """One of the two packages with the same classes."""
    namespace = pytest.importorskip(request.param)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return namespace


def module_in(lightning: Any, model: nn.Module, dataset: TensorDataset, **settings: Any) -> Any:
    """A user's module, as it would be written."""

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.losses: list[float] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.model(x), y)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return SNOpt(self, **settings)

        def train_dataloader(self) -> DataLoader:
            return DataLoader(dataset, batch_size=BATCH)

    return Module()


def trainer_of(lightning: Any, folder: Path, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    fixed = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return lightning.Trainer(**fixed, **quiet, **{"enable_checkpointing": False, **options})


def digits(samples: int) -> TensorDataset:
    data = get_task("digits").load(None).train
    return TensorDataset(data.x[:samples], data.y[:samples])


def digits_model() -> nn.Module:
    torch.manual_seed(3)
    return get_task("digits").build_model("snopt", 1e-2)


class Small(nn.Module):
    """A classifier that learns its horizon as well."""

    def __init__(self, horizon: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(2, 3)
        fixed = {"solver": "rk4", "solver_adjoint": "rk4", "sensitivity": "snopt"}
        self.node = NeuralODE(Field(), **fixed, return_t_eval=False)
        self.head = nn.Linear(3, 2)
        if horizon:
            learn_horizon(self.node, 0.8)

    def forward(self, x: Tensor) -> Tensor:
        times = () if hasattr(self.node, "horizon") else (torch.linspace(0.0, 1.0, 2),)
        return self.head(self.node(self.encoder(x), *times)[-1])


def quadrants(samples: int = 128) -> TensorDataset:
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())


def plain_loop(
    model: nn.Module, dataset: TensorDataset, epochs: int, **settings: Any
) -> tuple[list[float], SNOpt]:
    """Clipping and accumulation as the Trainer does them."""
    optimizer, losses = SNOpt(model, **settings), []
    for _ in range(epochs):
        batches = list(DataLoader(dataset, batch_size=BATCH))
        for number, (x, y) in enumerate(batches):
            if number % ACCUMULATE == 0:
                optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            (loss / ACCUMULATE).backward()
            losses.append(loss.item())
            if number % ACCUMULATE == ACCUMULATE - 1 or number + 1 == len(batches):
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
    return losses, optimizer


def same(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


OPTIONS = {"gradient_clip_val": CLIP, "accumulate_grad_batches": ACCUMULATE}


def test_digits_reach_the_loss_of_the_plain_loop(lightning: Any, tmp_path: Path) -> None:
    """With clipping and accumulation; stopped, resumed from its checkpoint, and to the bit."""
    dataset, settings = digits(352), {"update_freq": 2}
    model = digits_model()
    losses, _ = plain_loop(model, dataset, 2, **settings)
    module = module_in(lightning, digits_model(), dataset, **settings)
    trainer = trainer_of(lightning, tmp_path, max_epochs=1, **OPTIONS)
    trainer.fit(module)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    resumed = module_in(lightning, digits_model(), dataset, **settings)
    trainer_of(lightning, tmp_path, max_epochs=2, **OPTIONS).fit(resumed, ckpt_path=path)
    assert module.losses + resumed.losses == losses
    assert same(resumed.model, model)
    assert sum(losses[-3:]) / 3 < 0.5 * losses[0]


@pytest.mark.parametrize("preconditioner", ["trust_region", "kfe_adam", "kfac", "ekfac"])
def test_each_preconditioner_resumes(lightning: Any, tmp_path: Path, preconditioner: str) -> None:
    dataset, settings = quadrants(), {"preconditioner": preconditioner, "update_freq": 3}
    model = Small()
    losses, reference = plain_loop(model, dataset, 3, **settings)
    module = module_in(lightning, Small(), dataset, **settings)
    trainer = trainer_of(lightning, tmp_path, max_epochs=1, **OPTIONS)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed = module_in(lightning, Small(), dataset, **settings)
    last = trainer_of(lightning, tmp_path, max_epochs=3, **OPTIONS)
    last.fit(resumed, ckpt_path=tmp_path / "first.ckpt")
    assert module.losses + resumed.losses == losses
    assert same(resumed.model, model)
    assert last.optimizers[0].param_groups[0]["step"] == reference.param_groups[0]["step"]


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_precision_flags(lightning: Any, tmp_path: Path, precision: str) -> None:
    dataset = quadrants()
    module = module_in(lightning, Small(horizon=False), dataset, preconditioner="kfac")
    if precision == "64-true":
        dataset.tensors = (dataset.tensors[0].double(), dataset.tensors[1])
    trainer_of(lightning, tmp_path, max_epochs=4, precision=precision).fit(module)
    losses, _ = plain_loop_without_accumulation(Small(horizon=False), 4, preconditioner="kfac")
    tolerance = {"32-true": 0.0, "64-true": 1e-5, "bf16-mixed": 2e-2, "bf16-true": 1e-1}[precision]
    assert module.losses[-1] < module.losses[0]
    assert module.losses[-1] == pytest.approx(losses[-1], abs=tolerance)


def plain_loop_without_accumulation(
    model: nn.Module, epochs: int, **settings: Any
) -> tuple[list[float], SNOpt]:
    optimizer, losses = SNOpt(model, **settings), []
    for _ in range(epochs):
        for x, y in DataLoader(quadrants(), batch_size=BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, optimizer


def test_the_callback_logs_what_only_the_solver_and_the_optimizer_know(
    lightning: Any, tmp_path: Path
) -> None:
    module = module_in(lightning, Small(), quadrants(), preconditioner="kfac", update_freq=2)
    seen: list[dict[str, float]] = []

    class Keep(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            metrics = trainer.callback_metrics
            seen.append({k: float(v) for k, v in metrics.items() if k.startswith("snopt/")})

    callbacks = [SNOptMonitor(), Keep()]
    trainer_of(lightning, tmp_path, max_epochs=1, callbacks=callbacks).fit(module)
    names = {"nfe_forward", "nfe_backward", "t1", "damping", "clip_factor", "curvature_seconds"}
    assert len(seen) == 4
    for entry in seen:
        assert {f"snopt/{name}" for name in names} <= entry.keys()
        assert entry["snopt/nfe_forward"] == 4  # one step of rk4
        assert entry["snopt/nfe_backward"] >= 4
        assert entry["snopt/damping"] == pytest.approx(3e-2)
        assert 0.0 < entry["snopt/clip_factor"] <= 1.0
        assert entry["snopt/skipped_steps"] == 0
    assert [entry["snopt/curvature_seconds"] > 0.0 for entry in seen] == [True, False] * 2
    assert seen[-1]["snopt/t1"] == pytest.approx(module.model.node.horizon.t1.item())


def test_the_callback_is_silent_with_other_optimizers(lightning: Any, tmp_path: Path) -> None:
    module = module_in(lightning, Small(), quadrants())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.1)
    trainer = trainer_of(lightning, tmp_path, max_epochs=1, callbacks=[SNOptMonitor()])
    trainer.fit(module)
    assert not [name for name in trainer.callback_metrics if name.startswith("snopt")]
    assert isinstance(SNOptMonitor(), lightning.Callback)
    with pytest.raises(InvalidInputError, match="every_n_steps=0"):
        SNOptMonitor(every_n_steps=0)


@pytest.mark.parametrize("name", ["SNOpt", "torchdyn_snopt.SNOpt"])
def test_the_command_line(lightning: Any, tmp_path: Path, name: str) -> None:
    """`--optimizer SNOpt` with its settings, in a LightningCLI."""
    pytest.importorskip("jsonargparse")
    cli_module = importlib.import_module(f"{lightning.__name__}.cli")

    class Model(lightning.LightningModule):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.model = Small(horizon=False)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def train_dataloader(self) -> DataLoader:
            return DataLoader(quadrants(64), batch_size=BATCH)

    arguments = [
        *("fit", f"--optimizer={name}", "--optimizer.lr=0.02"),
        *("--optimizer.preconditioner=ekfac", "--optimizer.update_freq=3"),
        *("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.logger=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        *("--trainer.enable_checkpointing=false", f"--trainer.default_root_dir={tmp_path}"),
        "--trainer.callbacks+=torchdyn_snopt.lightning.SNOptMonitor",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = cli_module.LightningCLI(Model, args=arguments, save_config_callback=None)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is SNOpt
    group = optimizer.param_groups[0]
    assert (group["lr"], group["preconditioner"], group["update_freq"]) == (0.02, "ekfac", 3)
    assert group["step"] == 2
    weights = [p for p in optimizer.state if "U_A" in optimizer.state[p]]
    assert len(weights) == 2  # of the field; a command line hands over parameters, no layers
    assert cli.trainer.callback_metrics["snopt/nfe_forward"] == 4
