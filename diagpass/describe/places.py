"""Where in the user's code something is: ``file:line`` and module path of operations, edges and errors."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.fx as fx
from torch import nn

from diagpass.capture.marks import module_of, source_line

__all__ = [
    "Ends",
    "crossing",
    "line_of",
    "module_at",
    "operation",
    "place",
    "reaches",
    "short",
    "short_lines",
]

_LINE = re.compile(r"([^\s()'\"]+\.py):(\d+)")


def short(line: str | None) -> str | None:
    """A ``file:line`` relative to the current folder if it lies below it, else from the package on."""
    if line is None:
        return None
    file, _, number = line.rpartition(":")
    here = os.path.relpath(file) if os.path.isabs(file) and file.startswith(os.getcwd() + os.sep) else file
    for folder in ("site-packages", "dist-packages"):
        _, found, rest = here.partition(f"{os.sep}{folder}{os.sep}")
        if found:
            here = rest
    return f"{here}:{number}"


def short_lines(text: str) -> str:
    """A text with each ``file.py:line`` in it made :func:`short`."""
    return _LINE.sub(lambda found: short(found[0]) or found[0], text)


def place(node: fx.Node | None) -> dict[str, Any] | None:
    """Operation, module path and line of a node, as plain data."""
    if node is None:
        return None
    return {"operation": operation(node), "module": module_of(node), "line": short(source_line(node))}


def operation(node: fx.Node) -> str:
    """An operation's name without its overload: ``aten.mm``."""
    return str(node.target).removesuffix(".default").removesuffix(".Tensor").removesuffix(".int")


def line_of(text: str) -> str | None:
    """The last ``file.py:line`` in a message, or None."""
    found = _LINE.findall(text)
    return short(":".join(found[-1])) if found else None


def module_at(model: nn.Module, line: str | None) -> str | None:
    """The path of the first module of which a method holds the line, or None."""
    if line is None:
        return None
    file, _, number = line.rpartition(":")
    if not number.isdigit():
        return None
    for path, module in model.named_modules():
        for cls in type(module).__mro__:
            if cls is nn.Module:
                break
            for method in vars(cls).values():
                code = getattr(inspect.unwrap(method) if callable(method) else method, "__code__", None)
                if code is None or Path(code.co_filename).name != Path(file).name:
                    continue
                if not code.co_filename.endswith(file.lstrip("./")):
                    continue
                last = max((entry[2] or 0 for entry in code.co_lines()), default=0)
                if code.co_firstlineno <= int(number) <= last:
                    return path or "(model)"
    return None


Ends = tuple[fx.Node | None, fx.Node | None, fx.Node | None]


def crossing(source: Iterable[fx.Node], target: Iterable[fx.Node], owner: Mapping[fx.Node, int]) -> Ends:
    """Where one cell's result reaches another.

    Returns
    -------
    tuple
        The operation that makes the value, the one of the glue between that is in the outermost module, and
        the operation that reads it; None for what is not there.
    """
    made = set(source)
    for consumer in target:
        found = reaches(consumer, made, owner)
        if found is not None:
            return found[0], found[1], consumer
    return None, None, None


def reaches(
    consumer: fx.Node, made: Collection[fx.Node], owner: Mapping[fx.Node, int]
) -> tuple[fx.Node, fx.Node | None] | None:
    """The node among ``made`` that ``consumer`` reads, directly or through glue, and the glue between."""
    back: dict[fx.Node, fx.Node] = {source: consumer for source in consumer.all_input_nodes}
    pending = list(back)
    while pending:
        node = pending.pop()
        if node in made:
            glue = []
            at = back[node]
            while at is not consumer:
                glue.append(at)
                at = back[at]
            lined = [each for each in glue if source_line(each)]
            return node, min(lined, key=lambda each: module_of(each).count("."), default=None)
        if node not in owner:
            for before in node.all_input_nodes:
                if before not in back:
                    back[before] = node
                    pending.append(before)
    return None
