"""What a recorded run would batch and hold, and where its dependencies are in the user's code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch.fx as fx

from diagpass.capture.marks import attribute_path
from diagpass.describe.cost import stack_bytes
from diagpass.describe.places import Ends, crossing, reaches
from diagpass.describe.predict import obstacles
from diagpass.lowering.weights import plan_weights
from diagpass.rolled.kinds import Kinds
from diagpass.rolled.run import Run
from diagpass.runtime.stacks import ALIGNMENT

__all__ = ["Prediction", "ends", "input_names", "predict", "weight_bytes"]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Cells that would run in groups of two or more, and by kind what stands in the way."""

    batched_cells: int
    obstacles: Mapping[int, str]


def predict(run: Run) -> Prediction:
    """What the recorded cells would run in, without running them: one trace a kind."""
    kinds = run.kinds
    found = obstacles(kinds.kinds)
    kinds.replan()
    waves: dict[int, list[tuple[int, int, int]]] = {}
    for segment, layer, number, wave in run.grid:
        waves.setdefault(wave, []).append((layer, segment, number))
    batched = 0
    for cells in waves.values():
        cells.sort()
        limit = run.width or len(cells)
        for start in range(0, len(cells), limit):
            by_kind: dict[int, list[int]] = {}
            for _, _, number in cells[start : start + limit]:
                by_kind.setdefault(kinds.of(number)[0].index, []).append(number)
            for kind, numbers in by_kind.items():
                if kind not in found:
                    batched += sum(len(group) for group in kinds.split(numbers) if len(group) > 1)
    return Prediction(batched, found)


def weight_bytes(kinds: Kinds) -> tuple[int, int]:
    """Bytes of the weight stacks, and of those among them that are a second copy."""
    numbers, objects = kinds.numbered()
    plan = plan_weights(kinds.kinds, lambda at: kinds.cells[at].layer, numbers)
    sizes = [stack_bytes((objects[row] for row in stack.rows), ALIGNMENT) for stack in plan.stacks]
    shared = [kinds.options.weights == "share" and stack.owns for stack in plan.stacks]
    return sum(sizes), sum(size for size, is_shared in zip(sizes, shared, strict=True) if not is_shared)


def input_names(session: Any) -> dict[fx.Node, str]:
    """What the user calls the inputs of the captured graphs."""
    return {
        node: attribute_path(name)
        for program in session.programs
        for node, name in zip(program.placeholders, program.step.names, strict=True)
    }


def ends(run: Run, session: Any, before: int, after: int) -> Ends:
    """Where one recorded cell's result reaches another, perhaps segments later."""
    cells = run.kinds.cells
    source, target = cells[run.grid[before][2]].nodes, cells[run.grid[after][2]].nodes
    owner = {node: number for number, cell in enumerate(cells) for node in cell.nodes}
    if run.grid[before][0] == run.grid[after][0]:
        return crossing(source, target, owner)
    made, glue = reaches(source[0].graph.find_nodes(op="output")[0], source, owner) or (None, None)
    state = _state_inputs(session)
    for consumer in target:
        if reaches(consumer, state, owner) is not None:
            return made, glue, consumer
    return made, glue, None


def _state_inputs(session: Any) -> set[fx.Node]:
    """Inputs of the captured graphs that come from the segment before, by their names."""
    return {
        node
        for program in session.programs
        for node, name, is_weight in zip(
            program.placeholders, program.step.names, program.step.weights, strict=True
        )
        if not is_weight and not name.startswith(("L['args'][0]", "L['kwargs']"))
    }
