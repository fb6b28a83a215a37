"""A run that is measured: its waves are those of the schedule, its results and state those of any call."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import diagpass
from diagpass.cli import sample
from diagpass.describe.measured import measured_facts
from diagpass.pictures import write_trace
from diagpass.pictures.trace import run_events
from diagpass.report import schema
from diagpass.rolled import run as run_module
from diagpass.runtime import clock as clock_module
from diagpass.runtime.clock import Clock, measuring
from tests import rolled_models, tape
from tests.helpers import assert_state_same, assert_tree_same, clone_tree, fast_copy, forced, snapshot
from tests.models import ZOO
from tests.test_pictures import EVENT
from tests.test_whole import Whole

GOLDEN = Path(__file__).parent / "golden" / "run-trace.json"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of timing is enough here."""
    monkeypatch.setattr("diagpass.measured.LEAST", 1)
    monkeypatch.setattr("diagpass.measured.BUDGET", 0.0)
    monkeypatch.setattr("diagpass.measured.matmul_rate", lambda device, dtype: 1e9)


def check_measured(fast: Any, *inputs: Any) -> diagpass.Report:
    """Measure a call; the waves are as scheduled, the state as before, a later call as without."""
    before, given = snapshot(fast.original), clone_tree(inputs)
    report = fast.measure(*inputs)
    assert_state_same(fast.original, before)
    assert_tree_same(inputs, given, 0.0, "input ")
    jsonschema.validate(report.to_dict(), schema())
    found, at = report.measured, [(cell["segment"], cell["layer"]) for cell in report.grid]
    assert found is not None and found["device"] == "cpu" and found["clock"] == "wall"
    ran = [
        sorted(tuple(cell) for group in wave["groups"] for cell in group["cells"]) for wave in found["waves"]
    ]
    assert ran == [sorted(at[cell] for group in wave for cell in group["cells"]) for wave in report.schedule]
    kind_of = {(cell["segment"], cell["layer"]): cell["kind"] for cell in report.grid}
    last = 0.0
    for wave in found["waves"]:
        assert last <= wave["begin"] < wave["end"] <= found["seconds"]
        last = wave["begin"]
        for group in wave["groups"]:
            assert last <= group["begin"] < group["end"] <= wave["end"]
            last = group["begin"] if wave["groups"][0]["begin"] == group["begin"] else group["end"]
            assert {kind_of[tuple(cell)] for cell in group["cells"]} == {group["kind"]}
        last = wave["end"]
    assert sum(each["waves"] for each in found["widths"]) == report.waves
    assert found["flops"] == sum(kind["flops"] * kind["cells"] for kind in report.kinds)
    assert set(report.times) == {"sequential", "wavefront"} and min(report.times.values()) > 0
    assert found["fraction"] == pytest.approx(found["flops"] / report.times["wavefront"] / 1e9)
    return report


@pytest.mark.parametrize("name", ["attribute", "hybrid"])
def test_a_flat_run(name: str) -> None:
    model, inputs = ZOO[name]()
    fast = diagpass.transform(model, options=forced())
    report = check_measured(fast, *inputs)
    text = str(report)
    assert "measured: one call on cpu by the wall clock: " in text and "sequential / wavefront: x" in text
    assert f"width 1: {report.measured['widths'][0]['waves']} waves, median " in text  # type: ignore[index]


@pytest.mark.parametrize("name", ["gru", "counter"])
def test_a_loop(name: str) -> None:
    loop = rolled_models.build(name)
    fast = diagpass.transform(loop, options=forced())
    check_measured(fast, rolled_models.inputs(name, 6 * rolled_models.T))


def test_a_loop_whose_waves_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    def runner(kinds: Any, max_width: Any) -> Any:
        if kinds.runner is None:
            kinds.runner = tape.Replayed(kinds, tape.Tape())  # type: ignore[arg-type]
        return kinds.runner

    monkeypatch.setattr(run_module, "runner", runner)
    fast = diagpass.transform(rolled_models.build("hybrid"), options=forced())
    report = check_measured(fast, rolled_models.inputs("hybrid", 5 * rolled_models.T))
    groups = [wave["groups"] for wave in report.measured["waves"]]  # type: ignore[index]
    assert any(len(each) > 1 and each[0]["begin"] == each[1]["begin"] for each in groups)  # one replay
    assert fast._session.kinds.runner.replays.replayed > 0


