"""The Triton kernel of :mod:`diagpass.kernels.gated`; imported where there is Triton.

The program is persistent: as many blocks as the device has multiprocessors go through the tiles of all
products. A tile has the same columns of both products side by side, so that one matrix instruction computes
both and the gate is applied before anything leaves the registers.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["gated"]


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "relu":
        y = tl.where(x < 0.0, 0.0, x)
    elif NAME == "sigmoid":
        y = tl.sigmoid(x)
    elif NAME == "tanh":
        y = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    else:
        y = x
    return y


@triton.jit(do_not_specialize=["cells", "rows", "columns"])
def _gated(
    rows_at,
    weights_at,
    result_at,
    cells,
    rows,
    columns,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    FLAT: tl.constexpr,
    SWAPPED: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    down = tl.cdiv(rows, ROWS)
    tiles = down * tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), cells * tiles, BLOCKS, flatten=FLAT):
        cell = tile // tiles
        place = tile % tiles
        row = (place % down) * ROWS
        column = (place // down) * COLUMNS
        both = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for inner in tl.range(0, INNER, STEP, num_stages=STAGES):
            x = rows_at.load([cell, row, inner]).reshape(ROWS, STEP)
            w = weights_at.load([cell, 0, column, inner]).reshape(2 * COLUMNS, STEP)
            both = tl.dot(x, w.T, both)
        one, two = both.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
        if SWAPPED:
            y = _activate(two, ACTIVATION) * one
        else:
            y = _activate(one, ACTIVATION) * two
        left, right = y.to(result_at.dtype).reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        result_at.store([cell, row, column], left.reshape(1, ROWS, COLUMNS // 2))
        result_at.store([cell, row, column + COLUMNS // 2], right.reshape(1, ROWS, COLUMNS // 2))


def gated(
    rows: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    result: torch.Tensor,
    activation: str,
    tiles: list[int],
    blocks: int,
) -> None:
    """Write ``activation(rows @ first.mT) * (rows @ second.mT)`` to ``result``.

    Parameters
    ----------
    rows, first, second, result
        Of shapes (cells, rows, inner), (cells, columns, inner) twice, and (cells, rows, columns), the last
        axis of each packed, ``first`` and ``second`` of the same strides; all addresses and steps are
        multiples of 16 bytes.
    activation
        One of :data:`diagpass.kernels.gated.ACTIVATIONS`.
    tiles
        Rows and columns of a tile, step along the inner axis, pipeline stages, warps, whether the loops over
        tiles and steps are one.
    blocks
        How many programs run at a time.
    """
    height, width, step, stages, warps, flat = tiles
    cells, count, inner = rows.shape
    columns = first.shape[1]
    distance = (second.data_ptr() - first.data_ptr()) // first.element_size()
    lower = first if distance > 0 else second
    jumps = [_step(lower, 0), abs(distance), lower.stride(1), 1]
    shape = [cells, 2, columns, inner]
    total = cells * triton.cdiv(count, height) * triton.cdiv(columns, width)
    kernel: Any = _gated
    kernel[(min(blocks, total),)](
        _described(rows, [1, height, step]),
        TensorDescriptor(lower, shape, jumps, [1, 2, width, step]),
        _described(result, [1, height, width // 2]),
        cells,
        count,
        columns,
        INNER=inner,
        ROWS=height,
        COLUMNS=width,
        STEP=step,
        BLOCKS=blocks,
        STAGES=stages,
        FLAT=bool(flat),
        SWAPPED=distance < 0,
        ACTIVATION=activation,
        num_warps=warps,
        num_stages=stages,
    )


def _described(value: torch.Tensor, block: list[int]) -> Any:
    return TensorDescriptor(value, list(value.shape), [_step(value, 0), value.stride(1), 1], block)


def _step(value: torch.Tensor, axis: int) -> int:
    """The step along an axis; along one of length 1, where a tensor may say anything, one that is legal."""
    return value.stride(axis) if value.shape[axis] > 1 else value.shape[1] * value.stride(1)
