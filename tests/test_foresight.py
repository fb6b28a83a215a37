"""Counters are foreseen: one capture for a behaviour; and a guess that is wrong costs no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagpass import SegmentLoop
from diagpass.backend import FoundCounters
from diagpass.capture.foresight import foresee
from tests import rolled_models as models
from tests.helpers import assert_state_same, assert_tree_same, collect_warnings, fast_copy
from tests.rolled_models import D, Step, T, tokens


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.state = torch.zeros(1, 1, D, dtype=torch.float64)
        self.count = 0
        self.size = 4
        self.late = False

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.linear(h) + self.state)
        self.state = h.mean((0, 1), keepdim=True)
        return self.after(h)

    def after(self, h: Tensor) -> Tensor:
        self.count += 1
        return h


class Scales(Layer):
    """Computes with its counter."""

    def after(self, h: Tensor) -> Tensor:
        self.count = self.count + 2
        return h * (self.count + 1)


class Cuts(Layer):
    """Would count a size, but never does."""

    def after(self, h: Tensor) -> Tensor:
        if self.late:
            self.size += 1
        return torch.cat([h[..., : self.size] * 2, h[..., self.size :]], -1)


class Heads(Layer):
    """Shapes depend on what would be counted."""

    def after(self, h: Tensor) -> Tensor:
        if self.late:
            self.size -= 1
        return h.unflatten(-1, (self.size // 2, -1)).flip(-2).flatten(-2)


class Other(Layer):
    """Counts where ``forward`` does not come."""

    def after(self, h: Tensor) -> Tensor:
        return h * self.size

    def prune(self) -> None:
        self.size -= 1


def loop_of(layer: type[Layer]) -> SegmentLoop:
    torch.manual_seed(2)
    return SegmentLoop(Step([layer() for _ in range(3)]), T).double().eval()


@pytest.fixture(autouse=True)
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What captures were started anew for."""
    found: list[set[str]] = []
    init = FoundCounters.__init__

    def counted(self: FoundCounters, sources: set[str]) -> None:
        found.append(set(sources))
        init(self, sources)

    monkeypatch.setattr(FoundCounters, "__init__", counted)
    return found


@pytest.mark.parametrize(
    ("layer", "attributes", "anew"),
    [
        (Layer, {"count"}, 0),
        (Scales, {"count"}, 0),
        (Cuts, {"size"}, 1),
        (Heads, {"size"}, 1),
        (Other, set(), 0),
    ],
)
def test_results_are_those_of_the_loop(
    layer: type[Layer], attributes: set[str], anew: int, restarts: list[set[str]]
) -> None:
    loop = loop_of(layer)
    names = foresee(loop.step, "L['model']")
    assert {name.rsplit(".", 1)[1] for name in names if "__dict__" not in name} == attributes
    fast: Any = fast_copy(loop)
    with torch.no_grad(), collect_warnings() as warned:
        for length in (5 * T, 3 * T):
            x = tokens(length)
            assert_tree_same(fast(x), loop(x), 1e-12, "output")
            assert_state_same(fast.original, loop, 1e-12, "state")
    assert len(restarts) <= anew and fast.report.ran == "wavefront"
    assert not [text for text in warned if "sequentially" in text]


def test_a_model_with_counters_is_captured_once(restarts: list[set[str]]) -> None:
    fast: Any = fast_copy(models.build("armt"))
    with torch.no_grad():
        fast(models.inputs("armt", 5 * T))
    assert restarts == [] and fast._session.captures == len(fast._session.programs)


class Looped(nn.Module):
    """A loop of its own around a step that lies some way down."""

    def __init__(self, layer: type[Layer]) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"step": Step([layer() for _ in range(3)])})

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([self.inner["step"](segment) for segment in h.split(T, 1)], 1)


@pytest.mark.parametrize(("layer", "anew"), [(Layer, 0), (Scales, 0), (Cuts, 1), (Heads, 1), (Other, 0)])
def test_a_loop_of_the_model_s_own(layer: type[Layer], anew: int, restarts: list[set[str]]) -> None:
    torch.manual_seed(2)
    model = Looped(layer).double().eval()
    fast: Any = fast_copy(model, loop="rolled")
    with torch.no_grad(), collect_warnings() as warned:
        for length in (5 * T, 3 * T):
            x = tokens(length)
            assert_tree_same(fast(x), model(x), 1e-12, "output")
            assert_state_same(fast.original, model, 1e-12, "state")
    assert len(restarts) <= anew and fast.report.ran == "wavefront"
    assert not [text for text in warned if "sequentially" in text]


def test_what_is_no_int_or_no_python_is_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flag, self.rate, self.both = True, 0.5, nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.flag += 1
            self.rate += 1
            return x

    odd = Odd()
    assert foresee(odd, "L['model']") == set()
    odd.both.parent = odd  # type: ignore[assignment]
    assert foresee(odd, "L['model']") == set()
