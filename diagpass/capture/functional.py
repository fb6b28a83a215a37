"""Dynamo's graph -> a functional ATen graph, by AOTAutograd.

Raw Dynamo graphs write in place, so their edges lie: a buffer that is overwritten looks like no
dependency at all. AOTAutograd turns every mutation into a value and every alias into an explicit
copy-back, which the caller sees as ordinary outputs. It also splits a graph that needs gradients into
a forward and a backward one; only the forward one is handed to ``lower``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition

log = logging.getLogger(__name__)

Lower = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def functionalize(
    gm: fx.GraphModule, inputs: Sequence[Any], lower: Lower, inference: Lower | None = None
) -> Callable[..., Any]:
    """Functionalise ``gm`` and have ``lower`` make the program.

    Parameters
    ----------
    gm
        The graph as Dynamo captured it, weights and state lifted to inputs.
    inputs
        Its example inputs.
    lower
        Called with the functional forward graph and its (fake) inputs; returns what runs it, taking
        the graph's inputs as positional arguments and returning its outputs as a sequence.
    inference
        Called instead, if given, where no gradients are asked for.

    Returns
    -------
    Callable
        Takes ``gm``'s inputs, returns its outputs; copies mutated inputs back after the program ran
        through, so that a failure midway leaves them as they were.
    """

    def forward(graph: fx.GraphModule, fake_inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(lower(graph, fake_inputs))

    def without_gradients(graph: fx.GraphModule, fake_inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func((inference or lower)(graph, fake_inputs))

    def backward(graph: fx.GraphModule, fake_inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    compile_functional = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=without_gradients,
        partition_fn=default_partition,
    )
    return compile_functional(gm, inputs)


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers (and so must keep its place in program order).

    Attention and dropout operations are tagged as random whatever their probability; with a
    probability of 0 they draw nothing.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if "dropout_p" in names:
        return given.get("dropout_p", 0.0) != 0.0
    return given.get("p") != 0.0 and given.get("train") is not False
