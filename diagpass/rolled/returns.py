"""What a segment returns that was recorded before: numbers, inputs, and tokens whose layout is known.

Recording it again would make a box for each value of the segment. Where a score names what leaves it, the
results follow from the program alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from diagpass.rolled.program import StepProgram, is_number

__all__ = ["Returns", "Token", "layout_of", "plan_returns"]

_LIKE = "diagpass_token"  # what a token of a node is like; asking a fake tensor takes longer
_Number = Callable[[Sequence[Any]], Any]


class Token:
    """How to make one tensor with no contents yet, and the name of what it stands for."""

    __slots__ = ("_device", "_dtype", "_layout", "label")

    def __init__(self, node: fx.Node, label: Hashable) -> None:
        self._layout, (self._dtype, self._device) = layout_of(node)
        self.label = label

    def make(self) -> torch.Tensor:
        """The tensor."""
        return torch.empty_strided(*self._layout, dtype=self._dtype, device=self._device)


class Returns:
    """Per returned value of a program, how it is made.

    Attributes
    ----------
    entries
        A :class:`Token`, or a function of the program's inputs.
    """

    def __init__(self, entries: Sequence[Token | _Number]) -> None:
        self.entries = tuple(entries)

    def make(self, args: Sequence[Any], stand_for: Callable[[torch.Tensor, Any], None]) -> list[Any]:
        """The values for these inputs; ``stand_for`` is told of each token and its label."""
        found: list[Any] = []
        for entry in self.entries:
            if isinstance(entry, Token):
                token = entry.make()
                stand_for(token, entry.label)
                found.append(token)
            else:
                found.append(entry(args))
        return found


def layout_of(node: fx.Node) -> tuple[tuple[Any, Any], tuple[torch.dtype, torch.device]]:
    """Sizes and strides, data type and device of the tensor that a node stands for."""
    like = node.meta.get(_LIKE)
    if like is None:
        example = node.meta["val"]
        sizes, strides = map(int, example.shape), map(int, example.stride())
        like = node.meta[_LIKE] = (tuple(sizes), tuple(strides)), (example.dtype, example.device)
    return like


def plan_returns(program: StepProgram, labels: Mapping[fx.Node, Hashable]) -> Returns | None:
    """How a program's results follow from its inputs.

    Parameters
    ----------
    program
        What is asked.
    labels
        The names of what leaves it and is computed.

    Returns
    -------
    Returns or None
        None where it takes more than that: tensors that are written in place or share memory, results that
        have no name.
    """
    if program.step.written or program.step.input_groups:
        return None
    entries: list[Token | _Number] = []
    for out in program.returned:
        if out.group is not None:
            return None
        if out.passed is not None:
            entries.append(_taken(out.passed))
        elif not isinstance(out.node, fx.Node):
            entries.append(_always(out.node))
        elif out.node in labels:
            entries.append(Token(out.node, labels[out.node]))
        else:
            number = _number(program, out.node)
            if number is None:
                return None
            entries.append(number)
    return Returns(entries)


def _taken(at: int) -> _Number:
    return lambda args: args[at]


def _always(value: Any) -> _Number:
    return lambda args: value


def _number(program: StepProgram, node: Any) -> _Number | None:
    """A number that follows from numbers among the inputs; None for anything else."""
    if not isinstance(node, fx.Node):
        return _always(node) if isinstance(node, (int, float, bool)) else None
    if not is_number(node):
        return None
    if node.op == "placeholder":
        return _taken(program.placeholders.index(node))
    if node.op != "call_function" or node.kwargs:
        return None
    parts = [_number(program, argument) for argument in node.args]
    if not all(parts):
        return None
    target: Any = node.target
    return lambda args: target(*[part(args) for part in parts if part is not None])
