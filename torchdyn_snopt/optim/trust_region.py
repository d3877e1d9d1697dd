"""'trust_region': the natural gradient and Adam's direction, each as far as it can be trusted.

Both start from one average m of the gradients (Adam's first moment), in the eigenbasis of a layer's
Kronecker factors: the step is −ν m/C − μ m/√v, with the curvature C and Adam's second moment v.
The natural gradient is fast where the curvature is right. Adam's direction is safe where it is not:
far from every minimum, and where a step moves all samples, times and layers together, of which the
Kronecker factors of single layers know too little.

C is the product of the damped eigenvalues of A and B, or half of N times the gradients'
variance where that is more. N times the variance of a batch's mean is the Fisher's diagonal in this
basis (George et al. 2018), with all that positions and times have in common.

ν is at most lr (a learning rate of 1 is Newton's step), and so small that the model moves by no
more than κ in the metric of C: ν² ⟨d, C d⟩ ≤ κ for d = m/C. For likelihoods, but for the damping,
κ is twice the KL divergence between the predictions before and after a step, in nats; no unit of a
weight enters. μ, the learning rate of Adam's part, is chosen so that at first both steps are
equally long in the metric of C.

Nobody has to know κ and μ. The next gradient g, which is there anyway, tells whether the last
step was too long: its cosine with the last average in a step's metric,

    c = ⟨g, m/C⟩ / (‖g‖_{1/C} ‖m‖_{1/C}),

is positive as long as the loss still falls along the step, and negative where that has passed the
minimum. κ ← κ exp(η (c − c₀)) makes κ, and in the same way μ², grow while steps are too short, and
shrink once they only follow the noise of the batches; of two directions, the one that serves better
becomes longer. That takes no evaluation of the loss, unlike the rule of Levenberg and Marquardt
(Martens & Grosse 2015, 6.5); the idea of learning a step's length from the product of successive
gradients is Almeida et al.'s (1999) and Baydin et al.'s (2018). The rate η falls as the gains of
Robbins and Monro do, and c₀ with it, so that both come to rest.

The curvature is refreshed when it has become old by that same measure: in each of the first `EARLY`
steps, then once the natural steps since the last refresh add up to `STALE`, at the latest after
``update_freq`` steps. It is an estimate (`CurvatureSpec.estimate`): integrals over time are taken
at the ends of the solver's steps, A of a large convolution from a part of the batch, and of a very
wide factor only blocks on the diagonal. Between refreshes A and B are kept as their eigenvectors
and eigenvalues, which are there anyway, and no second time as matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from torchdyn_snopt.optim.moments import absorb, corrections, deviations
from torchdyn_snopt.optim.preconditioners import (
    Parts,
    Preconditioner,
    Report,
    damping_shares,
    eigen_parts,
    rotated,
    rotated_back,
    turn_moments,
)

if TYPE_CHECKING:
    from torch import Tensor

    from torchdyn_snopt.optim.layers import Layer

Group = dict[str, Any]

# κ ← κ exp(η (c − c₀)), with RATE for η and AIM for c₀, both divided by 1 + step/SETTLE.
RATE, AIM, SETTLE = 2.0, 0.1, 30.0
# Of κ, and of μ. A loss that can be driven to zero falls along every step, and both would grow on.
RADIUS_RANGE, ADAM_RANGE = (1e-10, 0.1), (1e-30, 0.1)
# Gradients below this share of their largest ones no longer make steps of full length.
FLOOR = 1e-4
# The share of N times the gradients' variance that C has at least.
VARIANCE_SHARE = 0.5
# The curvature is refreshed in each of the first steps, and then when the squared lengths of the
# steps since the last refresh add up to this.
EARLY, STALE = 10, 2e-2
TINY = 1e-30


class Metrics(NamedTuple):
    """What the two directions are divided by, entry by entry, for all layers in a row.

    Attributes:
        natural: C.
        adam: √v + ε.
    """

    natural: Tensor
    adam: Tensor


class Figures(NamedTuple):
    """What the lengths of both steps follow from.

    Attributes:
        cosine: c of the natural step.
        adam_cosine: c of Adam's.
        squared: ⟨d, C d⟩ of the natural direction d.
        adam_natural: ⟨d, C d⟩ of Adam's direction d.
    """

    cosine: float
    adam_cosine: float
    squared: float
    adam_natural: float


class TrustRegion(Preconditioner):
    """See the module. κ is the group's kl_clip, which changes from step to step."""

    PARTS: ClassVar[Mapping[str, tuple[str, int]]] = {
        "U_A": ("A", 2),
        "U_B": ("B", 2),
        "damped_A": ("A", 1),
        "damped_B": ("B", 1),
        "share_A": ("A", 0),
        "share_B": ("B", 0),
    }
    # Eigenvectors of a factor as wide as this take 1 MB, its decomposition some 20 ms.
    WIDEST = 520

    def recall(self, state: Group) -> None:
        """A from its eigenvectors and eigenvalues, and B likewise; see `Preconditioner`.

        Args:
            state: of the layer.
        """
        if "factor_weight" not in state or "A" in state:
            return  # nothing has been averaged, or the last refresh has failed
        for factor in "AB":
            vectors, share = state[f"U_{factor}"], state[f"share_{factor}"].unsqueeze(-1)
            values = (state[f"damped_{factor}"] - share).unsqueeze(-2)
            state[factor] = (vectors * values) @ vectors.mT

    def decompose(self, layer: Layer, group: Group) -> Parts:
        """Decompose the factors; see `Preconditioner`.

        Args:
            layer: with new factors.
            group: damping λ (weight decay γ is added to it).

        Returns:
            Eigenvectors and damped eigenvalues of both, and what is damping of these.

        Raises:
            LinAlgError: a factor is not finite.
        """
        parts, a, b = eigen_parts(layer.state), layer.state["A"], layer.state["B"]
        if layer.tiles != (1, 1):  # π is one for all of them
            a, b = (blocks.flatten(0, -3).mean(0) for blocks in (a, b))
        for factor, share in zip("AB", damping_shares(a, b, group), strict=True):
            values = parts.pop(f"values_{factor}")
            parts[f"damped_{factor}"] = values + share.squeeze(-1)
            parts[f"share_{factor}"] = share[..., 0, 0].expand(values.shape[:-1]).contiguous()
        return parts

    def install(self, layer: Layer, parts: Parts) -> None:
        """Rotate the moments along with the basis, and let go of A and B; see `Preconditioner`.

        Args:
            layer: they belong to.
            parts: what `decompose` returned.
        """
        state = layer.state
        turn_moments(state, parts, squares=("exp_avg_sq", "variance"))
        state.update(parts)
        for factor in "AB":
            del state[factor]

    def updates(
        self, layers: list[Layer], gradients: list[Tensor], group: Group, report: Report
    ) -> list[Tensor]:
        """(ν m/C + μ m/√v) / lr; see `Preconditioner`.

        Args:
            layers: refreshed.
            gradients: one matrix each.
            group: momentum is β₁ of m, alpha β₂ of v and of the variance; kl_clip is κ, and
                changes. None leaves the natural gradient alone, as long as it is.
            report: takes κ, both cosines, ν/lr and μ/lr.

        Returns:
            Updates.
        """
        states = [layer.state for layer in layers]
        new = rotated(states, gradients)
        if group["kl_clip"] is None:
            self._absorb(states, new, group)
            natural = _in_a_row(_averages(states, group)) / self._curvature(states, group)
            return rotated_back(states, _apart(natural, new))
        cosines = self._cosines(states, new, group)
        self._absorb(states, new, group)
        floor = self._floor(states, group)
        metrics = self._metrics(states, group, floor)
        m = _in_a_row(_averages(states, group))
        natural, adam = (m / metric for metric in metrics)
        lengths = [torch.dot(natural, m), torch.dot(adam * metrics.natural, adam)]
        # One wait for the device: everything that the host is to know comes together.
        *numbers, group["adam_floor"] = torch.stack([*cosines, *lengths, floor]).tolist()
        nu, mu = self._within_radii(Figures(*numbers), group, report)
        step = natural.mul_(nu).add_(adam, alpha=mu)
        return rotated_back(states, _apart(step, new))

    def _cosines(self, states: list[Group], new: list[Tensor], group: Group) -> list[Tensor]:
        """Both c, before the new gradients enter the metrics; 0 at the first step."""
        known = [i for i, state in enumerate(states) if "exp_avg" in state]
        if not known:
            return list(new[0].new_zeros(2))
        states = [states[i] for i in known]
        g, m = _in_a_row([new[i] for i in known]), _in_a_row(_averages(states, group))
        metrics = self._metrics(states, group, group.get("adam_floor", 0.0))
        return [_cosine(g, m, metric) for metric in metrics]

    @staticmethod
    def _absorb(states: list[Group], new: list[Tensor], group: Group) -> None:
        """Adam's moments, and the mean square of what the first one did not foresee."""
        beta2 = group["alpha"]
        for state, g in zip(states, new, strict=True):
            if "variance" not in state:
                state["variance"] = torch.zeros_like(g)
        old = [i for i, state in enumerate(states) if "exp_avg" in state]
        if old:
            before = [states[i] for i in old]
            surprises = torch._foreach_sub([new[i] for i in old], _averages(before, group))
            variances = [state["variance"] for state in before]
            torch._foreach_mul_(variances, beta2)
            torch._foreach_addcmul_(variances, surprises, surprises, value=1.0 - beta2)
        absorb(states, new, group["momentum"], beta2)

    def _metrics(self, states: list[Group], group: Group, floor: Tensor | float) -> Metrics:
        scale = _in_a_row(deviations(states, group["alpha"]))
        return Metrics(self._curvature(states, group), scale.add_(floor))

    @staticmethod
    def _curvature(states: list[Group], group: Group) -> Tensor:
        kronecker = [s["damped_B"].unsqueeze(-1) * s["damped_A"].unsqueeze(-2) for s in states]
        # The first gradient surprises nobody, so that one number less has been averaged.
        counts = [max(state["adam_step"] - 1, 1) for state in states]
        shares = [
            VARIANCE_SHARE * state.get("fisher_scale", 1.0) / (1.0 - group["alpha"] ** n)
            for state, n in zip(states, counts, strict=True)
        ]
        fisher = torch._foreach_mul([state["variance"] for state in states], shares)
        return _in_a_row(torch._foreach_maximum(kronecker, list(fisher)))

    @staticmethod
    def _floor(states: list[Group], group: Group) -> Tensor:
        """Adam's ε: a share of the largest √v of all layers so far; steps end as gradients do."""
        roots = [state["exp_avg_sq"].mean().sqrt() for state in states]
        factors = [c**0.5 for c in corrections(states, group["alpha"])]
        largest = FLOOR * torch.stack(torch._foreach_div(roots, factors)).max()
        known = group.get("adam_floor", 0.0)
        return torch.where(torch.isfinite(largest), largest.clamp_min(known), known)

    @staticmethod
    def _within_radii(figures: Figures, group: Group, report: Report) -> tuple[float, float]:
        """ν/lr and μ/lr; κ and the learning rate of Adam's part change."""
        cosine, adam_cosine, squared, adam_natural = figures
        lr = max(group["lr"], TINY)
        _follow(group, "kl_clip", cosine, RADIUS_RANGE)
        nu = min(1.0, math.sqrt(group["kl_clip"] / max(squared, TINY)) / lr)
        length = (lr * nu) ** 2 * squared
        group["travelled"] = group.get("travelled", 0.0) + length
        if "adam_lr" in group:
            _follow(group, "adam_lr", adam_cosine, ADAM_RANGE, 0.5)
        elif 0.0 < adam_natural < math.inf:
            start = min(length, RADIUS_RANGE[1]) / min(lr, 1.0) ** 2
            group["adam_lr"] = min(math.sqrt(start / adam_natural), ADAM_RANGE[1])
        mu = group.get("adam_lr", 0.0) / max(lr, 1.0)
        report |= {"kl_clip": group["kl_clip"], "cosine": cosine, "clip_factor": nu}
        report |= {"adam_lr": group.get("adam_lr", 0.0), "adam_cosine": adam_cosine}
        report["adam_factor"] = mu
        return nu, mu


