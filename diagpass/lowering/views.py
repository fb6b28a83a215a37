"""What the views of a graph of ATen operations do to the memory that they show."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten

__all__ = ["is_packed", "is_view", "is_whole"]


def is_view(node: fx.Node) -> bool:
    """Whether the node's result may be a view of its first argument."""
    target: Any = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        target.is_view or target is aten._unsafe_view.default
    )


def is_whole(node: fx.Node) -> bool:
    """Whether a view shows all that there is, once."""
    source: Any = node.args[0]
    value = source.meta.get("val")
    return isinstance(value, torch.Tensor) and node.meta["val"].numel() == value.numel()


def is_packed(node: fx.Node) -> bool:
    """Whether a value fills its memory in order, and at most one of its sizes is not known."""
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_contiguous() and _symbols(value) < 2


def _symbols(value: torch.Tensor) -> int:
    """How many sizes are not known."""
    return sum(not isinstance(size, int) for size in value.shape)
