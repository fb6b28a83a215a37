"""Which memory an operation writes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

__all__ = ["is_foreign", "memory", "writes_weights", "written_by"]


def memory(tensor: torch.Tensor) -> int:
    """What is the same for tensors that use the same memory."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def is_foreign(tensor: torch.Tensor) -> bool:
    """Whether the memory may be written by others than PyTorch's operations, NumPy for instance."""
    return tensor.layout is torch.strided and not tensor.untyped_storage().resizable()


def written_by(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that an operation writes in place, by its schema.

    Batch norms update running statistics in training without saying so in theirs.
    """
    schema = func._schema
    names = _written_names(func)
    if not names:
        return []
    found: list[torch.Tensor] = []
    for at, argument in enumerate(schema.arguments):
        value = args[at] if at < len(args) else kwargs.get(argument.name, argument.default_value)
        if argument.name in names:
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        elif argument.name in _TRAINING and not schema.is_mutable and not value:
            return []
    return found


@functools.cache
def _written_names(func: Any) -> frozenset[str]:
    schema = func._schema
    if schema.is_mutable:
        return frozenset(
            a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
        )
    hidden = frozenset(a.name for a in schema.arguments) & _RUNNING
    return frozenset() if "backward" in schema.name or "functional" in schema.name else hidden


_RUNNING = frozenset(("running_mean", "running_var"))
_TRAINING = frozenset(("training", "train"))


def writes_weights(model: torch.nn.Module, func: Any, args: tuple, kwargs: dict) -> bool:
    """Whether an operation writes in place into a parameter of the model."""
    written = {memory(tensor) for tensor in written_by(func, args, kwargs)}
    return bool(written) and any(memory(weight) in written for weight in model.parameters())
