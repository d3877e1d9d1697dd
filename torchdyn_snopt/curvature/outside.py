"""Curvature of layers outside the ODE: encoder, head, whatever a plain backward pass reaches."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from torchdyn_snopt.curvature.factors import LayerSums, Use

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.registry import Collector

_inside = threading.local()


@contextmanager
def inside_solve() -> Iterator[None]:
    """Mark that layers are called by a solve, which collects their curvature itself.

    Yields:
        Nothing.
    """
    depth = getattr(_inside, "depth", 0)
    _inside.depth = depth + 1
    try:
        yield
    finally:
        _inside.depth = depth


class OutsideRecorder:
    """Hooks on layers, alive between `start` and `stop`; samples are kept until `deliver`.

    Calls of a layer within one backward pass are further positions of its samples (a recurrent
    cell, a head applied at several times); calls in different passes are different samples.
    """

    def __init__(self, collector: Collector, layers: Iterable[LayerModule]) -> None:
        """Prepare, without hooks.

        Args:
            collector: takes the curvature.
            layers: supported layers.
        """
        self.collector, self.layers = collector, list(layers)
        self._handles: list[RemovableHandle] = []
        self._uses: dict[tuple[LayerModule, int], list[Use]] = {}

    def start(self) -> None:
        """Hook the layers."""
        if not self._handles:
            self._handles = [layer.register_forward_hook(self._hook) for layer in self.layers]

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget the samples."""
        self._uses.clear()

    def _hook(self, layer: LayerModule, inputs: tuple[Any, ...], output: Tensor) -> None:
        if (
            getattr(_inside, "depth", 0)
            or not self.collector.active
            or not torch.is_grad_enabled()
            or not output.requires_grad
        ):
            return
        z = inputs[0].detach()
        uses = self._uses

        def keep(g: Tensor) -> None:
            key = (layer, torch._C._current_graph_task_id())
            uses.setdefault(key, []).append(Use(z, g.detach()))

        output.register_hook(keep)

    def deliver(self) -> None:
        """Hand everything to the collector."""
        for (layer, _), uses in self._uses.items():
            sums = LayerSums(layer, self.collector.spec, bias=self.collector.takes_bias(layer))
            batch = uses[0].z.shape[0]
            samples = sums.add(uses, batch, 1.0)
            sums.close(samples, batch, 1.0)
            self.collector.absorb(layer, sums)
        self._uses.clear()
