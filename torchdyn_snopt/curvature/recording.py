"""Recording what flows through layers: hooks that live only as long as a `with` block."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, cast

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from torchdyn_snopt.curvature.factors import Use

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from torchdyn_snopt.curvature.factors import LayerSums
    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.registry import Collector
    from torchdyn_snopt.curvature.seeds import Source


class Record(NamedTuple):
    """One call of a layer: the layer, its input, and where its output stands in the graph."""

    module: LayerModule
    z: Tensor
    edge: GradientEdge


class LayerTape:
    """Records the calls of some layers; the gradient of each output is asked for at its edge.

    An edge, unlike the output tensor, stays right when a following activation works in place.
    """

    def __init__(self) -> None:
        """Start empty."""
        self.records: list[Record] = []
        self._stopped = False

    @contextmanager
    def watching(self, modules: Sequence[LayerModule]) -> Iterator[LayerTape]:
        """Hook the layers for the duration of the block.

        Args:
            modules: layers to record.

        Yields:
            This tape.
        """
        handles = [module.register_forward_hook(self._hook, with_kwargs=True) for module in modules]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self.records.clear()

    def _hook(
        self, module: LayerModule, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not self._stopped and output.requires_grad and torch.is_grad_enabled():
            z = layer_input(args, kwargs).detach()
            self.records.append(Record(module, z, get_gradient_edge(output)))

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Let calls pass unrecorded for the duration of the block.

        Yields:
            Nothing.
        """
        self._stopped = True
        try:
            yield
        finally:
            self._stopped = False

    def take(self) -> list[Record]:
        """The records since the last call.

        Returns:
            Them, in the order of the calls.
        """
        taken, self.records = self.records, []
        return taken


class FreeParameters:
    """The parameters of a field that no layer's rule covers; a key among the layers of a pass."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        """Name them.

        Args:
            parameters: gates, Galerkin coefficients, biases of their own, …; may be set later.
        """
        self.parameters = tuple(parameters)


Owner: TypeAlias = "LayerModule | FreeParameters"


class Sums(Protocol):
    """What a collector sums for one layer during one pass, step by step."""

    def add(
        self, uses: Sequence[Use], batch: int, weight: float, gradient_weight: float | None = None
    ) -> int:
        """Add one evaluation, for the time being.

        Args:
            uses: of the layer.
            batch: samples in the batch.
            weight: quadrature weight.
            gradient_weight: weight of the gradients where it differs.

        Returns:
            Samples of the layer.
        """

    def accept(self, scale: float = 1.0) -> None:
        """Keep what was added since the last call.

        Args:
            scale: of its weights.
        """

    def reject(self) -> None:
        """Forget what was added since the last `accept`."""

    def close(self, samples: int, batch: int, horizon: float, factor: Tensor | None = None) -> None:
        """Count the samples of the finished pass.

        Args:
            samples: of the layer.
            batch: of the model.
            horizon: t1 − t0, negative down in time.
            factor: of each sample's columns ``[N]``; only sums by sample are given one.
        """


class PassSums:
    """The curvature of one backward pass, handed to the collectors when it has succeeded.

    What a step's stages leave is summed as it arrives, and counts once the step is accepted: no
    stage's tensors are kept that long.
    """

    def __init__(
        self,
        wanted: Mapping[Owner, list[Collector]],
        batch: int,
        ranks: dict[Source, int] | None = None,
    ) -> None:
        """Start empty.

        Args:
            wanted: layers and their takers.
            batch: samples in the batch.
            ranks: number of columns of each source that are carried along, if any.
        """
        self.wanted, self.batch, self.ranks = wanted, batch, ranks or {}
        #: Whether a taker wants columns sample by sample.
        self.per_sample = any(c.per_sample for takers in wanted.values() for c in takers)
        #: Whether all takers are content with an estimate.
        self.estimate = all(c.spec.estimate for takers in wanted.values() for c in takers)
        self._sums: dict[tuple[Owner, Collector], Sums] = {}
        self._samples: dict[tuple[Owner, Collector], int] = {}

    def add(
        self,
        uses: Mapping[Owner, list[Use]],
        weight: float,
        gradient_weight: float | None = None,
    ) -> None:
        """Add one evaluation of the field, for the time being.

        Args:
            uses: what was recorded of each layer.
            weight: quadrature weight bᵢ, or bᵢ·|dt|.
            gradient_weight: weight for B where it differs.
        """
        for module, layer_uses in uses.items():
            seeded = any(use.columns is not None for use in layer_uses)
            for collector in self.wanted[module]:
                if collector.spec.seeded and not seeded:
                    continue
                key = (module, collector)
                if key not in self._sums:
                    self._sums[key] = collector.new_sums(module, self.ranks)
                self._samples[key] = self._sums[key].add(
                    layer_uses, self.batch, weight, gradient_weight
                )

    def accept(self, scale: float = 1.0) -> None:
        """Keep what was added since the last call.

        Args:
            scale: of its weights, |dt| where they were bᵢ.
        """
        for sums in self._sums.values():
            sums.accept(scale)

    def begin(self) -> None:
        """What was added since the last call is the first end of the next step."""
        for sums in self._estimates():
            sums.begin()

    def accept_ends(self, dt: float) -> None:
        """The trapezoidal rule over a step; its end is the first one of the next.

        Args:
            dt: its length; what was added is taken to have the weight 1.
        """
        for sums in self._estimates():
            sums.accept_ends(0.5 * dt)

    def _estimates(self) -> list[LayerSums]:
        return [cast("LayerSums", sums) for sums in self._sums.values()]  # nobody else estimates

    def reject(self) -> None:
        """Forget what was added since the last `accept`."""
        for sums in self._sums.values():
            sums.reject()

    def deliver(self, horizon: float, factor: Tensor | None = None) -> None:
        """Hand everything to the collectors.

        Args:
            horizon: t1 − t0, negative where columns were summed with |dt| down in time.
            factor: one for each sample, that its columns still lack.
        """
        for (module, collector), sums in self._sums.items():
            sums.close(self._samples[module, collector], self.batch, horizon, factor)
            collector.absorb(module, sums)


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a call of a layer.

    Args:
        args: its positional arguments.
        kwargs: its keyword arguments.

    Returns:
        The tensor.
    """
    z: Tensor = args[0] if args else kwargs["input"]
    return z


def group_uses(
    records: Sequence[Record],
    gradients: Sequence[Tensor | None],
    columns: Sequence[Tensor | None] = (),
) -> dict[Owner, list[Use]]:
    """Recorded calls with their gradients, by layer; layers with one weight are one layer.

    Args:
        records: the calls.
        gradients: gradient of each call's output.
        columns: columns at each call's output, if any are carried.

    Returns:
        Uses of each layer.
    """
    uses: dict[Owner, list[Use]] = {}
    first: dict[int, LayerModule] = {}
    columns = columns or [None] * len(records)
    for record, gradient, column in zip(records, gradients, columns, strict=True):
        layer = first.setdefault(id(record.module.weight), record.module)
        uses.setdefault(layer, []).append(Use(record.z, gradient, record.module, column))
    return uses
