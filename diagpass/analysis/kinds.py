"""Cells -> kinds: cells whose graphs are the same up to weights, state and inputs.

Two cells are of one kind if their nodes, in program order, have the same targets, the same literals,
the same result types and the same wiring. What may differ is where a value from outside comes from,
and a number in a place where a tensor could stand as well (a scale, say): those become *slots*.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.fx.immutable_collections import immutable_list
from torch.utils._pytree import tree_flatten, tree_unflatten

from diagpass.ir import Cell, Kind, Slot

aten = torch.ops.aten

# Operations whose second argument (and alpha) may be a number or a tensor.
SCALAR_OPERAND = frozenset((aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor))

_PLAIN = frozenset(
    (fx.Node, int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
)


def find_kinds(cells: Sequence[Cell]) -> tuple[Kind, ...]:
    """Group the cells of a graph by kind, in the order of each kind's first cell."""
    alike: dict[tuple, list[Cell]] = {}
    for cell in cells:
        alike.setdefault(signature(cell), []).append(cell)
    return tuple(_make_kind(at, members) for at, members in enumerate(alike.values()))


def signature(cell: Cell) -> tuple:
    """What two cells of one kind have in common, hashable."""
    local = {node: at for at, node in enumerate(cell.nodes)}
    return tuple(
        (
            _hashable(node.target),
            *(_leaf(node, at, leaf, local) for at, leaf in enumerate(_leaves(node))),
            value_type(node.meta.get("val")),
        )
        for node in cell.nodes
    )


def _leaves(node: fx.Node) -> list[Any]:
    """What ``tree_flatten`` finds in a node's arguments, and last how they are nested."""
    if not node.kwargs:  # nearly all nodes have plain arguments and lists of such
        leaves: list[Any] = []
        nesting = []
        for argument in node.args:
            if type(argument) in _PLAIN:
                leaves.append(argument)
                nesting.append(-1)
            elif type(argument) is immutable_list and all(type(item) in _PLAIN for item in argument):
                leaves += argument
                nesting.append(len(argument))
            else:
                break
        else:
            return [*leaves, tuple(nesting)]
    leaves, spec = tree_flatten((node.args, node.kwargs))
    return [*leaves, str(spec)]


def _leaf(node: fx.Node, at: int, leaf: Any, local: dict[fx.Node, int]) -> tuple:
    if isinstance(leaf, fx.Node):
        if leaf in local:
            return ("inner", local[leaf])
        return ("outer", value_type(leaf.meta.get("val")))
    if is_literal(node, at, leaf):
        return ("number", type(leaf))
    return ("constant", type(leaf), _hashable(leaf))


def is_literal(node: fx.Node, at: int, leaf: Any) -> bool:
    """Whether a number at leaf ``at`` could be a tensor operand just as well."""
    if node.target not in SCALAR_OPERAND or type(leaf) not in (int, float):
        return False
    return at == 1 or (at == len(node.args) and "alpha" in node.kwargs)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def value_type(value: Any) -> Any:
    """Shape, dtype and device of what a node computes, hashable."""
    if isinstance(value, torch.Tensor):
        return (tuple(str(size) for size in value.shape), value.dtype, str(value.device))
    if isinstance(value, (tuple, list)):
        return tuple(value_type(item) for item in value)
    return type(value).__name__


def _make_kind(index: int, members: list[Cell]) -> Kind:
    """Build the body of a kind and find which of its uses are one slot."""
    uses: dict[tuple, list[tuple[int, int]]] = {}  # per-cell sources -> places that read them
    first = members[0]
    own = set(first.nodes)
    for row, node in enumerate(first.nodes):
        for at, leaf in enumerate(_leaves(node)[:-1]):
            outside = isinstance(leaf, fx.Node) and leaf not in own
            if not outside and not is_literal(node, at, leaf):
                continue
            sources = tuple(_leaves(cell.nodes[row])[at] for cell in members)
            if not outside and len(set(sources)) == 1:
                continue
            uses.setdefault((outside, sources), []).append((row, at))
    slots = []
    for (outside, sources), _ in uses.items():
        slots.append(Slot(f"slot_{len(slots)}", not outside, sources))
    slot_at = {place: slot for places, slot in zip(uses.values(), slots, strict=True) for place in places}
    kept = _results(members)
    body = _body(first, slots, slot_at, [row for row, _ in kept])
    return Kind(
        index=index,
        cells=tuple(cell.index for cell in members),
        body=body,
        slots=tuple(slots),
        outputs=tuple(nodes for _, nodes in kept),
        unbatchable=_unbatchable(first),
    )


def _results(members: list[Cell]) -> list[tuple[int, tuple[fx.Node | None, ...]]]:
    """The rows that some cell's surroundings read, with each cell's node."""
    inside = [set(cell.nodes) for cell in members]
    kept = []
    for row in range(len(members[0].nodes)):
        nodes = tuple(
            cell.nodes[row] if any(user not in own for user in cell.nodes[row].users) else None
            for cell, own in zip(members, inside, strict=True)
        )
        if any(node is not None for node in nodes):
            kept.append((row, nodes))
    return kept


def _body(
    cell: Cell,
    slots: Sequence[Slot],
    slot_at: dict[tuple[int, int], Slot],
    kept: Sequence[int],
) -> fx.GraphModule:
    """The kind's graph: slots in, a tuple of results out; a person can print and read it."""
    graph = fx.Graph()
    made: dict[Any, fx.Node] = {}
    for slot in slots:
        made[slot.name] = graph.placeholder(slot.name)
        if not slot.literal:
            made[slot.name].meta["val"] = slot.sources[0].meta.get("val")
    for row, node in enumerate(cell.nodes):
        leaves, spec = tree_flatten((node.args, node.kwargs))
        new_leaves = []
        for at, leaf in enumerate(leaves):
            slot = slot_at.get((row, at))
            if slot is not None:
                leaf = made[slot.name]
            elif isinstance(leaf, fx.Node):
                leaf = made[leaf]
            new_leaves.append(leaf)
        args, kwargs = tree_unflatten(new_leaves, spec)
        made[node] = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        made[node].meta = dict(node.meta)
    graph.output(tuple(made[cell.nodes[row]] for row in kept))
    return fx.GraphModule({}, graph, class_name="Kind")


def _unbatchable(cell: Cell) -> str | None:
    """The name of an operation that is known to have no batched form."""
    for node in cell.nodes:
        if node.op != "call_function":
            return f"{node.op} {node.target}"
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"higher-order operator {node.target.name()}"
    return None
