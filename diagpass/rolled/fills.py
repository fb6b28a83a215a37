"""What a reset puts into the state, known from its operations: constants.

Most resets make zeros. A call whose state at the start is constants that were met before can be played before
the reset has run (:mod:`diagpass.rolled.pages`), if the reset is watched and does the same again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Fill", "Fills"]

aten = torch.ops.aten

_CONSTANT = {
    aten.zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones.default: 1,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
}
_NUMBER_AT = {aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2}
_WRITES = {aten.zero_.default: 1, aten.fill_.Scalar: 2}
_EMPTY = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
)


@dataclasses.dataclass(frozen=True)
class Fill:
    """One number, everywhere in a tensor."""

    value: float


class Fills(TorchDispatchMode):
    """Watches what runs inside, and knows of each tensor that it left whether it is one number everywhere.

    An operation that is neither a factory of constants nor a fill of all of a tensor's memory ends all
    knowledge: what it wrote, or made an alias of, is not looked into.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fills: dict[int, Fill] = {}  # by the address of the memory, which is filled as a whole
        self._tensors: dict[int, tuple[torch.Tensor, int]] = {}  # alive: their ids and memory are their own
        self._fresh: list[Any] = []
        self._written: set[int] = set()
        self._is_lost = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each operation would turn Dynamo off and on again, which takes longer than it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._is_lost:
            self._look(func, args, result)
        return result

    def _look(self, func: Any, args: Any, result: Any) -> None:
        if func in _WRITES and len(args) == _WRITES[func]:
            self._holds(args[0], args[1] if func is aten.fill_.Scalar else 0)
            self._written.add(_memory(args[0]))
        elif func is aten.detach.default:
            known = self.of(args[0])
            if known is not None:
                self._holds(result, known.value)
            elif _memory(args[0]) not in map(_memory, self._fresh):
                self._lose()
        elif func in _CONSTANT:
            self._fresh.append(result)
            self._holds(result, _CONSTANT[func])
        elif func in _NUMBER_AT and len(args) > _NUMBER_AT[func]:
            self._fresh.append(result)
            self._holds(result, args[_NUMBER_AT[func]])
        elif func in _EMPTY:
            self._fresh.append(result)
        else:
            self._lose()

    def _holds(self, tensor: Any, value: Any) -> None:
        if type(tensor) is not torch.Tensor or type(value) not in (bool, int, float):
            self._lose()
            return
        whole = tensor.numel() * tensor.element_size()
        if not 0 < whole == tensor.untyped_storage().nbytes():
            self._lose()
            return
        self._fills[_memory(tensor)] = Fill(value)
        self._tensors[id(tensor)] = tensor, _memory(tensor)

    def _lose(self) -> None:
        self._is_lost = True
        self._tensors.clear()

    def of(self, tensor: torch.Tensor) -> Fill | None:
        """The number that the tensor holds; None if that is not known."""
        found = self._tensors.get(id(tensor))
        return None if found is None else self._fills[found[1]]

    def wrote_only(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether no memory that was there before was written but that of these tensors."""
        known = {_memory(tensor) for tensor in (*tensors, *self._fresh)}
        return not self._is_lost and self._written <= known


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
