"""A captured step -> cells, glue in lumps, and what each of them reads.

A *lump* is the glue of one segment that waits for the same cells and the same inputs: the embedding, the
mask, the head. It runs as one graph, when somebody reads one of its results. A *read* is a piece of an input
(``state[l]``), kept apart so that it waits for that piece alone.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import networkx as nx
import torch
import torch.fx as fx

from diagpass.analysis.cells import propose
from diagpass.analysis.kinds import value_type
from diagpass.capture.aliases import aggregate, as_range, restack_outputs
from diagpass.errors import DiagpassError
from diagpass.ir import Cell
from diagpass.options import Options
from diagpass.pipeline import Refusal, cut_into_cells, prepare
from diagpass.rolled.capture import StepGraph
from diagpass.runtime.layouts import have_common

__all__ = ["Lump", "Output", "StepCell", "StepProgram", "make_program"]

SEGMENT = "L['args'][0]"  # how Dynamo names what belongs to the segment among the inputs of a step


class Refused(DiagpassError):
    """The step cannot run as a wavefront; carries the :class:`~diagpass.pipeline.Refusal`."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason)
        self.refusal = refusal


@dataclasses.dataclass(frozen=True)
class Lump:
    """Glue that runs as one graph: ``module(*inputs)`` returns ``outputs``.

    ``key`` is the same for lumps that compute the same from the same inputs.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    key: tuple


@dataclasses.dataclass(frozen=True)
class StepCell:
    """A cell and what it reads from and leaves to its surroundings; weights are not among ``reads``."""

    cell: Cell
    reads: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class Output:
    """Something that leaves the step.

    ``node`` is a node or a plain value. ``passed`` is the input that it is, if it is one; ``group`` is shared
    by outputs (and inputs) in the same memory; ``stride`` is the sequential run's layout.
    """

    node: Any
    passed: int | None
    group: int | None


@dataclasses.dataclass(eq=False)
class StepProgram:
    """One behaviour of the step, ready to be recorded segment by segment.

    Attributes
    ----------
    step
        What was captured.
    placeholders
        The inputs' nodes.
    cells
        In an order in which each reads only what stands before it.
    units
        Lumps and cells in such an order.
    updates
        Per written input, the node of its new value.
    returned
        Per returned value, where it comes from.
    constants
        Tensors that the graph itself holds.
    first_cell
        Number of the program's first cell among the cells of all programs.
    successions
        What is known of segments that follow one of the same behaviour, by the circumstances
        (:mod:`diagpass.rolled.repeat`).
    """

    step: StepGraph
    placeholders: tuple[fx.Node, ...]
    cells: tuple[StepCell, ...]
    units: tuple[Lump | StepCell, ...]
    reads: tuple[tuple[fx.Node, fx.Node, int, int, int, bool], ...]
    updates: tuple[fx.Node, ...]
    returned: tuple[Output, ...]
    constants: dict[fx.Node, torch.Tensor]
    first_cell: int = 0
    successions: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def moving(self) -> tuple[int, ...]:
        """Positions of the inputs that are not weights."""
        return tuple(at for at, is_weight in enumerate(self.step.weights) if not is_weight)

    def weights(self, args: Sequence[Any]) -> Sequence[Any]:
        """The inputs that are weights."""
        return self._pick_weights(args)

    @functools.cached_property
    def _pick_weights(self) -> Callable[[Sequence[Any]], Sequence[Any]]:
        places = [at for at, is_weight in enumerate(self.step.weights) if is_weight]
        if len(places) < 2:  # of one an itemgetter makes no tuple
            return lambda args: [args[at] for at in places]
        return operator.itemgetter(*places)

    @functools.cached_property
    def overlapping(self) -> list[tuple[int, int]]:
        """Pairs of returned values, both computed, that have elements in common."""
        members: dict[int, list[int]] = {}
        for at, out in enumerate(self.returned):
            if out.group is not None and out.passed is None and isinstance(out.node, fx.Node):
                members.setdefault(out.group, []).append(at)
        return [
            (a, b)
            for places in members.values()
            for a, b in itertools.combinations(places, 2)
            if have_common(self.returned[a].node.meta["val"], self.returned[b].node.meta["val"])
        ]

    @functools.cached_property
    def idle(self) -> frozenset[int]:
        """Positions of inputs that are numbers and that no tensor depends on: pure counters."""
        return frozenset(at for at in self.moving if _only_counts(self.placeholders[at]))


def _only_counts(node: fx.Node) -> bool:
    return is_number(node) and all(user.op == "output" or _only_counts(user) for user in node.users)


def make_program(step: StepGraph, options: Options) -> StepProgram:
    """Cut a captured step into cells and lumps.

    Raises
    ------
    Refused
        There are no cells, or they must not be reordered.
    """
    gm = step.graph
    placeholders = tuple(gm.graph.find_nodes(op="placeholder"))
    for node, name in zip(placeholders, step.names, strict=True):
        node.meta["segment_input"] = name.startswith(SEGMENT)
    prepare(gm)
    proposal = next(propose(gm.graph, options.cells), {})
    restack_outputs(gm, functools.partial(_layer_behind, {node: proposal[node].path for node in proposal}))
    found, refusal = cut_into_cells(gm, options, one_segment=True)
    if found is None or refusal is not None:
        raise Refused(refusal or Refusal("no cells"))
    owner = dict(found.owner)
    weights = {node for node, is_weight in zip(placeholders, step.weights, strict=True) if is_weight}
    (results,) = gm.graph.find_nodes(op="output")[0].args
    reads = _reads(gm.graph, owner, weights)
    is_read = {read[0] for read in reads}
    needed = _needed(gm.graph, owner, results, {read[0]: read[1] for read in reads})
    glue = [
        node
        for node in gm.graph.nodes
        if node in needed and node not in owner and node not in is_read and _is_glue(node)
    ]
    apart = {read[0] for read in reads if not read[1].meta["segment_input"]}
    lumps = _lumps(gm, glue, owner, weights, apart)
    cells = tuple(_step_cell(cell, owner, weights) for cell in found.cells)
    count = len(step.written)
    return StepProgram(
        step=step,
        placeholders=placeholders,
        cells=cells,
        units=_order(cells, lumps),
        reads=tuple(read for read in reads if read[0] in needed),
        updates=tuple(results[:count]),
        returned=tuple(
            Output(node, passed, group)
            for node, passed, group in zip(results[count:], step.passed, step.groups, strict=True)
        ),
        constants={
            node: operator.attrgetter(str(node.target))(gm)
            for node in gm.graph.nodes
            if node.op == "get_attr" and node in needed
        },
    )


def _layer_behind(layers: dict[fx.Node, str], node: fx.Node) -> str | None:
    """The one layer that a node belongs to or, through glue, is computed from; None if none or several."""
    found: set[str] = set()
    pending, seen = [node], set()
    while pending:
        top = pending.pop()
        if top in layers:
            found.add(layers[top])
        elif top not in seen:
            seen.add(top)
            pending += top.all_input_nodes
    return found.pop() if len(found) == 1 else None


def is_number(node: Any) -> bool:
    """Whether the node stands for a Python number."""
    return isinstance(node, fx.Node) and isinstance(
        node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def _is_glue(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is not aggregate and not is_number(node)


def _reads(
    graph: fx.Graph, owner: dict[fx.Node, int], weights: set[fx.Node]
) -> list[tuple[fx.Node, fx.Node, int, int, int, bool]]:
    """Glue that reads a piece of an input: (node, input, dim, start, stop, whether dim is dropped)."""
    found = []
    for node in graph.nodes:
        if node in owner or node.op != "call_function":
            continue
        read = as_range(node)
        if read is not None and read[0].op == "placeholder" and read[0] not in weights:
            found.append((node, *read))
    return found


def _needed(
    graph: fx.Graph, owner: dict[fx.Node, int], results: Sequence[Any], reads: dict[fx.Node, fx.Node]
) -> set[fx.Node]:
    """Nodes that a cell or a result reads, directly or through glue."""
    needed = {result for result in results if isinstance(result, fx.Node)}
    for node in reversed(graph.nodes):
        if node in owner or node in needed:
            needed.update([reads[node]] if node in reads else node.all_input_nodes)
            needed.add(node)
    return needed


def _lumps(
    gm: fx.GraphModule,
    glue: list[fx.Node],
    owner: dict[fx.Node, int],
    weights: set[fx.Node],
    apart: set[fx.Node],
) -> list[Lump]:
    """Glue by what it waits for; nodes of ``apart``, pieces of state, are each waited for alone."""
    waits: dict[fx.Node, frozenset] = {}
    for node in gm.graph.nodes:
        if node in owner:
            waits[node] = frozenset((owner[node],))
        elif node.op == "placeholder":
            waits[node] = frozenset() if node in weights else frozenset((node,))
        elif node in apart:
            waits[node] = frozenset((node,))
        else:
            inside = [waits[source] for source in node.all_input_nodes]
            waits[node] = frozenset().union(*inside) if inside else frozenset()
    members: dict[frozenset, list[fx.Node]] = {}
    for node in glue:
        members.setdefault(waits[node], []).append(node)
    return [_lump(gm, nodes) for nodes in members.values()]


def _lump(gm: fx.GraphModule, nodes: list[fx.Node]) -> Lump:
    inside = set(nodes)
    inputs = tuple(
        dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    )
    outputs = tuple(node for node in nodes if any(user not in inside for user in node.users))
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for at, source in enumerate(inputs):
        made[source] = graph.placeholder(f"input_{at}")
        made[source].meta = {"val": source.meta.get("val")}
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in outputs))
    module = fx.GraphModule(gm, graph, class_name="Glue")
    types = tuple(value_type(source.meta.get("val")) for source in inputs)
    return Lump(module, inputs, outputs, (module.code, types))


def _step_cell(cell: Cell, owner: dict[fx.Node, int], weights: set[fx.Node]) -> StepCell:
    inside = set(cell.nodes)
    reads = dict.fromkeys(
        source
        for node in cell.nodes
        for source in node.all_input_nodes
        if source not in inside and source not in weights
    )
    outputs = tuple(node for node in cell.nodes if any(user not in inside for user in node.users))
    return StepCell(cell, tuple(reads), outputs)


def _order(cells: Sequence[StepCell], lumps: Sequence[Lump]) -> tuple[Lump | StepCell, ...]:
    """Lumps and cells so that each stands behind what it reads."""
    units: list[Lump | StepCell] = [*lumps, *cells]
    maker = {node: at for at, unit in enumerate(units) for node in unit.outputs}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(units)))
    for at, unit in enumerate(units):
        sources = unit.inputs if isinstance(unit, Lump) else unit.reads
        pending = list(sources)
        while pending:  # reads and numbers stand between
            source = pending.pop()
            if source in maker:
                if maker[source] != at:
                    graph.add_edge(maker[source], at)
            elif source.op == "call_function":
                pending += source.all_input_nodes
    return tuple(units[at] for at in nx.lexicographical_topological_sort(graph))
