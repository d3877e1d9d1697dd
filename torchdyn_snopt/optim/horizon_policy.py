"""The horizon's second-order feedback policy: T ← T − η δT, Q_TT δT = Q_T + Q_Tu δθ (Eq. 16).

It runs after θ has moved, and moves every horizon among the optimizer's parameters:

- Q_T is the gradient that autograd left in ``t1.grad``, so whatever the user added to the loss, as
  the penalty c/2·t1², is in it.
- Q_TT is taken at rank one of each sample: mean_b (N a_b·F_b)² + c, never negative.
- Q_Tu δθ, with the δθ that has just been applied, is how Q_T answers to it: the batch is solved
  again without a graph, from the same x0 and with the new θ, which gives δx = x_u δθ and the new F
  at the end. Then Q_Tu δθ = mean_b (N a_b·F_b)(N a_b·δx_b) + Σ_b a_b·(F_new − F)_b. The first term
  is of the same rank as Q_TT: N a_b·δx_b is the sample's N p_b·δθ of Proposition 2. The second
  holds what acts on F itself, Φ_x·(F_u + F_x x_u) δθ.

Why solve again: early in training the second term is the larger one, and of opposite sign; close
to the best T the first is. The product of means Q_T (Σ_b p_b·δθ), which would cost nothing, loses
it there: the mean of a_b·F_b vanishes at the best T, its products with a_b·δx_b do not.

The average is taken of T² Q_TT, the curvature in log T, so that batches seen at different T agree
in scale. The k-th update has the step size η exp(−(k/K)²): full Newton steps at first, which carry
every start to the same T, then ever shorter ones, in the end none. They must become shorter: as the
loss goes to 0 so does Q_T without the penalty, and full steps would follow the balance of both down
to the lower bound. So K decides where on that way T stays, as much as the penalty does. And they
must be long enough before: where the loss has become small, Newton steps of the penalty alone
shrink T in proportion, and two starts that have not met by then stay apart.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchdyn_snopt.curvature.horizon import HorizonWatch, horizon_spec
from torchdyn_snopt.errors import InvalidInputError, check_real

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor

    from torchdyn_snopt.curvature.horizon import HorizonSample, HorizonSpec

SMALLEST_SHARE = 0.02  # of a full step: shorter ones move T less than its noise, at the same cost

Group = dict[str, Any]
State = dict[str, Any]


@dataclass(frozen=True)
class HorizonPolicy:
    """Settings of the policy.

    Attributes:
        lr: η, 1 for full Newton steps.
        interval: iterations between updates of T; only these cost anything.
        warm_up: iterations before the first update: until the weights have begun to learn, Q_T
            says little of T. Keep it short: weights learned at a poor T hold T there.
        settle: K, updates until steps have shrunk to 37 %. Those below 2 %, after 2 K updates,
            are no longer taken, nor paid for: T stays. About a third of the updates of a training,
            or less.
        decay: of the exponential average of T² Q_TT.
        trust: largest relative change of T in one update.
        feedback: whether δθ is accounted for, by one further solve without gradients.

    Raises:
        InvalidInputError: a value out of range.
    """

    lr: float = 1.0
    interval: int = 2
    warm_up: int = 8
    settle: float = 30.0
    decay: float = 0.6
    trust: float = 0.4
    feedback: bool = True

    def __post_init__(self) -> None:
        for name in ("lr", "decay", "settle", "trust"):
            check_real(name, getattr(self, name), do=f"leave {name} at its default")
        ranges = {
            "lr": (0.0 <= self.lr < math.inf, "a finite number of at least 0"),
            "interval": (_is_count(self.interval, 1), "a whole number of at least 1"),
            "warm_up": (_is_count(self.warm_up, 0), "a whole number of at least 0"),
            "decay": (0.0 <= self.decay < 1.0, "a number in [0, 1)"),
            "settle": (self.settle > 0.0, "a number above 0; infinity for full steps throughout"),
            "trust": (0.0 < self.trust < 1.0, "a number in (0, 1)"),
        }
        for name, (fine, allowed) in ranges.items():
            if not fine:
                raise InvalidInputError(
                    f"{name} of the horizon's policy is out of range",
                    got=f"{name}={getattr(self, name)!r}",
                    allowed=allowed,
                    do=f"leave {name} at its default",
                )

    def due(self, step: int) -> bool:
        """Whether T moves in a step.

        Args:
            step: finished steps.

        Returns:
            True if so.
        """
        updates, between = divmod(step - self.warm_up, self.interval)
        return updates >= 0 and not between and self.share(updates + 1) >= SMALLEST_SHARE

    def share(self, update: int) -> float:
        """What an update takes of a full step.

        Args:
            update: its number, from 1.

        Returns:
            exp(−(k/K)²).
        """
        return math.exp(-((update / self.settle) ** 2))

    def settings(self) -> dict[str, float | int | bool]:
        """As plain values, for a parameter group.

        Returns:
            A dictionary.
        """
        return asdict(self)


def horizons_among(params: Iterable[Tensor]) -> list[Tensor]:
    """Those parameters that are horizons.

    Args:
        params: any.

    Returns:
        Them, in their order.
    """
    return [p for p in params if horizon_spec(p) is not None]


class Exchange:
    """A process on its own; several ranks, or a scaled loss, bring their own.

    Attributes:
        unit: weight of an arriving slope in the gradient: 1/ranks, 1/(loss scale).
    """

    unit: float = 1.0

    def sum(self, values: Sequence[float], like: Tensor) -> list[float]:
        """Add up over the ranks.

        Args:
            values: of this one.
            like: a tensor on the device to communicate by.

        Returns:
            The sums, in double precision.
        """
        return list(values)


class HorizonMover:
    """Moves the horizons of an optimizer's groups, and asks for samples when that is due."""

    def __init__(self) -> None:
        """No groups yet."""
        self._watches: list[HorizonWatch] = []

    def watch(self, group: Group) -> None:
        """Take in the optimizer's next group.

        Args:
            group: its settings; 'horizon' may be a `HorizonPolicy` and becomes plain values.
        """
        if isinstance(group["horizon"], HorizonPolicy):
            group["horizon"] = group["horizon"].settings()
        watch = HorizonWatch(horizons_among(group["params"]))
        watch.active = _policy(group).due(group["step"])
        self._watches.append(watch)

    def forget(self) -> None:
        """Drop the samples of the last backward pass."""
        for watch in self._watches:
            watch.clear()

    def move(
        self,
        groups: list[Group],
        states: Mapping[Tensor, State],
        names: dict[Tensor, str],
        exchange: Exchange | None = None,
    ) -> dict[str, float]:
        """Update every horizon that is due, after θ has moved.

        Args:
            groups: of the optimizer, their steps counted.
            states: the optimizer's state.
            names: of the parameters, for the report.
            exchange: what other ranks add, and in what units the samples came; None: nothing.

        Returns:
            By name: t1, Q_T, Q_TT, and the open-loop and the feedback part of the change of t1
            before trust region and bounds; with several horizons each name begins with theirs.
        """
        due = [
            (group, watch, horizon)
            for group, watch in zip(groups, self._watches, strict=True)
            if watch.active
            for horizon in horizons_among(group["params"])
            if horizon.grad is not None
        ]
        report: dict[str, float] = {}
        exchange = exchange or Exchange()
        for group, watch, horizon in due:
            figures = _Update(horizon, watch.samples(horizon), group, exchange).apply(
                states[horizon]
            )
            prefix = "" if len(due) == 1 else f"{names[horizon]}."
            report |= {prefix + name: value for name, value in figures.items()}
        for group, watch in zip(groups, self._watches, strict=True):
            watch.clear()
            watch.active = _policy(group).due(group["step"])
        return report


