"""Which parameters are horizons, who wants their second derivatives, and what a solve says of them.

A horizon is a parameter T at which integration ends (or ends lie at fractions of it). The seam that
makes one notes it here; an optimizer that moves it by second-order information watches it; a solve
whose times depend on a watched horizon leaves a sample. Nothing here keeps a parameter or a watch
alive.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor


@dataclass(frozen=True)
class HorizonSpec:
    """What is known of a horizon besides its value.

    Attributes:
        t0: where integration starts.
        bounds: lowest and highest t1.
        penalty: c of c/2·t1².
    """

    t0: float
    bounds: tuple[float, float]
    penalty: float


class Response(NamedTuple):
    """How a batch answers to parameters that have moved, with dL/dx at the ends held fixed.

    Attributes:
        slopes: change of each sample's a·F, ``[N]``.
        losses: a·δx, the change of each sample's part of the loss, ``[N]``.
    """

    slopes: Tensor
    losses: Tensor


class HorizonSample(Protocol):
    """One backward pass, as seen from the horizon."""

    task: int
    slopes: Tensor

    def respond(self) -> Response | None:
        """Solve again with the parameters as they are now.

        Returns:
            The response, or None if that solve failed and failures are skipped.
        """


_specs = WeakTensorKeyDictionary()


def register_horizon(t1: Tensor, spec: HorizonSpec) -> None:
    """Note that a parameter is a horizon.

    Args:
        t1: the parameter, 0-d.
        spec: what is known of it.
    """
    _specs[t1] = spec


def horizon_spec(parameter: Tensor) -> HorizonSpec | None:
    """What is known of a parameter as a horizon.

    Args:
        parameter: any parameter.

    Returns:
        Its spec, or None if it is no horizon.
    """
    spec: HorizonSpec | None = _specs.get(parameter)
    return spec


class HorizonWatch:
    """Takes the samples of some horizons while it is active."""

    def __init__(self, horizons: Iterable[Tensor]) -> None:
        """Register, inactive.

        Args:
            horizons: parameters to watch.
        """
        self.active = False
        self._samples = WeakTensorKeyDictionary()
        self.watch(horizons)
        _watches.add(self)

    def watch(self, horizons: Iterable[Tensor]) -> None:
        """Watch further horizons.

        Args:
            horizons: parameters.
        """
        for horizon in horizons:
            self._samples[horizon] = []

    def watches(self, horizon: Tensor) -> bool:
        """Whether a horizon is watched.

        Args:
            horizon: a parameter.

        Returns:
            True if so.
        """
        return horizon in self._samples

    def absorb(self, horizon: Tensor, sample: HorizonSample) -> None:
        """Take what one solve left.

        Args:
            horizon: a watched parameter.
            sample: of one backward pass.
        """
        self._samples[horizon].append(sample)

    def samples(self, horizon: Tensor) -> list[HorizonSample]:
        """What solves have left since the last `clear`.

        Args:
            horizon: a parameter.

        Returns:
            Samples; none for a parameter that is not watched.
        """
        samples: list[HorizonSample] = self._samples.get(horizon, [])
        return samples

    def clear(self) -> None:
        """Forget the samples, and the states that they hold."""
        for samples in self._samples.values():
            samples.clear()


_watches: weakref.WeakSet[HorizonWatch] = weakref.WeakSet()


@dataclass(frozen=True)
class HorizonLink:
    """A watched horizon on which the times of a solve depend.

    Attributes:
        horizon: the parameter.
        weights: derivative of each evaluation time in it.
    """

    horizon: Tensor
    weights: tuple[float, ...]

    def deliver(self, sample: HorizonSample) -> None:
        """Hand a sample to everybody who wants it.

        Args:
            sample: of one backward pass.
        """
        for watch in _watches:
            if watch.active and watch.watches(self.horizon):
                watch.absorb(self.horizon, sample)


def wanted_horizons(t: Tensor) -> tuple[HorizonLink, ...]:
    """Watched horizons behind evaluation times, found in the graph that made them.

    Args:
        t: evaluation times ``[T]``.

    Returns:
        Links; none, at no cost, while nobody watches.
    """
    active = [watch for watch in _watches if watch.active]
    if not active or not t.requires_grad:
        return ()
    wanted = [leaf for leaf in _leaves(t) if any(watch.watches(leaf) for watch in active)]
    return tuple(HorizonLink(leaf, _weights(t, leaf)) for leaf in wanted)


def _leaves(t: Tensor) -> Iterator[Tensor]:
    """Leaf tensors of a graph, each once."""
    waiting, seen = [t.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting.extend(edge for edge, _ in node.next_functions)


def _weights(t: Tensor, leaf: Tensor) -> tuple[float, ...]:
    """dt_i/d(leaf) for each i."""
    (rows,) = torch.autograd.grad(
        t,
        leaf,
        torch.eye(len(t), dtype=t.dtype, device=t.device),
        is_grads_batched=True,
        retain_graph=True,
    )
    return tuple(rows.double().reshape(len(t), -1).sum(1).tolist())
