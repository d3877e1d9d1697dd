"""Per-sample columns p of Proposition 2, for the low-rank preconditioner.

The Gauss–Newton matrix of a batch is G = Σ_k p_k ⊗ p_k with one column for each sample b and seed
r: the gradient, in all parameters, of the loss seen through that seed. They are collected where the
Kronecker factors are: from a layer's input and the columns at its output, z ⊗ g, integrated over
time before any product is taken; so nothing is lost to the factorization.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from torchdyn_snopt.curvature.factors import CurvatureSpec, Use
from torchdyn_snopt.curvature.layers import gradient_rows, patch_rows
from torchdyn_snopt.curvature.recording import FreeParameters
from torchdyn_snopt.curvature.registry import Collector
from torchdyn_snopt.errors import CurvatureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.recording import Owner, Sums
    from torchdyn_snopt.curvature.seeds import Source

Ranks = dict["Source", int]

# Entries of a linear layer's inputs and columns that wait for their product.
WAITING = 2**20


class ColumnSums:
    """The columns of one layer, or of free parameters, summed over the stages of a pass."""

    def __init__(self, owner: Owner, parameters: Sequence[Tensor], ranks: Ranks) -> None:
        """Start empty.

        Args:
            owner: what the uses belong to.
            parameters: whose columns are summed.
            ranks: number of columns of each source, in their order.
        """
        self.owner, self.parameters, self.ranks = owner, parameters, ranks
        self.is_free = isinstance(owner, FreeParameters)
        self.totals: list[Tensor] = []
        self.samples = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._entries = 0
        # Uses and weights of a step: as they are, they are smaller than columns by sample.
        self._step: list[tuple[Use, float, float | None]] = []

    def add(
        self, uses: Sequence[Use], batch: int, weight: float, gradient_weight: float | None = None
    ) -> int:
        """Add one evaluation, for the time being.

        Args:
            uses: inputs and columns; a layer is left out where some are not apart by sample.
            batch: samples in the model's batch.
            weight: quadrature weight of the evaluation, bᵢ·|dt| (signed).
            gradient_weight: given where the columns carry their weight already.

        Returns:
            ``batch``.
        """
        # The rest belongs to the free parameters.
        if self.is_free or all(apart(use, batch) for use in uses):
            self._step += [(use, weight, gradient_weight) for use in uses]
        self.samples = batch
        return batch

    def accept(self, scale: float = 1.0) -> None:
        """Sum what was added since the last call.

        Args:
            scale: of its weights.
        """
        for use, weight, gradient_weight in self._step:
            columns = use.columns
            assert columns is not None
            factor = weight * scale if gradient_weight is None else 1.0
            if factor != 1.0:
                columns = columns * factor
            if isinstance(self.owner, nn.Linear) and use.z.dim() == 2:
                self._wait(use.z, columns)
            else:
                self._sum(self._parts(use, columns))
        self._step.clear()

    def reject(self) -> None:
        """Forget what was added since the last `accept`."""
        self._step.clear()

    def _sum(self, parts: list[Tensor]) -> None:
        if self.totals:
            torch._foreach_add_(self.totals, parts)
        else:
            self.totals = [part.contiguous() for part in parts]

    def _wait(self, z: Tensor, columns: Tensor) -> None:
        """Keep inputs and columns of stages until one product for each sample is worth it."""
        self._waiting.append((z, columns))
        self._entries += z.numel() + columns.numel()
        if self._entries >= WAITING:
            self._multiply()

    def _multiply(self) -> None:
        """The stages of a sample as the positions of one layer's input."""
        if not self._waiting:
            return
        assert not isinstance(self.owner, FreeParameters)
        # Stacked in front, where it is a copy; the products read them transposed.
        z = torch.stack([z for z, _ in self._waiting]).transpose(0, 1)  # [N, S, in]
        columns = torch.stack([g for _, g in self._waiting]).movedim(0, 2)  # [R, N, S, out]
        self._waiting, self._entries = [], 0
        self._sum(self._by_parameter(layer_columns(self.owner, z, columns)))

    def _parts(self, use: Use, columns: Tensor) -> list[Tensor]:
        if isinstance(self.owner, FreeParameters):
            sizes = [p.numel() for p in self.parameters]
            lead = columns.shape[:2]
            split = columns.split(sizes, -1)
            return [s.reshape(*lead, *p.shape) for s, p in zip(split, self.parameters, strict=True)]
        return self._by_parameter(layer_columns(use.module or self.owner, use.z, columns))

    def _by_parameter(self, columns: tuple[Tensor, Tensor]) -> list[Tensor]:
        assert not isinstance(self.owner, FreeParameters)
        both = {id(self.owner.weight): columns[0], id(self.owner.bias): columns[1]}
        return [both[id(p)] for p in self.parameters]

    def close(self, samples: int, batch: int, horizon: float, factor: Tensor | None = None) -> None:
        """Give the columns the sign of the integral from t0 to t1; see `LayerSums.close`.

        Args:
            samples: samples of the layer.
            batch: samples in the batch.
            horizon: t1 − t0, negative down in time.
            factor: of each sample's columns ``[N]``, for those that lack it.
        """
        self._multiply()
        if horizon < 0.0 and self.totals:
            torch._foreach_neg_(self.totals)
        if factor is not None:
            for total in self.totals:
                total.mul_(factor.view(-1, *[1] * (total.dim() - 2)))


