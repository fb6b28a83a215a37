"""What the machine at hand sustains."""

from __future__ import annotations

import time

import torch

__all__ = ["matmul_rate"]


def matmul_rate(device: torch.device, dtype: torch.dtype, duration: float = 0.3) -> float:
    """FLOPs a second of large square matrix products, sustained over ``duration`` seconds."""
    size = 8192 if device.type == "cuda" else 1024
    with torch.no_grad():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.mm(a, b)
        count, begin = 0, 0.0
        while count == 0 or time.perf_counter() - begin < duration:
            wait(device)
            begin = begin or time.perf_counter()
            for _ in range(4):
                torch.mm(a, b, out=out)
            wait(device)
            count += 4
        return count * 2 * size**3 / (time.perf_counter() - begin)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
