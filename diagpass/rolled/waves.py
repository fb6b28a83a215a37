"""Running the cells of a wave: group by group, or the whole wave as one replay.

``Direct`` launches each group's form as it stands. ``Replayed`` has all that a wave reads and writes at
addresses that come again (:mod:`diagpass.runtime.buffers`), so that the wave of the steady state, and those
of the ramps from the second call on, are one launch each (:mod:`diagpass.runtime.replay`). What lies
elsewhere (the inputs of a segment, what a reset put in place) is copied to such an address first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.fx as fx

from diagpass.ir import Kind
from diagpass.rolled.kinds import Into, Kinds
from diagpass.rolled.values import Box, Row, gather, parts_of
from diagpass.runtime.buffers import Buffers
from diagpass.runtime.replay import CudaRecorder, Recorder, Replays

__all__ = ["Direct", "PendingCell", "Replayed", "WaveWork", "runner"]


def runner(kinds: Kinds, max_width: int | None) -> Callable[[Sequence[PendingCell]], int]:
    """What runs the cells of a wave: the same for all runs of a step, for its buffers and graphs."""
    if max_width == 1 or kinds.options.compiler != "inductor" or kinds.device.type != "cuda":
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
        groups = self.kinds.groups(tuple(cell.number for cell in cells))
        return sum(
            self.group(kind, [cells[at] for at in positions], members) for kind, positions, members in groups
        )

    def group(self, kind: Kind, cells: Sequence[PendingCell], members: Sequence[int]) -> int:
        """Run cells of one kind; how many of them ran batched."""
        literal = self.kinds.options.compiler == "inductor" and any(slot.literal for slot in kind.slots)
        operands, shared = self._operands(kind, cells, members) if len(cells) > 1 or literal else (None, ())
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
        self, kind: Kind, cells: Sequence[PendingCell], members: Sequence[int]
    ) -> tuple[list[Any] | None, tuple[bool, ...]]:
        """What a group's form takes, and which of it all cells share; None if the group has no form.

        A Python number is never passed to a form: it would be traced in.
        """
        operands, shared = [], []
        for fixed, boxes in _slots(self.kinds, kind, cells, members):
            if fixed is not None:
                operands.append(fixed[0])
                shared.append(fixed[1])
                continue
            first = boxes[0]
            if not isinstance(first, Box):
                path = self.kinds.cells[cells[0].number].path
                self.kinds.notes[f"cells like {path} run unbatched: they read a Python number"] = None
                return None, ()
            same = all(box is first for box in boxes)
            operands.append(first.tensor() if same else gather(boxes))
            shared.append(same)
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
    """A group with its operands and results at addresses of their own."""

    into: Into
    operands: list[torch.Tensor | list[torch.Tensor]]
    results: list[torch.Tensor]
    key: tuple

    def run(self) -> None:
        operands = [torch.cat(operand) if isinstance(operand, list) else operand for operand in self.operands]
        self.into.run(*operands, *self.results)


class WaveWork:
    """The groups of a wave, to be run in turn; ``key`` names all that they read and write."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.key = tuple(job.key for job in jobs)

    def __call__(self) -> None:
        """Run them."""
        for job in self.jobs:
            job.run()


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
        self.replays = Replays(recorder)
        self._direct = Direct(kinds)

    def __call__(self, cells: Sequence[PendingCell]) -> int:
        """Run cells that do not depend on each other; how many of them ran batched."""
        jobs: list[tuple[Job, Kind, list[PendingCell], Sequence[int]]] = []
        batched = 0
        for kind, positions, members in self.kinds.groups(tuple(cell.number for cell in cells)):
            group = [cells[at] for at in positions]
            job = self._job(kind, group, members)
            if job is None:
                batched += self._direct.group(kind, group, members)
            else:
                jobs.append((job, kind, group, members))
                batched += len(group) if len(group) > 1 else 0
        if jobs:
            work = WaveWork([job for job, *_ in jobs])
            self.replays.run(work.key, work)
        for job, kind, group, members in jobs:
            for result, nodes in zip(job.results, kind.outputs, strict=True):
                _put(None, result, nodes, group, members)
        return batched

    def _job(self, kind: Kind, cells: Sequence[PendingCell], members: Sequence[int]) -> Job | None:
        operands: list[torch.Tensor | list[torch.Tensor]] = []
        key: list[Hashable] = []
        shared = []
        for fixed, boxes in _slots(self.kinds, kind, cells, members):
            if fixed is not None:
                operands.append(fixed[0])
                shared.append(fixed[1])
                key.append(_address(fixed[0]))
                continue
            if not all(isinstance(box, Box) for box in boxes):
                return None
            same = len(boxes) > 1 and all(box is boxes[0] for box in boxes)
            shared.append(same)
            for box in boxes[:1] if same else boxes:
                if not self._settle(box):
                    return None
            parts = [boxes[0].tensor()] if same else parts_of(boxes)
            key.append(tuple(map(_address, parts)))
            operands.append(parts[0] if len(parts) == 1 else parts)
        into = self.kinds.into(kind, len(cells), tuple(shared))
        if into is None:
            return None
        results = [
            self.buffers.lend(shape, dtype, device, max(self.kinds.layers_of(kind), len(cells)))
            for shape, dtype, device in into.results
        ]
        key += [result.data_ptr() for result in results]
        return Job(into, operands, results, (into.number, *key))

    def _settle(self, box: Box) -> bool:
        """See that a value lies where it can be read again; whether it is a value that can."""
        value = box.value
        if type(value) is Row:
            if self.buffers.holds(value.stacked):
                return True
            value = box.tensor()
        if not isinstance(value, torch.Tensor):
            return False
        if self.buffers.holds(value) or self.kinds.is_fixed(box):
            return True
        settled = self.buffers.lend((1, *value.shape), value.dtype, value.device, 1)
        settled[0].copy_(value)
        box.put(Row(settled, 0, 1))
        return True


def _slots(
    kinds: Kinds, kind: Kind, cells: Sequence[PendingCell], members: Sequence[int]
) -> Iterable[tuple[tuple[torch.Tensor, bool] | None, list[Any]]]:
    """Per slot of a group what it always reads and whether its cells share that, or else what they read."""
    fixed = kinds.fixed(kind, tuple(cell.number for cell in cells), tuple(members))
    for slot, found in zip(kind.slots, fixed, strict=True):
        if found is not None:
            yield found, []
        else:
            sources = slot.sources
            yield (
                None,
                [_operand(kinds, sources[member], cell) for cell, member in zip(cells, members, strict=True)],
            )


def _operand(kinds: Kinds, source: fx.Node, cell: PendingCell) -> Any:
    found = cell.boxes.get(source)
    return kinds.weight(source) if found is None else found


def _put(
    value: Any,
    stacked: Any,
    nodes: Sequence[fx.Node | None],
    cells: Sequence[PendingCell],
    members: Sequence[int],
) -> None:
    """Hand a group's result to its cells: ``value`` to each, or each its row of ``stacked``."""
    for row, (cell, member) in enumerate(zip(cells, members, strict=True)):
        node = nodes[member]
        if node is not None:
            cell.outputs[node].put(Row(stacked, row, len(cells)) if value is None else value)


def _address(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride()
