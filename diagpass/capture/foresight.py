"""Counters that a step is about to change, foreseen from its code.

Dynamo takes an int attribute for a constant. Where the step changes it, the capture has to be made once more
with the attribute as a symbol, which for many layers takes as long as the first. So before the first capture
the code of each module is read: an attribute that ``forward``, or what it calls on itself, counts up or down
by a constant will mostly be changed. A guess that proves wrong is dropped (see ``StepSession.compile``).
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

__all__ = ["foresee", "submodule_source"]

_NEAR = 8  # instructions between reading an attribute and storing it


def foresee(step: nn.Module, source: str) -> set[str]:
    """What Dynamo will call the sources of the counters of a module.

    Parameters
    ----------
    step
        The module.
    source
        What Dynamo calls it, such as ``"L['model']"``.

    Returns
    -------
    set
        Sources, among them some that do not occur: a module may be reached in several ways.
    """
    found = set()
    for path, module in _modules(step):
        owner = source + submodule_source(path)
        for attribute in _counted(type(module)):
            if type(module.__dict__.get(attribute)) is int:
                found |= {f"{owner}.{attribute}", f"{owner}.__dict__['{attribute}']"}
    return found


def submodule_source(path: str) -> str:
    """What Dynamo calls the submodule at a path, behind what it calls the module."""
    return "".join(f"._modules['{part}']" for part in path.split(".") if part)


def _modules(step: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules by all their paths; by one path each if a module is part of itself."""
    try:
        return list(step.named_modules(remove_duplicate=False))
    except RecursionError:
        return list(step.named_modules())


@functools.lru_cache(maxsize=1024)
def _counted(owner: type) -> frozenset[str]:
    """Attributes that ``forward`` of a class counts, or a function of the class that it calls."""
    seen: set[str] = set()
    waiting = ["forward"]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        function = inspect.getattr_static(owner, name, None)
        if name in seen or not isinstance(function, FunctionType):
            continue
        seen.add(name)
        waiting += function.__code__.co_names
        found.update(_updated(function.__code__))
    return frozenset(found)


def _updated(code: CodeType) -> Iterator[str]:
    """Attributes of the first argument that are stored right after they were read and added to."""
    owner = code.co_varnames[:1]
    instructions = list(dis.get_instructions(code))
    for at, stored in enumerate(instructions):
        if stored.opname != "STORE_ATTR":
            continue
        near = instructions[max(0, at - _NEAR) : at]
        reads = any(item.opname == "LOAD_ATTR" and item.argval == stored.argval for item in near)
        steps = any(item.opname.startswith("LOAD_") and type(item.argval) is int for item in near)
        adds = any(item.argrepr in ("+", "+=", "-", "-=") or "ADD" in item.opname for item in near)
        own = any(item.opname.startswith("LOAD_FAST") and item.argval in owner for item in near)
        if reads and steps and adds and own:
            yield stored.argval
