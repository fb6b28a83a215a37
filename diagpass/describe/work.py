"""Operations -> work as a machine sees it: matrix products, and bytes that are moved between them.

*Products* are the operations that PyTorch has a FLOP formula for (matrix products, convolutions, attention);
each is a kernel. All else is fused as far as anything could fuse it: a *chain* is what hangs together without
a product between, and reads what comes from outside once and writes what is read outside once. Views move
nothing. So bytes and kernels are bounds from below: a real compiler fuses less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import networkx as nx
import torch
import torch.fx as fx
from torch.utils._pytree import tree_leaves

from diagpass.describe.cost import formula_of, node_flops, value_bytes

__all__ = ["NO_WORK", "total_work", "work_of"]

NO_WORK: dict[str, Any] = {"products": [], "chains": 0, "moved": 0}

_KEYS = ("dtype", "batch", "m", "n", "flops", "bytes")
_VIEWS = frozenset(
    (
        *("view", "reshape", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand"),
        *("slice", "select", "detach", "alias", "unbind", "split", "split_with_sizes", "chunk", "movedim"),
        *("unfold", "getitem"),
    )
)


def work_of(nodes: Iterable[fx.Node]) -> dict[str, Any]:
    """The work of some operations of a graph, in the graph's order.

    Returns
    -------
    dict
        ``products``: a dict for each shape, with ``dtype``, ``batch``, ``m`` and ``n`` of the result,
        ``flops`` and ``bytes`` of one, and ``count``; ``chains``: how many fused chains; ``moved``: the bytes
        that they move. Causal attention counts half of its square.
    """
    products: dict[tuple, int] = {}
    chains = nx.Graph()
    depth: dict[fx.Node, int] = {}
    for node in nodes:
        before = max((depth[at] + _is_product(at) for at in node.all_input_nodes if at in depth), default=0)
        depth[node] = before
        if node.op != "call_function" or _is_view(node) or not _is_tensor(node):
            continue
        if _is_product(node):
            flops = node_flops(node) // (2 if _is_causal(node) else 1)
            key = (*_shape_of(node), flops, _moved_by(node))
            products[key] = products.get(key, 0) + 1
            continue
        chains.add_node(node)
        for source in map(_root, node.all_input_nodes):
            if source in chains and depth[source] == before:
                chains.add_edge(source, node)
    parts = list(nx.connected_components(chains))
    return _as_dict(products, len(parts), sum(map(_chain_bytes, parts)))


def total_work(parts: Iterable[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """Several works, each done some times."""
    products: dict[tuple, int] = {}
    chains = moved = 0
    for work, times in parts:
        chains += times * work["chains"]
        moved += times * work["moved"]
        for each in work["products"]:
            key = tuple(each[name] for name in _KEYS)
            products[key] = products.get(key, 0) + times * each["count"]
    return _as_dict(products, chains, moved)


def _as_dict(products: dict[tuple, int], chains: int, moved: int) -> dict[str, Any]:
    found = [{**dict(zip(_KEYS, key, strict=True)), "count": count} for key, count in products.items()]
    return {"products": found, "chains": chains, "moved": moved}


def _is_view(node: fx.Node) -> bool:
    name = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")
    return name in _VIEWS


def _is_product(node: fx.Node) -> bool:
    return formula_of(node) is not None


def _is_causal(node: fx.Node) -> bool:
    """Whether an attention kernel leaves out the half that its mask hides."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}.get("is_causal", False) is True


def _is_tensor(node: fx.Node) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(node.meta.get("val")))


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while node.op == "call_function" and _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _shown(node: fx.Node) -> int:
    """Bytes of a value that are there to be read: of an expanded one only those that are different."""
    return min(value_bytes(node.meta.get("val")), value_bytes(_root(node).meta.get("val")))


def _chain_bytes(chain: set[fx.Node]) -> int:
    read: dict[fx.Node, dict[fx.Node, int]] = {}
    moved = 0
    for node in chain:
        for source in node.all_input_nodes:
            if _root(source) not in chain and _is_tensor(source):
                read.setdefault(_root(source), {})[source] = _shown(source)
        if any(user not in chain for user in _users(node)):
            moved += value_bytes(node.meta.get("val"))
    for root, pieces in read.items():  # pieces of one value: no more than all of it
        moved += min(sum(pieces.values()), value_bytes(root.meta.get("val")))
    return moved


def _users(node: fx.Node) -> list[fx.Node]:
    """Who reads a value, directly or through views."""
    found, pending = [], list(node.users)
    while pending:
        user = pending.pop()
        if user.op == "call_function" and _is_view(user):
            pending += user.users
        else:
            found.append(user)
    return found


def _moved_by(node: fx.Node) -> int:
    return sum(map(_shown, node.all_input_nodes)) + value_bytes(_result(node))


def _result(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value[0] if isinstance(value, (tuple, list)) else value


def _shape_of(node: fx.Node) -> tuple[str, int, int, int]:
    """Data type, batch, rows and columns of a product's result."""
    result = _result(node)
    sizes = [1, 1, *(int(size) for size in result.shape)]
    return str(result.dtype).removeprefix("torch."), math.prod(sizes[:-2]), sizes[-2], sizes[-1]
