"""How far A ⊗ B is from the block of the Gauss–Newton matrix that it stands for.

The exact block of a layer is Σ p pᵀ over the columns of Proposition 2 by sample, which the low-rank
preconditioner collects: nothing is lost there to the factorization. Where A ⊗ B is exact (one
evaluation and one sample; columns or inputs that are the same for all samples and times) is listed
and checked by the tests of the curvature; here are models as they are trained.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchdyn_snopt import CrossEntropyLoss, SNOpt, record_curvature
from torchdyn_snopt.curvature.columns import ColumnCollector
from torchdyn_snopt.curvature.factors import CurvatureSpec, Factors
from torchdyn_snopt.curvature.layers import WeightSharing, is_supported
from torchdyn_snopt.curvature.outside import OutsideRecorder
from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable
from torchdyn_snopt.experiments.environment import describe_environment
from torchdyn_snopt.experiments.reproduce.measured import Measured
from torchdyn_snopt.experiments.tasks import TASKS
from torchdyn_snopt.experiments.tasks.base import Last, neural_ode

Kind = Literal["empirical", "mc", "ggn"]
KINDS: tuple[Kind, ...] = ("empirical", "mc", "ggn")
BATCH, STEPS = 32, 10
# What each column of the table collects.
COLUMNS: dict[str, tuple[Kind, WeightSharing]] = {
    **{kind: (kind, "expand") for kind in KINDS},
    "ggn, reduce": ("ggn", "reduce"),
}
HEAD = ["model", "state", "layer", *COLUMNS]
NOTE = (
    f"Relative distance ‖A ⊗ B − G‖ / ‖G‖ (Frobenius) to the exact block G of the Gauss–Newton "
    f"matrix, one batch of {BATCH} samples, float64, solves at 1e-4; at the initial weights and "
    f"after {STEPS} steps of SNOpt by 'kfe_adam'. 'empirical' has another limit than G: outer "
    "products of gradients. 'mc': one draw a sample. 'ggn, reduce': weight_sharing='reduce', which "
    "keeps what the positions of a convolution have in common; the others take positions for "
    "independent."
)


@dataclass(frozen=True)
class Model:
    """A model with a batch to look at.

    Attributes:
        name: In the table.
        build: The model, with new weights.
        loss: From outputs and targets to the seeded loss.
        batch: Inputs and targets.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: Callable[[], tuple[Tensor, Tensor]]


def _task(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> Model:
    task = TASKS[name]

    def batch() -> tuple[Tensor, Tensor]:
        train = task.load(None).train
        rows = torch.linspace(0, len(train) - 1, BATCH).long()
        return _wide(train.x[rows]), _wide(train.y[rows])

    return Model(name, lambda: task.build_model("snopt", 1e-4), loss, batch)


def _images() -> nn.Module:
    """A small convolutional classifier of the digits, whose blocks can be written down."""
    field = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1))
    encoder = nn.Conv2d(1, 4, 3, stride=2, padding=1)
    node = neural_ode(field, "snopt", 1e-4)
    head = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    parts = {"encoder": encoder, "node": node, "last": Last(), "head": head}
    return nn.Sequential(OrderedDict(parts))


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


MODELS = (
    _task("spiral", TASKS["spiral"].loss),
    _task("moons", CrossEntropyLoss()),
    Model("digits, 4 channels", _images, CrossEntropyLoss(), _task("digits", nn.Identity()).batch),
)


def run_factors(tell: Callable[[str], None], models: tuple[Model, ...] = MODELS) -> Measured:
    """Measure every layer of every model.

    Args:
        tell: Told about the progress.
        models: Which.

    Returns:
        Table and picture.
    """
    raw = [row for model in models for row in _measure(model, tell)]
    body = [
        [r["model"], r["state"], r["layer"], *(f"{r[kind]:.3f}" for kind in COLUMNS)] for r in raw
    ]
    table = BenchTable("Distance of A ⊗ B from the exact block", HEAD, body)
    report = BenchReport("factors", [table], NOTE, describe_environment(torch.device("cpu")), raw)
    return Measured(report, _draw(raw))


