"""Running the cells of a wave: group by group, or the whole wave as one replay.

``Direct`` launches each group's form as it stands. ``Replayed`` has all that a wave reads and writes at
addresses that come again (:mod:`diagpass.runtime.buffers`), so that the wave of the steady state, and those
of the ramps from the second call on, are one launch each (:mod:`diagpass.runtime.replay`). What lies
elsewhere (the inputs of a segment, what a reset put in place) is copied to such an address first.

A group of the steady state mostly reads the results of the wave before it, shifted by a layer: the first of
its cells reads what is new, each other one the row of the cell below. So a loan has a *spare* row in front of
the results in it, and what is new is copied there: the group reads one piece of memory, nothing is put
together. A spare row is read by the wave that it was filled for and by nobody else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.fx as fx

from diagpass.ir import Kind
from diagpass.pipeline import records
from diagpass.rolled.kinds import Into, Kinds
from diagpass.rolled.program import Lump, StepProgram
from diagpass.rolled.values import Box, Row, gather, listener, parts_of, runs_of, tensor_of
from diagpass.runtime.buffers import Buffers
from diagpass.runtime.clock import clock_of_groups
from diagpass.runtime.compiled import InductorKind, compile_all
from diagpass.runtime.forms import want
from diagpass.runtime.replay import CudaRecorder, Recorder, Replays, StreamOrder
from diagpass.runtime.stacks import ALIGNMENT

__all__ = ["Direct", "PendingCell", "Replayed", "WaveWork", "runner"]


def runner(kinds: Kinds, max_width: int | None) -> Callable[[Sequence[PendingCell]], int]:
    """What runs the cells of a wave: the same for all runs of a step, for its buffers and graphs."""
    if max_width == 1 or not records(kinds.options, {kinds.device.type}):
        return Direct(kinds)
    if kinds.runner is None:
        kinds.runner = Replayed(kinds, CudaRecorder(kinds.device))
    return kinds.runner


class PendingCell:
    """A cell of one segment that waits for its wave."""

    __slots__ = ("boxes", "layer", "number", "order", "outputs", "segment")

    def __init__(self, number: int, layer: int, segment: int, order: int) -> None:
        self.number, self.layer, self.segment, self.order = number, layer, segment, order
        self.boxes: dict[fx.Node, Any] = {}
        self.outputs: dict[fx.Node, Box] = {}


class Direct:
    """Runs groups one after the other."""

    def __init__(self, kinds: Kinds) -> None:
        self.kinds = kinds

    def __call__(self, cells: Sequence[PendingCell]) -> int:
        """Run cells that do not depend on each other; how many of them ran batched."""
        return sum(self.timed(kind, part, members) for kind, part, members in self._groups(cells))

    def compile_ahead(self, programs: Iterable[StepProgram], waves: Iterable[Sequence[PendingCell]]) -> None:
        """Have all graphs compiled that are needed, one while the next is lowered, where that is new.

        All are there when it returns: forms are timed when they first run, with nothing beside them.
        """
        wanted: dict[InductorKind, Sequence[Any]] = {}
        for program in programs:
            if program in self.kinds.compiled_for:
                continue
            self.kinds.compiled_for.add(program)
            for unit in program.units:
                if isinstance(unit, Lump):
                    want(self.kinds.glue(unit.module, unit.key), [None] * len(unit.inputs), wanted)
        for cells in waves:
            numbers = tuple(cell.number for cell in cells)
            if numbers in self.kinds.compiled_for:
                continue
            self.kinds.compiled_for.add(numbers)
            for kind, part, members in self._groups(cells):
                operands, shared = self._operands(kind, part, members, ahead=True)
                form = None if operands is None else self.kinds.form(kind, len(part), shared)
                run = self.kinds.single(kind) if form is None else form[0]
                want(run, [None] * len(kind.slots) if form is None else operands or [], wanted)
        compile_all(wanted)

    def _groups(self, cells: Sequence[PendingCell]) -> list[tuple[Kind, list[PendingCell], list[int]]]:
        groups = self.kinds.groups(tuple(cell.number for cell in cells))
        return [(kind, [cells[at] for at in positions], members) for kind, positions, members in groups]

    def timed(self, kind: Kind, cells: Sequence[PendingCell], members: Sequence[int]) -> int:
        """:meth:`group`, under the clock if somebody measures."""
        with clock_of_groups((kind, cells)):
            return self.group(kind, cells, members)

    def group(self, kind: Kind, cells: Sequence[PendingCell], members: Sequence[int]) -> int:
        """Run cells of one kind; how many of them ran batched."""
        writer = listener()
        if writer is not None:
            writer.stop("a group ran that was not a replay")
        operands, shared = self._operands(kind, cells, members)
        form = None if operands is None else self.kinds.form(kind, len(cells), shared)
        if form is not None:
            run, stacked = form
            results = run(*operands)  # type: ignore[misc]
            for result, is_stacked, nodes in zip(results, stacked, kind.outputs, strict=True):
                _put(result if not is_stacked else None, result, nodes, cells, members)
            return len(cells) if len(cells) > 1 else 0
        for cell, member in zip(cells, members, strict=True):
            self._single(kind, cell, member)
        return 0

    def _operands(
        self, kind: Kind, cells: Sequence[PendingCell], members: Sequence[int], ahead: bool = False
    ) -> tuple[list[Any] | None, tuple[bool, ...]]:
        """What a group's form takes, and which of it all cells share; None if the group has no form.

        A Python number is never passed to a form: it would be traced in. ``ahead``: before the cells that
        it reads have run; what comes from them is None.
        """
        literal = self.kinds.options.compiler == "inductor" and any(slot.literal for slot in kind.slots)
        if len(cells) == 1 and not literal:
            return None, ()
        plan = self.kinds.plan(kind, tuple(cell.number for cell in cells), members)
        operands: list[Any] = [None if item is None else item[0] for item in plan.fixed]
        shared = [item is not None and item[1] for item in plan.fixed]
        for at, sources in plan.moving:
            boxes = _boxes(self.kinds, sources, cells)
            first = boxes[0]
            odd = None if isinstance(first, Box) else "a Python number"
            if odd is None and first.is_plain and not isinstance(first.value, (torch.Tensor, Row)):
                odd = "a function, as flex_attention and cond do"
            if odd is not None:
                path = self.kinds.cells[cells[0].number].path
                self.kinds.notes[f"cells like {path} run unbatched: they read {odd}"] = None
                return None, ()
            shared[at] = all(box is first for box in boxes)
            if not ahead:
                operands[at] = first.tensor() if shared[at] else gather(boxes)
            elif shared[at] and first.is_plain:
                operands[at] = first.tensor()
        return operands, tuple(shared)

    def _single(self, kind: Kind, cell: PendingCell, member: int) -> None:
        operands = []
        for slot in kind.slots:
            source = slot.sources[member]
            box = source if slot.literal else _operand(self.kinds, source, cell)
            operands.append(box.tensor() if isinstance(box, Box) else box)
        for result, nodes in zip(self.kinds.single(kind)(*operands), kind.outputs, strict=True):
            node = nodes[member]
            if node is not None:
                cell.outputs[node].put(result)


@dataclasses.dataclass
class Job:
    """A group with its operands and results at addresses of their own.

    ``moving`` has slots with their values and whether the cells share them; ``rows`` are the loans that the
    results lie in, with the first row of each.
    """

    into: Into
    fixed: Sequence[Any]
    moving: list[tuple[int, list[Any], bool]]
    results: list[torch.Tensor]
    key: tuple
    rows: list[tuple[torch.Tensor, int]]

    def operands(self) -> list[torch.Tensor | list[torch.Tensor]]:
        """What the group's form takes; a list of tensors is to be put together first."""
        found: list[Any] = [None if item is None else item[0] for item in self.fixed]
        for at, values, is_shared in self.moving:
            parts = [tensor_of(values[0])] if is_shared else parts_of(values)
            found[at] = parts[0] if len(parts) == 1 else parts
        return found

    def run(self) -> None:
        """Launch it."""
        operands = [torch.cat(item) if isinstance(item, list) else item for item in self.operands()]
        self.into.run(*operands, *self.results)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A group's call; its operands and results are named by where they lie, so that it holds no loan."""

    into: Into
    operands: list[torch.Tensor | list[torch.Tensor]]
    results: list[torch.Tensor]

    def __call__(self) -> None:
        """Do it."""
        operands = [torch.cat(item) if isinstance(item, list) else item for item in self.operands]
        self.into.run(*operands, *self.results)


