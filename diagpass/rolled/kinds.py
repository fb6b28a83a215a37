"""The cells of all captured programs -> kinds, their batched forms and the weight stacks.

Cells of the first segment, of later ones and of a shorter tail come from different graphs; where their code
is the same they are of one kind and run in one group. A batched form is made once for a kind, a width and
the operands that its cells share, and kept while programs are added.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.fx as fx

from diagpass.analysis.kinds import find_kinds, signature
from diagpass.analysis.memory import width_within
from diagpass.capture import stances
from diagpass.errors import BatchingError
from diagpass.ir import Cell, Kind
from diagpass.lowering.batch import batch_kind, device_of
from diagpass.lowering.inplace import results_of
from diagpass.lowering.weights import WeightPlan, even_runs, plan_weights
from diagpass.lowering.widths import batch_any_width, holds, same_program, width_of
from diagpass.options import Options
from diagpass.rolled.program import StepProgram
from diagpass.rolled.values import Box
from diagpass.runtime.compiled import InductorKind
from diagpass.runtime.forms import Forms, Traced
from diagpass.runtime.stacks import Places, WeightStacks, addresses, places
from diagpass.stages import say

log = logging.getLogger(__name__)

Form = tuple[Callable[..., Any], tuple[bool, ...]]
Fixed = tuple[torch.Tensor, bool]


@dataclasses.dataclass(frozen=True)
class Into:
    """What runs a group and leaves its results in memory that it is given.

    Attributes
    ----------
    number
        Tells it from every other.
    run
        Takes the operands, then a tensor for each result.
    results
        Shape, data type and device of each result, with a leading group axis.
    """

    number: int
    run: Callable[..., Any]
    results: tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """What a group of cells reads.

    Attributes
    ----------
    fixed
        Per slot what is the same at every call, and whether the group's cells share it; None for values.
    moving
        The slots of values, each with the nodes that the cells read.
    key
        Where the fixed operands lie.
    """

    fixed: list[Fixed | None]
    moving: list[tuple[int, list[fx.Node]]]
    key: tuple


@dataclasses.dataclass(frozen=True)
class Standing:
    """Cells, stacks and where weights lie: a wave's addresses follow from these and from the call."""

    cells: list[Cell]
    count: int
    stacked: list[torch.Tensor]
    places: Places

    def is_same(self, other: Standing) -> bool:
        """Whether nothing has moved in between."""
        return (
            self.cells is other.cells
            and self.count == other.count
            and self.stacked is other.stacked
            and self.places == other.places
        )


