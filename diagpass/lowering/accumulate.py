"""Sums with a matrix product -> the product adds to what lies in the result's memory already.

``r = c + a @ b`` costs a pass over the product, ``c`` and ``r`` after the product was written: such sums (a
layer's residual connections) move more bytes than anything else between large products. Where ``r`` is to
lie in memory that is given, ``c`` can be written there at once, and the product accumulates:

::

    r = copy_(result, c); baddbmm_(result, a, b)

A *chain* is a row of such sums, each the next one's ``c``: all are in the result's memory in turn. Between
two sums whoever reads the value reads it there.

A compiler of functional graphs would make values of their own of what lies in that memory in turn. So the
graph has *stages* (``meta["stage"]`` of a node): what a compiler gets, by even numbers, and the products, by
odd ones. No node of a stage reads a view that another stage made: views are made again, values cross.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx

from diagpass.lowering.views import is_packed, is_view, is_whole

aten = torch.ops.aten
log = logging.getLogger(__name__)

STAGE = "stage"

__all__ = ["accumulate", "cut", "saves_traffic"]

_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
_ADDING = {aten.bmm.default: aten.baddbmm_.default, aten.mm.default: aten.addmm_.default}


def saves_traffic(value: torch.Tensor) -> bool:
    """Whether to accumulate into a value: where products are fast and rounded more coarsely than summed.

    A CPU's products are not; and in single precision the sum would be rounded otherwise for less to win.
    """
    return value.is_cuda and value.dtype in (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class _Sum:
    """``node`` is ``kept`` plus a product; ``path`` leads from the product to the sum, through views."""

    node: fx.Node
    kept: fx.Node
    path: tuple[fx.Node, ...]


def accumulate(form: fx.GraphModule, pays: Callable[[torch.Tensor], bool] | None = None) -> fx.GraphModule:
    """Have products add to what lies in a result's memory.

    Parameters
    ----------
    form
        A graph of ATen operations, functional but for ``copy_`` into operands that nothing else reads, as
        :func:`~diagpass.lowering.inplace.write_results` makes them.
    pays
        Whether it is worth it for a sum of this shape, data type and device; by default
        :func:`saves_traffic`.

    Returns
    -------
    fx.GraphModule
        The graph with in-place products, in stages; ``form`` itself if it has no such sum.
    """
    chains = _chains(form.graph, pays or saves_traffic)
    if not chains:
        return form
    graph = _InPlace(form.graph, chains).run()
    graph.lint()
    log.debug("%d products accumulate into %d results", sum(map(len, chains.values())), len(chains))
    return fx.GraphModule(form, graph, class_name="Accumulating")


def cut(form: fx.GraphModule) -> fx.GraphModule:
    """Cut a graph in stages into a submodule for each stage that is to be compiled.

    Returns
    -------
    fx.GraphModule
        Takes what ``form`` takes and writes what it writes. Its submodules are functional but for ``copy_``
        into operands, and return tuples.
    """
    outer = fx.Graph()
    root = torch.nn.Module()
    made: dict[fx.Node, fx.Node] = {}
    for node in form.graph.find_nodes(op="placeholder"):
        made[node] = outer.node_copy(node)
    calls = [node for node in form.graph.nodes if node.op not in ("placeholder", "output")]
    for stage, group in itertools.groupby(calls, lambda node: node.meta[STAGE]):
        nodes = list(group)
        if stage % 2:
            for node in nodes:
                made[node] = outer.node_copy(node, made.__getitem__)
            continue
        piece, inputs, outputs = _piece(form, nodes)
        name = f"piece_{stage // 2}"
        root.add_module(name, piece)
        call = outer.call_module(name, tuple(made[node] for node in inputs))
        for at, node in enumerate(outputs):
            made[node] = outer.call_function(operator.getitem, (call, at))
    outer.output(())
    outer.lint()
    for node in outer.find_nodes(op="get_attr"):
        setattr(root, node.target, getattr(form, node.target))
    return fx.GraphModule(root, outer, class_name="Pieces")


def _piece(form: fx.GraphModule, nodes: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """Nodes as a graph of their own, what of the others they read, and what of them the others read."""
    inside = dict.fromkeys(nodes)
    inputs = dict.fromkeys(
        source for node in nodes for source in node.all_input_nodes if source not in inside
    )
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        made[node] = graph.placeholder(node.name)
        made[node].meta = dict(node.meta)
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in outputs))
    graph.lint()
    return fx.GraphModule(form, graph, class_name="Piece"), list(inputs), outputs


# ---------------------------------------------------------------------------------------- finding sums


def _chains(graph: fx.Graph, pays: Callable[[torch.Tensor], bool]) -> dict[fx.Node, list[_Sum]]:
    """Per ``copy_`` into a result that can be accumulated there: the sums in order."""
    place = {node: at for at, node in enumerate(graph.nodes)}
    chains: dict[fx.Node, list[_Sum]] = {}
    taken: set[fx.Node] = set()
    for copy in graph.find_nodes(op="call_function", target=aten.copy_.default):
        target, source = copy.args
        if target.op != "placeholder" or not is_packed(target):
            continue
        chain: list[_Sum] = []
        node = _end(source)
        while node not in taken and (found := _sum(node, place)) is not None and pays(node.meta["val"]):
            chain.insert(0, found)
            taken.add(node)
            node = found.kept
        if chain:
            chains[copy] = chain
    return chains


def _sum(node: fx.Node, place: dict[fx.Node, int]) -> _Sum | None:
    """The node as a sum that can be accumulated, or None."""
    if node.target is not aten.add.Tensor or node.kwargs.get("alpha", 1) != 1 or not is_packed(node):
        return None
    kept: Any
    added: Any
    for kept, added in (node.args, reversed(node.args)):
        if kept is added or not (_is_like(kept, node) and _is_like(added, node)):
            continue
        path = _path(added, node)
        if path and _is_pointwise(_end(kept)) and not _is_read_later(kept, node, place):
            return _Sum(node, kept, path)
    return None


def _path(added: Any, reader: fx.Node) -> tuple[fx.Node, ...]:
    """From a product to its only reader, through views that leave it as it lies; empty if it is none."""
    path: list[fx.Node] = []
    node = added
    while isinstance(node, fx.Node) and list(node.users) == [reader] and is_packed(node):
        path.insert(0, node)
        if node.target in _ADDING:
            return tuple(path) if node.meta["val"].dtype == added.meta["val"].dtype else ()
        if not is_view(node) or not is_whole(node):
            return ()
        node, reader = node.args[0], node
    return ()


def _end(node: fx.Node) -> fx.Node:
    """What a value is a view of, as long as all of it lies in the same order."""
    while is_view(node) and is_packed(node) and is_whole(node):
        source: Any = node.args[0]
        if not is_packed(source):
            break
        node = source
    return node


def _is_pointwise(node: fx.Node) -> bool:
    """Whether the kernel that computes a value can write it anywhere, so that it need not be moved there."""
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _is_read_later(kept: fx.Node, node: fx.Node, place: dict[fx.Node, int]) -> bool:
    """Whether a value is read when the sum has taken its place."""
    return any(_moment(reader, place) >= place[node] for reader in _readers(kept) if reader is not node)


def _moment(reader: fx.Node, place: dict[fx.Node, int]) -> int:
    """When a node reads: a product that can be accumulated does so where its sum stands."""
    while reader.target in _ADDING or is_view(reader):
        if len(reader.users) != 1:
            break
        (reader,) = reader.users
    return place[reader]


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, through views too."""
    for user in node.users:
        yield user
        if is_view(user) or user.target is operator.getitem:
            yield from _readers(user)


