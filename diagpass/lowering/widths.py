"""A kind -> one batched form for groups of any width: the group axis has a symbolic size.

A form for a fixed width is traced, and compiled, for that width alone; the ramps have every width below that
of the steady state. Here the width is a symbol, in a shape environment of its own. Each decision on a size
while the graph is traced, or compiled later, leaves a *guard* there: the graph serves the widths at which all
guards hold, and no others. :func:`holds` is asked for a width before it is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._pytree import tree_map

from diagpass.errors import BatchingError
from diagpass.ir import Kind
from diagpass.lowering.batch import trace

HINT = 7  # the width that a compiler tunes for; a prime, so that other sizes are seldom multiples of it

__all__ = ["at_width", "batch_any_width", "examples", "holds", "same_program", "width_of"]

Symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)


def batch_any_width(kind: Kind, shared: Sequence[bool]) -> tuple[fx.GraphModule, tuple[bool, ...]]:
    """Trace the batched form of a kind for any width of two or more.

    Parameters
    ----------
    kind, shared
        As of :func:`~diagpass.lowering.batch.batch_kind`.

    Returns
    -------
    tuple
        The graph, in which the width is read off an operand, and per result whether it is stacked.

    Raises
    ------
    BatchingError
        An operation of the kind has no batching rule, or one that fixes the width.
    """
    env = ShapeEnv()
    source = ConstantSource("width")
    symbol = env.create_symbol(HINT, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    width: Any = env.create_symintnode(symbol, hint=HINT, source=source)
    with enable_python_dispatcher():
        traced, stacked = trace(kind, width, shared, FakeTensorMode(shape_env=env))
    found = width_of(traced)
    if found is None or not isinstance(found.node.expr, sympy.Symbol):
        raise BatchingError("an operation fixes the width of its batched form")
    return traced, stacked


def width_of(graph: fx.GraphModule) -> torch.SymInt | None:
    """The symbolic width of a graph; None if it is for one width."""
    at = width_operand(graph)
    return None if at is None else graph.graph.find_nodes(op="placeholder")[at].meta["val"].shape[0]


def width_operand(graph: fx.GraphModule) -> int | None:
    """The operand off which a graph's width is read; None if it is for one width."""
    values = [node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")]
    return next((at for at, value in enumerate(values) if _is_stacked(value)), None)


def holds(width: torch.SymInt, at: int) -> bool:
    """Whether all that was decided on a symbolic width is right for the width ``at``."""
    env, symbol = width.node.shape_env, width.node.expr
    if not isinstance(symbol, sympy.Symbol):  # some operation asked for the number
        return False
    bounds = env.var_to_range[symbol]
    within = bounds.lower <= at <= bounds.upper
    return bool(within) and all(_at(guard.expr, symbol, at) == sympy.true for guard in env.guards)


def at_width(graph: fx.GraphModule, at: int) -> fx.GraphModule:
    """The graph for one width: sizes that follow from the width are numbers."""
    width = width_of(graph)
    assert width is not None
    fixed = fx.Graph()
    made: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Symbolic):
            made[node] = _number(value, width, at)
        elif node.op == "output":
            fixed.output(fx.map_arg(node.args[0], made.__getitem__))
        else:
            made[node] = fixed.node_copy(node, made.__getitem__)
            made[node].meta = {"val": tree_map(lambda item: _plain(item, width, at), value)}
    fixed.eliminate_dead_code()
    fixed.lint()
    return fx.GraphModule(graph, fixed, class_name="AtWidth")


def examples(graph: fx.GraphModule, operands: Sequence[torch.Tensor]) -> list[Any]:
    """What a compiler is shown of a graph of symbolic width: fake tensors laid out as these operands."""
    width: Any = width_of(graph)
    found = []
    values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    mode = next(value.fake_mode for value in values if _is_stacked(value))
    with mode:
        for value, operand in zip(values, operands, strict=True):
            shape = (width, *operand.shape[1:]) if _is_stacked(value) else operand.shape
            made = torch.empty_strided(shape, operand.stride(), dtype=operand.dtype, device=operand.device)
            found.append(made)
    return found


def same_program(graph: fx.GraphModule, at: int, fixed: fx.GraphModule) -> bool:
    """Whether a graph of symbolic width is, at the width ``at``, the one that was traced for that width.

    Operations, literals, wiring and all results' shapes, strides and data types are compared (strides where
    they mean something: not along a dimension of size 1).
    """
    return _program(at_width(graph, at)) == _program(fixed)


def _program(graph: fx.GraphModule) -> list[Any]:
    order = {node: number for number, node in enumerate(graph.graph.nodes)}

    def described(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return ("node", order[item])
        if isinstance(item, torch.Tensor):
            steps = (step for size, step in zip(item.shape, item.stride(), strict=True) if size > 1)
            return ("tensor", *item.shape, tuple(steps), item.dtype, item.device)
        return item

    return [
        (
            node.op,
            node.target if node.op == "call_function" else None,
            *(tree_map(described, part) for part in (node.args, dict(node.kwargs), node.meta.get("val"))),
        )
        for node in graph.graph.nodes
    ]


def _plain(value: Any, width: torch.SymInt, at: int) -> Any:
    """What a node computes at one width."""
    if not isinstance(value, FakeTensor):
        return _number(value, width, at)
    shape, stride = ([_number(size, width, at) for size in sizes] for sizes in (value.shape, value.stride()))
    with value.fake_mode:
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)


def _number(value: Any, width: torch.SymInt, at: int) -> Any:
    if not isinstance(value, Symbolic):
        return value
    found = _at(value.node.expr, width.node.expr, at)
    if isinstance(value, torch.SymBool):
        return bool(found)
    return int(found) if isinstance(value, torch.SymInt) else float(found)


def _at(expression: Any, symbol: sympy.Symbol, at: int) -> Any:
    return expression.xreplace({symbol: sympy.Integer(at)})


def _is_stacked(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and isinstance(value.shape[0], torch.SymInt)
