"""State written in place: right waves and results, and proof that functionalisation does it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import diagpass
from tests.helpers import assert_same, assert_state_same, fast_copy, run_sequential
from tests.models import EXPECT, ZOO, BufferLayer, L, Loop, tokens

INPLACE = [name for name in ZOO if name.startswith("buffer_")]
INPLACE += ["stacked_inplace", "stacked_buffer_dim1", "cache_object", "alias_view"]
INPLACE += ["shared_buffer", "roll_memory", "scratch_slots", "inplace_hidden", "int_buffer"]


@pytest.mark.parametrize("name", INPLACE)
def test_waves_and_results(name: str) -> None:
    model, inputs = ZOO[name]()
    report = assert_same(model, inputs, calls=3)
    waves = EXPECT[name].waves
    assert report.waves in (waves if isinstance(waves, tuple) else (waves,)), str(report)


def check_inplace(name: str) -> None:
    """What the test above demands, as a function that the mutation test can break."""
    model, inputs = ZOO[name]()
    waves = EXPECT[name].waves
    report = diagpass.explain(model, *inputs)
    assert report.waves in (waves if isinstance(waves, tuple) else (waves,)), str(report)
    assert_same(model, inputs)


@pytest.mark.parametrize("name", ["buffer_copy_", "buffer_columns", "stacked_inplace"])
def test_mutation_without_functionalisation_the_check_fails(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drop the stage that makes writes into values: waves or results must be found wrong."""
    import diagpass.capture.functional as functional

    check_inplace(name)
    monkeypatch.setattr(functional, "functionalize", lambda gm, inputs, lower: lower(gm, inputs))
    with pytest.raises((AssertionError, diagpass.DiagpassError)):
        check_inplace(name)


def test_a_reference_to_the_buffer_taken_before_sees_the_new_state() -> None:
    """In place means in place: whoever holds the tensor sees what was written."""
    model, inputs = ZOO["buffer_copy_"]()
    plain = copy.deepcopy(model)
    fast = fast_copy(model)
    held = [layer.buf for layer in fast.original.layers]
    for _ in range(2):
        run_sequential(plain, inputs)
        run_sequential(fast, inputs)
    for layer, buf, expected in zip(fast.original.layers, held, plain.layers, strict=True):
        assert layer.buf is buf
        torch.testing.assert_close(buf, expected.buf, rtol=1e-12, atol=0)


def test_the_caller_may_change_state_between_calls() -> None:
    """Zeroing a buffer, or putting another tensor in its place, is seen by the next call."""
    model, inputs = ZOO["buffer_add_"]()
    plain, fast = copy.deepcopy(model), fast_copy(model)
    for edit in range(3):
        for each in (plain, fast.original):
            if edit == 1:
                each.layers[0].buf.zero_()
            elif edit == 2:
                each.layers[1].buf = torch.full_like(each.layers[1].buf, 0.25)
        got, expected = run_sequential(fast, inputs), run_sequential(plain, inputs)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        assert_state_same(fast.original, plain, 1e-12)


def test_reassigned_state_is_a_new_tensor_each_call() -> None:
    """State tensors handed out by an earlier call keep their values."""
    model, inputs = ZOO["attribute"]()
    fast = fast_copy(model)
    run_sequential(fast, inputs)
    held = [layer.state for layer in fast.original.layers]
    values = [state.clone() for state in held]
    run_sequential(fast, inputs)
    for state, value in zip(held, values, strict=True):
        assert torch.equal(state, value)


class DataLayer(BufferLayer):
    """Replaces the buffer's storage through `.data`."""

    def __init__(self) -> None:
        super().__init__("data")


class OutLayer(BufferLayer):
    """Writes the buffer through `out=`."""

    def __init__(self) -> None:
        super().__init__("out=")


class ResizeLayer(BufferLayer):
    """Swaps the buffer with set_()."""

    def __init__(self) -> None:
        super().__init__("copy_")

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, self.buf)
        self.buf.set_(new.clone())
        return h


class OverlapLayer(BufferLayer):
    """Writes two overlapping slices of one buffer, the second over part of the first."""

    def __init__(self) -> None:
        super().__init__("copy_")

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, self.buf)
        self.buf[:, :4] = new[:, :4]
        self.buf[:, 2:].mul_(0.5).add_(new[:, 2:])
        return h


@pytest.mark.parametrize("layer", [DataLayer, OutLayer, ResizeLayer, OverlapLayer])
def test_exotic_writes_are_right_or_refused(layer: type[nn.Module]) -> None:
    """Whatever Dynamo and AOTAutograd make of these, the results are those of the plain model."""
    model = Loop([layer() for _ in range(L)]).double().eval()
    assert_same(model, (tokens(),), ran=None)


