"""Why two kinds are not one: a branch, an operation, a shape, a constant.

In: a cell of each. Out: plain data with a sentence (``text``) and the place in the user's code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_flatten

from diagpass.analysis.kinds import is_literal, value_type
from diagpass.capture.marks import calls_of
from diagpass.describe.figures import count, letter
from diagpass.describe.places import operation, place
from diagpass.ir import Cell

__all__ = ["difference"]


def difference(
    mine: Cell,
    other: Cell,
    index: int,
    segments: tuple[Iterable[int], Iterable[int]],
    names: Mapping[Any, str],
) -> dict[str, Any]:
    """What distinguishes a kind from another one.

    Parameters
    ----------
    mine, other
        A cell of each.
    index
        The other kind's number.
    segments
        The segments at which each kind's cells are.
    names
        What to call inputs of the graph (weights, state) by their nodes.
    """
    found = _operations(mine.nodes, other.nodes, index) or _shapes(mine, other, index, names)
    classes = _class_of(mine), _class_of(other)
    if None not in classes and classes[0] != classes[1]:
        found["cause"] = "module"
        found["text"] = (
            f"{mine.path} is a {classes[0]}, {other.path} a {classes[1]}; this kind {found['text']}"
        )
    first, second = (set(each) for each in segments)
    branch = first != second and (first == {0} or second == {0})
    if branch and found["cause"] == "operation":
        found["cause"] = "first-segment branch"
        which = "this kind is" if first == {0} else f"kind {letter(index)} is"
        found["text"] = f"a branch of the first segment ({which} it): {found['text']}"
    return {"kind": index, **found}


def _class_of(cell: Cell) -> str | None:
    """The class of a cell's module, without its package."""
    for node in cell.nodes:
        for call in calls_of(node):
            if call.path == cell.path:
                return call.cls.rpartition(".")[2]
    return None


def _operations(mine: Sequence[fx.Node], other: Sequence[fx.Node], index: int) -> dict[str, Any] | None:
    a, b = [operation(node) for node in mine], [operation(node) for node in other]
    if a == b:
        return None
    more: list[fx.Node] = []
    fewer: list[fx.Node] = []
    for tag, i, j, m, n in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            more += mine[i:j]
            fewer += other[m:n]
    parts = []
    if more:
        parts.append(
            f"has {count(len(more), 'operation')} that kind {letter(index)} has not, first {_at(more[0])}"
        )
    if fewer:
        verb = "and lacks" if more else "lacks"
        rest = f"first {_at(fewer[0])}"
        parts.append(f"{verb} {count(len(fewer), 'operation')} of kind {letter(index)}, {rest}")
    return {"cause": "operation", "text": " ".join(parts), "place": place((more or fewer)[0])}


def _shapes(mine: Cell, other: Cell, index: int, names: Mapping[Any, str]) -> dict[str, Any]:
    theirs = f"in kind {letter(index)}"
    for a, b in zip(mine.nodes, other.nodes, strict=True):
        left, right = _leaves(a), _leaves(b)
        for at, (x, y) in enumerate(zip(left, right, strict=False)):
            if isinstance(x, fx.Node) and isinstance(y, fx.Node):
                u, v = x.meta.get("val"), y.meta.get("val")
                if value_type(u) != value_type(v):
                    name = names.get(x) or f"an operand of {operation(a)}"
                    text = f"{name} is {_say(u)}, {names.get(y) or 'it'} {theirs} {_say(v)}; read by {_at(a)}"
                    return {"cause": "shape", "text": text, "place": place(a)}
            elif (type(x) is not type(y) or x != y) and not is_literal(a, at, x):
                text = f"{operation(a)} has the constant {x!r}, {theirs} {y!r}; {_at(a)}"
                return {"cause": "constant", "text": text, "place": place(a)}
        if value_type(a.meta.get("val")) != value_type(b.meta.get("val")):
            text = f"{_at(a)} gives {_say(a.meta.get('val'))}, {theirs} {_say(b.meta.get('val'))}"
            return {"cause": "shape", "text": text, "place": place(a)}
    first = mine.nodes[0]
    return {
        "cause": "wiring",
        "text": f"its operations read each other otherwise than {theirs}",
        "place": place(first),
    }


def _leaves(node: fx.Node) -> list[Any]:
    return tree_flatten((node.args, node.kwargs))[0]


def _at(node: fx.Node) -> str:
    found = place(node) or {}
    line = f" ({found['line']})" if found["line"] else ""
    return f"{found['operation']} in {found['module']}{line}"


def _say(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        shape = " x ".join(str(int(size)) for size in value.shape) or "a scalar"
        return f"{shape} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__
