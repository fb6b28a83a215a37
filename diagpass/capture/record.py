"""A function of fake tensors -> the graph of ATen operations that it runs.

What ``make_fx`` does, for the plain case and with less around each operation: what reaches the dispatcher
becomes a node. Whatever is not plain is left to ``make_fx``.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger(__name__)

__all__ = ["NotPlain", "graph_of", "record"]

_CONSTANTS = (int, float, complex, bool, str, type(None), torch.dtype, torch.device, torch.layout)


class NotPlain(Exception):
    """The function does something that :func:`record` does not follow; the message says what."""


def graph_of(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph of a function, recorded if it is plain and else traced by ``make_fx``.

    Parameters
    ----------
    function
        Takes the inputs and returns tensors, in tuples or lists. It may be called twice.
    inputs
        Fake tensors of one mode, and symbols.

    Returns
    -------
    torch.fx.GraphModule
        A placeholder per input; each node's (fake) result is its ``meta["val"]``.
    """
    try:
        return record(function, inputs)
    except NotPlain as reason:
        log.debug("traced by make_fx: %s", reason)
        return make_fx(function)(*inputs)


def record(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """:func:`graph_of` a plain function.

    Raises
    ------
    NotPlain
        It writes into a tensor, reads one that is no input, computes with symbols, or runs under a mode
        that hides what its operations consist of.
    """
    recorder = _Recorder(inputs)
    with recorder:
        results = function(*inputs)
    recorder.graph.output(pytree.tree_map(recorder.argument, results))
    return _make_graph_module(torch.nn.Module(), recorder.graph)  # its code is written once it is asked for


class _Recorder(TorchDispatchMode):
    """Makes a node of each operation."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._nodes: dict[int, fx.Node] = {}  # per tensor or symbol, by identity
        self._alive: list[Any] = []  # so that no identity is given twice
        for at, value in enumerate(inputs):
            node = self.graph.placeholder(f"arg{at}_1")
            self._is(node, value)

    def _is(self, node: fx.Node, value: Any) -> None:
        node.meta["val"] = value
        if isinstance(value, (torch.Tensor, torch.SymInt)):
            self._nodes[_identity(value)] = node
            self._alive.append(value)

    def argument(self, value: Any) -> Any:
        """A leaf of an operation's arguments, or of the function's results, in the graph."""
        node = self._nodes.get(_identity(value))
        if node is not None:
            return node
        if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise NotPlain(f"a {type(value).__name__} from elsewhere")
        if not isinstance(value, (*_CONSTANTS, torch.memory_format)):
            raise NotPlain(f"an argument that is a {type(value).__name__}")
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload) or func._schema.is_mutable:
            raise NotPlain(f"{func}")
        if func._can_decompose() or func is torch.ops.aten.lift_fresh.default:
            raise NotPlain(f"{func}, which consists of others")
        given, named = pytree.tree_map(self.argument, (args, kwargs))
        result = _computed(func, args, kwargs)
        if func is torch.ops.aten.detach.default and _is_new(given[0]) and args[0] is given[0].meta["val"]:
            # torch hands a new tensor out as it is unless it is referred to elsewhere, as it is here
            self._nodes[id(result)] = given[0]
            self._alive.append(result)
            return result
        node = self.graph.call_function(func, given, named)
        self._is(node, result)
        if isinstance(result, (tuple, list)):
            for at, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    self._is(self.graph.call_function(operator.getitem, (node, at)), item)
                elif isinstance(item, (tuple, list, torch.SymInt)):
                    raise NotPlain(f"{func}, whose results are nested")
        elif not isinstance(result, torch.Tensor):
            raise NotPlain(f"{func}, whose result is no tensor")
        return result


def _computed(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The fake result of an operation.

    Where the kernels for the meta device say all that there is to say, they are asked themselves: a fake
    tensor mode looks first into its cache and for decompositions, which takes ten times as long.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    first = tensors[0] if tensors else None
    structural = func in _STRUCTURAL or (
        torch.Tag.pointwise in func.tags and torch.Tag.nondeterministic_seeded not in func.tags
    )
    if (
        not structural
        or not isinstance(first, FakeTensor)
        or not all(_is_ordinary(tensor, first) for tensor in tensors)
        or not kwargs.keys() <= _SCALARS
    ):
        return func(*args, **kwargs)
    try:
        with in_kernel_invocation_manager(first.fake_mode), no_python_dispatcher():
            bare = func(*args, **kwargs)
    except NotImplementedError:  # there is no such kernel
        return func(*args, **kwargs)
    if not isinstance(bare, torch.Tensor):
        return func(*args, **kwargs)
    return FakeTensor(first.fake_mode, bare, first.fake_device)


def _is_ordinary(tensor: torch.Tensor, first: FakeTensor) -> bool:
    return (
        type(tensor) is FakeTensor
        and tensor.fake_mode is first.fake_mode
        and tensor.fake_device == first.fake_device
        and tensor.constant is None
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor._has_symbolic_sizes_strides
    )


aten = torch.ops.aten
_SCALARS = {"alpha", "beta", "value", "approximate", "rounding_mode", "min", "max"}
_STRUCTURAL = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.clone.default,
    aten.cat.default,
    aten.mm.default,
    aten.bmm.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
}  # with one result, on the device of their operands


def _is_new(node: fx.Node) -> bool:
    """Whether a node's result is a tensor made from nothing, as by ``torch.zeros``."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is torch.ops.aten._to_copy.default:
        return False
    return {argument.name for argument in node.target._schema.arguments} >= {"layout", "pin_memory"}


def _identity(value: Any) -> int:
    """Symbols are the same where their nodes are."""
    return id(value.node) if isinstance(value, torch.SymInt) else id(value)
