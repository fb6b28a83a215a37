"""A batched form -> one that leaves its results in memory that it is given.

A compiler writes the last operation's result straight there, where a copy afterwards would move it once more.
"""

from __future__ import annotations

import torch
import torch.fx as fx

Result = tuple[tuple[int, ...], torch.dtype, torch.device]


def results_of(traced: fx.GraphModule, width: int | None = None) -> tuple[Result, ...]:
    """Shape, data type and device of each result of a graph, with ``width`` for its leading size if given."""
    found = []
    for node in traced.graph.find_nodes(op="output")[0].args[0]:  # type: ignore[union-attr]
        example = node.meta["val"]  # type: ignore[union-attr]
        lead = example.shape[:1] if width is None else (width,)
        shape = tuple(int(size) for size in (*lead, *example.shape[1:]))
        found.append((shape, example.dtype, example.device))
    return tuple(found)


def write_results(traced: fx.GraphModule) -> fx.GraphModule:
    """Make a graph's results operands that it writes.

    Parameters
    ----------
    traced
        A functional graph that returns tensors.

    Returns
    -------
    fx.GraphModule
        The graph, which takes a tensor for each result behind its operands and returns nothing. A result
        is written as soon as it is known.
    """
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    inputs = traced.graph.find_nodes(op="placeholder")
    output = traced.graph.find_nodes(op="output")[0]
    results = output.args[0]
    for node in inputs:
        made[node] = graph.node_copy(node, made.__getitem__)
    targets = []
    for at, node in enumerate(results):  # type: ignore[arg-type]
        target = graph.placeholder(f"result_{at}")
        target.meta = {"val": node.meta["val"]}  # type: ignore[union-attr]
        targets.append(target)
    for node in traced.graph.nodes:
        if node.op == "output":
            break
        if node.op != "placeholder":
            made[node] = graph.node_copy(node, made.__getitem__)
        for result, target in zip(results, targets, strict=True):  # type: ignore[arg-type]
            if result is node:
                graph.call_function(torch.ops.aten.copy_.default, (target, made[node]))
    graph.output(())
    return fx.GraphModule(traced, graph, class_name="Into")
