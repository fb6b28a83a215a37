"""Settings for all tests."""

from __future__ import annotations

import os

import pytest
import torch

# Two test processes share two cores, and Inductor would start a compile worker per core in each.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Same random numbers for a test whatever ran before it."""
    torch.manual_seed(0)
