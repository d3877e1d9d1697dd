"""The process behind `bench memory`: one training step, and the peak of the memory it took.

Run as ``python -m`` with the name of this module, then sensitivity, tolerance, batch size and
device; the last line that it prints is a JSON object.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import sys
from pathlib import Path

import torch

from torchdyn_snopt.experiments.bench.cases import CASES, loss_of, node_for
from torchdyn_snopt.experiments.meters import SolveMeter

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
WARM_UP_BATCH = 4
GAIN = 3.0  # on the initial weights: the loose tolerance, too, then takes several steps


class PeakMeter:
    """By how much a piece of work raises the memory of this process at its highest."""

    def __init__(self, device: torch.device) -> None:
        """Begin here: earlier peaks are forgotten where the system can forget them.

        Args:
            device: Whose memory.
        """
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            _forget_peak()
            self._before = _peak_resident()

    def read(self) -> int:
        """Bytes between the memory at the beginning and the peak since then."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _peak_resident() - self._before


def _forget_peak() -> None:
    """Linux can set the peak back to what is resident now; elsewhere the work must exceed it."""
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5", encoding="ascii")


def _peak_resident() -> int:
    if STATUS.exists():  # getrusage would still tell the peak before it was set back
        (line,) = [x for x in STATUS.read_text(encoding="ascii").splitlines() if "VmHWM" in x]
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def give_back() -> None:
    """Let go of what nobody uses, and hand freed memory back to the system where it can be."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def measure_step(
    sensitivity: str, tolerance: float, batch: int, device: torch.device
) -> dict[str, int]:
    """Take one training step.

    Args:
        sensitivity: How the gradient is computed.
        tolerance: rtol and atol, forward and backward.
        batch: Samples of the step.
        device: Where to run.

    Returns:
        ``bytes``, by which the step raised the peak, and ``nfe``, its field evaluations.
    """
    case = CASES[0]
    field = case.field(device).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(GAIN)
    node = node_for(field, sensitivity, tolerance)
    t = torch.linspace(0.0, 1.0, 2, dtype=torch.float64, device=device)
    meter = SolveMeter(node)

    def step(samples: int) -> None:
        states = torch.randn(samples, *case.shape[1:], dtype=torch.float64, device=device)
        loss_of(node(states, t)).backward()

    step(WARM_UP_BATCH)
    evaluations, peak = meter.evaluations(), PeakMeter(device)
    step(batch)
    return {"bytes": peak.read(), "nfe": meter.evaluations() - evaluations}


if __name__ == "__main__":
    name, tolerance, batch, device = sys.argv[1:]
    result = measure_step(name, float(tolerance), int(batch), torch.device(device))
    sys.stdout.write(json.dumps(result) + "\n")
