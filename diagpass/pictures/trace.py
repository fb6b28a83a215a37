"""The schedule, and a run, as a Chrome trace, for ``chrome://tracing`` and https://ui.perfetto.dev.

Processes are the model as it stands, a cell after the other, and the waves, each with a row (thread) a layer.
Where the report knows measured times (:meth:`diagpass.Report.timed`), a run lasts as long as measured;
otherwise a cell and a wave last one millisecond each, which says how many steps there are and nothing about
time. Where a run was measured wave by wave (``fast.measure(...)``) it is a third process: a row with the
waves as they began and ended, and a row a kind with the groups. On CUDA a fourth has the host that launched
them. A trace with kernels is what ``torch.profiler`` exports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from diagpass.describe.figures import letter, ranges
from diagpass.pictures.layout import Grid, HasDict

__all__ = ["run_events", "schedule_events", "write_trace"]

_RUN, _HOST = 3, 4  # processes; 1 and 2 are the schedules
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
    return events + run_events(told.get("measured"))


def run_events(measured: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The events of a run that was measured: its waves and groups, and on CUDA the host's part."""
    if measured is None:
        return []
    how = "the wall clock" if measured["clock"] == "wall" else "events"
    name = f"run on {measured['device']} (measured by {how})"
    events = [
        _meta("process_name", _RUN, 0, {"name": name}),
        _meta("thread_name", _RUN, 0, {"name": "waves"}),
    ]
    waves = measured["waves"]
    for kind in sorted({group["kind"] for wave in waves for group in wave["groups"]}):
        events.append(_meta("thread_name", _RUN, kind + 1, {"name": f"groups of kind {letter(kind)}"}))
    for number, wave in enumerate(waves):
        told = _about(number, [cell for group in wave["groups"] for cell in group["cells"]])
        told["kinds"] = ", ".join(dict.fromkeys(letter(group["kind"]) for group in wave["groups"]))
        events.append(_span(f"wave {number}", "wave", _RUN, 0, (wave["begin"], wave["end"]), told))
        for group in wave["groups"]:
            kind = letter(group["kind"])
            told = {"kind": kind, **_about(number, group["cells"])}
            name = f"{kind} x {len(group['cells'])}"
            span = group["begin"], group["end"]
            events.append(_span(name, f"kind {kind}", _RUN, group["kind"] + 1, span, told))
    launched = [(number, wave["host"]) for number, wave in enumerate(waves) if wave["host"] is not None]
    if launched:
        events.append(_meta("process_name", _HOST, 0, {"name": "host (launches the waves)"}))
        events += [_span(f"wave {at}", "host", _HOST, 0, span, {"wave": at}) for at, span in launched]
    return events


def _about(wave: int, cells: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a viewer shows of a wave or group: which one, how wide, which cells."""
    return {
        "wave": wave,
        "width": len(cells),
        "segments": ranges(sorted({segment for segment, _ in cells})),
        "layers": ranges(sorted({layer for _, layer in cells})),
        "cells": [f"segment {segment}, layer {layer}" for segment, layer in cells],
    }


def _span(
    name: str, category: str, process: int, thread: int, span: Sequence[float], args: dict[str, Any]
) -> dict[str, Any]:
    begin, end = span
    start, lasts = round(1e6 * begin, 3), max(round(1e6 * (end - begin), 3), 1e-3)  # to the nanosecond
    found = {"name": name, "cat": category, "ph": "X", "ts": start, "dur": lasts}
    return {**found, "pid": process, "tid": thread, "args": args}


def _meta(name: str, process: int, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "ts": 0, "pid": process, "tid": thread, "args": args}


def write_trace(report: HasDict, path: str | PathLike[str]) -> None:
    """Write the schedule, and the run if the report is of one, as a JSON file for a trace viewer.

    Raises
    ------
    ValueError
        If the report has no cells.
    """
    told = {"traceEvents": schedule_events(report), "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(told), "utf-8")
