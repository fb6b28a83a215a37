"""Batching rules: a group's result is the results of its cells, stacked."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from diagpass.errors import BatchingError
from diagpass.lowering.rules import Stacked, apply

G = 3
aten = torch.ops.aten


def x(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape).to(dtype)


def check(target: Any, args: tuple, kwargs: dict[str, Any], which: tuple[bool, ...]) -> None:
    """Hold a group against its cells; `which` says what tensors differ from cell to cell."""
    tensors = [at for at, arg in enumerate(args) if isinstance(arg, Tensor)]
    stacked = {at for at, differs in zip(tensors, which, strict=True) if differs}
    rows = {at: [args[at].roll(row) for row in range(G)] for at in stacked}
    cells = [
        target(*(rows[at][row] if at in stacked else arg for at, arg in enumerate(args)), **kwargs)
        for row in range(G)
    ]
    group = apply(
        target,
        G,
        tuple(Stacked(torch.stack(rows[at])) if at in stacked else arg for at, arg in enumerate(args)),
        kwargs,
    )
    for at, got in enumerate(tree_leaves(group)):
        want = torch.stack([tree_leaves(cell)[at] for cell in cells])
        assert got.tensor.shape == want.shape
        assert torch.equal(got.tensor.to(want.dtype), want)


def masks(count: int) -> list[tuple[bool, ...]]:
    return [which for which in itertools.product([True, False], repeat=count) if any(which)]


@pytest.mark.parametrize(
    "target, args, kwargs",
    [
        (aten.mul.Tensor, (x(2, 4), x(2, 4)), {}),
        (aten.mul.Tensor, (x(2, 4), x(4)), {}),
        (aten.mul.Tensor, (x(4), x(2, 4)), {}),
        (aten.mul.Tensor, (x(2, 4), x()), {}),
        (aten.mul.Tensor, (x(2, 4, dtype=torch.float32), x()), {}),
        (aten.add.Tensor, (x(2, 1), x(1, 4)), {"alpha": 2}),
        (aten.sub.Tensor, (x(), x()), {}),
        (aten.add.Tensor, (x(3, 4), x(3, 4, dtype=torch.float32)), {}),
        (aten.masked_fill.Scalar, (x(2, 4), x(4) > 0, 1.5), {}),
        (aten.addcmul.default, (x(2, 4), x(4), x(2, 4)), {"value": 0.5}),
        (aten.lerp.Tensor, (x(2, 4), x(2, 4), x(2, 4)), {}),
        (aten.clone.default, (x(2, 3, 4, 5),), {"memory_format": torch.contiguous_format}),
        (aten.frexp.Tensor, (x(2, 4),), {}),
    ],
)
def test_elementwise(target: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    for which in masks(sum(isinstance(arg, Tensor) for arg in args)):
        check(target, args, kwargs, which)


@pytest.mark.parametrize(
    "target, args",
    [
        (aten.reshape.default, (x(2, 6), [3, 4])),
        (aten.reshape.default, (x(2, 6), [-1])),
        (aten.reshape.default, (x(1), [])),
        (aten.view.default, (x(2, 6), [2, 2, 3])),
        (aten.permute.default, (x(2, 3, 4), [2, 0, 1])),
        (aten.permute.default, (x(2, 3, 4), [-1, 0, -2])),
        (aten.transpose.int, (x(2, 3, 4), 0, 2)),
        (aten.transpose.int, (x(2, 3, 4), -1, -3)),
        (aten.transpose.int, (x(3), 0, -1)),
        (aten.t.default, (x(2, 3),)),
        (aten.t.default, (x(3),)),
        (aten.unsqueeze.default, (x(2, 3), 0)),
        (aten.unsqueeze.default, (x(2, 3), 2)),
        (aten.unsqueeze.default, (x(2, 3), -1)),
        (aten.unsqueeze.default, (x(2, 3), -3)),
        (aten.unsqueeze.default, (x(), 0)),
        (aten.t.default, (x(),)),
    ],
)
def test_views(target: Any, args: tuple) -> None:
    check(target, args, {}, (True,))


def test_a_layout_of_a_cells_axes_is_not_one_of_a_groups() -> None:
    value = Stacked(x(G, 2, 3, 4, 5))
    with pytest.raises(BatchingError):
        apply(aten.clone.default, G, (value,), {"memory_format": torch.channels_last})
