"""TORCH_LOGS, artifacts of TORCH_TRACE, scripts for bug reports, progress."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diagpass
from diagpass.cli import sample
from diagpass.describe.progress import Progress

ROOT = Path(__file__).parent.parent
CODE = """
import diagpass
from diagpass.cli import sample
model, inputs = sample.build(layers=2, segments=2, width=4)
diagpass.transform(model, inputs, options={"compiler": "eager", "schedule": "wavefront"})
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_torch_logs_and_torch_trace_show_the_stages(tmp_path: Path) -> None:
    said = run("-c", CODE, TORCH_LOGS="+diagpass", TORCH_TRACE=str(tmp_path)).stderr
    for words in ("find cells: 0.", "4 cells of 1 kinds, 4 dependencies, 3 waves", "cells batched"):
        assert words in said, said
    traced = "".join(path.read_text() for path in tmp_path.iterdir())
    for name in ("diagpass_before", "diagpass_after"):
        assert name in traced
    assert "wave1_kind0_w2" in traced


def test_a_saved_repro_runs_and_agrees(tmp_path: Path) -> None:
    model, inputs = sample.build(layers=2, segments=3, width=4)
    report = diagpass.explain(model, *inputs)
    report.save_repro(tmp_path / "repro.py")
    said = run(str(tmp_path / "repro.py")).stdout
    assert "2 layers x 3 segments, 6 cells" in said and "4 waves" in said
    differences = [
        float(line.rpartition(" ")[2]) for line in said.splitlines() if "largest difference" in line
    ]
    assert differences and max(differences) < 1e-5


def test_a_report_without_a_graph_has_no_repro(tmp_path: Path) -> None:
    model, inputs = sample.build(layers=2, segments=2, width=4)
    step = diagpass.SegmentLoop(model, segment_size=1, dim=0)
    report = diagpass.explain(step, *inputs)
    with pytest.raises(diagpass.DiagpassError, match="no graph to save"):
        report.save_repro(tmp_path / "none.py")


def test_progress_is_a_line_a_stage_or_nothing() -> None:
    out = io.StringIO()
    with Progress("work", stream=out) as progress:
        for at in range(3):
            progress.show("part: a" if at < 2 else "rest", at, 3)
    first, *stages, last = out.getvalue().splitlines()
    assert first == "work ..." and stages == ["work: part", "work: rest"] and last.startswith("work: 0.")
    quiet = io.StringIO()
    with Progress("work", silent=True, stream=quiet) as progress:
        progress.show("part", 0, 1)
    assert not quiet.getvalue()


def test_progress_is_a_bar_on_a_terminal() -> None:
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress("work", stream=out) as progress:
        progress.show("part", 1, 2)
    assert "work: 0." not in out.getvalue() and "part" in out.getvalue()
