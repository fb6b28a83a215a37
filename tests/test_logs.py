"""TORCH_LOGS, artifacts of TORCH_TRACE, scripts for bug reports, progress."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import diagpass
from diagpass.cli import sample
from diagpass.describe.progress import Progress
from diagpass.stages import listening
from examples import armt
from tests import rolled_models

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


def _agrees(report: Any, path: Path) -> str:
    report.save_repro(path)
    said = run(str(path)).stdout
    differences = [
        float(line.rpartition(" ")[2]) for line in said.splitlines() if "largest difference" in line
    ]
    assert differences and max(differences) < 1e-5
    return said


def test_a_saved_repro_runs_and_agrees(tmp_path: Path) -> None:
    model, inputs = sample.build(layers=2, segments=3, width=4)
    said = _agrees(diagpass.explain(model, *inputs), tmp_path / "repro.py")
    assert "2 layers x 3 segments, 6 cells" in said and "4 waves" in said


def test_a_saved_repro_has_the_operations_on_constants(tmp_path: Path) -> None:
    """Positions, masks: what no input goes into is not traced unless one sees to it."""
    model, inputs = armt.build(base="llama", layers=2, segments=2, batch=1, d_model=32, heads=2)
    report = diagpass.explain(model, *inputs)
    assert "arange" in str(report.repro() if callable(report.repro) else report.repro)
    assert "2 layers x 2 segments, 4 cells" in _agrees(report, tmp_path / "repro.py")


def test_the_repro_of_a_loop_rebuilds_it(tmp_path: Path) -> None:
    """A fresh process that can import the classes runs it: report, both runs, comparison."""
    loop = rolled_models.build("gru")
    weight = next(loop.parameters())
    torch.nn.init.constant_(weight, 0.125)
    report = diagpass.explain(loop, rolled_models.inputs("gru", 12))
    report.save_repro(tmp_path / "repro.py")
    text = (tmp_path / "repro.py").read_text()
    assert "tests.rolled_models" in text.partition("import base64")[0] and "NEEDED = []" in text
    said = run(str(tmp_path / "repro.py")).stdout
    assert str(report) in said and "output[1][0]: unbatched 0.00e+00, batched" in said
    again, (x,), _ = runpy.run_path(str(tmp_path / "repro.py"))["build"]()
    assert next(again.parameters()).unique().tolist() == [0.125] and x.shape[1] == 12


OWN = """
import torch, diagpass

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.state = torch.nn.Linear(4, 4), torch.zeros(2, 4)
    def forward(self, x):
        self.state = torch.tanh(self.linear(x) + self.state)
        return self.state

def loop():
    return diagpass.SegmentLoop(torch.nn.Sequential(Layer(), Layer()), segment_size=2, dim=0)
"""


def test_the_repro_of_what_a_program_defines_itself_says_what_to_paste(tmp_path: Path) -> None:
    script, repro = tmp_path / "own.py", tmp_path / "repro.py"
    script.write_text(OWN + f"diagpass.explain(loop(), torch.randn(6, 4)).save_repro({str(repro)!r})\n")
    run(str(script))
    text = repro.read_text()
    assert f"Paste Layer (from {script}) below" in text
    failed = subprocess.run([sys.executable, str(repro)], capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and "paste the definitions of Layer into this script" in failed.stderr
    before, marker, after = text.partition("# Paste here")
    repro.write_text(before + OWN.partition("def loop")[0] + marker + after)
    assert "output: unbatched 0.00e+00" in run(str(repro)).stdout


def test_a_model_that_was_not_captured_is_saved_itself(tmp_path: Path) -> None:
    model = torch.nn.Sequential(Breaks(), Breaks())
    report = diagpass.explain(model, torch.ones(2, 4))
    assert report.verdict == "sequential"
    report.save_repro(tmp_path / "repro.py")
    said = run(str(tmp_path / "repro.py")).stdout
    assert "could not be captured as one graph" in said and "there is no wavefront to verify" in said


class Breaks(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    model, inputs = sample.build(layers=2, segments=2, width=4)
    loop = diagpass.SegmentLoop(model, segment_size=1, dim=0, reset=lambda step: None)
    with pytest.raises(diagpass.DiagpassError, match=r"cannot be written into a script: .*lambda"):
        diagpass.explain(loop, *inputs).save_repro(tmp_path / "none.py")
    fast = diagpass.transform(loop, inputs, options={"compiler": "eager"})
    with pytest.raises(diagpass.DiagpassError, match=r"use diagpass.explain\(model, \*inputs\).save_repro"):
        fast.report.save_repro(tmp_path / "none.py")


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


def stages(work: Callable[[], object]) -> list[tuple[str, int, int]]:
    said: list[tuple[str, int, int]] = []
    with listening(lambda *what: said.append(what)), torch.no_grad():
        work()
    return said


def test_capture_batching_and_compilation_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("torch._inductor.compile", lambda graph, inputs: graph)
    model, inputs = sample.build(layers=3, segments=3, width=4)
    fast = diagpass.transform(model, options={"schedule": "wavefront", "form": "batched"})
    with caplog.at_level("INFO", logger="diagpass"):
        said = stages(lambda: fast(*inputs))
    names = list(dict.fromkeys(name.partition(":")[0] for name, *_ in said))
    assert names[0] == "capture" and names[-3:] == ["batch kinds and emit", "batch", "compile"]
    compiled = [(name, done, total) for name, done, total in said if name.startswith("compile")]
    assert [done for _, done, _ in compiled] == list(range(2)) and {total for *_, total in compiled} == {2}
    assert (
        re.search(r"find cells: \d+\.\d{3} s", caplog.text) and "compiled kind0_any_width in" in caplog.text
    )
    assert not stages(lambda: fast(*inputs))


def test_the_segments_of_a_loop_are_counted() -> None:
    loop, x = rolled_models.build("gru"), rolled_models.inputs("gru", 5 * rolled_models.T)
    fast = diagpass.transform(loop, options={"compiler": "eager", "schedule": "wavefront"})
    said = stages(lambda: fast(x))
    assert [(done, total) for name, done, total in said if name == "segments"] == [(at, 5) for at in range(5)]
    assert any(name.startswith("capture: behaviour 1") for name, *_ in said)


def test_the_library_is_silent_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = sample.build(layers=2, segments=3, width=4)
    with torch.no_grad():
        fast = diagpass.transform(model, options={"compiler": "eager", "schedule": "wavefront"})
        fast(*inputs)
        assert capfd.readouterr() == ("", "")
        with diagpass.Progress("asked"):
            diagpass.explain(model, *inputs)
        said = capfd.readouterr()
    assert not said.out and "asked: capture\n" in said.err and "asked: find cells\n" in said.err
    with diagpass.Progress("silent", silent=True):
        diagpass.explain(model, *inputs)
    assert capfd.readouterr() == ("", "")
