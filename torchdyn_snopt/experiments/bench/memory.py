"""`bench memory`: does the memory of a training step grow with the number of solver steps?

Every measurement has a process to itself, because a process's peak never falls again. On the CPU it
is the peak of the resident memory, beyond what the process had used before the step; the allocator
is told to hand freed memory back at once, so that the peak is that of what lives at one time. On a
CUDA device it is the allocator's own peak, likewise. Backpropagation through the solver, which is
'autograd' and must grow, stands beside as the proof that growth is seen.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchdyn_snopt.errors import SNOptError
from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable
from torchdyn_snopt.experiments.environment import describe_environment

SENSITIVITIES = ("snopt", "adjoint", "autograd")
LOOSE, TIGHT = 1e-3, 1e-8
BATCH = 2048
WORKER = "torchdyn_snopt.experiments.bench.memory_worker"
MEGABYTE = 1e6

# glibc keeps freed blocks for later; these settings make it return them, so that the peak of the
# resident memory follows what is alive. Other allocators ignore them.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0"}

HEAD = ["sensitivity", "NFE at 1e-3", "NFE at 1e-8", "MB at 1e-3", "MB at 1e-8", "growth"]
NOTE = (
    f"Peak memory of one training step (MLP 64-64-64-64, batch {BATCH}, float64, weights "
    "three times torch's initial ones so that the loose tolerance takes several steps, dopri5, all "
    "tolerances alike) beyond what the process held before it; median over fresh processes. "
    "NFE: forward and backward together."
)


class MeasurementError(SNOptError):
    """A measuring process ended without a result."""


def bench_memory(
    rounds: int,
    device: torch.device,
    tell: Callable[[str], None],
    sensitivities: Sequence[str] = SENSITIVITIES,
    batch: int = BATCH,
) -> BenchReport:
    """Measure the peak at a loose and at a tight tolerance.

    Args:
        rounds: Processes for each measurement.
        device: Where to run.
        tell: Told about the progress.
        sensitivities: What to measure.
        batch: Samples of a step; more make memory that is not the step's weigh less.

    Returns:
        One table.
    """
    body, raw = [], []
    for sensitivity in sensitivities:
        peaks, counts = [], []
        for tolerance in (LOOSE, TIGHT):
            tell(f"{sensitivity} at {tolerance:g}")
            results = [measure(sensitivity, tolerance, batch, device) for _ in range(rounds)]
            peaks.append(statistics.median(result["bytes"] for result in results))
            counts.append(results[0]["nfe"])
            raw += results
        growth = peaks[1] / peaks[0] - 1
        shown = [f"{peak / MEGABYTE:.1f}" for peak in peaks]
        body.append([sensitivity, *map(str, counts), *shown, f"{growth:+.1%}"])
    tables = [BenchTable("Peak memory of a training step", HEAD, body)]
    return BenchReport("memory", tables, NOTE, describe_environment(device), raw)


def measure(sensitivity: str, tolerance: float, batch: int, device: torch.device) -> dict[str, Any]:
    """Measure one training step in a process of its own.

    Args:
        sensitivity: How the gradient is computed.
        tolerance: rtol and atol, forward and backward.
        batch: Samples of the step.
        device: Where to run.

    Returns:
        The arguments, ``bytes`` (the peak) and ``nfe``.

    Raises:
        MeasurementError: The process failed.
    """
    arguments = [sensitivity, repr(tolerance), str(batch), str(device)]
    finished = subprocess.run(
        [sys.executable, "-m", WORKER, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ALLOCATOR},
    )
    if finished.returncode:
        raise MeasurementError(
            "a measuring process failed",
            got=f"exit status {finished.returncode}: {finished.stderr.strip()[-400:]}",
            allowed="a process with enough memory for the step",
            do="run it on its own to see why: python -m " + " ".join([WORKER, *arguments]),
        )
    measured: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return {"sensitivity": sensitivity, "tolerance": tolerance, "batch": batch, **measured}
