"""Models unlike those of the zoo, tried both ways: what other people's segment-recurrent models look like.

Each stands for something that it has and the others lack; its docstring says what.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diagpass import SegmentLoop
from tests.helpers import assert_state_same, assert_tree_same, clone_tree, fast_copy
from tests.models import Mix

B, T, D, L = 2, 4, 6, 3


def tokens(segments: int, tail: int = 0) -> Tensor:
    return torch.randn(B, segments * T + tail, D, dtype=torch.float64)


def compare(
    plain: nn.Module, *calls: tuple[Any, ...], rtol: float = 1e-10, **options: Any
) -> diagpass.Report:
    """Call after call the same as the plain model: outputs, inputs and state."""
    plain = plain.double().eval()
    fast = fast_copy(plain, **options)
    for inputs in calls:
        expected_in, got_in = clone_tree(inputs), clone_tree(inputs)
        with torch.no_grad():
            expected, got = plain(*expected_in), fast(*got_in)
        assert_tree_same(got, expected, rtol, "output ")
        assert_tree_same(got_in, expected_in, 0.0, "input ")
        assert_state_same(fast.original, plain, rtol)
    report = fast.report
    assert report.ran == "wavefront", report.reason
    return report


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a loss over all outputs."""
    outputs = torch.utils._pytree.tree_leaves(model(x))
    sum((out.double().tanh().sum() for out in outputs if out.requires_grad), start=x.new_zeros(())).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Sorting(nn.Module):
    """Between layers an operation gives two results: one goes on to the next layer, the other leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mix(D) for _ in range(L))

    def segment(self, h: Tensor, memories: list[Tensor], places: list[Tensor]) -> Tensor:
        for at, layer in enumerate(self.layers):
            h, memories[at] = layer(h, memories[at])
            values, order = h.sort(-1)
            h = h + 0.1 * values
            places.append(order.double().var().view(1, 1))
        return h

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memories, places = [x.new_zeros(B, D)] * L, []
        outputs = [self.segment(h, memories, places) for h in x.split(T, 1)]
        return torch.cat(outputs, 1), torch.cat(places, 1)


class SortingStep(Sorting):
    def forward(self, x: Tensor, state: list[Tensor] | None = None) -> Any:
        memories, places = list(state or [x.new_zeros(B, D)] * L), []
        return (self.segment(x, memories, places), torch.cat(places, 1)), memories


def test_the_other_result_of_an_operation_that_a_cell_contains() -> None:
    """It has the values of its own cell, not of the group."""
    compare(Sorting(), (tokens(4),), (tokens(3),))
    compare(SegmentLoop(SortingStep(), T, carries_state=True), (tokens(5),), (tokens(2, 1),))


class OneRecurrent(nn.Module):
    """A block-recurrent transformer: one layer in the middle has a state, the others have none."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.ModuleList(nn.Sequential(nn.RMSNorm(D), nn.Linear(D, D), nn.GELU()) for _ in range(2))
        self.recurrent, self.gate = Mix(D), nn.Linear(D, D)
        self.high = nn.ModuleList(nn.Sequential(nn.RMSNorm(D), nn.Linear(D, D), nn.GELU()) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory, outputs = x.new_zeros(B, D), []
        for h in x.split(T, 1):
            for layer in self.low:
                h = h + layer(h)
            h, new = self.recurrent(h, memory)
            gate = self.gate(new).sigmoid()
            memory = gate * memory + (1 - gate) * new
            for layer in self.high:
                h = h + layer(h)
            outputs.append(h)
        return torch.cat(outputs, 1), memory


def test_what_backward_needs_of_an_operation_with_several_results() -> None:
    """A norm in a cell saves its mean and deviation for the backward pass."""
    plain, x = OneRecurrent().double(), tokens(4)
    fast = fast_copy(copy.deepcopy(plain))
    expected, got = gradients(plain, x), gradients(fast, x)
    assert fast.report.ran == "wavefront"
    assert_tree_same(got, expected, 1e-10, "gradient ")
