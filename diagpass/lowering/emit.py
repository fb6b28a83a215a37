"""CellGraph and Schedule -> the wavefront graph: a plain ``fx.GraphModule`` to print and read.

Its inputs are those of the functional graph followed by the weight stacks. Each group is one call of a
submodule ``kind0_w3`` (kind 0, three cells), which takes the operands of its slots and returns a tuple
of stacked results; its ``meta["group"]`` is the :class:`~diagpass.ir.Group`, and the ``meta["wave"]`` of all
nodes made for a wave its number. Between the calls there is glue, and the gathering of operands: a slice
where the rows lie side by side in one stacked result (no copy), a ``cat`` of such slices elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import operator
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_unflatten

from diagpass.analysis.cells import is_operation
from diagpass.capture.aliases import NEWLY_SHARED
from diagpass.errors import BatchingError
from diagpass.ir import CellGraph, Group, Kind, Schedule
from diagpass.lowering.batch import batch_kind, device_of
from diagpass.lowering.weights import WeightPlan
from diagpass.lowering.widths import at_width, batch_any_width, holds, same_program, width_of
from diagpass.stages import say

log = logging.getLogger(__name__)
aten = torch.ops.aten

Wrap = Callable[[fx.GraphModule, str], torch.nn.Module]
WrapGroup = Callable[
    [Kind, int, tuple[bool, ...], fx.GraphModule, tuple[bool, ...], str, fx.GraphModule | None],
    torch.nn.Module,
]


def restride(value: Any, stride: Sequence[int], fresh: bool) -> Any:
    """``value`` with the given strides, in memory of its own if ``fresh``.

    What leaves the graph must look as the sequential model's: same layout, and not a row of a larger
    tensor, which a caller would keep alive as a whole.
    """
    if not isinstance(value, torch.Tensor):
        return value
    same = all(
        have == want or size == 1
        for have, want, size in zip(value.stride(), stride, value.shape, strict=True)
    )
    if same and not fresh:
        return value
    repeated = [dim for dim, step in enumerate(stride) if step == 0 and value.shape[dim] > 1]
    once = value
    for dim in repeated:  # an expanded dimension: one copy of it is all there is
        once = once.narrow(dim, 0, 1)
    made = torch.empty_strided(once.shape, tuple(stride), dtype=value.dtype, device=value.device)
    return made.copy_(once).expand(value.shape)


@dataclasses.dataclass(frozen=True)
class _Row:
    """A value that is row ``index`` of the stacked result ``stacked``, which has ``width`` rows."""

    stacked: fx.Node
    index: int
    width: int


@dataclasses.dataclass(frozen=True)
class Emitted:
    """The wavefront graph, which groups ran batched, and what kept kinds from it (by kind)."""

    module: fx.GraphModule
    batched_cells: int
    notes: tuple[str, ...]
    obstacles: dict[int, str] = dataclasses.field(default_factory=dict)


class _Emitter:
    def __init__(
        self,
        cells: CellGraph,
        weights: WeightPlan,
        wrap: Wrap,
        wrap_group: WrapGroup,
        literal_batched: bool,
        any_width: bool,
    ) -> None:
        self.cells, self.weights, self.wrap, self.wrap_group = cells, weights, wrap, wrap_group
        self.literal_batched, self.any_width = literal_batched, any_width
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.values: dict[fx.Node, fx.Node | _Row] = {}
        self.numbers: dict[tuple, fx.Node] = {}
        self.widths: dict[int, set[int]] = {}  # per kind: those of its groups
        self.forms: dict[tuple, tuple[bool, ...] | None] = {}
        self.commons: dict[tuple, tuple[fx.GraphModule, tuple[bool, ...]] | None] = {}
        self.notes: dict[str, None] = {}
        self.obstacles: dict[int, str] = {}
        self.batched_cells = 0
        self.wave = 0

    def run(self, schedule: Schedule) -> Emitted:
        source = self.cells.graph
        for node in source.graph.nodes:
            if node.op == "placeholder":
                placeholder = self.values[node] = self.graph.placeholder(node.name)
                placeholder.meta = dict(node.meta)
        self.stacks = [self.graph.placeholder(f"stack_{at}") for at in range(len(self.weights.stacks))]
        for group in (group for wave in schedule.waves for group in wave.groups):
            if len(group.cells) > 1:
                self.widths.setdefault(group.kind, set()).add(len(group.cells))
        for self.wave, wave in enumerate(schedule.waves):
            before = len(self.graph.nodes)
            for group in wave.groups:
                self._group(group)
            for node in itertools.islice(reversed(self.graph.nodes), len(self.graph.nodes) - before):
                node.meta["wave"] = self.wave
        self._output(source.graph)
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph, class_name="Wavefront")
        return Emitted(module, self.batched_cells, tuple(self.notes), self.obstacles)

    # Values of the functional graph in the emitted one.

    def _value(self, node: fx.Node) -> fx.Node:
        """The emitted node with this value, emitting glue on demand."""
        pending = [node]
        while pending:
            top = pending[-1]
            if top in self.values:
                pending.pop()
                continue
            missing = [source for source in top.all_input_nodes if source not in self.values]
            if missing:
                pending += reversed(missing)
                continue
            self.values[top] = self._glue(top)
            pending.pop()
        found = self.values[node]
        if isinstance(found, _Row):
            index = (found.stacked, 0, found.index)
            found = self.values[node] = self.graph.call_function(aten.select.int, index)
            found.meta["row"] = True
        return found

    def _glue(self, node: fx.Node) -> fx.Node:
        if node in self.cells.owner:
            raise AssertionError(f"{node} belongs to a cell that has not run yet")
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.cells.graph)
            name = str(node.target).replace(".", "_")
            if isinstance(value, torch.nn.Module) or not isinstance(value, torch.Tensor):
                setattr(self.root, name, value)
            else:
                self.root.register_buffer(name, value, persistent=False)
            return self.graph.get_attr(name)
        for source in node.all_input_nodes:
            self._value(source)
        new = self.graph.node_copy(node, self._value)
        return new

    # Groups.

    def _group(self, group: Group) -> None:
        kind = self.cells.kinds[group.kind]
        members = [kind.cells.index(cell) for cell in group.cells]
        sources = [[slot.sources[at] for at in members] for slot in kind.slots]
        # A number that differs within the kind is an operand of its batched form, also where it happens to be
        # the same in a whole group (one layer at several segments).
        shared = tuple(
            not slot.literal and all(source is items[0] for source in items)
            for slot, items in zip(kind.slots, sources, strict=True)
        )
        literal = self.literal_batched and any(slot.literal for slot in kind.slots)
        if len(members) > 1 or literal:
            stacked = self._form(kind, len(members), shared)
            if stacked is not None:
                self._batched(kind, group, members, sources, shared, stacked)
                self.batched_cells += len(members) if len(members) > 1 else 0
                return
        for place, member in enumerate(members):
            alone = Group(group.kind, (group.cells[place],))
            self._single(kind, alone, member, [items[place] for items in sources])

    def _form(self, kind: Kind, width: int, shared: tuple[bool, ...]) -> tuple[bool, ...] | None:
        """Trace the batched form once; None if the kind has none (said once in the notes)."""
        key = (kind.index, width, shared)
        if key not in self.forms:
            say(f"batch: kind{kind.index} for {width} cells")
            try:
                traced, stacked, common = self._trace(kind, width, shared)
            except BatchingError as error:
                first = self.cells.cells[kind.cells[0]]
                self.obstacles[kind.index] = str(error)
                self.notes[
                    f"kind {kind.index} ({len(kind.cells)} cells, first {first}) runs unbatched: {error}"
                ] = None
                self.forms[key] = None
            else:
                name = self._name(kind, width, shared)
                made = self.wrap_group(kind, width, shared, traced, stacked, name, common)
                self.root.add_module(name, made)
                self.forms[key] = stacked
        return self.forms[key]

    def _trace(
        self, kind: Kind, width: int, shared: tuple[bool, ...]
    ) -> tuple[fx.GraphModule, tuple[bool, ...], fx.GraphModule | None]:
        """The batched form for a width, which results are stacked, and the form for any width or None.

        The latter is made for a kind with groups of several widths, held against the form for the first of
        them, and the others follow from it.
        """
        key = (kind.index, shared)
        common = self.commons.get(key)
        symbol = width_of(common[0]) if common is not None and width > 1 else None
        if common is not None and symbol is not None and holds(symbol, width):
            return at_width(common[0], width), common[1], common[0]
        traced, stacked = batch_kind(kind, width, shared)
        if (
            width == 1
            or key in self.commons
            or len(self.widths.get(kind.index, ())) < 2
            or not self.any_width
        ):
            return traced, stacked, None
        self.commons[key] = None
        if device_of(kind).type == "cpu":
            try:
                graph, same_stacked = batch_any_width(kind, shared)
            except BatchingError as error:
                log.info("kind %d has a form for each width: %s", kind.index, error)
                return traced, stacked, None
            if same_stacked == stacked and same_program(graph, width, traced):
                self.commons[key] = graph, stacked
                return traced, stacked, graph
        return traced, stacked, None

    def _name(self, kind: Kind, width: int, shared: tuple[bool, ...]) -> str:
        same = [key for key in self.forms if key[:2] == (kind.index, width)]
        at = same.index((kind.index, width, shared)) if (kind.index, width, shared) in same else len(same)
        return f"kind{kind.index}_w{width}" + (f"_v{at}" if at else "")

    def _batched(
        self,
        kind: Kind,
        group: Group,
        members: list[int],
        sources: list[list[Any]],
        shared: tuple[bool, ...],
        stacked: tuple[bool, ...],
    ) -> None:
        operands = []
        for at, (slot, items, same) in enumerate(zip(kind.slots, sources, shared, strict=True)):
            if slot.literal:
                operands.append(items[0] if same else self._number(kind, items))
            elif same:
                operands.append(self._value(items[0]))
            else:
                operands.append(self._gather(kind, at, group.cells, items))
        width = len(members)
        call = self._call(self._name(kind, width, shared), group, operands, len(kind.outputs))
        for result, is_stacked, nodes in zip(call, stacked, kind.outputs, strict=True):
            for row, member in enumerate(members):
                node = nodes[member]
                if node is not None:
                    self.values[node] = _Row(result, row, width) if is_stacked else result

    def _single(self, kind: Kind, group: Group, member: int, sources: list[Any]) -> None:
        name = f"kind{kind.index}"
        if not hasattr(self.root, name):
            self.root.add_module(name, self.wrap(kind.body, name))
        operands = [
            source if slot.literal else self._value(source)
            for slot, source in zip(kind.slots, sources, strict=True)
        ]
        results = self._call(name, group, operands, len(kind.outputs))
        for result, nodes in zip(results, kind.outputs, strict=True):
            node = nodes[member]
            if node is not None:
                self.values[node] = result

    def _call(self, name: str, group: Group, operands: list[Any], results: int) -> list[fx.Node]:
        call = self.graph.create_node(
            "call_module", name, tuple(operands), {}, name=f"wave{self.wave}_{name}"
        )
        call.meta["group"] = group
        return [self.graph.call_function(operator.getitem, (call, at)) for at in range(results)]

    def _gather(self, kind: Kind, slot: int, cells: Sequence[int], sources: list[fx.Node]) -> fx.Node:
        """One operand for a group: rows of a weight stack, or of results, or values stacked here."""
        rows = self.weights.rows(kind, slot, cells)
        if rows is not None:
            stack = self.stacks[self.weights.serving[kind.index, slot]]
            width = len(self.weights.stacks[self.weights.serving[kind.index, slot]].rows)
            return self._slice(stack, rows, width)
        pieces: list[fx.Node | _Row] = []
        for source in sources:
            if source not in self.values:
                self._value(source)
            pieces.append(self.values[source])
        return self._concatenate(
            [piece if isinstance(piece, _Row) else self._unsqueezed(piece) for piece in pieces]
        )

    def _slice(self, stack: fx.Node, rows: list[int], width: int) -> fx.Node:
        """Evenly spaced rows of a weight stack: a view."""
        if rows == list(range(width)):
            return stack
        step = rows[1] - rows[0] if len(rows) > 1 else 1
        args = (stack, 0, rows[0], rows[-1] + 1, step)
        return self.graph.call_function(aten.slice.Tensor, args if step > 1 else args[:4])

    def _unsqueezed(self, value: fx.Node) -> _Row:
        return _Row(self.graph.call_function(aten.unsqueeze.default, (value, 0)), 0, 1)

    def _concatenate(self, rows: list[_Row]) -> fx.Node:
        parts: list[fx.Node] = []
        start = 0
        for at in range(1, len(rows) + 1):
            if (
                at < len(rows)
                and rows[at].stacked is rows[start].stacked
                and rows[at].index == rows[at - 1].index + 1
            ):
                continue
            first, stop = rows[start], rows[at - 1].index + 1
            if (first.index, stop) == (0, first.width):
                parts.append(first.stacked)
            else:
                args = (first.stacked, 0, first.index, stop)
                parts.append(self.graph.call_function(aten.slice.Tensor, args))
            start = at
        if len(parts) == 1:
            if parts[0].target is aten.unsqueeze.default:  # one cell: the operand must be contiguous
                kwargs: dict[str, Any] = {"memory_format": torch.contiguous_format}
                return self.graph.call_function(aten.clone.default, (parts[0],), kwargs)
            return parts[0]
        return self.graph.call_function(aten.cat.default, (parts, 0))

    def _number(self, kind: Kind, items: list[Any]) -> fx.Node:
        """A constant tensor of the numbers that differ from cell to cell."""
        device = device_of(kind)
        key = (type(items[0]), device, *items)
        if key not in self.numbers:
            name = f"numbers_{len(self.numbers)}"
            dtype = torch.float64 if isinstance(items[0], float) else torch.int64
            with unset_fake_temporarily():
                numbers = torch.tensor(items, dtype=dtype, device=device)
                self.root.register_buffer(name, numbers, persistent=False)
            self.numbers[key] = self.graph.get_attr(name)
        return self.numbers[key]

    def _output(self, source: fx.Graph) -> None:
        (result,) = source.find_nodes(op="output")[0].args
        leaves, spec = tree_flatten(result)
        for leaf in leaves:
            if isinstance(leaf, fx.Node):
                self._value(leaf)
        shared = self.cells.graph.meta.get(NEWLY_SHARED, frozenset())
        places = {leaf: at for at, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)}
        left: dict[fx.Node, Any] = {}

        def leave(at: int, node: Any) -> Any:
            if not isinstance(node, fx.Node):
                return node
            if node not in left:
                left[node] = leave_one(at, node)
            return left[node]

        def leave_one(at: int, node: fx.Node) -> Any:
            base, views = _views_of(node, places)
            if base is not None:  # a view of what leaves, too, stays one
                value = leave(places[base], base)
                for view in views:
                    value = self.graph.node_copy(view, lambda _, source=value: source)
                return value
            value, example = self._value(node), node.meta.get("val")
            if not isinstance(example, torch.Tensor):
                return value
            stride = [int(step) for step in example.stride()]
            if at in shared:
                return self.graph.call_function(restride, (value, stride, True))
            if not is_operation(node):
                return value
            return self.graph.call_function(restride, (value, stride, bool(value.meta.get("row"))))

        self.graph.output(tree_unflatten([leave(at, leaf) for at, leaf in enumerate(leaves)], spec))


def _views_of(node: fx.Node, others: Container[fx.Node]) -> tuple[fx.Node | None, list[fx.Node]]:
    """The nearest of some computed values that a value is a view of, and the operations that make it."""
    views: list[fx.Node] = []
    while is_operation(node) and len(node.all_input_nodes) == 1:
        (source,) = node.all_input_nodes
        value, base = node.meta.get("val"), source.meta.get("val")
        if not (isinstance(value, torch.Tensor) and isinstance(base, torch.Tensor)):
            break
        if value.untyped_storage()._cdata != base.untyped_storage()._cdata:
            break
        views.insert(0, node)
        if source in others and is_operation(source):
            return source, views
        node = source
    return None, []


def emit(
    cells: CellGraph,
    schedule: Schedule,
    weights: WeightPlan,
    wrap: Wrap,
    wrap_group: WrapGroup,
    numbers_as_tensors: bool = False,
    any_width: bool = False,
) -> Emitted:
    """Build the wavefront graph.

    Parameters
    ----------
    cells, schedule, weights
        What runs, in which order, and where weights come from.
    wrap
        Makes the submodule that runs one cell (compiled or not) from its kind's graph and its name.
    wrap_group
        Makes the submodule that runs a group from its kind, width, which operands are shared, the batched
        graph, which of its results are stacked, its name, and the graph for any width (or None).
    numbers_as_tensors
        Whether numbers that differ by layer are tensors in single cells too (one compilation then
        serves all layers).
    any_width
        Whether kinds on the CPU that have groups of several widths get a graph for any width: compiled, it is
        as fast there as those for one width, each of which takes many seconds to compile.
    """
    emitted = _Emitter(cells, weights, wrap, wrap_group, numbers_as_tensors, any_width).run(schedule)
    log.debug("emitted %d nodes, %d cells batched", len(emitted.module.graph.nodes), emitted.batched_cells)
    return emitted
