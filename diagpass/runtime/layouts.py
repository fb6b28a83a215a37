"""Tensors that stand in for others: of the same layout, in memory of their own."""

from __future__ import annotations

import torch

__all__ = ["like", "overlaps"]


def like(value: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of the same shape, strides, data type and device."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def overlaps(value: torch.Tensor) -> bool:
    """Whether elements of the tensor share memory, or it has none; a maybe is a yes."""
    span = 0
    for step, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and step <= span:
            return True
        span += (size - 1) * step
    return value.untyped_storage().nbytes() == 0