class WaveWork:
    """The groups of a wave, the widest first; ``key`` names all that they read and write.

    Parameters
    ----------
    jobs
        The groups.
    beside
        What does works that do not depend on each other.
    """

    def __init__(self, jobs: Sequence[Job], beside: Callable[[Sequence[Callable[[], None]]], None]) -> None:
        self.jobs = sorted(jobs, key=lambda job: -job.results[0].shape[0] if job.results else 0)
        self.key = tuple(job.key for job in self.jobs)
        self._beside = beside

    def __call__(self) -> None:
        """Run them."""
        self._beside([job.run for job in self.jobs])

    def launches(self, buffers: Buffers) -> list[Launch]:
        """The same as calls that hold no loan."""

        def place(item: Any) -> Any:
            return (
                [buffers.settled(part) for part in item] if isinstance(item, list) else buffers.settled(item)
            )

        return [
            Launch(job.into, [place(item) for item in job.operands()], [place(item) for item in job.results])
            for job in self.jobs
        ]


class Replayed:
    """Runs a wave as one replay where it can, group by group where it cannot.

    Parameters
    ----------
    kinds
        The kinds of the cells.
    recorder
        What records a wave.
    """

    def __init__(self, kinds: Kinds, recorder: Recorder) -> None:
        self.kinds = kinds
        self.buffers = Buffers()
        self.recorder = recorder
        self.replays = Replays(recorder)
        self._direct = Direct(kinds)
        self._order = StreamOrder(kinds.device)

    def __call__(self, cells: Sequence[PendingCell]) -> int:
        """Run cells that do not depend on each other; how many of them ran batched."""
        self.follow_stream()
        writer = listener()
        jobs: list[tuple[Job, Kind, list[PendingCell], Sequence[int]]] = []
        batched = 0
        groups = self.kinds.groups(tuple(cell.number for cell in cells))
        shelf = _Shelf(self.kinds, self.buffers)
        for kind, positions, _ in groups:
            shelf.expect(kind, [cells[at] for at in positions])
        for kind, positions, members in groups:
            group = [cells[at] for at in positions]
            job = self._job(kind, group, members, shelf)
            if job is None:
                batched += self._direct.timed(kind, group, members)
            else:
                jobs.append((job, kind, group, members))
                batched += len(group) if len(group) > 1 else 0
        if jobs:
            work = WaveWork([job for job, *_ in jobs], self.recorder.beside)
            with clock_of_groups(*((kind, group) for _, kind, group, _ in jobs)):
                again = self.replays.run(work.key, work)
            if writer is not None:
                writer.launched(again, work)
        for job, kind, group, members in jobs:
            for (loan, start), nodes in zip(job.rows, kind.outputs, strict=True):
                _put(None, loan, nodes, group, members, loan.data_ptr(), start)
        return batched

    def follow_stream(self) -> None:
        """On another stream than last time, wait for that one: the buffers are the same."""
        self._order.follow()

    def _job(
        self, kind: Kind, cells: Sequence[PendingCell], members: Sequence[int], shelf: _Shelf
    ) -> Job | None:
        plan = self.kinds.plan(kind, tuple(cell.number for cell in cells), members)
        key: list[Hashable] = [plan.key]
        shared = [item is not None and item[1] for item in plan.fixed]
        moving = []
        for at, sources in plan.moving:
            boxes = _boxes(self.kinds, sources, cells)
            shared[at] = len(boxes) > 1 and all(box is boxes[0] for box in boxes)
            values = self._settled(boxes[:1] if shared[at] else boxes, shelf)
            if values is None:
                return None
            moving.append((at, values, shared[at]))
            key += [_place(value, count) for value, count in runs_of(values)]
        into = self.kinds.into(kind, len(cells), tuple(shared))
        if into is None:
            return None
        rows = shelf.take(kind, into)
        results = [loan.narrow(0, start, len(cells)) for loan, start in rows]
        key += [result.data_ptr() for result in results]
        return Job(into, plan.fixed, moving, results, (into.number, *key), rows)

    def _settled(self, boxes: Sequence[Any], shelf: _Shelf) -> list[Any] | None:
        """What a slot's boxes hold, seen to lie where it can be read again; None if one of them cannot."""
        found: list[Any] = []
        following = None
        for box in reversed(boxes):
            following = self._settle(box, following, shelf) if isinstance(box, Box) else None
            if following is None:
                return None
            found.append(following)
        return found[::-1]

    def _settle(self, box: Box, following: Any, shelf: _Shelf) -> Any:
        """One value, which is read just before another one; see :meth:`_settled`."""
        value = box.value
        if type(value) is Row:
            if value.address is not None:
                return value
            value = box.tensor()
        if not isinstance(value, torch.Tensor):
            return None
        if self.buffers.holds(value) or self.kinds.is_fixed(box):
            return value
        row = shelf.before(following, box, value)
        if row is not None:  # for this wave only: a box that kept it would keep a whole loan
            _copy(box, value, row)
            return row
        settled = self.buffers.lend((1, *value.shape), value.dtype, value.device)
        row = Row(settled, 0, 1, settled.data_ptr())
        _copy(box, value, row)
        box.put(row)
        return row


