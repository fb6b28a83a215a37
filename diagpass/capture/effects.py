"""What a captured frame leaves in Python objects, as far as Dynamo says: who is changed, and to what.

Names are Dynamo's, such as ``L['model'].layers[0]``. Only meaningful inside a backend call, :func:`effects`
reads what Dynamo is about to write; :func:`resolve` finds the object behind a name later on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from types import CodeType
from typing import Any

import torch
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables import ConstantVariable, SymNodeVariable, TensorVariable

from diagpass.capture.dynamo import source_name

__all__ = ["Effects", "changed_by", "effects", "resolve"]


@dataclasses.dataclass(frozen=True)
class Effects:
    """Changes that a frame makes to objects from before it; those in place to tensors are not among them.

    Attributes
    ----------
    owners
        Names of the objects that are changed; None if one has no name.
    tensors
        (owner, attribute) pairs that are set to a tensor.
    counters
        (owner, attribute) pairs of symbolic integers, with what is added to them.
    closed
        Whether that is all, but for attributes that are set to the same constant each time, and no guard
        asks what a counter is. Then a frame that found these constants leaves everything but tensors and
        counters as it was. Objects made inside the frame can only be found from what it returns.
    """

    owners: tuple[str, ...] | None
    tensors: tuple[tuple[str, str], ...] = ()
    counters: tuple[tuple[str, str, int], ...] = ()
    closed: bool = False


def effects() -> Effects:
    """The effects of the frame that is being compiled."""
    try:
        output = InstructionTranslator.current_tx().output
        found = output.side_effects
        objects = {id(item): item for item in found.keepalive}
        owners: dict[str, None] = {}
        tensors: list[tuple[str, str]] = []
        counters: list[tuple[str, str, int]] = []
        closed = not output.shape_env.guards
        for number, variable in found.id_to_variable.items():
            if isinstance(variable, TensorVariable) or not found.is_modified(variable):
                continue
            if number not in objects or variable.source is None:
                continue
            try:
                name = source_name(variable.source)
            except NotImplementedError:  # made inside the frame
                continue
            stores = found.store_attr_mutations.get(variable, {})
            outside = not name.startswith("L[")
            if not outside:
                owners[name] = None
            if not stores:
                closed = False
            for attribute, value in stores.items():
                if isinstance(value, ConstantVariable):
                    continue
                added = _added(name, attribute, value, output.shape_env)
                if outside:
                    closed = False
                elif isinstance(value, TensorVariable):
                    tensors.append((name, attribute))
                elif added is not None:
                    counters.append((name, attribute, added))
                else:
                    closed = False
        return Effects(tuple(owners), tuple(tensors), tuple(counters), closed)
    except (AttributeError, LookupError):
        return Effects(None)


def _added(owner: str, attribute: str, value: Any, shape_env: Any) -> int | None:
    """By how much an attribute grows that is set to itself plus a constant; None for anything else."""
    if not isinstance(value, SymNodeVariable):
        return None
    expression = value.sym_num.node.expr
    symbols = list(expression.free_symbols)
    if len(symbols) != 1:
        return None
    (symbol,) = symbols
    sources = {source_name(source) for source in shape_env.var_to_sources.get(symbol, ())}
    if not sources & {f"{owner}.{attribute}", f"{owner}.__dict__['{attribute}']"}:
        return None
    difference = expression - symbol
    bounds = shape_env.var_to_range.get(symbol)
    if not difference.is_Integer or bounds is None or not _is_unbounded(bounds):
        return None
    return int(difference)


def _is_unbounded(bounds: Any) -> bool:
    limit = 1 << 62
    return bool(bounds.lower < -limit and bounds.upper > limit)


def changed_by(found: Effects, scope: Mapping[str, Any]) -> list[Any] | None:
    """The objects that the effects change; None if one of them has no name or is not there."""
    if found.owners is None:
        return None
    try:
        return list(resolve(f"({''.join(f'{name}, ' for name in found.owners)})", scope))
    except LookupError:
        return None


def resolve(name: str, scope: Mapping[str, Any]) -> Any:
    """The object that Dynamo calls ``name``, in a frame with these locals.

    Raises
    ------
    LookupError
        There is none now.
    """
    try:
        return eval(_compiled(name), {"L": scope, "torch": torch})
    except Exception as error:
        raise LookupError(f"{name}: {error}") from error


@functools.lru_cache(maxsize=4096)
def _compiled(name: str) -> CodeType:
    return compile(name, "<Dynamo's name>", "eval")  # what its guards evaluate, too
