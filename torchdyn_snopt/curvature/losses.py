"""torch's losses that also seed the terminal curvature with rank R (Proposition 2).

Each sample's loss has a Hessian H = Σ_r s_r ⊗ s_r in the network's outputs. 'ggn' takes all
columns s_r of that square root; 'mc' draws columns whose expected outer product is H, which for
likelihoods is the Fisher matrix with sampled targets. A loss whose terms are w_i L_i / Σ w (or
w_i L_i for reduction='sum') seeds sample i with √w_i s_r, in the units in which the gradients of a
mean over N samples arrive, so that the factors B come out as the mean over the batch.

The value and the gradient are those of torch's class of the same name. Without an active collector
that asks for 'ggn' or 'mc' nothing else happens.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from torchdyn_snopt.curvature.registry import (
    offer_seeds,
    open_collectors,
    seeded_collectors,
    wanted_columns,
)
from torchdyn_snopt.curvature.seeds import Held, Source, carry, current_trial, leaves_behind
from torchdyn_snopt.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchdyn_snopt.curvature.registry import Collector

ColumnKind: TypeAlias = Literal["ggn", "mc"]


class _Seeded:
    """What the three losses share: which columns, and how many when they are drawn."""

    def _configure(
        self, curvature: ColumnKind | None, samples: int, generator: torch.Generator | None
    ) -> None:
        if curvature not in (None, "ggn", "mc"):
            raise InvalidInputError(
                "unknown curvature of a loss",
                got=f"curvature={curvature!r}",
                allowed="'ggn', 'mc', or None for what the optimizer asks for",
                do="leave curvature at None",
            )
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise InvalidInputError(
                "no column would be drawn",
                got=f"samples={samples!r}",
                allowed="a whole number of at least 1",
                do="leave samples at 1",
            )
        self.curvature, self.samples, self.generator = curvature, samples, generator

    def _seed(
        self,
        value: Tensor,
        outputs: Sequence[Tensor],
        columns: Callable[[ColumnKind], list[Tensor]],
    ) -> Tensor:
        """The value, tied to columns that leave with its backward pass, if anybody wants them."""
        held = current_trial()
        if held is not None and value.requires_grad:
            return _ended(self._tied(value, outputs, columns), held)
        return self._tied(value, outputs, columns)

    def _tied(
        self,
        value: Tensor,
        outputs: Sequence[Tensor],
        columns: Callable[[ColumnKind], list[Tensor]],
    ) -> Tensor:
        if not torch.is_grad_enabled() or not value.requires_grad:
            return value
        takers = _takers(value)
        if takers:
            offer_seeds(takers, self.curvature)
        kind = wanted_columns(takers)
        if kind is None:
            return value
        if self.curvature not in (None, kind):
            raise InvalidInputError(
                "the loss and the optimizer speak of different curvatures",
                got=f"{type(self).__name__}(curvature={self.curvature!r}), asked for {kind!r}",
                allowed="the same one",
                do=f"leave the loss's curvature at None, or pass SNOpt(curvature={kind!r})",
            )
        if value.dim() > 0:
            raise UnsupportedError(
                "a loss without reduction does not say how samples are weighed",
                got="reduction='none'",
                allowed="reduction='mean' or 'sum'",
                do="let the loss reduce",
            )
        with torch.no_grad():
            seeds = columns(kind)
        for collector in seeded_collectors():
            collector.check_rank(len(seeds[0]), seeds[0].shape[1])
        value = _Seed.apply(value, kind, takers, seeds, *outputs)
        return value


def _takers(value: Tensor) -> weakref.WeakSet[Collector]:
    """Collectors that take seeds where there are some, and whose layers the loss depends on."""
    waiting = open_collectors() if value.dim() == 0 else []
    leaves = list(leaves_behind(value)) if waiting else []
    return weakref.WeakSet(c for c in waiting if any(c.watches(leaf) for leaf in leaves))


class _End(Function):
    """The identity on the loss's value; its backward pass goes no further, unless it is let."""

    @staticmethod
    def forward(ctx: Any, end: Tensor, value: list[Tensor], held: Held) -> Tensor:
        ctx.value, ctx.held = value, held
        return end.clone()

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[None, None, None]:
        ctx.held.add(*ctx.value, grad_value)
        return None, None, None


def _ended(value: Tensor, held: Held) -> Tensor:
    # Cut off: autograd would run the nodes behind a gradient of None, with zeros.
    end: Tensor = _End.apply(value.detach().requires_grad_(), [value], held)
    return end