def _copy(box: Box, value: torch.Tensor, row: Row) -> None:
    """Copy a box's value to a row of a buffer."""
    tensor_of(row).copy_(value)
    writer = listener()
    if writer is not None:
        writer.copied(box, row)


class _Shelf:
    """Where the results of a wave's groups go: groups of one kind side by side, so that later waves read them
    as one; and what has been put into the spare rows of those that the wave reads.
    """

    def __init__(self, kinds: Kinds, buffers: Buffers) -> None:
        self._kinds, self._buffers = kinds, buffers
        self._expected: dict[int, list[int]] = {}
        self._taken: dict[tuple, tuple[torch.Tensor, int]] = {}
        self._spare: dict[tuple[int, int], Box] = {}

    def expect(self, kind: Kind, cells: Sequence[PendingCell]) -> None:
        """Say that a group of a kind is to come."""
        self._expected.setdefault(kind.index, []).extend(cell.segment for cell in cells)

    def take(self, kind: Kind, into: Into) -> list[tuple[torch.Tensor, int]]:
        """For each result of a group a loan, and the first of the rows in it that are the group's."""
        found = []
        for at, ((width, *row), dtype, device) in enumerate(into.results):
            key = (kind.index, at, dtype, *row)
            loan, start = self._taken.get(key, (None, 0))
            if loan is None or start + width > loan.shape[0]:
                loan, start = self._lend(kind, width, row, dtype, device)
            self._taken[key] = loan, start + width
            found.append((loan, start))
        return found

    def _lend(
        self, kind: Kind, width: int, row: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, int]:
        """A loan for a kind's results in this wave, and the first of the rows in it that are for them.

        Cells of several segments are on the way to the steady state, or come from there, and get a buffer
        that serves it. Those of one segment get little more than they need: of a kind of the first segment
        there are never more.
        """
        segments = self._expected[kind.index]
        aligned = math.prod(row) * dtype.itemsize % ALIGNMENT == 0
        count = len(segments) if aligned else width
        rows, spare = self._kinds.full_width(kind), int(aligned)
        if len(set(segments)) == 1:
            rows, spare = min(rows, 1 << (count - 1).bit_length()), 0  # powers of two: few sorts
        return self._buffers.lend((count, *row), dtype, device, rows, spare), spare

    def before(self, following: Any, box: Box, value: torch.Tensor) -> Row | None:
        """The spare row in front of what follows, for a box's value; None if there is none for it."""
        if type(following) is not Row or following.address is None:
            return None
        stack = following.stacked
        fits = (value.shape, value.dtype, value.device) == (stack.shape[1:], stack.dtype, stack.device)
        place = following.address, following.index - 1
        if not fits or place[1] not in self._buffers.spare(place[0]):
            return None
        if self._spare.setdefault(place, box) is not box:
            return None  # something else is in it
        return Row(stack, place[1], following.width, place[0])


