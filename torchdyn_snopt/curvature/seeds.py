"""Seeds of rank R from the loss, pulled back through whatever stands behind a solve (Prop. 2).

The loss's own backward pass hands over columns y_r at its inputs. Before the ordinary backward pass
goes on, one batched vector-Jacobian product carries them to the next stations: every layer whose
curvature is wanted and that no solve hides, and every solve, which keeps them until its own
backward pass takes them along as further adjoints. What a solve returns at its first state is then
pulled further in the same way. Each loss is a source of its own: columns of one source that reach
a station on several ways are added, those of different sources stand side by side.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch.autograd.graph import GradientEdge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from torch.autograd.graph import Node

    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.outside import OutsideRecorder

_METADATA = "torchdyn_snopt"
_thread = threading.local()


class Source:
    """One loss in one backward pass; columns are told apart by it."""

    def __init__(self, samples: int) -> None:
        """Note the backward pass that is running.

        Args:
            samples: N of the loss.
        """
        self.samples = samples
        self.task: int = torch._C._current_graph_task_id()


class SolveStation:
    """Where a solve keeps the columns at its output until its backward pass takes them.

    Kept as the attribute ``snopt_station`` of the solve's node in the autograd graph.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._columns: dict[Source, Tensor] = {}
        #: Set while columns are carried: the solve then lets nothing pass.
        self.closed = False

    def add(self, source: Source, columns: Tensor) -> None:
        """Take columns.

        Args:
            source: where they come from.
            columns: ``[R, *output.shape]``.
        """
        known = self._columns.get(source)
        self._columns[source] = columns if known is None else known + columns

    def take(self) -> dict[Source, Tensor]:
        """Hand over what has arrived.

        Returns:
            Columns by their source; often none.
        """
        taken, self._columns = self._columns, {}
        return taken


class LayerCall:
    """A call of a layer outside all solves, noted at its output's node in the graph.

    Attributes:
        part: whether z has become a part of the call's input, as in `Use`.
    """

    def __init__(self, recorder: OutsideRecorder, layer: LayerModule, z: Tensor) -> None:
        """Note it.

        Args:
            recorder: takes the columns; not kept alive.
            layer: the layer.
            z: its input.
        """
        self.recorder, self.layer, self.z = weakref.ref(recorder), layer, z
        self.part = False


class _Stop(NamedTuple):
    edge: GradientEdge
    station: SolveStation | None
    calls: list[LayerCall]


def note_call(call: LayerCall, output: Tensor) -> None:
    """Leave a layer's call in the graph, where `carry` finds it.

    Args:
        call: it.
        output: the layer's output, requiring gradients.
    """
    edge = torch.autograd.graph.get_gradient_edge(output)
    _notes(edge.node).setdefault(_METADATA, []).append((edge.output_nr, call))


def _notes(node: Node) -> dict[str, list[tuple[int, LayerCall]]]:
    """The dictionary that autograd keeps with each node (a property, annotated as a method)."""
    return cast("dict[str, list[tuple[int, LayerCall]]]", node.metadata)


def carrying() -> bool:
    """Whether this thread is carrying columns: ordinary gradient hooks are not meant then.

    Returns:
        True inside `carry`.
    """
    return bool(getattr(_thread, "depth", 0))


class Held:
    """Backward passes that have ended at a loss, and may go on later."""

    def __init__(self) -> None:
        """Start empty."""
        self._values: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def add(self, value: Tensor, gradient: Tensor) -> None:
        """Hold a pass.

        Args:
            value: of the loss, with its graph.
            gradient: what has arrived there.
        """
        self._values.append(value)
        self._gradients.append(gradient)

    def go_on(self) -> None:
        """Let the passes go on, to the gradients of everything behind the losses."""
        values, gradients = self._values, self._gradients
        self._values, self._gradients = [], []
        if values:
            torch.autograd.backward(values, gradients)


@contextmanager
def trial() -> Iterator[Held]:
    """Losses are asked for their value alone: a backward pass from one ends there.

    So a closure that calls ``backward`` costs a forward pass only.

    Yields:
        The passes that have ended.
    """
    _thread.trial = Held()
    try:
        yield _thread.trial
    finally:
        _thread.trial = None


