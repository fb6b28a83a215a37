"""Pictures: they are drawn for small and large grids, and a trace is what viewers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from diagpass.pictures import grid_text, plot_curves, plot_gantt, plot_grid, schedule_events
from diagpass.pictures.layout import Grid


class Diagonal:
    """A report of ``layers`` x ``segments`` with the two usual kinds of dependency."""

    def __init__(self, layers: int, segments: int, times: dict[str, float] | None = None) -> None:
        self.grid = [
            {"segment": s, "layer": n, "path": f"layers.{n}", "kind": int(s > 0), "wave": s + n}
            for s in range(segments)
            for n in range(layers)
        ]
        self.edges = [[at, at + 1] for at, cell in enumerate(self.grid) if cell["layer"] < layers - 1]
        self.edges += [[at, at + layers] for at in range(layers * (segments - 1))]
        waves: list[dict[int, list[int]]] = [{} for _ in range(layers + segments - 1)]
        for at, cell in enumerate(self.grid):
            waves[cell["wave"]].setdefault(cell["kind"], []).append(at)
        self.schedule = [[{"kind": kind, "cells": cells} for kind, cells in wave.items()] for wave in waves]
        self.times = times or {}

    def to_dict(self) -> dict[str, Any]:
        return vars(self)


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:4] == b"\x89PNG"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("layers, segments", [(2, 3), (16, 128)])
def test_grid_and_gantt_are_drawn(tmp_path: Path, layers: int, segments: int) -> None:
    report = Diagonal(layers, segments)
    for plot in (plot_grid, plot_gantt):
        plot(report, tmp_path / "picture.png")
        width, height = size(tmp_path / "picture.png")
        assert width > 1000 and 300 < height < 3000


def test_an_empty_report_is_an_error() -> None:
    report = Diagonal(1, 1)
    report.grid, report.edges, report.schedule = [], [], []
    for draw in (grid_text, schedule_events, Grid.of):
        with pytest.raises(ValueError, match="no cells"):
            draw(report)


def test_curves_from_benchmark_rows(tmp_path: Path) -> None:
    rows = [
        {
            "case": case,
            "preset": "1b",
            "segment": 1024,
            "tokens": tokens,
            "ms": tokens / f,
            "peak_bytes": peak,
        }
        for case, f, peak in (("sequential", 10, None), ("wavefront", 20, 2e9))
        for tokens in (4096, 8192)
    ]
    (tmp_path / "rows.json").write_text(__import__("json").dumps(rows))
    plot_curves(tmp_path / "rows.json", tmp_path / "curves.png", preset="1b")
    assert size(tmp_path / "curves.png")[0] > 1000
    with pytest.raises(ValueError, match="no benchmark row has preset='7b'"):
        plot_curves(rows, tmp_path / "none.png", preset="7b")


EVENT = {
    "type": "object",
    "required": ["name", "ph", "ts", "pid", "tid"],
    "properties": {
        "name": {"type": "string"},
        "cat": {"type": "string"},
        "ph": {"enum": ["X", "M"]},
        "ts": {"type": "number", "minimum": 0},
        "dur": {"type": "number", "exclusiveMinimum": 0},
        "pid": {"type": "integer"},
        "tid": {"type": "integer"},
        "args": {"type": "object"},
    },
    "if": {"properties": {"ph": {"const": "X"}}},
    "then": {"required": ["dur", "args"]},
}


def test_the_trace_is_in_the_trace_event_format_and_no_row_overlaps() -> None:
    events = schedule_events(Diagonal(3, 4, {"sequential": 0.012}))
    jsonschema.validate(events, {"type": "array", "items": EVENT})
    rows: dict[tuple[int, int], float] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        row = event["pid"], event["tid"]
        assert event["ts"] >= rows.get(row, 0.0) - 1e-6
        rows[row] = event["ts"] + event["dur"]
    assert max(end for (process, _), end in rows.items() if process == 1) == pytest.approx(12_000)
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["sequential (measured)", "wavefront (one unit a step, not measured)"]
