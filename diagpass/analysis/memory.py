"""How many cells may be in a wave under a limit of memory.

A cell's working memory is what its operations have alive at once, one after the other and unfused, its inputs
aside. A compiler that fuses them takes less, a group takes it for each of its cells.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx as fx
from torch.utils._pytree import tree_leaves

from diagpass.ir import Kind

__all__ = ["width_within", "working_bytes"]


def width_within(kinds: Iterable[Kind], max_width: int | None, memory_limit: int | None) -> int | None:
    """The largest number of cells in a wave.

    Parameters
    ----------
    kinds
        Of the cells.
    max_width
        Another limit, None for none.
    memory_limit
        Bytes of working memory that the cells of a wave may take together; a wave has one cell at least.

    Returns
    -------
    int or None
        None if there is no limit.
    """
    if memory_limit is None:
        return max_width
    width = max(1, memory_limit // max((working_bytes(kind) for kind in kinds), default=memory_limit))
    return width if max_width is None else min(width, max_width)


def working_bytes(kind: Kind) -> int:
    """Bytes that the operations of one cell have alive at once, at most."""
    nodes = list(kind.body.graph.nodes)
    size: dict[int, int] = {}
    made: dict[int, int] = {}
    last: dict[int, int] = {}
    given = {memory for node in nodes if node.op == "placeholder" for memory in _memories(node)}
    for at, node in enumerate(nodes):
        for value in (node, *node.all_input_nodes):
            for memory, count in _memories(value).items():
                size[memory] = max(size.get(memory, 0), count)
                made.setdefault(memory, at)
                last[memory] = at
    change = [0] * (len(nodes) + 1)
    for memory in size.keys() - given:
        change[made[memory]] += size[memory]
        change[last[memory] + 1] -= size[memory]
    most = alive = 0
    for step in change:
        alive += step
        most = max(most, alive)
    return most


def _memories(node: fx.Node) -> dict[int, int]:
    """The memory behind a node's values, and its bytes; views share theirs."""
    values = (value for value in tree_leaves(node.meta.get("val")) if isinstance(value, torch.Tensor))
    return {value.untyped_storage()._cdata: int(value.untyped_storage().nbytes()) for value in values}
