"""`bench refresh`: what collecting curvature costs, and what it costs not to collect it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from torchdyn_snopt import SNOpt, record_curvature
from torchdyn_snopt.experiments.bench.adjoint import Step, torchdyn_step
from torchdyn_snopt.experiments.bench.cases import CASES, Case
from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable
from torchdyn_snopt.experiments.bench.timing import Contender, Ratio, interleave, whole
from torchdyn_snopt.experiments.environment import describe_environment
from torchdyn_snopt.experiments.meters import Clock

Sharing = Literal["expand", "reduce"]

NEVER_AGAIN = 10**9  # an interval between refreshes that no benchmark lives to see
HEAD = ["case", "plain ms", "ms", "NFE backward, plain", "NFE backward", "ratio"]
NOTE = (
    "Collecting: the backward solve alone, inside record_curvature against outside it, from the "
    "same forward solve. In between: forward, loss and backward with an SNOpt attached that does "
    "not collect on this iteration, against the same without any optimizer. Ratios: median "
    "[minimum, maximum] within rounds; dopri5 at 1e-3, float32."
)


@dataclass(frozen=True)
class Turn:
    """A training step, and which part of it is measured."""

    step: Step
    contender: Contender


def bench_refresh(
    rounds: int,
    device: torch.device,
    tell: Callable[[str], None],
    cases: Sequence[Case] = CASES,
) -> BenchReport:
    """Measure refreshes, and iterations between refreshes.

    Args:
        rounds: Measurements of each contender.
        device: Where to run.
        tell: Told about the progress.
        cases: What to measure on.

    Returns:
        A table for each of the two.
    """
    collecting, between = [], []
    for case in cases:
        sharings: tuple[Sharing, ...] = ("reduce", "expand") if case.convolutional else ("reduce",)
        for sharing in sharings:
            tell(f"collecting, {case.name}, {sharing}")
            collecting.append(_measure_collecting(case, sharing, rounds, device))
        tell(f"in between, {case.name}")
        between.append(_measure_between(case, rounds, device))
    tables = [
        BenchTable(
            "A backward solve that collects curvature", HEAD, [_cells(r) for r in collecting]
        ),
        BenchTable("An iteration between refreshes", HEAD, [_cells(r) for r in between]),
    ]
    return BenchReport("refresh", tables, NOTE, describe_environment(device), collecting + between)


def _measure_collecting(
    case: Case, sharing: Sharing, rounds: int, device: torch.device
) -> dict[str, Any]:
    step = torchdyn_step(case, case.field(device), device, "snopt")
    name = f"{case.name}, {sharing}" if case.convolutional else case.name
    plain, collecting = Turn(step, _backward(step, None)), Turn(step, _backward(step, sharing))
    measured = _compare(plain, collecting, rounds, device)
    return {"part": "collecting", "case": name, "layers": _layers(step, sharing), **measured}


def _layers(step: Step, sharing: Sharing) -> int:
    """How many layers a collecting backward solve yields factors for."""
    with record_curvature(step.module, weight_sharing=sharing) as curvature:
        step()
    return len(curvature.factors)


def _backward(step: Step, sharing: Sharing | None) -> Contender:
    """The backward solve alone, with or without collecting."""

    def measure(clock: Clock) -> float:
        loss = step.forward()
        if sharing is None:
            return whole(loss.backward)(clock)
        with record_curvature(step.module, weight_sharing=sharing):
            return whole(loss.backward)(clock)

    return measure


def _measure_between(case: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    plain, attached = (torchdyn_step(case, case.field(device), device, "snopt") for _ in range(2))
    # lr=0: the first step refreshes the curvature and leaves the weights as they are. 'kfe_adam'
    # then keeps to update_freq alone, where the default refreshes in the next steps as well.
    optimizer = SNOpt(attached.module, lr=0.0, preconditioner="kfe_adam", update_freq=NEVER_AGAIN)
    attached()
    optimizer.step()
    turns = Turn(plain, whole(plain)), Turn(attached, whole(attached))
    return {"part": "in between", "case": case.name, **_compare(*turns, rounds, device)}


def _compare(plain: Turn, turn: Turn, rounds: int, device: torch.device) -> dict[str, Any]:
    clock = Clock(device)
    contenders = {"plain": plain.contender, "measured": turn.contender}
    timings = interleave(contenders, rounds, clock)
    return {
        "plain_seconds": timings.seconds["plain"],
        "seconds": timings.seconds["measured"],
        "plain_ms": timings.milliseconds("plain"),
        "ms": timings.milliseconds("measured"),
        "plain_nfe": _evaluations(plain, clock),
        "nfe": _evaluations(turn, clock),
        "ratios": list(timings.ratio("measured", "plain").values),
    }


def _evaluations(turn: Turn, clock: Clock) -> int:
    """Field evaluations of the backward solve inside one turn of a contender."""
    before = turn.step.evaluations()
    turn.contender(clock)
    return turn.step.evaluations() - before - turn.step.count()[0]


def _cells(result: dict[str, Any]) -> list[str]:
    return [
        result["case"],
        f"{result['plain_ms']:.2f}",
        f"{result['ms']:.2f}",
        str(result["plain_nfe"]),
        str(result["nfe"]),
        Ratio(tuple(result["ratios"])).show(),
    ]
