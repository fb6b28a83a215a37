"""A machine's figures, and how to take the time of work on it.

What is made with them: estimates (:mod:`diagpass.describe.estimate`) and fractions of a rate.
:mod:`diagpass.calibration` measures them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["Machine", "matmul_rate", "seconds_of", "wait"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Figures of a machine.

    Attributes
    ----------
    name
        What it is.
    matmul
        FLOPs a second that large matrix products sustain, by data type (``"bfloat16"``).
    bytes_per_second
        What memory sustains, reads and writes together.
    start_seconds
        The shortest time from one kernel to the next that needs its result; on CUDA in a CUDA graph.
    units
        Processors that a product is divided among (a GPU's streaming multiprocessors); 0 where the shape of
        a product does not matter.
    cell_seconds, call_seconds
        What a cell, and a call, take the host in a rolled program; 0 leaves the host out.
    """

    name: str
    matmul: Mapping[str, float]
    bytes_per_second: float
    start_seconds: float = 0.0
    units: int = 0
    cell_seconds: float = 0.0
    call_seconds: float = 0.0


def matmul_rate(device: torch.device, dtype: torch.dtype, duration: float = 0.3) -> float:
    """FLOPs a second of large square matrix products, sustained over ``duration`` seconds."""
    size = 8192 if device.type == "cuda" else 1024
    with torch.no_grad():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.mm(a, b)
        return 2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), device, duration)


def seconds_of(work: Callable[[], object], device: torch.device, duration: float) -> float:
    """Seconds of one, from as many as fit into ``duration``, at least one; the first is not counted."""
    work()
    wait(device)
    count, begin = 0, time.perf_counter()
    while True:
        batch = max(count, 1)
        for _ in range(batch):
            work()
        wait(device)
        count += batch
        if time.perf_counter() - begin >= duration / 2:
            return (time.perf_counter() - begin) / count


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
