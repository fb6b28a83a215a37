"""Deferred values, and how the operands of a group are gathered from them.

A :class:`Box` stands for one value of one segment. It knows from which wave on it can be had (``ready``)
and how to get it: it is there already, a cell will put it there, or it is computed on demand from other
boxes (glue). Consumers hold boxes, boxes hold what they are computed from, nobody holds a segment: what
nobody will read again is freed.

A :class:`Row` is a value that lies as one row in the stacked result of a group. Rows that lie side by side
are handed on without a copy.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch

NOW = -1  # ready: known when it was recorded

_NOBODY: frozenset[int] = frozenset()


class Row:
    """Row ``index`` of ``stacked``, whose first axis has ``width`` entries.

    ``address`` is there if the stack is contiguous and lies where it will lie again; it is that of row 0.
    """

    __slots__ = ("address", "index", "stacked", "width")

    def __init__(self, stacked: torch.Tensor, index: int, width: int, address: int | None = None) -> None:
        self.stacked, self.index, self.width, self.address = stacked, index, width, address


class Box:
    """A deferred value.

    Parameters
    ----------
    value
        The value, if it is there already.
    ready
        See below.
    call
        A function and its arguments, which compute the value when it is read; boxes among the arguments are
        read then.
    cells
        See below.

    Attributes
    ----------
    ready
        The wave after which it can be had; ``NOW`` if at once.
    cells
        Numbers of the cells (of this run) whose results it is made of directly.
    parts
        For a value made of pieces along one dimension: ``(dim, [(box, start, stop, unit), ...])``, a unit
        piece lacking that dimension; else None.
    label, register
        For a listener: what the value is called, and where it is kept.
    """

    __slots__ = ("_call", "_value", "cells", "label", "parts", "ready", "register")

    def __init__(
        self,
        value: Any = None,
        ready: int = NOW,
        call: tuple[Callable[..., Any], Sequence[Any]] | None = None,
        cells: frozenset[int] = _NOBODY,
    ) -> None:
        self._value, self.ready, self._call, self.cells = value, ready, call, cells
        self.parts: tuple[int, list[tuple[Box, int, int, bool]]] | None = None
        self.label: tuple[Hashable, ...] | None = None
        self.register: int | None = None

    def put(self, value: Any) -> None:
        """What a cell does when it has run."""
        self._value = value

    @property
    def value(self) -> Any:
        """A tensor, a number or a :class:`Row`; computed if need be."""
        if self._call is not None:
            (function, arguments), self._call = self._call, None
            self._value = function(*(a.tensor() if isinstance(a, Box) else a for a in arguments))
            if _heard.listener is not None:
                _heard.listener.called(self, function, arguments)
        return self._value

    @property
    def is_plain(self) -> bool:
        """Whether the value is there and depends on no cell."""
        return self._call is None and self.ready == NOW

    def tensor(self) -> Any:
        """The value by itself: a row becomes a view of its stack."""
        value = self.value
        if value is None:
            raise AssertionError("a deferred value was read before its cell had run")
        return tensor_of(value)


class _Heard(threading.local):
    listener: Any = None


_heard = _Heard()


@contextlib.contextmanager
def listening(listener: Any) -> Iterator[None]:
    """Tell ``listener.called(box, function, arguments)`` of what is computed inside; None for nobody."""
    before, _heard.listener = _heard.listener, listener
    try:
        yield
    finally:
        _heard.listener = before


def listener() -> Any:
    """Who is listening, or None."""
    return _heard.listener


def derived(function: Callable[..., Any], *arguments: Any) -> Box:
    """A box for ``function(*arguments)``, boxes among the arguments being read when it is computed."""
    boxes = [argument for argument in arguments if isinstance(argument, Box)]
    return Box(
        ready=max((box.ready for box in boxes), default=NOW), call=(function, arguments), cells=union(boxes)
    )


def union(boxes: Sequence[Box]) -> frozenset[int]:
    """The cells behind several boxes."""
    found = [box.cells for box in boxes if box.cells]
    if len(found) < 2:
        return found[0] if found else _NOBODY
    return frozenset().union(*found)


def aggregate(dim: int, parts: list[tuple[Box, int, int, bool]]) -> Box:
    """A box for the pieces put together along ``dim``; readers of one piece need not wait for the rest."""
    cuts = [part[1:] for part in parts]
    box = derived(_put_together, dim, cuts, *(part[0] for part in parts))
    box.parts = (dim, parts)
    return box


def _put_together(dim: int, cuts: Sequence[tuple[int, int, bool]], *pieces: torch.Tensor) -> torch.Tensor:
    found = []
    for piece, (start, stop, unit) in zip(pieces, cuts, strict=True):
        if unit:
            found.append(piece.unsqueeze(dim))
        elif (start, stop) != (0, piece.shape[dim]):
            found.append(piece.narrow(dim, start, stop - start))
        else:
            found.append(piece)
    return torch.cat(found, dim)


def read(box: Box, dim: int, start: int, stop: int, drop: bool) -> Box | None:
    """``box[start:stop]`` along ``dim`` (dropped if ``drop``), from one piece; None if none has it all."""
    if box.parts is None:
        return _cut(box, dim, start, stop, drop)
    along, parts = box.parts
    offset = 0
    for piece, low, high, unit in parts if along == dim else ():
        if offset <= start and stop <= offset + high - low:
            if unit:
                return piece if drop else derived(torch.unsqueeze, piece, dim)
            at = low + start - offset
            found = read(piece, dim, at, at + stop - start, drop)
            return _cut(piece, dim, at, at + stop - start, drop) if found is None else found
        offset += high - low
    return None


def _cut(box: Box, dim: int, start: int, stop: int, drop: bool) -> Box:
    if drop:
        return derived(torch.select, box, dim, start)
    return derived(torch.narrow, box, dim, start, stop - start)


def gather(boxes: Sequence[Box]) -> torch.Tensor:
    """The values of several cells with a leading group axis: a slice of one stack where they lie there."""
    values = [box.value for box in boxes]
    if all(type(value) is not Row for value in values):
        return torch.stack(values)
    parts = parts_of(values)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def tensor_of(value: Any) -> Any:
    """A value by itself: a row becomes a view of its stack."""
    return value.stacked.select(0, value.index) if type(value) is Row else value


def parts_of(values: Sequence[Any]) -> list[torch.Tensor]:
    """The values of several cells as few tensors with a leading group axis, to be put together in order."""
    return [
        first.unsqueeze(0)
        if type(first) is not Row
        else first.stacked
        if (first.index, count) == (0, first.width)
        else first.stacked.narrow(0, first.index, count)
        for first, count in runs_of(values)
    ]


def runs_of(values: Sequence[Any]) -> list[tuple[Any, int]]:
    """Values in order -> the first of each run of rows that lie side by side, and how many they are."""
    runs: list[tuple[Any, int]] = []
    first, count = None, 0
    for value in values:
        if (
            type(value) is Row
            and type(first) is Row
            and value.stacked is first.stacked
            and value.index == first.index + count
        ):
            count += 1
            continue
        if count:
            runs.append((first, count))
        first, count = value, 1
    runs.append((first, count))
    return runs
