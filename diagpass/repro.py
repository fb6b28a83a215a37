"""A functional graph -> a script that a bug report can hold: it runs anywhere, without the model.

The script has the graph as Python code, the shapes of its inputs (values are drawn at random) and which
module call each operation came from. It analyses the graph, prints the report, runs the graph and the
wavefront and compares them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from diagpass.capture.marks import calls_of

__all__ = ["script"]

_SCRIPT = '''"""A graph that diagpass planned; run it with diagpass {version} and torch {torch} installed."""

import json

import torch
import torch.fx as fx
from torch import device, inf, nan  # noqa: F401
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

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


def main():
    torch.manual_seed(0)
    inputs = [make(each) for each in INPUTS]
    root = Graph()
    for name, described in CONSTANTS.items():
        root.register_buffer(name, make(described))
    graph = fx.symbolic_trace(root)
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
    marks = [
        [(call.path, call.count, call.cls, call.module) for call in calls_of(node)]
        for node in nodes
        if node.op == "call_function"
    ]
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    return Script(copied, inputs, constants, list(weights), marks)


class Script:
    """A script that is written when it is asked for; to pickle or copy it is to write it."""

    def __init__(
        self,
        graph: fx.Graph,
        inputs: list[Any],
        constants: dict[str, Any],
        weights: list[bool],
        marks: list[Any],
    ) -> None:
        self._graph = graph
        self._parts = {"inputs": inputs, "constants": constants, "weights": weights, "marks": marks}

    def __call__(self) -> str:
        """The text."""
        from diagpass import __version__

        code = self._graph.python_code("self").src
        return _SCRIPT.format(
            version=__version__,
            torch=torch.__version__,
            code="\n".join(f"    {line}".rstrip() for line in code.strip().splitlines()),
            **{name: json.dumps(part) for name, part in self._parts.items()},
        )

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
