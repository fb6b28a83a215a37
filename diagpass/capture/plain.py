"""Calls in a captured graph: which compute tensors and do nothing else, which write, which are the same."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
import torch.fx as fx

__all__ = ["constant", "is_plain", "writes"]

_FUNCTIONS: Any = getattr(torch._C, "_VariableFunctions")  # noqa: B009  the operations of torch's namespace
_PLAIN_MODULES = {
    "torch",
    "torch.functional",
    "torch.nn.functional",
    *(f"torch._C.{name}" for name in ("_nn", "_fft", "_linalg", "_special")),
}
_ATTRIBUTES = {"T", "mT", "H", "mH", "real", "imag"}  # read with getattr

_WRITING_OPERATORS = {
    operator.setitem,
    *(vars(operator)[f"i{name}"] for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
    *(vars(operator)[f"i{name}"] for name in ("and", "or", "xor", "lshift", "rshift", "matmul")),
}


def is_plain(node: fx.Node) -> bool:
    """Whether a call of Dynamo's computes tensors from its arguments and does nothing else.

    What writes into a tensor is found in the trace; this keeps those calls from being traced that would
    change a mode, or one of the tensors that Dynamo itself still looks at.
    """
    if "out" in node.kwargs:
        return False
    if node.op == "call_method" or isinstance(
        node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    ):
        return True
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    name, module = getattr(node.target, "__name__", "_"), getattr(node.target, "__module__", None)
    if module == operator.add.__module__:
        return True
    private = name.startswith("_") and getattr(_FUNCTIONS, name, None) is not node.target
    return module in _PLAIN_MODULES and not private and not name.endswith("_")


def writes(node: fx.Node) -> bool:
    """Whether a call of Dynamo's is one that writes into its first argument."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")
    return node.target in _WRITING_OPERATORS


def constant(leaf: Any) -> Hashable:
    """A constant argument as a part of a key; 1, 1.0 and True are not the same, nor are 0.0 and -0.0.

    Raises
    ------
    TypeError
        It is a slice between values that the graph computes.
    """
    if isinstance(leaf, slice):
        return (slice, *map(constant, (leaf.start, leaf.stop, leaf.step)))
    if isinstance(leaf, fx.Node):
        raise TypeError(f"{leaf} is computed by the graph")
    return (type(leaf), repr(leaf) if isinstance(leaf, (float, complex)) else leaf)
