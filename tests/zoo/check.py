"""Run a case both ways, hold it against what is known by hand, and return the figures of its row.

The same function serves the tests and the table: what docs/models.md says was asserted.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

import diagpass
from tests.helpers import (
    assert_state_same,
    assert_tree_same,
    check_schedule,
    clone_tree,
    collect_warnings,
    count_matmuls,
    fast_copy,
)
from tests.zoo.case import Case


@dataclass(frozen=True)
class Figures:
    """What a run showed."""

    verdict: str
    waves: int
    layers: int
    segments: int
    batched: float
    matmuls: tuple[int, int]
    reason: str


def run(case: Case) -> Figures:
    """Sequential, wavefront, and wavefront unbatched: outputs, final state, schedule, matrix products."""
    model, inputs = case.make()
    plain = copy.deepcopy(model)
    expected = call(plain, inputs)
    with collect_warnings() as warned:
        fast = fast_copy(model)
        if case.refused and "chain" not in case.refused:
            got = call(fast, inputs)
            report = fast.report
            assert report.ran == "sequential" and case.refused in str(report.reason), str(report)
        else:
            got = call(fast, inputs)
            report = fast.report
            assert report.ran == "wavefront", str(report)
            check_schedule(report)
            assert (report.layers, report.segments) == (case.layers, case.segments), str(report)
            assert report.waves == case.waves(case.layers, case.segments), str(report)
    rtol = 1e-5 if case.float32_inside else 1e-10
    assert_tree_same(got, expected, rtol, f"{case.name}: output")
    assert_state_same(fast.original, plain, rtol, f"{case.name}: state")
    batched = report.batched_cells / report.cells if report.cells else 0.0
    matmuls = 0, 0
    if case.refused:
        assert case.refused in str(report.reason), str(report)
    else:
        assert report.verdict == "wavefront" and not warned, warned
        assert batched >= case.batched or case.prevented in " ".join(report.notes), str(report)
        check_unbatched(case, model, inputs, fast, expected)
        matmuls = check_matmuls(case, plain, fast, inputs, report)
    return Figures(
        report.verdict, report.waves, report.layers, report.segments, batched, matmuls, report.reason or ""
    )


def call(model: Any, inputs: tuple[Any, ...]) -> Any:
    """One call without gradients, on copied inputs."""
    with torch.no_grad():
        return model(*clone_tree(inputs))


def check_unbatched(case: Case, model: Any, inputs: Any, fast: Any, expected: Any) -> None:
    """The schedule run one cell at a time gives the very bits of the sequential run."""
    if isinstance(model, diagpass.SegmentLoop):  # needs no second capture
        figures = fast.verify(*inputs)
        assert figures and all(errors["unbatched"] == 0.0 for errors in figures.values()), figures
    else:
        got = call(fast_copy(model, max_width=1), inputs)
        assert_tree_same(got, expected, 0.0, f"{case.name}, unbatched: output")


def check_matmuls(case: Case, plain: Any, fast: Any, inputs: Any, report: diagpass.Report) -> tuple[int, int]:
    """Matrix products at the dispatcher, sequential and as a wavefront: one for a group, not for a cell.

    A cell has at least as many as a segment has outside of cells, so with c cells in g groups and S segments
    at most (g + S) / (c + S) of the sequential number are left.
    """
    before = count_matmuls(lambda: plain(*clone_tree(inputs)))
    after = count_matmuls(lambda: fast(*clone_tree(inputs)))
    groups = sum(len(wave) for wave in report.to_dict()["schedule"])
    most = (groups + report.segments) / (report.cells + report.segments)
    assert after <= most * before, f"{case.name}: {after} matrix products after {before}, {groups} groups"
    return before, after
