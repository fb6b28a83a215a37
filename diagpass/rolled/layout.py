"""Segments in a layout that does not tell how many there are.

A slice of a longer tensor has strides that depend on its length, and Dynamo guards strides: the step would be
captured for each length. Such a slice is copied. Not packed, for kernels may take another path, and round
otherwise, for a packed operand than for the strided one of the sequential run; but as a slice of a tensor of
two segments, whatever their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def fixed_layout(x: torch.Tensor, own: bool) -> torch.Tensor:
    """``x`` with strides that its shape and contiguity determine.

    Parameters
    ----------
    x
        A segment.
    own
        Whether the result must have memory of its own in any case.

    Returns
    -------
    torch.Tensor
        The same values; ``x`` itself or a view of it where that will do. A tensor that is neither
        contiguous nor a slice of a contiguous one keeps its strides.
    """
    if x.layout is not torch.strided:
        return x.clone() if own else x
    if x.is_contiguous():
        target = packed(x.shape)
        if not own:  # dimensions of size 1 may have any stride
            return x if x.stride() == target else x.as_strided(x.shape, target)
    else:
        dim = sliced_dim(x)
        if dim is None:
            return x.clone() if own else x
        target = packed([*x.shape[:dim], 2 * x.shape[dim], *x.shape[dim + 1 :]])
    return torch.empty_strided(x.shape, target, dtype=x.dtype, device=x.device).copy_(x)


def packed(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    return tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))


def sliced_dim(x: torch.Tensor) -> int | None:
    """The dimension along which ``x`` is a slice of a contiguous tensor, or None."""
    shape, stride = x.shape, x.stride()
    for dim in range(1, x.dim()):
        outer = max((d for d in range(dim) if shape[d] > 1), default=None)
        if outer is None:
            continue
        between = math.prod(shape[outer + 1 : dim]) * math.prod(shape[dim + 1 :])
        length = stride[outer] // between if between else 0
        whole = packed([*shape[:dim], length, *shape[dim + 1 :]])
        if length > shape[dim] and all(
            size == 1 or have == want for size, have, want in zip(shape, stride, whole, strict=True)
        ):
            return dim
    return None
