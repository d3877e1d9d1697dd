"""The processes that `torchrun` has started for one command: they train each run together.

Every process holds the whole model and takes its share of each batch. The first one leads: it holds
the output folder, writes logs, checkpoints, tables and pictures, and speaks. Nothing here is in use
when the command was started without torchrun.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchdyn_snopt.errors import InvalidInputError


@dataclass(frozen=True)
class Team:
    """This process among those that train together.

    Attributes:
        rank: Its number, from 0.
        size: How many they are.
        device: What this process computes on.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as it is called in training: gradients are averaged over the team.

        Args:
            model: The same on all.

        Returns:
            It, or a wrapper around it.
        """
        return model if self.size == 1 else DistributedDataParallel(model)

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of a batch.

        Args:
            rows: Of the whole batch.

        Returns:
            Its own rows, as many as the others have, or one more or less.

        Raises:
            InvalidInputError: There are more processes than rows.
        """
        if len(rows) < self.size:
            raise InvalidInputError(
                "a batch has fewer samples than there are processes",
                got=f"{len(rows)} samples for {self.size} processes",
                allowed="at least one sample for each, in the last batch of an epoch too",
                do="start fewer processes, or choose another --batch-size",
            )
        return torch.tensor_split(rows, self.size)[self.rank]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add numbers up over the team.

        Args:
            values: Of this process.

        Returns:
            The same on all.
        """
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def gather(self, value: Any) -> list[Any]:
        """What each process holds.

        Args:
            value: Of this process; plain values and tensors.

        Returns:
            One entry for each, in their order.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all have come to this point."""
        self.sum([0.0])


def rank_from(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Number and count of the processes that torchrun has started.

    Args:
        environment: Its variables.

    Returns:
        (0, 1) without torchrun.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return 0, 1
    return int(environment["RANK"]), int(environment["WORLD_SIZE"])


@contextmanager
def team_on(device: torch.device) -> Iterator[Team]:
    """Meet the other processes, if there are any, for the duration of the block.

    Args:
        device: What was asked for; with several CUDA devices each process takes its own.

    Yields:
        This process's place among them.
    """
    rank, size = rank_from()
    if size == 1:
        yield Team(device=device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    started_here = not dist.is_initialized()
    if started_here:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Team(rank, size, device)
    finally:
        if started_here:
            dist.destroy_process_group()
