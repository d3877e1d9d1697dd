"""Curvature of layers outside the ODE: encoder, head, whatever a plain backward pass reaches."""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from torchdyn_snopt.curvature.factors import Use, thinned
from torchdyn_snopt.curvature.seeds import LayerCall, Source, carrying, note_call

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.registry import Collector

    #: Layer, backward pass and batch size.
    Key: TypeAlias = "tuple[LayerModule, int, int]"

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
    cell, a head applied at several times); calls in different passes, or with batches of another
    size, are different samples. A layer that is given its input by keyword is not recorded.
    """

    def __init__(self, collector: Collector, layers: Iterable[LayerModule]) -> None:
        """Prepare, without hooks.

        Args:
            collector: takes the curvature.
            layers: supported layers.
        """
        self.collector, self.layers = collector, list(layers)
        self._handles: list[RemovableHandle] = []
        self._uses: dict[Key, list[Use]] = {}
        self._newest: tuple[Key, LayerCall] | None = None
        # The same, by call: columns that reach a call on several ways are added.
        self._columns: dict[Key, dict[LayerCall, dict[Source, Tensor]]] = {}
        weakref.finalize(self, _remove, self._handles).atexit = False

    def start(self) -> None:
        """Hook the layers."""
        if not self._handles:
            hook = _Hook(self)
            self._handles += [layer.register_forward_hook(hook) for layer in self.layers]

    def stop(self) -> None:
        """Remove the hooks."""
        _remove(self._handles)

    def clear(self) -> None:
        """Forget the samples."""
        self._newest = None
        self._uses.clear()
        self._columns.clear()

    def watch_call(self, layer: LayerModule, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the input of a call, and the gradient of its output as soon as there is one.

        Args:
            layer: it.
            inputs: its positional arguments.
            output: what it returned.
        """
        if (
            getattr(_inside, "depth", 0)
            or not inputs
            or not torch.is_grad_enabled()
            or not output.requires_grad
        ):
            return
        call, owner = LayerCall(self, layer, inputs[0].detach()), weakref.ref(self)

        kind = self.collector.spec.curvature
        if kind != "empirical":
            note_call(call, output)
        # What 'auto' becomes is known when the gradient arrives.
        if kind in ("mc", "ggn"):
            return

        def keep(g: Tensor) -> None:
            recorder = owner()
            if recorder is not None and not (carrying() or recorder.collector.spec.seeded):
                recorder._keep(call, g.detach())

        output.register_hook(keep)

    def _keep(self, call: LayerCall, g: Tensor) -> None:
        samples = _samples(call.layer, g)
        # A graph may outlive the iteration that it was recorded in.
        if self.collector.active and samples:
            self._thin()
            key = (call.layer, torch._C._current_graph_task_id(), samples)
            self._uses.setdefault(key, []).append(Use(call.z, g, part=call.part))
            self._newest = key, call

    def _thin(self) -> None:
        """The graph is done with the newest input: of that only what is needed lives on."""
        if self._newest is None or self._newest[0] not in self._uses:
            return
        key, call = self._newest
        layer, _, samples = key
        whole = self._uses[key][-1]
        use = thinned(layer, whole, samples, self.collector.spec)
        if use is not whole:
            call.z, call.part = use.z.clone(), True
            self._uses[key][-1] = use._replace(z=call.z)

    def keep_columns(self, call: LayerCall, source: Source, columns: Tensor) -> None:
        """Take columns that have been carried to the output of a call.

        Args:
            call: it.
            source: where they come from.
            columns: ``[R, *output.shape]``.
        """
        samples = _samples(call.layer, columns[0])
        if self.collector.active and samples:
            key = (call.layer, torch._C._current_graph_task_id(), samples)
            known = self._columns.setdefault(key, {}).setdefault(call, {})
            known[source] = known[source] + columns if source in known else columns

    def deliver(self) -> None:
        """Hand everything to the collector."""
        ranks: dict[Key, dict[Source, int]] = {}
        for key, calls in self._columns.items():
            ranks[key] = {s: len(part) for parts in calls.values() for s, part in parts.items()}
            self._uses[key] = _column_uses(calls, ranks[key])
        self._columns.clear()
        self._newest = None
        while self._uses:  # a layer's inputs and gradients end as they have been summed
            layer, task, batch = key = next(iter(self._uses))
            uses = self._uses.pop(key)
            sums = self.collector.new_sums(layer, ranks.get((layer, task, batch), {}))
            samples = sums.add(uses, batch, 1.0)
            sums.accept()
            sums.close(samples, batch, 1.0)
            self.collector.absorb(layer, sums)


class _Hook:
    """Forward hook that keeps nothing alive.

    A copied or unpickled model brings its hooks along: those belong to nobody, and remove
    themselves when they are first called.
    """

    def __init__(self, recorder: OutsideRecorder | None = None) -> None:
        self._recorder = None if recorder is None else weakref.ref(recorder)

    def __call__(self, layer: LayerModule, inputs: tuple[Any, ...], output: Tensor) -> None:
        recorder = None if self._recorder is None else self._recorder()
        if recorder is not None:
            recorder.watch_call(layer, inputs, output)
            return
        hooks = layer._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def _column_uses(
    calls: dict[LayerCall, dict[Source, Tensor]], ranks: dict[Source, int]
) -> list[Use]:
    """Each call with the columns of all sources side by side; zeros from one that missed it."""
    uses = []
    for call, parts in calls.items():
        like = next(iter(parts.values()))
        blocks = [
            parts[source] if source in parts else like.new_zeros(rank, *like.shape[1:])
            for source, rank in ranks.items()
        ]
        uses.append(Use(call.z, None, columns=torch.cat(blocks), part=call.part))
    return uses


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _samples(layer: LayerModule, z: Tensor) -> int:
    """Samples in a layer's input: 1 without a batch dimension."""
    unbatched = 1 if isinstance(layer, nn.Linear) else 1 + len(layer.kernel_size)
    return 1 if z.dim() == unbatched else z.shape[0]