def _measure(model: Model, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = model.build().double()
        x, y = model.batch()

        def loss() -> Tensor:
            return model.loss(network(x), y)

        tell(f"{model.name}, initial")
        initial = distances(network, loss)
        _train(network, loss)
        tell(f"{model.name}, trained")
        states = {"initial": initial, "trained": distances(network, loss)}
    return [
        {"model": model.name, "state": state, **row}
        for state, rows in states.items()
        for row in rows
    ]


def distances(network: nn.Module, loss: Callable[[], Tensor]) -> list[dict[str, Any]]:
    """Relative distances of a network's factors from its exact blocks.

    Args:
        network: The model.
        loss: Evaluates it, with one of this package's losses.

    Returns:
        For each layer a dictionary with its name and one distance for each kind of curvature.
    """
    exact = exact_blocks(network, loss)
    rows: list[dict[str, Any]] = [{"layer": _short(name)} for name in exact]
    for column, (kind, sharing) in COLUMNS.items():
        network.zero_grad()
        with record_curvature(network, curvature=kind, weight_sharing=sharing) as curvature:
            loss().backward()
        for row, (name, block) in zip(rows, exact.items(), strict=True):
            approximate = _kronecker(curvature.factors[name])
            row[column] = float((approximate - block).norm() / block.norm())
    network.zero_grad()
    return rows


def _short(name: str) -> str:
    """A layer's name, without torchdyn's wrappers around the field."""
    return re.sub(r"^.*?vf\.vf\.vf\.", "field ", name).replace(".", " ")


def exact_blocks(network: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The Gauss–Newton matrix's block of each layer, from the columns by sample.

    Args:
        network: The model.
        loss: Evaluates it, with one of this package's losses.

    Returns:
        By the layer's name: a matrix in the order of [out, in + 1].
    """
    layers = {name: m for name, m in network.named_modules() if is_supported(m)}
    collector = ColumnCollector(CurvatureSpec("ggn"), network.parameters(), 10**9)
    recorder = OutsideRecorder(collector, layers.values())
    with _active(collector, recorder):
        loss().backward()
        recorder.deliver()
    columns = collector.blocks(network.parameters())
    blocks = {}
    for name, layer in layers.items():
        parts = [columns[layer.weight].unflatten(1, (layer.weight.shape[0], -1))]
        if layer.bias is not None:
            parts.append(columns[layer.bias].unsqueeze(2))
        p = torch.cat(parts, 2).flatten(1)
        blocks[name] = p.mT @ p
    return blocks


@contextmanager
def _active(collector: ColumnCollector, recorder: OutsideRecorder) -> Iterator[None]:
    collector.active = True
    recorder.start()
    try:
        yield
    finally:
        collector.active = False
        recorder.stop()


def _kronecker(factors: Factors) -> Tensor:
    return factors.scale * torch.kron(factors.B, factors.A)


def _train(network: nn.Module, loss: Callable[[], Tensor]) -> None:
    optimizer = SNOpt(network, preconditioner="kfe_adam")  # as the published distances were
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def _draw(raw: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    axis = figure.subplots()
    styles = {
        "empirical": ("#0072B2", "//"),
        "mc": ("#E69F00", ".."),
        "ggn": ("#009E73", ""),
        "ggn, reduce": ("#ffffff", "xx"),
    }
    for shift, (kind, (color, hatch)) in enumerate(styles.items()):
        places = [i + 0.21 * (shift - 1.5) for i in range(len(raw))]
        heights = [row[kind] for row in raw]
        axis.bar(places, heights, 0.2, label=kind, color=color, hatch=hatch, edgecolor="black")
    labels = [f"{row['model']}\n{row['layer']}, {row['state']}" for row in raw]
    axis.set_xticks(range(len(raw)), labels, rotation=60, ha="right", fontsize="small")
    axis.set_ylabel("‖A ⊗ B − G‖ / ‖G‖")
    axis.set_yscale("log")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=len(styles))
    return figure
