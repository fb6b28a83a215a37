"""What a step keeps where segments repeat: inputs moved to other places, whole segments, what others hold.

Each step was wrong once. Outputs, state and what was there before the call are compared with the plain loop.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagpass import DiagpassError, SegmentLoop
from tests.helpers import assert_state_same, assert_tree_same, fast_copy
from tests.rolled_models import B, D, Step, T, tokens
from tests.test_segments_repeat import Layer


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*(shape or (B, 1, D)), dtype=torch.float64)


class Replaced(Layer):
    """Written in place, then replaced; the tensor from before is looked at as well."""

    def reset(self) -> None:
        super().reset()
        self.buf = self.initial = zeros()

    def forward(self, h: Tensor) -> Tensor:
        self.buf.add_(h.mean(1, keepdim=True))
        h = torch.tanh(self.inp(h) + self.buf)
        self.buf = self.buf * 0.5
        return h


class ReplacedLater(Layer):
    """The same, of what the first segment has left and keeps."""

    def reset(self) -> None:
        super().reset()
        self.buf: Tensor | None = None
        self.first: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        if self.buf is None:
            h = torch.tanh(self.inp(h))
            self.buf = self.first = h.mean(1, keepdim=True)
            return h
        return Replaced.forward(self, h)  # type: ignore[arg-type]


class Fifo(Layer):
    """Old states, all of which are read; more of them than segments that are watched."""

    depth = 4

    def reset(self) -> None:
        super().reset()
        for at in range(self.depth):
            setattr(self, f"s{at}", zeros())

    def forward(self, h: Tensor) -> Tensor:
        for at in range(self.depth):
            h = h + getattr(self, f"s{at}") * (at + 1)
        h = torch.tanh(self.inp(h))
        for at in range(self.depth - 1, 0, -1):
            setattr(self, f"s{at}", getattr(self, f"s{at - 1}"))
        self.s0 = h.mean(1, keepdim=True)
        return h


class DeepFifo(Fifo):
    depth = 6


class Swaps(Layer):
    """Two tensors from outside that change places."""

    def reset(self) -> None:
        super().reset()
        self.a, self.b = zeros() + 0.1, zeros() + 0.2

    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h + self.a * 2 + self.b)
        self.a, self.b = self.b, self.a
        return h


class PingPong(Swaps):
    """The same, and one of them is written in place."""

    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h)
        self.a.copy_(h.mean(1, keepdim=True))
        return h


class HeldByTheFirst(Layer):
    """A row of old states; the first segment keeps one for good."""

    def reset(self) -> None:
        super().reset()
        self.state, self.older, self.oldest = zeros(), zeros(), zeros()
        self.first: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.inp(h) + self.state + self.older * 2 + self.oldest * 3)
        self.oldest, self.older, self.state = self.older, self.state, h.mean(1, keepdim=True)
        if self.first is None:
            self.first = self.state
        return h


class KeepsTheSegment(Step):
    """The segment itself, read by the next one."""

    def reset(self) -> None:
        super().reset()
        self.prev = zeros(B, T, D)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x + self.prev)
        self.prev = x
        return y


class OnlyKeepsTheSegment(KeepsTheSegment):
    """The same, which nobody reads."""

    def forward(self, x: Tensor) -> Tensor:
        self.prev = x
        return Step.forward(self, x)


class HandsOutAtFirst(Step):
    """The first segment returns a state that later ones move."""

    def reset(self) -> None:
        super().reset()
        self.began = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.began:
            self.began = True
            return self.layers[-1].state
        return y[:, :1] * 2


CASES = [
    (Replaced, Step),
    (ReplacedLater, Step),
    (Fifo, Step),
    (DeepFifo, Step),
    (Swaps, Step),
    (PingPong, Step),
    (HeldByTheFirst, Step),
    (HeldByTheFirst, HandsOutAtFirst),
    (Layer, KeepsTheSegment),
    (Layer, OnlyKeepsTheSegment),
    (Fifo, KeepsTheSegment),
]


def make(layer: type[Layer], step: type[Step], reset: bool) -> SegmentLoop:
    torch.manual_seed(4)
    made = step([layer() for _ in range(3)]).double().eval()
    made.reset()
    return SegmentLoop(made, T, reset="reset" if reset else None)


@pytest.mark.parametrize(("layer", "step"), CASES)
@pytest.mark.parametrize("reset", [True, False])
def test_what_is_kept(layer: type[Layer], step: type[Step], reset: bool) -> None:
    loop = make(layer, step, reset)
    fast: Any = fast_copy(loop)
    for segments in (9, 9, 6, 5, 5, 2, 7, 12, 12):
        x = tokens(segments * T)
        with torch.no_grad():
            expected, got = loop(x), fast(x)
        assert_tree_same(got, expected, 1e-12, "output")
        assert_state_same(fast.original, loop, 1e-12, "state")


class Carries(nn.Module):
    """State that is passed on: written in place and replaced, a whole segment, numbers of a counter."""

    def __init__(self, number: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])
        self.number, self.seen = number, 0

    def forward(self, x: Tensor, state: Any) -> Any:
        self.seen += 1
        memories, before, _ = state
        h, new = x + before, []
        for layer, memory in zip(self.layers, memories, strict=True):
            memory.mul_(0.5)
            h = torch.tanh(layer(h) + memory)
            new.append(memory + h.mean(1, keepdim=True))
        number = {"none": 7, "count": self.seen, "modulo": self.seen % 2, "quotient": self.seen // 4}[
            self.number
        ]
        return h, (new, x, number)


@pytest.mark.parametrize("number", ["none", "count", "modulo", "quotient"])
def test_state_that_is_passed_on(number: str) -> None:
    torch.manual_seed(1)
    loop = SegmentLoop(Carries(number), T, carries_state=True).double().eval()
    fast: Any = fast_copy(loop)
    for segments in (6, 6, 6, 9, 9, 3, 6):
        given = [zeros() + 0.3 for _ in range(3)], zeros(B, T, D), 0
        mine = copy.deepcopy(given)
        loop.step.seen = fast.original.step.seen = 0  # type: ignore[assignment]
        x = tokens(segments * T)
        with torch.no_grad():
            expected, got = loop(x, given), fast(x, mine)
        assert_tree_same(got, expected, 1e-12, "output and state")
        assert_tree_same(mine, given, 1e-12, "what was given")


class ReturnsAQuotient(Step):
    """A number that is the same for some segments."""

    def reset(self) -> None:
        super().reset()
        self.seen = 0

    def forward(self, x: Tensor) -> Any:
        self.seen += 1
        return super().forward(x), self.seen // 4


def test_a_number_that_changes_later_cannot_be_joined() -> None:
    fast: Any = fast_copy(make(Layer, ReturnsAQuotient, True))
    with torch.no_grad():
        fast(tokens(3 * T))
        for _ in range(2):
            with pytest.raises(DiagpassError, match="is 0 for segment 0 and 1 for"):
                fast(tokens(6 * T))


class TwoOfOne(Layer):
    """Two attributes that share memory, which cannot be deferred; it is known when the segment has run."""

    def reset(self) -> None:
        super().reset()
        self.state, self.hist = zeros(), zeros()
        self.sum = zeros()

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.inp(h) + self.state + self.hist + self.sum)
        self.sum.add_(h.mean(1, keepdim=True))
        self.state, self.hist = h[:, -1:], h[:, -1:]
        self.seen += 1
        return h


@pytest.mark.parametrize("segments", [1, 2, 5])
def test_a_stream_that_stops_deferring_applies_no_segment_twice(segments: int) -> None:
    loop = make(TwoOfOne, Step, True)
    fast: Any = fast_copy(loop)
    parts = list(tokens(segments * T).split(T, 1))
    with torch.no_grad():
        expected = torch.cat(list(loop.stream(parts)), 1)
        with pytest.warns(Warning, match="share memory"):
            got = torch.cat(list(fast.stream(parts)), 1)
    assert_tree_same(got, expected, 1e-12, "stream")
    assert_state_same(fast.original, loop, 1e-12, "state")


class Optional(Step):
    """An argument that may be left out, and two attributes that become one tensor."""

    def reset(self) -> None:
        super().reset()
        self.ctx = zeros() + 1
        self.other = self.ctx * 2

    def forward(self, x: Any, aux: Tensor | None = None) -> Tensor:
        if isinstance(x, dict):
            x = x["x"] + x.get("y", 0)
        y = super().forward(x + self.ctx + self.other + (0 if aux is None else aux))
        self.other = self.ctx
        return y


def test_arguments_that_are_left_out_in_a_later_call() -> None:
    loop = make(Layer, Optional, True)
    fast: Any = fast_copy(loop)
    x, y = tokens(3 * T), tokens(3 * T)
    with torch.no_grad():
        for given, kwargs in (
            (x, {"aux": zeros() + 1}),
            (x, {}),
            ({"x": x, "y": y}, {}),
            ({"x": x}, {}),
            (x, {"aux": None}),
        ):
            assert_tree_same(fast(given, **kwargs), loop(given, **kwargs), 1e-12, "output")


class MakesItsState(nn.Module):
    """The first segment makes a state and returns it; later ones write it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])

    def forward(self, x: Tensor, state: Any) -> Any:
        if state is None:
            state = x.new_zeros(B, 1, D)
        y = x
        for layer in self.layers:
            y = torch.tanh(layer(y) + state)
        state.mul_(0.5).add_(y.mean(1, keepdim=True))
        return (y, state), state


class WrittenWhenMade(Layer):
    """A buffer that is written in place, then replaced by one that the step returns, too."""

    def reset(self) -> None:
        super().reset()
        self.buf = zeros() + 0.1

    def forward(self, h: Tensor) -> Tensor:
        self.buf.add_(h.mean(1, keepdim=True))
        h = torch.tanh(self.inp(h) + self.buf)
        self.buf = (self.buf * 0.5).mul_(0.5)
        return h


class ReturnsABuffer(Step):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.layers[-1].buf


@pytest.mark.filterwarnings("ignore:running sequentially")
@pytest.mark.parametrize("segments", [1, 2, 3, 8])
def test_what_was_returned_is_not_written_by_a_later_segment(segments: int) -> None:
    torch.manual_seed(3)
    x = tokens(segments * T)
    loops = [
        SegmentLoop(MakesItsState(), T, carries_state=True).double().eval(),
        make(WrittenWhenMade, ReturnsABuffer, True),
    ]
    for loop in loops:
        fast: Any = fast_copy(loop)
        for _ in range(2):
            with torch.no_grad():
                assert_tree_same(fast(x), loop(x), 1e-12, "outputs")
            assert_state_same(fast.original, loop, 1e-12, "state")


class Doubles(Layer):
    """Sets its state by a ``__setattr__`` of its own."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value * 2 if name == "state" else value)


class ReturnsItsState(Step):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.layers[-1].state


def test_a_setattr_of_ones_own_runs_once() -> None:
    loop = make(Doubles, ReturnsItsState, True)
    fast: Any = fast_copy(loop)
    for segments in (6, 6, 2, 7):
        x = tokens(segments * T)
        with torch.no_grad():
            assert_tree_same(fast(x), loop(x), 1e-12, "outputs")
        assert_state_same(fast.original, loop, 1e-12, "state")
