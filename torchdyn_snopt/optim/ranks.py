"""The ranks of a data-parallel training: what they sum, agree on and share out.

Every rank collects curvature from its own part of the batch. `pool` adds that up, in one flattened
all-reduce, to what one process would have collected from the whole batch; `refresh` gives each rank
some of the decompositions to do, and broadcasts them. All ranks then take the same step.

Gradients are averaged by whoever averages them (DistributedDataParallel), so that one that arrives
at a rank enters the step with the weight 1/ranks, and its outer product with 1/ranks².
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchdyn_snopt.curvature.factors import Totals
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.optim.horizon_policy import Exchange
from torchdyn_snopt.optim.preconditioners import guarded_refresh, install, keep_last_good

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchdyn_snopt.optim.layers import Layer
    from torchdyn_snopt.optim.preconditioners import Parts, Preconditioner

Group = dict[str, Any]


@dataclass
class Collected:
    """The curvature of one layer of a parameter group.

    Attributes:
        weight: index of the layer's weight in the group.
        bias: index of its bias, if that belongs to the curvature.
        groups: of a grouped convolution.
        totals: what was summed up.
    """

    weight: int
    bias: int | None
    groups: int
    totals: Totals


class Ranks:
    """The processes that train one model together; often only this one."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Look nothing up yet: the optimizer may be built before the processes meet.

        Args:
            process_group: them; all of torch.distributed, where that is in use, when None.
        """
        self.process_group = process_group
        self._checked = False

    @property
    def size(self) -> int:
        """How many they are."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return max(1, dist.get_world_size(self.process_group))

    @property
    def own(self) -> int:
        """The number of this one, from 0."""
        return dist.get_rank(self.process_group) if self.size > 1 else 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up over the ranks, in place.

        Args:
            tensor: of the same shape on each.

        Returns:
            It.
        """
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.process_group)
        return tensor

    def any(self, flag: bool, like: Tensor) -> bool:
        """Whether it is so on any rank.

        Args:
            flag: whether it is on this one.
            like: a tensor on the device to communicate by.

        Returns:
            The same on all.
        """
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=like.device)).item() > 0.0)

    def broadcast(self, tensor: Tensor, source: int) -> dist.Work | None:
        """Send a tensor from one rank to all, without waiting.

        Args:
            tensor: filled on the source, of the same shape on all.
            source: its number.

        Returns:
            What to wait for.
        """
        group = self.process_group
        origin = source if group is None else dist.get_global_rank(group, source)
        return dist.broadcast(tensor, origin, group=group, async_op=True)

    def check_same(self, params: Sequence[Tensor]) -> None:
        """Refuse, once, ranks that hold different parameters: their sums would mean nothing.

        Args:
            params: of the optimizer on this rank.

        Raises:
            InvalidInputError: they differ.
        """
        if self._checked or self.size == 1 or not params:
            return
        shapes = ";".join(str(tuple(p.shape)) for p in params)
        digest = float(zlib.crc32(shapes.encode()))
        low_high = torch.tensor([digest, -digest], dtype=torch.float64, device=params[0].device)
        dist.all_reduce(low_high, op=dist.ReduceOp.MAX, group=self.process_group)
        if low_high[0] != -low_high[1]:
            raise InvalidInputError(
                "the ranks hold different parameters",
                got=f"{len(params)} parameters on rank {self.own} of {self.size}",
                allowed="one copy of the model on each rank, as DistributedDataParallel keeps it",
                do="use no sharded optimizer or model around SNOpt; for ranks that train models "
                "of their own, pass process_group=torch.distributed.new_subgroups(1)[0]",
            )
        self._checked = True


class RankExchange(Exchange):
    """What a horizon's update needs from the other ranks."""

    def __init__(self, ranks: Ranks, loss_scale: float) -> None:
        """Note the weight of a slope.

        Args:
            ranks: that train together.
            loss_scale: factor of a GradScaler.
        """
        self.ranks, self.unit = ranks, 1.0 / (ranks.size * loss_scale)

    def sum(self, values: Sequence[float], like: Tensor) -> list[float]:
        """Add up over the ranks; see `Exchange`.

        Args:
            values: of this one.
            like: a tensor on the device to communicate by.

        Returns:
            The sums.
        """
        tensor = torch.tensor(list(values), dtype=torch.float64, device=like.device)
        sums: list[float] = self.ranks.sum(tensor).tolist()
        return sums


def pool(ranks: Ranks, collected: Iterable[Collected], group: Group) -> Iterable[Collected]:
    """The curvature of the whole batch from that of the ranks' parts.

    Args:
        ranks: them.
        collected: of this rank.
        group: the parameter group it belongs to.

    Returns:
        The same on all ranks; layers that no rank has seen are left out. With one rank what was
        given, which may come as it is asked for.
    """
    if ranks.size == 1:
        return collected
    params: list[Tensor] = group["params"]
    by_weight = {one.weight: one for one in collected}
    header = torch.zeros(len(params), 4, dtype=torch.int64)
    for i, one in by_weight.items():
        bias = -1 if one.bias is None else one.bias
        header[i] = torch.tensor([one.groups, bias + 2, *_sizes(one.totals)])
    device = params[0].device
    header = header.to(device)
    dist.all_reduce(header, op=dist.ReduceOp.MAX, group=ranks.process_group)
    rows = [(i, *row) for i, row in enumerate(header.tolist()) if row[0] > 0]
    dtype = _widest([params[i] for i, *_ in rows])
    blank = [
        by_weight[i].totals if i in by_weight else _zeros(groups, a, b, params[i], dtype)
        for i, groups, _, a, b in rows
    ]
    flat = torch.cat([_flatten(totals, dtype, device) for totals in blank]) if rows else None
    if flat is None:
        return []
    ranks.sum(flat)
    pooled = []
    for (i, groups, bias, *_), totals in zip(rows, blank, strict=True):
        size = totals.a.numel() + totals.b.numel() + Totals.NUMBERS
        part, flat = flat[:size], flat[size:]
        whole = _unflatten(part, totals, ranks.size)
        pooled.append(Collected(i, None if bias == 1 else bias - 2, groups, whole))
    return pooled


