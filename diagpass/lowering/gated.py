"""Two products of one operand that meet in a gate -> one operation.

::

    mul(silu(bmm(x, u)), bmm(x, v))  ->  gated_product(x, u, v, "silu")

Both products, and what joins them, then leave one value instead of three
(:mod:`diagpass.kernels.gated`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx

from diagpass.kernels.gated import best_tiles
from diagpass.lowering.views import is_packed, is_view, is_whole

aten = torch.ops.aten
log = logging.getLogger(__name__)

__all__ = ["gate"]

Pays = Callable[[torch.Tensor, torch.Tensor, str], "list[int] | None"]

_PRODUCTS = (aten.bmm.default, aten.mm.default)
_ACTIVATIONS: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}


@dataclasses.dataclass(frozen=True)
class _Branch:
    """One side of the gate: a product, and the view through which the gate reads it, if there is one."""

    product: fx.Node
    view: fx.Node | None
    activation: str = "identity"


def gate(form: fx.GraphModule, pays: Pays | None = None) -> fx.GraphModule:
    """Replace gated products.

    Parameters
    ----------
    form
        A functional graph of ATen operations.
    pays
        Given the rows, the weights of the first product as ``nn.Linear`` stores them and the activation: how
        the kernel goes about them, or None if the products stay as they are. By default
        :func:`~diagpass.kernels.gated.best_tiles`.

    Returns
    -------
    fx.GraphModule
        Another one; ``form`` itself if there is nothing to replace.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(form.graph, {}))
    changed = sum(
        _replace(node, pays or best_tiles)
        for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    )
    if not changed:
        return form
    graph.eliminate_dead_code()
    graph.lint()
    log.debug("%d gated products", changed)
    return fx.GraphModule(form, graph, class_name="Gated")


def _replace(node: fx.Node, pays: Pays) -> bool:
    """Compute a gate by one operation, if it is one and that pays."""
    pair = _pair(node)
    if pair is None:
        return False
    first, second = pair
    rows, weights, others = first.product.args[0], first.product.args[1], second.product.args[1]
    with node.graph.inserting_before(node):
        stored = [_stored(each) for each in (weights, others)]
        tiles = pays(rows.meta["val"], stored[0].meta["val"], first.activation)  # type: ignore[union-attr]
        if tiles is None:
            return False
        function = torch.ops.diagpass.gated_product.default
        product = node.graph.call_function(function, (rows, *stored, first.activation, tiles))
        product.meta = dict(first.product.meta)
        found = product
        if first.view is not None:
            found = node.graph.call_function(aten.reshape.default, (product, first.view.args[1]))
            found.meta = dict(node.meta)
    node.replace_all_uses_with(found)
    return True


def _pair(node: fx.Node) -> tuple[_Branch, _Branch] | None:
    """The two products that a multiplication joins, the activated one first; None if it joins others."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    one, two = (_branch(item, node) for item in node.args)
    if one is None or two is None or one.product is two.product:
        return None
    if two.activation != "identity":
        one, two = two, one
    if two.activation != "identity" or not _have_same_rows(one.product, two.product):
        return None
    values = [each.product.meta["val"] for each in (one, two)]
    views = [each.view if each.view is not None else each.product for each in (one, two)]
    same = values[0].shape == values[1].shape and all(each.dtype == value.dtype for each in values)
    return (one, two) if same and all(each.meta["val"].shape == value.shape for each in views) else None


def _branch(item: Any, reader: fx.Node) -> _Branch | None:
    """From an operand of a gate to its product, of which nothing else is read."""
    activation, view = "identity", None
    node = item
    while isinstance(node, fx.Node) and list(node.users) == [reader] and is_packed(node):
        if node.target in _PRODUCTS:
            return _Branch(node, view, activation)
        name = _activation(node)
        if name is not None and activation == "identity":
            activation = name
        elif node.target in (aten.view.default, aten.reshape.default) and is_whole(node):
            view = view if view is not None else node
        else:
            return None
        node, reader = node.args[0], node
    return None


def _activation(node: fx.Node) -> str | None:
    if node.target is aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return _ACTIVATIONS.get(node.target)


def _have_same_rows(one: fx.Node, two: fx.Node) -> bool:
    """Whether two products have the same left operand, perhaps by views of their own."""
    left, right = one.args[0], two.args[0]
    if one.target is not two.target or left.meta["val"].shape != right.meta["val"].shape:  # type: ignore[union-attr]
        return False
    return left is right or _origin(left) is _origin(right)


def _origin(node: Any) -> fx.Node:
    """What a value shows in full and in the same order."""
    while is_view(node) and is_packed(node) and is_whole(node) and is_packed(node.args[0]):
        node = node.args[0]
    return node


def _stored(weights: Any) -> fx.Node:
    """Weights as ``nn.Linear`` stores them: the last two axes exchanged, which a view mostly did before."""
    if weights.target is aten.transpose.int and _exchanges_last(weights):
        return weights.args[0]
    if weights.target is aten.t.default:
        return weights.args[0]
    node = weights.graph.call_function(aten.transpose.int, (weights, -2, -1))
    node.meta["val"] = weights.meta["val"].mT
    return node


def _exchanges_last(node: fx.Node) -> bool:
    rank = node.meta["val"].dim()
    return {int(axis) % rank for axis in node.args[1:]} == {rank - 2, rank - 1}  # type: ignore[arg-type]
