"""SNOpt: the optimizer that turns collected curvature into steps (Algorithms 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from torchdyn_snopt.curvature.columns import ColumnCollector
from torchdyn_snopt.curvature.factors import CurvatureSpec, Totals
from torchdyn_snopt.curvature.layers import is_supported
from torchdyn_snopt.curvature.outside import OutsideRecorder
from torchdyn_snopt.curvature.registry import Collector, take_failed
from torchdyn_snopt.curvature.seeds import Held, trial
from torchdyn_snopt.errors import SNOptError, SolverError, UnsupportedError, check_instance
from torchdyn_snopt.optim import fallback as fallbacks
from torchdyn_snopt.optim.arguments import (
    check_group,
    check_params,
    check_saved,
    check_whole,
    hookable_modules,
)
from torchdyn_snopt.optim.horizon_policy import HorizonMover, HorizonPolicy, horizons_among
from torchdyn_snopt.optim.layers import Layer, tiles_for
from torchdyn_snopt.optim.low_rank import (
    SQUARED,
    TRIALS,
    LowRankStep,
    absorb_columns,
    decay_damping,
    next_damping,
)
from torchdyn_snopt.optim.ranks import Collected, RankExchange, Ranks, pool, refresh
from torchdyn_snopt.optim.settings import PAPER, resolve
from torchdyn_snopt.optim.table import TABLE
from torchdyn_snopt.optim.trust_region import is_due

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from torchdyn_snopt.curvature.layers import LayerModule
    from torchdyn_snopt.optim.preconditioners import Preconditioner, Report

Group = dict[str, Any]
Closure = Callable[[], float]


class Behind(NamedTuple):
    """What a closure has found behind a step.

    Attributes:
        loss: NaN where it could not be evaluated.
        held: its backward pass.
        gradients: of each parameter, from what has not waited in ``held``.
    """

    loss: float
    held: Held
    gradients: list[Tensor | None]


Params = nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class SNOpt(Optimizer):
    """Second-order optimizer for neural ODEs solved with ``sensitivity='snopt'``.

    On a refresh iteration the backward solve also yields the Kronecker factors A and B of each
    layer in the field (Eq. 13); in between it costs what a plain one does. Layers that a plain
    backward pass reaches are preconditioned as well when a Module is given. Parameters without
    curvature (norms, gates, Galerkin coefficients, other layers) take the fallback; `summary` and
    ``repr`` tell which parameter is treated how.

    Args:
        params: a Module, or what every torch optimizer takes: parameters, named parameters, groups.
        lr: learning rate η; for 'trust_region' the longest natural step, 1 being Newton's, and a
            factor on Adam's part below 1.
        momentum: heavy-ball momentum; Adam's β₁ for 'trust_region' and 'kfe_adam'.
        weight_decay: γ of the paper's running cost: γθ joins the gradient, γI the curvature.
        damping: ε of Algorithm 2, Tikhonov λ of 'kfac' and 'trust_region', Adam's ε of 'kfe_adam'.
        update_freq: iterations between refreshes of the curvature; at most, for 'trust_region'.
        alpha: decay of the second moments in the eigenbasis (Algorithm 2; Adam's β₂), for
            'trust_region' also of the gradients' variance.
        factor_decay: decay of the exponential average of A and B from refresh to refresh.
        preconditioner: 'trust_region' (natural gradient and Adam's direction in the curvature's
            eigenbasis, their lengths learned from the gradients), 'kfe_adam' (Adam's moments in
            that basis), 'kfac', 'ekfac' (Algorithm 2), or 'low_rank' (the Gauss–Newton step from
            the columns of Proposition 2).
        curvature: seeds of the terminal curvature: 'empirical' (Φ_x of each sample, the paper's
            choice), 'mc' or 'ggn' (seeds of this package's losses, Proposition 2; for 'low_rank'),
            or 'auto': 'mc' where the loss is one of those, otherwise 'empirical'.
        weight_sharing: 'expand' or 'reduce' over positions (Eschenhagen et al. 2023).
        kl_clip: trust region of 'kfac' and 'ekfac', the first one of 'trust_region'; ``math.inf``
            for none, which leaves the natural gradient alone.
        fallback: 'sgd' or 'adam' for parameters without curvature.
        reduction: how the loss combines samples, 'mean' or 'sum'.
        max_columns: for 'low_rank', limit on samples × seeds of a batch; a step keeps that many
            columns of the size of the parameters, and works on min(columns, parameters)² numbers.
        inner_steps: for 'low_rank' with a closure, at most so many steps on one batch. The solve
            that judges one of them is the forward pass of the next.
        damping_decay: for 'low_rank' without a closure: λ shrinks by this factor at each step.
            With a closure λ follows the ratio of actual to predicted reduction.
        fallback_scale: learning rate of the fallback, relative to lr.
        maximize: ascend.
        foreach: False updates tensor by tensor (less memory, slower).
        horizon: settings of the policy (Eq. 16) that moves each `Horizon` among the parameters.
        process_group: the processes that train this model together, whose curvature is averaged as
            DistributedDataParallel averages their gradients; all of torch.distributed when None.

    Arguments left out take the defaults of the preconditioner (``optim.settings.DEFAULTS``).

    Raises:
        InvalidInputError: a setting out of range.
        UnsupportedError: complex parameters, or a model sharded by FSDP.

    Source: Liu, Chen & Theodorou 2021, Algorithms 1 and 2, Eqs. 13, 14.
    """

    # GradScaler leaves its scale and what it has found to the optimizer.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        *,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        damping: float | None = None,
        update_freq: int | None = None,
        alpha: float | None = None,
        factor_decay: float | None = None,
        preconditioner: Literal[
            "trust_region", "kfe_adam", "kfac", "ekfac", "low_rank"
        ] = "trust_region",
        curvature: Literal["auto", "empirical", "mc", "ggn"] | None = None,
        weight_sharing: Literal["expand", "reduce"] | None = None,
        kl_clip: float | None = None,
        fallback: Literal["sgd", "adam"] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        max_columns: int | None = None,
        inner_steps: int | None = None,
        damping_decay: float | None = None,
        fallback_scale: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        horizon: HorizonPolicy | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        check_params(params)
        check_instance(
            "horizon",
            horizon,
            (HorizonPolicy, type(None)),
            allowed="a HorizonPolicy, or None for its defaults",
            do="pass horizon=HorizonPolicy(lr=0.5), say",
        )
        # None where left out: a group with another preconditioner takes the defaults of that one.
        self._settings: Group = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "damping": damping,
            "update_freq": update_freq,
            "alpha": alpha,
            "factor_decay": factor_decay,
            "preconditioner": preconditioner,
            "curvature": curvature,
            "weight_sharing": weight_sharing,
            "kl_clip": kl_clip,
            "fallback": fallback,
            "reduction": reduction,
            "max_columns": max_columns,
            "inner_steps": inner_steps,
            "damping_decay": damping_decay,
            "fallback_scale": fallback_scale,
            "maximize": maximize,
            "foreach": foreach,
            "horizon": (horizon or HorizonPolicy()).settings(),
        }
        self._collectors: list[Collector] = []
        self._recorders: list[OutsideRecorder] = []
        self._horizons = HorizonMover()
        self._ranks = Ranks(process_group)
        self._names: dict[Tensor, str] = {}
        self._modules: list[LayerModule] = []
        if isinstance(params, nn.Module):
            check_whole(params)
            model: nn.Module = params
            if isinstance(params, DistributedDataParallel):
                self._ranks = Ranks(process_group or params.process_group)
                model = params.module
            self._modules = [m for m in hookable_modules(model) if is_supported(m)]
            self._names = {p: name for name, p in model.named_parameters()}
            params = [p for p in self._names if p.requires_grad]
        #: Figures of the last step worth logging, e.g. the trust region's factor.
        self.report: Report = {}
        #: Steps that were dropped because a solve failed (``on_failure='skip'``).
        self.skipped_steps = 0
        #: Seconds of this process in refreshes of the curvature, in all steps together.
        self.curvature_seconds = 0.0
        self._loss_scale = 1.0
        super().__init__(params, {**resolve(self._settings), "step": 0})

    @classmethod
    def from_paper(cls, params: Params, lr: float, **settings: Any) -> SNOpt:
        """Algorithms 1 and 2 with the paper's values: ε 0.05, α 0.75, a refresh each 100 steps.

        The paper's time grid is an option of the solve: ``SNOptSensitivity(quadrature='grid')``.

        Args:
            params: as for the class.
            lr: learning rate η, tuned for each task in the paper.
            **settings: what is to differ from the paper.

        Returns:
            The optimizer.
        """
        return cls(params, lr, **{**PAPER, **settings})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with settings of its own.

        Args:
            param_group: 'params' and any settings.

        Raises:
            SNOptError: a setting out of range, or a parameter that is complex or no real number.
        """
        own = {name: value for name, value in param_group.items() if name in self._settings}
        super().add_param_group({**param_group, **resolve({**self._settings, **own})})
        group = self.param_groups[-1]
        try:
            check_group(group)
        except SNOptError:
            self.param_groups.pop()
            raise
        for i, p in enumerate(group["params"]):
            name = f"group {len(self.param_groups) - 1}, #{i}"
            self._names.setdefault(p, group["param_names"][i] if "param_names" in group else name)
        self._watch(group)

    def _watch(self, group: Group) -> None:
        collector = _collector(group)
        layers = [module for module in self._modules if collector.watches(module.weight)]
        recorder = OutsideRecorder(collector, layers)
        self._collectors.append(collector)
        self._recorders.append(recorder)
        self._horizons.watch(group)
        _request(group, collector, recorder)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _groups(self) -> Iterable[tuple[Group, Collector, OutsideRecorder]]:
        return zip(self.param_groups, self._collectors, self._recorders, strict=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, with their curvature and the note that a solve has failed.

        Args:
            set_to_none: as in torch.
        """
        super().zero_grad(set_to_none)
        self._forget()
        take_failed(self._parameters())

    def _forget(self) -> None:
        for collector, recorder in zip(self._collectors, self._recorders, strict=True):
            collector.clear()
            recorder.clear()
        self._horizons.forget()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Refresh the preconditioner if curvature has arrived, then move θ.

        Args:
            closure: reevaluates the model and returns the loss; its curvature is used in this step.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._overflowed():
            take_failed(self._parameters())
            self._forget()
            return loss
        if self._failed():
            self.skipped_steps += 1
            self._forget()
            return loss
        self.report = {}
        for group, collector, recorder in self._groups():
            if collector.active and not isinstance(collector, ColumnCollector):
                started = perf_counter()
                recorder.deliver()
                self._refresh(group, collector)
                group["refreshed"], group["travelled"] = group["step"], 0.0
                collector.clear()
                self.curvature_seconds += perf_counter() - started
        self._absorb_columns()
        self._low_rank_steps(closure, loss)
        for group, collector, recorder in self._groups():
            self._move(group)
            group["step"] += 1
            _request(group, collector, recorder)
        self.report |= self._horizons.move(
            self.param_groups,
            self.state,
            self._names,
            RankExchange(self._ranks, self._loss_scale),
        )
        return loss

    def _absorb_columns(self) -> None:
        for group, collector, recorder in self._groups():
            if collector.active and isinstance(collector, ColumnCollector):
                started = perf_counter()
                recorder.deliver()
                absorb_columns(group, collector, self.state)
                collector.clear()
                self.curvature_seconds += perf_counter() - started

    def _low_rank_steps(self, closure: Closure | None, loss: float | None) -> None:
        """Step all 'low_rank' groups; with a closure, several times, and see what the loss says."""
        groups = [group for group in self.param_groups if group["preconditioner"] == "low_rank"]
        if not groups:
            return
        self._check_low_rank()
        if closure is None or loss is None:
            for step in self._new_steps(groups):
                step.apply(self.report)
                step.keep()
                decay_damping(step.group)
            return
        before, taken = _number(loss), 0
        last = max(group["inner_steps"] for group in groups) - 1
        for number in range(last + 1):
            steps = self._new_steps(groups)
            behind = self._try(steps, closure, before, keep=number < last) if steps else None
            taken += behind is not None
            if behind is None or number == last or not self._go_on(behind):
                break
            before = behind.loss
        self.report["inner_steps"] = float(taken)

    def _new_steps(self, groups: list[Group]) -> list[LowRankStep]:
        steps = [LowRankStep(group, self.state) for group in groups]
        return [step for step in steps if step.params]

    def _try(
        self, steps: list[LowRankStep], closure: Closure, before: float, *, keep: bool
    ) -> Behind | None:
        """Step with growing λ until the loss falls; None when it never does."""
        for number in range(TRIALS):
            predicted = sum(step.apply(self.report) for step in steps)
            behind = self._behind(closure, keep=keep)
            reduction = behind.loss - before if steps[0].group["maximize"] else before - behind.loss
            ratio = reduction / max(predicted, 1e-300) if math.isfinite(behind.loss) else -math.inf
            self.report |= {"reduction_ratio": ratio, "trials": number + 1.0}
            for step in steps:
                floor = SQUARED * step.system.trace
                step.group["damping"] = next_damping(step.group["damping"], ratio, floor)
            if ratio > 0.0:
                for step in steps:
                    step.keep()
                return behind
            for step in steps:
                step.take_back()
        return None

    def _check_low_rank(self) -> None:
        if self._ranks.size > 1 or self._loss_scale != 1.0:
            scaled = "a GradScaler" if self._loss_scale != 1.0 else f"{self._ranks.size} ranks"
            raise UnsupportedError(
                "the columns of 'low_rank' are those of one process and of an unscaled loss",
                got=f"preconditioner='low_rank' with {scaled}",
                allowed="'trust_region', 'kfe_adam', 'kfac' and 'ekfac'",
                do="choose one of these, or train in one process and in float32 or bfloat16",
            )

    def _behind(self, closure: Closure, *, keep: bool) -> Behind:
        """The loss of the closure where θ is now; the backward pass waits if it is kept."""
        active = [collector.active for collector in self._collectors]
        gradients = [(p, p.grad) for p in self._parameters()]
        for collector, recorder in zip(self._collectors, self._recorders, strict=True):
            collector.active = collector.active and keep and isinstance(collector, ColumnCollector)
            if not collector.active:
                recorder.stop()
            collector.clear()
            recorder.clear()
        for p, _ in gradients:
            p.grad = None
        after, held = math.nan, Held()
        left: list[Tensor | None] = []
        try:
            with trial() as held, torch.enable_grad():
                after = _number(closure())
            left = [p.grad for p, _ in gradients]
        except SolverError:
            pass
        finally:
            for p, gradient in gradients:
                p.grad = gradient
            for collector, was in zip(self._collectors, active, strict=True):
                collector.active = was
        return Behind(after, held, left)

    def _go_on(self, behind: Behind) -> bool:
        """Gradients and columns behind a step that has been taken; False when there are none."""
        params = self._parameters()
        gradients = [p.grad for p in params]
        for p, gradient in zip(params, behind.gradients, strict=True):
            p.grad = gradient
        active = [collector.active for collector in self._collectors]
        for collector in self._collectors:
            collector.active = collector.active and isinstance(collector, ColumnCollector)
        with torch.enable_grad():
            behind.held.go_on()
        for collector, was in zip(self._collectors, active, strict=True):
            collector.active = was
        if self._failed():
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
            self._forget()
            return False
        self._absorb_columns()
        return True

    def _overflowed(self) -> bool:
        """What a GradScaler has put on the optimizer; gradients are unscaled, curvature later."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None:
            self._loss_scale = 1.0
            return False
        scale = getattr(self, "grad_scale", None)
        if bool(found_inf > 0):
            return True
        self._loss_scale = math.nan if scale is None else float(scale)
        if scale is not None:
            gradients = [p.grad for p in self._parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / self._loss_scale)
        return False

    def _unscaled(self, totals: Totals, group: Group) -> Totals:
        """What gradients without a GradScaler's factor would have left."""
        scale = self._loss_scale
        if scale == 1.0:
            return totals
        if math.isnan(scale):
            if group["preconditioner"] == "kfe_adam":  # eigenvectors only: no scale matters
                return totals
            raise UnsupportedError(
                "the curvature was collected with a loss scale that is no longer known",
                got=f"scaler.unscale_(optimizer) before a step of {group['preconditioner']!r}",
                allowed="scaler.step(optimizer) alone, which unscales gradients and curvature",
                do="leave out scaler.unscale_; or use preconditioner='kfe_adam', which needs no "
                "scale; or bfloat16, which needs no scaler",
            )
        return replace(totals, b=totals.b / scale**2)

    def _failed(self) -> bool:
        """Whether a solve has failed, on any rank."""
        params = self._parameters()
        self._ranks.check_same(params)
        return self._ranks.any(take_failed(params), params[0])

    def _refresh(self, group: Group, collector: Collector) -> None:
        position = {id(p): i for i, p in enumerate(group["params"])}
        preconditioner = TABLE[group["preconditioner"]]
        # One layer after the other: what has been summed of it ends before the next one's turn.
        collected = (
            Collected(
                position[id(module.weight)],
                position[id(module.bias)] if collector.takes_bias(module) else None,
                getattr(module, "groups", 1),
                self._unscaled(totals, group),
            )
            for module, totals in collector.drain()
        )
        layers = (
            self._averaged(group, one, preconditioner, collector.spec)
            for one in pool(self._ranks, collected, group)
        )
        refresh(self._ranks, preconditioner, layers, group)

    def _averaged(
        self, group: Group, one: Collected, preconditioner: Preconditioner, spec: CurvatureSpec
    ) -> Layer:
        """A layer with new A and B."""
        weight = group["params"][one.weight]
        state = self.state[weight]
        if not state.get("ready", False) or state["bias"] != one.bias:
            self._adopt(group, one)
            if one.groups == 1:
                sizes = one.totals.b.shape[-1], one.totals.a.shape[-1]
                rows, columns = tiles_for(*sizes, preconditioner.WIDEST)
                state["tile_rows"], state["tile_columns"] = rows, columns
        preconditioner.recall(state)
        layer = self._layer(group, weight)
        layer.absorb(one.totals.factors(spec), group["factor_decay"])
        return layer

    def _adopt(self, group: Group, one: Collected) -> None:
        """Start afresh, from the fallback or with(out) the bias: moments change their shape."""
        if one.bias is not None:
            self.state[group["params"][one.bias]].clear()
        state = self.state[group["params"][one.weight]]
        state.clear()
        # Indices, not references: the state is saved and must find its way without the modules.
        state["groups"], state["bias"] = one.groups, one.bias

    def _layer(self, group: Group, weight: Tensor) -> Layer:
        state = self.state[weight]
        bias = None if state["bias"] is None else group["params"][state["bias"]]
        return Layer(self._names[weight], weight, bias, state["groups"], state)

    def _move(self, group: Group) -> None:
        layers = self._layers(group)
        covered = {id(p) for layer in layers for p in (layer.weight, layer.bias)}
        covered |= {id(p) for p in horizons_among(group["params"])}
        covered |= {id(p) for p in group["params"] if "columns" in self.state.get(p, {})}
        others = [p for p in group["params"] if p.grad is not None and id(p) not in covered]
        layers = [layer for layer in layers if layer.has_gradient()]
        sign = -1.0 if group["maximize"] else 1.0
        singly = group["foreach"] is False
        # A trust region is one for all layers.
        for some in _batches(layers, singly and group["kl_clip"] is None):
            gradients = [layer.gradient(group["weight_decay"], sign) for layer in some]
            preconditioner = TABLE[group["preconditioner"]]
            updates = preconditioner.updates(some, gradients, group, self.report)
            for layer, update in zip(some, updates, strict=True):
                layer.apply(update, group["lr"])
        settings = {**group, "lr": group["lr"] * group["fallback_scale"]}
        for rest in _batches(others, singly):
            gradients = [_gradient(p, group["weight_decay"], sign) for p in rest]
            states = [self.state[p] for p in rest]
            fallbacks.TABLE[group["fallback"]](rest, gradients, states, settings)

    def _layers(self, group: Group) -> list[Layer]:
        ready = (p for p in group["params"] if self.state.get(p, {}).get("ready", False))
        return [self._layer(group, p) for p in ready]

    def summary(self) -> list[tuple[str, str]]:
        """How each parameter is treated, as far as is known: curvature shows at the first refresh.

        Returns:
            Pairs of the parameter's name and 'kfe_adam', 'kfac', …, or 'adam (fallback)'.
        """
        rows = []
        horizons = {id(p) for p in horizons_among(self._parameters())}
        for group, collector, recorder in self._groups():
            covered = {id(p) for layer in self._layers(group) for p in (layer.weight, layer.bias)}
            for module in recorder.layers:
                biases = [module.bias] if collector.takes_bias(module) else []
                covered |= {id(p) for p in (module.weight, *biases)}
            covered |= {id(p) for p in group["params"] if "columns" in self.state.get(p, {})}
            for p in group["params"]:
                known = id(p) in covered
                how = group["preconditioner"] if known else f"{group['fallback']} (fallback)"
                rows.append((self._names[p], "horizon policy" if id(p) in horizons else how))
        return rows

    def __repr__(self) -> str:
        head = super().__repr__()
        lines = [f"    {name}: {how}" for name, how in self.summary()]
        return "\n".join([head, "Parameters (", *lines, ")"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, here or on another device or process.

        Args:
            state_dict: it; not changed. That of another optimizer, or of a model with other
                parameters, is an `InvalidInputError` that says what differs.
        """
        check_saved(state_dict, self.param_groups, self._settings)
        super().load_state_dict(state_dict)
        # torch casts state to the parameter's dtype; factors of low-precision parameters stay wide.
        saved = state_dict["state"]
        params = self._parameters()
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(params, indices, strict=True):
            for key, value in saved.get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.detach().to(device=p.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_settings", "_names", "_modules", "skipped_steps", "curvature_seconds")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also the last act of torch's load_state_dict, on an optimizer with hooks of its own.
        for recorder in getattr(self, "_recorders", []):
            recorder.stop()
        super().__setstate__(state)
        self._collectors, self._recorders, self.report = [], [], {}
        self._horizons = HorizonMover()
        self._ranks = getattr(self, "_ranks", None) or Ranks()
        self._loss_scale = 1.0
        for group in self.param_groups:
            self._watch(group)


def _number(loss: float | Tensor) -> float:
    return loss.item() if isinstance(loss, Tensor) else float(loss)


def _collector(group: Group) -> Collector:
    if group["preconditioner"] == "low_rank":
        return ColumnCollector(_spec(group), group["params"], group["max_columns"])
    return Collector(_spec(group), group["params"])


def _spec(group: Group) -> CurvatureSpec:
    estimate = group["preconditioner"] == "trust_region"
    return CurvatureSpec(
        group["curvature"], group["weight_sharing"], group["reduction"], estimate=estimate
    )


def _request(group: Group, collector: Collector, recorder: OutsideRecorder) -> None:
    """Ask for curvature from the next backward pass if it is due."""
    collector.active = _is_due(group)
    if collector.active:
        collector.spec = _spec(group)
        recorder.start()
    else:
        recorder.stop()


def _is_due(group: Group) -> bool:
    if group["preconditioner"] == "trust_region":
        return is_due(group)
    return bool(group["step"] % group["update_freq"] == 0)


def _gradient(p: Tensor, weight_decay: float, sign: float) -> Tensor:
    g = p.grad
    assert g is not None
    if g.is_sparse:
        raise UnsupportedError(
            "sparse gradients are not supported",
            got=f"a sparse gradient of shape {list(g.shape)}",
            allowed="dense gradients",
            do="build the embedding with sparse=False",
        )
    if sign < 0:
        g = -g
    return g.add(p, alpha=weight_decay) if weight_decay else g


def _batches(items: list[Any], singly: bool) -> list[list[Any]]:
    if not items:
        return []
    return [[item] for item in items] if singly else [items]
