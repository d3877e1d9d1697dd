"""The check of the first state, the same for every solve."""

from __future__ import annotations

import torch
from torch import Tensor

from torchdyn_snopt.errors import InvalidInputError, UnsupportedError


def check_state(x0: Tensor) -> None:
    """Refuse states that no solve here can take.

    Args:
        x0: first state.

    Raises:
        InvalidInputError: not a floating-point tensor, or an empty one.
        UnsupportedError: complex, or under a torch.func transform.
    """
    if not isinstance(x0, torch.Tensor):
        raise UnsupportedError(
            "the state is not a tensor",
            got=type(x0).__name__,
            allowed="one floating-point tensor (odeint_snopt also takes a tuple of them)",
            do="concatenate the parts of the state, or use odeint_snopt",
        )
    if x0.is_complex():
        raise UnsupportedError(
            "complex states are not supported",
            got=f"{x0.dtype}",
            allowed="float32, float64, bfloat16, float16",
            do="integrate torch.view_as_real(x0)",
        )
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "the solve cannot be transformed by torch.func (vmap, grad, jvp, …)",
            got="a call under such a transform",
            allowed="ordinary batched states and loss.backward()",
            do="put the mapped dimension into the batch, or use sensitivity='autograd'",
        )
    if x0.layout is not torch.strided or x0.is_meta:
        raise UnsupportedError(
            "the state does not hold its entries one by one",
            got=f"a tensor on {x0.device} with layout {x0.layout}",
            allowed="dense tensors with data",
            do="call to_dense(), or move the model and its input to a device",
        )
    if not x0.is_floating_point() or x0.numel() == 0:
        raise InvalidInputError(
            "the state cannot be integrated",
            got=f"a tensor {list(x0.shape)} of {x0.dtype}",
            allowed="a floating-point tensor with at least one entry",
            do="check the batch; an empty one has nothing to learn from",
        )
