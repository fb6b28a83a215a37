"""The parts of a report that are the same for both paths to a program.

In: the grid (a dict a cell), dependencies (pairs of positions in it), kinds and their cells. Out: plain data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch.fx as fx

from diagpass.describe.cost import cell_flops, kind_bytes, result_bytes, value_bytes
from diagpass.describe.differ import difference
from diagpass.describe.figures import ranges
from diagpass.describe.path import blocking, critical_path, reach_of, reach_text
from diagpass.describe.places import Ends, place
from diagpass.describe.work import work_of
from diagpass.ir import CellGraph, Kind

__all__ = ["block_facts", "kind_facts", "path_facts", "state_bytes", "wave_bytes"]


def kind_facts(
    kinds: Sequence[Kind],
    cells: Sequence[Any],
    grid: Sequence[Mapping[str, Any]],
    is_weight: Callable[[Any], bool],
    names: Mapping[Any, str],
    obstacles: Mapping[int, str],
) -> list[dict[str, Any]]:
    """One dict a kind; ``cells`` are those that the kinds' numbers mean."""
    members: dict[int, list[Mapping[str, Any]]] = {}
    for cell in grid:
        members.setdefault(cell["kind"], []).append(cell)
    found = []
    for at, kind in enumerate(kinds):
        first = cells[kind.cells[0]]
        mine = members.get(kind.index, [])
        segments = sorted({cell["segment"] for cell in mine})
        differs = None
        if at + 1 < len(kinds):
            other = kinds[at + 1]
            theirs = {cell["segment"] for cell in members.get(other.index, [])}
            differs = difference(first, cells[other.cells[0]], other.index, (segments, theirs), names)
        weights, moved = kind_bytes(kind, is_weight)
        found.append(
            {
                "index": kind.index,
                "cells": len(mine),
                "layers": sorted({cell["layer"] for cell in mine}),
                "segments": ranges(segments),
                "first": f"{first.path} at segment {mine[0]['segment']}" if mine else str(first),
                "operations": len(first.nodes),
                "flops": cell_flops(first),
                "bytes": moved,
                "weight_bytes": weights,
                "result_bytes": result_bytes(kind),
                **work_of(kind.body.graph.nodes),
                "unbatchable": kind.unbatchable or obstacles.get(kind.index),
                "differs": differs,
            }
        )
    return found


def path_facts(grid: Sequence[Mapping[str, Any]], edges: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The critical path: its cells as positions in the grid, and its steps by how far they reach."""
    path = critical_path(len(grid), edges)
    steps = Counter(reach_of(grid, a, b) for a, b in pairwise(path))
    return {
        "length": len(path),
        "cells": path,
        "steps": [
            {"segments": reach[0], "layers": reach[1], "count": number, "text": reach_text(reach)}
            for reach, number in sorted(steps.items())
        ],
    }


def block_facts(
    grid: Sequence[Mapping[str, Any]],
    edges: Sequence[Sequence[int]],
    path: Sequence[int],
    ends: Callable[[int, int], Ends],
) -> dict[str, Any] | None:
    """The dependencies that would have to go to shorten the path, and the two ends of one of them."""
    found = blocking(grid, edges, path)
    if found is None:
        return None
    reach, members, waves = found
    before, after = members[0]
    producer, glue, consumer = ends(before, after)
    return {
        "reach": reach_text(reach),
        "count": len(members),
        "waves": len(path),
        "waves_without": waves,
        "through": place(glue),
        "source": _end(grid[before], producer),
        "target": _end(grid[after], consumer),
    }


def _end(cell: Mapping[str, Any], node: fx.Node | None) -> dict[str, Any]:
    found = place(node) or {"operation": None, "module": None, "line": None}
    return {"path": cell["path"], "layer": cell["layer"], "segment": cell["segment"], **found}


def wave_bytes(schedule: Sequence[Sequence[Mapping[str, Any]]], kinds: Iterable[dict[str, Any]]) -> int:
    """Bytes of what the cells of the largest wave leave to others."""
    size = {kind["index"]: kind["result_bytes"] for kind in kinds}
    return max(
        (sum(size[group["kind"]] * len(group["cells"]) for group in wave) for wave in schedule), default=0
    )


def state_bytes(found: CellGraph) -> int:
    """Bytes of what cells leave to later segments, at the segment boundary where most is held."""
    segment = {cell.index: cell.segment for cell in found.cells}
    last: dict[fx.Node, int] = {}
    behind: dict[fx.Node, set[fx.Node]] = {}
    for node in found.graph.graph.nodes:
        made: set[fx.Node] = set()
        for source in node.all_input_nodes:
            made |= {source} if source in found.owner else behind.get(source, set())
        cell = found.owner.get(node)
        if cell is None:
            behind[node] = made
            continue
        for source in made:
            if segment[cell] > segment[found.owner[source]]:
                last[source] = max(last.get(source, 0), segment[cell])
    held: Counter[int] = Counter()
    for node, until in last.items():
        size = value_bytes(node.meta.get("val"))
        for boundary in range(segment[found.owner[node]], until):
            held[boundary] += size
    return max(held.values(), default=0)
