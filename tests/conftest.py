"""Shared habits of the tests: one thread, a fixed seed, a default dtype that comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

# The problems are too small to gain from threads, and the machines that run them have few.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Every test starts from the same seed and leaves torch's global settings as they were."""
    dtype = torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


@pytest.fixture
def float64() -> Iterator[None]:
    """Modules and tensors made in the test are float64."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(dtype)