def test_a_global_tensor_written_in_place() -> None:
    """State outside the module: right, or refused by name."""
    model = Loop([GlobalLayer() for _ in range(L)]).double().eval()
    x = tokens()
    GLOBAL.zero_()
    expected = [run_sequential(model, (x,)) for _ in range(2)]
    left = GLOBAL.clone()
    GLOBAL.zero_()
    fast = fast_copy(model)
    for value in expected:
        torch.testing.assert_close(run_sequential(fast, (x,)), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(GLOBAL, left, rtol=1e-12, atol=0)


GLOBAL = torch.zeros(2, 6, dtype=torch.float64)
CALLS = {"count": 0}


class GlobalLayer(BufferLayer):
    """Reads and writes a tensor that belongs to the file, not to a module."""

    def __init__(self) -> None:
        super().__init__("copy_")

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, GLOBAL)
        GLOBAL.copy_(new)
        return h


class GlobalCounterLayer(BufferLayer):
    """Counts in a global dict and uses the count as data."""

    def __init__(self) -> None:
        super().__init__("copy_")

    def forward(self, h: Tensor) -> Tensor:
        CALLS["count"] += 1
        h, new = self.body(h * (1 + 0.01 * CALLS["count"]), self.buf)
        self.buf.copy_(new)
        return h


class CounterAsDataLayer(BufferLayer):
    """A Python counter on the module is used as a number, and branches at a certain value."""

    def __init__(self) -> None:
        super().__init__("copy_")
        self.seen = 0

    def forward(self, h: Tensor) -> Tensor:
        self.seen += 1
        h, new = self.body(h * (1 + 0.01 * self.seen), self.buf)
        if self.seen == 6:
            new = -new
        self.buf.copy_(new)
        return h


class FlipLayer(BufferLayer):
    """A flag that flips at each segment."""

    def __init__(self) -> None:
        super().__init__("copy_")
        self.flag = False

    def forward(self, h: Tensor) -> Tensor:
        self.flag = not self.flag
        h, new = self.body(h if self.flag else h.sin(), self.buf)
        self.buf.copy_(new)
        return h


class IteratorLayer(BufferLayer):
    """Draws numbers from an iterator that it keeps."""

    def __init__(self) -> None:
        super().__init__("copy_")
        self.numbers = [0.1, 0.2, 0.3]
        self.place = 0

    def forward(self, h: Tensor) -> Tensor:
        scale = self.numbers[self.place]
        self.place = (self.place + 1) % 3
        h, new = self.body(h * scale, self.buf)
        self.buf.copy_(new)
        return h


@pytest.mark.parametrize("layer", [CounterAsDataLayer, FlipLayer, IteratorLayer, GlobalCounterLayer])
def test_python_state_that_changes_what_is_computed(layer: type[nn.Module]) -> None:
    """Four calls of a model whose Python state matters, each with the plain model's results."""
    model = Loop([layer() for _ in range(L)]).double().eval()
    x = tokens()
    plain, fast = copy.deepcopy(model), fast_copy(model)
    CALLS["count"] = 0
    expected = [run_sequential(plain, (x,)) for _ in range(4)]
    count = CALLS["count"]
    CALLS["count"] = 0
    for value in expected:
        torch.testing.assert_close(run_sequential(fast, (x,)), value, rtol=1e-12, atol=0)
    assert CALLS["count"] == count
    assert_state_same(fast.original, plain, 1e-12)


class ShiftLayer(BufferLayer):
    """Moves its state into a second buffer before it overwrites it: a shift of one segment."""

    def __init__(self) -> None:
        super().__init__("copy_")
        self.register_buffer("before", torch.zeros_like(self.buf))

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, self.buf + 0.5 * self.before)
        self.before.copy_(self.buf)
        self.buf.copy_(new)
        return h


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_a_buffer_that_keeps_another_ones_old_value(segments: int) -> None:
    """With one segment the new value of one buffer *is* the other buffer as it came in.

    Copied back in the wrong order, it would be read after it was overwritten.
    """
    model = Loop([ShiftLayer() for _ in range(L)]).double().eval()
    assert_same(model, (tokens(segments),), calls=3)


class SwapLayer(ShiftLayer):
    """Swaps its two buffers: neither order of copying back would do."""

    def forward(self, h: Tensor) -> Tensor:
        h, _ = self.body(h, self.buf + 0.5 * self.before)
        old = self.before.clone()
        self.before.copy_(self.buf)
        self.buf.copy_(old)
        return h


@pytest.mark.parametrize("segments", [1, 2])
def test_buffers_that_swap(segments: int) -> None:
    model = Loop([SwapLayer() for _ in range(L)]).double().eval()
    for i, layer in enumerate(model.layers):
        layer.before.fill_(0.1 * (i + 1))
    assert_same(model, (tokens(segments),), calls=3)