def _is_like(one: Any, other: fx.Node) -> bool:
    """Whether both are tensors of one shape, data type and device."""
    first = one.meta.get("val") if isinstance(one, fx.Node) else None
    second = other.meta["val"]
    return (
        isinstance(first, torch.Tensor)
        and first.shape == second.shape
        and first.dtype == second.dtype
        and first.device == second.device
    )


def _is_free(node: fx.Node) -> bool:
    """Whether a node can be made again anywhere: it moves nothing."""
    if node.op == "get_attr" or isinstance(node.meta.get("val"), _SIZES):
        return True
    if not is_view(node) or isinstance(node.meta.get("val"), (tuple, list)):
        return False
    copies = node.target in (aten.reshape.default, aten.contiguous.default)
    return not copies or (is_packed(node) and is_packed(node.args[0]))  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------- the graph in stages


class _InPlace:
    """Builds the graph with in-place products."""

    def __init__(self, source: fx.Graph, chains: dict[fx.Node, list[_Sum]]) -> None:
        self.source, self.graph, self.stage = source, fx.Graph(), 0
        self.made: dict[fx.Node, fx.Node] = {}
        self.again: dict[tuple[fx.Node, int], fx.Node] = {}  # made again in a stage
        self.lies: dict[fx.Node, fx.Node] = {}  # the operand in whose memory a value lies
        self.dropped: set[fx.Node] = set(chains)
        self.sums: dict[fx.Node, tuple[_Sum, fx.Node]] = {}
        self.starts: dict[fx.Node, list[fx.Node]] = {}
        for copy, chain in chains.items():
            target: Any = copy.args[0]
            self.starts.setdefault(chain[0].kept, []).append(target)
            for each in chain:
                self.sums[each.node] = each, target
                self.dropped.update(each.path)

    def run(self) -> fx.Graph:
        """The graph."""
        for node in self.source.find_nodes(op="placeholder"):
            self.made[node] = self.graph.node_copy(node)
        for node in self.source.nodes:
            if node.op in ("placeholder", "output") or node in self.dropped or node in self.made:
                continue
            if node in self.sums:
                self._add(*self.sums[node])
            else:
                self._copy(node)
            self._start(node)
        self.graph.output(())
        return self.graph

    def _copy(self, node: fx.Node) -> None:
        self.made[node] = self._in_stage(self.graph.node_copy(node, self._value), node)
        if isinstance(node.meta.get("val"), (tuple, list)):  # its parts can cross to other stages, it cannot
            for part in node.users:
                if part.target is operator.getitem:
                    self.made[part] = self._in_stage(self.graph.node_copy(part, self._value), part)

    def _start(self, node: fx.Node) -> None:
        """Write a value where products will add to it."""
        for target in self.starts.get(node, ()):
            written = (self._memory(target, node), self._value(node))
            self._in_stage(self.graph.call_function(aten.copy_.default, written))
            self.lies.setdefault(node, target)

    def _add(self, each: _Sum, target: fx.Node) -> None:
        product = each.path[0]
        self.stage += 1
        operands = (self._memory(target, product), *map(self._value, product.args))  # type: ignore[arg-type]
        self._in_stage(self.graph.call_function(_ADDING[product.target], operands))  # type: ignore[index]
        self.stage += 1
        self.lies[each.node] = target

    def _value(self, node: fx.Node) -> fx.Node:
        """A value as a node of this stage may read it."""
        made = self.made.get(node)
        if made is not None and made.meta.get(STAGE, self.stage) == self.stage:
            return made
        key = (node, self.stage)
        if key not in self.again:
            if node in self.lies:
                self.again[key] = self._memory(self.lies[node], node)
            elif _is_free(node):
                self.again[key] = self._in_stage(self.graph.node_copy(node, self._value), node)
            else:
                return self.made[node]
        return self.again[key]

    def _memory(self, target: fx.Node, like: fx.Node) -> fx.Node:
        """An operand's memory in the shape of a value."""
        shape = list(like.meta["val"].shape)
        if list(target.meta["val"].shape) == shape:
            return self.made[target]
        shape = [-1 if isinstance(size, torch.SymInt) else size for size in shape]
        return self._in_stage(self.graph.call_function(aten.view.default, (self.made[target], shape)), like)

    def _in_stage(self, node: fx.Node, like: fx.Node | None = None) -> fx.Node:
        node.meta = {**(like.meta if like is not None else {}), STAGE: self.stage}
        return node
