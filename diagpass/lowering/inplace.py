"""A batched form -> one that leaves its results in memory that it is given.

A compiler writes the last operation's result straight there, where a copy afterwards would move it once more.
"""

from __future__ import annotations

import torch
import torch.fx as fx

Result = tuple[tuple[int, ...], torch.dtype, torch.device]


def write_results(traced: fx.GraphModule) -> tuple[fx.GraphModule, tuple[Result, ...]]:
    """Make a graph's results operands that it writes.

    Parameters
    ----------
    traced
        A functional graph that returns tensors.

    Returns
    -------
    tuple
        The graph, which takes a tensor for each result behind its operands and returns nothing, and each
        result's shape, data type and device. A result is written as soon as it is known.
    """
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    inputs = traced.graph.find_nodes(op="placeholder")
    output = traced.graph.find_nodes(op="output")[0]
    results = output.args[0]
    for node in inputs:
        made[node] = graph.node_copy(node, made.__getitem__)
    targets = []
    found: list[Result] = []
    for at, node in enumerate(results):  # type: ignore[arg-type]
        example = node.meta["val"]  # type: ignore[union-attr]
        target = graph.placeholder(f"result_{at}")
        target.meta = {"val": example}
        targets.append(target)
        found.append((tuple(int(size) for size in example.shape), example.dtype, example.device))
    for node in traced.graph.nodes:
        if node.op == "output":
            break
        if node.op != "placeholder":
            made[node] = graph.node_copy(node, made.__getitem__)
        for result, target in zip(results, targets, strict=True):  # type: ignore[arg-type]
            if result is node:
                graph.call_function(torch.ops.aten.copy_.default, (target, made[node]))
    graph.output(())
    return fx.GraphModule(traced, graph, class_name="Into"), tuple(found)
