"""Which module call each node came from: the marks by which cells are recognised.

Dynamo records on every node the modules it was called from, outermost first. A *call* is one entry of
that record: a module path and how often the module had been called before. A *family* is a set of
modules of one class whose paths differ only in digits, such as ``model.layers.0`` and
``model.layers.1``; its members are what may become cells.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import torch.fx as fx

_ROOT = re.compile(r"^[LG]\[[^\]]*\](?:\.__closure__\[\d+\]\.cell_contents)?\.?")
_ITEM = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")
_DIGITS = re.compile(r"\d+")

Record = tuple[tuple[Any, str, Any], ...]  # per module: key, Dynamo's name of it, class


@dataclasses.dataclass(frozen=True)
class Call:
    """The ``count``-th call (from 0) of the module at ``path``, whose class is ``cls``.

    ``module`` identifies the module: one module may be reached by several paths.
    """

    path: str
    count: int
    cls: str
    module: str = ""

    @property
    def family(self) -> tuple[str, str]:
        """What the call's module shares with its siblings: the path without digits, and the class."""
        return _without_digits(self.path), self.cls

    @property
    def digits(self) -> tuple[int, ...]:
        """The numbers in the path, left to right."""
        return tuple(int(number) for number in _DIGITS.findall(self.path))


@functools.lru_cache(maxsize=4096)
def _without_digits(path: str) -> str:
    return _DIGITS.sub("*", path)


@functools.lru_cache(maxsize=4096)
def module_path(raw: str) -> str:
    """Dynamo's name of a module as ``named_modules`` writes it: ``L['self'].a['0']`` -> ``a.0``."""
    path = _ITEM.sub(r".\1", _ROOT.sub("", raw))
    return ".".join(part for part in path.split(".") if part not in ("", "_modules", "__dict__"))


def attribute_path(raw: str) -> str:
    """Dynamo's name of a weight, attribute or input as a user writes it: ``layers.0.read.weight``."""
    given = re.fullmatch(r"L\['args'\]\[(\d+)\](.*)", raw)
    if given is not None:
        return f"input {given[1]}{given[2]}"
    parts = module_path(raw).split(".")
    return ".".join(part for part in parts if part not in ("_parameters", "_buffers"))


def spoken(raw: str) -> str:
    """Dynamo's name of something as a user would point to it: ``layers.0.state``, ``argument 1[0]``."""
    inner = re.fullmatch(r"___from_numpy\((.*)\)", raw)
    raw = inner.group(1) if inner else raw
    argument = re.match(r"L\['args'\]\[(\d+)\]|L\['kwargs'\]\['(\w+)'\]", raw)
    if argument is not None:
        return f"argument {argument.group(1) or argument.group(2)}{raw[argument.end() :]}"
    return attribute_path(raw) or "the module itself" if raw.startswith("L['model']") else raw


def calls_of(node: fx.Node) -> tuple[Call, ...]:
    """The calls around ``node``, outermost first, without the root module."""
    return calls_in(record_of(node))


def record_of(node: fx.Node) -> Record:
    """Dynamo's record of a node, hashable; many nodes of a module have the same."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((key, raw, cls) for key, (raw, cls) in stack.items())


def calls_in(record: Record) -> tuple[Call, ...]:
    """The calls that a node's record tells of, outermost first, without the root module."""
    found = []
    for key, raw, cls in record:
        path = module_path(raw)
        if not path:
            continue
        module, _, count = str(key).partition("@")
        name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
        found.append(Call(path, int(count) if count.isdigit() else 0, name, module))
    return tuple(found)


def all_calls(graph: fx.Graph) -> dict[fx.Node, tuple[Call, ...]]:
    """The calls around every node, each module under one path and its calls numbered throughout.

    Dynamo numbers the calls of a module per path by which it was reached; here a module has one path,
    the shortest, and its calls are numbered in program order. Nodes with the same record have the same tuple.
    """
    read: dict[int, Record] = {}  # nodes of a call of a module have one dictionary
    records = {}
    for node in graph.nodes:
        number = id(node.meta.get("nn_module_stack"))
        if number not in read:
            read[number] = record_of(node)
        records[node] = read[number]
    calls = {record: calls_in(record) for record in dict.fromkeys(records.values())}  # in program order
    paths: dict[str, str] = {}
    counts: dict[str, dict[tuple[str, int], int]] = {}
    for stack in calls.values():
        for call in stack:
            known = paths.setdefault(call.module, call.path)
            if (call.path.count("."), len(call.path)) < (known.count("."), len(known)):
                paths[call.module] = call.path
            numbers = counts.setdefault(call.module, {})
            numbers.setdefault((call.path, call.count), len(numbers))
    numbered = {
        record: tuple(
            dataclasses.replace(
                call,
                path=paths[call.module],
                count=counts[call.module][call.path, call.count],
            )
            for call in stack
        )
        for record, stack in calls.items()
    }
    return {node: numbered[record] for node, record in records.items()}


def source_line(node: fx.Node) -> str | None:
    """``file:line`` of the user's code that the node came from, if it is known."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    lines = re.findall(r'File "([^"]+)", line (\d+)', trace)
    return f"{lines[-1][0]}:{lines[-1][1]}" if lines else None


def module_of(node: fx.Node) -> str:
    """The path of the innermost module around ``node``, or ``"(model)"``."""
    calls = calls_of(node)
    return calls[-1].path if calls else "(model)"
