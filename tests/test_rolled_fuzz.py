"""hypothesis draws steps and calls: `stream` == `forward` == sequential, call after call.

25 examples, the same in every run; `make fuzz` draws with a fresh seed for as long as it is given
(`tests/fuzz.py`). A failure prints a `RolledSpec(...)`: `check(RolledSpec(...))` runs it again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from hypothesis import given, note, seed

from diagpass import SegmentLoop
from diagpass.loop import cut, join
from tests.helpers import assert_state_same, assert_tree_same, clone_tree, fast_copy
from tests.rolled_strategies import RolledSpec, build, inputs, rolled_specs
from tests.test_fuzz import fuzz_settings

EXAMPLES = 25
RTOL = 1e-10


def run(loop: Any, spec: RolledSpec, call: int, state: Any) -> tuple[Any, Any]:
    """One call: the output and, where it is returned, the state."""
    x, how = inputs(spec, call), spec.calls[call]
    if how.stream:
        stream = loop.stream(iter(cut(x, spec.size, 1)), state)
        y = join(list(stream), 1)
        return y, stream.final_state
    return loop(x, state) if spec.carries else (loop(x), None)


def by_hand(loop: SegmentLoop, spec: RolledSpec, call: int, state: Any) -> tuple[Any, Any]:
    """The sequential run, with no line of the library in it."""
    if spec.reset and not spec.carries:
        loop.step.reset()
    outputs = []
    for segment in inputs(spec, call).split(spec.size, dim=1):
        if spec.carries:
            y, state = loop.step(segment, state)
        else:
            y = loop.step(segment)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def check(spec: RolledSpec) -> None:
    """One example: equal results and states, batched and (for some) unbatched, and nothing captured twice."""
    loop = build(spec)
    for options, rtol in (({}, RTOL), ({"max_width": 1}, 0.0)):
        if rtol == 0.0 and spec.seed:  # capturing is what takes the time
            continue
        plain, fast = copy.deepcopy(loop), fast_copy(loop, **options)
        state, its_state, kept = None, None, []
        for call, how in enumerate(spec.calls):
            if not (how.go_on and spec.carries):
                state, its_state = None, None
            note(f"call {call} of {len(spec.calls)}, {options}")
            with torch.no_grad():
                expected = by_hand(plain, spec, call, state)
                got = run(fast, spec, call, its_state)
            assert_tree_same(got, expected, rtol, f"{how}: ")
            assert_state_same(fast.original.step, plain.step, rtol, f"{how}: ")
            state, its_state = expected[1], got[1]
            kept.append((got[0], clone_tree(got[0])))
            report = fast.report
            if spec.must_run and report is not None:
                segments = how.segments + (how.tail > 0)
                assert report.ran == "wavefront", f"{how}: {report}"
                assert report.cells == segments * len(spec.layers), f"{how}: {report}"
        for got, before in kept:
            assert_tree_same(got, before, 0.0, "an output, looked at again: ")


def test_random_steps() -> None:
    @seed(0)
    @fuzz_settings(EXAMPLES)
    @given(rolled_specs())
    def run_one(spec: RolledSpec) -> None:
        check(spec)

    run_one()
