"""The cost model: seconds of a sequential run and of the waves, from FLOPs, bytes and a machine's figures.

A cell takes its operations times the start of a kernel, plus the larger of computing and moving; a wave
starts each operation of a group once and computes and moves for all its cells (``docs/derivations.md``).
Glue is not counted, nor what fusion saves: it orders alternatives, it does not replace a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["estimate", "total_flops"]


def estimate(
    kinds: Sequence[Mapping[str, Any]],
    schedule: Sequence[Sequence[Mapping[str, Any]]],
    flops_per_second: float,
    bytes_per_second: float,
    start_seconds: float,
) -> dict[str, float]:
    """Seconds by ``"sequential"`` and ``"wavefront"``; kinds that run unbatched gain nothing in a wave."""
    by_index = {kind["index"]: kind for kind in kinds}

    def seconds(kind: Mapping[str, Any], cells: int, starts: int) -> float:
        work = max(kind["flops"] / flops_per_second, kind["bytes"] / bytes_per_second)
        return cells * work + starts * kind["operations"] * start_seconds

    sequential = wavefront = 0.0
    for wave in schedule:
        for group in wave:
            kind, cells = by_index[group["kind"]], len(group["cells"])
            sequential += seconds(kind, cells, cells)
            wavefront += seconds(kind, cells, cells if kind["unbatchable"] else 1)
    return {"sequential": sequential, "wavefront": wavefront}


def total_flops(kinds: Sequence[Mapping[str, Any]]) -> int:
    """The FLOPs of all cells."""
    return sum(kind["flops"] * kind["cells"] for kind in kinds)
