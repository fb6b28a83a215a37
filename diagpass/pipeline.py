"""The stages in order: the only file that knows all of them.

    Dynamo's graph -> functional graph -> aliases forwarded -> cells, kinds, dependencies -> waves
    -> batched kinds and weight stacks -> emitted wavefront graph -> compiled program

``analyse`` goes as far as the waves, ``lower`` to the program. Reasons not to go on are data: a
``Refusal`` that the faces turn into a warning or an error.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from diagpass.analysis.cellgraph import find_cells
from diagpass.analysis.memory import width_within
from diagpass.analysis.schedule import find_chain, schedule
from diagpass.capture import functional
from diagpass.capture.aliases import forward_aliases
from diagpass.capture.marks import module_of, source_line
from diagpass.capture.masks import drop_causal_masks
from diagpass.describe.cost import stack_bytes
from diagpass.describe.predict import obstacles
from diagpass.errors import ChainError, DiagpassError, SequentialError
from diagpass.ir import CellGraph, Edge, Schedule
from diagpass.logs import artifact
from diagpass.lowering.emit import Emitted, emit
from diagpass.lowering.weights import WeightPlan, plan_weights, split_groups
from diagpass.options import Options
from diagpass.runtime.clock import current
from diagpass.runtime.compiled import InductorKind
from diagpass.runtime.forms import Forms, Traced, compile_ahead, number_in_turn
from diagpass.runtime.graphed import graphed
from diagpass.runtime.stacks import ALIGNMENT, WeightStacks
from diagpass.runtime.timed import TimedWaves
from diagpass.stages import stage

log = logging.getLogger(__name__)
aten = torch.ops.aten

LEAST_MEAN_WIDTH = 1.25  # below this many cells a wave there is nothing to gain


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a model runs sequentially: the sentence, and the error class that strict mode raises."""

    reason: str
    error: type[DiagpassError] = SequentialError
    legal: bool = False  # a wavefront would be right, only not wider
    module: str | None = None  # where it is, as far as known
    line: str | None = None

    @property
    def note(self) -> str:
        """What to say where the cells run all the same, compiled and recorded."""
        return f"the cells run one after the other, compiled: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What a run batches and holds, known without running: cells, reasons by kind, bytes of weight stacks."""

    batched_cells: int
    obstacles: Mapping[int, str]
    stacked_bytes: int
    copied_bytes: int
    weights: frozenset[fx.Node]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What the dataflow permits. ``cells`` is None where no cells were found."""

    cells: CellGraph | None
    schedule: Schedule
    chain: Edge | None
    refusal: Refusal | None
    notes: tuple[str, ...] = ()
    emitted: Emitted | None = None
    names: Mapping[fx.Node, str] = dataclasses.field(default_factory=dict)
    forecast: Forecast | None = None
    repro: str | Callable[[], str] | None = None
    forms: Forms | None = None

    @property
    def verdict(self) -> str:
        """``"wavefront"`` or ``"sequential"``."""
        return "sequential" if self.refusal is not None else "wavefront"

    @property
    def may_be_forced(self) -> bool:
        """Whether a wavefront is legal, though it may be no wider than one cell."""
        return self.cells is not None and (self.refusal is None or self.refusal.legal)


def records(options: Options, device_types: Collection[str]) -> bool:
    """Whether what computes there is compiled and recorded, so that it pays without width, too."""
    return options.compiler == "inductor" and set(device_types) == {"cuda"}


class RunSequentially(Exception):
    """Leaves AOTAutograd from inside: the captured graph is to be run as it stands."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__(analysis.refusal.reason if analysis.refusal else "")
        self.analysis = analysis


def analyse(gm: fx.GraphModule, options: Options) -> Analysis:
    """Functional graph -> cells, dependencies and waves, and whether they leave any width."""
    artifact("diagpass_before", lambda: gm.print_readable(print_output=False))
    prepare(gm)
    cells, refusal = cut_into_cells(gm, options)
    if cells is None:
        return Analysis(None, Schedule(()), None, refusal)
    width = width_within(cells.kinds, options.max_width, options.memory_limit)
    waves = schedule(cells, width)
    free = waves if width is None else schedule(cells)
    log.debug(
        "%d operations: %d cells of %d kinds, %d dependencies, %d waves",
        len(gm.graph.nodes),
        len(cells.cells),
        len(cells.kinds),
        cells.dag.number_of_edges(),
        len(waves.waves),
    )
    chain = find_chain(cells)
    if refusal is None and free.mean_width < LEAST_MEAN_WIDTH:
        refusal = _narrow(cells, free, chain)
    return Analysis(cells, waves, chain, refusal, cells.notes)


