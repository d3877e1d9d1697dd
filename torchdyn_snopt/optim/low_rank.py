"""'low_rank': the Gauss–Newton step (λI + Σ_k p_k ⊗ p_k)⁻¹ g from the columns of Proposition 2.

All parameters with columns form one system: nothing is split by layers and nothing is factorized
by Kronecker. With K columns of n entries the cost of a step is that of a Gram matrix of the smaller
side, O(K·n·min(K, n)), and of its Cholesky factor; memory is K·n entries for the columns as they
are collected and min(K, n)² in float64.

λ follows Levenberg and Marquardt where the optimizer is given a closure: the batch's loss is
evaluated again behind the step, and the ratio of its reduction to the one that the quadratic model
predicts makes λ shrink or grow (Martens & Grosse 2015, 6.5); a step that does not reduce the loss
is taken back and tried again with a greater λ.

With ``inner_steps`` above 1 the closure's batch serves several steps. The solve that judged a step
is then the forward pass of the next one: its backward pass waits at the loss (`seeds.Held`) until
the step is taken, so that a step that is not taken back costs one forward and one backward solve.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from torchdyn_snopt.errors import CurvatureError
from torchdyn_snopt.optim.preconditioners import trust_factor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from torchdyn_snopt.curvature.columns import ColumnCollector
    from torchdyn_snopt.optim.preconditioners import Report

Group = dict[str, Any]

# Levenberg–Marquardt: above the first ratio λ shrinks, below the second one it grows.
GOOD, BAD = 0.75, 0.25
SHRINK, GROW, REJECTED = 0.5, 2.0, 6.0
# Steps that may be taken back before θ is left where it was.
TRIALS = 6
DAMPING_RANGE = (1e-14, 1e8)
# λ relative to the trace of PᵀP, from which on its Gram matrix is as good as P itself. Below, λ is
# not driven by the reduction ratio.
SQUARED = 1e-9


class Damped:
    """λI + PᵀP for columns P [K, n], ready to be solved for any λ.

    Well-conditioned: a Cholesky factor of the smaller side's Gram matrix in float64 (Woodbury where
    that is K), with one step of refinement. With λ below `SQUARED` of the matrix's trace, or
    without float64, a singular value decomposition of P, which never squares it.
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        """Form the Gram matrix of the smaller side.

        Args:
            blocks: P by parameters, ``[K, n_i]`` each.
        """
        self.blocks, self.rows = blocks, len(blocks[0])
        self.sizes = [block.shape[1] for block in blocks]
        self.dense = sum(self.sizes) <= self.rows
        self.dtype = torch.float32 if blocks[0].device.type == "mps" else torch.float64
        self._factors: tuple[Tensor, Tensor] | None = None
        self._p = self._whole() if self.dense else None
        if self._p is not None:
            self.gram = self._p.mT @ self._p
        else:
            # One parameter at a time, so that float64 is never needed for all columns at once.
            self.gram = blocks[0].new_zeros(self.rows, self.rows, dtype=self.dtype)
            for block in blocks:
                part = block.to(self.dtype)
                self.gram.addmm_(part, part.mT)
        self.trace = float(self.gram.trace())

    def solve(self, g: Tensor, damping: float) -> Tensor:
        """(λI + PᵀP)⁻¹ g.

        Args:
            g: ``[n]``.
            damping: λ, above 0.

        Returns:
            ``[n]``, in float64 where the device has it.

        Raises:
            CurvatureError: a column or the gradient is not finite.
        """
        g = g.to(self.dtype)
        if not (math.isfinite(self.trace) and bool(torch.isfinite(g).all())):
            raise CurvatureError(
                "the low-rank curvature cannot be factorized",
                norms={"g": float(g.norm()), "p": self.trace**0.5},
                got=f"damping={damping:g}",
                allowed="finite gradients and columns",
                do="look for non-finite activations or gradients, or raise damping",
            )
        if self.dtype is torch.float64 and damping > SQUARED * self.trace:
            return self._solve_squared(g, damping)
        return self._solve_by_singular_values(g, damping)

    def right(self, d: Tensor) -> Tensor:
        """P d.

        Args:
            d: ``[n]``.

        Returns:
            ``[K]``.
        """
        if self._p is not None:
            return self._p @ d
        parts = zip(self.blocks, d.split(self.sizes), strict=True)
        return torch.stack([block.to(d.dtype) @ part for block, part in parts]).sum(0)

    def left(self, c: Tensor) -> Tensor:
        """Pᵀ c.

        Args:
            c: ``[K]``.

        Returns:
            ``[n]``.
        """
        if self._p is not None:
            return self._p.mT @ c
        return torch.cat([block.to(c.dtype).mT @ c for block in self.blocks])

    def _whole(self) -> Tensor:
        return torch.cat(list(self.blocks), 1).to(self.dtype)

    def _solve_squared(self, g: Tensor, damping: float) -> Tensor:
        damped = self.gram.clone()
        damped.diagonal().add_(damping)
        factor = torch.linalg.cholesky(damped)

        def inverse(b: Tensor) -> Tensor:
            if self.dense:
                return torch.cholesky_solve(b.unsqueeze(1), factor).squeeze(1)
            inner = torch.cholesky_solve(self.right(b).unsqueeze(1), factor).squeeze(1)
            return (b - self.left(inner)) / damping

        d = inverse(g)
        return d + inverse(g - damping * d - self.left(self.right(d)))

    def _solve_by_singular_values(self, g: Tensor, damping: float) -> Tensor:
        if self._factors is None:
            _, s, v = torch.linalg.svd(self._whole() if self._p is None else self._p, False)
            self._factors = s, v
        s, v = self._factors
        inner = v @ g
        rest = g - v.mT @ inner
        rest = rest - v.mT @ (v @ rest)
        return v.mT @ (inner / (s.square() + damping)) + rest / damping


