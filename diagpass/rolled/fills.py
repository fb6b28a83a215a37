"""What a reset puts into the state, known from what it calls: constants.

Most resets make zeros. A call whose state at the start is constants that were met before can be played before
the reset has run (:mod:`diagpass.rolled.pages`), if the reset is watched and does the same again.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Fill", "Fills"]


class Fill(NamedTuple):
    """One number, everywhere in a tensor; ``text`` tells zeros of either sign apart."""

    value: float
    text: str


class _Known(NamedTuple):
    """A tensor (alive: its id and its memory are its own) as it was when it was filled.

    ``memory`` is where it lies, 0 if it was made here and nobody else has that memory.
    """

    tensor: Tensor
    version: int
    fill: Fill
    memory: int = 0


_ZERO, _ONE = Fill(0, "0"), Fill(1, "1")
_CONSTANT: dict[Any, Fill] = {
    torch.zeros: _ZERO,
    torch.zeros_like: _ZERO,
    Tensor.new_zeros: _ZERO,
    torch.ones: _ONE,
    torch.ones_like: _ONE,
    Tensor.new_ones: _ONE,
}
_NUMBER_AT: dict[Any, int] = {torch.full: 1, torch.full_like: 1, Tensor.new_full: 2}
_EMPTY: Sequence[Any] = (torch.empty, torch.empty_like, Tensor.new_empty, torch.empty_strided)
_WRITES: dict[Any, int] = {Tensor.zero_: 1, Tensor.fill_: 2}
_READS: frozenset[Any] = frozenset(
    (
        *(
            getattr(Tensor, name).__get__
            for name in ("dtype", "device", "shape", "ndim", "layout", "is_cuda")
        ),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point),
    )
)


class Fills(TorchFunctionMode):
    """Watches what runs inside, and knows of each tensor that it left whether it is one number everywhere.

    A function that is neither a factory of constants, nor a fill of all of a tensor's memory, nor a question
    ends all knowledge: what it wrote, or made an alias of, is not looked into. A write that no function shows
    (an extension's, say) shows in the version of the tensor.

    Parameters
    ----------
    weights
        What must not be written.

    Attributes
    ----------
    is_lost
        Whether something ran that ended all knowledge. Otherwise no tensor was moved, either.
    """

    def __init__(self, weights: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.is_lost = any(map(Tensor.is_inference, weights))
        self._weights = () if self.is_lost else weights
        self._versions = list(map(_version, self._weights))
        self._fills: dict[int, Fill] = {}  # by the address of the memory, which is filled as a whole
        self._known: dict[int, _Known] = {}
        self._fresh: list[Tensor] = []
        self._written: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if not self.is_lost and func not in _READS:
            self._look(func, args, kwargs or {}, result)
        return result

    def _look(self, func: Any, args: Any, kwargs: dict, result: Any) -> None:
        if kwargs.get("out") is not None:
            self._lose()
        elif func in _CONSTANT:
            self._made(result, _CONSTANT[func])
        elif func in _NUMBER_AT and len(args) > _NUMBER_AT[func]:
            self._made(result, _fill(args[_NUMBER_AT[func]]))
        elif func in _EMPTY:
            self._fresh.append(result)
        elif func in _WRITES and len(args) == _WRITES[func]:
            self._wrote(args[0], _fill(args[1]) if func is Tensor.fill_ else _ZERO)
        else:
            self._lose()

    def _made(self, tensor: Any, fill: Fill | None) -> None:
        self._fresh.append(tensor)
        if type(tensor) is not Tensor or fill is None or tensor.is_inference():
            self._lose()
        else:
            self._known[id(tensor)] = _Known(tensor, tensor._version, fill)

    def _wrote(self, tensor: Any, fill: Fill | None) -> None:
        if type(tensor) is not Tensor or fill is None or tensor.is_inference():
            self._lose()
            return
        storage = tensor.untyped_storage()
        if not 0 < tensor.nbytes == storage.nbytes():
            self._lose()
            return
        memory = storage.data_ptr()
        self._fills[memory] = fill
        self._known[id(tensor)] = _Known(tensor, tensor._version, fill, memory)
        self._written.add(memory)

    def _lose(self) -> None:
        self.is_lost = True
        self._known.clear()

    def of(self, tensor: Tensor) -> Fill | None:
        """The number that the tensor holds; None if that is not known."""
        known = self._known.get(id(tensor))
        if known is None or tensor._version != known.version:
            return None
        return self._fills[known.memory] if known.memory else known.fill

    def wrote_only(self, tensors: Iterable[Tensor]) -> bool:
        """Whether no memory that was there before was written but that of these tensors."""
        if self.is_lost or list(map(_version, self._weights)) != self._versions:
            return False
        return not self._written or self._written <= set(map(_memory, (*tensors, *self._fresh)))


_version = operator.attrgetter("_version")


def _fill(value: Any) -> Fill | None:
    return Fill(value, repr(value)) if type(value) in (bool, int, float) else None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
