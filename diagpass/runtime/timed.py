"""The emitted wavefront graph, run node by node under a clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.fx as fx

from diagpass.ir import Cell
from diagpass.runtime.clock import Clock

__all__ = ["TimedWaves"]


class TimedWaves(fx.Interpreter):
    """Runs the graph that ``emit`` made and notes when its waves and groups begin and end.

    A wave begins with the first node that was made for it: glue and gathering that it needs are its own.

    Parameters
    ----------
    module
        The emitted graph.
    cells
        The cells that its groups number.
    clock
        What takes the notes.
    """

    def __init__(self, module: fx.GraphModule, cells: Sequence[Cell], clock: Clock) -> None:
        super().__init__(module)
        self._cells, self._clock = cells, clock
        self._wave: int | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, under the clock where it is a group."""
        wave = n.meta.get("wave")
        if wave != self._wave:
            if self._wave is not None:
                self._clock.close_wave()
            if wave is not None:
                self._clock.open_wave()
            self._wave = wave
        group = n.meta.get("group")
        if group is None:
            return super().run_node(n)
        cells = tuple((self._cells[at].segment, self._cells[at].layer) for at in group.cells)
        with self._clock.group((group.kind, cells)):
            return super().run_node(n)
