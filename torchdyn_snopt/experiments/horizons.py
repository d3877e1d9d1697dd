"""How a run treats the integration horizon: left alone, fixed, or learned in one of two ways."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_snopt import Horizon, learn_horizon
from torchdyn_snopt.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchdyn_snopt.experiments.optimizers import OptimizerSpec
    from torchdyn_snopt.experiments.tasks import Task

Mode = Literal["fixed", "policy", "gradient"]
MODES: tuple[Mode, ...] = ("fixed", "policy", "gradient")
GRADIENT_LR = 1e-2  # of Adam on t1, where t1 follows the gradient
# SNOpt's settings in the studies of the horizon and in the search: penalties, budgets and spaces
# were chosen with them there, and the published results measured with them.
STUDIED: dict[str, Any] = {"preconditioner": "kfe_adam", "lr": 1e-2}


@dataclass(frozen=True)
class HorizonChoice:
    """The horizon of a run.

    Attributes:
        mode: 'fixed' stays at t1; 'policy' follows SNOpt's feedback policy (Eq. 16); 'gradient' is
            the first-order baseline (Massaroli et al. 2020): Adam on t1 alone, while the run's
            optimizer moves the weights.
        t1: First value.
        penalty: c of c/2·t1², added to the training loss; not for 'fixed'.
        lr: Learning rate of 'gradient'.
    """

    mode: Mode
    t1: float = 1.0
    penalty: float = 0.0
    lr: float = GRADIENT_LR

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidInputError(
                "there is no such way to treat the horizon",
                got=f"{self.mode!r}",
                allowed=", ".join(MODES),
                do="choose one of these",
            )

    @property
    def label(self) -> str:
        """For tables and legends."""
        if self.mode == "fixed":
            return f"t1={self.t1:g}"
        return f"{self.mode} from t1={self.t1:g}, c={self.penalty:g}"

    @property
    def slug(self) -> str:
        """As a part of a folder's name."""
        parts = [f"t1-{self.mode}", f"from-{self.t1:g}"]
        return "-".join([*parts, f"c-{self.penalty:g}"] if self.mode != "fixed" else parts)

    def describe(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def prepare(self, model: nn.Module, spec: OptimizerSpec, task: Task) -> AnyOptimizer:
        """Give every neural ODE of a model a horizon of its own, and build the optimizer.

        Args:
            model: The model, changed.
            spec: The optimizer of the weights.
            task: Whose settings to use.

        Returns:
            The optimizer of weights and horizons.

        Raises:
            InvalidInputError: The policy is asked of another optimizer than SNOpt.
        """
        if self.mode == "policy" and not spec.name.startswith("snopt"):
            raise InvalidInputError(
                "only SNOpt has a feedback policy for the horizon",
                got=f"--learn-horizon policy with {spec.label}",
                allowed="snopt, snopt-paper",
                do="choose one of these optimizers, or --learn-horizon gradient",
            )
        if self.mode == "gradient":
            # Built first, so that the weights' optimizer does not know of t1.
            weights = spec.build(model, task)
            return _Pair(weights, torch.optim.Adam(self._attach(model), lr=self.lr))
        self._attach(model)
        return spec.build(model, task)

    def _attach(self, model: nn.Module) -> list[nn.Parameter]:
        nodes = [module for module in model.modules() if isinstance(module, NeuralODE)]
        if not nodes:
            raise InvalidInputError(
                "the model has no horizon to choose",
                got=f"{type(model).__name__} without a NeuralODE",
                allowed="models with at least one NeuralODE",
                do="leave the options of the horizon out for this task",
            )
        penalty = 0.0 if self.mode == "fixed" else self.penalty
        horizons = [learn_horizon(node, self.t1, penalty=penalty) for node in nodes]
        for horizon in horizons:
            horizon.t1.requires_grad_(self.mode != "fixed")
        return [horizon.t1 for horizon in horizons]


class _Pair:
    """Two optimizers that act as one."""

    def __init__(self, weights: torch.optim.Optimizer, horizons: torch.optim.Optimizer) -> None:
        self._both = (weights, horizons)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the weights come first."""
        return [group for optimizer in self._both for group in optimizer.param_groups]

    @property
    def report(self) -> dict[str, Any]:
        """What the weights' optimizer reports."""
        return dict(getattr(self._both[0], "report", {}))

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for optimizer in self._both:
            optimizer.zero_grad()

    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Move the weights, by the closure if there is one, then the horizons.

        Args:
            closure: Evaluates loss and gradients.
        """
        weights, horizons = self._both
        if closure is None:
            weights.step()
        else:
            weights.step(closure)
        horizons.step()

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"weights": self._both[0].state_dict(), "horizons": self._both[1].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both.

        Args:
            state_dict: What `state_dict` returned.
        """
        self._both[0].load_state_dict(state_dict["weights"])
        self._both[1].load_state_dict(state_dict["horizons"])


AnyOptimizer = torch.optim.Optimizer | _Pair


def penalty_of(model: nn.Module) -> Tensor | float:
    """The penalties of all horizons of a model.

    Args:
        model: The model.

    Returns:
        Their sum; 0.0 for a model without any.
    """
    horizons = [module for module in model.modules() if isinstance(module, Horizon)]
    penalties = [horizon.penalty() for horizon in horizons if horizon.spec.penalty]
    return torch.stack(penalties).sum() if penalties else 0.0


def horizon_choice(learn: str | None, t1: float | None, penalty: float) -> HorizonChoice | None:
    """The horizon as chosen on the command line.

    Args:
        learn: 'policy', 'gradient', or None for a t1 that stays.
        t1: First or fixed value, or None.
        penalty: c where t1 is learned.

    Returns:
        The choice; None leaves the horizon to the model.

    Raises:
        InvalidInputError: A penalty without learning, or an unknown way to learn.
    """
    if learn is None:
        if penalty:
            raise InvalidInputError(
                "a penalty on a horizon that is not learned has no effect",
                got=f"--penalty {penalty:g}",
                allowed="a penalty together with --learn-horizon",
                do="add --learn-horizon policy, or leave --penalty out",
            )
        return None if t1 is None else HorizonChoice("fixed", t1)
    learned = [mode for mode in MODES if mode != "fixed"]
    if learn not in learned:
        raise InvalidInputError(
            "there is no such way to learn the horizon",
            got=f"--learn-horizon {learn}",
            allowed=", ".join(learned),
            do="choose one of these",
        )
    mode = next(mode for mode in learned if mode == learn)
    return HorizonChoice(mode, 1.0 if t1 is None else t1, penalty)