def prepare(gm: fx.GraphModule) -> None:
    """Bring a functional graph into the form that cells are found in, in place."""
    _drop_assertions(gm)
    with stage("drop causal masks"):
        drop_causal_masks(gm)
    with stage("forward aliases"):
        forward_aliases(gm)
    _views_to_reshapes(gm)
    _pack_operands(gm)


def cut_into_cells(
    gm: fx.GraphModule, options: Options, one_segment: bool = False
) -> tuple[CellGraph | None, Refusal | None]:
    """Find the cells, and whatever forbids to reorder them; width is another question.

    Parameters
    ----------
    gm
        A functional graph that went through :func:`prepare`.
    options
        The user's choices; ``cells`` matters here.
    one_segment
        Whether the graph is one segment of many, so that its width lies across segments.
    """
    random = [node for node in gm.graph.nodes if functional.is_random(node)]
    with stage("find cells"):
        cells = find_cells(gm, options.cells, one_segment)
    if cells is None:
        reason = (
            "no repeated module was found, so there are no cells to batch: make the layers modules of one "
            "class in a ModuleList, or name them by options={'cells': ...}"
        )
        if options.cells is not None:
            reason = f"no module path matches cells={list(options.cells)}"
        return None, Refusal(reason)
    if random:
        names = sorted({f"{node.target} in {module_of(node)}" for node in random})
        return cells, Refusal(
            f"random numbers are drawn in program order by {', '.join(names)}, and reordering the cells "
            "would change them (call model.eval(), or set dropout to 0)",
            module=module_of(random[0]),
            line=source_line(random[0]),
        )
    return cells, _absolute_strides(cells)


def _narrow(cells: CellGraph, waves: Schedule, chain: Edge | None) -> Refusal:
    if chain is not None:
        line = next(filter(None, map(source_line, reversed(chain.source.nodes))), None)
        where = f" ({line})" if line else ""
        return Refusal(
            f"a chain leaves no width: {chain}{where}, so {len(cells.cells)} cells need "
            f"{len(waves.waves)} waves",
            ChainError,
            legal=True,
            module=chain.source.path,
            line=line,
        )
    segments = {cell.segment for cell in cells.cells}
    layers = {cell.layer for cell in cells.cells}
    if len(segments) == 1:
        return Refusal("the input has one segment, so no cell can run beside another", legal=True)
    if len(layers) == 1:
        return Refusal("the model has one repeated layer, so no cell can run beside another", legal=True)
    return Refusal(
        f"the dependencies leave no width: {len(cells.cells)} cells need {len(waves.waves)} waves",
        legal=True,
    )


def lower(
    gm: fx.GraphModule,
    analysis: Analysis,
    weights: Sequence[bool],
    options: Options,
    inference: bool = False,
) -> tuple[Callable[..., Any], Analysis]:
    """Waves -> the program.

    Parameters
    ----------
    gm
        The functional graph that was analysed.
    analysis
        Its analysis.
    weights
        Per input of the graph, whether it is a weight (the same tensor at every call).
    options
        The user's choices.
    inference
        Whether no backward pass follows, so that a call may be replayed as one CUDA graph: what is saved for
        one would be copied.

    Returns
    -------
    tuple
        The program, taking the graph's inputs and returning its outputs, and the analysis completed by
        what was emitted.
    """
    if analysis.cells is None:
        raise RunSequentially(analysis)
    plan, waves = _plan(gm, analysis.cells, analysis.schedule, weights)
    compiled = options.compiler == "inductor"
    forms = Forms(options)
    with stage("batch kinds and emit"):
        emitted = emit(
            analysis.cells,
            waves,
            plan,
            wrap=InductorKind if compiled else lambda graph, name: graph,
            wrap_group=lambda kind, width, shared, graph, stacked, name, common: forms.group(
                kind, kind.index, width, shared, Traced(graph, stacked), name, common=common
            ),
            numbers_as_tensors=compiled,
            any_width=compiled,
        )
    number_in_turn(emitted.module.children())
    artifact("diagpass_after", lambda: emitted.module.print_readable(print_output=False))
    stacks = WeightStacks(
        [stack.rows for stack in plan.stacks],
        [stack.owns for stack in plan.stacks],
        share=options.weights == "share",
    )

    found = analysis.cells
    run = emitted.module
    if inference and compiled:
        run = graphed(emitted.module, gm, [*weights, *(True for _ in plan.stacks)])

    begun = not compiled

    def program(*args: Any) -> Any:
        nonlocal begun
        inputs = (*args, *stacks(args))
        if not begun:
            begun = True
            compile_ahead(emitted.module, inputs)
        clock = current()
        if clock is None:
            return run(*inputs)
        return TimedWaves(emitted.module, found.cells, clock).run(*inputs)

    notes = (*analysis.notes, *emitted.notes)
    unbatched = emitted.obstacles
    forecast = _forecast(gm, plan, emitted.batched_cells, unbatched, options)
    return program, dataclasses.replace(
        analysis, schedule=waves, notes=notes, emitted=emitted, forecast=forecast, forms=forms
    )


