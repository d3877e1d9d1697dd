"""What SNOpt tells of a training by Lightning's Trainer, in either of its two namespaces.

torchdyn's models are `pytorch_lightning` modules; many users train by `lightning.pytorch`. The two
have classes of their own, so that the callback here derives from those of all that are installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchdyn_snopt.curvature.horizon import horizon_spec
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.optim.snopt import SNOpt
from torchdyn_snopt.torchdyn_plugin import solved_models

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

__all__ = ["SNOptMonitor"]

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def _callback_classes() -> Iterator[type]:
    for name in NAMESPACES:
        try:
            namespace = importlib.import_module(name)
        except ImportError:  # one of them is enough
            continue
        yield namespace.Callback


class SNOptMonitor(*_callback_classes()):  # type: ignore[misc]  # known when they are imported
    """Logs after each step of SNOpt what only it and the solver know.

    Under ``prefix``: ``nfe_forward`` and ``nfe_backward`` (field evaluations of the last solves of
    all ODEs together), ``t1`` (of each horizon), ``damping``, ``clip_factor`` (of the trust region,
    where there is one), ``curvature_seconds`` (of the last refresh, 0 between refreshes) and
    ``skipped_steps``. They go where ``self.log`` of the module goes: to the loggers, and into
    ``trainer.callback_metrics``.

    Args:
        prefix: of all names.
        every_n_steps: batches from one entry to the next.

    Raises:
        InvalidInputError: an interval that is no count of batches.

    Example:
        >>> trainer = Trainer(callbacks=[SNOptMonitor()])
    """

    def __init__(self, prefix: str = "snopt/", every_n_steps: int = 1) -> None:
        if not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise InvalidInputError(
                "the interval between entries is no count of batches",
                got=f"every_n_steps={every_n_steps!r}",
                allowed="a whole number of at least 1",
                do="leave every_n_steps at 1",
            )
        self.prefix, self.every_n_steps = prefix, every_n_steps
        self._seconds = 0.0

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log; called by the Trainer.

        Args:
            trainer: it.
            pl_module: what it trains.
            outputs: of the training step.
            batch: of data.
            batch_idx: its number.
        """
        optimizers = [o for o in trainer.optimizers if isinstance(o, SNOpt)]
        if not optimizers or batch_idx % self.every_n_steps:
            return
        figures = {**_solves(pl_module), **self._steps(optimizers)}
        named = {self.prefix + name: float(value) for name, value in figures.items()}
        pl_module.log_dict(named, on_step=True, on_epoch=False)

    def _steps(self, optimizers: list[SNOpt]) -> dict[str, float]:
        seconds = sum(optimizer.curvature_seconds for optimizer in optimizers)
        spent, self._seconds = seconds - self._seconds, seconds
        figures = {
            "damping": float(optimizers[0].param_groups[0]["damping"]),
            "curvature_seconds": spent,
            "skipped_steps": float(sum(optimizer.skipped_steps for optimizer in optimizers)),
        }
        factors = [float(o.report["clip_factor"]) for o in optimizers if "clip_factor" in o.report]
        return figures | ({"clip_factor": min(factors)} if factors else {})


def _solves(model: nn.Module) -> dict[str, float]:
    figures: dict[str, float] = {}
    stats = solved_models(model)
    if stats:
        figures["nfe_forward"] = sum(s.nfe_forward for s in stats)
        figures["nfe_backward"] = sum(s.nfe_backward for s in stats)
    horizons = [(n, p) for n, p in model.named_parameters() if horizon_spec(p) is not None]
    for name, parameter in horizons:
        figures["t1" if len(horizons) == 1 else f"t1.{name}"] = parameter.item()
    if not horizons and len(stats) == 1 and stats[0].t1 is not None:
        figures["t1"] = stats[0].t1
    return figures