class Kinds:
    """What the programs of one step have in common.

    Attributes
    ----------
    cells
        The cells of all programs; a cell's number is its place here.
    kinds
        The kinds over them.
    device
        Where they run; the CPU if on several devices.
    compiled_for
        For which programs and waves graphs were compiled ahead.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.cells: list[Cell] = []
        self.kinds: tuple[Kind, ...] = ()
        self.device = torch.device("cpu")
        self.notes: dict[str, None] = {}
        self.compiled_for: set[Hashable] = set()
        self._place: list[tuple[Kind, int]] = []
        self._keys: dict[int, int] = {}
        self._key_numbers: dict[tuple, int] = {}
        self._traced: dict[tuple, Traced | None] = {}
        self._runs: dict[tuple, Callable[..., Any]] = {}
        self._of_usual_width: set[int] = set()
        self._whole: set[tuple[int, int]] = set()
        self._forms: dict[tuple, Form | None] = {}
        self._made = Forms(options)
        self._into: dict[tuple, Into | None] = {}
        self._groups: dict[tuple[int, ...], list[tuple[Kind, list[int], list[int]]]] = {}
        self._plans: dict[tuple, GroupPlan] = {}
        self.runner: Any = None
        self._wrapped: dict[Any, Callable[..., Any]] = {}
        self._numbers: dict[fx.Node, int] = {}
        self._objects: list[torch.Tensor] = []
        self._by_id: dict[int, int] = {}
        self._boxes: dict[int, Box] = {}
        self._fixed_boxes: set[int] = set()
        self._weights_of: dict[StepProgram, list[torch.Tensor]] = {}
        self._plan: WeightPlan | None = None
        self._rows: list[tuple[int, ...]] = []
        self._stacks: WeightStacks | None = None
        self._stacked: list[torch.Tensor] = []
        self._constants: dict[tuple, torch.Tensor] = {}
        self._width: int | None = None
        self._slices: dict[tuple, Fixed] = {}
        self._places: Places = ()

    @property
    def compiles_ahead(self) -> bool:
        """Whether graphs are compiled before they are called: where Inductor compiles for the CPU."""
        return self.options.compiler == "inductor" and self.device.type == "cpu"

    # Programs and their weights.

    def use(self, program: StepProgram, weights: Sequence[torch.Tensor]) -> bool:
        """Take a program's cells in, unless they are, and see that its weights are the ones we know.

        Parameters
        ----------
        program
            What is about to run.
        weights
            The tensors behind its weights, in the order of its placeholders.

        Returns
        -------
        bool
            Whether other weights were met than before; all other programs are out then.
        """
        known = self._weights_of.get(program)
        if known is not None and all(a is b for a, b in zip(known, weights, strict=True)):
            return False
        if known is not None:
            self.cells, self._weights_of = [], {}
            self._numbers, self._objects, self._by_id, self._boxes = {}, [], {}, {}
            self._fixed_boxes = set()
            self.compiled_for = set()
        self._weights_of[program] = list(weights)
        placeholders = (
            node
            for node, is_weight in zip(program.placeholders, program.step.weights, strict=True)
            if is_weight
        )
        for node, value in zip(placeholders, weights, strict=True):
            number = self._by_id.setdefault(id(value), len(self._objects))
            if number == len(self._objects):
                self._objects.append(value)
            self._numbers[node] = number
        program.first_cell = len(self.cells)
        for step_cell in program.cells:
            cell = step_cell.cell
            self.cells.append(Cell(len(self.cells), cell.path, cell.layer, 0, cell.nodes))
        self.kinds = find_kinds(self.cells)
        self._width = None
        self._place = [(self.kinds[0], 0)] * len(self.cells)
        for kind in self.kinds:
            for member, number in enumerate(kind.cells):
                self._place[number] = (kind, member)
            first = self.cells[kind.cells[0]]
            literals = tuple(slot.literal for slot in kind.slots)
            key = (signature(first), kind.body.code, literals)
            self._keys[kind.index] = self._key_numbers.setdefault(key, len(self._key_numbers))
        self._plan = None
        self._groups, self._plans = {}, {}
        devices = {device_of(kind) for kind in self.kinds}
        self.device = devices.pop() if len(devices) == 1 else torch.device("cpu")
        return known is not None

    def are_known(self, program: StepProgram, args: Sequence[Any]) -> bool:
        """Whether a program's weights among these inputs are those that we know."""
        known = self._weights_of.get(program)
        return known is not None and all(map(operator.is_, program.weights(args), known))

    def weight(self, node: fx.Node) -> Box:
        """What a program reads through a weight's placeholder; one box for a weight."""
        number = self._numbers[node]
        if number not in self._boxes:
            box = self._boxes[number] = Box(self._objects[number])
            self._fixed_boxes.add(id(box))
        return self._boxes[number]

    def is_weight(self, node: Any) -> bool:
        """Whether a program reads a weight through this node."""
        return node in self._numbers

    def refresh(self) -> Standing:
        """Bring plan and stacks up to date with the weights' values, before waves run; what stands then."""
        if self.follow_weights and self._where() == self._places:
            return self._at(self._places)
        self.replan()
        assert self._stacks is not None
        found = self._stacks(self._objects)
        if len(found) != len(self._stacked) or any(
            a is not b for a, b in zip(found, self._stacked, strict=True)
        ):
            self._stacked = found
            self._slices, self._groups = {}, {}
        self._plans = {}  # a weight that is in no stack may have moved
        self._places = self._where()  # stacking moves weights, too
        return self._at(self._places)

    def glance(self) -> Standing:
        """The same for a call that Dynamo is asked about: its guards ask how weights lie, but not where."""
        if stances.asks_all() and self.follow_weights and addresses(self._objects) == self._places[0]:
            return self._at(self._places)
        return self.refresh()

    @property
    def follow_weights(self) -> bool:
        """Whether the stacks are up to date as long as no weight moves."""
        return self._plan is not None and self._stacks is not None and self._stacks.follow_weights

    def _where(self) -> Places:
        """Where the weights lie, and how."""
        return places(self._objects)

    def numbered(self) -> tuple[dict[fx.Node, int], list[torch.Tensor]]:
        """The number of the weight behind each placeholder, and the weights."""
        return self._numbers, self._objects

    def is_object(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is one of the weights."""
        return id(tensor) in self._by_id

    def standing(self) -> Standing:
        """What the addresses in a wave depend on, beside the call."""
        return self._at(self._where())

    def _at(self, places: Places) -> Standing:
        return Standing(self.cells, len(self.cells), self._stacked, places)

    def replan(self) -> None:
        """Decide which weights are stacked; no weight is touched."""
        if self._plan is None:
            layers = self.cells
            plan = plan_weights(self.kinds, lambda at: layers[at].layer, self._numbers)
            if self._stacks is None or [s.rows for s in plan.stacks] != self._stacks.rows:
                share = self.options.weights == "share"
                rows = [stack.rows for stack in plan.stacks]
                self._stacks = WeightStacks(rows, [stack.owns for stack in plan.stacks], share)
            self._plan = plan
            self._rows = [()] * len(self.cells)
            for kind in self.kinds:
                served = [at for at in range(len(kind.slots)) if (kind.index, at) in plan.serving]
                columns = [plan.rows(kind, at, kind.cells) or [] for at in served]
                for number, row in zip(kind.cells, zip(*columns, strict=True), strict=False):
                    self._rows[number] = row

    def width(self, max_width: int | None) -> int | None:
        """The largest number of cells in a wave; see :func:`diagpass.analysis.memory.width_within`."""
        if self._width is None:
            self._width = width_within(self.kinds, None, self.options.memory_limit) or 0
        limits = [limit for limit in (self._width, max_width) if limit]
        return min(limits, default=None)

    # Groups.

    def of(self, cell: int) -> tuple[Kind, int]:
        """A cell's kind and its place in it."""
        return self._place[cell]

    def groups(self, cells: tuple[int, ...]) -> list[tuple[Kind, list[int], list[int]]]:
        """Cells that may run together -> per group its kind, its positions in ``cells``, and its members."""
        found = self._groups.get(cells)
        if found is None:
            by_kind: dict[int, list[int]] = {}
            for at, cell in enumerate(cells):
                by_kind.setdefault(self.of(cell)[0].index, []).append(at)
            found = self._groups[cells] = [
                (
                    self.kinds[index],
                    [places[at] for at in positions],
                    [self.of(cells[places[at]])[1] for at in positions],
                )
                for index, places in by_kind.items()
                for positions in self.split([cells[at] for at in places])
            ]
        return found

    def split(self, cells: Sequence[int]) -> list[list[int]]:
        """Cells of one kind -> groups (of positions) that read evenly spaced weights.

        Their widths are usual ones where the kind has no form for any width.
        """
        groups = []
        for run in even_runs([self._rows[cell] for cell in cells]):
            start = 0
            whole = self._runs_whole(self.of(cells[0])[0], len(run))
            for width in [len(run)] if whole else usual_widths(len(run)):
                groups.append(run[start : start + width])
                start += width
        return groups

    def _runs_whole(self, kind: Kind, width: int) -> bool:
        """Whether so many cells of a kind are one group."""
        known = width == self.full_width(kind) or (self._keys[kind.index], width) in self._whole
        return known or self._has_any_width(kind)

    def full_width(self, kind: Kind) -> int:
        """The cells of a kind that have weights of their own: the width of its groups in the steady state."""
        return len({self._rows[cell] for cell in kind.cells})

    def plan(self, kind: Kind, cells: tuple[int, ...], members: Sequence[int]) -> GroupPlan:
        """What a group reads, slot by slot."""
        key = (kind.index, cells)
        found = self._plans.get(key)
        if found is None:
            fixed = [
                (self.numbers(kind, tuple(slot.sources[member] for member in members)), False)
                if slot.literal
                else self.weights(kind, at, cells)
                for at, slot in enumerate(kind.slots)
            ]
            found = self._plans[key] = GroupPlan(
                fixed,
                [
                    (at, [slot.sources[member] for member in members])
                    for at, slot in enumerate(kind.slots)
                    if fixed[at] is None
                ],
                tuple((item[0].data_ptr(), item[0].stride()) for item in fixed if item is not None),
            )
        return found

    def is_fixed(self, box: Box) -> bool:
        """Whether the box is a weight's."""
        return id(box) in self._fixed_boxes

    def weights(self, kind: Kind, slot: int, cells: Sequence[int]) -> Fixed | None:
        """A group's operand from the stacks and whether it is shared; None if no stack serves the slot."""
        assert self._plan is not None
        at = self._plan.serving.get((kind.index, slot))
        if at is None:
            return None
        key = (kind.index, slot, *cells)
        found = self._slices.get(key)
        if found is None:
            rows = self._plan.rows(kind, slot, cells) or []
            if len(set(rows)) == 1:
                weight = self._objects[self._plan.stacks[at].rows[rows[0]]]
                found = weight, True
            else:
                found = self._stacked[at][rows[0] : rows[-1] + 1 : rows[1] - rows[0]], False
            self._slices[key] = found
        return found

    def numbers(self, kind: Kind, items: tuple[float, ...]) -> torch.Tensor:
        """The numbers that differ from cell to cell as a tensor of shape (width,)."""
        device = device_of(kind)
        key = (type(items[0]), device, *items)
        if key not in self._constants:
            dtype = torch.float64 if isinstance(items[0], float) else torch.int64
            self._constants[key] = torch.tensor(items, dtype=dtype, device=device)
        return self._constants[key]

    def single(self, kind: Kind) -> Callable[..., Any]:
        """What runs one cell."""
        return self._wrap(kind.body, f"kind{kind.index}", self._keys[kind.index])

    def form(self, kind: Kind, width: int, shared: tuple[bool, ...]) -> Form | None:
        """What runs a group, and which of its results are stacked; None if the kind has no batched form."""
        key = (self._keys[kind.index], width, shared)
        if key not in self._forms:
            found = self._running(kind, width, shared, given=False)
            self._forms[key] = None if found is None else (found[0], found[1].stacked)
        return self._forms[key]

    def into(self, kind: Kind, width: int, shared: tuple[bool, ...]) -> Into | None:
        """What runs a group into given memory; None if the kind has no such form.

        A group of one cell is that cell as it stands: the leading axis of 1 is taken off its operands.
        """
        key = (self._keys[kind.index], width, shared)
        if key not in self._into:
            found = self._running(kind, width, shared, given=True)
            self._into[key] = found and Into(len(self._into), found[0], results_of(found[1].graph, width))
        return self._into[key]

    def _running(
        self, kind: Kind, width: int, shared: tuple[bool, ...], given: bool
    ) -> tuple[Callable[..., Any], Traced] | None:
        """What runs a group of this width, perhaps of others, too."""
        size = None if self._is_served(kind, width, shared) else width
        traced = self._trace(kind, size, shared)
        if traced is None or (given and not all(traced.stacked)):
            return None
        key = (self._keys[kind.index], size, shared, given)
        if key not in self._runs:
            name = f"kind{kind.index}_any_width" if size is None else f"kind{kind.index}_w{size}"
            self._runs[key] = self._made.group(kind, key[0], size, shared, traced, name, given)
        return self._runs[key], traced

    def _is_served(self, kind: Kind, width: int, shared: tuple[bool, ...]) -> bool:
        """Whether the kind's form for any width serves this one.

        A kind of whose forms one does not is split into usual widths from then on; but a width that has run
        as one group goes on to, so that the same call gives the same bits.
        """
        if width in (1, self._steady(kind)) or not self._has_any_width(kind):
            return False
        self._whole.add((self._keys[kind.index], width))
        traced = self._trace(kind, None, shared)
        symbol = None if traced is None else width_of(traced.graph)
        if symbol is not None and holds(symbol, width):
            return True
        self._of_usual_width.add(self._keys[kind.index])
        self._groups = {}
        return False

    def _has_any_width(self, kind: Kind) -> bool:
        """Whether a form for any width is there or worth making: it costs as much as two for one width."""
        several = self._steady(kind) not in (2, 3)
        unknown = self._keys[kind.index] not in self._of_usual_width
        return several and unknown and self._made.serves_any_width(kind)

    def _steady(self, kind: Kind) -> int:
        """The width that most groups will have, 1 if not known; it gets a form of its own."""
        return min(self.full_width(kind), self.options.max_width or len(self.cells))

    def form_facts(self) -> list[dict[str, Any]]:
        """Which forms groups ran in, for a report; those of kinds that are gone are left out."""
        index = {number: kind for kind, number in reversed(self._keys.items())}
        return [fact for fact in self._made.facts(lambda key: index.get(key, -1)) if fact["kind"] >= 0]

    def _trace(self, kind: Kind, width: int | None, shared: tuple[bool, ...]) -> Traced | None:
        """The batched form for a width, or with None for any; None if there is none."""
        key = (self._keys[kind.index], width, shared)
        if key not in self._traced:
            say(f"batch: kind{kind.index} for {width or 'any number of'} cells")
            try:
                make = batch_kind(kind, width, shared) if width else self._trace_any_width(kind, shared)
                self._traced[key] = Traced(*make)
            except BatchingError as error:
                first = self.cells[kind.cells[0]]
                if width is None:
                    log.info("cells like %s run in groups of usual widths: %s", first.path, error)
                else:
                    self.notes[f"cells like {first.path} run unbatched: {error}"] = None
                self._traced[key] = None
        return self._traced[key]

    def _trace_any_width(
        self, kind: Kind, shared: tuple[bool, ...]
    ) -> tuple[fx.GraphModule, tuple[bool, ...]]:
        """The form for any width, held against the one for the steady width, which is needed anyway."""
        width = max(2, self._steady(kind))
        fixed = self._trace(kind, width, shared)
        if fixed is None:
            raise BatchingError("there is no batched form")
        graph, stacked = batch_any_width(kind, shared)
        if stacked != fixed.stacked or not same_program(graph, width, fixed.graph):
            raise BatchingError(f"the form for any width is another at {width}")
        return graph, stacked

    def glue(self, module: fx.GraphModule, key: Any) -> Callable[..., Any]:
        """What runs a lump."""
        return self._wrap(module, "glue", key)

    def _wrap(self, graph: fx.GraphModule, name: str, key: Any) -> Callable[..., Any]:
        if key not in self._wrapped:
            compiled = self.options.compiler == "inductor"
            self._wrapped[key] = InductorKind(graph, name) if compiled else graph.forward
        return self._wrapped[key]


def usual_widths(count: int) -> list[int]:
    """``count`` cells as groups of few different widths, none of one cell if there are two or more.

    For kinds whose batched forms are for one width each. The ramps have every width up to that of the steady
    state; put together from widths 2^k and 3 * 2^k they need only a few forms.
    """
    widths = []
    while count:
        best = 1
        size = 2
        while size <= count:
            for width in (size, size + size // 2):
                if width <= count and count - width != 1:
                    best = max(best, width)
            size *= 2
        widths.append(best)
        count -= best
    return widths
