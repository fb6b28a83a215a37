"""CUDA graphs, stood in for by a tape; and memory poisoned where nobody may read it.

The tape repeats a group on the memory, and on nothing but the memory, that it was recorded with.
Import both fixtures into a test module to have all waves run that way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from diagpass import SegmentLoop
from diagpass.rolled import run as run_module
from diagpass.rolled.scores import Scores
from diagpass.rolled.waves import Direct, Replayed, WaveWork
from diagpass.runtime.buffers import Buffers
from tests.helpers import assert_state_same, assert_tree_same


def alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, held by nobody."""
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    raw = (ctypes.c_byte * (size * tensor.element_size())).from_address(tensor.data_ptr())
    with torch.inference_mode(False):
        return torch.frombuffer(raw, dtype=tensor.dtype).as_strided(tensor.shape, tensor.stride())


class Tape:
    """Repeats a wave at the addresses that it was recorded with."""

    def record(self, work: WaveWork) -> Callable[[], None]:
        work()
        jobs = [
            (
                job.into.run,
                [
                    [alias(part) for part in item] if isinstance(item, list) else alias(item)
                    for item in job.operands()
                ],
                [alias(item) for item in job.results],
            )
            for job in work.jobs
        ]

        def again() -> None:
            for run, operands, results in jobs:
                run(*(torch.cat(item) if isinstance(item, list) else item for item in operands), *results)

        return again

    def press(self, work: Callable[[], Any]) -> tuple[Callable[[], None], list[torch.Tensor]]:
        found = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in work()]

        def again() -> None:
            for kept, made in zip(found, work(), strict=True):
                kept.copy_(made)

        return again, found

    def beside(self, works: Any) -> None:
        for work in reversed(works):
            work()


@pytest.fixture(autouse=True)
def replaying(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def runner(kinds, max_width):
        if max_width == 1:
            return Direct(kinds)
        if kinds.runner is None:
            kinds.runner = Replayed(kinds, Tape())  # type: ignore[arg-type]
        return kinds.runner

    monkeypatch.setattr(run_module, "runner", runner)
    yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a buffer held is gone when it is lent, what a spare row held when its wave is over, and all of it
    when a score is followed: who still reads it fails.
    """
    lend, run, get = Buffers.lend, Replayed.__call__, Scores.get

    def spoil(memory: torch.Tensor) -> torch.Tensor:
        return memory.fill_(float("nan") if memory.is_floating_point() else -1)

    def poisoned(self: Buffers, *args: Any) -> torch.Tensor:
        return spoil(lend(self, *args))

    def running(self: Replayed, cells: Any) -> int:
        batched = run(self, cells)
        for buffer in self.buffers._at.values():
            spoil(buffer.memory[: buffer.spare])
        return batched

    def poisoning(self: Scores, form: Any, kinds: Any) -> Any:
        found = get(self, form, kinds)
        for buffer in kinds.runner.buffers._at.values() if found else ():
            spoil(buffer.memory)
        return found

    monkeypatch.setattr(Buffers, "lend", poisoned)
    monkeypatch.setattr(Replayed, "__call__", running)
    monkeypatch.setattr(Scores, "get", poisoning)


def check(loop: SegmentLoop, fast: Any, x: Any, states: list[Any], rtol: float) -> None:
    """A call of each; outputs and state agree."""
    with torch.no_grad():
        if loop.carries_state:
            expected, states[0] = loop(x, states[0])
            got, states[1] = fast(x, states[1])
            assert_tree_same(states[1], states[0], rtol, "returned state")
        else:
            expected, got = loop(x), fast(x)
    assert_tree_same(got, expected, rtol, "output")
    assert_state_same(fast.original, loop, rtol, "state")
