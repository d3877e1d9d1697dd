"""The optimizers that a task can be trained with: one row of a table each.

On the command line an optimizer is written as its name, followed by settings where the task's own
are not wanted: ``adam``, ``adam:lr=3e-3``, ``snopt:lr=0.5:update_freq=5``. The setting
``sensitivity`` is not passed to the optimizer; it chooses how the model computes its gradients, as
in ``adam:sensitivity=adjoint`` for torchdyn's own adjoint.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchdyn_snopt import SNOpt
from torchdyn_snopt.errors import InvalidInputError
from torchdyn_snopt.experiments import peers
from torchdyn_snopt.experiments.tasks import Task

DEFAULT_SENSITIVITY = "snopt"


@dataclass(frozen=True)
class OptimizerRow:
    """An optimizer as the experiments know it.

    Attributes:
        name: The name on the command line.
        title: The name in tables and figures.
        build: From a model and settings to the optimizer.
        reads: The callable whose parameters are the allowed settings.
        settings: Settings for every task, below those of the task.
        needs_closure: Whether a step evaluates the loss more than once.
        lr_range: Lowest and highest learning rate that tuning tries.
    """

    name: str
    title: str
    build: Callable[..., torch.optim.Optimizer]
    reads: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs_closure: bool = False
    lr_range: tuple[float, float] = (1e-3, 1e-1)

    @property
    def default_lr(self) -> float:
        """The learning rate without any setting."""
        probe = self.build(nn.Linear(1, 1), **self.settings)
        return float(probe.param_groups[0]["lr"])


def _on_parameters(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    def build(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
        return kind(model.parameters(), **settings)

    return build


OPTIMIZERS: dict[str, OptimizerRow] = {
    row.name: row
    for row in (
        OptimizerRow("snopt", "SNOpt", SNOpt, SNOpt, lr_range=(0.1, 10.0)),
        OptimizerRow(
            "snopt-paper", "SNOpt (paper)", SNOpt.from_paper, SNOpt, lr_range=(3e-3, 3e-1)
        ),
        OptimizerRow("adam", "Adam", _on_parameters(torch.optim.Adam), torch.optim.Adam),
        OptimizerRow("adamw", "AdamW", _on_parameters(torch.optim.AdamW), torch.optim.AdamW),
        OptimizerRow(
            "sgd",
            "SGD",
            _on_parameters(torch.optim.SGD),
            torch.optim.SGD,
            {"momentum": 0.9},
            lr_range=(3e-3, 3e-1),
        ),
        OptimizerRow("muon", "Muon", peers.muon, peers.muon),
        OptimizerRow("soap", "SOAP", peers.soap, peers.soap),
        OptimizerRow("shampoo", "Shampoo", peers.shampoo, peers.shampoo),
        OptimizerRow(
            "lbfgs", "L-BFGS", peers.lbfgs, peers.lbfgs, needs_closure=True, lr_range=(1e-2, 1.0)
        ),
    )
}


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer with the settings that the user asked for.

    Attributes:
        name: Its name in `OPTIMIZERS`.
        chosen: Settings that go before those of the task; without ``sensitivity``.
        sensitivity: How the model computes its gradients.
    """

    name: str
    chosen: Mapping[str, Any] = field(default_factory=dict)
    sensitivity: str = DEFAULT_SENSITIVITY

    @property
    def row(self) -> OptimizerRow:
        """The row of the table."""
        return OPTIMIZERS[self.name]

    @property
    def label(self) -> str:
        """Title and chosen settings, for tables and legends."""
        return " ".join([self.row.title, *self._extras()])

    @property
    def slug(self) -> str:
        """Name and chosen settings, as the name of a folder."""
        return re.sub(r"[^\w.+-]+", "-", "-".join([self.name, *self._extras()]))

    def settings(self, task: Task) -> dict[str, Any]:
        """The settings for a task: the row's, then the task's, then the chosen ones.

        Args:
            task: The task.

        Returns:
            Keyword arguments of the optimizer.
        """
        return {**self.row.settings, **task.settings.get(self.name, {}), **self.chosen}

    def build(self, model: nn.Module, task: Task) -> torch.optim.Optimizer:
        """The optimizer for a model.

        Args:
            model: Whose parameters to train.
            task: Whose settings to use.

        Returns:
            The optimizer.
        """
        return self.row.build(model, **self.settings(task))

    def _extras(self) -> list[str]:
        extras = dict(self.chosen)
        if self.sensitivity != DEFAULT_SENSITIVITY:
            extras["sensitivity"] = self.sensitivity
        return [f"{key}={_shown(value)}" for key, value in extras.items()]


def parse_specs(texts: Iterable[str], lr: float | None = None) -> list[OptimizerSpec]:
    """Read optimizers as written on the command line.

    Args:
        texts: Each one or several optimizers parted by commas.
        lr: A learning rate for those that name none themselves.

    Returns:
        The optimizers in their order, without repetitions.

    Raises:
        InvalidInputError: No optimizer, an unknown one, or an unreadable or unknown setting.
    """
    written = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if not written:
        raise InvalidInputError(
            "no optimizer is named",
            got=f"{list(texts)!r}",
            allowed=", ".join(OPTIMIZERS),
            do="name at least one, as in --optimizer snopt,adam",
        )
    specs = [_with_lr(parse_spec(text), lr) for text in written]
    return list({spec.slug: spec for spec in specs}.values())


def parse_spec(text: str) -> OptimizerSpec:
    """Read one optimizer, as in ``adam:lr=1e-2``.

    Args:
        text: Name, then settings, parted by colons.

    Returns:
        The optimizer.

    Raises:
        InvalidInputError: An unknown optimizer, or an unreadable or unknown setting.
    """
    name, *pairs = text.split(":")
    if name not in OPTIMIZERS:
        raise InvalidInputError(
            "there is no such optimizer",
            got=f"{name!r}",
            allowed=", ".join(OPTIMIZERS),
            do="choose one of these names",
        )
    chosen = dict(_parse_pair(pair, text) for pair in pairs)
    sensitivity = chosen.pop("sensitivity", DEFAULT_SENSITIVITY)
    _check_settings(name, chosen)
    return OptimizerSpec(name, chosen, sensitivity)


def _parse_pair(pair: str, text: str) -> tuple[str, Any]:
    key, sign, value = pair.partition("=")
    if not (sign and key.isidentifier() and value):
        raise InvalidInputError(
            "a setting of an optimizer cannot be read",
            got=f"{pair!r} in {text!r}",
            allowed="name:setting=value, and more of :setting=value",
            do="write it like adam:lr=1e-2",
        )
    return key, _value(value)


def _value(text: str) -> Any:
    """A number, True, False or None where the text is one, otherwise the text."""
    try:
        return ast.literal_eval(text[:1].upper() + text[1:] if text[:1].isalpha() else text)
    except (SyntaxError, ValueError):
        return text


def _check_settings(name: str, chosen: Mapping[str, Any]) -> None:
    parameters = inspect.signature(OPTIMIZERS[name].reads).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    allowed = [p.name for p in parameters if p.name not in {"self", "params", "model"}]
    unknown = [key for key in chosen if key not in allowed]
    if unknown:
        raise InvalidInputError(
            f"{name} has no such setting",
            got=", ".join(unknown),
            allowed=", ".join(["sensitivity", *allowed]),
            do="correct the name of the setting",
        )


def _with_lr(spec: OptimizerSpec, lr: float | None) -> OptimizerSpec:
    if lr is None or "lr" in spec.chosen:
        return spec
    return OptimizerSpec(spec.name, {"lr": lr, **spec.chosen}, spec.sensitivity)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
