"""Table 2: memory and time of the derivations' stages as m, n, R and the depth grow.

The paper states complexities; here they are measured. The field is a small network applied at
every position of a sequence, so that the state dimension m grows with the length alone, and the
number of parameters n with the network's widths while the length shrinks. Theorem 1, whose
matrices have (m + n)² entries, has sizes of its own where the others' would not fit. Memory is
the peak of the bytes that tensors hold at one time, as torch's own profiler counts every
allocation; time is the CPU time of the process, the median of interleaved rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from torchdyn_snopt import low_rank_adjoint, odeint_snopt, record_curvature, second_order_adjoint
from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable
from torchdyn_snopt.experiments.environment import describe_environment
from torchdyn_snopt.experiments.figures import STYLES, Style
from torchdyn_snopt.experiments.reproduce.measured import Measured

ROUNDS = 3
FITTED = 3  # the largest sizes, where the leading term shows


@dataclass(frozen=True)
class Size:
    """One problem.

    Attributes:
        length: Positions.
        channels: At each of them; m = length · channels.
        width: Of the hidden layer; n = (2 · channels + 1) · width + channels.
        rank: R, for Proposition 2.
        depth: Steps of rk4.
    """

    length: int = 16
    channels: int = 4
    width: int = 8
    rank: int = 1
    depth: int = 4

    @property
    def m(self) -> int:
        """Entries of the state."""
        return self.channels * self.length

    @property
    def n(self) -> int:
        """Parameters."""
        return (2 * self.channels + 1) * self.width + self.channels


def _square(channels: int, m: int) -> Size:
    """As wide as the state at a position, and m fixed."""
    return Size(m // channels, channels, channels, depth=1)


@dataclass(frozen=True)
class Sweep:
    """Sizes that grow in one quantity, and who is measured on them.

    Attributes:
        grows: 'm', 'n', 'R' or 'depth'.
        sizes: In growing order.
        methods: Names in `METHODS`.
    """

    grows: str
    sizes: tuple[Size, ...]
    methods: tuple[str, ...]


THEOREM_1 = ("Theorem 1",)
OTHERS = ("Proposition 2", "SNOpt", "first-order adjoint")
QUANTITIES = ("m", "n", "R", "depth")
# The last sweep's state is large enough that 2^18 entries have come together by 32 steps.
SWEEPS = (
    Sweep("m", tuple(Size(length) for length in (16, 32, 64, 128)), THEOREM_1 + OTHERS),
    Sweep("n", tuple(_square(channels, 48) for channels in (4, 8, 16, 24)), THEOREM_1),
    Sweep("n", tuple(_square(channels, 256) for channels in (32, 64, 128, 256)), OTHERS),
    Sweep(
        "R", tuple(Size(64, width=32, rank=rank) for rank in (4, 16, 64, 256)), ("Proposition 2",)
    ),
    Sweep("depth", tuple(Size(depth=depth) for depth in (8, 16, 32, 64)), THEOREM_1),
    Sweep("depth", tuple(Size(2048, depth=depth) for depth in (16, 32, 64, 128)), OTHERS),
)
PAPER = {
    "Theorem 1": "(m+n)²",
    "Proposition 2": "R(m+n)",
    "SNOpt": "Rm+2n",
    "first-order adjoint": "m+n",
}
NOTE = (
    "One sample, float64, rk4. Exponents: slope of log(memory) and log(time) over the three "
    "largest sizes; '–' where a method has no such quantity. Memory: peak bytes held by tensors "
    "(torch.profiler), activations of one field evaluation and the field's Jacobians included; "
    "SNOpt: the backward pass that collects A and B. Small rows wait there until 2^18 entries make "
    "one product: memory grows with the depth up to 2 MB for each of four factors, and two such "
    "copies while one is multiplied; the sweep over the depth is beyond that."
)
HEAD = ["method", "paper", "m", "n", "R", "depth"]


class _Positionwise(nn.Module):
    """The same network at each position of [N, length, channels]."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(channels, width), nn.Tanh(), nn.Linear(width, channels)
        ).double()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        f: Tensor = self.net(x)
        return f


Work = Callable[[], object]


def _theorem1(field: nn.Module, x0: Tensor, size: Size) -> Work:
    times = _times(size)
    return lambda: second_order_adjoint(field, x0, times, _loss, method="rk4")


def _proposition2(field: nn.Module, x0: Tensor, size: Size) -> Work:
    times = _times(size)
    seeds = torch.randn(size.rank, *x0.shape, dtype=x0.dtype)
    return lambda: low_rank_adjoint(field, x0, times, seeds, method="rk4")


def _first_order(field: nn.Module, x0: Tensor, size: Size) -> Work:
    ends = torch.tensor([0.0, 1.0], dtype=x0.dtype)
    options = {"step_size": 1.0 / size.depth}

    def work() -> None:
        field.zero_grad()
        states = odeint_snopt(field, x0, ends, method="rk4", options=options)
        _loss(states[-1]).backward()

    return work


