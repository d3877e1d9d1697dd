"""Who wants which layer's curvature: a weak registry from parameters to collectors.

A collector belongs to an optimizer or to a `record_curvature` block. A backward solve asks for the
active collectors of the layers in its field; when there are none it does no work for curvature at
all. Nothing here keeps a model, a parameter or a collector alive.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from torchdyn_snopt.curvature.factors import CurvatureSpec, Factors, LayerSums, Totals
from torchdyn_snopt.curvature.layers import is_supported
from torchdyn_snopt.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.curvature.recording import Owner, Sums
    from torchdyn_snopt.curvature.seeds import Source

_collectors: weakref.WeakSet[Collector] = weakref.WeakSet()


class Collector:
    """Collects the factors of the layers whose weights it watches, while it is active."""

    #: Whether columns are wanted sample by sample, of all parameters.
    per_sample = False

    def __init__(self, spec: CurvatureSpec, parameters: Iterable[Tensor]) -> None:
        """Register, inactive.

        Args:
            spec: what to collect.
            parameters: weights and biases of the layers to watch; no others are collected.
        """
        self.spec = spec
        self.active = False
        #: Whether a loss has sent off seeds since the last `clear`.
        self.seeded = False
        self._watched = WeakTensorKeyDictionary()
        self._sums = WeakTensorKeyDictionary()
        self.watch(parameters)
        _collectors.add(self)

    def watch(self, parameters: Iterable[Tensor]) -> None:
        """Watch further layers.

        Args:
            parameters: their weights and biases.
        """
        for parameter in parameters:
            self._watched[parameter] = True

    def watches(self, parameter: Tensor) -> bool:
        """Whether a weight or a bias is watched.

        Args:
            parameter: it.

        Returns:
            True if so.
        """
        return parameter in self._watched

    def takes_bias(self, module: LayerModule) -> bool:
        """Whether the curvature of a layer covers its bias.

        Args:
            module: the layer.

        Returns:
            True for a layer with a trainable bias that is watched like its weight.
        """
        bias = module.bias
        return bias is not None and bias.requires_grad and self.watches(bias)

    def check_rank(self, rank: int, samples: int) -> None:
        """Told how many columns a loss is about to send off; factors take any number.

        Args:
            rank: R.
            samples: N.
        """

    def new_sums(self, owner: Owner, ranks: dict[Source, int]) -> Sums:
        """Sums for one layer in one pass.

        Args:
            owner: the layer.
            ranks: number of columns of each source; of no interest for factors.

        Returns:
            Empty sums.
        """
        assert isinstance(owner, nn.Module)
        return LayerSums(owner, self.spec, bias=self.takes_bias(owner))

    def factors(self, weight: Tensor) -> Factors | None:
        """What was collected for a layer since the last `clear`.

        Args:
            weight: its weight.

        Returns:
            The factors, or None.
        """
        sums: LayerSums | None = self._sums.get(weight)
        return None if sums is None else sums.factors()

    def collected(self) -> list[tuple[LayerModule, Factors]]:
        """Everything collected since the last `clear`.

        Returns:
            Each layer with its factors.
        """
        pairs = [(sums.module, sums.factors()) for sums in self._sums.values()]
        return [(module, factors) for module, factors in pairs if factors is not None]

    def drain(self) -> Iterator[tuple[LayerModule, Totals]]:
        """What was summed up since the last `clear`, layer by layer; it is forgotten on the way.

        Yields:
            Each layer with its totals.
        """
        for weight in list(self._sums):
            sums = self._sums.pop(weight)
            totals = sums.totals()
            if totals is not None:
                module = sums.module
                del sums  # so that one layer's factors live at a time
                yield module, totals
                del totals

    def absorb(self, owner: Owner, sums: Sums) -> None:
        """Take over the sums of one finished backward pass.

        Args:
            owner: the layer.
            sums: its sums, closed.

        Raises:
            UnsupportedError: two layers share a weight, and only one of them has a bias.
        """
        assert isinstance(owner, nn.Module)
        assert isinstance(sums, LayerSums)
        known: LayerSums | None = self._sums.get(owner.weight)
        if known is not None and known.bias != sums.bias:
            raise UnsupportedError(
                "two layers share a weight, but only one of them has a trainable bias",
                got=f"{known.module} and {owner} with one weight",
                allowed="layers that share their weight and are alike",
                do="give both layers a bias or none, or put the biases into another group",
            )
        if known is None:
            self._sums[owner.weight] = sums
        else:
            known.absorb(sums)

    def clear(self) -> None:
        """Forget what was collected, and what seeds were offered."""
        self._sums.clear()
        self.seeded = False
        self.spec = replace(self.spec, offered=None)


def active_collectors() -> list[Collector]:
    """Collectors that want curvature from the backward pass that is about to run.

    Returns:
        Those that are active, usually none or one.
    """
    return [collector for collector in _collectors if collector.active]


def wanted_columns(takers: Iterable[Collector] = ()) -> Literal["mc", "ggn"] | None:
    """Which seeds of the loss an active collector waits for.

    Args:
        takers: collectors of kind 'auto' that have been offered some.

    Returns:
        'mc' or 'ggn'; None when the gradients' own curvature is enough for all.

    Raises:
        UnsupportedError: both are waited for at the same time.
    """
    kinds = {c.spec.curvature for c in _collectors if c.active} & {"mc", "ggn"}
    if len(kinds) > 1:
        raise UnsupportedError(
            "one backward pass cannot carry two kinds of seeds",
            got="active collectors with curvature='mc' and with curvature='ggn'",
            allowed="one of them at a time",
            do="give all parameter groups and record_curvature the same curvature",
        )
    kinds = kinds or {c.spec.kind for c in takers}
    if "mc" in kinds:
        return "mc"
    return "ggn" if kinds else None


def open_collectors() -> list[Collector]:
    """Active collectors that take seeds of a loss where there are some.

    Returns:
        Those of kind 'auto'.
    """
    return [c for c in _collectors if c.active and c.spec.curvature == "auto"]


def offer_seeds(takers: Iterable[Collector], kind: Literal["mc", "ggn"] | None) -> None:
    """Let collectors of kind 'auto' wait for the seeds of a loss.

    Args:
        takers: them.
        kind: that the loss speaks of; 'mc' when None. What other collectors ask for goes first: one
            backward pass carries one kind.
    """
    offered = wanted_columns() or kind or "mc"
    for collector in takers:
        collector.spec = replace(collector.spec, offered=offered)


def may_be_seeded() -> bool:
    """Whether seeds may come back through what is being evaluated.

    Returns:
        True if an active collector waits for them, or takes them if there are some.
    """
    return any(c.active and c.spec.curvature != "empirical" for c in _collectors)


def seeded_collectors() -> list[Collector]:
    """Active collectors that wait for seeds of the loss.

    Returns:
        Usually none or one.
    """
    return [c for c in _collectors if c.active and c.spec.seeded]


def wanted_layers(
    modules: Iterable[nn.Module], collectors: Iterable[Collector]
) -> dict[LayerModule, list[Collector]]:
    """Layers whose curvature somebody wants.

    Args:
        modules: candidates, e.g. all modules of a field.
        collectors: active collectors.

    Returns:
        Each wanted layer with the collectors that want it; empty if none.
    """
    wanted: dict[LayerModule, list[Collector]] = {}
    collectors = list(collectors)
    for module in modules:
        if is_supported(module) and module.weight.requires_grad:
            takers = [c for c in collectors if c.watches(module.weight)]
            if takers:
                wanted[module] = takers
    return wanted


_failed = WeakTensorKeyDictionary()


def mark_failed(parameters: Iterable[Tensor]) -> None:
    """Note that a solve over these parameters failed and was skipped.

    Args:
        parameters: θ of the solve.
    """
    for parameter in parameters:
        _failed[parameter] = True


def take_failed(parameters: Iterable[Tensor]) -> bool:
    """Whether a solve over any of these parameters failed since the last call; forgets it.

    Args:
        parameters: an optimizer's parameters.

    Returns:
        True if so.
    """
    if not _failed:
        return False
    failed = [_failed.pop(parameter, False) for parameter in parameters]
    return any(failed)