def next_damping(damping: float, ratio: float, floor: float = 0.0) -> float:
    """λ for the next step, from the ratio of the actual to the predicted reduction.

    Args:
        damping: λ of this step.
        ratio: NaN or not positive when the step is to be taken back.
        floor: λ shrinks no further.

    Returns:
        Within `DAMPING_RANGE`.
    """
    if not ratio > 0.0:
        factor = REJECTED
    elif ratio > GOOD:
        factor = SHRINK if damping > floor else 1.0
    else:
        factor = GROW if ratio < BAD else 1.0
    low, high = DAMPING_RANGE
    return min(max(damping * factor, low), high)


class LowRankStep:
    """The step of one parameter group: θ ← θ − lr (λI + γI + PᵀP)⁻¹ (g + γθ), and back again."""

    def __init__(self, group: Group, states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Gather the gradient and the columns.

        Args:
            group: settings and parameters; its damping is the λ of this step.
            states: the optimizer's state, with the columns of each parameter that has some.
        """
        self.group = group
        self.params = [
            p for p in group["params"] if p.grad is not None and "columns" in states.get(p, {})
        ]
        self.states = [states[p] for p in self.params]
        self.start = [p.detach().clone() for p in self.params]
        if not self.params:
            return
        sign, decay = (-1.0 if group["maximize"] else 1.0), group["weight_decay"]
        self.system = Damped([state["columns"] for state in self.states])
        dtype = self.system.dtype
        self.plain = sign * torch.cat([_gradient(p).to(dtype) for p in self.params])
        theta = torch.cat([p.reshape(-1).to(dtype) for p in self.params])
        self.gradient = self.plain + decay * theta

    def apply(self, report: Report) -> float:
        """Move θ from where the step started.

        Args:
            report: takes figures worth logging.

        Returns:
            The reduction of the loss that the quadratic model predicts (without weight decay).
        """
        if not self.params:
            return 0.0
        group = self.group
        d = self.system.solve(self.gradient, group["damping"] + group["weight_decay"])
        if group["kl_clip"] is not None:
            clip = trust_factor(self.gradient.dot(d), group["lr"], group["kl_clip"])
            report["clip_factor"] = clip
            d = d * clip
        d = self._with_momentum(d)
        step = -group["lr"] * d
        parts = step.split([p.numel() for p in self.params])
        for p, start, part in zip(self.params, self.start, parts, strict=True):
            p.copy_(start + part.view_as(p).to(p.dtype))
        report["damping"] = group["damping"]
        curved = self.system.right(step).square().sum()
        return -float(self.plain.dot(step) + 0.5 * curved)

    def take_back(self) -> None:
        """Put θ back to where the step started."""
        for p, start in zip(self.params, self.start, strict=True):
            p.copy_(start)

    def keep(self) -> None:
        """Finish a step that is not taken back: keep its momentum."""
        if self.group["momentum"] != 0.0:
            parts = self._buffer.split([p.numel() for p in self.params])
            for state, p, part in zip(self.states, self.params, parts, strict=True):
                state["momentum_buffer"] = part.view_as(p).clone()

    def _with_momentum(self, d: Tensor) -> Tensor:
        """Heavy ball; a trial that is taken back leaves no trace in the buffers."""
        momentum = self.group["momentum"]
        if momentum == 0.0:
            return d
        old = [
            state["momentum_buffer"] if "momentum_buffer" in state else torch.zeros_like(p)
            for state, p in zip(self.states, self.params, strict=True)
        ]
        buffer: Tensor = d + momentum * torch.cat([b.reshape(-1).to(d) for b in old])
        self._buffer = buffer
        return buffer


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad.reshape(-1)


def absorb_columns(
    group: Group, collector: ColumnCollector, states: Mapping[Tensor, dict[str, Any]]
) -> None:
    """Replace the columns in the state by those of the last backward pass.

    Args:
        group: parameters and settings.
        collector: of the group, everything delivered.
        states: the optimizer's state.

    Raises:
        CurvatureError: gradients have arrived, but no loss has sent columns with them.
    """
    params = [p for p in group["params"] if p.grad is not None]
    blocks = collector.blocks(params)
    if params and not blocks and not collector.seeded:
        raise CurvatureError(
            "no columns have arrived for the low-rank step",
            got="gradients of a loss that seeds no curvature",
            allowed="CrossEntropyLoss, MSELoss or GaussianNLLLoss of torchdyn_snopt",
            do="take the loss from torchdyn_snopt, and zero_grad() after the optimizer is built",
        )
    for p in group["params"]:
        states[p].pop("columns", None)
    for p, block in blocks.items():
        states[p]["columns"] = block


def decay_damping(group: Group) -> None:
    """The fixed schedule: λ shrinks by ``damping_decay`` at each step.

    Args:
        group: changed in place.
    """
    group["damping"] = max(group["damping"] * group["damping_decay"], DAMPING_RANGE[0])
