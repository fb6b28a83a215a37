"""The option ``memory_limit``: waves as wide as fit, results as without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diagpass
from diagpass.analysis.memory import width_within, working_bytes
from diagpass.errors import OptionError
from tests import models, rolled_models
from tests.helpers import assert_tree_same, fast_copy
from tests.rolled_models import T


def test_a_cell_takes_what_is_alive_at_once() -> None:
    """Three results of 8 x 6 doubles, of which two are alive at a time."""

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            return torch.tanh(torch.exp(torch.sin(h * self.weight)))

    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    loop = diagpass.SegmentLoop(Stack(), 8)
    fast: Any = fast_copy(loop)
    with torch.no_grad():
        fast(torch.randn(1, 16, 6, dtype=torch.float64))
    (kind,) = fast._session.kinds.kinds
    assert working_bytes(kind) == 2 * 8 * 6 * 8
    assert width_within([kind], None, None) is None
    assert width_within([kind], 5, None) == 5
    assert width_within([kind], 5, 3 * 768) == 3
    assert width_within([kind], 2, 3 * 768) == 2
    assert width_within([kind], None, 1) == 1


@pytest.mark.parametrize("name", ["gru", "armt"])
def test_a_loop_under_a_limit(name: str) -> None:
    loop = rolled_models.build(name)
    x = rolled_models.inputs(name, 6 * T)
    free: Any = fast_copy(loop)
    with torch.no_grad():
        expected = free(x)
    cell = max(working_bytes(kind) for kind in free._session.kinds.kinds)
    for limit, width in ((2 * cell, 2), (1, 1)):
        fast: Any = fast_copy(loop, memory_limit=limit)
        with torch.no_grad():
            got = fast(x)
        assert_tree_same(got, expected, 1e-4 if name == "armt" else 1e-12, "output")
        assert fast.report.max_width == width


def test_a_model_under_a_limit() -> None:
    model, inputs = models.ZOO["attribute"]()
    free: Any = fast_copy(model)
    with torch.no_grad():
        expected = free(*inputs)
        wide = free.report.max_width
        fast: Any = fast_copy(model, memory_limit=1)
        assert_tree_same(fast(*inputs), expected, 1e-12, "output")
    assert fast.report.max_width == 1 < wide


@pytest.mark.parametrize("limit", [0, -1, 1.5, "2GB", True])
def test_a_limit_that_is_none(limit: Any) -> None:
    with pytest.raises(OptionError, match="memory_limit"):
        diagpass.transform(torch.nn.Linear(1, 1), options={"memory_limit": limit})