def predict(gm: fx.GraphModule, analysis: Analysis, weights: Sequence[bool], options: Options) -> Analysis:
    """Complete an analysis by what :func:`lower` would batch and hold; one trace a kind, nothing compiled."""
    found = analysis.cells
    if found is None:
        return analysis
    plan, waves = _plan(gm, found, analysis.schedule, weights)
    with stage("predict what is batched"):
        reasons = obstacles(found.kinds) if analysis.refusal is None else {}
    batched = sum(
        len(group.cells)
        for wave in waves.waves
        for group in wave.groups
        if len(group.cells) > 1 and group.kind not in reasons and analysis.refusal is None
    )
    return dataclasses.replace(analysis, forecast=_forecast(gm, plan, batched, reasons, options))


def _plan(
    gm: fx.GraphModule, found: CellGraph, waves: Schedule, weights: Sequence[bool]
) -> tuple[WeightPlan, Schedule]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    numbers = {node: at for at, node in enumerate(placeholders) if weights[at]}
    plan = plan_weights(found.kinds, lambda at: found.cells[at].layer, numbers)
    return plan, split_groups(found, waves, plan)


def _forecast(
    gm: fx.GraphModule, plan: WeightPlan, batched: int, reasons: Mapping[int, str], options: Options
) -> Forecast:
    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    stacks = [stack_bytes((values[row] for row in stack.rows), ALIGNMENT) for stack in plan.stacks]
    shared = [options.weights == "share" and stack.owns for stack in plan.stacks]
    copied = sum(size for size, is_shared in zip(stacks, shared, strict=True) if not is_shared)
    return Forecast(batched, dict(reasons), sum(stacks), copied, frozenset(plan.numbers))


def _drop_assertions(gm: fx.GraphModule) -> None:
    """Checks of static types hold by construction and would pin nodes in place."""
    for node in list(gm.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            gm.graph.erase_node(node)


def _pack_operands(gm: fx.GraphModule) -> None:
    """Copy into contiguous memory what a kernel reads as if it were so (torch 2.11 to 2.13).

    In the model it is contiguous. In a group's results the layouts are others.
    """
    clone = aten.clone.default
    for node in gm.graph.find_nodes(op="call_function", target=aten.mkldnn_rnn_layer.default):
        for at in _READ_AS_CONTIGUOUS:
            source = node.args[at]
            if not isinstance(source, fx.Node) or source.target is clone:
                continue
            with gm.graph.inserting_before(node):
                packed = gm.graph.call_function(clone, (source,), {"memory_format": torch.contiguous_format})
            packed.meta = {**node.meta, "val": source.meta.get("val")}
            node.update_arg(at, packed)
    gm.recompile()


_READ_AS_CONTIGUOUS = (0, 5, 6)  # input, hidden state and cell state of an LSTM layer


def _views_to_reshapes(gm: fx.GraphModule) -> None:
    """A row of a stacked result may be laid out otherwise than the value it stands for."""
    for node in gm.graph.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    gm.recompile()


def _absolute_strides(cells: CellGraph) -> Refusal | None:
    """A refusal if memory that a cell computed is read by absolute strides; batching moves it."""
    for node in cells.graph.graph.nodes:
        if node.target is aten.as_strided.default and node.args[0] in cells.owner:
            line = source_line(node)
            return Refusal(
                f"as_strided in {module_of(node)}{f' ({line})' if line else ''} reads memory by absolute "
                "strides, which batching would move",
                module=module_of(node),
                line=line,
            )
    return None
