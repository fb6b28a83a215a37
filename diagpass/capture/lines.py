"""The user's lines that an operation comes from, recorded at less cost than Dynamo takes.

Dynamo draws the whole stack anew for each operation, with marks under the columns. Here each line is drawn
once, without marks.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch.fx.experimental.symbolic_shapes import uninteresting_files

from diagpass.replaced import Replaced

__all__ = ["plain_lines"]

Drawn = dict[tuple[CodeType, int], str]


@contextlib.contextmanager
def plain_lines() -> Iterator[None]:
    """Inside, what Dynamo captures in this thread has its ``stack_trace`` from here."""
    with _tracer.inside({}):
        yield


def _create_node(self: Any, kind: str, *args: Any, **kwargs: Any) -> Any:
    """Stands for ``SubgraphTracer.create_node``: Dynamo draws no stack where a node has one."""
    node = _tracer.original("create_node")(self, kind, *args, **kwargs)
    drawn = _tracer.state
    if drawn is not None and kind != "output":
        stack = _stack(getattr(self.output_graph, "current_tx", None), drawn)
        if stack:
            node.meta["stack_trace"] = stack
    return node


def _stack(frame: Any, drawn: Drawn) -> str:
    """The frames of the user's code, the innermost last."""
    lines: list[str] = []
    while frame is not None:
        place = (frame.f_code, frame.lineno)
        line = drawn.get(place)
        if line is None:
            line = drawn[place] = _draw(*place)
        lines.append(line)
        frame = getattr(frame, "parent", None)
    return "".join(reversed(lines))


def _draw(code: CodeType, line: int) -> str:
    name = code.co_filename
    if "torch/nn/modules" in name or name in uninteresting_files():
        return ""
    return "".join(
        traceback.format_list([traceback.FrameSummary(name, line, code.co_name, lookup_line=False)])
    )


_tracer: Replaced[Drawn] = Replaced(
    "torch._dynamo.output_graph", "SubgraphTracer", {"create_node": _create_node}
)
