"""How a kind's graph runs: as it is, or compiled by Inductor at its first call.

A graph of symbolic width is compiled once for all widths. Inductor decides on sizes, too, with nobody to
check what it took for granted: :class:`InductorWidths` asks before each new width.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import _disable_current_modes

from diagpass.errors import DiagpassWarning
from diagpass.lowering.widths import at_width, examples, holds, width_of, width_operand
from diagpass.runtime.ahead import Waits, expected, waiting_later
from diagpass.stages import say
from diagpass.uncollected import uncollected

log = logging.getLogger(__name__)


_asked: set[str] = set()  # the devices that processes were asked for
_asking = threading.Lock()


def get_ready(device_types: Iterable[str]) -> None:
    """Start what Inductor needs before it can compile its first kernel, so that it is there when needed.

    It takes seconds and goes on beside a capture: on CUDA the processes that compile kernels (torch decides
    whether and how many it wants, ``TORCHINDUCTOR_COMPILE_THREADS``), on the CPU a look at what the compiler
    and the processor can do, and the headers of all kernels, compiled once. What cannot be had now is had
    when Inductor compiles. With ``TORCH_WARM_POOL=0`` nothing is started.

    Parameters
    ----------
    device_types
        Where cells may run, such as ``{"cuda"}``. Nothing is asked for twice.
    """
    if os.environ.get("TORCH_WARM_POOL", "1") != "1":
        return
    with _asking:
        wanted = {"cuda", "cpu"} & set(device_types) - _asked
        _asked.update(wanted)
        if "cuda" in wanted:
            _try("processes that compile", _start_processes)
        if "cpu" in wanted:
            what = "the C++ compiler", _compile_nothing
            threading.Thread(target=_try, args=what, name="diagpass get ready", daemon=True).start()


def _try(what: str, start: Callable[[], Any]) -> None:
    begin = time.perf_counter()
    try:
        start()
    except Exception as error:  # torch's own affair; without it all is as good, only later
        log.info("%s: not ready ahead (%s: %s)", what, type(error).__name__, error)
        return
    log.info("%s: ready or on the way (%.1f s)", what, time.perf_counter() - begin)


def _start_processes() -> None:
    importlib.import_module("torch._inductor.async_compile").maybe_warm_pool()


def _compile_nothing() -> None:
    """Have Inductor's C++ compiler make a kernel that does nothing, with all that its first kernel takes."""
    cache = importlib.import_module("torch._inductor.codecache").CppPythonBindingsCodeCache
    cache.load_pybinding(["float*"], _NOTHING)


