"""A kind -> its batched form for one group width: a plain FX graph of ATen operations.

Invariants of the batched form: its stacked operands are contiguous (weights: within each row), and so
are its stacked results.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from diagpass.capture.marks import module_of
from diagpass.capture.record import graph_of
from diagpass.errors import BatchingError
from diagpass.ir import Kind
from diagpass.lowering.heads import without_repeated_heads
from diagpass.lowering.rules import Number, Stacked, Width, apply

log = logging.getLogger(__name__)


class _GroupInterpreter(fx.Interpreter):
    """Runs a kind's body on stacked values, operation by operation."""

    def __init__(self, body: fx.GraphModule, width: Width) -> None:
        super().__init__(body)
        self.width = width

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except BatchingError as error:
            raise BatchingError(f"{error}, in {module_of(n)}") from error
        if n.op != "call_function":
            return result
        return _as_expected(n, result, n.meta.get("val"), self.width)

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        return apply(target, self.width, args, kwargs)


def _as_expected(node: fx.Node, result: Any, example: Any, width: Width) -> Any:
    """Hold a batched result against what one cell computes: decompositions promote where kernels do not.

    Raises
    ------
    BatchingError
        The shape is not that of ``width`` cells.
    """
    if isinstance(result, (tuple, list)) and isinstance(example, (tuple, list)):
        pairs = zip(result, example, strict=True)
        return type(result)(_as_expected(node, item, value, width) for item, value in pairs)
    value = result.tensor if isinstance(result, Stacked) else result
    if not isinstance(value, torch.Tensor) or not isinstance(example, torch.Tensor):
        return result
    expected = (width, *example.shape) if isinstance(result, Stacked) else tuple(example.shape)
    if tuple(value.shape) != expected:
        raise BatchingError(
            f"operation {node.target} in {module_of(node)} gives {tuple(value.shape)} batched, not {expected}"
        )
    if value.dtype == example.dtype:
        return result
    cast = value.to(example.dtype)
    return Stacked(cast) if isinstance(result, Stacked) else cast


def batch_kind(kind: Kind, width: int, shared: Sequence[bool]) -> tuple[fx.GraphModule, tuple[bool, ...]]:
    """Trace the batched form of a kind.

    Parameters
    ----------
    kind
        What to batch.
    width
        The number of cells in the group.
    shared
        Per slot, whether all cells of the group read the same value; it then has no group axis.

    Returns
    -------
    tuple
        The graph, taking the slots in order (stacked ones with a leading axis of ``width``; numbers as
        a tensor of shape ``(width,)``), and per result whether it is stacked.

    Raises
    ------
    BatchingError
        An operation of the kind has no batching rule; the message names it and its module.
    """
    values = [
        node.meta["val"] for node in kind.body.graph.nodes if node.op == "placeholder" and "val" in node.meta
    ]
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None) or FakeTensorMode()
    return trace(kind, width, shared, mode)


def trace(
    kind: Kind, width: Width, shared: Sequence[bool], mode: FakeTensorMode
) -> tuple[fx.GraphModule, tuple[bool, ...]]:
    """:func:`batch_kind` among fake tensors of a mode, which knows the width if it is symbolic."""
    if kind.unbatchable is not None:
        raise BatchingError(f"{kind.unbatchable} cannot be batched")
    stacked_results: list[bool] = []
    body = without_repeated_heads(kind.body)

    def run(*operands: Any) -> tuple:
        wrapped = []
        for slot, is_shared, operand in zip(kind.slots, shared, operands, strict=True):
            if is_shared:
                wrapped.append(operand)
            else:
                wrapped.append(Number(operand) if slot.literal else Stacked(operand))
        with torch.no_grad():
            results = _GroupInterpreter(body, width).run(*wrapped)
        if any(isinstance(result, (tuple, list)) for result in results):
            raise BatchingError("a cell leaves several results as one")
        stacked_results[:] = [isinstance(result, Stacked) for result in results]
        return tree_map(lambda item: item.tensor.contiguous() if isinstance(item, Stacked) else item, results)

    examples = []
    with mode:
        for slot, is_shared, node in zip(
            kind.slots, shared, kind.body.graph.find_nodes(op="placeholder"), strict=True
        ):
            if slot.literal:
                dtype = torch.float64 if isinstance(slot.sources[0], float) else torch.int64
                examples.append(torch.empty(width, dtype=dtype, device=device_of(kind)))
            else:
                examples.append(_example(is_shared, node.meta.get("val"), width))
        try:
            traced = graph_of(run, examples) if isinstance(width, int) else make_fx(run)(*examples)
        except BatchingError as error:  # the interpreter appends its own trace
            raise BatchingError(str(error).split("\n")[0]) from error
        except RuntimeError as error:
            said = str(error).strip().split("\n")[0]
            raise BatchingError(f"its batched form could not be traced ({said})") from error
    for node in traced.graph.nodes:  # weights are rows of a stack, evenly spaced but not packed
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    traced.graph.eliminate_dead_code()
    traced.recompile()
    log.debug("batched kind %d at width %s: %d nodes", kind.index, width, len(traced.graph.nodes))
    return traced, tuple(stacked_results)


def device_of(kind: Kind) -> torch.device:
    """Where a kind's first tensor operand lies, and so the numbers that differ between its cells."""
    values = (node.meta.get("val") for node in kind.body.graph.find_nodes(op="placeholder"))
    return next((value.device for value in values if isinstance(value, torch.Tensor)), torch.device("cpu"))


def _example(is_shared: bool, value: Any, width: Width) -> Any:
    if not isinstance(value, torch.Tensor):
        if not is_shared:
            raise BatchingError("a Python number that differs between cells is computed at run time")
        return value
    if is_shared:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return torch.empty((width, *value.shape), dtype=value.dtype, device=value.device)
