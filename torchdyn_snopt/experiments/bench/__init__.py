"""Benchmarks: contenders take turns in one process; what is compared are ratios within a round."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchdyn_snopt.experiments.bench.adjoint import bench_adjoint
from torchdyn_snopt.experiments.bench.memory import bench_memory
from torchdyn_snopt.experiments.bench.refresh import bench_refresh
from torchdyn_snopt.experiments.bench.report import BenchReport, BenchTable

__all__ = ["BENCHMARKS", "BenchReport", "BenchTable"]

Benchmark = Callable[[int, torch.device, Callable[[str], None]], BenchReport]

# From the number of rounds, the device, and whom to tell about the progress.
BENCHMARKS: dict[str, Benchmark] = {
    "adjoint": bench_adjoint,
    "refresh": bench_refresh,
    "memory": bench_memory,
}