def _snopt(field: nn.Module, x0: Tensor, size: Size) -> Work:
    first_order = _first_order(field, x0, size)

    def work() -> object:
        with record_curvature(field) as curvature:
            first_order()
        return curvature

    return work


METHODS: dict[str, Callable[[nn.Module, Tensor, Size], Work]] = {
    "Theorem 1": _theorem1,
    "Proposition 2": _proposition2,
    "SNOpt": _snopt,
    "first-order adjoint": _first_order,
}
_STYLES: dict[str, Style] = dict(zip(METHODS, STYLES.values(), strict=False))


def _times(size: Size) -> list[float]:
    return [i / size.depth for i in range(size.depth + 1)]


def _loss(x: Tensor) -> Tensor:
    return (x**4 / 4 + x.sin()).sum()


def run_table2(
    tell: Callable[[str], None],
    sweeps: Sequence[Sweep] = SWEEPS,
    rounds: int = ROUNDS,
) -> Measured:
    """Measure every method along every sweep.

    Args:
        tell: Told about the progress.
        sweeps: Sizes by what grows in them.
        rounds: Timed repetitions, methods taking turns.

    Returns:
        Two tables of exponents, and the curves.
    """
    raw: list[dict[str, Any]] = []
    for sweep in sweeps:
        for size in sweep.sizes:
            tell(f"{sweep.grows}: m={size.m}, n={size.n}, R={size.rank}, depth {size.depth}")
            rows = measure(size, rounds, sweep.methods)
            raw += [{"sweep": sweep.grows, **row} for row in rows]
    tables = [
        BenchTable(f"Exponents of {name}", HEAD, _exponents(raw, key))
        for name, key in (("memory", "bytes"), ("time", "seconds"))
    ]
    environment = describe_environment(torch.device("cpu"))
    report = BenchReport("table2", tables, NOTE, environment, raw)
    return Measured(report, _draw(raw))


def measure(size: Size, rounds: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Memory and time of some methods on one problem.

    Args:
        size: The problem.
        rounds: Timed repetitions.
        methods: Their names.

    Returns:
        One dictionary for each method.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        field = _Positionwise(size.channels, size.width)
        x0 = torch.randn(1, size.length, size.channels, dtype=torch.float64)
        works = {name: METHODS[name](field, x0, size) for name in methods}
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    sizes = {"m": size.m, "n": size.n, "R": size.rank, "depth": size.depth}
    return [
        {
            "method": name,
            **sizes,
            "bytes": peak_bytes(work),
            "seconds": statistics.median(seconds[name] or [math.nan]),
            "rounds": seconds[name],
        }
        for name, work in works.items()
    ]


def peak_bytes(work: Work) -> int:
    """The most that tensors hold at one time during some work, beyond what they held before.

    Args:
        work: What to do.

    Returns:
        Bytes on the CPU.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    events = [e for e in results.events() if e.name() == "[memory]"]
    del result
    total, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def _exponents(raw: list[dict[str, Any]], key: str) -> list[list[str]]:
    rows = []
    for method in METHODS:
        cells = [method, PAPER[method]]
        for grows in QUANTITIES:
            points = [r for r in raw if r["sweep"] == grows and r["method"] == method]
            cells.append("–" if len(points) < 2 else f"{_slope(points, grows, key):.2f}")
        rows.append(cells)
    return rows


def _slope(points: Sequence[dict[str, Any]], sweep: str, key: str) -> float:
    last = sorted(points, key=lambda p: p[sweep])[-FITTED:]
    x, y = ([math.log(p[name]) for p in last] for name in (sweep, key))
    return round(float(np.polyfit(x, y, 1)[0]), 2) + 0.0  # no "-0.00"


def _draw(raw: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(11.0, 5.4), layout="constrained")
    panels = figure.subplots(2, len(QUANTITIES), sharey="row", sharex="col")
    kinds = (("bytes", 1e-6, "peak memory [MB]"), ("seconds", 1e3, "CPU time [ms]"))
    titles = {"m": "state m", "n": "parameters n", "R": "rank R", "depth": "depth (steps)"}
    for row, (key, scale, label) in zip(panels, kinds, strict=True):
        row[0].set_ylabel(label)
        for axis, sweep in zip(row, QUANTITIES, strict=True):
            for method, style in _STYLES.items():
                points = [r for r in raw if r["sweep"] == sweep and r["method"] == method]
                if not points:
                    continue
                axis.loglog(
                    [p[sweep] for p in points],
                    [p[key] * scale for p in points],
                    color=style.color,
                    linestyle=style.line,
                    marker=style.marker,
                    label=method,
                )
            sizes = sorted({p[sweep] for p in raw if p["sweep"] == sweep})
            axis.set_xticks(sizes, [str(size) for size in sizes], rotation=60, fontsize="small")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            if key == "seconds":
                axis.set_xlabel(titles[sweep])
    lines, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(METHODS))
    return figure