def current_trial() -> Held | None:
    """The `trial` that this thread is inside of.

    Returns:
        None outside.
    """
    return getattr(_thread, "trial", None)


def carry(outputs: Sequence[Tensor], columns: Sequence[Tensor], sources: dict[Source, int]) -> None:
    """Carry columns from some tensors to the next stations.

    Args:
        outputs: tensors of one graph.
        columns: ``[R, *output.shape]`` for each.
        sources: number of columns of each source, in their order; R together.
    """
    live = [(o, c) for o, c in zip(outputs, columns, strict=True) if o.requires_grad]
    if not live:
        return
    starts = [torch.autograd.graph.get_gradient_edge(o).node for o, _ in live]
    stops, stations = _survey(starts)
    if not stops:
        return
    edges = [stop.edge for stop in stops]
    with _carried(stations):
        gradients = _batched([o for o, _ in live], edges, [c for _, c in live])
    for stop, gradient in zip(stops, gradients, strict=True):
        if gradient is None:
            continue
        parts = gradient.detach().split(list(sources.values()))
        for source, part in zip(sources, parts, strict=True):
            if stop.station is not None:
                stop.station.add(source, part)
            for call in stop.calls:
                recorder = call.recorder()
                if recorder is not None:
                    recorder.keep_columns(call, source, part)


def leaves_behind(value: Tensor) -> Iterator[Tensor]:
    """The leaves that a tensor depends on, through solves too.

    Args:
        value: it.

    Yields:
        Each once: parameters, and whatever else requires gradients.
    """
    for node in _walk([value.grad_fn], set(), cross=True):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf


def _survey(starts: Sequence[Node]) -> tuple[list[_Stop], list[SolveStation]]:
    """Stations that can be reached without crossing a solve, and all solves."""
    stops: list[_Stop] = []
    stations: list[SolveStation] = []
    seen: set[Node] = set()
    behind: list[Node | None] = []
    for node in _walk(list(starts), seen):
        station = getattr(node, "snopt_station", None)
        if station is None:
            stops += _layer_stops(node)
        else:
            stops.append(_Stop(GradientEdge(node, 0), station, []))
            stations.append(station)
            behind += [following for following, _ in node.next_functions]
    for node in _walk(behind, seen, cross=True):
        station = getattr(node, "snopt_station", None)
        if station is not None:
            stations.append(station)
    return stops, stations


def _walk(front: list[Node | None], seen: set[Node], *, cross: bool = False) -> Iterator[Node]:
    """Every node not yet seen, once; beyond a solve only on demand."""
    while front:
        node = front.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if cross or getattr(node, "snopt_station", None) is None:
            front += [following for following, _ in node.next_functions]


def _layer_stops(node: Node) -> list[_Stop]:
    by_output: dict[int, list[LayerCall]] = {}
    for number, call in _notes(node).get(_METADATA, ()):
        by_output.setdefault(number, []).append(call)
    return [_Stop(GradientEdge(node, n), None, calls) for n, calls in by_output.items()]


@contextmanager
def _carried(stations: Sequence[SolveStation]) -> Iterator[None]:
    """Close all solves of the graph, and tell ordinary hooks to look away."""
    _thread.depth = getattr(_thread, "depth", 0) + 1
    for station in stations:
        station.closed = True
    try:
        yield
    finally:
        _thread.depth -= 1
        for station in stations:
            station.closed = False


def _batched(
    outputs: list[Tensor], edges: list[GradientEdge], columns: list[Tensor]
) -> list[Tensor | None]:
    """All columns in one backward pass, or one by one where an operation cannot be mapped."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    if len(columns[0]) > 1:  # for one alone vmap's machinery costs more than it saves
        with suppress(RuntimeError):  # no batching rule; a genuine failure repeats itself below
            return list(
                torch.autograd.grad(outputs, edges, columns, is_grads_batched=True, **options)
            )
    single = [
        torch.autograd.grad(outputs, edges, list(seeds), **options)
        for seeds in zip(*columns, strict=True)
    ]
    stacked: list[Tensor | None] = []
    for gradients in zip(*single, strict=True):
        present = [g for g in gradients if g is not None]
        stacked.append(torch.stack(present) if present else None)
    return stacked
