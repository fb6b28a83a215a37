"""Dead code put back, so that the last segment's cells are of the same kind as the others.

What nobody reads is gone from a captured graph: the last segment's cells lack their state updates when
the state is not kept. They would be a kind of their own, batched apart from the rest. Here such a cell
gets copies of the operations that it lacks, taken from the same layer at another segment; nobody reads
their results.
"""

from __future__ import annotations

import torch.fx as fx

from diagpass.analysis.cells import same_arguments
from diagpass.capture.marks import Call

LEAST_SHARE = 0.5  # a cell with less than this share of the operations stays as it is


def complete(graph: fx.Graph, owner: dict[fx.Node, int], calls: list[Call]) -> int:
    """Complete the cells of a graph in place; ``owner`` gets the new nodes.

    Returns
    -------
    int
        The number of cells that were completed.
    """
    nodes: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in owner:
            nodes.setdefault(owner[node], []).append(node)
    by_module: dict[str, list[int]] = {}
    for cell, call in enumerate(calls):
        by_module.setdefault(call.module or call.path, []).append(cell)
    done = 0
    for cells in by_module.values():
        for cell in cells:
            have = nodes[cell]
            larger = [nodes[other] for other in cells if len(nodes[other]) > len(have)]
            for full in sorted(larger, key=len):
                if len(have) < LEAST_SHARE * len(full):
                    break
                image = _embed(have, full, owner)
                if image is not None:
                    _copy_missing(graph, full, image, owner, cell)
                    done += 1
                    break
    return done


def _embed(
    have: list[fx.Node], full: list[fx.Node], owner: dict[fx.Node, int]
) -> dict[fx.Node, fx.Node] | None:
    """Which of ``full``'s nodes stand for ``have``'s, or None if ``have`` is no part of ``full``."""
    image: dict[fx.Node, fx.Node] = {}
    inside = set(full)
    missing: set[fx.Node] = set()
    at = 0
    for node in full:
        if (
            at < len(have)
            and not missing.intersection(node.all_input_nodes)
            and _corresponds(node, have[at], image, inside)
        ):
            image[node] = have[at]
            pairs = zip(node.all_input_nodes, have[at].all_input_nodes, strict=False)
            for source, counterpart in pairs:
                if source not in inside:
                    image.setdefault(source, counterpart)
            at += 1
            continue
        for source in node.all_input_nodes:
            if source not in inside and source not in image and _computed(source, owner):
                return None  # another cell's value, of which this segment has no counterpart
        missing.add(node)
    return image if at == len(have) else None


def _computed(node: fx.Node, owner: dict[fx.Node, int]) -> bool:
    """Whether a cell has a part in the node's value."""
    pending, seen = [node], set()
    while pending:
        top = pending.pop()
        if top in owner:
            return True
        if top not in seen:
            seen.add(top)
            pending += top.all_input_nodes
    return False


def _corresponds(node: fx.Node, other: fx.Node, image: dict[fx.Node, fx.Node], inside: set[fx.Node]) -> bool:
    """Whether ``other`` does in its cell what ``node`` does in this one."""
    shapes = [getattr(each.meta.get("val"), "shape", None) for each in (node, other)]
    return (
        node.target == other.target
        and shapes[0] == shapes[1]
        and same_arguments(node, other, lambda a, b: a not in inside or image.get(a) is b)
    )


def _copy_missing(
    graph: fx.Graph,
    full: list[fx.Node],
    image: dict[fx.Node, fx.Node],
    owner: dict[fx.Node, int],
    cell: int,
) -> None:
    """Insert the copies in ``full``'s order; glue that they read stands before all cells."""
    last: fx.Node | None = None
    first = next(image[node] for node in full if node in image)
    for node in full:
        if node not in image:
            with graph.inserting_before(first) if last is None else graph.inserting_after(last):
                new = graph.node_copy(node, lambda source: image.get(source, source))
            image[node] = new
            owner[new] = cell
        last = image[node]
