"""The step -> a functional graph, with the roles of its inputs and outputs.

Dynamo captures the step once per behaviour (first segment, later ones, a shorter tail) and checks its guards
at every segment. AOTAutograd makes each captured graph functional. Nothing runs here: the graph, what it
writes and what it returns become a :class:`StepGraph`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from diagpass.capture import dynamo, functional
from diagpass.capture.effects import Effects, effects
from diagpass.capture.marks import module_of, source_line, spoken
from diagpass.errors import CaptureError

__all__ = ["StepGraph", "capture"]


@dataclasses.dataclass(frozen=True)
class StepGraph:
    """One behaviour of the step.

    Attributes
    ----------
    graph
        Functional ATen graph; its outputs are the written inputs' new values, then what is returned.
    weights
        Per input, whether it is a parameter or buffer that the step only reads.
    names
        Per input, how Dynamo names where it comes from.
    written
        Positions of the inputs that are written in place, in the order of their new values.
    passed
        Per returned value, the input that it *is* (the same object), or None.
    groups
        Per returned value, a number that is the same for values that share memory, None for a value
        that has its memory to itself; inputs are counted too (see ``input_groups``).
    input_groups
        Input position to group number, for inputs that returned values share memory with.
    effects
        What it leaves in Python objects.
    """

    graph: fx.GraphModule
    weights: tuple[bool, ...]
    names: tuple[str, ...]
    written: tuple[int, ...]
    passed: tuple[int | None, ...]
    groups: tuple[int | None, ...]
    input_groups: dict[int, int]
    effects: Effects


def capture(gm: fx.GraphModule, inputs: Sequence[Any], changing: Collection[str] = ()) -> StepGraph:
    """Make Dynamo's graph functional.

    Parameters
    ----------
    gm, inputs
        What Dynamo hands to a backend.
    changing
        Names of buffers that are state although this graph only reads them.

    Raises
    ------
    CaptureError
        The graph cannot be deferred; the message says what stands in the way.
    """
    for value in inputs:
        if isinstance(value, torch.Tensor) and not all(isinstance(size, int) for size in value.shape):
            raise CaptureError("an input has a symbolic size; the rolled program needs fixed sizes")

    try:
        found = functional.inference_graph(gm, inputs)
    except ValueError:
        raise CaptureError("the step has no tensor operation") from None
    if found is None:
        raise CaptureError(_regrouped(gm, inputs))
    graph, written, passed = found.graph, found.written, found.passed
    _check_known(graph)
    placeholders = graph.graph.find_nodes(op="placeholder")
    (results,) = graph.graph.find_nodes(op="output")[0].args
    returned = results[len(written) :]
    groups, input_groups = _groups(placeholders, returned, passed, found.views)
    for at in written:
        if at in input_groups:
            raise CaptureError(
                f"{spoken(_name(gm, at))} is written in place and a view of it is returned or kept; "
                "return a copy (clone) instead"
            )
    return StepGraph(
        graph=graph,
        weights=tuple(
            _is_weight(node, value) and at not in written and _name(gm, at) not in changing
            for at, (node, value) in enumerate(zip(_nodes(gm), inputs, strict=True))
        ),
        names=tuple(_name(gm, at) for at in range(len(inputs))),
        written=written,
        passed=passed,
        groups=groups,
        input_groups=input_groups,
        effects=effects(),
    )


def _check_known(graph: fx.GraphModule) -> None:
    """Refuse numbers and sizes that are read from tensors: a segment is recorded before its values are there.

    Raises
    ------
    CaptureError
        The message names the operation and the user's line.
    """
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, torch.Tensor) else ()
        if node.target is torch.ops.aten._local_scalar_dense.default:
            what = "a number is read from a tensor (.item() or int(tensor))"
        elif node.op == "call_function" and free_unbacked_symbols(tuple(sizes)):
            what = f"the size of a result of {node.target} depends on its values"
        else:
            continue
        line, module = source_line(node), module_of(node)
        where = "" if module == "(model)" else f" in {module}"
        raise CaptureError(
            f"{what}{where}{f' at {line}' if line else ''}, and a segment is recorded before its "
            "values are known; keep such a number as a Python int that the step counts, and sizes fixed"
        )


def _groups(
    placeholders: Sequence[fx.Node],
    returned: Sequence[Any],
    passed: Sequence[int | None],
    views: Sequence[int | None],
) -> tuple[tuple[int | None, ...], dict[int, int]]:
    """Which returned values share memory with each other or with an input."""
    owners: dict[Any, list[int]] = {}
    for at, (value, same) in enumerate(zip(returned, passed, strict=True)):
        example = value.meta.get("val") if isinstance(value, fx.Node) else None
        if isinstance(example, torch.Tensor) and same is None:
            owners.setdefault(_storage(example), []).append(at)
    of_input = {}
    for at, node in enumerate(placeholders):
        example = node.meta.get("val")
        if isinstance(example, torch.Tensor):
            of_input.setdefault(_storage(example), at)
    groups: list[int | None] = [None] * len(returned)
    input_groups: dict[int, int] = {}
    for number, (storage, members) in enumerate(owners.items()):
        base = of_input.get(storage)
        different = {returned[at] for at in members}
        if base is None and len(different) < 2:
            continue
        for at in members:
            groups[at] = number
        if base is not None:
            input_groups[base] = number
    for at, base in enumerate(views):
        if base is not None and groups[at] is None:
            groups[at] = input_groups.setdefault(base, len(owners) + at)
    return tuple(groups), input_groups


def _storage(value: torch.Tensor) -> Any:
    return value.untyped_storage()._cdata


def _regrouped(gm: fx.GraphModule, inputs: Sequence[Any]) -> str:
    """Why AOTAutograd's graph has other inputs than Dynamo's."""
    for at, value in enumerate(inputs):
        if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
            return (
                f"{spoken(_name(gm, at))} is a {type(value).__name__}, a tensor that stands for several "
                "others, and has no row in a stack; keep the parts as buffers of a module instead"
            )
    names = ", ".join(_sharing(gm, inputs))
    if names:
        return f"{names} share memory and are written in place; keep such state apart"
    return "AOTAutograd gives its functional graph other inputs than the step has"


def _sharing(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[str]:
    """Names of inputs that share memory with another."""
    storages: dict[Any, list[int]] = {}
    for at, value in enumerate(inputs):
        if isinstance(value, torch.Tensor):
            storages.setdefault(_storage(value), []).append(at)
    return [spoken(_name(gm, at)) for members in storages.values() if len(members) > 1 for at in members]


def _nodes(gm: fx.GraphModule) -> list[fx.Node]:
    return gm.graph.find_nodes(op="placeholder")


def _source(node: fx.Node) -> Any:
    return getattr(node.meta.get("grapharg"), "source", None)


def _name(gm: fx.GraphModule, at: int) -> str:
    node = _nodes(gm)[at]
    source = _source(node)
    return dynamo.source_name(source) if source is not None else node.name


def _is_weight(node: fx.Node, value: Any) -> bool:
    if isinstance(value, torch.nn.Parameter):
        return True
    source = _source(node)
    return isinstance(value, torch.Tensor) and source is not None and "_buffers" in dynamo.source_name(source)
