"""The marks of calls, and what cells of one kind have in common: from hand-made graphs."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from diagpass.analysis.kinds import find_kinds
from diagpass.capture.marks import all_calls
from diagpass.ir import Cell

aten = torch.ops.aten


def marked(graph: fx.Graph, *stack: tuple[str, str]) -> fx.Node:
    """A node that came from these modules: (key, path)."""
    node = graph.call_function(aten.relu.default, (next(iter(graph.nodes)),))
    node.meta["nn_module_stack"] = {key: (f"L['model'].{path}", "Layer") for key, path in stack}
    return node


def test_a_module_has_its_shortest_path_and_its_calls_are_numbered_in_program_order() -> None:
    graph = fx.Graph()
    graph.placeholder("x")
    first = marked(graph, ("m", "long.way.layer"))
    again = marked(graph, ("m", "long.way.layer"))
    short = marked(graph, ("m@1", "layer"), ("n", "layer.inner"))
    third = marked(graph, ("m@1", "long.way.layer"))
    calls = all_calls(graph)
    assert [(call.path, call.count) for call in calls[first]] == [("layer", 0)]
    assert calls[again] is calls[first]
    assert [(call.path, call.count) for call in calls[short]] == [("layer", 1), ("layer.inner", 0)]
    assert [(call.path, call.count) for call in calls[third]] == [("layer", 2)]
    assert calls[next(iter(graph.nodes))] == ()


def test_cells_differ_in_kind_by_how_arguments_are_nested() -> None:
    def kinds(*arguments: tuple) -> int:
        graph = fx.Graph()
        x: Any = graph.placeholder("x")
        nodes = [graph.call_function(print, (x, *each)) for each in arguments]
        return len(find_kinds([Cell(at, f"layers.{at}", at, 0, (node,)) for at, node in enumerate(nodes)]))

    assert kinds(([1, 2], 3), ([1, 2], 3)) == 1
    assert kinds(([1, 2], 3), ([1], 2, 3)) == 2
    assert kinds(([1, 2], 3), (1, 2, 3)) == 2
    assert kinds(([1],), ((1,),)) == 2
    assert kinds(([[1]],), ([[1]],)) == 1
    assert kinds(([],), ()) == 2
    assert kinds((1,), (True,)) == 2
    assert kinds((None,), (None,)) == 1
