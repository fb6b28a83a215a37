"""Models from elsewhere, unmodified: each runs as a wavefront, or says why not. See tests/zoo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from diagpass import SegmentLoop
from tests.helpers import assert_tree_same, collect_warnings, fast_copy
from tests.zoo import CASES
from tests.zoo.check import run
from tests.zoo.table import committed_row, deterministic


@pytest.mark.parametrize("name", CASES)
def test_runs_unmodified(name: str) -> None:
    """Equal outputs and final state, waves as derived by hand, and docs/models.md says so."""
    case = CASES[name]
    missing = case.missing()
    if missing is not None:
        pytest.skip(f"{missing} is not installed")
    if not case.often and os.environ.get("DIAGPASS_ZOO") != "all":
        pytest.skip("runs with DIAGPASS_ZOO=all and in `make models`")
    figures = run(case)
    assert committed_row(name) == deterministic(case, figures), "run `make models`"


class Stack(nn.Module):
    """Layers `(h, state) -> (h, state)` in a row, behind an embedding."""

    def __init__(self, layers: list[nn.Module], transpose: bool = False) -> None:
        super().__init__()
        self.embed, self.layers, self.transpose = nn.Embedding(11, 8), nn.ModuleList(layers), transpose

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = [None] * len(self.layers) if state is None else list(state)
        h = self.embed(x)
        h = h.transpose(0, 1) if self.transpose else h
        for at, layer in enumerate(self.layers):
            h, state[at] = layer(h, state[at])
        return h.transpose(0, 1) if self.transpose else h, state


def pair(layers: list[nn.Module], segments: int = 6, **options: Any) -> tuple[Any, Any, Any]:
    """What a loop and its wavefront return, and the report."""
    loop = SegmentLoop(Stack(layers, **options).eval(), 3, carries_state=True)
    fast, x = fast_copy(loop), torch.randint(11, (2, 3 * segments))
    with torch.no_grad(), collect_warnings() as warned:
        expected, got = loop(x), fast(x)
    assert not warned, warned
    return got, expected, fast.report


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_lstm_layers_in_float32_are_batched(bias: bool, batch_first: bool) -> None:
    """Their kernel on the CPU takes one set of weights, and reads its input as if it were contiguous."""
    layers: list[nn.Module] = [nn.LSTM(8, 8, bias=bias, batch_first=batch_first) for _ in range(3)]
    got, expected, report = pair(layers, transpose=not batch_first)
    assert_tree_same(got, expected, 1e-5, "batched")
    assert report.batched_cells >= 0.7 * report.cells, report


class Mean(nn.Module):
    """A residual linear layer with a running mean; `front` is something that it does first."""

    def __init__(self, front: nn.Module | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        if front is not None:
            self.front = front

    def forward(self, h: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor]:
        if hasattr(self, "front"):
            h = self.front(h)
        h = h + self.linear(h if m is None else h + m.unsqueeze(1)).tanh()
        return h, h.mean(1)


def test_a_norm_in_the_first_block_alone_makes_no_kind_of_its_own() -> None:
    got, expected, report = pair([Mean(nn.LayerNorm(8)), Mean(), Mean()])
    assert_tree_same(got, expected, 1e-5, "batched")
    assert (report.layers, report.waves, len(report.kinds)) == (3, 8, 2), str(report)


def test_a_norm_in_a_middle_block_stays_there() -> None:
    """A cell comes before it, so it is a part of a cell."""
    got, expected, report = pair([Mean(), Mean(nn.LayerNorm(8)), Mean()])
    assert_tree_same(got, expected, 1e-5, "batched")
    assert (report.layers, report.waves) == (3, 8), str(report)


FOUND: dict[type, str] = {}
CALLS: list[int] = []


def look_up(h: Tensor) -> Tensor:
    """Keeps in a global what it has found out about a type, as einops does."""
    if type(h) not in FOUND:
        FOUND[type(h)] = "torch"
    return h


def count(h: Tensor) -> Tensor:
    """Keeps in a global how often it was called."""
    CALLS.append(len(CALLS))
    return h


class Calls(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


def test_what_a_library_looks_up_once_is_found_first() -> None:
    FOUND.clear()
    got, expected, report = pair([Mean(Calls(look_up)) for _ in range(3)])
    assert_tree_same(got, expected, 1e-5, "batched")
    assert report.ran == "wavefront" and list(FOUND.values()) == ["torch"]


def test_what_a_step_counts_outside_is_refused_and_counted_once() -> None:
    CALLS.clear()
    loop = SegmentLoop(Stack([Mean(Calls(count)) for _ in range(3)]).eval(), 3, carries_state=True)
    fast = fast_copy(loop)
    with torch.no_grad(), collect_warnings() as warned:
        fast(torch.randint(11, (2, 12)))
    assert fast.report.ran == "sequential" and len(CALLS) == 12 and "CALLS" in warned[0], warned


class Cache:
    """A state object with tensors, a flag and a counter, changed in place by those who get it."""

    def __init__(self, means: list[Tensor]) -> None:
        self.means, self.fresh, self.seen = means, True, torch.zeros(1, dtype=torch.int64)


class CacheStep(Stack):
    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        h = self.embed(x)
        cache = Cache([torch.zeros_like(h[:, 0]) for _ in self.layers]) if cache is None else cache
        for at, layer in enumerate(self.layers):
            h, mean = layer(h, cache.means[at])
            cache.means[at].copy_(mean)
        cache.fresh, cache.seen = False, cache.seen + x.shape[1]
        return h, cache


def test_a_state_object_is_changed_by_the_step_that_is_given_it() -> None:
    """The caller's own object, too, as by the loop; explain leaves it alone."""
    loop = SegmentLoop(CacheStep([Mean() for _ in range(3)]).eval(), 3, carries_state=True)
    fast, x = fast_copy(loop), torch.randint(11, (2, 18))
    with torch.no_grad(), collect_warnings() as warned:
        mine, its = (Cache([torch.ones(2, 8) for _ in range(3)]) for _ in range(2))
        fast.capture(x, its)
        assert its.fresh and its.seen == 0 and all(torch.equal(m, torch.ones(2, 8)) for m in its.means)
        for _ in range(2):
            expected, got = loop(x, mine), fast(x, its)
            assert got[1] is its and expected[1] is mine
            assert_tree_same(got, expected, 1e-5, "given")
        assert_tree_same(fast(x), loop(x), 1e-5, "fresh")
    assert not warned and fast.report.ran == "wavefront" and mine.seen == 36, warned


def test_every_model_has_its_row() -> None:
    """And no model or package of the table is named in the library."""
    present = [name for name, case in CASES.items() if case.missing() is None]
    assert all(committed_row(name) is not None for name in present)
    library = "".join(path.read_text().lower() for path in Path(diagpass.__file__).parent.rglob("*.py"))
    names = [
        "infini-",
        "infini_",
        "infinitr",
        "rwkv",
        "xlstm",
        "mamba",
        "emformer",
        "mixtral",
        "qwen",
        "gemma",
        "neox",
        "mistral",
    ]
    assert [name for name in [*names, "einops", "jaxtyping", "transformer_xl"] if name in library] == []
