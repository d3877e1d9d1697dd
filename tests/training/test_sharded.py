"""Sharded models are refused by name, as a module and by their parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from torchdyn_snopt import SNOpt, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator

dist = torch.distributed
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.fixture
def sharded() -> Iterator[nn.Module]:
    """A small network under FSDP, on one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        yield model
    finally:
        dist.destroy_process_group()


def test_fsdp_is_refused_by_name(sharded: nn.Module) -> None:
    with pytest.raises(UnsupportedError, match=r"sharded model \(FSDP[\s\S]*AdamW"):
        SNOpt(sharded)
    with pytest.raises(UnsupportedError, match=r"sharded model \(FSDP[\s\S]*AdamW"):
        SNOpt(sharded.parameters())
