"""What was found and what was done: :class:`Report`, as text, as plain data and in a notebook.

The keys of :meth:`Report.to_dict` are described by the JSON schema in ``report.schema.json``
(:func:`schema`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diagpass.describe.advice import advise
from diagpass.describe.estimate import estimate
from diagpass.describe.facts import block_facts, kind_facts, path_facts, state_bytes, wave_bytes
from diagpass.describe.places import crossing, line_of, short
from diagpass.describe.text import as_html, as_rich, as_text
from diagpass.describe.work import NO_WORK, work_of
from diagpass.errors import DiagpassError
from diagpass.ir import CellGraph, Edge
from diagpass.machine import Machine
from diagpass.pipeline import Analysis, Refusal

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Report", "make_report", "refusal_facts", "schema"]

_HIDDEN = ("code", "repro")


@dataclasses.dataclass(frozen=True)
class Report:
    """The layer x segment grid of a model, its waves, and what became of them.

    Attributes
    ----------
    segments, layers, cells, waves, max_width
        Counts; ``max_width`` is the widest wave, in cells.
    mean_width
        Cells per wave.
    kinds
        One dict per kind: ``index``, ``cells`` (how many), ``layers`` (sorted), ``segments`` (in words),
        ``first`` (the first cell in words), ``operations``, ``flops`` (matrix products), ``bytes`` (operands
        and results), ``weight_bytes``, ``result_bytes``, ``products``, ``chains``, ``moved`` (what
        :mod:`diagpass.describe.work` says of it; all per cell), ``unbatchable`` (None or why),
        ``differs`` (None, or why it is not one with the next kind: ``kind``, ``cause``, ``text``, ``place``).
    verdict
        ``"wavefront"`` or ``"sequential"``: what the dataflow permits, whatever the speed.
    reason
        Why the verdict is sequential, or None.
    chain
        None, or the edge from a layer to a lower one at a later segment; ``str(chain)`` names both.
    notes
        Sentences worth reading.
    ran
        ``"wavefront"``, ``"sequential"``, or None where nothing has run (``explain``).
    batched_cells
        Cells that ran in groups of two or more; 0 where nothing has run.
    coverage
        Cells that run, or would run, in groups of two or more: ``batched_cells``, ``cells``, ``fraction``.
    critical_path
        The longest path: ``length`` in cells, ``cells`` (positions in the grid), ``steps`` by reach.
    blocking
        None, or the dependencies without which fewer waves would do: ``reach`` in words, ``count``,
        ``waves``, ``waves_without``, and ``source`` and ``target`` of one (``path``, ``layer``, ``segment``,
        ``operation``, ``module``, ``line``).
    refusals
        What does not run as a wavefront: ``what``, ``effect`` (``"sequential"`` or ``"unbatched"``),
        ``module``, ``line``.
    advice
        What to change, most important first; empty if nothing.
    memory
        Bytes: ``weights`` (the stacks), ``copied`` (weights held a second time), ``state`` (held from
        segment to segment), ``wave`` (results of the largest wave).
    glue
        The work of what belongs to no cell, over the whole call: ``products``, ``chains``, ``moved``.
    times
        Seconds by what was measured, such as ``"sequential"`` and ``"wavefront"`` (:meth:`timed`).
    forms
        How groups of cells ran, where that was chosen: ``kind``, ``width`` (cells), ``form`` (``"batched"``,
        ``"looped"`` or ``"single"``), ``products`` (batched matrix products), ``looped`` (of these, how many
        ran cell by cell), ``seconds`` by form (empty if nothing was measured).
    measured
        None, or what :meth:`Transformed.measure <diagpass.transform.Transformed.measure>` found: ``device``,
        ``clock`` (``"wall"`` or ``"events"``), ``seconds`` of the call that was watched, its ``flops``,
        ``matmul_rate`` (FLOPs a second of large products of ``matmul_dtype`` on this machine), ``fraction``
        of that rate, ``widths`` (per wave width ``waves``, ``median_seconds``, ``fraction``) and ``waves`` in
        the order in which they ran (``begin``, ``end``, ``host``, ``groups``; seconds since the call began).
    planning_seconds
        What the last call spent on putting cells into waves; 0.0 where the schedule is part of the capture.
    captures, plans
        How often user Python was traced, and how many plans there are.
    code
        The emitted graph as Python text, or None.
    repro
        What :meth:`save_repro` writes, or what makes it when it is asked for, or None.
    grid, edges, schedule
        See :meth:`to_dict`.
    """

    segments: int
    layers: int
    cells: int
    waves: int
    max_width: int
    mean_width: float
    kinds: list[dict[str, Any]]
    verdict: str
    reason: str | None
    chain: Edge | None
    notes: list[str]
    ran: str | None = None
    batched_cells: int = 0
    coverage: dict[str, Any] = dataclasses.field(default_factory=dict)
    critical_path: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    blocking: dict[str, Any] | None = None
    refusals: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    advice: list[str] = dataclasses.field(default_factory=list)
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    glue: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(NO_WORK), repr=False)
    measured: dict[str, Any] | None = dataclasses.field(default=None, repr=False)
    captures: int = 0
    plans: int = 0
    forms: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    planning_seconds: float = 0.0
    code: str | None = dataclasses.field(default=None, repr=False)
    repro: str | Callable[[], str] | None = dataclasses.field(default=None, repr=False)
    grid: list[dict[str, Any]] = dataclasses.field(default_factory=list, repr=False)
    edges: list[list[int]] = dataclasses.field(default_factory=list, repr=False)
    schedule: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but ``code`` and ``repro``, as plain Python values.

        ``grid`` has one entry per cell (``segment``, ``layer``, ``path``, ``kind``, ``wave``),
        ``edges`` pairs of positions in the grid (the first must run before the second), ``schedule``
        per wave the groups (``kind``, ``cells`` as positions in the grid), ``chain`` the two ends.
        """
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _HIDDEN
        }
        if self.chain is not None:
            ends = (("source", self.chain.source), ("target", self.chain.target))
            found["chain"] = {
                name: {"path": cell.path, "layer": cell.layer, "segment": cell.segment} for name, cell in ends
            }
        return found

    def to_json(self, indent: int | None = 2) -> str:
        """:meth:`to_dict` as JSON text; :func:`schema` describes it."""
        return json.dumps(self.to_dict(), indent=indent)

    def save_repro(self, path: str | PathLike[str]) -> None:
        """Write a script for a bug report: it prints the report, runs both ways and compares.

        It holds the captured graph, so that it runs anywhere, if the model is captured as one; the reports
        of ``explain`` hold else the model and its inputs without the contents of tensors, so that it runs
        where the model's classes can be imported. Values are drawn at random.

        Raises
        ------
        DiagpassError
            There is neither (the report of a call that was not captured as one graph: ask ``explain``), or
            the model cannot be pickled.
        """
        if self.repro is None:
            raise DiagpassError(
                "this report has no graph to save, since the call was not captured as one graph of fixed "
                "sizes; use diagpass.explain(model, *inputs).save_repro(path), which saves the model instead"
            )
        try:
            text = self.repro if isinstance(self.repro, str) else self.repro()
        except ValueError as error:
            raise DiagpassError(
                f"the model cannot be written into a script: {error}; a bug report needs the model's code "
                "and report.to_json()"
            ) from error
        Path(path).write_text(text, "utf-8")

    def estimate(self, machine: Machine) -> dict[str, float]:
        """Seconds by the cost model for a machine with these figures; nothing runs.

        Parameters
        ----------
        machine
            :func:`diagpass.measure_machine` measures the one at hand; another's figures may be typed in.

        Returns
        -------
        dict
            ``"sequential"``: the best sequential run, compiled, a segment in one CUDA graph; ``"wavefront"``,
            which is the larger of ``"device"`` and ``"host"``: what the kernels take, and what the host
            takes to record and launch them.

        Raises
        ------
        DiagpassError
            The machine has no figure for a data type that the model computes in.
        """
        return estimate(self.kinds, self.schedule, self.glue, self.cells, machine)

    def timed(self, **seconds: float) -> Report:
        """A copy that knows how long something took, in seconds, by name."""
        return dataclasses.replace(self, times={**self.times, **seconds})

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> Text:
        return as_rich(self)

    def _repr_html_(self) -> str:
        return as_html(self)


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of :meth:`Report.to_dict`."""
    return json.loads(resources.files("diagpass").joinpath("report.schema.json").read_text("utf-8"))


def refusal_facts(
    refusal: Refusal | None, kinds: list[dict[str, Any]], notes: list[str]
) -> list[dict[str, Any]]:
    """What does not run as a wavefront, and where it is."""
    found = []
    if refusal is not None:
        line = short(refusal.line) or line_of(refusal.reason)
        found.append({"what": refusal.reason, "effect": "sequential", "module": refusal.module, "line": line})
    for kind in kinds:
        if kind["unbatchable"]:
            what = next((note for note in notes if kind["unbatchable"] in note), kind["unbatchable"])
            first = kind["first"].partition(" at segment ")[0]
            found.append({"what": what, "effect": "unbatched", "module": first, "line": line_of(what)})
    return found


def make_report(analysis: Analysis, ran: str | None = None) -> Report:
    """The report of one plan."""
    found = analysis.cells
    cells = found.cells if found else ()
    kind_of = found.kind_of if found else {}
    waves = analysis.schedule.waves
    wave_of = {cell: at for at, wave in enumerate(waves) for group in wave.groups for cell in group.cells}
    emitted, forecast = analysis.emitted, analysis.forecast
    obstacles = forecast.obstacles if forecast else {}
    weights = forecast.weights if forecast else frozenset()
    grid = [
        {
            "segment": cell.segment,
            "layer": cell.layer,
            "path": cell.path,
            "kind": kind_of[cell.index],
            "wave": wave_of[cell.index],
        }
        for cell in cells
    ]
    edges = sorted([a, b] for a, b in found.dag.edges) if found else []
    schedule = [[{"kind": group.kind, "cells": list(group.cells)} for group in wave.groups] for wave in waves]
    kinds = (
        kind_facts(found.kinds, cells, grid, weights.__contains__, analysis.names, obstacles) if found else []
    )
    path = path_facts(grid, edges)

    def ends(before: int, after: int) -> Any:
        return crossing(cells[before].nodes, cells[after].nodes, found.owner if found else {})

    block = block_facts(grid, edges, path["cells"], ends)
    reason = analysis.refusal.reason if analysis.refusal else None
    notes = list(analysis.notes)
    would = forecast.batched_cells if forecast and analysis.refusal is None else 0
    if ran is not None:
        would = emitted.batched_cells if emitted and ran == "wavefront" else 0
    return Report(
        segments=len({cell.segment for cell in cells}),
        layers=len({cell.layer for cell in cells}),
        cells=len(cells),
        waves=len(waves),
        max_width=analysis.schedule.max_width,
        mean_width=analysis.schedule.mean_width,
        kinds=kinds,
        verdict=analysis.verdict,
        reason=reason,
        chain=analysis.chain,
        notes=notes,
        ran=ran,
        batched_cells=would if ran is not None else 0,
        coverage=coverage_facts(would, len(cells)),
        critical_path=path,
        blocking=block,
        refusals=refusal_facts(analysis.refusal, kinds, notes),
        advice=advise(reason, kinds, block, len(cells)),
        memory={
            "weights": forecast.stacked_bytes if forecast else 0,
            "copied": forecast.copied_bytes if forecast else 0,
            "state": state_bytes(found) if found else 0,
            "wave": wave_bytes(schedule, kinds),
        },
        glue=_glue(found),
        code=emitted.module.code if emitted else None,
        repro=analysis.repro,
        grid=grid,
        edges=edges,
        schedule=schedule,
    )


def _glue(found: CellGraph | None) -> dict[str, Any]:
    if found is None:
        return dict(NO_WORK)
    return work_of(node for node in found.graph.graph.nodes if node not in found.owner)


def coverage_facts(batched: int, cells: int) -> dict[str, Any]:
    """How much runs in groups of two or more."""
    return {"batched_cells": batched, "cells": cells, "fraction": batched / cells if cells else 0.0}
