"""The same again: across processes, and across calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diagpass
from tests.helpers import assert_state_same, collect_warnings, forced, run_sequential
from tests.models import ZOO, tokens

ROOT = Path(__file__).resolve().parent.parent

PRINT_CODE = """
import sys
import torch
import diagpass
from tests.models import ZOO
from tests.strategies import Spec, build
name = sys.argv[1]
if name == "spec":
    model, inputs = build(Spec(("rnn", "attn", "rnn"), 3, 2, "stacked", ((2, 0),), (), True, 1))
else:
    model, inputs = ZOO[name]()
fast = diagpass.transform(model, options={"compiler": "eager", "schedule": "wavefront"})
with torch.no_grad():
    fast(*inputs)
assert isinstance(fast.report.code, str) and fast.report.code
sys.stdout.write(fast.report.code)
sys.stdout.write(repr({k: v for k, v in fast.report.to_dict().items()}))
"""


def run_python(code: str, *args: str, **env: str) -> str:
    """Run code in a fresh process from the repository's root and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ["hybrid", "cache_object", "spec"])
def test_two_processes_emit_the_same_code(name: str) -> None:
    """Also with other hash seeds: nothing depends on the order of a set or on addresses."""
    first = run_python(PRINT_CODE, name, PYTHONHASHSEED="1")
    second = run_python(PRINT_CODE, name, PYTHONHASHSEED="2")
    assert first and first == second


@pytest.mark.parametrize("name", ["counters", "first_segment_flag", "cache_object", "dict_queue"])
def test_twenty_calls_do_not_capture_again(name: str) -> None:
    """Models with Python counters that nothing resets: no capture after the second call."""
    assert not torch._dynamo.config.allow_unspec_int_on_nn_module  # a recompile per value, then
    model, inputs = ZOO[name]()
    plain, _ = ZOO[name]()
    fast = diagpass.transform(model, options=forced())
    captures = []
    with collect_warnings() as texts:
        for _ in range(20):
            run_sequential(plain, inputs)
            run_sequential(fast, inputs)
            captures.append(fast.report.captures)
            assert fast.report.ran == "wavefront"
    assert captures[1:] == captures[1:2] * 19, captures
    assert captures[-1] <= 3
    assert not texts
    assert_state_same(fast.original, plain, 1e-10)


def test_no_call_runs_user_python_again() -> None:
    """After the captures the layers' Python is not run: hooks on them stay silent.

    A hook that is there when the model is captured is traced with it; a Python side effect outside
    of the traced world (a print, here an append to a list that Dynamo cannot see) shows every run.
    """
    model, inputs = ZOO["attribute"]()
    fast = diagpass.transform(model, options=forced())
    for _ in range(2):
        run_sequential(fast, inputs)
    forwards = []
    code = type(model.layers[0]).forward.__code__

    def trace(frame: object, event: str, arg: object) -> None:
        if event == "call" and frame.f_code is code:
            forwards.append(frame)

    sys.setprofile(trace)
    try:
        for _ in range(3):
            run_sequential(fast, inputs)
    finally:
        sys.setprofile(None)
    assert not forwards, f"{len(forwards)} layer forwards ran in Python"


def test_twenty_calls_through_the_backend_do_not_capture_again() -> None:
    """`torch.compile(backend="diagonal")` on a model that counts: Dynamo compiles twice at most."""
    torch._dynamo.reset()
    model, inputs = ZOO["counters"]()
    plain, _ = ZOO["counters"]()
    compiled = torch.compile(model, backend="diagonal", options=forced())
    frames = []
    for _ in range(20):
        expected, got = run_sequential(plain, inputs), run_sequential(compiled, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert frames[3:] == frames[3:4] * 17, frames
    assert_state_same(model, plain, 1e-10)


def test_new_shapes_are_new_plans_and_old_ones_stay() -> None:
    model, _ = ZOO["list_states"]()
    fast = diagpass.transform(model, options=forced())
    for segments in (4, 5, 6):
        run_sequential(fast, (tokens(segments),))
    captures, plans = fast.report.captures, fast.report.plans
    assert plans >= 3
    for segments in (4, 5, 6):
        run_sequential(fast, (tokens(segments),))
        assert fast.report.segments == segments
    assert (fast.report.captures, fast.report.plans) == (captures, plans)


def test_twelve_sequence_lengths_stay_wavefronts() -> None:
    """More lengths than Dynamo's recompile limit: none falls back behind the user's back."""
    model, _ = ZOO["list_states"]()
    fast = diagpass.transform(model, options=forced())
    for segments in range(2, 14):
        x = tokens(segments)
        expected = run_sequential(model, (x,))
        torch.testing.assert_close(run_sequential(fast, (x,)), expected, rtol=1e-12, atol=0)
        assert fast.report.ran == "wavefront"
        assert fast.report.segments == segments
        assert fast.report.batched_cells > 0
