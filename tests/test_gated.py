"""Gated products as one operation: found where they are, left alone where they are not, and the same numbers.

The kernel itself is tested on a GPU (``tests/gpu/test_gated.py``); here the operation computes the products
apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import diagpass
from diagpass import SegmentLoop
from diagpass.kernels import gated as kernel_module
from diagpass.kernels.choose import Choice
from diagpass.kernels.gated import ACTIVATIONS, best_tiles
from diagpass.lowering.batch import batch_kind
from diagpass.lowering.gated import gate
from diagpass.lowering.inplace import results_of
from diagpass.lowering.widths import batch_any_width, holds, width_of
from diagpass.options import Options
from diagpass.runtime.forms import Forms
from tests import rolled_models as models
from tests.helpers import assert_tree_same, fast_copy
from tests.rolled_models import D, T
from tests.test_widths import batched_kinds, made_up

G, M, K, N = 3, 5, 4, 6
GATED = torch.ops.diagpass.gated_product.default
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def always(rows: Tensor, first: Tensor, activation: str) -> list[int]:
    """Replace wherever it is possible."""
    return [128, 128, 64, 3, 8, 1]


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((G, 1, M, K), (G, N, K), (G, N, K))
    x, u, v = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return x, u, v


def linear(x: Tensor, w: Tensor) -> Tensor:
    """A product with views around it, as a batched linear layer has them."""
    return torch.bmm(x.reshape(G, M, K), w.transpose(1, 2)).reshape(G, 1, M, N)


def swapped(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return linear(x, v) * F.silu(linear(x, u))


def one_cell(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    rows = x[0, 0]
    return F.silu(rows @ u[0].t()) * (rows @ v[0].t())


def turned_weights(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Weights stored the other way round, as GPT-2 stores them."""
    rows, first, second = x.reshape(G, M, K), u.reshape(G, K, N), v.reshape(G, K, N)
    return F.relu(torch.bmm(rows, first)) * torch.bmm(rows, second)


