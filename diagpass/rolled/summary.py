"""A run -> its :class:`~diagpass.report.Report`, and why it is too narrow if it is."""

from __future__ import annotations

from typing import Any

from diagpass.capture.marks import source_line
from diagpass.describe.advice import advise
from diagpass.describe.facts import block_facts, kind_facts, path_facts, wave_bytes
from diagpass.describe.work import total_work, work_of
from diagpass.errors import ChainError
from diagpass.ir import Cell, Edge
from diagpass.options import Options
from diagpass.pipeline import LEAST_MEAN_WIDTH, Refusal, records
from diagpass.report import Report, coverage_facts, refusal_facts
from diagpass.rolled.forecast import Prediction, ends, input_names, predict, weight_bytes
from diagpass.rolled.program import Lump
from diagpass.rolled.run import Conflict, Run

__all__ = ["accepted", "narrowness", "rolled_report"]


def narrowness(run: Run) -> Refusal:
    """Why a steady state leaves no width."""
    chain = _chain(run)
    if chain is not None:
        line = next(filter(None, map(source_line, reversed(chain.source.nodes))), None)
        where = f" ({line})" if line else ""
        return Refusal(
            f"a chain leaves no width: {chain}{where}, so each wave has {run.steady_width():.2f} cells",
            ChainError,
            legal=True,
            module=chain.source.path,
            line=line,
        )
    if len(run.layers) == 1:
        return Refusal("the step has one repeated layer, so no cell can run beside another", legal=True)
    return Refusal(
        f"the dependencies leave no width: each wave has {run.steady_width():.2f} cells", legal=True
    )


def accepted(run: Run, options: Options) -> Refusal:
    """Why a steady state leaves no width, where its cells run all the same: compiled and recorded.

    Raises
    ------
    Conflict
        They do not, or strict mode wants a wavefront.
    """
    refusal = narrowness(run)
    if options.strict or not records(options, {run.kinds.device.type}):
        raise Conflict("", refusal)
    return refusal


def rolled_report(run: Run | None, session: Any, refusal: Refusal | None, ran: str | None) -> Report:
    """The report of a call, a stream or a capture; without a run, of one that was not deferred."""
    plans = len(session.programs)
    if run is None:
        reason = refusal.reason if refusal else None
        return Report(
            segments=0,
            layers=0,
            cells=0,
            waves=0,
            max_width=0,
            mean_width=0.0,
            kinds=[],
            verdict="sequential",
            reason=reason,
            chain=None,
            notes=[],
            ran=ran,
            coverage=coverage_facts(0, 0),
            critical_path=path_facts([], []),
            memory={"weights": 0, "copied": 0, "state": 0, "wave": 0},
            refusals=refusal_facts(refusal, [], []),
            advice=advise(reason, [], None, 0),
            captures=session.captures,
            plans=plans,
        )
    kinds = session.kinds
    waves = sorted({wave for *_, wave in run.grid})
    place = {wave: at for at, wave in enumerate(waves)}
    by_wave: list[dict[int, list[int]]] = [{} for _ in waves]
    for at, (_, _, number, wave) in enumerate(run.grid):
        by_wave[place[wave]].setdefault(kinds.of(number)[0].index, []).append(at)
    schedule = [[{"kind": kind, "cells": cells} for kind, cells in sorted(wave.items())] for wave in by_wave]
    grid = [
        {
            "segment": segment,
            "layer": layer,
            "path": kinds.cells[number].path,
            "kind": kinds.of(number)[0].index,
            "wave": place[wave],
        }
        for segment, layer, number, wave in run.grid
    ]
    edges = sorted([before, after] for after, behind in enumerate(run.edges) for before in behind)
    used = {number for _, _, number, _ in run.grid}
    mine = [kind for kind in kinds.kinds if used.intersection(kind.cells)]
    mean = run.cells / run.waves if run.waves else 0.0
    narrow = refusal
    if refusal is None and mean < LEAST_MEAN_WIDTH and run.max_width is None:
        narrow = (
            Refusal("the input has one segment, so no cell can run beside another")
            if run.segments == 1
            else narrowness(run)
        )
    forecast = predict(run) if run.dry and narrow is None else Prediction(run.batched_cells, {})
    facts = kind_facts(mine, kinds.cells, grid, kinds.is_weight, input_names(session), forecast.obstacles)
    path = path_facts(grid, edges)
    block = block_facts(grid, edges, path["cells"], lambda a, b: ends(run, session, a, b))
    reason = narrow.reason if narrow else None
    notes = list(kinds.notes)
    stacked, copied = weight_bytes(kinds)
    return Report(
        segments=run.segments,
        layers=len(run.layers),
        cells=run.cells,
        waves=run.waves,
        max_width=run.widest,
        mean_width=mean,
        kinds=facts,
        verdict="sequential" if narrow else "wavefront",
        reason=reason,
        chain=_chain(run),
        notes=notes,
        ran=ran,
        batched_cells=run.batched_cells,
        coverage=coverage_facts(forecast.batched_cells, run.cells),
        critical_path=path,
        blocking=block,
        refusals=refusal_facts(narrow, facts, notes),
        advice=advise(reason, facts, block, run.cells),
        memory={
            "weights": stacked,
            "copied": copied,
            "state": run.state_bytes,
            "wave": wave_bytes(schedule, facts),
        },
        glue=total_work(
            (work_of(unit.module.graph.nodes), times)
            for program, times in run.programs.items()
            for unit in program.units
            if isinstance(unit, Lump)
        ),
        captures=session.captures,
        plans=plans,
        forms=[] if run.dry else kinds.form_facts(),
        planning_seconds=run.seconds,
        grid=grid,
        edges=edges,
        schedule=schedule,
    )


def _chain(run: Run) -> Edge | None:
    """The edge from a layer to a lower one at a later segment that drops most, then spans least."""
    worst: tuple[tuple[int, int, int, int], Edge] | None = None
    for after, behind in enumerate(run.edges):
        for before in behind:
            (s0, l0, n0, _), (s1, l1, n1, _) = run.grid[before], run.grid[after]
            if l0 <= l1 or s1 <= s0:
                continue
            rank = (l1 - l0, s1 - s0, s0, before)
            if worst is None or rank < worst[0]:
                cells = run.kinds.cells
                ends = (
                    Cell(before, cells[n0].path, l0, s0, cells[n0].nodes),
                    Cell(after, cells[n1].path, l1, s1, ()),
                )
                worst = (rank, Edge(*ends))
    return None if worst is None else worst[1]
