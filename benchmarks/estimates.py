"""The cost model against rows that were measured: ``python -m benchmarks estimates FILES``.

Rows without figures of the machine are taken to be an H100's: bandwidth and multiprocessors are those of its
data sheet, the rate of matrix products is that of the row.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import diagpass
from benchmarks.presets import PRESETS, make_cell, make_ids
from diagpass.describe.estimate import estimate
from diagpass.describe.work import total_work

BANDWIDTH, UNITS, START = 3.35e12, 132, 2e-6


def report_of(preset: str, segment: int) -> diagpass.Report:
    """The report of two segments of a model with two layers: it has the kinds of any number of both."""
    small = dataclasses.replace(PRESETS[preset], layers=2, vocab=64)
    with torch.no_grad():
        cell = make_cell(small, segment, "cpu", torch.bfloat16)
        loop = diagpass.SegmentLoop(cell, segment, reset="zero_mem")
        return diagpass.explain(loop, make_ids(small, 2 * segment, "cpu"))


def diagonal(layers: int, segments: int) -> list[list[dict[str, Any]]]:
    """The schedule of a stack of layers whose first segment is a kind of its own."""
    waves: list[list[dict[str, Any]]] = []
    for wave in range(layers + segments - 1):
        cells = [wave - layer for layer in range(layers) if 0 <= wave - layer < segments]
        kinds = {kind: [s for s in cells if (s > 0) == bool(kind)] for kind in (0, 1)}
        waves.append([{"kind": kind, "cells": found} for kind, found in kinds.items() if found])
    return waves


def compare(
    report: diagpass.Report, row: dict[str, Any], start: float | None = None
) -> dict[str, dict[str, float]]:
    """Milliseconds by side, ``"sequential"`` (the strongest) and ``"wavefront"``: measured, estimated.

    The machine is the row's; of one that has none the host is left out. ``start``, seconds of a kernel, takes
    the place of the machine's.
    """
    layers, segments = PRESETS[row["preset"]].layers, row["tokens"] // row["segment"]
    usual = diagpass.Machine(row["device"], {"bfloat16": row["matmul_flops"]}, BANDWIDTH, START, UNITS)
    machine = diagpass.Machine(**row["machine"]) if "machine" in row else usual
    if start is not None:
        machine = dataclasses.replace(machine, start_seconds=start)
    glue = total_work([(report.glue, segments // 2)])  # it is that of two segments
    told = estimate(report.kinds, diagonal(layers, segments), glue, layers * segments, machine)
    measured = {"sequential": row["baselines_ms"]["strongest"], "wavefront": row["ms"]}
    return {
        side: {"measured": ms, "estimated": 1e3 * told[side], "error": 1e3 * told[side] / ms - 1}
        for side, ms in measured.items()
    }
