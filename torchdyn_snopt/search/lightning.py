"""Reports from Lightning training, under both of its names."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any, Literal

from torchdyn_snopt.errors import InvalidInputError, UnsupportedError
from torchdyn_snopt.search.outcome import Progress, Report

Namespace = Literal["pytorch_lightning", "lightning.pytorch"]
NAMESPACES: tuple[Namespace, ...] = ("pytorch_lightning", "lightning.pytorch")


def report_callback(
    report: Report,
    measure: Callable[[Any], dict[str, float]],
    *,
    monitor: str = "val_error",
    namespace: Namespace = "pytorch_lightning",
) -> Any:
    """A Lightning callback that reports after every validation epoch.

    The two packages have separate class trees: a callback of the one is refused by the trainer of
    the other, so that of the trainer in use has to be named.

    Args:
        report: What the training function of an objective was given; what it raises ends training.
        measure: From the module to 'nfe', 'evaluations' and 't1', the rest of `Progress`.
        monitor: The logged metric that is the validation error.
        namespace: The package whose Trainer runs.

    Returns:
        A callback for ``Trainer(callbacks=[...])``.

    Raises:
        InvalidInputError: There is no such package among the two.
        UnsupportedError: It is not installed.
    """
    if namespace not in NAMESPACES:
        raise InvalidInputError(
            "Lightning has no such name",
            got=f"namespace={namespace!r}",
            allowed=", ".join(NAMESPACES),
            do="name the package that your Trainer comes from",
        )
    try:
        package = importlib.import_module(namespace)
    except ImportError as error:
        raise UnsupportedError(
            "Lightning is not installed under this name",
            got=f"namespace={namespace!r}",
            allowed="an installed package",
            do=f"pip install {namespace.partition('.')[0].replace('_', '-')}",
        ) from error
    hooks = _Hooks(report, measure, monitor)
    return type("HorizonReport", (package.Callback,), hooks.methods())()


class _Hooks:
    """What the callback does, whatever its base class."""

    def __init__(
        self, report: Report, measure: Callable[[Any], dict[str, float]], monitor: str
    ) -> None:
        self._report, self._measure, self._monitor = report, measure, monitor
        self._started = time.perf_counter()

    def methods(self) -> dict[str, Any]:
        """Hooks by their names in Lightning."""

        def on_train_start(callback: Any, trainer: Any, module: Any) -> None:
            self._started = time.perf_counter()

        def on_validation_end(callback: Any, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking:
                self._report(self._progress(trainer, module))

        return {"on_train_start": on_train_start, "on_validation_end": on_validation_end}

    def _progress(self, trainer: Any, module: Any) -> Progress:
        metrics = trainer.callback_metrics
        if self._monitor not in metrics:
            raise InvalidInputError(
                "the monitored metric was not logged",
                got=f"monitor={self._monitor!r}",
                allowed=", ".join(sorted(metrics)) or "metrics logged in validation_step",
                do=f"call self.log({self._monitor!r}, ...) in validation_step",
            )
        figures = self._measure(module)
        return Progress(
            epoch=trainer.current_epoch + 1,
            error=float(metrics[self._monitor]),
            nfe=figures["nfe"],
            evaluations=int(figures["evaluations"]),
            seconds=time.perf_counter() - self._started,
            t1=figures["t1"],
        )