class ColumnCollector(Collector):
    """Collects per-sample columns of all parameters that it watches."""

    per_sample = True

    def __init__(self, spec: CurvatureSpec, parameters: Iterable[Tensor], max_columns: int) -> None:
        """Register, inactive.

        Args:
            spec: 'mc' or 'ggn'.
            parameters: θ.
            max_columns: limit on samples times seeds of one pass.
        """
        super().__init__(spec, parameters)
        self.max_columns = max_columns
        self._parts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._samples: dict[Source, int] = {}
        self._ranks: Ranks = {}

    def check_rank(self, rank: int, samples: int) -> None:
        """Refuse a loss that would send off too many columns; see `Collector.check_rank`.

        Args:
            rank: R.
            samples: N.

        Raises:
            CurvatureError: more than ``max_columns``.
        """
        if rank * samples > self.max_columns:
            n = sum(p.numel() for p in self._watched)
            needed = 8 * n * rank * samples / 2**20
            raise CurvatureError(
                "the low-rank curvature of this batch needs too many columns",
                got=f"{samples} samples × {rank} seeds = {samples * rank} columns of {n} entries "
                f"({needed:.0f} MiB in float64)",
                allowed=f"max_columns={self.max_columns}",
                do="take smaller batches, sample the seeds with curvature='mc' (one a sample), "
                "raise max_columns, or use preconditioner='kfe_adam'",
            )

    def new_sums(self, owner: Owner, ranks: Ranks) -> ColumnSums:
        """Sums for one layer in one pass.

        Args:
            owner: the layer.
            ranks: number of columns of each source.

        Returns:
            Empty sums.
        """
        if isinstance(owner, FreeParameters):
            return ColumnSums(owner, owner.parameters, ranks)
        weights = [owner.weight, *([owner.bias] if self.takes_bias(owner) else [])]
        return ColumnSums(owner, [p for p in weights if p is not None], ranks)

    def absorb(self, owner: Owner, sums: Sums) -> None:
        """Take over the sums of one finished pass.

        Args:
            owner: the layer.
            sums: its sums.
        """
        assert isinstance(sums, ColumnSums)
        _check_samples(sums)
        for parameter, total in zip(sums.parameters, sums.totals, strict=False):
            if not self.watches(parameter):
                continue
            parts = self._parts.setdefault(parameter, {})
            split = total.split(list(sums.ranks.values()))
            for (source, rank), part in zip(sums.ranks.items(), split, strict=True):
                parts[source] = parts[source] + part if source in parts else part
                self._samples[source], self._ranks[source] = sums.samples, rank

    def blocks(self, parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """All columns collected since the last `clear`; G = Pᵀ P is that of the loss.

        Args:
            parameters: in the order wanted.

        Returns:
            P ``[K, n_i]`` of each parameter that has columns: one row for each sample and seed.
        """
        scale = 1.0
        if self.spec.reduction == "mean":
            # The columns carry 1/N where G needs 1/√N: that of the whole batch, over all passes.
            passes = {source.task: count for source, count in self._samples.items()}
            scale = sum(passes.values()) ** 0.5
        covered = [p for p in parameters if p in self._parts]
        return {
            p: scale * torch.cat([self._block(p, source) for source in self._samples])
            for p in covered
        }

    def _block(self, parameter: Tensor, source: Source) -> Tensor:
        rows = self._ranks[source] * self._samples[source]
        part: Tensor | None = self._parts[parameter].get(source)
        if part is None:
            return parameter.new_zeros(rows, parameter.numel())
        return part.reshape(rows, -1)

    def clear(self) -> None:
        """Forget what was collected."""
        super().clear()
        self._parts.clear()
        self._samples.clear()
        self._ranks.clear()


def _check_samples(sums: ColumnSums) -> None:
    """Refuse columns whose sample is not the layer's: a time, a position, a flattened pair."""
    expected = {source.samples for source in sums.ranks}
    if sums.totals and expected != {sums.samples}:
        raise CurvatureError(
            "the samples of the loss are not those of the state",
            got=f"a loss over {sorted(expected)} samples, and layers that are fed {sums.samples}",
            allowed="outputs whose first dimension is that of the batch, [N, ...]",
            do="put the batch first: states at several times as states.movedim(0, 1)",
        )


def apart(use: Use, batch: int) -> bool:
    """Whether input and columns of a use are apart by sample.

    Args:
        use: with columns ``[R, N, ...]``.
        batch: samples in the model's batch.

    Returns:
        False for a layer that is fed without the batch dimension, e.g. with the time alone.
    """
    columns = use.columns
    if columns is None or columns.dim() < 3 or columns.shape[1] != batch:
        return False
    return use.z.dim() >= 2 and use.z.shape[0] == batch


def layer_columns(module: LayerModule, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in weight and bias for each column and sample.

    Args:
        module: the layer.
        z: its input ``[N, ...]``.
        g: columns at its output ``[R, N, ...]``.

    Returns:
        ``[R, N, *weight.shape]`` and ``[R, N, out]``.
    """
    rank, batch = g.shape[:2]
    if isinstance(module, nn.Linear):
        z = z.reshape(batch, -1, z.shape[-1])
        g = g.reshape(rank, batch, -1, g.shape[-1])
        if z.shape[1] == 1:
            return g.mT * z, g[:, :, 0]
        return torch.stack([torch.bmm(one.mT, z) for one in g]), g.sum(2)
    rows = patch_rows(module, z, batch).values
    columns = gradient_rows(module, g.flatten(0, 1), rank * batch, "expand").values
    if module.groups == 1:
        rows, columns = rows.unsqueeze(0), columns.unsqueeze(0)
    rows = rows.unflatten(1, (batch, -1))  # [G, N, S, kernel·in]
    columns = columns.unflatten(1, (rank, batch, -1))  # [G, R, N, S, out/G]
    weight = torch.einsum("grbso,gbsi->rbgoi", columns, rows).flatten(2, 3)
    kernel = module.weight.shape[2:]
    weight = weight.unflatten(-1, (*kernel, -1)).movedim(-1, 3)
    return weight, columns.sum(3).permute(1, 2, 0, 3).flatten(2)
