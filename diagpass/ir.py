"""The vocabulary that the stages share: small frozen dataclasses, nothing else.

A *cell* is one layer applied to one segment; a *kind* is a set of cells whose graphs are the same up
to weights, state and inputs; a *wave* is a set of cells with no path between them; a *group* is the
cells of one kind in a wave. *Glue* is every operation that belongs to no cell.

``CellGraph`` is what analysis hands to lowering: the functional FX graph, who owns which node, and
the dependencies between cells as a networkx graph over cell indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import networkx as nx
import torch.fx as fx

__all__ = ["Cell", "CellGraph", "Edge", "Group", "Kind", "Schedule", "Slot", "Wave"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One layer applied to one segment.

    ``path`` is the module path (of the first module where siblings were joined), ``layer`` and
    ``segment`` count from 0, ``nodes`` are in program order.
    """

    index: int
    path: str
    layer: int
    segment: int
    nodes: tuple[fx.Node, ...]

    def __str__(self) -> str:
        return f"{self.path} at segment {self.segment}"


@dataclasses.dataclass(frozen=True)
class Slot:
    """One operand of a kind: what its cells read from outside.

    ``literal`` is true for a Python number that differs from cell to cell. ``sources`` has, per cell
    of the kind (same order as ``Kind.cells``), the node that is read or the number itself.
    """

    name: str
    literal: bool
    sources: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Cells that run the same code.

    ``body`` takes the slots in order and returns a tuple with one value per entry of ``outputs``;
    ``outputs[i][j]`` is the node of cell ``cells[j]`` that result i stands for, or None if that cell
    does not have it (nobody reads it).
    """

    index: int
    cells: tuple[int, ...]
    body: fx.GraphModule
    slots: tuple[Slot, ...]
    outputs: tuple[tuple[fx.Node | None, ...], ...]
    unbatchable: str | None = None


@dataclasses.dataclass(frozen=True)
class Edge:
    """A dependency between two cells: ``source`` must run before ``target``."""

    source: Cell
    target: Cell

    def __str__(self) -> str:
        return (
            f"output of {self.source.path} at segment {self.source.segment} "
            f"feeds {self.target.path} at segment {self.target.segment}"
        )


@dataclasses.dataclass(frozen=True)
class CellGraph:
    """A functional graph cut into cells and glue.

    ``owner`` maps each node of a cell to the cell's index (glue is absent); ``dag`` has an edge i -> j
    where cell j reads, directly or through glue, a value of cell i.
    """

    graph: fx.GraphModule
    cells: tuple[Cell, ...]
    kinds: tuple[Kind, ...]
    owner: Mapping[fx.Node, int]
    dag: nx.DiGraph
    notes: tuple[str, ...] = ()

    @property
    def kind_of(self) -> dict[int, int]:
        """Cell index to kind index."""
        return {cell: kind.index for kind in self.kinds for cell in kind.cells}


@dataclasses.dataclass(frozen=True)
class Group:
    """Cells of one kind that run in one batched call, ordered by layer, then segment."""

    kind: int
    cells: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Wave:
    """Groups with no path between any two of their cells."""

    groups: tuple[Group, ...]

    @property
    def width(self) -> int:
        """The number of cells in the wave."""
        return sum(len(group.cells) for group in self.groups)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The waves in the order in which they run."""

    waves: tuple[Wave, ...]

    @property
    def max_width(self) -> int:
        """The widest wave, in cells; 0 without cells."""
        return max((wave.width for wave in self.waves), default=0)

    @property
    def mean_width(self) -> float:
        """Cells per wave on average; 0.0 without cells."""
        return sum(wave.width for wave in self.waves) / len(self.waves) if self.waves else 0.0
