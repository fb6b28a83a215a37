"""Dependencies -> waves, and the chain that narrows them.

Without a cap the waves are the topological generations of the dependency graph: nothing is assumed
about how segments and layers are numbered. With ``max_width`` cells are list-scheduled, those with the
longest way to go first.
"""

from __future__ import annotations

import networkx as nx

from diagpass.ir import CellGraph, Edge, Group, Schedule, Wave


def schedule(cells: CellGraph, max_width: int | None = None) -> Schedule:
    """Put the cells into waves.

    Parameters
    ----------
    cells
        Cells, kinds and dependencies.
    max_width
        The largest number of cells in a wave, None for no limit.
    """
    kind_of = cells.kind_of
    waves = []
    for members in _generations(cells.dag, max_width):
        groups: dict[int, list[int]] = {}
        for cell in sorted(members, key=lambda at: (cells.cells[at].layer, cells.cells[at].segment)):
            groups.setdefault(kind_of[cell], []).append(cell)
        waves.append(Wave(tuple(Group(kind, tuple(groups[kind])) for kind in sorted(groups))))
    return Schedule(tuple(waves))


def _generations(dag: nx.DiGraph, max_width: int | None) -> list[list[int]]:
    generations = [sorted(generation) for generation in nx.topological_generations(dag)]
    if max_width is None or all(len(generation) <= max_width for generation in generations):
        return generations
    height: dict[int, int] = {}
    for cell in reversed(list(nx.topological_sort(dag))):
        height[cell] = 1 + max((height[after] for after in dag.successors(cell)), default=0)
    waiting = {cell: dag.in_degree(cell) for cell in dag}
    ready = [cell for cell, count in waiting.items() if count == 0]
    waves = []
    while ready:
        ready.sort(key=lambda cell: (-height[cell], cell))
        wave, ready = sorted(ready[:max_width]), ready[max_width:]
        waves.append(wave)
        for cell in wave:
            for after in sorted(dag.successors(cell)):
                waiting[after] -= 1
                if waiting[after] == 0:
                    ready.append(after)
    return waves


def find_chain(cells: CellGraph) -> Edge | None:
    """The edge from a layer to a lower one at a later segment, or None.

    Of several, the one that bounds the waves most: the largest drop in layers, then the smallest step
    in segments, then the first.
    """
    worst: tuple[tuple[int, int, int, int], Edge] | None = None
    for before, after in sorted(cells.dag.edges):
        source, target = cells.cells[before], cells.cells[after]
        drop, step = source.layer - target.layer, target.segment - source.segment
        if drop <= 0 or step <= 0:
            continue
        rank = (-drop, step, source.segment, before)
        if worst is None or rank < worst[0]:
            worst = (rank, Edge(source, target))
    return None if worst is None else worst[1]
