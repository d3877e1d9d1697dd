"""One layer's Kronecker factors, as running sums over time, samples, positions and columns.

With reduction='mean' the loss is the mean over a batch of N samples, so the gradients that arrive
carry 1/N. The sums keep what arrives, and `LayerSums.factors` multiplies by N once: micro-batches
whose losses were divided by their number then give exactly the factors of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from torchdyn_snopt.curvature.layers import (
    Rows,
    WeightSharing,
    enough_samples,
    gradient_rows,
    in_weight_order,
    input_rows,
)
from torchdyn_snopt.curvature.moments import Moment
from torchdyn_snopt.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.strips import StripMoment, Strips

CurvatureKind: TypeAlias = Literal["auto", "empirical", "mc", "ggn"]
Reduction: TypeAlias = Literal["mean", "sum"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "curvature": ("auto", "empirical", "mc", "ggn"),
    "weight_sharing": ("expand", "reduce"),
    "reduction": ("mean", "sum"),
}


@dataclass(frozen=True)
class CurvatureSpec:
    """Which curvature to collect.

    Attributes:
        curvature: 'empirical' (seed Φ_x of each sample's loss), 'mc' or 'ggn' (seeds of the loss);
            'auto' takes seeds where a loss offers some, and is 'empirical' else.
        weight_sharing: 'expand' or 'reduce' (positions summed before the outer product).
        reduction: how the loss combines the samples, 'mean' or 'sum'.
        estimate: whether A of a large convolution may come from a part of the batch, and integrals
            over time from the ends of the solver's steps.
        offered: the seeds that 'auto' has been offered, 'mc' or 'ggn'.
    """

    curvature: CurvatureKind = "empirical"
    weight_sharing: WeightSharing = "expand"
    reduction: Reduction = "mean"
    estimate: bool = False
    offered: Literal["mc", "ggn"] | None = None

    @property
    def kind(self) -> CurvatureKind:
        """What is collected; 'auto' as long as that is open."""
        return self.offered or self.curvature

    @property
    def seeded(self) -> bool:
        """Whether seeds of the loss are collected, and not the gradients' own."""
        return self.kind in ("mc", "ggn")

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidInputError(
                    f"unknown {name}",
                    got=f"{name}={value!r}",
                    allowed=", ".join(repr(choice) for choice in allowed),
                    do=f"pass {name}={allowed[0]!r}",
                )


@dataclass(frozen=True)
class Factors:
    """The Kronecker factors of one layer; its curvature is scale · A ⊗ B.

    Attributes:
        A: ``[in(+1), in(+1)]``, or ``[G, in(+1), in(+1)]`` for a grouped convolution.
        B: ``[out, out]``, or ``[G, out/G, out/G]``.
        scale: 1/(t1 − t0) for 'empirical' (the paper's scaled seed), else 1.
        fisher_scale: by how much the Fisher of one sample exceeds the variance of the gradients of
            batches: N for a loss that is the mean over N samples, 1/N for a sum.
    """

    A: Tensor
    B: Tensor
    scale: float = 1.0
    fisher_scale: float = 1.0


@dataclass(frozen=True)
class Totals:
    """What was summed up of one layer; totals of parts of a batch add up to those of the whole.

    Attributes:
        a: Σ z zᵀ, shaped like A.
        b: Σ g gᵀ of the gradients as they arrive, shaped like B.
        rows: rows of A, integrated over time.
        row_samples: samples of the layer, integrated over time.
        samples: of the layer.
        batch: samples of the model.
        sample_time: samples of the layer times t1 − t0.
    """

    NUMBERS: ClassVar[int] = 5

    a: Tensor
    b: Tensor
    rows: float = 0.0
    row_samples: float = 0.0
    samples: float = 0.0
    batch: float = 0.0
    sample_time: float = 0.0

    def numbers(self) -> tuple[float, ...]:
        """What is summed besides the matrices.

        Returns:
            `NUMBERS` of them, in their order.
        """
        return (self.rows, self.row_samples, self.samples, self.batch, self.sample_time)

    def factors(self, spec: CurvatureSpec) -> Factors:
        """The factors.

        Args:
            spec: what was collected.

        Returns:
            A, B and the scale.
        """
        mean = spec.reduction == "mean"
        multiplier = self.batch**2 if mean else 1.0
        expand = spec.weight_sharing == "expand"
        positions = self.rows / self.row_samples if expand else 1.0
        scale = 1.0 if spec.seeded else self.samples / self.sample_time
        b = self.b * (multiplier / (self.samples * positions))
        fisher_scale = self.batch if mean else 1.0 / self.batch
        return Factors(self.a / self.samples, b, scale, fisher_scale)


class Use(NamedTuple):
    """One use of a layer in one evaluation.

    Attributes:
        z: the layer's input.
        g: gradient of its output; None when the output has no gradient, or nobody wants it.
        module: the module that was called, where it is another one with the same weight.
        columns: for 'mc' and 'ggn', the columns at its output ``[R, *output.shape]``, or None.
        part: whether z holds only those samples that stand for all of them in A.
    """

    z: Tensor
    g: Tensor | None
    module: LayerModule | None = None
    columns: Tensor | None = None
    part: bool = False


def thinned(module: LayerModule, use: Use, batch: int, spec: CurvatureSpec) -> Use:
    """A use with the samples alone that A is taken from; the same one if that is all of them.

    Args:
        module: the layer.
        use: of it.
        batch: samples in the model's batch.
        spec: what is collected.

    Returns:
        The use, with a view of its z.
    """
    if use.part or not spec.estimate or spec.weight_sharing != "expand":
        return use
    some = enough_samples(module, use.z, batch)
    return use if some == batch else use._replace(z=use.z[:: batch // some][:some], part=True)


# Entries of a convolution's gradient that become rows at once.
LARGE = 1 << 20


class LayerSums:
    """Running sums of one layer, over evaluations and backward passes."""

    def __init__(self, module: LayerModule, spec: CurvatureSpec, *, bias: bool) -> None:
        """Start empty.

        Args:
            module: the layer.
            spec: what is collected.
            bias: whether the bias belongs to the curvature.
        """
        self.module, self.spec, self.bias = module, spec, bias
        self._a: dict[Strips | None, Moment | StripMoment] = {}
        self._b: Moment | None = None
        self._rows = self._row_samples = 0.0  # integrals over time, for the mean over positions
        self._step_rows = self._step_samples = 0.0  # the same of a step not yet accepted
        self._end_rows = self._end_samples = 0.0  # and of its first end
        self._samples = self._batch = self._sample_time = 0.0  # totals over finished passes

    def add(
        self, uses: Sequence[Use], batch: int, weight: float, gradient_weight: float | None = None
    ) -> int:
        """Add one evaluation of the layer, used once or several times, for the time being.

        Several uses of a layer count as further positions of each sample.

        Args:
            uses: inputs and output gradients.
            batch: samples in the model's batch.
            weight: quadrature weight of the evaluation, bᵢ·|dt| (signed).
            gradient_weight: weight for B where it differs from that for A.

        Returns:
            Samples of the layer: ``batch``, or 1 for a layer fed without batch dimension.
        """
        uses = [_in_wide_dtype(use) for use in uses]
        inputs = [self._inputs(use, batch) for use in uses]
        self._step_rows += weight * sum(rows.positions * rows.samples for rows in inputs)
        self._step_samples += weight * inputs[0].samples
        if self.spec.weight_sharing == "reduce" and len(uses) > 1:
            positions = sum(rows.positions for rows in inputs)
            shares = [rows.positions / positions for rows in inputs]
            mean = _total([rows.values * s for rows, s in zip(inputs, shares, strict=True)])
            inputs = [Rows(mean, inputs[0].samples, positions)]
        for z in inputs:
            if z.strips not in self._a:
                self._a[z.strips] = z.moment(one=self.bias)
            self._a[z.strips].add(z.values, weight * z.stand_for)
        for g in self._gradients(uses, batch):
            self._b = self._b or Moment(g)
            self._b.add(g, weight if gradient_weight is None else gradient_weight)
        return inputs[0].samples

    def accept(self, scale: float = 1.0) -> None:
        """Keep what was added since the last call.

        Args:
            scale: of its weights.
        """
        for moment in self._moments():
            moment.accept(scale)
        self._rows += scale * self._step_rows
        self._row_samples += scale * self._step_samples
        self._step_rows = self._step_samples = 0.0

    def begin(self) -> None:
        """What was added since the last call is the first end of the next step."""
        for moment in self._moments():
            moment.begin()
        self._shift_ends()

    def accept_ends(self, scale: float) -> None:
        """Keep what was added as the second end of a step, and again its first one.

        Args:
            scale: of their weights, half of the step's length.
        """
        for moment in self._moments():
            moment.accept_ends(scale)
        self._rows += scale * (self._end_rows + self._step_rows)
        self._row_samples += scale * (self._end_samples + self._step_samples)
        self._shift_ends()

    def _shift_ends(self) -> None:
        self._end_rows, self._end_samples = self._step_rows, self._step_samples
        self._step_rows = self._step_samples = 0.0

    def reject(self) -> None:
        """Forget what was added since the last `accept`."""
        for moment in self._moments():
            moment.reject()
        self._step_rows = self._step_samples = 0.0

    def _moments(self) -> list[Moment | StripMoment]:
        return [*self._a.values(), *([self._b] if self._b else [])]

    def _inputs(self, use: Use, batch: int) -> Rows:
        module, sharing = use.module or self.module, self.spec.weight_sharing
        use = thinned(module, use, batch, self.spec)
        if not use.part:
            return input_rows(module, use.z, batch, sharing)
        some = len(use.z)
        rows = input_rows(module, use.z, some, sharing)
        return replace(rows, samples=batch, stand_for=batch / some)

    def _gradients(self, uses: Sequence[Use], batch: int) -> Iterator[Tensor]:
        parts = (part for use in uses for part in self._parts(use, batch))
        if self.spec.weight_sharing == "expand" or len(uses) == 1:
            return parts
        whole = list(parts)
        return iter([_total(whole)] if whole else [])

    def _parts(self, use: Use, batch: int) -> Iterator[Tensor]:
        """Rows of B; of large gradients in parts, since rows of a convolution are a copy."""
        sharing = self.spec.weight_sharing
        if self.spec.seeded:
            if use.columns is not None:
                yield self._column_rows(use.columns, batch)
        elif use.g is not None:
            for g in _in_parts(self.module, use.g) if sharing == "expand" else [use.g]:
                yield gradient_rows(self.module, g, batch, sharing).values

    def _column_rows(self, columns: Tensor, batch: int) -> Tensor:
        sharing = self.spec.weight_sharing
        if _is_batched(self.module, columns, batch):
            flat, rank = columns.flatten(0, 1), len(columns)
            return gradient_rows(self.module, flat, batch * rank, sharing).values
        rows = [gradient_rows(self.module, g, batch, sharing).values for g in columns]
        return torch.cat(rows, -2)

    def close(self, samples: int, batch: int, horizon: float, factor: Tensor | None = None) -> None:
        """Count the samples of a finished backward pass.

        Args:
            samples: what `add` returned in this pass.
            batch: samples in the model's batch.
            horizon: t1 − t0 of the pass; 1 outside an ODE.
            factor: never given here: samples are no longer apart.
        """
        for moment in self._moments():
            moment.close()
        self._samples += samples
        self._batch += batch
        self._sample_time += samples * abs(horizon)

    def absorb(self, other: LayerSums) -> None:
        """Add the sums of another pass over the same layer.

        Args:
            other: its sums; not to be used afterwards.
        """
        for strips, moment in other._a.items():
            if strips in self._a:
                self._a[strips].merge(moment)  # type: ignore[arg-type]  # of one kind
            else:
                self._a[strips] = moment
        self._b = _merge(self._b, other._b)
        self._rows += other._rows
        self._row_samples += other._row_samples
        self._samples += other._samples
        self._batch += other._batch
        self._sample_time += other._sample_time

    def totals(self) -> Totals | None:
        """Everything that was collected.

        Returns:
            The totals, or None when no pass was finished or no gradient arrived.
        """
        if not self._a or self._b is None or self._samples == 0.0:
            return None
        return Totals(
            in_weight_order(self.module, _total([moment.full() for moment in self._a.values()])),
            self._b.full(),
            self._rows,
            self._row_samples,
            self._samples,
            self._batch,
            self._sample_time,
        )

    def factors(self) -> Factors | None:
        """The factors of everything that was collected.

        Returns:
            A and B, or None when no pass was finished or no gradient arrived.
        """
        totals = self.totals()
        return None if totals is None else totals.factors(self.spec)


def _in_wide_dtype(use: Use) -> Use:
    """In at least float32: sums of products of narrower numbers would lose them."""
    z, g, columns = (
        part.float() if part is not None and part.dtype in (torch.float16, torch.bfloat16) else part
        for part in (use.z, use.g, use.columns)
    )
    assert z is not None
    return use._replace(z=z, g=g, columns=columns)


def _in_parts(module: LayerModule, g: Tensor) -> Sequence[Tensor]:
    if isinstance(module, nn.Linear) or g.dim() < len(module.kernel_size) + 2 or not len(g):
        return [g]
    parts: Sequence[Tensor] = g.split(max(1, LARGE // g[0].numel()))
    return parts


def _is_batched(module: LayerModule, columns: Tensor, batch: int) -> bool:
    """Whether columns [R, ...] have a batch dimension behind the first one."""
    if isinstance(module, nn.Linear):
        leading = columns.shape[1:-1].numel()
        return leading >= batch and leading % batch == 0
    return columns.dim() == len(module.kernel_size) + 3


def _merge(left: Moment | None, right: Moment | None) -> Moment | None:
    if left is None or right is None:
        return left or right
    left.merge(right)
    return left


def _total(parts: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, parts)
