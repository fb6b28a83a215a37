"""Dynamo's graph -> a functional ATen graph, each distinct call traced once.

A segment-recurrent model calls the same operations on tensors of the same sizes once a layer and segment.
AOTAutograd runs every one of these calls twice, through several dispatch layers. Here a call whose
operation and arguments were seen before is given a copy of what that one became.

This is done only where it is plain that the outcome is AOTAutograd's: no gradients, no call that writes
into a tensor of which another view is read, fixed sizes, ordinary tensors. Anything else raises
:class:`Unsure`, and AOTAutograd it is.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.experimental.proxy_tensor import make_fx

from diagpass.capture.plain import constant, is_plain, writes
from diagpass.capture.record import graph_of

__all__ = ["Expanded", "Unsure", "expand"]

_TENSOR = object()  # stands for a tensor among results
_KEPT = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")  # of Dynamo's record of a call


class Unsure(Exception):
    """The graph has something that only AOTAutograd is trusted with; the message says what."""


@dataclasses.dataclass(frozen=True)
class Expanded:
    """A functional graph with the captured graph's inputs.

    Attributes
    ----------
    graph
        Its outputs are the written inputs' new values, then what the captured graph returns.
    written
        Positions of the inputs that are written in place, in the order of their new values.
    passed
        Per returned value, the input that it *is* (the same object), or None.
    """

    graph: fx.GraphModule
    written: tuple[int, ...]
    passed: tuple[int | None, ...]


def expand(gm: fx.GraphModule, inputs: Sequence[Any]) -> Expanded:
    """The functional graph of a captured one.

    Parameters
    ----------
    gm
        The graph as Dynamo captured it, weights and state lifted to inputs. Only meaningful inside a
        backend call.
    inputs
        Its example inputs.

    Returns
    -------
    Expanded
        Every call of its graph is an ATen operation that writes nowhere, with its (fake) result as
        ``meta["val"]`` and Dynamo's record of where it came from.

    Raises
    ------
    Unsure
        The graph is not one of those that this function handles.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if mode is None:
        raise Unsure("no capture is under way")
    if torch.is_inference_mode_enabled():
        raise Unsure("inference mode")
    if torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in inputs):
        raise Unsure("gradients")
    pending = getattr(mode.shape_env, "pending_fresh_unbacked_symbols", [])
    before = list(pending)
    try:
        with torch.no_grad(), mode, enable_python_dispatcher():
            return _Expansion(gm, mode).run(inputs)
    except Exception as error:
        pending[:] = before  # sizes that depend on values, which nobody else will find in a result
        if isinstance(error, Unsure):
            raise
        raise Unsure(f"{type(error).__name__}: {error}") from error  # something that nobody thought of


@dataclasses.dataclass(frozen=True)
class _Trace:
    """What one call became: its nodes, and the result in terms of them and of the call's tensors."""

    graph: fx.Graph
    result: Any
    memory: dict[fx.Node, tuple[_Memory | None, ...]]
    written: fx.Node | None = None  # the new value of the call's first argument, if it writes it


@dataclasses.dataclass(frozen=True)
class _Memory:
    """Where a result lies: its geometry, and which earlier value's memory it lies in, if in one's."""

    like: FakeTensor
    owner: tuple[fx.Node, int] | None


