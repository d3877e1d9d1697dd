"""The process behind `steps.peak_bytes`: a few iterations, and the peak of the memory they took.

Run as ``python -m`` with the name of this module and a JSON object; prints one as its last line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from torchdyn_snopt.experiments.bench.memory_worker import PeakMeter, give_back
from torchdyn_snopt.experiments.bench.steps import Iterations
from torchdyn_snopt.experiments.optimizers import OptimizerSpec
from torchdyn_snopt.experiments.tasks import get_task


def measure(request: dict[str, Any]) -> int:
    """Take the iterations.

    Args:
        request: As `steps.peak_bytes` writes it.

    Returns:
        Bytes.
    """
    task = get_task(request["task"])
    spec = OptimizerSpec(request["optimizer"], request["chosen"], request["sensitivity"])
    device = torch.device(request["device"])
    data_dir = request["data_dir"]
    train = task.load(None if data_dir is None else Path(data_dir)).train
    # Libraries allocate their buffers in the first iterations, once and for all.
    Iterations(task, spec, train, device)(request["iterations"])
    give_back()
    iterations = Iterations(task, spec, train, device)
    peak = PeakMeter(device)
    iterations(request["iterations"])
    return peak.read()


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"bytes": measure(json.loads(sys.argv[1]))}) + "\n")
