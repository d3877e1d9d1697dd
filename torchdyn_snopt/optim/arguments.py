"""What SNOpt is given: parameters to optimize, and states of other optimizers to load."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from torchdyn_snopt.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Group = dict[str, Any]

# What a group holds besides settings: torch's own entries, and those of schedulers.
_OF_TORCH = {"params", "param_names", "initial_lr"}


def check_params(params: object) -> None:
    """Refuse what no optimizer can take; the entries themselves are torch's to judge.

    Args:
        params: SNOpt's first argument.

    Raises:
        InvalidInputError: neither a module nor something that can be gone through.
    """
    if isinstance(params, nn.Module | Tensor):
        return
    if isinstance(params, str | type) or not isinstance(params, Iterable):
        got = f"the class {params.__name__}" if isinstance(params, type) else repr(params)
        raise InvalidInputError(
            "there is nothing to optimize",
            got=got if len(got) < 80 else f"a {type(params).__name__}",
            allowed="a module, or parameters, named parameters or groups of them",
            do="pass the model itself: SNOpt(model, lr=0.01)",
        )


def check_whole(module: nn.Module) -> None:
    """Refuse models whose layers are spread over processes.

    Args:
        module: the model.

    Raises:
        UnsupportedError: it is sharded by FSDP.
    """
    for part in module.modules():
        names = {kind.__name__ for kind in type(part).__mro__}
        if names & {"FullyShardedDataParallel", "FSDPModule"}:
            _refuse_shards(f"a {type(part).__name__}")


def hookable_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that can be watched from outside; compiled parts of a model run past their hooks.

    Args:
        model: it; may itself be what torch.compile has returned.

    Yields:
        Each once. Layers of a compiled field are the adjoint's to watch, which runs it uncompiled.
    """
    waiting = [getattr(model, "_orig_mod", model)]
    seen: set[nn.Module] = set()
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        waiting += [m for m in reversed(list(module.children())) if not is_compiled(m)]


def is_compiled(module: nn.Module) -> bool:
    """Whether a module, as it stands, is called through torch.compile.

    Args:
        module: it.

    Returns:
        True if so.
    """
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def _refuse_shards(got: str) -> NoReturn:
    raise UnsupportedError(
        "a sharded model (FSDP, tensor parallel, ZeRO 3) has no whole layers to precondition",
        got=got,
        allowed="one copy of the model on each rank",
        do="wrap the model in DistributedDataParallel (in Lightning: strategy='ddp'), or use "
        "torch.optim.AdamW for sharded training",
    )


def check_group(group: Group) -> None:
    """Refuse parameters that cannot be moved by a real gradient of their own.

    Args:
        group: of the optimizer.

    Raises:
        InvalidInputError: integers.
        UnsupportedError: complex numbers, or shards of parameters.
    """
    for p in group["params"]:
        # Known by what their wrappers leave on them, without importing any of those.
        is_shard = getattr(p, "_fsdp_flattened", False) or hasattr(p, "ds_id")
        if is_shard or type(p.data).__name__ == "DTensor":
            _refuse_shards(f"a parameter of type {type(p.data).__name__} that is a shard")
        if p.is_complex():
            raise UnsupportedError(
                "complex parameters are not supported",
                got=f"a parameter of {p.dtype}",
                allowed="floating-point parameters",
                do="use torch.view_as_real",
            )
        if not p.is_floating_point():
            raise InvalidInputError(
                "parameters without gradients cannot be optimized",
                got=f"a parameter of {p.dtype}",
                allowed="floating-point parameters",
                do="leave it out, or register it as a buffer of its module",
            )


def check_saved(saved: object, groups: Sequence[Group], settings: Mapping[str, Any]) -> None:
    """Refuse a state that is none of SNOpt's, or of other layers, saying what differs.

    Args:
        saved: what is about to be loaded.
        groups: of the optimizer.
        settings: names of SNOpt's settings.

    Raises:
        InvalidInputError: another optimizer's state, or one for other parameters.
    """
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        raise InvalidInputError(
            "this is no state of an optimizer",
            got=f"a {type(saved).__name__}",
            allowed="what SNOpt.state_dict() returned",
            do="look for the optimizer's entry in the checkpoint",
        )
    for number, group in enumerate(saved["param_groups"]):
        missing = [name for name in settings if name not in group]
        if missing:
            own = sorted(group.keys() - settings.keys() - _OF_TORCH)
            raise InvalidInputError(
                "the state belongs to another optimizer, or to another version of SNOpt",
                got=f"group {number} without {', '.join(missing)}"
                + (f", but with {', '.join(own)}" if own else ""),
                allowed="what SNOpt.state_dict() returned",
                do="load the weights of the model alone, and start SNOpt anew",
            )
    _check_sizes(saved, groups)


def _check_sizes(saved: dict[str, Any], groups: Sequence[Group]) -> None:
    mine, theirs = (
        [len(group["params"]) for group in some] for some in (groups, saved["param_groups"])
    )
    if mine != theirs:
        raise InvalidInputError(
            "the state is that of a model with other parameters: "
            "it doesn't match the size of the optimizer's groups",
            got=f"groups of {theirs} parameters",
            allowed=f"groups of {mine} parameters, as the optimizer has them",
            do="build model and optimizer as they were when the state was saved",
        )
    pairs = zip(groups, saved["param_groups"], strict=True)
    for number, (group, other) in enumerate(pairs):
        for i, (p, key) in enumerate(zip(group["params"], other["params"], strict=True)):
            entries = saved["state"].get(key, {})
            different = _misfit(p, entries, group["params"])
            if different is not None:
                raise InvalidInputError(
                    "the state is that of a model with other layers",
                    got=f"group {number}, parameter {i} with {different}",
                    allowed=f"the state of a parameter of shape {list(p.shape)}",
                    do="build the model as it was when the state was saved",
                )


def _misfit(p: Tensor, entries: dict[str, Any], params: Sequence[Tensor]) -> str | None:
    """The first entry whose shape contradicts the parameter's."""
    if "groups" in entries:  # a layer with curvature: matrices of the weight and its bias
        split = entries["groups"]
        rows, columns = entries.get("tile_rows", 1), entries.get("tile_columns", 1)
        bias = entries.get("bias")
        has_bias = bias is not None and bias < len(params)
        inputs = p[0].numel() + has_bias if p.dim() > 1 else -1
        outputs = p.shape[0] // split if p.dim() > 0 and split else -1
        widths = {"A": math.ceil(inputs / columns), "B": math.ceil(outputs / rows)}
        expected = widths | {f"U_{factor}": width for factor, width in widths.items()}
        wrong = [k for k in expected if k in entries and entries[k].shape[-1] != expected[k]]
        return f"{wrong[0]} {list(entries[wrong[0]].shape)}" if wrong else None
    names = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    wrong = [k for k in names if k in entries and entries[k].shape != p.shape]
    return f"{wrong[0]} {list(entries[wrong[0]].shape)}" if wrong else None
