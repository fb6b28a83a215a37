"""What a segment returns that was recorded before: numbers, inputs, and tokens whose layout is known.

Recording it again would make a box for each value of the segment. Where a score names what leaves it, the
results follow from the program alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx

from diagpass.rolled.program import StepProgram, is_number
from diagpass.rolled.values import Box
from diagpass.runtime.layouts import allocator

__all__ = ["Returns", "Token", "layout_of", "plan_returns"]

_LIKE = "diagpass_token"  # what a token of a node is like; asking a fake tensor takes longer
_Number = Callable[[Sequence[Any]], Any]


class Token(NamedTuple):
    """A tensor with no contents yet: how to make it, and what it stands for."""

    make: Callable[[], torch.Tensor]
    box: Box


class Returns(NamedTuple):
    """Per returned value of a program, how it is made: a :class:`Token`, or a function of its inputs."""

    entries: tuple[Token | _Number, ...]

    def make(self, args: Sequence[Any]) -> tuple[list[Any], list[tuple[torch.Tensor, Box]]]:
        """The values for these inputs; the tokens among them, with what they stand for."""
        found: list[Any] = []
        tokens: list[tuple[torch.Tensor, Box]] = []
        for entry in self.entries:
            if type(entry) is Token:
                token = entry.make()
                tokens.append((token, entry.box))
                found.append(token)
            else:
                found.append(entry(args))  # type: ignore[operator]
        return found, tokens


def layout_of(node: fx.Node) -> tuple[tuple[Any, Any], tuple[torch.dtype, torch.device]]:
    """Sizes and strides, data type and device of the tensor that a node stands for."""
    like = node.meta.get(_LIKE)
    if like is None:
        example = node.meta["val"]
        sizes, strides = map(int, example.shape), map(int, example.stride())
        like = node.meta[_LIKE] = (tuple(sizes), tuple(strides)), (example.dtype, example.device)
    return like


def plan_returns(program: StepProgram, labels: Mapping[fx.Node, tuple[Hashable, ...]]) -> Returns | None:
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
            entries.append(_token(out.node, labels[out.node]))
        else:
            number = _number(program, out.node)
            if number is None:
                return None
            entries.append(number)
    return Returns(tuple(entries))


def _token(node: fx.Node, label: tuple[Hashable, ...]) -> Token:
    layout, (dtype, device) = layout_of(node)
    box = Box()
    box.label = label
    return Token(allocator(*layout, dtype, device), box)


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