def _policy(group: Group) -> HorizonPolicy:
    return HorizonPolicy(**group["horizon"])


class _Update:
    """One update of one horizon."""

    def __init__(
        self, horizon: Tensor, samples: list[HorizonSample], group: Group, exchange: Exchange
    ) -> None:
        spec = horizon_spec(horizon)
        assert spec is not None
        assert horizon.grad is not None
        self.horizon, self.policy, self.exchange = horizon, _policy(group), exchange
        self.spec: HorizonSpec = spec
        self.sign = -1.0 if group["maximize"] else 1.0
        self.gradient = self.sign * horizon.grad.item()
        self.length = horizon.item() - spec.t0
        passes: dict[int, list[HorizonSample]] = {}
        for sample in samples:
            passes.setdefault(sample.task, []).append(sample)
        self.passes = list(passes.values())
        self.count = sum(some[0].slopes.numel() for some in self.passes)
        self.is_mean = group["reduction"] == "mean"
        self.scale = 1.0

    def apply(self, state: State) -> dict[str, float]:
        """Average, take the step, keep within trust region and bounds."""
        curvature = self._curvature()
        self._average(state, self.length**2 * curvature)
        feedback = self._feedback() if self.policy.feedback else 0.0
        open_loop, closed = (self._newton(part, state) for part in (self.gradient, feedback))
        self._move(open_loop + closed)
        return {
            "t1": self.horizon.item(),
            "Q_T": self.sign * self.gradient,
            "Q_TT": curvature + self.spec.penalty,
            "t1_open_loop": -open_loop,
            "t1_feedback": -closed,
        }

    def _curvature(self) -> float:
        """Q_TT without the penalty."""
        squares = sum(float(_slopes(some).square().sum()) for some in self.passes)
        count, squares = self.exchange.sum([self.count, squares], self.horizon)
        if count:
            # A slope that arrives enters the gradient with the weight of its unit.
            self.scale = (count if self.is_mean else 1.0) * self.exchange.unit**2
            return self.scale * squares
        # Solved by another sensitivity: the batch stands in for its samples.
        penalty = self.sign * self.spec.penalty * self.horizon.item()
        return float((self.gradient - penalty) ** 2)

    def _feedback(self) -> float:
        """Q_Tu δθ."""
        products = turns = 0.0
        for some in self.passes:
            responses = [sample.respond() for sample in some]
            answered = [response for response in responses if response is not None]
            if len(answered) < len(responses):
                products = math.nan
                break
            losses = torch.stack([response.losses.cpu().double() for response in answered]).sum(0)
            changes = torch.stack([response.slopes.cpu().double() for response in answered]).sum()
            products += float(_slopes(some).dot(losses))
            turns += float(changes)
        products, turns = self.exchange.sum([products, turns], self.horizon)
        total = self.scale * products + self.sign * self.exchange.unit * turns
        return total if math.isfinite(total) else 0.0

    def _average(self, state: State, curvature: float) -> None:
        """Take T² Q_TT into its average, which starts without bias."""
        count = int(state.get("horizon_updates", 0)) + 1
        decay = self.policy.decay
        share = (1.0 - decay) / (1.0 - decay**count)
        before = float(state.get("horizon_curvature", 0.0))
        state["horizon_updates"] = count
        state["horizon_curvature"] = before + share * (curvature - before)

    def _newton(self, derivative: float, state: State) -> float:
        """η δT for one part of Q_T."""
        lr = self.policy.lr * self.policy.share(state["horizon_updates"])
        curvature = state["horizon_curvature"] + self.length**2 * self.spec.penalty
        if curvature <= 0.0:  # an exact 0: no sample moves with T
            return 0.0
        return float(lr * self.length * (self.length * derivative) / curvature)

    def _move(self, step: float) -> None:
        limit = self.policy.trust * self.length
        target = self.spec.t0 + self.length - min(max(step, -limit), limit)
        self.horizon.fill_(min(max(target, self.spec.bounds[0]), self.spec.bounds[1]))


def _slopes(samples: list[HorizonSample]) -> Tensor:
    """dL/dT of each sample of the batch, summed over the solves of one backward pass."""
    return torch.stack([sample.slopes.cpu().double() for sample in samples]).sum(0)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
