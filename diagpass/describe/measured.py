"""Spans of a clock -> plain data: waves and groups with begin and end, time by width, fraction of a rate."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diagpass.runtime.clock import Clock, Span

__all__ = ["measured_facts"]


def measured_facts(
    clock: Clock,
    kinds: Sequence[Mapping[str, Any]],
    seconds: float,
    rate: float | None,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """What :attr:`diagpass.Report.measured` is.

    Parameters
    ----------
    clock
        A clock that was read.
    kinds
        The report's kinds, for the FLOPs of a cell.
    seconds
        What the call takes without a clock.
    rate, dtype
        FLOPs a second of large matrix products on this machine, and of which data type.
    """
    flops = {kind["index"]: kind["flops"] for kind in kinds}

    def work(wave: Span) -> int:
        return sum(flops.get(group.kind, 0) * len(group.cells) for group in wave.groups)

    def fraction(done: float, took: float) -> float | None:
        return done / took / rate if rate and took > 0 else None

    by_width: dict[int, list[Span]] = {}
    for wave in clock.waves:
        by_width.setdefault(len(wave.cells), []).append(wave)
    widths = []
    for width, waves in sorted(by_width.items()):
        took = [wave.end - wave.begin for wave in waves]
        widths.append(
            {
                "width": width,
                "waves": len(waves),
                "median_seconds": statistics.median(took),
                "fraction": fraction(sum(map(work, waves)), sum(took)),
            }
        )
    total = sum(map(work, clock.waves))
    return {
        "device": str(clock.device),
        "clock": "events" if clock.device.type == "cuda" else "wall",
        "seconds": clock.total,
        "flops": total,
        "matmul_rate": rate,
        "matmul_dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "fraction": fraction(total, seconds),
        "widths": widths,
        "waves": [_wave(wave) for wave in clock.waves],
    }


def _wave(wave: Span) -> dict[str, Any]:
    return {
        "begin": wave.begin,
        "end": wave.end,
        "host": None if wave.host is None else list(wave.host),
        "groups": [
            {
                "kind": group.kind,
                "begin": group.begin,
                "end": group.end,
                "cells": [list(cell) for cell in group.cells],
            }
            for group in wave.groups
        ],
    }
