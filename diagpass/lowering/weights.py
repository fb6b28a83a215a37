"""Which weights are stacked, and in what order: the plan, without any tensor.

A *stack* holds one weight of every layer of a kind, row after row, so that a group of neighbouring
layers reads a slice of it. Weights are *numbered*: a weight may enter several graphs, by other placeholders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import torch.fx as fx

from diagpass.ir import CellGraph, Group, Kind, Schedule, Wave


@dataclasses.dataclass(frozen=True)
class Stack:
    """Rows of one stack: the weights' numbers in order. Only one stack may own a weight's storage."""

    rows: tuple[int, ...]
    owns: bool

    def position(self, number: int) -> int:
        """The row of a weight."""
        return self.rows.index(number)


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """The stacks, per kind and slot the index of the stack that serves it, and each weight's number."""

    stacks: tuple[Stack, ...]
    serving: dict[tuple[int, int], int]
    numbers: Mapping[fx.Node, int]

    def rows(self, kind: Kind, slot: int, cells: Collection[int]) -> list[int] | None:
        """The rows that cells of a kind read through a slot, or None if no stack serves it."""
        at = self.serving.get((kind.index, slot))
        if at is None:
            return None
        sources = dict(zip(kind.cells, kind.slots[slot].sources, strict=True))
        return [self.stacks[at].position(self.numbers[sources[cell]]) for cell in cells]


def plan_weights(
    kinds: Sequence[Kind], layer_of: Callable[[int], int], numbers: Mapping[fx.Node, int]
) -> WeightPlan:
    """Decide the stacks: one for each slot through which layers read weights of their own.

    Parameters
    ----------
    kinds
        What reads the weights.
    layer_of
        The layer of a cell.
    numbers
        Placeholders that are weights, each with the weight's number.
    """
    wanted: dict[tuple[int, int], tuple[int, ...]] = {}
    for kind in kinds:
        order = sorted(range(len(kind.cells)), key=lambda at: layer_of(kind.cells[at]))
        for at, slot in enumerate(kind.slots):
            if slot.literal or not all(source in numbers for source in slot.sources):
                continue
            rows = tuple(dict.fromkeys(numbers[slot.sources[place]] for place in order))
            if len(rows) > 1:
                wanted[kind.index, at] = rows
    stacks: list[Stack] = []
    serving: dict[tuple[int, int], int] = {}
    owned: set[int] = set()
    for key, rows in sorted(wanted.items(), key=lambda item: (-len(item[1]), item[0])):
        found = next((at for at, stack in enumerate(stacks) if _contains(stack.rows, rows)), None)
        if found is None:
            stacks.append(Stack(rows, owns=owned.isdisjoint(rows)))
            owned.update(rows)
            found = len(stacks) - 1
        serving[key] = found
    return WeightPlan(tuple(stacks), serving, numbers)


def _contains(rows: tuple[int, ...], part: tuple[int, ...]) -> bool:
    if part[0] not in rows:
        return False
    start = rows.index(part[0])
    return rows[start : start + len(part)] == part


def split_groups(cells: CellGraph, schedule: Schedule, weights: WeightPlan) -> Schedule:
    """Split groups so that each reads evenly spaced rows of the stacks, or one row alone.

    A group of layers 0, 1, 3 would have to copy weights to gather them; 0, 1 and 3 apart need not.
    """
    waves = []
    for wave in schedule.waves:
        groups = []
        for group in wave.groups:
            kind = cells.kinds[group.kind]
            groups += [Group(group.kind, part) for part in _runs(kind, group.cells, weights)]
        waves.append(Wave(tuple(groups)))
    return Schedule(tuple(waves))


def _runs(kind: Kind, members: tuple[int, ...], weights: WeightPlan) -> list[tuple[int, ...]]:
    places = [at for at in range(len(kind.slots)) if (kind.index, at) in weights.serving]
    if not places or len(members) == 1:
        return [members]
    rows = zip(*(weights.rows(kind, at, members) or () for at in places), strict=True)
    return [tuple(members[at] for at in part) for part in even_runs(list(rows))]


def even_runs(rows: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Split cells into groups that can be served from stacks without copying.

    Parameters
    ----------
    rows
        Per cell, the row that it reads of each stack.

    Returns
    -------
    list
        Groups of positions in ``rows``: all of a group read the same rows, or evenly spaced ones.
    """
    same_rows: dict[tuple, list[int]] = {}
    for at, row in enumerate(rows):
        same_rows.setdefault(row, []).append(at)
    by_layer = list(same_rows.values())
    by_rank: list[list[int]] = []
    for rank in range(max(map(len, by_layer))):
        ranked = [same[rank] for same in by_layer if len(same) > rank]
        run = [ranked[0]]
        for at in ranked[1:]:
            if _continues([rows[member] for member in run[-2:]], rows[at]):
                run.append(at)
            else:
                by_rank.append(run)
                run = [at]
        by_rank.append(run)
    return by_layer if len(by_layer) < len(by_rank) else by_rank


def _continues(run: list[tuple[int, ...]], row: tuple[int, ...]) -> bool:
    """Whether ``row`` goes on in the run's steps, every stack upwards and none standing still."""
    steps = [b - a for a, b in zip(run[-1], row, strict=True)]
    if any(step < 1 for step in steps):
        return False
    return len(run) == 1 or steps == [b - a for a, b in zip(run[-2], run[-1], strict=True)]
