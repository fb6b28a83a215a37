"""The stacked weights: made once, checked at every call, made anew when the model was edited.

``share``: the model's own parameters are views of the stack, so that there is one copy and an in-place
edit is seen at once. A row is handed out through DLPack, which gives it a storage object of its own:
saving, copying and serialising a layer sees that layer alone. ``copy``: the stack is separate, and each
call compares it with the parameters, because ``param.data`` can be written without any trace.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import torch

log = logging.getLogger(__name__)

ALIGNMENT = 64  # bytes; what torch's CPU allocator gives

_shared_stacks: weakref.WeakValueDictionary[tuple, torch.Tensor] = weakref.WeakValueDictionary()


Places = tuple[list[Any], ...]


def addresses(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where tensors lie."""
    return list(map(torch.Tensor.data_ptr, tensors))


def places(tensors: Sequence[torch.Tensor]) -> Places:
    """Where tensors lie, and how: ``weight.data = weight.data.t()`` leaves a weight where it was."""
    dtypes = list(map(_dtype, tensors))
    return (
        addresses(tensors),
        list(map(torch.Tensor.stride, tensors)),
        list(map(torch.Tensor.size, tensors)),
        dtypes,
        list(map(torch.Tensor.is_conj, tensors)) if any(dtype.is_complex for dtype in set(dtypes)) else [],
    )


_dtype = operator.attrgetter("dtype")


@dataclasses.dataclass
class _Held:
    """One stack and what it was made from."""

    tensor: torch.Tensor
    places: Places
    shared: bool


class WeightStacks:
    """The tensors behind a :class:`~diagpass.lowering.weights.WeightPlan`.

    Parameters
    ----------
    rows
        Per stack, the positions of its rows among the program's arguments.
    owns
        Per stack, whether it may become the storage of its parameters.
    share
        Whether parameters become views of the stacks that own them.
    """

    def __init__(self, rows: Sequence[Sequence[int]], owns: Sequence[bool], share: bool) -> None:
        self.rows = [tuple(positions) for positions in rows]
        self.owns = tuple(owns)
        self.share = share
        self._held: list[_Held | None] = [None] * len(self.rows)
        self.restacked = 0

    def __call__(self, args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The stacks for these arguments, each of shape (rows, *weight shape)."""
        found = []
        for at, positions in enumerate(self.rows):
            weights = [args[position] for position in positions]
            held = self._held[at]
            if held is None or not _current(held, weights):
                with torch.inference_mode(False), torch.no_grad():
                    held = self._held[at] = self._stack(weights, self.share and self.owns[at])
                self.restacked += 1
            found.append(held.tensor)
        return found

    @property
    def follow_weights(self) -> bool:
        """Whether the stacks are their weights' memory, so that they hold what these do."""
        return all(held is not None and held.shared for held in self._held)

    def _stack(self, weights: list[torch.Tensor], share: bool) -> _Held:
        if share and all(_shareable(weight) for weight in weights):
            stack = _existing(weights)
            if stack is None:
                stack = _aligned(weights)
                for row, weight in zip(stack, weights, strict=True):
                    weight.data = torch.from_dlpack(row)
                _shared_stacks[_key(weights)] = stack
            return _Held(stack, places(weights), True)
        return _Held(_aligned(weights), places(weights), False)


def _aligned(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weights in one tensor of shape (rows, *shape), each row where an allocation could begin.

    Kernels choose their path by alignment: rows packed without gaps would round differently.
    """
    first = weights[0]
    step = -(-first.numel() * first.element_size() // ALIGNMENT) * ALIGNMENT // first.element_size()
    packed = torch.zeros(len(weights), step, dtype=first.dtype, device=first.device)
    stack = packed[:, : first.numel()].unflatten(1, first.shape) if first.dim() else packed[:, 0]
    for row, weight in enumerate(weights):
        stack[row].copy_(weight.detach())
    return stack


def _current(held: _Held, weights: Sequence[torch.Tensor]) -> bool:
    """Whether the stack still holds the weights' values."""
    if held.shared:
        return places(weights) == held.places
    return all(
        row.dtype == weight.dtype and row.device == weight.device and torch.equal(row, weight)
        for row, weight in zip(held.tensor, weights, strict=True)
    )


def _shareable(weight: torch.Tensor) -> bool:
    """Whether the weight can move into a stack without anybody noticing.

    It must be a plain, contiguous parameter that has its storage to itself.
    """
    plain = isinstance(weight, torch.nn.Parameter) and type(weight.data) is torch.Tensor
    return (
        plain
        and weight.is_contiguous()
        and weight.layout is torch.strided
        and not weight.is_inference()
        and weight.numel() > 0
        and weight.dtype is not torch.bool
        and weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
    )


def _key(weights: Sequence[torch.Tensor]) -> tuple:
    first = weights[0]
    return (str(first.device), first.dtype, len(weights), first.shape, first.data_ptr())


def _existing(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The stack of which these weights are the rows already, in this order (another plan made it)."""
    stack = _shared_stacks.get(_key(weights))
    if stack is None:
        return None
    same = all(row.data_ptr() == weight.data_ptr() for row, weight in zip(stack, weights, strict=True))
    return stack if same else None
