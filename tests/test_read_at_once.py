"""Numbers and arrays that Dynamo reads out of a result at once, before the waves have run: refused."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from diagpass import SegmentLoop
from diagpass.capture import dynamo
from tests.helpers import assert_state_same, assert_tree_same, collect_warnings, fast_copy
from tests.rolled_models import D, Step, T, tokens


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.state = torch.zeros(1, 1, D, dtype=torch.float64)
        self.count = 1
        self.rate = 0.0
        self.rates = [0.0]
        self.array = numpy.zeros((1, 1, D))

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.linear(h) + self.state)
        self.state = h.mean((0, 1), keepdim=True)
        return self.after(h)

    def after(self, h: Tensor) -> Tensor:
        self.count += 1
        return h * (1 / self.count)


class KeepsRate(Layer):
    def after(self, h: Tensor) -> Tensor:
        self.count += 1
        h = h * (1 + self.rate)
        self.rate = 1 / self.count
        return h


class BecomesFloat(Layer):
    def after(self, h: Tensor) -> Tensor:
        self.count = self.count + 0.5
        return h * self.count


class KeepsRateInList(Layer):
    def after(self, h: Tensor) -> Tensor:
        self.count += 1
        h = h * (1 + self.rates[0])
        self.rates[0] = 1 / self.count
        return h


class KeepsArray(Layer):
    def after(self, h: Tensor) -> Tensor:
        h = h + torch.from_numpy(self.array)
        self.array = h.mean((0, 1), keepdim=True).numpy()
        return h


class KeepsTensor(Layer):
    def after(self, h: Tensor) -> Tensor:
        self.count += 1
        h = h * (1 + self.state.mean())
        self.state = torch.full_like(self.state, 1 / self.count)
        return h


@pytest.mark.parametrize(
    ("layer", "ran", "said"),
    [
        (Layer, "wavefront", None),
        (KeepsTensor, "wavefront", None),
        (KeepsRate, "sequential", "rate is a Python float"),
        (BecomesFloat, "sequential", "count is a Python float"),
        (KeepsRateInList, "sequential", "keeps a Python float"),
        (KeepsArray, "sequential", "array is a NumPy array"),
    ],
)
def test_results_are_those_of_the_loop(layer: type[Layer], ran: str, said: str | None) -> None:
    torch.manual_seed(3)
    loop = SegmentLoop(Step([layer() for _ in range(3)]), T).double().eval()
    fast: Any = fast_copy(loop)
    with torch.no_grad(), collect_warnings() as warned:
        for length in (5 * T, 2 * T):
            x = tokens(length)
            assert_tree_same(fast(x), loop(x), 1e-12, "output")
            assert_state_same(fast.original, loop, 1e-12, "state")
    assert fast.report.ran == ran
    assert said is None or any(said in text for text in warned)


class Returns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = Step([Layer() for _ in range(3)])
        self.count = 0

    def forward(self, x: Tensor, rate: float | None) -> tuple[Tensor, float]:
        self.count += 1
        return self.step(x) * (1 if rate is None else rate), self.count / 2


def test_a_carried_float_of_a_counter() -> None:
    torch.manual_seed(3)
    loop = SegmentLoop(Returns(), T, carries_state=True).double().eval()
    fast: Any = fast_copy(loop)
    x = tokens(4 * T)
    with torch.no_grad(), collect_warnings():
        got, expected = fast(x), loop(x)
    assert_tree_same(got[0], expected[0], 1e-12, "output")
    assert got[1] == expected[1]


def test_symbols_of_any_name_are_one_expression() -> None:
    import torch._dynamo.variables.builder as builder

    names = {"L['model']._modules['a, b'].n", *(f"L['model']._modules['{at}'].n" for at in range(700))}
    with dynamo.settings(names):
        assert all(map(builder.is_dynamic_source, names))
        assert not builder.is_dynamic_source("L['model']._modules['a'].n")
        assert not builder.is_dynamic_source("L['model']._modules['3'].n_heads")
        assert len(builder.get_dynamic_sources()) == 1
