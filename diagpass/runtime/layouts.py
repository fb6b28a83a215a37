"""How tensors lie in memory: others like them, and what else lies there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["allocator", "have_common", "is_shared", "like", "overlaps"]


def like(value: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of the same shape, strides, data type and device."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def allocator(
    sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], torch.Tensor]:
    """What makes tensors of a layout, with no contents yet.

    Inductor's allocation takes less than half as long as ``torch.empty_strided``; it knows one device of CUDA
    alone, the current one.
    """
    guards: Any = getattr(torch._C, "_dynamo").guards  # noqa: B009
    fast = getattr(guards, f"_empty_strided_{device.type}", None)
    if fast is not None and (device.type == "cpu" or torch.cuda.device_count() == 1):
        return functools.partial(fast, sizes, strides, dtype)
    return functools.partial(torch.empty_strided, sizes, strides, dtype=dtype, device=device)


def overlaps(value: torch.Tensor) -> bool:
    """Whether elements of the tensor share memory, or it has none; a maybe is a yes."""
    span = 0
    for step, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and step <= span:
            return True
        span += (size - 1) * step
    return value.untyped_storage().nbytes() == 0


def have_common(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two (fake) tensors on one memory have elements in common."""
    if one.numel() == 0 or other.numel() == 0:
        return False
    ends = [
        int(
            value.storage_offset()
            + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        )
        for value in (one, other)
    ]
    marked = torch.zeros(max(ends) + 1, dtype=torch.bool, device="cpu")
    _part(marked, one).fill_(True)
    return bool(_part(marked, other).any())


def is_shared(value: torch.Tensor) -> bool:
    """Whether another tensor lies in the same memory."""
    return _uses(value) > _ALONE


def _uses(value: torch.Tensor) -> int:
    count: Any = getattr(torch._C, "_storage_Use_Count")  # noqa: B009
    return count(value.untyped_storage()._cdata)


_ALONE = _uses(torch.empty(1))


def _part(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return memory.as_strided(
        tuple(map(int, like.shape)), tuple(map(int, like.stride())), int(like.storage_offset())
    )