def _follow(
    group: Group, name: str, cosine: float, bounds: tuple[float, float], power: float = 1.0
) -> None:
    """Change a radius, or its root, by what the new gradients say to the last step."""
    if cosine == 0.0 or not math.isfinite(cosine):
        return  # no last step, or no word about it
    settled = 1.0 + group["step"] / SETTLE
    change = RATE / settled * (max(-1.0, min(1.0, cosine)) - AIM / settled)
    low, high = bounds
    group[name] = min(max(group[name] * math.exp(power * change), low), high)


def _averages(states: list[Group], group: Group) -> list[Tensor]:
    """Each layer's m, corrected for its start at zero."""
    first = [state["exp_avg"] for state in states]
    return list(torch._foreach_div(first, corrections(states, group["momentum"])))


def _cosine(g: Tensor, m: Tensor, metric: Tensor) -> Tensor:
    """Of two directions in the metric's dual; 0 where one of them is 0."""
    dual = g / metric
    lengths = torch.dot(dual, g).sqrt() * torch.dot(m / metric, m).sqrt()
    return torch.dot(dual, m) / lengths.clamp_min(TINY)


def _in_a_row(matrices: Sequence[Tensor]) -> Tensor:
    return torch.cat([matrix.reshape(-1) for matrix in matrices])


def _apart(row: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = row.split([matrix.numel() for matrix in like])
    return [part.view_as(matrix) for part, matrix in zip(parts, like, strict=True)]


def is_due(group: Group) -> bool:
    """Whether the curvature is too old for the next step.

    Args:
        group: settings, with the number of the next step, that of the last refresh, and what the
            steps since then add up to.

    Returns:
        True if the next backward pass is to collect.
    """
    step: int = group["step"]
    waited = step - group.get("refreshed", 0)
    far = group.get("travelled", 0.0) >= STALE
    return step < EARLY or waited >= group["update_freq"] or far
