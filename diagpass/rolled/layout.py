"""Segments in a layout that does not tell how many there are.

A slice of a longer tensor has strides that depend on its length, and Dynamo guards strides: the step would be
captured for each length. Such a slice is copied. Not packed, for kernels may take another path, and round
otherwise, for a packed operand than for the strided one of the sequential run; but as a slice of a tensor of
two segments, whatever their number.
"""

from __future__ import annotations

import functools
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
    is_contiguous = x.is_contiguous()
    target = _target(x.shape, x.stride(), is_contiguous)
    if target is None:
        return x.clone() if own else x
    if is_contiguous and not own:  # dimensions of size 1 may have any stride
        return x if x.stride() == target else x.as_strided(x.shape, target)
    return torch.empty_strided(x.shape, target, dtype=x.dtype, device=x.device).copy_(x)


@functools.lru_cache(maxsize=256)
def _target(shape: Sequence[int], stride: Sequence[int], is_contiguous: bool) -> tuple[int, ...] | None:
    """The strides of a fixed layout; None if such a tensor keeps its own."""
    if is_contiguous:
        return packed(shape)
    dim = sliced_dim(shape, stride)
    return None if dim is None else packed([*shape[:dim], 2 * shape[dim], *shape[dim + 1 :]])


def packed(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    return tuple(math.prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))


def sliced_dim(shape: Sequence[int], stride: Sequence[int]) -> int | None:
    """The dimension along which such a tensor is a slice of a contiguous one, or None."""
    for dim in range(1, len(shape)):
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
