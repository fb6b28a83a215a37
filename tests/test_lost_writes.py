"""Attributes that Dynamo would lose: set after an operator that has a function of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from tests.helpers import assert_same, forced

D = 4


class Layer(nn.Module):
    """State in a plain attribute, None at first, or in a buffer; read before ``between``, set behind it."""

    def __init__(self, between: Callable[[Tensor], Tensor], buffer: bool) -> None:
        super().__init__()
        self.between = between
        self.linear = nn.Linear(D, D)
        self.memory: Tensor | None
        if buffer:
            self.register_buffer("memory", torch.zeros(2, 1, D))
        else:
            self.memory = None

    def forward(self, h: Tensor) -> Tensor:
        memory = h.new_zeros(h.shape[0], 1, D) if self.memory is None else self.memory
        out = self.between(torch.tanh(self.linear(h + memory)))
        self.memory = (memory + out.mean(1, keepdim=True)) / 2
        return h + out


def branch(h: Tensor) -> Tensor:
    return torch.cond(h.sum() > 0, lambda t: t * 2, lambda t: t * 3, (h,))


def hook(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 0.5)
    return h


class Step(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor], buffer: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(between, buffer) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h


class Model(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor], buffer: bool = False) -> None:
        super().__init__()
        self.step = Step(between, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.step(segment) for segment in x.split(3, 1)], 1)


def run_both(run: Any, model: nn.Module, plain: nn.Module) -> None:
    for _ in range(2):
        x = torch.randn(2, 12, D, dtype=torch.float64)
        torch.testing.assert_close(run(x), plain(x), rtol=1e-12, atol=1e-12)
        for mine, its in zip(model.step.layers, plain.step.layers, strict=True):
            torch.testing.assert_close(mine.memory, its.memory, rtol=1e-12, atol=1e-12)
            for layer in (mine, its):
                layer.memory = layer.memory.detach()


@pytest.mark.parametrize("between", [branch, hook])
def test_what_would_be_lost_is_said(between: Callable[[Tensor], Tensor]) -> None:
    plain = Model(between).double()
    model = copy.deepcopy(plain)
    fast = diagpass.transform(model, options={**forced(), "loop": "flat"})
    said = pytest.warns(diagpass.DiagpassWarning, match=r"loses what .*layers.\d.memory is set to")
    with torch.set_grad_enabled(between is hook), said:
        run_both(fast, model, plain)
    assert fast.report.ran == "sequential"


def test_a_compiled_model_raises() -> None:
    compiled = torch.compile(Model(branch).double(), backend="diagonal", options=forced())
    with torch.no_grad(), pytest.raises(Exception, match=r"loses what .*layers.\d.memory is set to"):
        compiled(torch.randn(2, 12, D, dtype=torch.float64))


def test_what_is_not_lost_runs() -> None:
    x = torch.randn(2, 12, D, dtype=torch.float64)
    assert_same(Model(branch, buffer=True).double(), (x,), {**forced(), "loop": "flat"})
