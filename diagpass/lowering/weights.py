"""Which weights are stacked, and in what order: the plan, without any tensor.

A *stack* holds one weight of every layer of a kind, row after row, so that a group of neighbouring
layers reads a slice of it. ``inputs`` are positions in the functional graph's arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch.fx as fx

from diagpass.ir import CellGraph, Group, Kind, Schedule, Wave


@dataclasses.dataclass(frozen=True)
class Stack:
    """Rows of one stack: the placeholders in order. Only one stack may own a placeholder's storage."""

    rows: tuple[fx.Node, ...]
    owns: bool

    def position(self, node: fx.Node) -> int:
        """The row of a placeholder."""
        return self.rows.index(node)


@dataclasses.dataclass(frozen=True)
class WeightPlan:
    """The stacks, and per kind and slot the index of the stack that serves it."""

    stacks: tuple[Stack, ...]
    serving: dict[tuple[int, int], int]

    def rows(self, kind: Kind, slot: int, cells: Collection[int]) -> list[int] | None:
        """The rows that cells of a kind read through a slot, or None if no stack serves it."""
        at = self.serving.get((kind.index, slot))
        if at is None:
            return None
        sources = dict(zip(kind.cells, kind.slots[slot].sources, strict=True))
        return [self.stacks[at].position(sources[cell]) for cell in cells]


def plan_weights(cells: CellGraph, weights: Collection[fx.Node]) -> WeightPlan:
    """Decide the stacks: one for each slot through which layers read weights of their own."""
    wanted: dict[tuple[int, int], tuple[fx.Node, ...]] = {}
    for kind in cells.kinds:
        order = sorted(range(len(kind.cells)), key=lambda at: cells.cells[kind.cells[at]].layer)
        for at, slot in enumerate(kind.slots):
            if slot.literal or not all(source in weights for source in slot.sources):
                continue
            rows = tuple(dict.fromkeys(slot.sources[place] for place in order))
            if len(rows) > 1:
                wanted[kind.index, at] = rows
    stacks: list[Stack] = []
    serving: dict[tuple[int, int], int] = {}
    owned: set[fx.Node] = set()
    for key, rows in sorted(wanted.items(), key=lambda item: (-len(item[1]), item[0])):
        found = next((at for at, stack in enumerate(stacks) if _contains(stack.rows, rows)), None)
        if found is None:
            stacks.append(Stack(rows, owns=owned.isdisjoint(rows)))
            owned.update(rows)
            found = len(stacks) - 1
        serving[key] = found
    return WeightPlan(tuple(stacks), serving)


def _contains(rows: tuple[fx.Node, ...], part: tuple[fx.Node, ...]) -> bool:
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
    rows = {
        cell: tuple(row)
        for cell, *row in zip(members, *(weights.rows(kind, at, members) or () for at in places), strict=True)
    }
    same_layer: dict[tuple, list[int]] = {}
    for cell in members:
        same_layer.setdefault(rows[cell], []).append(cell)
    by_layer = [tuple(same) for same in same_layer.values()]
    by_rank: list[tuple[int, ...]] = []
    for rank in range(max(map(len, by_layer))):
        ranked = [same[rank] for same in by_layer if len(same) > rank]
        run = [ranked[0]]
        for cell in ranked[1:]:
            if _continues([rows[member] for member in run], rows[cell]):
                run.append(cell)
            else:
                by_rank.append(tuple(run))
                run = [cell]
        by_rank.append(tuple(run))
    return by_layer if len(by_layer) < len(by_rank) else by_rank


def _continues(run: list[tuple[int, ...]], row: tuple[int, ...]) -> bool:
    """Whether ``row`` goes on in the run's steps, every stack upwards and none standing still."""
    steps = [b - a for a, b in zip(run[-1], row, strict=True)]
    if any(step < 1 for step in steps):
        return False
    return len(run) == 1 or steps == [b - a for a, b in zip(run[-2], run[-1], strict=True)]
