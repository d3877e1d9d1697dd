"""`bench adjoint`: whole training steps by this package and by its two hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torchdiffeq
from torch import Tensor, nn

from torchdyn_snopt.experiments.bench.cases import CASES, TOLERANCE, Case, loss_of, node_for
from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable
from torchdyn_snopt.experiments.bench.timing import Timings, interleave, whole
from torchdyn_snopt.experiments.environment import describe_environment
from torchdyn_snopt.experiments.meters import Clock, SolveMeter

OURS = "snopt"
TORCHDYN = "torchdyn adjoint"
AUTOGRAD = "torchdyn autograd"
TORCHDIFFEQ = "torchdiffeq odeint_adjoint"
TORCHDIFFEQ_SEMINORM = "torchdiffeq odeint_adjoint, seminorm"
HEAD = ["contender", "ms", "NFE forward", "NFE backward", "gradient error", "snopt takes"]
NOTE = (
    "One training step: forward solve, loss, backward solve, by dopri5 over t in [0, 1] with all "
    f"tolerances {TOLERANCE:g}, float32; the same field and weights for all contenders. ms: median "
    "over rounds. 'snopt takes': its time relative to the contender's, median [minimum, maximum] "
    "of the ratios within rounds. Gradient error: distance from autograd's parameter gradient, "
    "relative to its norm; a backward solve is as good as its tolerance, and torchdyn and "
    "torchdiffeq choose their steps by other norms."
)


@dataclass(frozen=True)
class Step:
    """A training step with its counter of field evaluations.

    Attributes:
        module: What holds the parameters.
        states: The initial states.
        trajectory: From them to the states at t = 0 and 1.
        evaluations: Counts the evaluations of the field so far.
    """

    module: nn.Module
    states: Tensor
    trajectory: Callable[[Tensor], Tensor]
    evaluations: Callable[[], int]

    def __call__(self) -> None:
        """Forward, loss, backward."""
        self.forward().backward()

    def forward(self) -> Tensor:
        """Forget the gradients, then solve forward.

        Returns:
            The loss.
        """
        self.module.zero_grad()
        self.states.grad = None
        return loss_of(self.trajectory(self.states))

    def count(self) -> tuple[int, int]:
        """Take a step.

        Returns:
            Its field evaluations, forward and backward.
        """
        before = self.evaluations()
        loss = self.forward()
        between = self.evaluations()
        loss.backward()
        return between - before, self.evaluations() - between

    def gradient(self) -> Tensor:
        """Take a step.

        Returns:
            Its parameter gradient, flattened.
        """
        self()
        return torch.cat([cast(Tensor, p.grad).flatten() for p in self.module.parameters()])


def torchdyn_step(case: Case, field: nn.Module, device: torch.device, sensitivity: str) -> Step:
    """A step by a torchdyn NeuralODE.

    Args:
        case: The case.
        field: Its field.
        device: Where to run.
        sensitivity: torchdyn's name of the backward pass.

    Returns:
        The step.
    """
    node = node_for(field, sensitivity)
    t = torch.linspace(0.0, 1.0, 2, device=device)

    def trajectory(x: Tensor) -> Tensor:
        return cast(Tensor, node(x, t))

    return Step(node, case.states(device), trajectory, SolveMeter(node).evaluations)


def torchdiffeq_step(
    case: Case, field: nn.Module, device: torch.device, options: dict[str, Any] | None
) -> Step:
    """A step by torchdiffeq's `odeint_adjoint`.

    Args:
        case: The case.
        field: Its field.
        device: Where to run.
        options: Its ``adjoint_options``.

    Returns:
        The step.
    """
    counting = _Counting(field)
    t = torch.linspace(0.0, 1.0, 2, device=device)

    def trajectory(x: Tensor) -> Tensor:
        states = torchdiffeq.odeint_adjoint(
            counting,
            x,
            t,
            rtol=TOLERANCE,
            atol=TOLERANCE,
            method="dopri5",
            adjoint_options=options,
        )
        return cast(Tensor, states)

    return Step(counting, case.states(device), trajectory, lambda: counting.nfe)


class _Counting(nn.Module):
    """A field without t in the signature of torchdiffeq."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field, self.nfe = field, 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.nfe += 1
        return cast(Tensor, self.field(x))


def steps_for(case: Case, device: torch.device) -> dict[str, Step]:
    """All contenders on one case, over one and the same field.

    Args:
        case: The case.
        device: Where to run.

    Returns:
        Steps by name.
    """
    field = case.field(device)
    return {
        OURS: torchdyn_step(case, field, device, "snopt"),
        TORCHDYN: torchdyn_step(case, field, device, "adjoint"),
        AUTOGRAD: torchdyn_step(case, field, device, "autograd"),
        TORCHDIFFEQ: torchdiffeq_step(case, field, device, None),
        TORCHDIFFEQ_SEMINORM: torchdiffeq_step(case, field, device, {"norm": "seminorm"}),
    }


def bench_adjoint(
    rounds: int,
    device: torch.device,
    tell: Callable[[str], None],
    cases: Sequence[Case] = CASES,
) -> BenchReport:
    """Measure all contenders on all cases.

    Args:
        rounds: Measurements of each contender.
        device: Where to run.
        tell: Told about the progress.
        cases: What to measure on.

    Returns:
        One table per case.
    """
    tables, raw = [], []
    for case in cases:
        tell(case.name)
        steps = steps_for(case, device)
        counts = {name: step.count() for name, step in steps.items()}
        errors = _gradient_errors(steps)
        timings = interleave(
            {name: whole(step) for name, step in steps.items()}, rounds, Clock(device)
        )
        tables.append(_table(case, timings, counts, errors))
        raw += [
            {
                "case": case.name,
                "contender": name,
                "seconds": timings.seconds[name],
                "nfe_forward": counts[name][0],
                "nfe_backward": counts[name][1],
                "gradient_error": errors[name],
                "snopt_ratio_median": timings.ratio(OURS, name).median,
            }
            for name in steps
        ]
    return BenchReport("adjoint", tables, NOTE, describe_environment(device), raw)


def _gradient_errors(steps: Mapping[str, Step]) -> dict[str, float]:
    """Distance of each contender's gradient from autograd's, relative to the latter's norm."""
    gradients = {name: step.gradient() for name, step in steps.items()}
    reference = gradients[AUTOGRAD]
    return {
        name: ((gradient - reference).norm() / reference.norm()).item()
        for name, gradient in gradients.items()
    }


def _table(
    case: Case,
    timings: Timings,
    counts: Mapping[str, tuple[int, int]],
    errors: Mapping[str, float],
) -> BenchTable:
    body = [
        [
            name,
            f"{timings.milliseconds(name):.2f}",
            str(counts[name][0]),
            str(counts[name][1]),
            f"{errors[name]:.1e}",
            "" if name == OURS else timings.ratio(OURS, name).show(),
        ]
        for name in counts
    ]
    return BenchTable(case.name, HEAD, body)
