"""The process behind `bench memory`: one training step, and the peak of the memory it took.

Run as ``python -m`` with the name of this module, then sensitivity, tolerance, batch size and
device; the last line that it prints is a JSON object.
"""

from __future__ import annotations

import json
import resource
import sys

import torch

from torchdyn_snopt.experiments.bench.cases import CASES, loss_of, node_for
from torchdyn_snopt.experiments.meters import SolveMeter

WARM_UP_BATCH = 4
GAIN = 3.0  # on the initial weights: the loose tolerance, too, then takes several steps


def peak_bytes(device: torch.device) -> int:
    """The highest memory that this process has held so far.

    Args:
        device: Whose memory.

    Returns:
        Bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


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
    evaluations, peak = meter.evaluations(), peak_bytes(device)
    step(batch)
    return {"bytes": peak_bytes(device) - peak, "nfe": meter.evaluations() - evaluations}


if __name__ == "__main__":
    name, tolerance, batch, device = sys.argv[1:]
    result = measure_step(name, float(tolerance), int(batch), torch.device(device))
    sys.stdout.write(json.dumps(result) + "\n")
