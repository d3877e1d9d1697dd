"""The vector field of a torchdyn model, as the adjoint wants it.

What the field keeps between evaluations:

- time (`DepthCat`), control (`DataControl`) and noise (Hutchinson's trace) are set anew at each
  evaluation to what they were in the model's forward call, also during the backward solve;
- BatchNorm in training mode normalizes by the batch at hand, which the backward solve repeats, so
  that gradients are right; its running statistics take in every stage of both solves;
- dropout in training mode draws a new mask at each evaluation: the field is then no function of
  (t, x), an adaptive solve underflows or exceeds max_steps, and the gradient of a fixed-step solve
  is that of other masks. Draw the mask once for each solve instead.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torchdyn.core.defunc import DEFunc, DEFuncBase

from torchdyn_snopt.adjoint.problem import Field, check_parameters

if TYPE_CHECKING:
    from torchdyn_snopt.adjoint.problem import FieldCallable


def field_of(model: Any, args: dict[str, Any]) -> Field:
    """F with its parameters, its layers and its running cost.

    Args:
        model: a torchdyn problem or model.
        args: further arguments of the field.

    Returns:
        The field.
    """
    cost = model.integral_loss
    parameters = list(model.vf.parameters())
    if isinstance(cost, nn.Module):
        parameters += list(cost.parameters())
    trainable = tuple(dict.fromkeys(p for p in parameters if p.requires_grad))
    check_parameters(trainable)
    return Field(_callable(model.vf, args), trainable, (model.vf,), cost)


def _callable(vf: nn.Module, args: dict[str, Any]) -> FieldCallable:
    """F(t, x), without torchdyn's scan of all modules at each evaluation where none needs t."""
    modules = list(vf.modules())
    pinned = [
        (module, name, value)
        for module in modules
        for name in ("_control", "noise")
        if isinstance(value := module.__dict__.get(name), Tensor)
    ]
    call = _unwrapped(vf, args, modules) or _unwrapped_base(vf, args)
    if not pinned:
        return call

    def with_pins(t: Tensor, x: Tensor) -> Tensor:
        # Another forward call may have replaced the control or the noise before this backward.
        for module, name, value in pinned:
            setattr(module, name, value)
        return call(t, x)

    return with_pins


def _whole(vf: nn.Module, args: dict[str, Any]) -> FieldCallable:
    if _takes_args(vf):
        return lambda t, x: vf(t, x, args=args)
    return lambda t, x: vf(t, x)


def _unwrapped(
    vf: nn.Module, args: dict[str, Any], modules: list[nn.Module]
) -> FieldCallable | None:
    """What DEFunc does, with its checks made once; None if they cannot be skipped."""
    if type(vf) is not DEFunc or _is_hooked(vf) or vf.sensitivity == "autograd":
        return None
    inner = _unwrapped_base(cast("nn.Module", vf.vf), args)
    timed = [module for module in modules[1:] if hasattr(module, "t")]
    counter = vf.__dict__
    order = int(vf.order)  # type: ignore[arg-type]  # set by DEFunc

    def call(t: Tensor, x: Tensor) -> Tensor:
        counter["nfe"] += 1
        for module in timed:
            module.t = t
        f = inner(t, x)
        if t.requires_grad:
            # A tensor with a graph among the attributes would forbid copying the model.
            for module in timed:
                module.t = t.detach()
        return f if order == 1 else torch.cat([x[:, x.shape[1] // order :], f], 1)

    return call


def _unwrapped_base(base: nn.Module, args: dict[str, Any]) -> FieldCallable:
    if type(base) is not DEFuncBase or _is_hooked(base):
        return _whole(base, args)
    vf: Any = base.vf
    counter = base.__dict__
    takes_t, takes_args = base.has_time_arg, base.has_time_arg and _takes_args(vf)

    def call(t: Tensor, x: Tensor) -> Tensor:
        counter["nfe"] += 1
        if not takes_t:
            f = vf(x)
        else:
            f = vf(t, x, args=args) if takes_args else vf(t, x)
        return f  # type: ignore[no-any-return]

    return call


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _takes_args(call: Any) -> bool:
    target = call.forward if isinstance(call, nn.Module) else call
    parameters = inspect.signature(target).parameters.values()
    return any(p.name == "args" or p.kind is p.VAR_KEYWORD for p in parameters)
