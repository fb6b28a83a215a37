"""Dynamo's graph -> a functional ATen graph, by AOTAutograd or, where that is plain, by expansion.

Raw Dynamo graphs write in place, so their edges lie: a buffer that is overwritten looks like no
dependency at all. AOTAutograd turns every mutation into a value and every alias into an explicit
copy-back, which the caller sees as ordinary outputs. It also splits a graph that needs gradients into
a forward and a backward one; only the forward one is handed to ``lower``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.schemas import OutputType
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition
from torch._guards import TracingContext

from diagpass.capture.expand import Expanded, Unsure, expand
from diagpass.stages import stage

log = logging.getLogger(__name__)

Lower = Callable[[fx.GraphModule, Sequence[Any], Sequence[int]], Callable[..., Any]]


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
        Called with the functional forward graph, its (fake) inputs and the positions of those that are
        written in place; returns what runs it, taking the graph's inputs as positional arguments and
        returning its outputs as a sequence.
    inference
        Called instead, if given, where no gradients are asked for.

    Returns
    -------
    Callable
        Takes ``gm``'s inputs, returns its outputs; copies mutated inputs back after the program ran
        through, so that a failure midway leaves them as they were.
    """
    expanded = _expanded(gm, inputs)
    if expanded is not None and not _shares_memory_with_inputs(expanded):
        with _as_compiled():
            program = (inference or lower)(expanded.graph, _values(expanded.graph), expanded.written)
        return _writing_back(program, expanded.written)
    return _by_aot_autograd(gm, inputs, lower, inference or lower)


def _by_aot_autograd(
    gm: fx.GraphModule, inputs: Sequence[Any], lower: Lower, inference: Lower
) -> Callable[..., Any]:
    def forward(graph: fx.GraphModule, fake_inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(lower(graph, fake_inputs, _written()))

    def without_gradients(graph: fx.GraphModule, fake_inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed_func(inference(graph, fake_inputs, _written()))

    def backward(graph: fx.GraphModule, fake_inputs: Sequence[Any]) -> Callable[..., Any]:
        for view in graph.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            # A kernel may lay its result out otherwise than its fake one is (batch norm of a transposed
            # input does): what could be viewed in the trace is copied then.
            view.target = torch.ops.aten.reshape.default
        graph.recompile()
        return make_boxed_func(graph.forward)

    compile_functional = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=without_gradients,
        partition_fn=default_partition,
    )
    return compile_functional(gm, inputs)


@dataclasses.dataclass(frozen=True)
class Functional:
    """A functional graph without gradients, and what its outputs are.

    Attributes
    ----------
    graph
        Functional ATen graph with the captured graph's inputs; its outputs are the written inputs' new
        values, then what the captured graph returns.
    written
        Positions of the inputs that are written in place, in the order of their new values.
    passed
        Per returned value, the input that it *is* (the same object), or None.
    views
        Per returned value, the input that it is a view of, or None.
    """

    graph: fx.GraphModule
    written: tuple[int, ...]
    passed: tuple[int | None, ...]
    views: tuple[int | None, ...]


class _Found(Exception):
    """Leaves AOTAutograd with the functional graph."""

    def __init__(self, graph: fx.GraphModule, metadata: Any) -> None:
        super().__init__("found")
        self.graph, self.metadata = graph, metadata


def inference_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> Functional | None:
    """The functional graph of ``gm`` without gradients, or None where it has other inputs than ``gm``.

    Raises
    ------
    ValueError
        There is nothing to compute.
    """
    with torch.no_grad():
        expanded = _expanded(gm, inputs)
        if expanded is not None:
            no_views = (None,) * len(expanded.passed)  # other than what the graph's values show
            return Functional(expanded.graph, expanded.written, expanded.passed, no_views)

        def lower(graph: fx.GraphModule, fake_inputs: Any, written: Any) -> Callable[..., Any]:
            raise _Found(graph, getattr(TracingContext.try_get(), "fw_metadata", None))

        try:
            _by_aot_autograd(gm, inputs, lower, lower)
        except _Found as found:
            graph, metadata = found.graph, found.metadata
        else:
            raise ValueError("no operation")
    if metadata is None or len(graph.graph.find_nodes(op="placeholder")) != len(inputs):
        return None
    written = tuple(metadata.mutated_inp_runtime_indices)
    results = _results(graph)
    output = graph.graph.find_nodes(op="output")[0]
    output.args = (results[: len(written) + len(metadata.output_info)],)
    graph.recompile()
    return Functional(
        graph,
        written,
        _bases(metadata, OutputType.is_input),
        _bases(metadata, OutputType.alias_of_input),
    )


def _bases(metadata: Any, kind: OutputType) -> tuple[int | None, ...]:
    return tuple(info.base_idx if info.output_type is kind else None for info in metadata.output_info)


def _written() -> tuple[int, ...]:
    """The inputs that AOTAutograd found the graph under way to write in place."""
    metadata = getattr(TracingContext.try_get(), "fw_metadata", None)
    return tuple(getattr(metadata, "mutated_inp_runtime_indices", ()) or ())


@contextlib.contextmanager
def _as_compiled() -> Iterator[None]:
    """The modes in which a functional graph is compiled and runs: casts and detachments are in it already."""
    with torch.no_grad(), torch._C._DisableAutocast():
        yield


def _writing_back(program: Callable[..., Any], written: Sequence[int]) -> Callable[..., Any]:
    """Run a functional program as what it is; its first results go to the inputs that the graph writes."""

    def run(*args: Any) -> Any:
        with _as_compiled():
            results = program(*args)
            for at, value in zip(written, results, strict=False):
                args[at].copy_(value)
        return results[len(written) :]

    modes = torch.is_grad_enabled() or torch._C._is_any_autocast_enabled()  # Dynamo guards both
    return run if written or modes else program


def _expanded(gm: fx.GraphModule, inputs: Sequence[Any]) -> Expanded | None:
    """The functional graph by expansion, or None."""
    try:
        with stage("expand the calls"):
            return expand(gm, inputs)
    except Unsure as reason:
        log.info("AOTAutograd makes the graph functional: %s", reason)
        return None


def _results(graph: fx.GraphModule) -> tuple[Any, ...]:
    return tuple(graph.graph.find_nodes(op="output")[0].args[0])


def _values(graph: fx.GraphModule) -> list[Any]:
    return [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]


def _shares_memory_with_inputs(expanded: Expanded) -> bool:
    """Whether a result is an input or a view of one: AOTAutograd makes it anew at each call."""
    memory = {value.untyped_storage()._cdata for value in _values(expanded.graph) if _is_tensor(value)}
    values = [v.meta["val"] for v in _results(expanded.graph) if isinstance(v, fx.Node)]
    returned = any(at is not None for at in expanded.passed)
    return returned or any(v.untyped_storage()._cdata in memory for v in values if _is_tensor(v))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


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
