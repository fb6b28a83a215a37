"""Segments of a batch have gaps in their memory; the layer that is given them is of the others' kind."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from diagpass import SegmentLoop
from tests.helpers import assert_closer


class Cell(nn.Module):
    """Begins with a multiplication of what it is given."""

    def __init__(self, d: int, begin: str = "linear") -> None:
        super().__init__()
        self.a, self.b = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.begin = begin
        self.register_buffer("state", torch.zeros(3, d))

    def forward(self, x: Tensor) -> Tensor:
        if self.begin == "linear":
            y = self.a(x)
        elif self.begin == "matmul":
            y = x @ self.a.weight
        elif self.begin == "reshape":
            y = (x.reshape(-1, x.shape[-1]) @ self.a.weight).view(x.shape)
        else:
            y = torch.einsum("bsd,de->bse", x, self.a.weight)
        y = torch.tanh(y) + self.state.unsqueeze(1)
        self.state = y.mean(1)
        return self.b(y) + x


class Stack(nn.Module):
    """``before`` is done with each segment ahead of the layers."""

    def __init__(
        self, begin: str = "linear", before: Callable[[Tensor], Tensor] | None = None, keeps: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cell(16, begin) for _ in range(4))
        self.before, self.keeps = before, keeps

    def reset(self) -> None:
        for layer in self.layers:
            layer.state = torch.zeros_like(layer.state)

    def forward(self, x: Tensor) -> Any:
        self.reset()
        done, kept = [], []
        for h in x.split(8, 1):
            if self.before is not None:
                h = self.before(h)
            kept.append(h)
            for layer in self.layers:
                h = layer(h)
            done.append(h)
        return (torch.cat(done, 1), kept) if self.keeps else torch.cat(done, 1)


def agree(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """The report, if the outputs, the state and what became of the input are the model's."""
    mine, given = copy.deepcopy(model), x.clone()
    fast = diagpass.transform(mine, options={"compiler": "eager", **options})
    for _ in range(2):
        ours, theirs = fast(given), model(x)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(mine.state_dict(), model.state_dict())
        torch.testing.assert_close(given, x, rtol=0, atol=0)
        strides = [[t.stride() for t in torch.utils._pytree.tree_leaves(r)] for r in (ours, theirs)]
        assert strides[0] == strides[1]
    return fast.report


@pytest.mark.parametrize("begin", ["linear", "matmul", "reshape", "einsum"])
def test_the_first_layer_is_of_the_others_kind(begin: str) -> None:
    with torch.no_grad():
        report = agree(Stack(begin), torch.randn(3, 32, 16))
    assert len(report.kinds) == 1
    assert report.max_width == 4


@pytest.mark.parametrize("loop", ["flat", "rolled"])
def test_however_the_loop_runs(loop: str) -> None:
    with torch.no_grad():
        assert len(agree(Stack(), torch.randn(3, 48, 16), loop=loop).kinds) == 1


def test_segments_of_a_segment_loop() -> None:
    stack = Stack()
    step = nn.Sequential(*stack.layers)
    loop = SegmentLoop(step, 8, reset=lambda _: stack.reset())
    x = torch.randn(3, 48, 16)
    with torch.no_grad():
        expected = stack(x)
        fast = diagpass.transform(loop, options={"compiler": "eager"})
        torch.testing.assert_close(fast(x), expected)
    assert len(fast.report.kinds) == 1


def test_gradients() -> None:
    model, x = Stack(), torch.randn(3, 32, 16, requires_grad=True)
    mine = copy.deepcopy(model)
    fast = diagpass.transform(mine, options={"compiler": "eager"})
    double, x64 = copy.deepcopy(model).double(), x.detach().double().requires_grad_()

    def gradients(run: nn.Module, module: nn.Module, given: Tensor) -> list[Any]:
        run(given).square().sum().backward()
        return [given.grad, *(weight.grad for weight in module.parameters())]

    exact, ours = gradients(double, double, x64), gradients(fast, mine, x)
    x.grad = None
    assert_closer(exact, ours, gradients(model, model, x))
    assert len(fast.report.kinds) == 1
    assert fast.report.ran == "wavefront"


def written(h: Tensor) -> Tensor:
    h.mul_(0.5)
    return h


def seen_through_another(h: Tensor) -> Tensor:
    h.transpose(1, 2)[:, 0] = 1.0
    return h


def relu_in_place(h: Tensor) -> Tensor:
    return nn.functional.relu(h, True)


def by_stride(h: Tensor) -> Tensor:
    return torch.as_strided(h, h.shape, (h.stride(0), 0, 1))


def expanded(h: Tensor) -> Tensor:
    return h[:1].expand(3, -1, -1)


@pytest.mark.parametrize("before", [written, seen_through_another, relu_in_place, by_stride, expanded])
def test_what_is_written_or_lies_otherwise_is_left_alone(
    before: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    with torch.no_grad(), caplog.at_level(logging.INFO, "diagpass.capture.gaps"):
        agree(Stack(before=before), torch.randn(3, 32, 16))
    assert not caplog.records


def test_an_input_that_lies_otherwise_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    with torch.no_grad(), caplog.at_level(logging.INFO, "diagpass.capture.gaps"):
        agree(Stack(), torch.randn(3, 16, 32).transpose(1, 2))
    assert not caplog.records


def test_what_is_returned_is_a_view_of_the_input() -> None:
    x = torch.randn(3, 32, 16)
    with torch.no_grad():
        agree(Stack(keeps=True), x)
        fast = diagpass.transform(Stack(keeps=True), options={"compiler": "eager"})
        _, kept = fast(x)
    assert {segment.untyped_storage().data_ptr() for segment in kept} == {x.untyped_storage().data_ptr()}


def test_one_sequence_has_no_gaps(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack()
    for layer in model.layers:
        layer.state = layer.state[:1].clone()
    with torch.no_grad(), caplog.at_level(logging.INFO, "diagpass.capture.gaps"):
        assert len(agree(model, torch.randn(1, 32, 16)).kinds) == 1
    assert not caplog.records


class Attends(Cell):
    """Begins with a product of the segment by itself, and splits its heads: neither copies it."""

    def forward(self, x: Tensor) -> Tensor:
        scores = (x @ x.mT).softmax(-1)
        heads = x.reshape(*x.shape[:2], 4, 4).sum(2).mean((1, 2))
        return (
            scores @ x
            + torch.einsum("bsd,btd->bst", x, x).mean()
            + heads[:, None, None]
            + self.state[:, None]
        )


def test_products_that_read_it_where_it_lies(caplog: pytest.LogCaptureFixture) -> None:
    model = Stack()
    model.layers = nn.ModuleList(Attends(16) for _ in range(3))
    with torch.no_grad(), caplog.at_level(logging.INFO, "diagpass.capture.gaps"):
        agree(model, torch.randn(3, 32, 16))
    assert not caplog.records
