"""Timing: wall time around synchronised calls, the sides taking turns, and medians of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device idle before and after."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def milliseconds(
    sides: Mapping[str, Callable[[], Any]], device: str, budget: float = 6.0, most: int = 15
) -> dict[str, list[float]]:
    """Milliseconds of each call of each side, from rounds in which the sides take turns.

    Every other round goes backwards: what a call finds, a hot device say, is what the one before it left.

    Parameters
    ----------
    sides
        What to time, warm already.
    budget
        Seconds that the rounds together may take; there are at least three.
    most
        Rounds at most.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.perf_counter()
    for number in range(most):
        for name, call in list(sides.items())[:: -1 if number % 2 else 1]:
            times[name].append(1e3 * seconds(call, device))
        if number >= 2 and time.perf_counter() - begin > budget:
            break
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each side."""
    return {name: statistics.median(found) for name, found in times.items()}


def matmul_rate(device: str, dtype: torch.dtype, duration: float = 1.0) -> float:
    """Operations per second of back-to-back square products, sustained over ``duration`` seconds."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    synchronize(device)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < duration:
        for _ in range(20):
            torch.mm(a, b, out=out)
        count += 20
        synchronize(device)
    return count * 2 * size**3 / (time.perf_counter() - begin)


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """Device memory at the highest point of a call, over what was there before it; 0 on the CPU."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Euclidean distance over the length of the exact value, in float64."""
    value, exact = value.double(), exact.double().to(value.device)
    return ((value - exact).norm() / exact.norm()).item()
