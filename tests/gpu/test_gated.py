"""The kernel for gated products: each activation, odd sizes, weights wherever they lie, in a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diagpass
from diagpass.kernels import gated as kernel_module
from diagpass.kernels.gated import ACTIVATIONS, TILES, best_tiles, gated_product
from tests.gpu.test_cuda import assert_typically_closer, call, make, moved, state
from tests.helpers import assert_closer

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a CUDA device with a tensor memory accelerator",
)
SHAPES = [
    (3, 256, 192, 384),
    (2, 37, 72, 200),
    (1, 1, 64, 8),
    (5, 130, 1024, 136),
]  # cells, rows, inner, columns


def operands(
    cells: int, rows: int, inner: int, columns: int, dtype: torch.dtype, swapped: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, and weights as every second row of two stacks."""
    generator = torch.Generator("cuda").manual_seed(0)

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=generator).to(dtype)

    x, stacks = made(cells, rows, inner), made(2, 2 * cells, columns, inner) * inner**-0.5
    first, second = stacks[int(swapped), ::2], stacks[int(not swapped), ::2]
    return x, first, second


def compare(got: Tensor, x: Tensor, first: Tensor, second: Tensor, name: str) -> None:
    """The kernel is as close to the float64 result as the operations one after another."""
    exact = kernel_module._apart(x.double(), first.double(), second.double(), name)
    assert_closer(exact, got, kernel_module._apart(x, first, second, name))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each launch of the kernel."""
    from diagpass.kernels import tiles

    found: list[int] = []
    gated = tiles.gated

    def noted(*args: Any) -> None:
        found.append(1)
        gated(*args)

    monkeypatch.setattr(tiles, "gated", noted)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation(name: str, dtype: torch.dtype, launched: list[int]) -> None:
    x, first, second = operands(*SHAPES[0], dtype)
    compare(gated_product(x, first, second, name, TILES[0]), x, first, second, name)
    assert launched


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("swapped", [False, True])
def test_odd_sizes_and_places(
    shape: tuple[int, int, int, int], tiles: list[int], swapped: bool, launched: list[int]
) -> None:
    x, first, second = operands(*shape, torch.bfloat16, swapped)
    compare(gated_product(x, first, second, "silu", tiles), x, first, second, "silu")
    compare(gated_product(x[0], first[0], second[0], "silu", tiles), x[0], first[0], second[0], "silu")
    assert len(launched) == 2


def test_what_the_kernel_cannot_read_is_computed_apart(launched: list[int]) -> None:
    x, first, second = operands(*SHAPES[0], torch.bfloat16)
    odd = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view_as(x).copy_(x)
    turned = first.mT.contiguous().mT
    for values in ((odd, first, second), (x, turned, second), (x, first, first)):
        compare(gated_product(*values, "silu", TILES[0]), *values, "silu")
    assert gated_product(x[:, :0], first, second, "silu", TILES[0]).shape == (3, 0, 384)
    assert not launched


def test_a_graph_replays_it() -> None:
    x, first, second = operands(*SHAPES[0], torch.bfloat16)
    gated_product(x, first, second, "silu", TILES[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = gated_product(x, first, second, "silu", TILES[0])
    x.copy_(x.flip(0))
    graph.replay()
    compare(result, x, first, second, "silu")


def test_the_choice_is_kept() -> None:
    x, first, _ = operands(8, 1152, 1024, 2048, torch.bfloat16)
    found = best_tiles(x, first, "silu")
    assert found is None or found in TILES
    assert best_tiles(x, first, "silu") == found
    assert best_tiles(x.float(), first.float(), "silu") is None


def test_in_a_model(monkeypatch: pytest.MonkeyPatch, launched: list[int]) -> None:
    monkeypatch.setattr("diagpass.lowering.gated.best_tiles", lambda rows, first, name: TILES[0])
    exact_loop, ids = make(torch.float64, batch=16)
    loop, _ = make(torch.bfloat16, batch=16)
    exact = call(exact_loop, ids)
    plain = moved(loop)
    fast: Any = diagpass.transform(moved(loop), options={"schedule": "wavefront"})
    for _ in range(6):
        expected, got = call(plain, ids.cuda()), call(fast, ids.cuda())
        assert_typically_closer(exact, got, expected)
        assert_typically_closer(state(exact_loop), state(fast.original), state(plain))
    assert launched