_NOTHING = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* nothing) {}
"""


@dataclasses.dataclass
class _Begun:
    """Lowered in so many seconds, and what then waits for its kernels, unless that has been done."""

    compiled: Any
    waits: Waits
    seconds: float
    is_finished: bool = False


class InductorKind(torch.nn.Module):
    """A graph compiled by Inductor for the strides of its first call.

    The compiled code is fixed to sizes (which never change within a plan, but for a symbolic width) and
    strides (which are checked: an operand laid out differently is copied into the expected layout).
    """

    def __init__(self, graph: fx.GraphModule, name: str) -> None:
        super().__init__()
        self.graph_module = graph
        self.name = name
        self.place: tuple[int, int] = 0, 0  # of how many that are compiled; 0 if not known
        self._compiled: Any = None
        self._strides: list[tuple[int, ...] | None] = []
        self._ahead: _Begun | None = None

    def forward(self, *operands: Any) -> tuple:
        """Run the graph; results as the graph returns them."""
        self.prepare(operands)
        laid_out = [
            _laid_out(operand, stride) for operand, stride in zip(operands, self._strides, strict=True)
        ]
        run: Any = self._compiled
        return run(*laid_out)

    def prepare(self, operands: tuple) -> None:
        """Compile it for operands like these, unless it is."""
        if self._compiled is None and not self._is_finished(operands):
            self._compile(operands)

    def begin(self, known: Sequence[Any]) -> None:
        """Have it compiled for operands of which some are known; :meth:`prepare` waits for it.

        Nothing is done for a graph that has operands elsewhere than on the CPU. What goes wrong here goes
        wrong again in ``prepare``, which says so.

        Parameters
        ----------
        known
            Per operand, what it will be, or None: it is expected to be laid out as when it was traced.
        """
        if self.is_begun:
            return
        begin = time.perf_counter()
        try:
            values = [node.meta.get("val") for node in self.graph_module.graph.find_nodes(op="placeholder")]
            operands = expected(values, known)
            if operands is None:
                return
            say(f"compile: {self.name}", *self.place)
            with waiting_later() as waits:
                compiled = _by_inductor(self.graph_module, operands)
        except Exception as error:  # with operands at hand it may go
            log.info("%s: not compiled ahead (%s: %s)", self.name, type(error).__name__, error)
            return
        self._ahead = _Begun(compiled, waits, time.perf_counter() - begin)
        self._strides = [operand.stride() for operand in operands]

    @property
    def operands(self) -> int:
        """How many operands it takes."""
        return len(self.graph_module.graph.find_nodes(op="placeholder"))

    @property
    def is_begun(self) -> bool:
        """Whether it is compiled, or on the way."""
        return self._compiled is not None or self._ahead is not None

    def finish(self) -> None:
        """Wait for what was begun."""
        if self._ahead is None or self._ahead.is_finished:
            return
        begin = time.perf_counter()
        self._ahead.is_finished = True
        try:
            for wait in self._ahead.waits:
                wait()
        except Exception as error:
            log.info("%s: not compiled ahead (%s: %s)", self.name, type(error).__name__, error)
            self._ahead = None
            return
        waited = time.perf_counter() - begin
        log.info("compiled %s in %.1f s, waited %.1f s more", self.name, self._ahead.seconds, waited)

    def _is_finished(self, operands: tuple) -> bool:
        """Whether what was begun serves these operands, once it is there."""
        self.finish()
        begun, self._ahead = self._ahead, None
        if begun is None:
            return False
        if not self._are_laid_out(operands):
            log.info("%s was compiled ahead for operands laid out otherwise", self.name)
            return False
        self._compiled = begun.compiled
        self._strides = [operand.stride() for operand in operands]  # where there is one element, any will do
        return True

    def _are_laid_out(self, operands: tuple) -> bool:
        """Whether operands lie as those that it was compiled for, where that means anything."""
        return all(
            isinstance(operand, torch.Tensor)
            and operand.dim() == len(stride or ())
            and all(
                size < 2 or step == wanted
                for size, step, wanted in zip(operand.shape, operand.stride(), stride or (), strict=True)
            )
            for operand, stride in zip(operands, self._strides, strict=True)
        )

    def _compile(self, operands: tuple) -> None:
        say(f"compile: {self.name}", *self.place)
        begin = time.perf_counter()
        self._strides = [
            operand.stride() if isinstance(operand, torch.Tensor) else None for operand in operands
        ]
        if all(stride is not None for stride in self._strides):
            try:
                self._compiled = _at_once(self.graph_module, self._examples(operands))
                log.info("compiled %s in %.1f s", self.name, time.perf_counter() - begin)
                return
            except Exception as error:  # Inductor raises what it likes; the graph itself is sound
                warnings.warn(
                    f"Inductor could not compile {self.name} ({type(error).__name__}: {error}); "
                    "it runs uncompiled",
                    DiagpassWarning,
                    stacklevel=2,
                )
        self._compiled = self.graph_module

    def _examples(self, operands: tuple) -> list[Any]:
        """What Inductor is shown of the operands."""
        return list(operands)


def _at_once(graph: fx.GraphModule, operands: list[Any]) -> Any:
    """Compiled, with nothing to wait for; on the CPU its kernels are compiled together."""
    if not all(isinstance(operand, torch.Tensor) and operand.device.type == "cpu" for operand in operands):
        return _by_inductor(graph, operands)
    with waiting_later() as waits:
        compiled = _by_inductor(graph, operands)
    for wait in waits:
        wait()
    return compiled


def _by_inductor(graph: fx.GraphModule, operands: list[Any]) -> Any:
    from torch._inductor import compile as compile_graph

    # The first call of an AOT program runs under a dispatch mode that watches custom operators.
    with _disable_current_modes(), torch.no_grad(), uncollected():
        return compile_graph(graph, operands)


class _Common(InductorKind):
    """A graph of symbolic width, compiled as such."""

    def _examples(self, operands: tuple) -> list[Any]:
        return examples(self.graph_module, operands)


class InductorWidths(torch.nn.Module):
    """A graph of symbolic width, compiled once, and again for a width that the compiled code does not serve.

    Attributes
    ----------
    common
        What serves all other widths.
    alone
        The widths that have code of their own.
    """

    def __init__(self, graph: fx.GraphModule, name: str) -> None:
        super().__init__()
        self.graph_module = graph
        self.name = name
        self.common: InductorKind = _Common(graph, name)
        self.alone: dict[int, InductorKind] = {}
        self._served: set[int] = set()
        at = width_operand(graph)
        assert at is not None
        self._at = at

    def forward(self, *operands: Any) -> tuple:
        """Run the graph; results as the graph returns them."""
        width = operands[self._at].shape[0]
        if width not in self._served:
            self._serve(width, operands)
        return self.alone.get(width, self.common)(*operands)

    def _serve(self, width: int, operands: tuple) -> None:
        self.common.prepare(operands)  # may decide on the width
        symbol = width_of(self.graph_module)
        assert symbol is not None
        if not holds(symbol, width):
            log.info("%s does not serve %d cells, which are compiled for themselves", self.name, width)
            self.alone[width] = InductorKind(at_width(self.graph_module, width), f"{self.name}_w{width}")
        self._served.add(width)


def compile_all(wanted: Mapping[InductorKind, Sequence[Any]]) -> None:
    """Have graphs compiled, one while the next is lowered, and wait for all of them.

    Parameters
    ----------
    wanted
        Per graph, what is known of its operands (:meth:`InductorKind.begin`). One alone is left to its first
        call, which knows all of them.
    """
    new = {graph: known for graph, known in wanted.items() if not graph.is_begun}
    if len(new) < 2:
        return
    for graph, known in new.items():
        graph.begin(known)
    for graph in new:
        graph.finish()


def _laid_out(operand: Any, stride: tuple[int, ...] | None) -> Any:
    if stride is None or operand.stride() == stride:
        return operand
    empty = torch.empty_strided(operand.shape, stride, dtype=operand.dtype, device=operand.device)
    return empty.copy_(operand)