class _Seed(Function):
    """The identity on the loss's value; its backward pass sends the columns off first."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        kind: ColumnKind,
        takers: weakref.WeakSet[Collector],
        seeds: list[Tensor],
        *outputs: Tensor,
    ) -> Tensor:
        ctx.kind, ctx.takers, ctx.seeds = kind, takers, seeds
        ctx.save_for_backward(*outputs)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        outputs = ctx.saved_tensors
        # Again: gradients may have been cleared since the loss was evaluated.
        offer_seeds(ctx.takers, ctx.kind)
        for collector in seeded_collectors():
            collector.seeded = True
        # A factor in front of the loss counts like the 1/N of its mean, as it does in gradients.
        columns = [grad_value * seeds for seeds in ctx.seeds]
        carry(outputs, columns, {Source(columns[0].shape[1]): len(columns[0])})
        return grad_value, None, None, None, *(None for _ in outputs)


class CrossEntropyLoss(nn.CrossEntropyLoss, _Seeded):
    """`torch.nn.CrossEntropyLoss` with seeds: H = diag(p) − p pᵀ for each sample and position.

    'ggn' has C − 1 columns for each position, those of H's Cholesky factor (Tanabe & Sagae 1992),
    'mc' one column e_ĉ − p with a class ĉ drawn from p (at every position) for each of ``samples``.
    """

    def __init__(
        self,
        *args: Any,
        curvature: ColumnKind | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        """As in torch, and how to seed.

        Args:
            *args: torch's.
            curvature: 'ggn', 'mc', or None for what the optimizer asks for.
            samples: columns drawn for 'mc'.
            generator: source of the draws; torch's default one when None.
            **kwargs: torch's: weight, ignore_index, reduction, label_smoothing.
        """
        super().__init__(*args, **kwargs)
        self._configure(curvature, samples, generator)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: logits ``[C]``, ``[N, C]`` or ``[N, C, ...]``.
            target: classes, or probabilities.

        Returns:
            0-d tensor.
        """
        value = super().forward(input, target)
        return self._seed(value, [input], lambda kind: [self._columns(kind, input, target)])

    def _columns(self, kind: ColumnKind, logits: Tensor, target: Tensor) -> Tensor:
        batched = logits.dim() > 1
        rows = logits.movedim(1, -1) if batched else logits.unsqueeze(0)  # [N, ..., C]
        terms, total = self._weights(rows, target if batched else target.unsqueeze(0))
        p = rows.softmax(-1)
        if kind == "ggn":
            columns = _spread_positions(_class_columns(p))
        else:
            classes = torch.multinomial(
                p.reshape(-1, p.shape[-1]), self.samples, replacement=True, generator=self.generator
            )
            drawn = F.one_hot(classes.T, p.shape[-1]).to(p).view(self.samples, *p.shape)
            columns = (drawn - p) / math.sqrt(self.samples)
        weights = (terms / total).clamp(min=0) if self.reduction == "mean" else terms
        columns = columns * _units(weights, len(rows), self.reduction).unsqueeze(-1)
        return columns.movedim(-1, 2) if batched else columns[:, 0]

    def _weights(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Weight of each term ``[N, ...]``, and what the mean divides by."""
        n_classes = rows.shape[-1]
        weight = rows.new_ones(n_classes) if self.weight is None else self.weight.to(rows)
        smoothing = self.label_smoothing
        if target.is_floating_point():
            target = target.movedim(1, -1)
            smoothed = target * (1 - smoothing) + smoothing / n_classes
            terms = smoothed @ weight
            return terms, terms.new_tensor(float(terms.numel()))
        counted = target != self.ignore_index
        own = weight[target.clamp(min=0)] * counted
        spread = weight.sum() / n_classes * counted
        return (1 - smoothing) * own + smoothing * spread, own.sum()


class MSELoss(nn.MSELoss, _Seeded):
    """`torch.nn.MSELoss` with seeds: H = 2 I for each sample.

    'ggn' has one column for each entry of a sample's output, 'mc' one column √2 ε with random
    signs ε for each of ``samples``.
    """

    def __init__(
        self,
        *args: Any,
        curvature: ColumnKind | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        """As in torch, and how to seed.

        Args:
            *args: torch's.
            curvature: 'ggn', 'mc', or None for what the optimizer asks for.
            samples: columns drawn for 'mc'.
            generator: source of the draws; torch's default one when None.
            **kwargs: torch's: reduction.
        """
        super().__init__(*args, **kwargs)
        self._configure(curvature, samples, generator)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            input: outputs ``[N, ...]``.
            target: shaped like them.

        Returns:
            0-d tensor.
        """
        value = super().forward(input, target)
        return self._seed(value, [input], lambda kind: [self._columns(kind, input)])

    def _columns(self, kind: ColumnKind, outputs: Tensor) -> Tensor:
        terms = torch.full_like(outputs, 2.0)
        if self.reduction == "mean":
            terms /= outputs.numel()
        roots = _units(terms, outputs.shape[0], self.reduction)
        if kind == "ggn":
            return _diagonal(roots)
        return roots * _signs(roots, self.samples, self.generator)


class GaussianNLLLoss(nn.GaussianNLLLoss, _Seeded):
    """`torch.nn.GaussianNLLLoss` with seeds: the Fisher matrix in mean and variance.

    It is diagonal, 1/var for the mean and 1/(2 var²) for the variance. 'ggn' has one column for
    each of these entries, 'mc' one column for each of ``samples``: the gradient at a target drawn
    from the predicted density.
    """

    def __init__(
        self,
        *args: Any,
        curvature: ColumnKind | None = None,
        samples: int = 1,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        """As in torch, and how to seed.

        Args:
            *args: torch's.
            curvature: 'ggn', 'mc', or None for what the optimizer asks for.
            samples: columns drawn for 'mc'.
            generator: source of the draws; torch's default one when None.
            **kwargs: torch's: full, eps, reduction.
        """
        super().__init__(*args, **kwargs)
        self._configure(curvature, samples, generator)

    def forward(self, input: Tensor, target: Tensor, var: Tensor | float) -> Tensor:
        """The loss.

        Args:
            input: means ``[N, ...]``.
            target: shaped like them.
            var: variances, shaped like them, or with a last dimension of 1 or none.

        Returns:
            0-d tensor.
        """
        value = super().forward(input, target, var)
        variance = var if isinstance(var, Tensor) else torch.full_like(input, var)
        outputs = [input, variance] if variance.requires_grad else [input]
        return self._seed(value, outputs, lambda kind: self._columns(kind, input, variance))

    def _columns(self, kind: ColumnKind, mean: Tensor, var: Tensor) -> list[Tensor]:
        narrow, learned = var.shape, var.requires_grad
        if var.dim() < mean.dim():
            var = var.unsqueeze(-1)
        var = var.clamp(min=self.eps).expand_as(mean)
        terms = torch.full_like(mean, 1.0 / mean.numel() if self.reduction == "mean" else 1.0)
        units = _units(terms, mean.shape[0], self.reduction)
        if kind == "ggn":
            of_mean, of_var = _diagonal(units * var.rsqrt()), _diagonal(units / (2**0.5 * var))
            if not learned:
                return [of_mean]
            of_mean = torch.cat([of_mean, torch.zeros_like(of_mean)])
            of_var = torch.cat([torch.zeros_like(of_var), of_var])
        else:
            shape = (self.samples, *mean.shape)
            noise = torch.randn(
                shape, generator=self.generator, dtype=mean.dtype, device=mean.device
            )
            scale = units / math.sqrt(self.samples)
            of_mean = -scale * noise * var.rsqrt()
            of_var = scale * (1 - noise**2) / (2 * var)
            if not learned:
                return [of_mean]
        # A variance shared by several entries gathers their columns.
        wide = (*narrow, 1) if len(narrow) < mean.dim() else tuple(narrow)
        return [of_mean, of_var.sum_to_size(len(of_var), *wide).view(len(of_var), *narrow)]


def _class_columns(p: Tensor) -> Tensor:
    """The Cholesky factor of diag(p) − p pᵀ by columns, from p ``[..., C]``: ``[C − 1, ..., C]``.

    With the tails s_c = Σ_{k ≥ c} p_k, column c is

        √(p_c / (s_c s_{c+1})) (s_{c+1} e_c − Σ_{k > c} p_k e_k).
    """  # noqa: DOC201  # the first line says it
    classes = p.shape[-1]
    tails = p.flip(-1).cumsum(-1).flip(-1).movedim(-1, 0).unsqueeze(-1)
    tails, own = tails.clamp(min=torch.finfo(p.dtype).tiny), p.movedim(-1, 0).unsqueeze(-1)
    scale = (own[:-1] / tails[:-1] / tails[1:]).sqrt()
    shape = (classes, *[1] * (p.dim() - 1), classes)
    eye = torch.eye(classes, dtype=p.dtype, device=p.device)
    later = torch.ones_like(eye).triu(1)
    return scale * (tails[1:] * eye.view(shape)[:-1] - later.view(shape)[:-1] * p)


def _spread_positions(columns: Tensor) -> Tensor:
    """A column of its own for each position of a sample: ``[C·L, N, ..., C]``."""
    positions = columns.shape[2:-1].numel()
    if positions == 1:
        return columns
    classes, samples = columns.shape[:2]
    flat = columns.reshape(classes, samples, positions, -1)
    apart = torch.eye(positions, dtype=flat.dtype, device=flat.device).view(
        1, positions, 1, positions, 1
    )
    return (flat.unsqueeze(1) * apart).reshape(classes * positions, *columns.shape[1:])


def _units(terms: Tensor, samples: int, reduction: str) -> Tensor:
    """√ of the terms' weights, per sample of a mean over N: there the gradients carry 1/N."""
    return (terms / samples if reduction == "mean" else terms).sqrt()


def _diagonal(roots: Tensor) -> Tensor:
    """One column for each entry of a sample: ``[D, N, ...]`` from ``[N, ...]``."""
    samples, dims = roots.shape[0], roots.shape[1:].numel()
    flat = roots.reshape(samples, dims)
    eye = torch.eye(dims, dtype=flat.dtype, device=flat.device).unsqueeze(1)
    return (eye * flat).view(dims, *roots.shape)


def _signs(like: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Random signs over √samples, ``[samples, *like.shape]``."""
    shape = (samples, *like.shape)
    bits = torch.randint(2, shape, generator=generator, device=like.device)
    return (2 * bits - 1).to(like) / math.sqrt(samples)
