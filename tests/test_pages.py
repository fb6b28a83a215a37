"""Calls whose waves are a few launches: pages, and what is played before the reset.

What a page reads is poisoned before each call, as in ``test_score.py``: buffers, and here what was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagpass import SegmentLoop
from diagpass.rolled import pages as module
from diagpass.rolled.fills import Fills
from diagpass.rolled.pages import Pages, Playing
from tests import rolled_models as models
from tests.helpers import fast_copy
from tests.rolled_models import D, Step, T, tokens
from tests.tape import check, poisoned, replaying  # noqa: F401
from tests.test_score import NAMES

AHEAD = {"armt", "cache_none", "fifo_list", "first_flag", "mamba", "masked"}


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often pages were played ahead, and in vain."""
    counts = {"ahead": 0, "vain": 0}
    ahead, again = Playing.play_ahead, Playing._begin_again

    def play_ahead(self: Playing) -> None:
        counts["ahead"] += 1
        ahead(self)

    def begin_again(self: Playing) -> None:
        counts["vain"] += 1
        again(self)

    monkeypatch.setattr(Playing, "play_ahead", play_ahead)
    monkeypatch.setattr(Playing, "_begin_again", begin_again)
    yield counts


def all_pages(fast: Any) -> list[Pages]:
    return [score.pages for scores in fast._session.scores._known.values() for score in scores if score.pages]


@pytest.mark.parametrize(
    ("name", "segments"), [*((name, 2) for name in NAMES), ("armt", 16), ("mamba", 16), ("skips", 16)]
)
def test_pages_compute_the_same(
    name: str, segments: int, monkeypatch: pytest.MonkeyPatch, counted: dict[str, int]
) -> None:
    """Calls of two lengths in turn, with the pages of one long and those of several short."""
    monkeypatch.setattr(module, "SEGMENTS", segments)
    loop = models.build(name)
    fast: Any = fast_copy(loop)
    rtol = 1e-4 if models.expect(name).float32_inside else 1e-10
    states: list[Any] = [None, None]
    for call in range(14):
        check(loop, fast, models.inputs(name, (9 * T, 7 * T - 1)[call % 2], seed=call), states, rtol)
    counts = {len(pages.pages) for pages in all_pages(fast)}
    assert counts == ({2} if segments > 9 else {5, 4}), counts  # a short one leads
    assert (counted["ahead"] > 0) == (name in AHEAD)
    assert not counted["vain"]


