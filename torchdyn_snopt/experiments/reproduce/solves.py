"""Which neural ODEs a model solves, and from where."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE


def solves_of(model: nn.Module, inputs: Tensor) -> list[tuple[NeuralODE, Tensor]]:
    """The neural ODEs in the order of their calls, and the states that they start from.

    Args:
        model: A model with at least one NeuralODE.
        inputs: A batch.

    Returns:
        A pair for each call.
    """
    solves: list[tuple[NeuralODE, Tensor]] = []

    def keep(node: NeuralODE, arguments: tuple[Tensor, ...]) -> None:
        solves.append((node, arguments[0].detach()))

    nodes = [module for module in model.modules() if isinstance(module, NeuralODE)]
    handles = [node.register_forward_pre_hook(keep) for node in nodes]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return solves
