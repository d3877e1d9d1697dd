"""Optimizers from elsewhere that need more than a class: what they are built from a model with.

Each builder names its settings, so that a misspelt one is refused and not swallowed. Weight decay
is off unless asked for: the comparison is of steps, not of regularization.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchdyn_snopt.errors import UnsupportedError

if TYPE_CHECKING:
    from types import ModuleType

Optimizer = torch.optim.Optimizer
GRAFT_RMSPROP = 3  # pytorch_optimizer's LayerWiseGrafting.RMSPROP, an IntEnum


def soap(
    model: nn.Module,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.95, 0.95),
    weight_decay: float = 0.0,
    precondition_frequency: int = 5,
    eps: float = 1e-8,
) -> Optimizer:
    """SOAP (Vyas et al. 2024) of pytorch-optimizer: Adam in the eigenbasis of Shampoo's factors.

    Args:
        model: Whose parameters to train.
        lr: Learning rate.
        betas: Decays of the moments.
        weight_decay: Decoupled weight decay.
        precondition_frequency: Steps between updates of the basis.
        eps: Added to the root of the second moment.

    Returns:
        The optimizer.
    """
    made: Optimizer = _library().SOAP(
        model.parameters(),
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        precondition_frequency=precondition_frequency,
        eps=eps,
    )
    return made


def shampoo(
    model: nn.Module,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    preconditioning_compute_steps: int = 5,
    start_preconditioning_step: int = 5,
) -> Optimizer:
    """Shampoo (Gupta et al. 2018; Anil et al. 2020) of pytorch-optimizer, with RMSProp's step size.

    Args:
        model: Whose parameters to train.
        lr: Learning rate.
        betas: Decays of momentum and statistics.
        weight_decay: Weight decay.
        preconditioning_compute_steps: Steps between updates of the roots.
        start_preconditioning_step: Steps before the first one.

    Returns:
        The optimizer.
    """
    library = _library()
    torch.serialization.add_safe_globals(_shampoo_state())
    made: Optimizer = library.ScalableShampoo(
        model.parameters(),
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        preconditioning_compute_steps=preconditioning_compute_steps,
        start_preconditioning_step=start_preconditioning_step,
        graft_type=GRAFT_RMSPROP,
    )
    return made


def _shampoo_state() -> list[Any]:
    """The classes in Shampoo's state: plain holders of tensors, which checkpoints may contain."""
    from pytorch_optimizer.optimizer.utils.graft import RMSPropGraft
    from pytorch_optimizer.optimizer.utils.partition import BlockPartitioner, PreConditionerType
    from pytorch_optimizer.optimizer.utils.preconditioner import PreConditioner

    # Python 3.11.0 to 3.11.3 write members of enums by getattr, which checkpoints must not call.
    copyreg.pickle(PreConditionerType, lambda member: (PreConditionerType, (member.value,)))
    return [BlockPartitioner, PreConditioner, PreConditionerType, RMSPropGraft]


def _library() -> ModuleType:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise UnsupportedError(
            "this optimizer comes with pytorch-optimizer, which is not installed",
            got=str(error),
            allowed="an environment with pytorch-optimizer",
            do="pip install 'torchdyn-snopt[experiments]'",
        ) from error
    return pytorch_optimizer


def lbfgs(
    model: nn.Module, lr: float = 1.0, max_iter: int = 4, history_size: int = 10
) -> Optimizer:
    """Torch's L-BFGS with its strong-Wolfe line search; every step evaluates the loss repeatedly.

    Args:
        model: Whose parameters to train.
        lr: First step length of the line search.
        max_iter: Iterations on each batch.
        history_size: Pairs that it remembers.

    Returns:
        The optimizer.
    """
    return torch.optim.LBFGS(
        model.parameters(),
        lr=lr,
        max_iter=max_iter,
        history_size=history_size,
        line_search_fn="strong_wolfe",
    )


def muon(
    model: nn.Module, lr: float = 1e-2, momentum: float = 0.95, weight_decay: float = 0.0
) -> Optimizer:
    """Torch's Muon (Jordan et al. 2024) for weights, AdamW for biases, with one learning rate.

    Args:
        model: Whose parameters to train.
        lr: Learning rate, on AdamW's scale.
        momentum: Of the weights.
        weight_decay: Decoupled weight decay.

    Returns:
        The optimizer.
    """
    return MuonWithAdamW(model.parameters(), lr, momentum, weight_decay)


class MuonWithAdamW(Optimizer):
    """Muon takes matrices only: a convolution's weight is handed over as [out, everything else]."""

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float) -> None:
        """Share the parameters out.

        Args:
            params: Parameters.
            lr: Learning rate of both.
            momentum: Of Muon.
            weight_decay: Of both.
        """
        super().__init__(params, {"lr": lr})
        everything = [p for group in self.param_groups for p in group["params"]]
        self._matrices = [(p, _as_matrix(p)) for p in everything if p.dim() >= 2]
        vectors = [p for p in everything if p.dim() < 2]
        self._parts: list[Optimizer] = [
            torch.optim.Muon(
                [matrix for _, matrix in self._matrices],
                lr=lr,
                momentum=momentum,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        ]
        if vectors:
            self._parts.append(torch.optim.AdamW(vectors, lr=lr, weight_decay=weight_decay))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move everything.

        Args:
            closure: Evaluates loss and gradients first.

        Returns:
            Its loss, or None.
        """
        loss = None if closure is None else closure()
        for p, matrix in self._matrices:
            matrix.grad = None if p.grad is None else p.grad.reshape(matrix.shape)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both, in their order."""
        return {"parts": [part.state_dict() for part in self._parts], "own": super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both.

        Args:
            state_dict: What `state_dict` returned.
        """
        super().load_state_dict(state_dict["own"])
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def _as_matrix(p: Tensor) -> nn.Parameter:
    """The same memory as a matrix."""
    return nn.Parameter(p.detach().view(p.shape[0], -1))
