"""Where waves read and write: few buffers, each operand one piece.

Buffers are poisoned when they are lent, and spare rows when their wave is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagpass import SegmentLoop
from diagpass.rolled import waves
from diagpass.runtime.buffers import Buffers
from diagpass.runtime.replay import Replays
from tests import rolled_models
from tests.helpers import assert_state_same, assert_tree_same, fast_copy
from tests.rolled_models import Step
from tests.tape import check, poisoned, replaying  # noqa: F401

B, T, D, L = 2, 4, 8, 5  # rows of values and state begin where allocations do
CPU = torch.device("cpu")


class Layer(nn.Module):
    """State in an attribute; reads one or two hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mem = nn.Linear(D, D), nn.Linear(D, D)
        self.reset()

    def reset(self) -> None:
        self.state: Tensor | None = None

    def forward(self, h: Tensor, other: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.inp(h))
        if other is not None:
            h = h + 0.5 * other
        if self.state is not None:
            h = h + self.mem(self.state)
        self.state = h.mean(1, keepdim=True)
        return h


class Skips(Step):
    """Each layer reads the embedding, too."""

    def forward(self, x: Tensor) -> Tensor:
        h = first = self.embed(x)
        for layer in self.layers:
            h = layer(h, first)
        return self.head(h)


class TwoBelow(Step):
    """Each layer reads the two below it; the embedding stands in for those that are not there."""

    def forward(self, x: Tensor) -> Tensor:
        below = h = self.embed(x)
        for layer in self.layers:
            h, below = layer(h, below), h
        return self.head(h)


class TwoNew(Step):
    """The lowest layers read what is new in two ways."""

    def forward(self, x: Tensor) -> Tensor:
        h, other = self.embed(x), self.head(x)
        for layer in self.layers:
            h = layer(h, other)
            other = h * 2
        return h


def loop_of(step: Callable[..., Step] = Step) -> SegmentLoop:
    torch.manual_seed(5)
    made = step([Layer() for _ in range(L)], width=D)
    return SegmentLoop(made, T, reset="reset").double().eval()


def tokens(segments: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, segments * T, D, dtype=torch.float64, generator=generator)


def runner(fast: Any) -> Any:
    return fast._session.kinds.runner


def wide(fast: Any) -> list[list[Any]]:
    """The buffers of each sort for groups of the steady state."""
    return [found for (shape, *_), found in runner(fast).buffers._sorts.items() if shape[0] > 1]


@pytest.fixture
def put_together(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Per wave that ran, how many operands were put together from pieces."""
    found: list[int] = []
    run = Replays.run

    def noted(self: Replays, key: Any, work: Any) -> Any:
        found.append(sum(isinstance(item, list) for job in work.jobs for item in job.operands()))
        return run(self, key, work)

    monkeypatch.setattr(Replays, "run", noted)
    return found


def test_in_the_steady_state_each_operand_is_one_piece(put_together: list[int]) -> None:
    fast: Any = fast_copy(loop_of())
    with torch.no_grad():
        fast(tokens(12))
    assert len(put_together) == 12 + L - 1
    assert not any(put_together[L + 1 :]), put_together


@pytest.mark.parametrize("step", [Step, Skips, TwoBelow, TwoNew])
def test_spare_rows_are_right_for_their_wave(step: Any) -> None:
    """Calls of several lengths, recorded and followed, and streams."""
    loop = loop_of(step)
    fast: Any = fast_copy(loop)
    for call in range(12):
        check(loop, fast, tokens((9, 3, 2)[call % 3], call), [], 1e-12)
    assert fast._session.scores.followed > 0
    for seed in range(2):
        x = tokens(8, seed).split(T, dim=1)
        with torch.no_grad():
            assert_tree_same(list(fast.stream(x)), list(loop.stream(x)), 1e-12, "outputs")
        assert_state_same(fast.original, loop, 1e-12, "state")
    assert any(buffer.spare for buffer in runner(fast).buffers._at.values())


@pytest.mark.parametrize("max_width", [2, 3])
def test_a_wave_in_parts(max_width: int) -> None:
    loop = loop_of(TwoBelow)
    fast: Any = fast_copy(loop, max_width=max_width)
    for call in range(3):
        check(loop, fast, tokens(8, call), [], 1e-12)


@pytest.mark.parametrize("name", ["fifo_list", "mamba", "stacked", "two_back"])
def test_rows_of_any_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows side by side, as if they were aligned."""
    monkeypatch.setattr(waves, "ALIGNMENT", 1)
    loop = rolled_models.build(name)
    fast: Any = fast_copy(loop)
    rtol = 1e-4 if rolled_models.expect(name).float32_inside else 1e-10
    states: list[Any] = [None, None]
    for call, length in enumerate((9, 9, 9, 9, 2, 7)):
        x = rolled_models.inputs(name, length * rolled_models.T, seed=call)
        check(loop, fast, x, states, rtol)


def test_a_wave_reads_one_buffer_of_a_sort_and_writes_another() -> None:
    """At any length, and in streams."""
    fast: Any = fast_copy(loop_of())
    with torch.no_grad():
        for segments in (12, 2, 3, 8, 30):
            fast(tokens(segments))
        sizes = [len(found) for found in wide(fast)]
        assert sizes == [2, 2], sizes
        before = runner(fast).buffers.bytes
        for segments in (12, 2, 3, 8, 30):
            fast(tokens(segments))
            list(fast.stream(tokens(segments).split(T, dim=1)))
    assert runner(fast).buffers.bytes == before


def test_calls_of_one_segment_take_no_wide_buffers() -> None:
    fast: Any = fast_copy(loop_of())
    with torch.no_grad():
        for _ in range(2):
            fast(tokens(1))
            fast(tokens(2))
    assert not wide(fast)


def test_calls_of_several_lengths_share_their_replays() -> None:
    fast: Any = fast_copy(loop_of())
    replays = None
    with torch.no_grad():
        for _ in range(2):
            for segments in (12, 13):  # the ramp at the end begins with the one buffer or the other
                fast(tokens(segments))
        replays = runner(fast).replays
        before = replays.launched, replays.recorded
        for segments in (20, 21, 30):
            fast(tokens(segments))
            list(fast.stream(tokens(segments).split(T, dim=1)))
    assert (replays.launched, replays.recorded) == before


def test_final_state_in_a_stream_is_there_with_the_last_output() -> None:
    loop = loop_of()
    fast: Any = fast_copy(loop)
    with torch.no_grad():
        list(loop.stream(tokens(7).split(T, dim=1)))
        for _ in fast.stream(tokens(7).split(T, dim=1)):
            pass
    assert_state_same(fast.original, loop, 1e-12, "state")


def test_spare_rows_come_first_and_are_lent_with_the_others() -> None:
    buffers = Buffers()
    loan = buffers.lend((2, 3), torch.float32, CPU, 4, 1)
    assert loan.shape == (3, 3) and buffers.at(loan.data_ptr()).shape == (5, 3)
    assert list(buffers.spare(loan.data_ptr())) == [0]
    plain = buffers.lend((5, 3), torch.float32, CPU)
    assert plain.data_ptr() != loan.data_ptr() and not buffers.spare(plain.data_ptr())
    address = loan.data_ptr()
    del loan
    assert buffers.lend((4, 3), torch.float32, CPU, 4, 1).data_ptr() == address