def _place(value: Any, count: int) -> tuple:
    """Where a run of rows, or a value by itself, lies."""
    if type(value) is Row:
        return value.address, value.index, count
    return value.data_ptr(), value.shape, value.stride()


def _boxes(kinds: Kinds, sources: Sequence[fx.Node], cells: Sequence[PendingCell]) -> list[Any]:
    """What the cells of a group read through a slot."""
    found = [cell.boxes.get(source) for source, cell in zip(sources, cells, strict=True)]
    return [kinds.weight(sources[at]) if box is None else box for at, box in enumerate(found)]


def _operand(kinds: Kinds, source: fx.Node, cell: PendingCell) -> Any:
    found = cell.boxes.get(source)
    return kinds.weight(source) if found is None else found


def _put(
    value: Any,
    stacked: Any,
    nodes: Sequence[fx.Node | None],
    cells: Sequence[PendingCell],
    members: Sequence[int],
    address: int | None = None,
    start: int = 0,
) -> None:
    """Hand a group's result to its cells: ``value`` to each, or each a row of ``stacked``, from ``start``."""
    width = stacked.shape[0] if value is None else 0
    for row, (cell, member) in enumerate(zip(cells, members, strict=True), start):
        node = nodes[member]
        if node is not None:
            cell.outputs[node].put(Row(stacked, row, width, address) if value is None else value)
