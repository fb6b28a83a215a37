"""A functional graph -> a :class:`~diagpass.ir.CellGraph`: the analysis stages in order.

Of the possible choices of cells the one is kept whose schedule needs the fewest operations when each
group is one batched call: that is what the choice is for.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch.fx as fx

from diagpass.analysis.cells import Proposal, is_operation, propose
from diagpass.analysis.dag import assign, dependencies
from diagpass.analysis.kinds import find_kinds
from diagpass.analysis.schedule import schedule
from diagpass.capture.marks import Call
from diagpass.ir import Cell, CellGraph

log = logging.getLogger(__name__)

DEEPER_PAYS = 0.6  # modules further in are taken as cells only if that saves this much


def find_cells(
    gm: fx.GraphModule, globs: Sequence[str] | None = None, one_segment: bool = False
) -> CellGraph | None:
    """Cut a functional graph into cells and glue.

    Parameters
    ----------
    gm
        A functional ATen graph with Dynamo's marks on its nodes.
    globs
        Module paths to take as cells instead of what the graph suggests.
    one_segment
        Whether the graph is one segment of many: cells of one kind then run together at different
        segments, which the graph itself does not show.

    Returns
    -------
    CellGraph or None
        None if no module is repeated (or no path matches).
    """
    if one_segment:
        return _find_in_copies(gm, globs)
    best: tuple[int, CellGraph] | None = None
    for proposal in filter(None, propose(gm.graph, globs)):
        cost, found, _ = _better(gm, proposal, _operations)
        first = found.cells[0].path
        log.debug("cells %s...: %d cells, %d operations", first, len(found.cells), cost)
        if best is None or cost < best[0] * DEEPER_PAYS:
            best = (cost, found)
    return None if best is None else best[1]


@dataclasses.dataclass(frozen=True)
class _Holder:
    """Stands for a graph's module where nothing is run: a module has its code generated."""

    graph: fx.Graph


def _find_in_copies(gm: fx.GraphModule, globs: Sequence[str] | None) -> CellGraph | None:
    """Try the proposals on copies of the graph and cut the graph itself by the best.

    Cutting moves and merges glue. What one proposal takes for glue may lie in another's cells.
    """
    best: tuple[int, Proposal, bool] | None = None
    for proposal in filter(None, propose(gm.graph, globs)):
        graph = fx.Graph()
        image: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(gm.graph, image))
        copied = {image[node]: call for node, call in proposal.items() if node in image}
        cost, _, absorb = _better(_Holder(graph), copied, _steady_operations)
        if best is None or cost < best[0] * DEEPER_PAYS:
            best = (cost, proposal, absorb)
    return None if best is None else _build(gm, *assign(gm.graph, best[1], absorb=best[2]))


def _better(
    gm: fx.GraphModule | _Holder, proposal: Proposal, operations: Callable[[CellGraph], int]
) -> tuple[int, CellGraph, bool]:
    """The proposal with or without the glue between its cells, whichever needs fewer operations."""
    with_glue = _build(gm, *assign(gm.graph, proposal))
    cost = operations(with_glue)
    if not any(node not in proposal for node in with_glue.owner):
        return cost, with_glue, True
    without = _build(gm, *assign(gm.graph, proposal, absorb=False))
    other = operations(without)
    return (cost, with_glue, True) if cost <= other else (other, without, False)


def _build(gm: Any, owner: dict[fx.Node, int], calls: list[Call]) -> CellGraph:
    nodes: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node in owner:
            nodes.setdefault(owner[node], []).append(node)
    dag = dependencies(gm.graph, owner)
    places = _coordinates(calls, dag)
    cells = tuple(
        Cell(index, call.path, *places[index], tuple(nodes[index])) for index, call in enumerate(calls)
    )
    return CellGraph(gm, cells, find_kinds(cells), owner, dag)


def _coordinates(calls: list[Call], dag) -> list[tuple[int, int]]:
    """Layer and segment of each cell, for people to read; schedules do not depend on them.

    Where every module is called equally often, the segment is the call count. Where one module serves
    as several layers, a segment begins at a call of the first module that does not read the cell
    before it.
    """
    paths = list(dict.fromkeys(call.path for call in calls))
    times = Counter(call.path for call in calls)
    if len(paths) > 1 and len(set(times.values())) == 1:
        return [(paths.index(call.path), call.count) for call in calls]
    places, segment, layer = [], 0, -1
    for index, call in enumerate(calls):
        if index > 0 and call.path == paths[0] and not dag.has_edge(index - 1, index):
            segment, layer = segment + 1, -1
        layer += 1
        places.append((layer, segment))
    return places


def _operations(cells: CellGraph) -> int:
    """How many calls the schedule makes: one per operation of a group, one per operation of glue."""
    size = {kind.index: len(cells.cells[kind.cells[0]].nodes) for kind in cells.kinds}
    batched = sum(size[group.kind] for wave in schedule(cells).waves for group in wave.groups)
    return batched + _glue_operations(cells)


def _steady_operations(cells: CellGraph) -> int:
    """The same for one segment in a steady state, where each kind is one call a wave."""
    batched = sum(len(cells.cells[kind.cells[0]].nodes) for kind in cells.kinds)
    return batched + _glue_operations(cells)


def _glue_operations(cells: CellGraph) -> int:
    return sum(
        is_operation(node) and node not in cells.owner and bool(node.users)
        for node in cells.graph.graph.nodes
    )
