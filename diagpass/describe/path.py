"""The critical path, and the dependencies that would have to go to shorten it.

Cells are positions in a grid, dependencies pairs of positions. A *class* of dependencies are those that
reach equally far: so many segments on and so many layers up. Two classes are what a recurrent stack is made
of, from the layer below and from the layer's own state; a class other than these without which fewer waves
would do is *blocking*.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from diagpass.describe.figures import count

__all__ = ["Reach", "blocking", "critical_path", "reach_of", "reach_text"]

Reach = tuple[int, int]

NATURAL: Collection[Reach] = ((0, 1), (1, 0))
MOST = 12  # classes that are tried


def critical_path(cells: int, edges: Sequence[Sequence[int]]) -> list[int]:
    """Positions of the cells on one longest path, first to last; it bounds the number of waves."""
    return _longest(cells, edges)[1]


def _longest(cells: int, edges: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    if not cells:
        return 0, []
    after: list[list[int]] = [[] for _ in range(cells)]
    waiting = [0] * cells
    for before, then in edges:
        after[before].append(then)
        waiting[then] += 1
    depth, back = [1] * cells, [-1] * cells
    ready = [at for at in range(cells) if not waiting[at]]
    for at in ready:
        for then in after[at]:
            if depth[at] + 1 > depth[then]:
                depth[then], back[then] = depth[at] + 1, at
            waiting[then] -= 1
            if not waiting[then]:
                ready.append(then)
    at = max(range(cells), key=depth.__getitem__)
    path = [at]
    while back[at] >= 0:
        at = back[at]
        path.append(at)
    return len(path), path[::-1]


def reach_of(grid: Sequence[Mapping[str, Any]], before: int, after: int) -> Reach:
    """How many segments on and layers up a dependency leads."""
    a, b = grid[before], grid[after]
    return b["segment"] - a["segment"], b["layer"] - a["layer"]


def blocking(
    grid: Sequence[Mapping[str, Any]], edges: Sequence[Sequence[int]], path: Sequence[int]
) -> tuple[Reach, list[list[int]], int] | None:
    """The class of dependencies without which the fewest waves would do.

    Returns
    -------
    tuple or None
        The class, its dependencies, and the number of waves without them; None if no class but those that
        every recurrent stack has would make the path shorter.
    """
    on_path = Counter(reach_of(grid, a, b) for a, b in pairwise(path))
    best: tuple[Reach, list[list[int]], int] | None = None
    for reach, _ in on_path.most_common(MOST):
        if reach in NATURAL:
            continue
        mine = [list(edge) for edge in edges if reach_of(grid, *edge) == reach]
        rest = [edge for edge in edges if reach_of(grid, *edge) != reach]
        waves = _longest(len(grid), rest)[0]
        if waves < len(path) and (best is None or waves < best[2]):
            best = reach, mine, waves
    return best


def reach_text(reach: Reach) -> str:
    """A class of dependencies in words: ``"from the layer below"``."""
    segments, layers = reach
    if segments == 0:
        return "from the layer below" if layers == 1 else f"from {count(layers, 'layer')} below"
    back = "at the segment before" if segments == 1 else f"{count(segments, 'segment')} before"
    if layers == 0:
        return f"state, from the same layer {back}"
    if layers > 0:
        return f"state, from {count(layers, 'layer')} below {back}"
    return f"chain, from {count(-layers, 'layer')} above {back}"
