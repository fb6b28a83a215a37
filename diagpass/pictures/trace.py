"""The schedule as a Chrome trace, for ``chrome://tracing`` and https://ui.perfetto.dev.

Two processes: the model as it stands, a cell after the other, and the waves. A row (thread) is a layer. Where
the report knows measured times (:meth:`diagpass.Report.timed`), a run lasts as long as measured; otherwise a
cell and a wave last one millisecond each, which says how many steps there are and nothing about time.
A trace of a real run with kernels is what ``torch.profiler`` exports.
"""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import Any

from diagpass.describe.figures import letter
from diagpass.pictures.layout import Grid, HasDict

__all__ = ["schedule_events", "write_trace"]

_UNIT = 1000.0  # microseconds that a step lasts where nothing was measured


def schedule_events(report: HasDict) -> list[dict[str, Any]]:
    """The events of a Chrome trace (Trace Event Format, complete events ``X`` and metadata ``M``).

    Raises
    ------
    ValueError
        If the report has no cells.
    """
    grid, told = Grid.of(report), report.to_dict()
    times = told.get("times", {})
    order = sorted(range(len(grid.cells)), key=lambda at: (grid.cells[at].segment, grid.cells[at].layer))
    sequential = {at: step for step, at in enumerate(order)}
    wavefront = {at: cell.wave for at, cell in enumerate(grid.cells)}
    events: list[dict[str, Any]] = []
    runs = (("sequential", sequential, len(order)), ("wavefront", wavefront, grid.num_waves))
    for process, (name, steps, total) in enumerate(runs, start=1):
        unit = 1e6 * times[name] / total if name in times else _UNIT
        measured = "measured" if name in times else "one unit a step, not measured"
        events.append(_meta("process_name", process, 0, {"name": f"{name} ({measured})"}))
        for layer in range(grid.layers):
            events.append(_meta("thread_name", process, layer, {"name": f"layer {layer}"}))
        for at in sorted(steps, key=lambda at: (steps[at], grid.cells[at].layer)):
            cell = grid.cells[at]
            events.append(
                {
                    "name": f"segment {cell.segment}",
                    "cat": f"kind {letter(cell.kind)}",
                    "ph": "X",
                    "ts": unit * steps[at],
                    "dur": unit,
                    "pid": process,
                    "tid": cell.layer,
                    "args": {
                        "path": told["grid"][at]["path"],
                        "segment": cell.segment,
                        "layer": cell.layer,
                        "kind": letter(cell.kind),
                        "wave": cell.wave,
                    },
                }
            )
    return events


def _meta(name: str, process: int, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "ts": 0, "pid": process, "tid": thread, "args": args}


def write_trace(report: HasDict, path: str | PathLike[str]) -> None:
    """Write the schedule as a JSON file for a trace viewer.

    Raises
    ------
    ValueError
        If the report has no cells.
    """
    told = {"traceEvents": schedule_events(report), "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(told), "utf-8")