def _sizes(totals: Totals) -> tuple[int, int]:
    return totals.a.shape[-1], totals.b.shape[-1]


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _zeros(groups: int, a: int, b: int, like: Tensor, dtype: torch.dtype) -> Totals:
    """The part of a rank that has seen nothing of a layer."""
    leading = (groups,) if groups > 1 else ()
    make = like.new_zeros
    return Totals(make((*leading, a, a), dtype=dtype), make((*leading, b, b), dtype=dtype))


def _flatten(totals: Totals, dtype: torch.dtype, device: torch.device) -> Tensor:
    numbers = torch.tensor(totals.numbers(), dtype=dtype, device=device)
    matrices = [m.to(device=device, dtype=dtype).reshape(-1) for m in (totals.a, totals.b)]
    return torch.cat([*matrices, numbers])


def _unflatten(part: Tensor, like: Totals, ranks: int) -> Totals:
    a, b, numbers = part.split([like.a.numel(), like.b.numel(), Totals.NUMBERS])
    b = b / ranks**2
    return Totals(a.view_as(like.a).to(like.a), b.view_as(like.b).to(like.b), *numbers.tolist())


def refresh(
    ranks: Ranks, preconditioner: Preconditioner, layers: Iterable[Layer], group: Group
) -> None:
    """Refresh layers that have new factors; with several ranks each does its share.

    Args:
        ranks: them.
        preconditioner: does the work.
        layers: the same on all ranks, in the same order.
        group: their settings.
    """
    if ranks.size == 1:
        for layer in layers:
            guarded_refresh(preconditioner, layer, group)
        return
    layers = list(layers)
    if not layers:
        return
    owners = share_out([_cost(layer) for layer in layers], ranks.size)
    dtype = _widest([layer.state["A"] for layer in layers])
    device = layers[0].weight.device
    buffers, waits = {}, []
    for rank in sorted(set(owners)):
        own = [layer for layer, owner in zip(layers, owners, strict=True) if owner == rank]
        if rank == ranks.own:
            done = [_decomposed(preconditioner, layer, group) for layer in own]
            buffer = torch.cat([part.to(device=device, dtype=dtype) for part in done])
        else:
            size = sum(_size(preconditioner, layer) for layer in own)
            buffer = torch.empty(size, dtype=dtype, device=device)
        buffers[rank] = buffer
        waits.append(ranks.broadcast(buffer, rank))
    for wait in waits:
        if wait is not None:
            wait.wait()
    for layer, owner in zip(layers, owners, strict=True):
        size = _size(preconditioner, layer)
        part, buffers[owner] = buffers[owner][:size], buffers[owner][size:]
        parts = _parts(preconditioner, layer, part)
        if parts is None:
            keep_last_good(layer, torch.linalg.LinAlgError(f"reported by rank {owner}"))
        else:
            install(preconditioner, layer, parts)


def share_out(costs: Sequence[float], ranks: int) -> list[int]:
    """Who does what: the next costly piece goes to the rank with the least to do.

    Args:
        costs: of the pieces.
        ranks: how many share them.

    Returns:
        A rank for each piece.
    """
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


def _cost(layer: Layer) -> float:
    """Decompositions of [d, d] matrices take some d³."""
    factors = (layer.state["A"], layer.state["B"])
    return float(sum(f.numel() * f.shape[-1] for f in factors))


def _decomposed(preconditioner: Preconditioner, layer: Layer, group: Group) -> Tensor:
    """1 and the parts in one row, or zeros where that has failed."""
    try:
        parts = preconditioner.decompose(layer, group)
    except torch.linalg.LinAlgError:
        zeros: Tensor = layer.state["A"].new_zeros(_size(preconditioner, layer))
        return zeros
    row = [parts[name].reshape(-1) for name in preconditioner.PARTS]
    whole: Tensor = torch.cat([row[0].new_ones(1), *row])
    return whole


def _shapes(preconditioner: Preconditioner, layer: Layer) -> dict[str, torch.Size]:
    return {
        name: layer.state[factor].shape[: layer.state[factor].dim() - 2 + dims]
        for name, (factor, dims) in preconditioner.PARTS.items()
    }


def _size(preconditioner: Preconditioner, layer: Layer) -> int:
    return 1 + sum(shape.numel() for shape in _shapes(preconditioner, layer).values())


def _parts(preconditioner: Preconditioner, layer: Layer, row: Tensor) -> Parts | None:
    if not bool(row[0] == 1.0):
        return None
    shapes = _shapes(preconditioner, layer)
    pieces = row[1:].split([shape.numel() for shape in shapes.values()])
    like = layer.state["A"]
    return {
        name: piece.view(shape).to(like, copy=True)
        for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
    }
