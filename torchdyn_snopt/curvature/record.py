"""`record_curvature`: the Kronecker factors of a model's layers, without an optimizer."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from torchdyn_snopt.curvature.factors import CurvatureKind, CurvatureSpec, Factors, Reduction
from torchdyn_snopt.curvature.layers import WeightSharing, is_supported
from torchdyn_snopt.curvature.outside import OutsideRecorder
from torchdyn_snopt.curvature.registry import Collector
from torchdyn_snopt.errors import CurvatureError, check_instance

if TYPE_CHECKING:
    from collections.abc import Iterator


class RecordedCurvature:
    """What a `record_curvature` block has recorded so far."""

    def __init__(self, module: nn.Module, spec: CurvatureSpec) -> None:
        """Look for the layers, without hooks.

        Args:
            module: the model.
            spec: what to collect.

        Raises:
            CurvatureError: the model has no layer whose curvature can be collected.
        """
        check_instance("module", module, nn.Module, allowed="a module", do="pass the whole model")
        self._layers = {
            name: layer
            for name, layer in module.named_modules()
            if is_supported(layer) and layer.weight.requires_grad
        }
        if not self._layers:
            raise CurvatureError(
                "there is no layer to record",
                got=f"a {type(module).__name__} without trainable Linear or Conv layers",
                allowed="a module with trainable Linear, Conv1d, Conv2d or Conv3d layers",
                do="pass the whole model",
            )
        parameters = [p for layer in self._layers.values() for p in layer.parameters()]
        self._collector = Collector(spec, parameters)
        self._recorder = OutsideRecorder(self._collector, self._layers.values())
        self._finished: dict[str, Factors] | None = None

    @property
    def factors(self) -> dict[str, Factors]:
        """The factors A and B of each layer that a backward pass has reached, by its name."""
        if self._finished is not None:
            return self._finished
        self._recorder.deliver()
        found = {
            name: self._collector.factors(layer.weight) for name, layer in self._layers.items()
        }
        return {name: factors for name, factors in found.items() if factors is not None}

    def start(self) -> None:
        """Begin to record."""
        self._collector.active = True
        self._recorder.start()

    def finish(self) -> None:
        """Stop recording, remove all hooks and keep the factors alone."""
        self._collector.active = False
        self._recorder.stop()
        self._finished = self.factors
        self._collector.clear()


@contextmanager
def record_curvature(
    module: nn.Module,
    *,
    curvature: CurvatureKind = "empirical",
    weight_sharing: WeightSharing = "expand",
    reduction: Reduction = "mean",
) -> Iterator[RecordedCurvature]:
    """Record the Kronecker factors of all layers during the backward passes inside a block.

    For layers in the field of an ODE solved by 'snopt' (or `odeint_snopt`) only the backward pass
    has to run inside the block; for layers outside of it, the forward pass as well.

    Example::

        with record_curvature(model) as curvature:
            loss_fn(model(x), y).backward()
        curvature.factors["0"].A

    Args:
        module: the model; its names of layers, as in ``named_modules()``, name the factors.
        curvature: 'empirical', the outer products of each sample's own gradient; 'mc' or 'ggn',
            those of the seeds that this package's losses send off. Then the forward pass and the
            loss, too, have to run inside the block.
        weight_sharing: 'expand' or 'reduce': positions summed before the outer product.
        reduction: how the loss combines the samples, 'mean' or 'sum'.

    Yields:
        The recording; its ``factors`` map a layer's name to A ``[in(+1), in(+1)]`` and B
        ``[out, out]`` (with a leading dimension of groups for a grouped convolution).
    """
    spec = CurvatureSpec(curvature, weight_sharing, reduction)
    recorded = RecordedCurvature(module, spec)
    recorded.start()
    try:
        yield recorded
    finally:
        recorded.finish()