def activated_before_the_view(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    first = torch.tanh(torch.bmm(x.reshape(G, M, K), u.transpose(1, 2))).reshape(G, 1, M, N)
    return first * linear(x, v)


FOUND: list[Function] = [swapped, one_cell, turned_weights, activated_before_the_view]


def read_elsewhere(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    product = linear(x, u)
    return F.silu(product) * linear(x, v) + product


def other_rows(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return F.silu(linear(x, u)) * linear(x + 1, v)


def both_activated(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return F.silu(linear(x, u)) * torch.sigmoid(linear(x, v))


def activated_twice(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.tanh(F.silu(linear(x, u))) * linear(x, v)


def in_other_order(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The gate joins other elements of the second product."""
    other = linear(x, v).transpose(2, 3).reshape(G, 1, M, N)
    return F.silu(linear(x, u)) * other


def a_part(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return F.silu(linear(x, u)[:, :, :1]) * linear(x, v)


def rows_in_other_order(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    first = torch.bmm(x.reshape(G, M, K), u.transpose(1, 2))
    second = torch.bmm(x.reshape(G, K, M).transpose(1, 2), v.transpose(1, 2))
    return F.silu(first) * second


def squared(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    product = linear(x, u)
    return product * product


def rounded_between(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return F.silu(linear(x, u).float()) * linear(x, v)


def added(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return F.silu(linear(x, u)) + linear(x, v)


LEFT_ALONE: list[Function] = [
    read_elsewhere,
    other_rows,
    both_activated,
    activated_twice,
    in_other_order,
    a_part,
    rows_in_other_order,
    squared,
    rounded_between,
    added,
]


def count(graph: torch.fx.GraphModule) -> int:
    return sum(node.target is GATED for node in graph.graph.nodes)


def check(function: Function, expected: int) -> None:
    """The graph with gated products has so many, and gives what the function does."""
    values = operands()
    form = make_fx(function, tracing_mode="fake")(*values)
    found = gate(form, always)
    assert count(found) == expected and count(form) == 0
    assert (found is form) == (expected == 0)
    torch.testing.assert_close(found(*values), function(*values), rtol=1e-13, atol=1e-13)
    for node in found.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta, node


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gates_with_each_activation(name: str) -> None:
    def function(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return ACTIVATIONS[name](linear(x, u)) * linear(x, v)

    check(function, 1)


@pytest.mark.parametrize("function", FOUND)
def test_gates_in_other_words(function: Function) -> None:
    check(function, 1)


@pytest.mark.parametrize("function", LEFT_ALONE)
def test_what_is_left_alone(function: Function) -> None:
    check(function, 0)


def test_where_it_does_not_pay() -> None:
    form = make_fx(swapped, tracing_mode="fake")(*operands())
    assert gate(form, lambda rows, first, activation: None) is form


def test_on_the_cpu_there_is_no_kernel() -> None:
    x, u, _ = operands(torch.bfloat16)
    assert best_tiles(x.reshape(G, M, K), u, "silu") is None


def test_the_tiles_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's tilings against the products apart; what cannot be built does not take part."""
    seen: list[Any] = []

    def choose(key: Any, ways: Any, device: Any, what: str, budget: float, clearly: float) -> Any:
        seen.append(tuple(ways))
        for way in ways.values():
            way()
        return Choice(list(ways)[-1], {})

    monkeypatch.setattr(kernel_module, "_is_served", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(kernel_module, "_is_ready", lambda *values: False)
    monkeypatch.setattr(kernel_module, "choose", choose)
    before = torch.get_rng_state()
    x, u = torch.empty(40, 16, 8, dtype=torch.bfloat16), torch.empty(40, 24, 8, dtype=torch.bfloat16)
    assert best_tiles(x, u, "silu") == kernel_module.TILES[-1]
    assert best_tiles(x.float(), u, "silu") is None
    assert best_tiles(x, u.transpose(1, 2), "silu") is None, "its rows are not packed"
    assert torch.equal(before, torch.get_rng_state())

    def broken(*values: Any) -> Tensor:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(kernel_module, "gated_product", broken)
    assert best_tiles(x, u, "silu") is None or seen[-1] == ("apart",)
    assert seen[0] == ("apart", "0", "1", "2") and seen[-1] == ("apart",)


class Gated(nn.Module):
    """A layer with memory and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(D, 2 * D, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * D, D, bias=False)
        self.state = torch.zeros(1, 1, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        x = torch.tanh(h + self.state)
        h = h + self.down(F.silu(self.first(x)) * self.second(x))
        self.state = h.mean((0, 1), keepdim=True)
        return h


def deep() -> SegmentLoop:
    torch.manual_seed(0)
    return SegmentLoop(models.Step([Gated() for _ in range(4)]), T).double().eval()


@pytest.mark.parametrize("form", ["auto", "batched"])
def test_at_each_width(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diagpass.lowering.gated.best_tiles", always)
    monkeypatch.setattr("diagpass.lowering.accumulate.saves_traffic", lambda value: True)
    calls: list[int] = []
    apart = kernel_module._apart
    monkeypatch.setattr(kernel_module, "_apart", lambda *values: calls.append(1) or apart(*values))
    ((kind, shared),) = batched_kinds(deep(), models.tokens(5 * T))
    graph, _ = batch_any_width(kind, shared)
    symbol: Any = width_of(graph)
    run = Forms(Options.parse({"form": form}))._compiled(graph, "form", given=True)
    for width in (2, 9, 3):
        fixed, _ = batch_kind(kind, width, shared)
        values = made_up(fixed)
        targets = [torch.empty(shape, dtype=dtype) for shape, dtype, _ in results_of(graph, width)]
        run(*values, *targets)
        for got, wanted in zip(targets, fixed(*values), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        assert holds(symbol, width)
    assert not symbol.node.shape_env.guards
    assert len(calls) == (3 if form == "auto" else 0), "a pinned form has the products apart"


def test_a_model_with_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diagpass.lowering.gated.best_tiles", always)
    monkeypatch.setattr("diagpass.runtime.forms.is_measured", lambda options, device: False)
    calls: list[int] = []
    apart = kernel_module._apart
    monkeypatch.setattr(kernel_module, "_apart", lambda *values: calls.append(1) or apart(*values))
    loop = deep()
    fast: Any = diagpass.transform(fast_copy(loop), options={"schedule": "wavefront"})
    for length in (6 * T, 3 * T, 6 * T - 1):
        ids = models.tokens(length)
        with torch.no_grad():
            assert_tree_same(fast(ids), loop(ids), 1e-12, "outputs")
        states = [[layer.state for layer in each.step.layers] for each in (fast.original, loop)]
        assert_tree_same(*states, 1e-12, "state")
    assert calls
