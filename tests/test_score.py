"""Calls that follow the score of an earlier one: the same results, and only where the call is the same.

Buffers are poisoned before a score is followed, and what a call changes between two calls is what a user may
change.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagpass import SegmentLoop
from tests import rolled_models as models
from tests.helpers import assert_tree_same, fast_copy
from tests.rolled_models import B, D, Step, T, tokens
from tests.tape import check, poisoned, replaying  # noqa: F401

NAMES = (
    "armt",
    "cache_none",
    "counter",
    "fifo_list",
    "first_flag",
    "mamba",
    "masked",
    "rmt",
    "rwkv_state",
    "skips",
    "stacked",
    "two_back",
)


def followed(fast: Any) -> int:
    return fast._session.scores.followed


@pytest.mark.parametrize("name", NAMES)
def test_following_computes_the_same(name: str) -> None:
    """Calls of three lengths in turn, each often enough to be followed; the state goes on or is reset."""
    loop = models.build(name)
    fast: Any = fast_copy(loop)
    rtol = 1e-4 if models.expect(name).float32_inside else 1e-10
    states: list[Any] = [None, None]
    for call in range(15):
        length = (9 * T, 2 * T, 7 * T - 1)[call % 3]
        check(loop, fast, models.inputs(name, length, seed=call), states, rtol)
    assert followed(fast) > 0


class Layer(nn.Module):
    """State in an attribute, a switch that only later segments ask about, and what a user may do besides."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mem = nn.Linear(D, D), nn.Linear(D, D)
        self.double = self.late = False
        self.reset()

    def reset(self) -> None:
        self.state: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        if self.double:
            h = h * 2
        h = torch.tanh(self.inp(h))
        if self.state is not None:
            h = h + self.mem(self.state)
            if self.late:
                h = h + 1
        self.state = h.mean(1, keepdim=True)
        return h


def loop_of(reset: Any = "reset", step: type[Step] = Step) -> SegmentLoop:
    torch.manual_seed(5)
    return SegmentLoop(step([Layer() for _ in range(3)]), T, reset=reset).double().eval()


def both(loop: SegmentLoop, fast: Any) -> list[Any]:
    return [loop.step, fast.original.step]


@pytest.mark.parametrize("switch", ["double", "late"])
def test_a_switch_between_two_calls_is_seen(switch: str) -> None:
    loop = loop_of()
    fast: Any = fast_copy(loop)
    for call in range(12):
        for step in both(loop, fast):
            setattr(step.layers[1], switch, call % 6 == 5)
        check(loop, fast, tokens(8 * T), [], 1e-10)
    assert followed(fast) >= 4


def test_calls_that_go_on_and_calls_that_begin_anew_are_both_followed() -> None:
    loop = loop_of(reset=None)
    fast: Any = fast_copy(loop)
    counts = []
    for _ in range(6):
        for step in both(loop, fast):
            step.reset()
        for _ in range(3):
            check(loop, fast, tokens(6 * T), [], 1e-10)
        counts.append(followed(fast))
    assert counts[-1] - counts[-2] == 3, counts


def test_weights_that_are_edited_replaced_or_moved_are_seen() -> None:
    loop = loop_of()
    fast: Any = fast_copy(loop)

    def edit(step: Any) -> None:
        step.layers[0].inp.weight.mul_(0.5)

    def move(step: Any) -> None:
        step.layers[1].mem.weight.data = step.layers[1].mem.weight.data * 0.5

    def replace(step: Any) -> None:
        step.layers[2].inp.weight = nn.Parameter(step.layers[2].inp.weight.detach() * 0.5)

    for change in (edit, move, replace):
        for _ in range(5):
            check(loop, fast, tokens(8 * T), [], 1e-10)
        before = followed(fast)
        check(loop, fast, tokens(8 * T), [], 1e-10)
        assert followed(fast) == before + 1
        with torch.no_grad():
            for step in both(loop, fast):
                change(step)
        check(loop, fast, tokens(8 * T), [], 1e-10)


