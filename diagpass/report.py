"""What was found and what was done: :class:`Report`, as text and as a dict."""

from __future__ import annotations

import dataclasses
from typing import Any

from diagpass.ir import Edge
from diagpass.pipeline import Analysis

__all__ = ["Report", "make_report"]


@dataclasses.dataclass(frozen=True)
class Report:
    """The layer x segment grid of a model, its waves, and what became of them.

    Attributes
    ----------
    segments, layers, cells, waves, max_width
        Counts; ``max_width`` is the widest wave, in cells.
    mean_width
        Cells per wave.
    kinds
        One dict per kind: ``index``, ``cells`` (how many), ``layers`` (sorted), ``first`` (the first
        cell in words), ``operations`` (per cell), ``unbatchable`` (None or the operation).
    verdict
        ``"wavefront"`` or ``"sequential"``: what the dataflow permits, whatever the speed.
    reason
        Why the verdict is sequential, or None.
    chain
        None, or the edge from a layer to a lower one at a later segment; ``str(chain)`` names both.
    notes
        Sentences worth reading.
    ran
        ``"wavefront"``, ``"sequential"``, or None where nothing has run (``explain``).
    batched_cells
        Cells that run in groups of two or more.
    planning_seconds
        What the last call spent on putting cells into waves; 0.0 where the schedule is part of the capture.
    captures, plans
        How often user Python was traced, and how many plans there are.
    code
        The emitted graph as Python text, or None.
    grid, edges, schedule
        See :meth:`to_dict`.
    """

    segments: int
    layers: int
    cells: int
    waves: int
    max_width: int
    mean_width: float
    kinds: list[dict[str, Any]]
    verdict: str
    reason: str | None
    chain: Edge | None
    notes: list[str]
    ran: str | None = None
    batched_cells: int = 0
    captures: int = 0
    plans: int = 0
    planning_seconds: float = 0.0
    code: str | None = dataclasses.field(default=None, repr=False)
    grid: list[dict[str, Any]] = dataclasses.field(default_factory=list, repr=False)
    edges: list[list[int]] = dataclasses.field(default_factory=list, repr=False)
    schedule: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but ``code``, as plain Python values.

        ``grid`` has one entry per cell (``segment``, ``layer``, ``path``, ``kind``, ``wave``),
        ``edges`` pairs of positions in the grid (the first must run before the second), ``schedule``
        per wave the groups (``kind``, ``cells`` as positions in the grid), ``chain`` the two ends.
        """
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "code"
        }
        if self.chain is not None:
            ends = (("source", self.chain.source), ("target", self.chain.target))
            found["chain"] = {
                name: {"path": cell.path, "layer": cell.layer, "segment": cell.segment} for name, cell in ends
            }
        return found

    def __str__(self) -> str:
        lines = [
            f"verdict: {self.verdict}" + (f" ({self.reason})" if self.reason else ""),
            f"grid: {self.layers} layers x {self.segments} segments, {self.cells:,} cells",
            f"waves: {self.waves:,}, mean width {self.mean_width:.2f}, max width {self.max_width}",
        ]
        for kind in self.kinds:
            layers = _ranges(kind["layers"])
            line = (
                f"kind {kind['index']}: {kind['cells']} cells, layers {layers}, "
                f"{kind['operations']} operations each, first {kind['first']}"
            )
            if kind["unbatchable"]:
                line += f"; runs unbatched: {kind['unbatchable']}"
            lines.append(line)
        if self.chain is not None:
            lines.append(f"chain: {self.chain}")
        if self.ran is not None:
            lines.append(
                f"ran: {self.ran}, {self.batched_cells:,} of {self.cells:,} cells batched, "
                f"{self.captures} captures, {self.plans} plans"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def make_report(analysis: Analysis, ran: str | None = None) -> Report:
    """The report of one plan."""
    cells = analysis.cells.cells if analysis.cells else ()
    kinds = analysis.cells.kinds if analysis.cells else ()
    kind_of = analysis.cells.kind_of if analysis.cells else {}
    waves = analysis.schedule.waves
    wave_of = {cell: at for at, wave in enumerate(waves) for group in wave.groups for cell in group.cells}
    emitted = analysis.emitted
    return Report(
        segments=len({cell.segment for cell in cells}),
        layers=len({cell.layer for cell in cells}),
        cells=len(cells),
        waves=len(waves),
        max_width=analysis.schedule.max_width,
        mean_width=analysis.schedule.mean_width,
        kinds=[
            {
                "index": kind.index,
                "cells": len(kind.cells),
                "layers": sorted({cells[at].layer for at in kind.cells}),
                "first": str(cells[kind.cells[0]]),
                "operations": len(cells[kind.cells[0]].nodes),
                "unbatchable": kind.unbatchable,
            }
            for kind in kinds
        ],
        verdict=analysis.verdict,
        reason=analysis.refusal.reason if analysis.refusal else None,
        chain=analysis.chain,
        notes=list(analysis.notes),
        ran=ran,
        batched_cells=emitted.batched_cells if emitted and ran == "wavefront" else 0,
        code=emitted.module.code if emitted else None,
        grid=[
            {
                "segment": cell.segment,
                "layer": cell.layer,
                "path": cell.path,
                "kind": kind_of[cell.index],
                "wave": wave_of[cell.index],
            }
            for cell in cells
        ],
        edges=sorted([a, b] for a, b in analysis.cells.dag.edges) if analysis.cells else [],
        schedule=[
            [{"kind": group.kind, "cells": list(group.cells)} for group in wave.groups] for wave in waves
        ],
    )


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2, 5"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
