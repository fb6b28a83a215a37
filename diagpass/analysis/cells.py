"""FX graph -> cells: which nodes make one layer applied to one segment.

Cells are module calls, found from the marks of the capture. Several choices may be possible (blocks of
layers, layers, heads inside a layer): each is a *proposal*, and the pipeline keeps the one whose
schedule needs the fewest batched operations. A proposal maps nodes to calls; everything else is glue.

This file also makes cells *sound*: a cell is one indivisible step, so no path may leave it and come
back. ``contract`` finds such paths and closes them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence

import networkx as nx
import torch
import torch.fx as fx
from torch.utils._pytree import tree_flatten

from diagpass.capture.marks import Call, all_calls

Proposal = dict[fx.Node, Call]

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def is_operation(node: fx.Node) -> bool:
    """Whether the node computes tensors (placeholders, constants and Python numbers do not)."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    return not isinstance(node.meta.get("val"), (int, float, bool, *_SYMBOLIC))


def same_arguments(node: fx.Node, other: fx.Node, agree: Callable[[fx.Node, fx.Node], bool]) -> bool:
    """Whether two nodes have the same literals, and nodes that ``agree`` in the same places."""
    left, left_spec = tree_flatten((node.args, node.kwargs))
    right, right_spec = tree_flatten((other.args, other.kwargs))
    if left_spec != right_spec:
        return False
    for a, b in zip(left, right, strict=True):
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if not agree(a, b):
                return False
        elif isinstance(a, fx.Node) or isinstance(b, fx.Node) or type(a) is not type(b) or a != b:
            return False
    return True


def propose(graph: fx.Graph, globs: Sequence[str] | None) -> Iterator[Proposal]:
    """Possible choices of cells, outermost modules first; the last ones are less likely."""
    calls = {node: stack for node, stack in all_calls(graph).items() if is_operation(node)}
    if globs is not None:
        yield _matching(calls, globs)
        return
    stacks = {id(stack): stack for stack in calls.values()}  # far fewer than nodes
    members: dict[tuple[str, str], set[str]] = {}
    for stack in stacks.values():
        for call in stack:
            members.setdefault(call.family, set()).add(call.path)
    families = {family for family, paths in members.items() if len(paths) >= 2}
    inside = {key: [call for call in stack if call.family in families] for key, stack in stacks.items()}
    depth = largest = 0
    while True:
        proposal: Proposal = {}
        for node, stack in calls.items():
            if len(inside[id(stack)]) > depth:
                proposal[node] = inside[id(stack)][depth]
        if not proposal:
            break
        size = max(len(members[call.family]) for call in set(proposal.values()))
        if size > largest:  # modules further in can only be batched wider if there are more of them
            largest = size
            yield proposal
        depth += 1
    if not families:
        yield from _repeated_alone(calls)


def _matching(calls: dict[fx.Node, tuple[Call, ...]], globs: Sequence[str]) -> Proposal:
    proposal: Proposal = {}
    for node, stack in calls.items():
        for call in stack:
            if any(fnmatch.fnmatchcase(call.path, glob) for glob in globs):
                proposal[node] = call
                break
    return proposal


def _repeated_alone(calls: dict[fx.Node, tuple[Call, ...]]) -> Iterator[Proposal]:
    """One module called again and again, each call reading the call before: a shared layer.

    Modules further in follow that are called more often: the shared layer of a module for a segment, say.
    """
    by_path: dict[str, dict[fx.Node, Call]] = {}
    for node, stack in calls.items():
        for call in stack:
            by_path.setdefault(call.path, {})[node] = call
    most = 1
    for nodes in by_path.values():
        counts = {call.count for call in nodes.values()}
        if len(counts) > most and _feeds_itself(nodes):
            most = len(counts)
            yield dict(nodes)


def _feeds_itself(nodes: dict[fx.Node, Call]) -> bool:
    """Whether a later call of the module depends on an earlier one."""
    first = min(call.count for call in nodes.values())
    reached = {node for node, call in nodes.items() if call.count == first}
    for node in next(iter(nodes)).graph.nodes:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
            if node in nodes and nodes[node].count > first:
                return True
    return False


def contract(graph: fx.Graph, owner: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """Close cells: nodes on a path out of a cell and back into it join it.

    Parameters
    ----------
    graph
        The functional graph.
    owner
        Node to cell number; glue is absent.

    Returns
    -------
    dict
        A new owner map in which contracting every cell leaves an acyclic graph. Cells that depend on
        each other both ways have been joined to one.
    """
    quotient = nx.DiGraph()
    for node in graph.nodes:
        here = owner.get(node, node)
        quotient.add_node(here)
        for source in node.all_input_nodes:
            there = owner.get(source, source)
            if there != here:
                quotient.add_edge(there, here)
    closed = dict(owner)
    for component in nx.strongly_connected_components(quotient):
        if len(component) == 1:
            continue
        cells = sorted(item for item in component if isinstance(item, int))
        merged = cells[0]
        into = set(cells)
        for node in graph.nodes:
            if node in component or owner.get(node) in into:
                closed[node] = merged
    return closed
