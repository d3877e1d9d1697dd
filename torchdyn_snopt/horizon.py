"""The integration horizon as a parameter of the model (the paper's Section 3.4)."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchdyn_snopt.curvature.horizon import HorizonSpec, register_horizon
from torchdyn_snopt.errors import (
    InvalidInputError,
    UnsupportedError,
    check_instance,
    check_real,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_logger = logging.getLogger(__name__)

ENDS = (0.0, 1.0)
FRACTIONS = "horizon_fractions"  # where a model keeps those of its evaluation times


class Horizon(nn.Module):
    """The time t1 at which integration ends, as a trainable parameter.

    SNOpt moves it by the paper's feedback policy (Eq. 16), any other optimizer by the exact
    gradient (Massaroli et al. 2020). The bounds hold exactly: SNOpt projects t1 with each step, and
    whatever else has moved it out is undone, on the parameter itself, when it is next read or
    saved. The gradient at a bound is that of the loss, so that t1 can leave it again.

    Args:
        t1: first value.
        t0: where integration starts; fixed.
        penalty: c of `penalty`, for longer integration.
        bounds: lowest and highest t1, both above t0.

    Raises:
        InvalidInputError: values that span no interval, or a negative penalty.
    """

    def __init__(
        self,
        t1: float = 1.0,
        t0: float = 0.0,
        *,
        penalty: float = 0.0,
        bounds: tuple[float, float] = (1e-2, 10.0),
    ) -> None:
        super().__init__()
        low, high = _pair(bounds)
        t1 = check_real("t1", t1, do="pass t1=1.0, say")
        t0 = check_real("t0", t0, do="leave t0 at 0.0")
        penalty = check_real("penalty", penalty, do="pass penalty=0.1, say")
        _check(t1, t0, penalty, low, high)
        self.spec = HorizonSpec(t0, (low, high), penalty)
        self.t1 = nn.Parameter(torch.tensor(t1, dtype=_wide(torch.get_default_dtype())))
        self._warned = False
        register_horizon(self.t1, self.spec)

    def t_span(self, fractions: Sequence[float] = ENDS) -> Tensor:
        """Evaluation times, differentiable in t1.

        Args:
            fractions: of the horizon, increasing from 0 to 1.

        Returns:
            ``[T]``; the first is t0 and the last is t1, without rounding.
        """
        check_fractions(fractions)
        self.project()
        register_horizon(self.t1, self.spec)
        start = self.t1.new_tensor(self.spec.t0)
        inner = [start + f * (self.t1 - start) for f in fractions[1:-1]]
        return torch.stack([start, *inner, self.t1])

    def penalty(self) -> Tensor:
        """c/2·t1² of Eq. 15, to be added to the loss.

        Returns:
            0-d tensor.
        """
        self.project()
        return 0.5 * self.spec.penalty * self.t1.square()

    @torch.no_grad()
    def project(self) -> None:
        """Put t1 back into its bounds; at one of them, say so once.

        Raises:
            InvalidInputError: t1 is NaN.
        """
        value, (low, high) = self.t1.item(), self._bounds()
        if math.isnan(value):
            raise InvalidInputError(
                "the horizon is not a number",
                got="t1 = nan",
                allowed=f"a time in [{low:g}, {high:g}]",
                do="look for a loss or a gradient that is not finite, and lower the learning rate",
            )
        if not low <= value <= high:
            self.t1.fill_(min(max(value, low), high))
        if not low < value < high and not self._warned:
            self._warned = True
            end = "lower" if value <= low else "upper"
            _logger.warning(
                "t1 has reached its %s bound %g; it stays within the bounds (%g, %g). A penalty "
                "keeps it from growing, a smaller one from shrinking.",
                *(end, low if value <= low else high, low, high),
            )

    def _bounds(self) -> tuple[float, float]:
        """The bounds as numbers of the parameter's dtype."""
        low, high = self.t1.new_tensor(self.spec.bounds).tolist()
        return low, high

    def extra_repr(self) -> str:
        """The value with what belongs to it.

        Returns:
            As in ``t1=1, t0=0, penalty=0, bounds=(0.01, 10)``.
        """
        low, high = self.spec.bounds
        return (
            f"t1={self.t1.item():.6g}, t0={self.spec.t0:g}, penalty={self.spec.penalty:g}, "
            f"bounds=({low:g}, {high:g})"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Horizon:
        """Move, but keep t1 in at least float32: narrower types would swallow its small steps."""
        value = self.t1.detach().clone()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.t1.dtype != _wide(self.t1.dtype):
            self.t1.data = value.to(self.t1.device, torch.float32)
        register_horizon(self.t1, self.spec)
        return self

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.project()
        super()._save_to_state_dict(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register_horizon(self.t1, self.spec)


def learn_horizon(
    node: nn.Module,
    t1: float | Horizon = 1.0,
    t0: float = 0.0,
    *,
    penalty: float = 0.0,
    bounds: tuple[float, float] = (1e-2, 10.0),
    fractions: Sequence[float] = ENDS,
) -> Horizon:
    """Make the horizon of a torchdyn model trainable: calls without t_span integrate over it.

    The horizon becomes a submodule of the model, so that it is among its parameters, in its
    state_dict and in its copies. A second call replaces the first one's horizon.

    Args:
        node: a torchdyn model, called as ``node(x)`` or ``node(x, t_span)``.
        t1: first value, or a Horizon, to share that with other models.
        t0: where integration starts.
        penalty: c of c/2·t1², which `Horizon.penalty` returns for the loss.
        bounds: lowest and highest t1.
        fractions: evaluation times as fractions of the horizon, from 0 to 1.

    Returns:
        The horizon.

    Raises:
        UnsupportedError: a model whose call does not take t_span.

    Examples:
        >>> horizon = learn_horizon(node, penalty=0.1)
        >>> loss = criterion(model(x), y) + horizon.penalty()
    """
    check_instance(
        "node",
        node,
        nn.Module,
        allowed="a torchdyn model such as NeuralODE",
        do="pass the NeuralODE itself",
    )
    if "t_span" not in inspect.signature(node.forward).parameters:
        raise UnsupportedError(
            "the horizon of this model cannot be set from outside",
            got=f"{type(node).__name__}, whose call takes no t_span",
            allowed="a torchdyn model such as NeuralODE",
            do="pass the NeuralODE itself, not the module around it; or use Horizon and its t_span",
        )
    check_fractions(fractions)
    horizon = t1 if isinstance(t1, Horizon) else Horizon(t1, t0, penalty=penalty, bounds=bounds)
    parameter = next(node.parameters(), None)
    if parameter is not None and not isinstance(t1, Horizon):
        horizon.to(parameter.device, parameter.dtype)
    if not isinstance(getattr(node, "horizon", None), Horizon):
        node.register_forward_pre_hook(_fill_in_times, with_kwargs=True)
    node.horizon = horizon
    node.__dict__[FRACTIONS] = tuple(fractions)
    return horizon


def _fill_in_times(
    node: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before a call: t_span from the horizon, unless the caller gives one."""
    given = args[1] if len(args) > 1 else kwargs.get("t_span")
    if given is not None:
        return args, kwargs
    t_span = node.horizon.t_span(node.__dict__[FRACTIONS])  # type: ignore[union-attr,operator]
    if len(args) > 1:
        return (args[0], t_span, *args[2:]), kwargs
    return args, {**kwargs, "t_span": t_span}


def check_fractions(fractions: Sequence[float]) -> None:
    """Refuse fractions that are no evaluation times.

    Args:
        fractions: of the horizon.

    Raises:
        InvalidInputError: they do not increase from 0 to 1.
    """
    increase = all(a < b for a, b in itertools.pairwise(fractions))
    if len(fractions) < 2 or fractions[0] != 0.0 or fractions[-1] != 1.0 or not increase:
        raise InvalidInputError(
            "the evaluation times are no fractions of the horizon",
            got=f"fractions={list(fractions)}",
            allowed="numbers that increase from 0 to 1",
            do="pass fractions=(0.0, 0.5, 1.0), say",
        )


def _pair(bounds: object) -> tuple[float, float]:
    pair = tuple(bounds) if isinstance(bounds, Iterable) else ()
    if len(pair) != 2:
        raise InvalidInputError(
            "the bounds of the horizon are no pair",
            got=f"bounds={bounds!r}",
            allowed="(lowest, highest)",
            do="pass bounds=(0.01, 10.0), say",
        )
    low, high = (check_real("a bound", b, do="pass bounds=(0.01, 10.0), say") for b in pair)
    return low, high


def _check(t1: float, t0: float, penalty: float, low: float, high: float) -> None:
    if not (math.isfinite(t0) and math.isfinite(high) and t0 < low < high):
        raise InvalidInputError(
            "the bounds of the horizon span no interval after t0",
            got=f"t0={t0:g}, bounds=({low:g}, {high:g})",
            allowed="finite numbers with t0 < lowest < highest",
            do="pass bounds=(t0 + 0.01, t0 + 10.0), say",
        )
    if not low <= t1 <= high:
        raise InvalidInputError(
            "the horizon starts outside its bounds",
            got=f"t1={t1:g}, bounds=({low:g}, {high:g})",
            allowed="a t1 within the bounds",
            do="widen the bounds or choose another t1",
        )
    if not (math.isfinite(penalty) and penalty >= 0.0):
        raise InvalidInputError(
            "the penalty on the horizon is no weight",
            got=f"penalty={penalty!r}",
            allowed="a finite number of at least 0",
            do="pass penalty=0.1, say",
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
