"""One rank of the tests of many processes: trains every case and saves what came out.

Started by torchrun from `test_ranks.py`, with the file to write as its argument.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.optim.problems import Classifier, batch, flat, plain
from torchdyn_snopt import CurvatureError, InvalidInputError, SNOpt, SNOptSensitivity, learn_horizon

STEPS, SIZE = 20, 16
SETTINGS: dict[str, dict[str, Any]] = {
    "trust_region": {"preconditioner": "trust_region", "update_freq": 4},
    "kfac": {"preconditioner": "kfac", "lr": 0.05, "update_freq": 3, "weight_decay": 1e-3},
    "ekfac": {"preconditioner": "ekfac", "lr": 0.02, "update_freq": 4, "kl_clip": 1e-2},
    "kfe_adam": {"preconditioner": "kfe_adam", "lr": 0.01, "update_freq": 2},
    "reduction='sum'": {
        "preconditioner": "kfac", "lr": 1e-3, "update_freq": 3, "reduction": "sum",
    },
    "fallback": {"preconditioner": "kfac", "lr": 0.05, "update_freq": 3, "fallback": "adam"},
}  # fmt: skip
# How the batch is shared out: rows of rank 0, the rest are those of rank 1.
SHARES = {"halves": 8, "uneven": 11}


class Timed(Classifier):
    """Integrates over a learned horizon."""

    def __init__(self) -> None:
        super().__init__()
        self.horizon = learn_horizon(self.node, t1=0.7, penalty=0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.node(torch.tanh(self.encoder(x)))[-1]))


def make(case: str) -> tuple[nn.Module, dict[str, Any]]:
    """Model and settings, the same on every rank and in the reference."""
    torch.manual_seed(1)
    if case == "horizon":
        return Timed(), SETTINGS["kfac"]
    return Classifier(), SETTINGS[case]


def loss_of(model: nn.Module, step: int, rows: slice, ranks: int, reduction: str) -> Tensor:
    """This rank's part of the batch's loss, so that the mean over ranks is the whole."""
    x, y = batch(step, SIZE)
    errors = (model(x[rows]) - y[rows]).square().sum(1).sum() * ranks
    loss = errors if reduction == "sum" else errors / SIZE
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return loss + inner.horizon.penalty() if isinstance(inner, Timed) else loss


def train(case: str, rows: slice, ranks: int = 1, wrap: Any = None) -> list[Tensor]:
    """Parameters after every step."""
    model, settings = make(case)
    wrapped = model if wrap is None else wrap(model)
    optimizer = SNOpt(wrapped if case == "kfac" else model, **settings)
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(wrapped, step, rows, ranks, settings.get("reduction", "mean")).backward()
        optimizer.step()
        history.append(flat(model).clone())
    return history


def rows_of(rank: int, share: str) -> slice:
    return slice(0, SHARES[share]) if rank == 0 else slice(SHARES[share], SIZE)


class Failing(Classifier):
    def __init__(self) -> None:
        super().__init__(SNOptSensitivity(on_failure="skip"))
        self.broken = False
        self.node.vf.vf.register_forward_hook(lambda *a: a[-1] * math.nan if self.broken else None)


def skipped(rank: int) -> dict[str, Any]:
    """A solve fails on rank 1 alone: both drop the step."""
    torch.manual_seed(1)
    model = Failing()
    wrapped = DistributedDataParallel(model)
    optimizer = SNOpt(wrapped, lr=0.01, update_freq=2)
    history = []
    for step in range(6):
        model.broken = rank == 1 and step in {2, 3}
        optimizer.zero_grad()
        loss_of(wrapped, step, rows_of(rank, "halves"), 2, "mean").backward()
        optimizer.step()
        history.append(flat(model).clone())
    return {"history": history, "skipped": optimizer.skipped_steps}


def seen_by_one(rank: int) -> list[Tensor]:
    """The last layer is used on rank 0 alone; rank 1 knows of its curvature from rank 0."""
    torch.manual_seed(1)
    model = plain()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = SNOpt(wrapped, lr=0.01, preconditioner="kfac", update_freq=1)
    history = []
    for step in range(3):
        x, y = batch(step, SIZE)
        optimizer.zero_grad()
        used = nn.Sequential(*model) if rank == 0 else nn.Sequential(*model[:-2], nn.Linear(3, 2))
        used.requires_grad_(True)
        loss = (used(x) - y).square().sum(1).mean()
        loss.backward()
        for p in model.parameters():  # by hand, as gradients of a part of the model
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
        optimizer.step()
        history.append(flat(model).clone())
    del wrapped
    return history


def unfactorizable(rank: int) -> str:
    """Not finite on one rank, so on all: the error is every rank's."""
    model = plain()
    optimizer = SNOpt(model, preconditioner="kfac", update_freq=1)
    x, y = batch(0, SIZE)
    (model(x) - y).square().sum().mul(math.inf if rank == 1 else 1.0).backward()
    try:
        optimizer.step()
    except CurvatureError as error:
        return str(error)
    return ""


def unlike(rank: int) -> str:
    model = nn.Linear(2, 2 + rank)
    optimizer = SNOpt(model)
    model(torch.randn(3, 2)).sum().backward()
    try:
        optimizer.step()
    except InvalidInputError as error:
        return str(error)
    return ""


def alone(rank: int) -> list[Tensor]:
    """Models of their own, each in a group of one."""
    own, _ = dist.new_subgroups(group_size=1)
    torch.manual_seed(rank)
    model = plain()
    optimizer = SNOpt(model, lr=0.01, process_group=own)
    for step in range(2 + rank):  # a collective call would hang here
        x, y = batch(step, SIZE)
        optimizer.zero_grad()
        (model(x) - y).square().sum(1).mean().backward()
        optimizer.step()
    return [flat(model)]


def main(path: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results: dict[str, Any] = {
        f"{case} {share}": train(case, rows_of(rank, share), 2, DistributedDataParallel)
        for case in (*SETTINGS, "horizon")
        for share in SHARES
    }
    results["skipped"] = skipped(rank)
    results["seen by one"] = seen_by_one(rank)
    results["unfactorizable"] = unfactorizable(rank)
    results["unlike"] = unlike(rank)
    results["alone"] = alone(rank)
    torch.save(results, path.with_name(f"{path.name}.{rank}"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
