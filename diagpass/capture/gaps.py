"""Inputs with gaps in their memory -> copies without, where operations would copy them one by one.

A segment of a batch, ``x[:, begin:end]``, has gaps: the rest of each sequence. PyTorch multiplies it by a
weight in other steps than a contiguous tensor (it copies, and adds the bias apart), so a first layer that
begins with a multiplication would be another kind of cell than the layers above it, which are given what
the layer below has made. It is copied once, ahead of the layer, instead.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensor

from diagpass.capture.plain import is_plain, writes

log = logging.getLogger(__name__)

__all__ = ["without_gaps"]

_BY_STRIDE = {"as_strided", "as_strided_"}


def without_gaps(gm: fx.GraphModule) -> fx.GraphModule:
    """A captured graph that copies inputs, or views of them, where one of its operations would.

    Only of memory that the graph neither writes nor returns, and only where a dimension lies inside the one
    before it, so that nothing else in the graph shows the difference.

    Parameters
    ----------
    gm
        The graph as Dynamo captured it.

    Returns
    -------
    torch.fx.GraphModule
        ``gm`` itself if there is nothing to copy.
    """
    fixed: set[int] | None = None
    chosen: list[fx.Node] = []
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if not _has_gaps(value) or not any(map(_copies, node.users, itertools.repeat(node))):
            continue
        if fixed is None:
            fixed = _only_read(gm.graph)
        if _memory(value) in fixed:
            chosen.append(node)
    if not chosen:
        return gm
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    for node, copy in copies.items():
        vars(copy).update(vars(node))  # an input's source
    for node in chosen:
        given = copies[node]
        with graph.inserting_after(given):
            copy = graph.call_method("contiguous", (given,))
        if node.op != "placeholder":  # that is recorded where it was first read: in the layer
            copy.meta = dict(given.meta)
        given.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)
    log.info("%d segments or other inputs are copied ahead of what multiplies them", len(chosen))
    made = fx.GraphModule(gm, graph)
    vars(made).update({name: value for name, value in vars(gm).items() if name not in vars(made)})
    made.meta = gm.meta  # both for AOTAutograd
    return made


def _has_gaps(value: Any) -> bool:
    """Whether a tensor's dimensions lie in their order, one inside the other, and not densely."""
    if not isinstance(value, FakeTensor) or value.layout is not torch.strided or value.dim() < 3:
        return False
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride())) or value.is_contiguous():
        return False
    inner = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if size == 1:
            continue
        if stride < inner:
            return False
        inner = size * stride
    return True


def _copies(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operation that is given a tensor with gaps copies it first."""
    name = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
    if name in ("reshape", "flatten"):
        result = user.meta.get("example_value")
        return isinstance(result, FakeTensor) and _memory(result) != _memory(node.meta["example_value"])
    if name in ("matmul", "__matmul__", "einsum"):  # by a matrix; a batch of them is multiplied where it lies
        others = [given.meta.get("example_value") for given in user.all_input_nodes if given is not node]
        matrices = [isinstance(other, torch.Tensor) and other.dim() <= 2 for other in others]
        return bool(matrices) and all(matrices)
    return name == "linear" and user.args[:1] == (node,)


def _only_read(graph: fx.Graph) -> set[int]:
    """The memory of inputs that is neither written nor returned."""
    memory = {
        _memory(node.meta["example_value"])
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("example_value"), FakeTensor)
    }
    for node in graph.nodes:
        if node.op == "placeholder" or (node.op != "output" and _only_reads(node)):
            continue
        for given in node.all_input_nodes:
            if "example_value" not in given.meta:
                return set()
            for value in pytree.tree_leaves(given.meta.get("example_value")):
                if isinstance(value, FakeTensor):
                    memory.discard(_memory(value))
    return memory


def _only_reads(node: fx.Node) -> bool:
    """Whether it is plain that a call writes nowhere and asks for nothing but values and sizes."""
    if node.op not in ("call_function", "call_method") or writes(node) or not is_plain(node):
        return False
    in_place = any(leaf is True for leaf in pytree.tree_leaves((node.args, node.kwargs)))  # perhaps
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return not in_place and name not in _BY_STRIDE


def _memory(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata
