"""Segments that repeat are recorded without asking Dynamo: only where that cannot change anything.

Each step here would be wrong if it were repeated carelessly. `repeated` counts the segments that were.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagpass import DiagpassError, SegmentLoop
from diagpass.rolled.repeat import Repeat
from tests.helpers import assert_state_same, assert_tree_same, clone_tree, fast_copy
from tests.rolled_models import B, D, Step, T, tokens


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    count = [0]
    record = Repeat.record

    def counted(self: Repeat, run: Any, segment: Any) -> bool:
        found = record(self, run, segment)
        count[0] += found
        return found

    monkeypatch.setattr(Repeat, "record", counted)
    yield count


class Layer(nn.Module):
    """State in an attribute; what subclasses do besides is the matter."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mem = nn.Linear(D, D), nn.Linear(D, D)
        self.reset()

    def reset(self) -> None:
        self.state = torch.zeros(1, 1, D, dtype=torch.float64)
        self.older = self.oldest = self.state
        self.written: Tensor | None = None
        self.seen = 0

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.inp(h) + self.mem(self.state))
        self.besides(h)
        self.state = h.mean(1, keepdim=True)
        return h

    def besides(self, h: Tensor) -> None:
        """Nothing."""


class Counts(Layer):
    """A counter that nothing reads."""

    def besides(self, h: Tensor) -> None:
        self.seen += 3


class WritesOnly(Layer):
    """An attribute that no segment reads."""

    def besides(self, h: Tensor) -> None:
        self.written = h * 2


class Shifts(Layer):
    """A row of three old states, the last of which no segment reads."""

    def besides(self, h: Tensor) -> None:
        self.oldest = self.older
        self.older = self.state


class ReadsOldest(Shifts):
    """The same, read."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h + self.oldest)


class Buffers(Layer):
    """State that is written in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1, 1, D, dtype=torch.float64))

    def reset(self) -> None:
        super().reset()
        if "total" in self._buffers:
            self.total.zero_()

    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h + self.total)
        self.total.mul_(0.5).add_(h.mean((0, 1), keepdim=True))
        return h


class Turns(Layer):
    """Another branch from the sixth segment on, by a counter."""

    def forward(self, h: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(h * 2 if self.seen > 6 else h)


class Uses(Layer):
    """A counter that is part of the arithmetic."""

    def forward(self, h: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(h + self.seen)


class FirstIsOther(Layer):
    """The first segment writes another state than later ones, and keeps it for them."""

    def reset(self) -> None:
        super().reset()
        self.first: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        if self.first is None:
            h = torch.tanh(self.inp(h))
            self.first = self.state = h.amax(1, keepdim=True)
            return h
        return super().forward(h + self.first)


class KeepsTheOld(Layer):
    """The state before, which no segment reads, and from a first segment on that is another."""

    def reset(self) -> None:
        super().reset()
        self.began = False

    def forward(self, h: Tensor) -> Tensor:
        self.older = self.state
        if not self.began:
            self.began = True
            h = h * 2
        return super().forward(h)


class BuffersLater(Buffers):
    """State written in place, except by the first segment."""

    def reset(self) -> None:
        super().reset()
        self.began = False

    def forward(self, h: Tensor) -> Tensor:
        if self.began:
            return super().forward(h)
        self.began = True
        return Layer.forward(self, h)


class SetsANumber(Layer):
    """A number that the first segment sets to another value than later ones, which read it before."""

    def reset(self) -> None:
        super().reset()
        self.number, self.began = 3, False

    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h + self.number)
        self.number = 5 if self.began else 7
        self.began = True
        return h


class Remembers(Layer):
    """Every state, in a list that grows."""

    def reset(self) -> None:
        super().reset()
        self.all: list[Tensor] = []

    def besides(self, h: Tensor) -> None:
        self.all.append(h.mean())


CASES = {
    Layer: True,
    Counts: True,
    WritesOnly: True,
    Shifts: None,
    ReadsOldest: None,
    Buffers: True,
    Turns: None,
    Uses: None,
    FirstIsOther: True,
    KeepsTheOld: True,
    BuffersLater: True,
    SetsANumber: None,
    Remembers: False,
}


def loop_of(layer: type[Layer], step: type[Step] = Step) -> SegmentLoop:
    torch.manual_seed(5)
    return SegmentLoop(step([layer() for _ in range(3)]), T, reset="reset").double().eval()


@pytest.mark.parametrize(("layer", "repeats"), CASES.items())
@pytest.mark.parametrize("max_width", [1, None])
def test_repeating_changes_nothing(
    layer: type[Layer], repeats: bool | None, max_width: int | None, repeated: list[int]
) -> None:
    loop = loop_of(layer)
    fast = fast_copy(loop, max_width=max_width)
    for length in (12 * T, 12 * T, 15 * T - 1, 3 * T, 9 * T + 1, 2 * T, 4 * T, 3 * T, 4 * T):
        x = tokens(length)
        with torch.no_grad():
            expected, got = loop(x), fast(x)
        assert_tree_same(got, expected, 0.0 if max_width == 1 else 1e-12, "output")
        assert_state_same(fast.original, loop, 0.0 if max_width == 1 else 1e-12, "state")
    assert repeats is None or (repeated[0] > 0) == repeats, repeated


class KeepsItsOutput(Step):
    """What is returned is also the state: the one must not be overwritten with the other."""

    def reset(self) -> None:
        super().reset()
        self.last = torch.zeros(B, T, D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x + self.last)
        self.last = y
        return y


class OutputIsState(Layer):
    """A recurrent layer whose output is its state, as that of a GRU is; the lengths must be the same."""

    def reset(self) -> None:
        super().reset()
        self.state = torch.zeros(B, T, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        self.state = torch.tanh(self.inp(h) + self.mem(self.state))
        return self.state


class KeepsTwoOutputs(Step):
    """The last output but one is state, too."""

    def reset(self) -> None:
        super().reset()
        self.last = self.older = torch.zeros(B, T, D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.older, self.last = self.last, y
        return y


@pytest.mark.parametrize("step", [Step, KeepsTwoOutputs])
@pytest.mark.parametrize("max_width", [1, None])
def test_an_output_that_is_state(step: type[Step], max_width: int | None, repeated: list[int]) -> None:
    """What is returned keeps its value, and the state is the last segment's."""
    loop = loop_of(OutputIsState, step)
    loop.reset = None
    loop.step.reset()
    fast = fast_copy(loop, max_width=max_width)
    for segments in (10, 4, 9):
        x = tokens(segments * T)
        with torch.no_grad():
            expected, got = loop(x), fast(x)
        assert_tree_same(got, expected, 0.0 if max_width == 1 else 1e-12, "output")
        assert_state_same(fast.original, loop, 0.0 if max_width == 1 else 1e-12, "state")
    assert (repeated[0] > 0) == (step is Step)


class ReturnsPieces(Step):
    """A dict with the same tensor twice, a number and None."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"y": y, "again": (y, None)}


@pytest.mark.parametrize("step", [KeepsItsOutput, ReturnsPieces])
def test_what_is_returned(step: type[Step]) -> None:
    loop = loop_of(Layer, step)
    loop.step.reset()
    fast = fast_copy(loop)
    for _ in range(2):
        x = tokens(10 * T)
        with torch.no_grad():
            assert_tree_same(fast(x), loop(x), 1e-12, "output")
        assert_state_same(fast.original, loop, 1e-12, "state")


class Carries(nn.Module):
    """State passed on, a counter among it that does not change, and one number that does in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])

    def forward(self, x: Tensor, state: Any) -> Any:
        if state is None:
            state = [x.new_zeros(x.shape[0], 1, D) for _ in self.layers], 7
        old, number = state
        new = []
        for layer, memory in zip(self.layers, old, strict=True):
            x = torch.tanh(layer(x + memory * number))
            new.append(x.mean(1, keepdim=True))
        return x, (new, number)


class CarriesOutputs(nn.Module):
    """The outputs of all layers are the state that is passed on, and the last one is the output, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(3)])

    def forward(self, x: Tensor, state: Any) -> Any:
        if state is None:
            state = {"h": [torch.zeros_like(x) for _ in self.layers]}
        new = []
        for layer, memory in zip(self.layers, state["h"], strict=True):
            x = torch.tanh(layer(x) + memory / 2)
            new.append(x)
        return x, {"h": new}


@pytest.mark.parametrize("step", [Carries, CarriesOutputs])
def test_state_that_is_passed_on(step: type[nn.Module], repeated: list[int]) -> None:
    torch.manual_seed(2)
    loop = SegmentLoop(step(), T, carries_state=True).double()
    fast = fast_copy(loop)
    states: list[Any] = [None, None]
    for _ in range(3):
        x = tokens(9 * T)
        with torch.no_grad():
            expected, states[0] = loop(x, states[0])
            got, states[1] = fast(x, states[1])
        assert_tree_same(got, expected, 1e-12, "output")
        assert_tree_same(states[1], states[0], 1e-12, "state")
    assert repeated[0] > 0


class Fails(Layer):
    """Fails while it is traced at another length, after many segments that repeated."""

    def forward(self, h: Tensor) -> Tensor:
        if h.shape[1] == 2:
            raise ValueError("two tokens")
        return super().forward(h)


def test_a_failure_after_repeated_segments_leaves_what_the_reset_left(repeated: list[int]) -> None:
    loop = loop_of(Fails)
    fast = fast_copy(loop)
    with torch.no_grad():
        fast(tokens(9 * T))
        before = repeated[0]
        with pytest.raises(ValueError, match="two tokens"), pytest.warns(Warning):
            fast(tokens(9 * T + 2))
        assert repeated[0] > before
        x = tokens(7 * T)
        assert_tree_same(fast(x), loop(x), 1e-12, "output")
    assert_state_same(fast.original, loop, 1e-12, "state")


def test_the_inputs_are_left_alone() -> None:
    loop = loop_of(Counts)
    fast = fast_copy(loop)
    x = tokens(9 * T)
    given = clone_tree(x)
    with torch.no_grad():
        fast(x)
    assert torch.equal(x, given)
    assert copy.deepcopy(fast.original.step.layers[0]).seen == 27


class First(Step):
    """Returns its state with the output; the first segment's is kept by the layers, later ones are not."""

    def reset(self) -> None:
        super().reset()
        self.began = False

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        state = self.layers[-1].state
        if self.began:
            state = state * 2
        self.began = True
        return y, state


class Watching:
    """How often Dynamo was asked about a segment in the calls of a loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from diagpass.rolled.face import TransformedLoop

        self.asked = 0
        ask = TransformedLoop._ask

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.asked += 1
            return ask(*args, **kwargs)

        monkeypatch.setattr(TransformedLoop, "_ask", counted)

    def of(self, call: Any) -> int:
        before = self.asked
        with torch.no_grad():
            call()
        return self.asked - before


@pytest.mark.parametrize(
    ("layer", "step", "asked"),
    [
        (Layer, Step, 2),  # the state at the start is of batch 1
        (Counts, Step, 2),
        (WritesOnly, Step, 2),
        (Buffers, Step, 2),
        (OutputIsState, Step, 1),
        (BuffersLater, Step, 2),
        (FirstIsOther, Step, 3),  # at the second segment two attributes are one tensor
        (FirstIsOther, First, 3),
        (KeepsTheOld, Step, 4),
    ],
)
def test_what_follows_a_behaviour_is_remembered(
    layer: type[Layer], step: type[Step], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later calls ask about the first segment of a behaviour only, unless it moves what it was given."""
    loop = loop_of(layer, step)
    fast = fast_copy(loop)
    for length in (6 * T, 2 * T, 3 * T, 5 * T, 4 * T, 4 * T, 9 * T, 3 * T):
        x = tokens(length)
        with torch.no_grad():
            assert_tree_same(fast(x), loop(x), 1e-12, "output")
        assert_state_same(fast.original, loop, 1e-12, "state")
    watching = Watching(monkeypatch)
    assert watching.of(lambda: fast(tokens(7 * T))) == asked


def test_it_is_remembered_for_these_circumstances_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of another kind (its layout, here) is watched anew."""
    loop = loop_of(Layer)
    loop.reset = None
    fast = fast_copy(loop)
    x = tokens(6 * T)
    with torch.no_grad():
        fast(x), loop(x)
        watching = Watching(monkeypatch)
        assert watching.of(lambda: fast(x)) == 1
        loop(x)
        for each in (loop, fast.original):
            for layer in each.step.layers:
                layer.state = torch.zeros(B, 1, 2 * D, dtype=torch.float64)[..., ::2]
        assert watching.of(lambda: fast(x)) > 1
        loop(x)
    assert_state_same(fast.original, loop, 1e-12, "state")


def test_a_number_that_is_returned_is_no_constant_by_then() -> None:
    """The sequential loop cannot join it; so says the wavefront, at the third call too."""

    class Numbers(Step):
        def reset(self) -> None:
            super().reset()
            self.seen = 0

        def forward(self, x: Tensor) -> Any:
            self.seen += 1
            return super().forward(x), self.seen

    fast = fast_copy(loop_of(Layer, Numbers))
    with torch.no_grad():
        for _ in range(3):
            with pytest.raises(DiagpassError, match="is 1 for segment 0 and 2 for"):
                fast(tokens(5 * T))