def test_a_model_with_its_own_loop() -> None:
    fast = diagpass.transform(Whole("attribute"), options=forced(loop="rolled"))
    check_measured(fast, rolled_models.tokens(5 * rolled_models.T))


def test_a_model_that_runs_as_it_stands() -> None:
    model, inputs = ZOO["rmt_like"]()
    fast = diagpass.transform(model, options={"compiler": "eager"})
    with pytest.warns(diagpass.DiagpassWarning):
        report = fast.measure(*inputs)
    assert report.ran == "sequential" and report.measured is None and set(report.times) == {"sequential"}


def test_nothing_to_measure_when_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIAGPASS_DISABLE", "1")
    model, inputs = sample.build(layers=2, segments=2, width=4)
    with pytest.raises(diagpass.DiagpassError, match="nothing to measure: is DIAGPASS_DISABLE set"):
        diagpass.transform(model).measure(*inputs)


@pytest.mark.parametrize("loop", [False, True])
def test_a_call_under_a_clock_gives_the_same_bits(loop: bool) -> None:
    model: nn.Module
    model, inputs = ZOO["attribute"]()
    if loop:
        model, inputs = rolled_models.build("gru"), (rolled_models.inputs("gru", 4 * rolled_models.T),)
    results = []
    for watched in (False, True):
        fast = fast_copy(model)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            clock = stack.enter_context(measuring(torch.device("cpu"))) if watched else None
            results.append((fast(*inputs), snapshot(fast.original)))
        assert clock is None or clock.waves
    assert_tree_same(results[1][0], results[0][0], 0.0, "output ")
    assert_state_same(results[1][1], results[0][1])


def test_a_normal_call_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``measure`` no mark is made."""
    monkeypatch.setattr(Clock, "_mark", lambda self: pytest.fail("a mark was made"))
    model, inputs = sample.build(layers=2, segments=3, width=4)
    with torch.no_grad():
        diagpass.transform(model, options=forced())(*inputs)
        diagpass.transform(rolled_models.build("gru"), options=forced())(rolled_models.inputs("gru", 12))


def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes a millisecond at each look."""
    ticks: Iterator[int] = iter(range(10_000))
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 1e3))


def test_the_trace_of_a_run_is_golden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, inputs = sample.build(layers=2, segments=3, width=4)
    fast = diagpass.transform(model, options=forced())
    with torch.no_grad():
        fast(*inputs)
        ticking(monkeypatch)
        with measuring(torch.device("cpu")) as clock:
            fast(*inputs)
    clock.seconds()
    facts = measured_facts(clock, fast.report.kinds, 0.01, None, None)
    events = run_events(facts)
    jsonschema.validate(events, {"type": "array", "items": EVENT})
    assert events == json.loads(GOLDEN.read_text("utf-8"))
    report = dataclasses.replace(fast.report, measured=facts)
    write_trace(report, tmp_path / "trace.json")
    told = json.loads((tmp_path / "trace.json").read_text("utf-8"))
    jsonschema.validate(told["traceEvents"], {"type": "array", "items": EVENT})
    assert {event["pid"] for event in told["traceEvents"]} == {1, 2, 3}
    assert told["traceEvents"][-len(events) :] == events


def test_on_cuda_the_device_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks are events on the current stream; they are read once, after the device has finished."""
    made: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 2.0 * len(made)
            made.append(self)

        def record(self, stream: Any) -> None:
            assert stream == "current"

        def elapsed_time(self, other: Event) -> float:
            assert waited, "read before the device was waited for"
            return other.at - self.at

    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    ticking(monkeypatch)
    device = torch.device("cuda", 0)
    with measuring(device) as clock, clock.wave(), clock.group((1, ((3, 0), (2, 1)))):
        assert not waited
    (wave,) = clock.seconds()
    assert waited == [device] and len(made) == 6
    assert (wave.begin, wave.end, clock.total) == pytest.approx((0.002, 0.008, 0.010))
    assert wave.host == pytest.approx((0.001, 0.004)) and wave.cells == ((2, 1), (3, 0))
    events = run_events(measured_facts(clock, [], 0.01, 1e12, torch.bfloat16))
    jsonschema.validate(events, {"type": "array", "items": EVENT})
    assert [event["ts"] for event in events if event["pid"] == 4 and event["ph"] == "X"] == pytest.approx(
        [1000]
    )
