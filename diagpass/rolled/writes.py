"""Which memory an operation writes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

__all__ = ["memory", "writes_weights", "written_by"]


def memory(tensor: torch.Tensor) -> int:
    """What is the same for tensors that use the same memory."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def written_by(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that an operation writes in place, by its schema."""
    found: list[torch.Tensor] = []
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found


def writes_weights(model: torch.nn.Module, func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operation writes in place into a parameter of the model."""
    written = {memory(tensor) for tensor in written_by(func, args, kwargs)}
    return any(memory(weight) in written for weight in model.parameters())