class Layer(nn.Module):
    """State in an attribute, which the reset makes in one of several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mem = nn.Linear(D, D), nn.Linear(D, D)
        self.start = nn.Parameter(torch.randn(1, 1, D))
        self.state = torch.zeros(1, 1, D)
        self.corner = self.state[..., :1]

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.inp(h) + self.mem(self.state))
        self.state = h.mean((0, 1), keepdim=True)
        return h


class Resets(Step):
    """``way`` says how."""

    way = "zeros"

    def reset(self) -> None:
        layers: Any = self.layers
        for layer in layers:
            like = layer.start
            if self.way == "zeros":
                layer.state = torch.zeros_like(like)
            elif self.way == "ones":
                layer.state = torch.ones(1, 1, D, dtype=like.dtype)
            elif self.way == "full":
                layer.state = like.new_full((1, 1, D), 0.3)
            elif self.way == "in place":
                layer.state = torch.empty(1, 1, D, dtype=like.dtype)
                layer.state.fill_(0.7)
            elif self.way == "corner":
                layer.state = torch.zeros(1, 1, D, dtype=like.dtype)
                layer.state[..., :1].fill_(2.0)
            elif self.way == "learned":
                layer.state = like.detach() + 0.0
            elif self.way == "weights":
                layer.state = torch.zeros(1, 1, D, dtype=like.dtype)
                with torch.no_grad():
                    layer.inp.bias.fill_(0.25)


def resets() -> tuple[SegmentLoop, Any]:
    torch.manual_seed(3)
    loop = SegmentLoop(Resets([Layer() for _ in range(3)]), T, reset="reset").double().eval()
    return loop, fast_copy(loop)


def steps(loop: SegmentLoop, fast: Any) -> list[Any]:
    return [loop.step, fast.original.step]


def set_way(loop: SegmentLoop, fast: Any, way: str) -> None:
    for step in steps(loop, fast):
        step.way = way


@pytest.mark.parametrize("way", ["zeros", "ones", "full", "in place"])
def test_constants_are_foreseen(way: str, counted: dict[str, int]) -> None:
    loop, fast = resets()
    set_way(loop, fast, way)
    for call in range(11):
        check(loop, fast, tokens((6 + call % 2) * T), [], 1e-10)
    assert counted["ahead"] and not counted["vain"]


@pytest.mark.parametrize("way", ["corner", "learned", "weights"])
def test_what_is_no_constant_is_not_foreseen(way: str, counted: dict[str, int]) -> None:
    loop, fast = resets()
    set_way(loop, fast, way)
    for _ in range(9):
        check(loop, fast, tokens(6 * T), [], 1e-10)
    assert all_pages(fast)
    assert not counted["ahead"]


@pytest.mark.parametrize("other", ["ones", "full", "in place", "corner", "learned", "weights"])
def test_another_reset_after_pages_were_played_ahead(other: str, counted: dict[str, int]) -> None:
    loop, fast = resets()
    for way in ("zeros", other, "zeros"):
        set_way(loop, fast, way)
        for _ in range(7):
            check(loop, fast, tokens(6 * T), [], 1e-10)
    assert counted["ahead"] and counted["vain"]


@pytest.mark.parametrize("how", ["moved", "swapped"])
def test_weights_that_a_reset_replaces_are_read(how: str, counted: dict[str, int]) -> None:
    """Swapped: without any function of PyTorch that could be watched."""
    loop, fast = resets()
    torch.manual_seed(5)
    spare = [nn.Parameter(torch.randn(D, D, dtype=torch.float64)) for _ in range(4)]
    for _ in range(8):
        check(loop, fast, tokens(6 * T), [], 1e-10)
    assert counted["ahead"]
    for step in steps(loop, fast):
        plain = type(step).reset

        def reset(step: Any = step, plain: Any = plain, spare: Any = (*spare,)) -> None:
            plain(step)
            weights = step.layers[0].inp._parameters
            if how == "moved":
                step.layers[0].inp.weight.data = step.layers[0].inp.weight.data * 0.5
            else:
                now = [at for at, weight in enumerate(spare) if weight is weights["weight"]]
                weights["weight"] = spare[(now[0] + 1) % len(spare) if now else 0]

        step.reset = reset
    for _ in range(4):
        check(loop, fast, tokens(6 * T), [], 1e-10)


class Says(Step):
    """Returns more than its last layer's result: the segment, a constant that it holds, a state."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers)
        self.table = torch.randn(1, T, D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return {"y": y, "x": x, "twice": x * 2, "table": self.table, "state": self.layers[1].state}


def test_outputs_that_no_glue_computes() -> None:
    torch.manual_seed(3)
    loop = SegmentLoop(Says([Layer() for _ in range(3)]), T).double().eval()
    fast: Any = fast_copy(loop)
    for _ in range(9):
        for layer in (layer for step in steps(loop, fast) for layer in step.layers):
            layer.state = torch.ones(1, 1, D, dtype=torch.float64)
        check(loop, fast, tokens(6 * T), [], 1e-10)
        for step in steps(loop, fast):
            step.table += 1


class Late(Step):
    """Reads a tensor only from the third segment on."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers)
        self.late = torch.randn(1, 1, D, dtype=torch.float64)
        self.reset()

    def reset(self) -> None:
        self.count = 0
        for layer in self.layers:
            layer.state = torch.zeros(1, 1, D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x if self.count < 3 else x + self.late)


@pytest.mark.parametrize("segments", [16, 1])
def test_what_is_met_late_is_read(segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENTS", segments)
    torch.manual_seed(3)
    loop = SegmentLoop(Late([Layer() for _ in range(3)]), T, reset="reset").double().eval()
    fast: Any = fast_copy(loop)
    for _ in range(9):
        check(loop, fast, tokens(6 * T), [], 1e-10)
        for step in steps(loop, fast):
            step.late += 1
    assert all_pages(fast)


def test_inference_mode_and_no_grad_in_turn() -> None:
    loop, fast = resets()
    for call in range(12):
        x = tokens(6 * T)
        with torch.inference_mode(call % 2 == 1), torch.no_grad():
            torch.testing.assert_close(fast(x), loop(x))
    assert all_pages(fast)


def test_results_of_earlier_calls_stay() -> None:
    loop, fast = resets()
    kept = []
    with torch.no_grad():
        for _ in range(9):
            x = tokens(6 * T)
            kept.append((fast(x), loop(x)))
    for got, expected in kept:
        torch.testing.assert_close(got, expected)


def test_fills_are_known_by_memory() -> None:
    with Fills() as fills:
        a, b = torch.zeros(3), torch.ones(2)
        a.fill_(4)
        c = torch.full((2,), 5.0)
    assert [getattr(fills.of(t), "value", None) for t in (a, b, c, torch.zeros(3))] == [4, 1, 5, None]
    with Fills() as fills:
        a = torch.zeros(3)
        a[:1].fill_(1)
    assert fills.of(a) is None
    b = torch.ones(2)
    with Fills() as fills:
        b.zero_()
    assert fills.wrote_only([b]) and not fills.wrote_only([a])
    with Fills([weight := torch.ones(2)]) as fills:
        torch.ops.aten.mul_.Scalar(weight, 2)
    assert not fills.wrote_only([])


def test_a_write_that_no_function_shows_is_seen() -> None:
    """As an extension writes: past everything that watches functions."""
    weight = torch.ones(2)
    with Fills([weight]) as fills:
        a = torch.zeros(3)
        with torch._C.DisableTorchFunction():
            a.add_(1)
            weight.add_(1)
    assert fills.of(a) is None and not fills.wrote_only([])