class _Expansion:
    """One graph on its way."""

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode) -> None:
        self._gm = gm
        self._mode = mode
        self._graph = fx.Graph()
        self._values: dict[fx.Node, Any] = {}  # per node of Dynamo's: its result, made of new nodes
        self._traces: dict[Hashable, _Trace] = {}
        self._memory: dict[int, list[fx.Node]] = {}  # the new nodes whose results lie in a memory
        self._now: dict[fx.Node, fx.Node] = {}  # per node that was written in place: its value afterwards
        self._stale: set[fx.Node] = set()  # other views of what was written

    def run(self, inputs: Sequence[Any]) -> Expanded:
        given = iter(enumerate(inputs))
        for node in self._gm.graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._placeholder(node, *next(given))
            elif node.op == "output":
                results = fx.map_arg(node.args[0], self._values.__getitem__)
            elif node.target is operator.getitem and isinstance(self._values[node.args[0]], (tuple, list)):
                self._values[node] = self._values[node.args[0]][node.args[1]]
            elif node.target not in _WITHOUT_EFFECT:
                self._values[node] = self._call(node)
        placeholders = self._graph.find_nodes(op="placeholder")
        written = tuple(at for at, node in enumerate(placeholders) if node in self._now)
        places = {node: at for at, node in enumerate(placeholders)}
        values = [placeholders[at] for at in written]
        for place in values:
            while place in self._now:
                place = self._now[place]
                if place in pytree.tree_leaves(results):
                    raise Unsure("an input that is written is returned under another name")
        self._graph.output(tuple(fx.map_arg([*values, *results], self._latest)))
        self._graph.eliminate_dead_code()
        graph = _make_graph_module(torch.nn.Module(), self._graph)  # its code is written once it is asked for
        return Expanded(graph, written, tuple(places.get(value) for value in results))

    def _placeholder(self, node: fx.Node, at: int, real: Any) -> fx.Node:
        captured = node.meta.get("example_value")
        value = real
        if not isinstance(real, torch.SymInt):
            if type(real) not in (torch.Tensor, torch.nn.Parameter) or not isinstance(captured, torch.Tensor):
                raise Unsure(f"an input is a {type(real).__name__}")
            if not all(isinstance(size, int) for size in captured.shape):
                raise Unsure("a size that is not fixed")
            value = self._mode.from_tensor(real, static_shapes=True)
        self._check(value)
        made = self._graph.placeholder(f"arg{at}_1")
        made.meta = {**_kept(node), "val": value}
        self._remember(made)
        return made

    def _remember(self, node: fx.Node) -> None:
        for value in pytree.tree_leaves(node.meta["val"]):
            if isinstance(value, torch.Tensor):
                self._memory.setdefault(_storage(value), []).append(node)

    def _latest(self, node: fx.Node) -> fx.Node:
        """What a node's tensor holds by now."""
        while node not in self._stale:
            if node not in self._now:
                return node
            node = self._now[node]
        raise Unsure("a tensor is read of which another view was written")

    def _check(self, value: Any) -> None:
        """Raise unless it is a symbol or an ordinary tensor of fixed size, as Dynamo represents one."""
        if isinstance(value, torch.SymInt):
            return
        if not isinstance(value, FakeTensor) or value.fake_mode is not self._mode:
            raise Unsure(f"a value that is a {type(value).__name__}")
        if value.constant is not None:
            raise Unsure("a tensor whose numbers are known")
        if value.layout is not torch.strided or value.is_nested or value.is_quantized:
            raise Unsure(f"a tensor of layout {value.layout}")
        if value.is_conj() or value.is_neg():
            raise Unsure("a tensor that is conjugated or negated when it is read")
        if not all(isinstance(n, int) for n in (*value.shape, *value.stride(), value.storage_offset())):
            raise Unsure("a size that is not fixed")

    def _call(self, node: fx.Node) -> Any:
        if node.op not in ("call_function", "call_method"):
            raise Unsure(f"{node.op} {node.target}")
        writing = writes(node)
        if not writing and not is_plain(node):
            raise Unsure(f"{node.target} in the graph")
        objects: Any = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        given: Any = fx.map_arg(objects, self._latest)
        leaves, spec = pytree.tree_flatten(given)
        tensors = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))
        place = {tensor: at for at, tensor in enumerate(tensors)}
        constants = tuple(
            ("tensor", place[leaf]) if isinstance(leaf, fx.Node) else constant(leaf) for leaf in leaves
        )
        key: Any = (node.op, node.target, spec, constants, tuple(map(_geometry, tensors)))
        try:
            trace = self._traces.get(key)
        except TypeError:
            raise Unsure(f"an argument of {node.target}") from None
        if trace is None and not any(isinstance(t.meta["val"], torch.Tensor) for t in tensors) and tensors:
            return self._number(node, given)
        if trace is None:
            trace = self._traces[key] = self._trace(node, leaves, spec, tensors, writing)
        new = self._copy(trace, tensors, node)
        if not writing:
            return fx.map_arg(trace.result, new.__getitem__)
        if trace.written is None or not isinstance(objects[0][0], fx.Node):
            raise Unsure(f"{node.target} writes elsewhere")
        self._write(objects[0][0], given[0][0], new[trace.written])
        if trace.result is not None and trace.result is not trace.written:
            raise Unsure(f"{node.target} writes one tensor and returns another")
        return None if trace.result is None else objects[0][0]

    def _write(self, written: fx.Node, before: fx.Node, after: fx.Node) -> None:
        """Let a tensor have another value from here on, where nothing else that is read shows it."""
        old, new = before.meta["val"], after.meta["val"]
        if _geometry(before)[:5] != _geometry(after)[:5] or torch._debug_has_internal_overlap(old):
            raise Unsure("a tensor is written that has another layout afterwards")
        if after is before or _storage(new) == _storage(old):
            raise Unsure("a tensor is written with a view of itself")
        others = [node for node in self._memory[_storage(old)] if node not in (written, before)]
        if any(node.op == "placeholder" for node in others):
            raise Unsure("a view of an input is written")
        self._stale.update(others)
        self._now[before] = after

    def _number(self, node: fx.Node, given: Any) -> Any:
        """The result of arithmetic with symbols."""
        if getattr(node.target, "__name__", "") not in _ARITHMETIC or node.kwargs:
            raise Unsure(f"{node.target} of numbers that change")
        args, _ = given
        operation: Any = node.target
        value = operation(*fx.map_arg(args, lambda argument: argument.meta["val"]))
        if not isinstance(value, torch.SymInt):
            raise Unsure(f"{node.target} makes a {type(value).__name__} of numbers that change")
        made = self._graph.call_function(operation, args)
        made.meta = {**_kept(node), "val": value}
        return made

    def _trace(
        self, node: fx.Node, leaves: list[Any], spec: Any, tensors: list[fx.Node], writing: bool
    ) -> _Trace:
        results: list[Any] = []
        operation: Any = node.target

        def call(*values: torch.Tensor) -> list[torch.Tensor]:
            by_node = dict(zip(tensors, values, strict=True))
            filled = [by_node[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, spec)
            if node.op == "call_method":
                result = getattr(args[0], operation)(*args[1:], **kwargs)
            else:
                result = operation(*args, **kwargs)
            flat, result_spec = pytree.tree_flatten(result)
            if not writing and not any(isinstance(leaf, torch.Tensor) for leaf in flat):
                raise Unsure(f"{node.target} has no tensor as its result")
            results[:] = result_spec, [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in flat]
            return [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]

        def with_inputs(*values: torch.Tensor) -> list[torch.Tensor]:
            made = call(*values)
            return [*values, *made]

        values = [tensor.meta["val"] for tensor in tensors]
        written: fx.Node | None = None
        try:
            graph = None if writing else graph_of(call, values).graph
            if graph is None or any(map(_is_mutable, graph.nodes)):  # or writes into what it made itself
                graph = make_fx(dispatch_functionalize(with_inputs, FunctionalTensorMode()))(*values).graph
                written = _split_off_inputs(graph, tensors.index(leaves[0]) if writing else None)
        except Unsure:
            raise
        except Exception as error:  # whatever is wrong with it, AOTAutograd is to say
            raise Unsure(f"{node.target}: {error}") from error
        result_spec, flat = results
        (made,) = graph.find_nodes(op="output")[0].args
        made = iter(made)
        result = pytree.tree_unflatten(
            [next(made) if leaf is _TENSOR else leaf for leaf in flat], result_spec
        )
        return _Trace(graph, result, self._memory_of(graph), written)

    def _memory_of(self, graph: fx.Graph) -> dict[fx.Node, tuple[_Memory | None, ...]]:
        """Per node and result where it lies, None for a number."""
        owners: dict[int, tuple[fx.Node, int]] = {}
        found = {}
        for node in graph.nodes:
            if node.op == "output":
                continue
            if node.op == "call_function":
                self._check_functional(node)
            elif node.op != "placeholder":
                raise Unsure(f"{node.op} {node.target}")
            memory = []
            for at, value in enumerate(pytree.tree_leaves(node.meta.get("val"))):
                if type(value) in (int, float, bool, type(None)):
                    memory.append(None)
                    continue
                self._check(value)
                if isinstance(value, torch.SymInt):
                    if len(node.users) and node.op == "call_function":
                        raise Unsure(f"{node.target} computes with numbers that change")
                    memory.append(None)
                    continue
                memory.append(_Memory(value, owners.get(_storage(value))))
                owners.setdefault(_storage(value), (node, at))
            found[node] = tuple(memory)
        return found

    def _check_functional(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            return
        op = node.target
        if not isinstance(op, torch._ops.OpOverload) or _is_mutable(node):
            raise Unsure(f"{op}")
        if "batch_norm" in op.name() and "no_training" not in op.name():
            raise Unsure(f"{op}, which may write statistics that its schema does not mention")

    def _copy(self, trace: _Trace, tensors: list[fx.Node], node: fx.Node) -> dict[fx.Node, fx.Node]:
        """Copy a trace into the graph; returns the new node of each of its nodes."""
        given = iter(tensors)
        new: dict[fx.Node, fx.Node] = {}
        for old in trace.graph.nodes:
            if old.op == "placeholder":
                new[old] = next(given)
            elif old.op == "call_function":
                made = new[old] = self._graph.node_copy(old, new.__getitem__)
                made.meta = {**old.meta, **_kept(node), "val": self._value(old, trace, new)}
                self._remember(made)
        return new

    def _value(self, old: fx.Node, trace: _Trace, new: dict[fx.Node, fx.Node]) -> Any:
        """A fake result of its own for a copied call, in the memory that it would lie in."""
        if old.target is operator.getitem:
            source, at = cast(tuple, old.args)
            return new[source].meta["val"][at]
        leaves, spec = pytree.tree_flatten(old.meta["val"])
        made: list[Any] = []
        with in_kernel_invocation_manager(self._mode), no_python_dispatcher():
            for leaf, memory in zip(leaves, trace.memory[old], strict=True):
                made.append(leaf if memory is None else self._tensor(memory, old, made, new))
        return pytree.tree_unflatten(made, spec)

    def _tensor(
        self, memory: _Memory, node: fx.Node, before: list[Any], new: dict[fx.Node, fx.Node]
    ) -> FakeTensor:
        """A tensor like one of a trace; ``before`` are the results of its node ahead of it."""
        like, geometry = memory.like, (memory.like.shape, memory.like.stride())
        if memory.owner is None:
            bare = torch.empty_strided(*geometry, dtype=like.dtype, device="meta")
        else:
            owner, at = memory.owner
            base = before if owner is node else pytree.tree_leaves(new[owner].meta["val"])
            bare = torch.empty(0, dtype=like.dtype, device="meta")  # a view may have another dtype
            bare.set_(base[at].untyped_storage(), like.storage_offset(), *geometry)
        return FakeTensor(self._mode, bare, like.fake_device)


def _kept(node: fx.Node) -> dict[str, Any]:
    return {name: node.meta[name] for name in _KEPT if name in node.meta}


def _geometry(node: fx.Node) -> tuple:
    """All of a tensor that the trace of a call may depend on."""
    value = node.meta["val"]
    if isinstance(value, torch.SymInt):
        return (torch.SymInt, value.node.expr)
    return (
        tuple(value.shape),
        value.stride(),
        value.storage_offset(),
        value.dtype,
        value.device,
        value.requires_grad,
    )


def _storage(value: torch.Tensor) -> int:
    return value.untyped_storage()._cdata


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _split_off_inputs(graph: fx.Graph, at: int | None) -> fx.Node | None:
    """Leave a trace's own results as its output; returns what became of input ``at``.

    Raises
    ------
    Unsure
        Another input was written, or that one was not.
    """
    output = graph.find_nodes(op="output")[0]
    placeholders = graph.find_nodes(op="placeholder")
    (values,) = output.args
    after = values[: len(placeholders)]
    output.args = (list(values[len(placeholders) :]),)
    for number, (before, now) in enumerate(zip(placeholders, after, strict=True)):
        if (now is before) == (number == at):
            raise Unsure("a call writes elsewhere than into its first argument")
    return None if at is None else after[at]


_ARITHMETIC = {"add", "sub", "mul", "floordiv", "mod", "neg"}
_WITHOUT_EFFECT = {torch._C._log_api_usage_once}
