"""'trust_region': the natural gradient of 'kfac' in a trust region that follows the gradients.

The step is −ν C⁻¹ m, with C the damped Kronecker factors and m Adam's average of the gradients. ν
is at most lr (a learning rate of 1 is Newton's step), and so small that the model moves by no more
than κ in the metric of C: ν² ⟨d, C d⟩ ≤ κ for d = C⁻¹ m. For likelihoods, but for the damping, κ is
twice the KL divergence between the predictions before and after a step, in nats; no unit of a
weight enters.

Nobody has to know κ. The next gradient, which is there anyway, tells whether the last step Δ was
too long: its cosine with −Δ in the same metric,

    c = −⟨g, Δ⟩ / (‖g‖_{C⁻¹} ‖Δ‖_C),

is positive as long as the loss still falls along Δ, and negative where the step has passed the
minimum. κ ← κ exp(η (c − c₀)) makes κ grow while steps are too short, and shrink once they only
follow the noise of the batches. That takes no evaluation of the loss, unlike the rule of Levenberg
and Marquardt (Martens & Grosse 2015, 6.5); the idea of learning a step's length from the product of
successive gradients is Almeida et al.'s (1999) and Baydin et al.'s (2018). The rate η falls as the
gains of Robbins and Monro do, so that κ comes to rest; where batches give nothing but noise (c = 0)
it falls on by a power of the number of steps.

The curvature is refreshed when it has become old by that same measure: in each of the first `EARLY`
steps, then once the steps since the last refresh add up to `STALE`, at the latest after
``update_freq`` of them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from torchdyn_snopt.optim.preconditioners import KFAC, Report, product, trust_factor

if TYPE_CHECKING:
    from torch import Tensor

    from torchdyn_snopt.optim.layers import Layer

Group = dict[str, Any]

# κ ← κ exp(η (c − AIM)), with a rate η that falls as RATE / (1 + step/SETTLE).
RATE, AIM, SETTLE = 2.0, 0.1, 30.0
RADIUS_RANGE = (1e-10, 0.1)
# The curvature is refreshed in each of the first steps, and then when the squared lengths of the
# steps since the last refresh add up to this.
EARLY, STALE = 10, 1e-2


class TrustRegion(KFAC):
    """See the module. κ is the group's kl_clip, which changes from step to step."""

    def updates(
        self, layers: list[Layer], gradients: list[Tensor], group: Group, report: Report
    ) -> list[Tensor]:
        """ν/lr C⁻¹ m; see `Preconditioner`.

        Args:
            layers: refreshed.
            gradients: one matrix each.
            group: momentum is β₁ of m; kl_clip is κ, and changes.
            report: takes κ, the cosine and ν/lr.

        Returns:
            Updates.
        """
        if group["kl_clip"] is None:
            return self.naturals(layers, self._averages(layers, gradients, group["momentum"]))
        report["cosine"] = self._follow(layers, gradients, group)
        averages = self._averages(layers, gradients, group["momentum"])
        naturals = self.naturals(layers, averages)
        squared = product(naturals, averages)  # ⟨d, C d⟩, as C d is the averaged gradient
        factor = float(trust_factor(squared, group["lr"], group["kl_clip"]))
        report |= {"clip_factor": factor, "kl_clip": group["kl_clip"]}
        moved = (group["lr"] * factor) ** 2 * float(squared)
        group["travelled"] = group.get("travelled", 0.0) + moved
        for layer, natural, average in zip(layers, naturals, averages, strict=True):
            natural.mul_(factor)
            layer.state["last_update"] = natural
            layer.state["last_squared"] = factor * torch.sum(natural * average)
        return naturals

    def _follow(self, layers: list[Layer], gradients: list[Tensor], group: Group) -> float:
        """κ for this step, from what its gradients say to the last one.

        Returns:
            The cosine; 0 before there is a last step.
        """
        known = [
            (layer, g)
            for layer, g in zip(layers, gradients, strict=True)
            if "last_update" in layer.state
        ]
        if not known:
            return 0.0
        some = [layer for layer, _ in known]
        now = [g for _, g in known]
        last = [layer.state["last_update"] for layer in some]
        slope = product(now, last)
        length = torch.stack([layer.state["last_squared"] for layer in some]).sum().sqrt()
        lengths = length * product(now, self.naturals(some, now)).sqrt()
        cosine = 0.0 if lengths == 0.0 else float(slope / lengths)
        if math.isfinite(cosine):
            rate = RATE / (1.0 + group["step"] / SETTLE)
            change = rate * (max(-1.0, min(1.0, cosine)) - AIM)
            low, high = RADIUS_RANGE
            group["kl_clip"] = min(max(group["kl_clip"] * math.exp(change), low), high)
        return cosine

    @staticmethod
    def _averages(layers: list[Layer], gradients: list[Tensor], beta: float) -> list[Tensor]:
        """Adam's first moments, corrected for their start at zero."""
        averages = []
        for layer, g in zip(layers, gradients, strict=True):
            state = layer.state
            if "exp_avg" not in state:
                state["exp_avg"], state["adam_step"] = torch.zeros_like(g), 0
            state["adam_step"] += 1
            state["exp_avg"].lerp_(g, 1.0 - beta)
            averages.append(state["exp_avg"] / (1.0 - beta ** state["adam_step"]))
        return averages


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
