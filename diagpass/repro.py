"""A functional graph -> a script that a bug report can hold: it runs anywhere, without the model.

The script has the graph as Python code, the shapes of its inputs (values are drawn at random) and which
module call each operation came from. It analyses the graph, prints the report, runs the graph and the
wavefront and compares them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch.fx.node import map_aggregate

from diagpass.capture.marks import Record, calls_in, record_of

__all__ = ["script"]

_SCRIPT = '''"""A graph that diagpass planned; run it with diagpass {version} and torch {torch} installed."""

import json

import torch
import torch.fx as fx
from torch import device, inf, nan  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.overrides import TorchFunctionMode

from diagpass import pipeline
from diagpass.options import Options
from diagpass.report import make_report

# per input: shape, stride, data type, device; or a number
INPUTS = json.loads(r"""{inputs}""")
CONSTANTS = json.loads(r"""{constants}""")
# which inputs are weights, and per operation the module calls around it, outermost first: path, call, class
WEIGHTS = json.loads(r"""{weights}""")
MARKS = json.loads(r"""{marks}""")


class Graph(torch.nn.Module):
{code}

def make(described):
    if not isinstance(described, list):
        return described
    shape, stride, dtype, where = described
    where = where if torch.device(where).type == "cpu" or torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    value = torch.empty_strided(shape, stride, dtype=kind, device=where)
    return value.normal_() if kind.is_floating_point else value.zero_()


class Every(TorchFunctionMode):
    """Traces the operations on constants, too."""

    def __init__(self, tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, operation, types, args=(), kwargs=None):
        if isinstance(operation, torch._ops.OpOverload):
            return self.tracer.create_proxy("call_function", operation, args, kwargs or {{}})
        return operation(*args, **(kwargs or {{}}))


def main():
    torch.manual_seed(0)
    inputs = [make(each) for each in INPUTS]
    root = Graph()
    for name, described in CONSTANTS.items():
        root.register_buffer(name, make(described))
    tracer = fx.Tracer()
    with Every(tracer):
        graph = fx.GraphModule(root, tracer.trace(root))
    operations = [node for node in graph.graph.nodes if node.op == "call_function"]
    for node, calls in zip(operations, MARKS, strict=True):
        node.meta["nn_module_stack"] = {{
            f"{{module}}@{{count}}" if count else module: (path, cls) for path, count, cls, module in calls
        }}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(graph, mode).propagate(*inputs)
    options = Options(compiler="eager", weights="copy", schedule="wavefront")
    analysis = pipeline.analyse(graph, options)
    print(make_report(pipeline.predict(graph, analysis, WEIGHTS, options)))
    if analysis.cells is None or not analysis.may_be_forced:
        return
    with torch.no_grad():
        expected = root(*inputs)
        program, _ = pipeline.lower(graph, analysis, WEIGHTS, options)
        found = program(*inputs)
    for at, (a, b) in enumerate(zip(found, expected, strict=True)):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            worst = float((a - b).abs().max()) if a.numel() else 0.0
            print(f"output {{at}}: largest difference {{worst:.2e}}")


if __name__ == "__main__":
    main()
'''


def script(graph: fx.GraphModule, weights: Sequence[bool]) -> Script | None:
    """The script for a functional graph, before anything has changed it; None where one cannot be written."""
    nodes = list(graph.graph.nodes)
    inputs = [_described(node.meta.get("val")) for node in nodes if node.op == "placeholder"]
    constants: dict[str, Any] = {}
    for node in nodes:
        if node.op == "get_attr":
            constants[str(node.target)] = _described(getattr(graph, str(node.target), None))
    if any(each is _NOT for each in [*inputs, *constants.values()]):
        return None
    return Script([_Line.of(node) for node in nodes], inputs, constants, list(weights))


class _Name(str):
    """The name of a node, where a line has another as its argument."""


class _Line(NamedTuple):
    """A node by its names alone: what is kept for a script holds neither a graph nor a tensor."""

    op: str
    name: str
    target: Any
    arguments: Any
    record: Record

    @classmethod
    def of(cls, node: fx.Node) -> _Line:
        arguments: Any = fx.map_arg((node.args, node.kwargs), lambda argument: _Name(argument.name))
        return cls(node.op, node.name, node.target, arguments, record_of(node))


class Script:
    """A script that is written when it is asked for; to pickle or copy it is to write it."""

    def __init__(
        self, lines: Sequence[_Line], inputs: list[Any], constants: dict[str, Any], weights: list[bool]
    ) -> None:
        self._lines = lines
        self._parts = {"inputs": inputs, "constants": constants, "weights": weights}

    def __call__(self) -> str:
        """The text."""
        from diagpass import __version__

        code = self._graph().python_code("self").src
        marks = [
            [(call.path, call.count, call.cls, call.module) for call in calls_in(line.record)]
            for line in self._lines
            if line.op == "call_function"
        ]
        return _SCRIPT.format(
            version=__version__,
            torch=torch.__version__,
            code="\n".join(f"    {line}".rstrip() for line in code.strip().splitlines()),
            marks=json.dumps(marks),
            **{name: json.dumps(part) for name, part in self._parts.items()},
        )

    def _graph(self) -> fx.Graph:
        graph = fx.Graph()
        nodes: dict[str, fx.Node] = {}

        def found(leaf: Any) -> Any:
            return nodes[leaf] if isinstance(leaf, _Name) else leaf

        for line in self._lines:
            args, kwargs = map_aggregate(line.arguments, found)
            nodes[line.name] = graph.create_node(line.op, line.target, args, kwargs, line.name)
        return graph

    def __reduce__(self) -> Any:
        return str, (self(),)


_NOT = object()


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        sizes = [*value.shape, *value.stride()]
        if not all(isinstance(size, int) for size in sizes):
            return _NOT
        dtype = str(value.dtype).removeprefix("torch.")
        return [list(value.shape), list(value.stride()), dtype, str(value.device)]
    return value if type(value) in (int, float, bool) else _NOT