@pytest.mark.parametrize("skips", [False, True])
def test_a_weight_that_lies_where_it_lay_and_means_something_else_is_seen(skips: bool) -> None:
    """Though Dynamo skips the guards that would see it, too."""
    loop = loop_of()
    fast: Any = fast_copy(loop)
    for round in range(3):
        with torch.compiler.set_stance("default", skip_guard_eval_unsafe=skips and round > 0):
            for _ in range(5):
                check(loop, fast, tokens(8 * T), [], 1e-10)
        for step in both(loop, fast):
            step.layers[1].mem.weight.data = step.layers[1].mem.weight.data.t()
    check(loop, fast, tokens(8 * T), [], 1e-10)
    assert followed(fast) > 0


class Hooked(Step):
    """What a hook holds on to."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.kept = y
        return y


def test_an_output_that_the_step_keeps() -> None:
    loop = loop_of(step=Hooked)
    fast: Any = fast_copy(loop)
    for call in range(12):
        check(loop, fast, tokens((2 + call % 2) * T), [], 1e-10)
        assert_tree_same(fast.original.step.kept, loop.step.kept, 1e-10, "kept")
    assert followed(fast) > 0


def test_state_that_a_user_holds_is_not_overwritten() -> None:
    loop = loop_of(reset=None)
    fast: Any = fast_copy(loop)
    held: list[tuple[Tensor, Tensor]] = []
    for _ in range(6):
        check(loop, fast, tokens(5 * T), [], 1e-10)
        held.append((loop.step.layers[1].state, fast.original.step.layers[1].state))
    for expected, got in held:
        assert_tree_same(got, expected, 1e-10, "held state")
    assert followed(fast) > 0


def test_a_stream_under_way_keeps_its_memory() -> None:
    torch.manual_seed(1)
    loop = models.build("gru")
    fast: Any = fast_copy(loop)
    x = models.inputs("gru", 8 * T)
    with torch.no_grad():
        for _ in range(4):
            fast(x)
        before = followed(fast)
        assert before > 0
        stream, plain = fast.stream(x.split(T, dim=1)), loop.stream(x.split(T, dim=1))
        got, expected = [next(stream)], [next(plain)]
        assert_tree_same(fast(x), loop(x), 1e-10, "a call in between")
        got += list(stream)
        expected += list(plain)
        assert_tree_same(got, expected, 1e-10, "outputs")
        assert_tree_same(stream.final_state, plain.final_state, 1e-10, "state")


class Fails(Step):
    """Raises in the last segment when it is told to, in a way that no guard sees before."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == 2 and self.training:
            raise ValueError("two tokens")
        return super().forward(x)


def test_a_failure_midway_leaves_what_the_reset_left() -> None:
    loop = loop_of(step=Fails)
    fast: Any = fast_copy(loop)
    x = tokens(6 * T + 2)
    for _ in range(5):
        check(loop, fast, x, [], 1e-10)
    assert followed(fast) > 0
    fast.original.step.train()
    with torch.no_grad(), pytest.raises(ValueError, match="two tokens"), pytest.warns(Warning):
        fast(x)
    fast.original.step.eval()
    check(loop, fast, x, [], 1e-10)


def test_other_inputs_of_the_same_shape_are_read() -> None:
    """Other batch sizes, other strides."""
    loop = loop_of()
    fast: Any = fast_copy(loop)
    for _ in range(5):
        check(loop, fast, tokens(6 * T), [], 1e-10)
    for _ in range(5):
        check(loop, fast, tokens(6 * T, B + 1), [], 1e-10)
    check(loop, fast, tokens(12 * T)[:, ::2], [], 1e-10)
    check(loop, fast, tokens(6 * T).mT.contiguous().mT, [], 1e-10)
    assert followed(fast) >= 2


def test_what_was_recorded_is_reported() -> None:
    loop = loop_of()
    fast: Any = fast_copy(loop)
    reports = []
    for _ in range(5):
        check(loop, fast, tokens(8 * T), [], 1e-10)
        reports.append(fast.report)
    first, last = reports[1], reports[-1]
    assert followed(fast) > 0
    for name in ("segments", "cells", "waves", "max_width", "batched_cells", "ran", "grid", "memory"):
        assert getattr(first, name) == getattr(last, name), name
