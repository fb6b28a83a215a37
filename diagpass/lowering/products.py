"""Batched matrix products -> one product for each cell of the group.

One call for the whole group is not the fastest for every shape on every machine. Here is what a choice needs:
which operations of a batched form are such products, ways to compute one that can be timed, and the form with
some of them replaced. Inductor has each single product write its row of the stacked result: no copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten

MOST_ROWS = 64  # a longer row of single products is code that nobody wants to compile

__all__ = ["Product", "products", "with_loops"]


@dataclasses.dataclass(frozen=True)
class Product:
    """A batched product of a form: its node and the operands as they will lie in memory."""

    node: fx.Node
    operands: tuple[torch.Tensor, ...]

    @property
    def rows(self) -> int:
        """How many products it is."""
        return int(self.node.meta["val"].shape[0])

    def ways(self) -> dict[str, Callable[[], Any]]:
        """Ways to compute it with made-up operands, by name: ``batched`` and ``looped``."""
        made = [_like(operand) for operand in self.operands]
        result: Any = _like(self.node.meta["val"])
        whole, single = _FUNCTIONS[self.node.target]
        scale = self.node.kwargs

        def looped() -> None:
            for at in range(self.rows):  # views are made at every call, as compiled code does
                single(*(_row(operand, at) for operand in made), **scale, out=result[at])

        return {"batched": lambda: whole(*made, **scale, out=result), "looped": looped}


_FUNCTIONS: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {
    aten.bmm.default: (torch.bmm, torch.mm),
    aten.baddbmm.default: (torch.baddbmm, torch.addmm),
}
_SINGLE = {aten.bmm.default: aten.mm.default, aten.baddbmm.default: aten.addmm.default}


def products(form: fx.GraphModule) -> list[Product]:
    """The batched products of a form whose sizes are known, in order."""
    found = []
    for node in form.graph.nodes:
        if node.target not in _SINGLE or any(isinstance(value, fx.Node) for value in node.kwargs.values()):
            continue
        operands: list[Any] = [s.meta.get("val") for s in node.args if isinstance(s, fx.Node)]
        values = [*operands, node.meta.get("val")]
        if len(operands) == len(node.args) and all(map(_is_batched, values)):
            product = Product(node, tuple(operands))
            if 1 < product.rows <= MOST_ROWS and 0 not in node.meta["val"].shape:
                found.append(product)
    return found


def with_loops(form: fx.GraphModule, wanted: Collection[fx.Node]) -> fx.GraphModule:
    """A copy of the form in which the wanted products are computed cell by cell; the form if none is."""
    if not wanted:
        return form
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in form.graph.nodes:
        if node in wanted:
            made[node] = _loop(graph, node, [made[source] for source in node.args])
            made[node].meta = dict(node.meta)
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], made.__getitem__))
        else:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.lint()
    return fx.GraphModule(form, graph, class_name="Looped")


def _loop(graph: fx.Graph, node: fx.Node, operands: list[fx.Node]) -> fx.Node:
    rows = []
    for at in range(int(node.meta["val"].shape[0])):
        picked = tuple(
            graph.call_function(aten.select.int, (operand, 0, min(at, int(operand.meta["val"].shape[0]) - 1)))
            for operand in operands
        )
        single = _SINGLE[node.target]  # type: ignore[index]
        rows.append(graph.call_function(single, picked, dict(node.kwargs)))
    return graph.call_function(aten.stack.default, (rows,))


def _is_batched(value: Any) -> bool:
    """Whether it is a tensor of three dimensions with known sizes."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 3
        and all(isinstance(number, int) for number in (*value.shape, *value.stride()))
    )


def _like(value: torch.Tensor) -> torch.Tensor:
    """A tensor of ones with this shape and these strides."""
    span = 1 + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    memory = torch.ones(span, dtype=value.dtype, device=value.device)
    return memory.as_strided(value.shape, value.stride())


def _row(operand: torch.Tensor, at: int) -> torch.Tensor:
    return operand[min(at, operand.shape[0] - 1)]
