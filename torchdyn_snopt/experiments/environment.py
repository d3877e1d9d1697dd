"""The machine and the versions behind a figure, for the head of logs and benchmark files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = ("torchdyn-snopt", "torch", "torchdyn", "torchdiffeq", "numpy")


def describe_environment(device: torch.device | None = None) -> dict[str, object]:
    """What a reader needs in order to judge a measurement.

    Args:
        device: The device that was used; the CPU if None.

    Returns:
        Versions, operating system, processor, threads and device, all plain values.
    """
    device = device or torch.device("cpu")
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; `platform` knows only its architecture on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
