"""How a kind's graph runs: as it is, or compiled by Inductor at its first call."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import _disable_current_modes

from diagpass.errors import DiagpassWarning
from diagpass.stages import say

log = logging.getLogger(__name__)


class InductorKind(torch.nn.Module):
    """A graph compiled by Inductor for the strides of its first call.

    The compiled code is fixed to sizes (which never change within a plan) and strides (which are
    checked: an operand laid out differently is copied into the expected layout).
    """

    def __init__(self, graph: fx.GraphModule, name: str) -> None:
        super().__init__()
        self.graph_module = graph
        self.name = name
        self.place: tuple[int, int] = 0, 0  # of how many that are compiled; 0 if not known
        self._compiled: Any = None
        self._strides: list[tuple[int, ...] | None] = []

    def forward(self, *operands: Any) -> tuple:
        """Run the graph; results as the graph returns them."""
        if self._compiled is None:
            self._compile(operands)
        laid_out = [
            _laid_out(operand, stride) for operand, stride in zip(operands, self._strides, strict=True)
        ]
        run: Any = self._compiled
        return run(*laid_out)

    def _compile(self, operands: tuple) -> None:
        from torch._inductor import compile as compile_graph

        say(f"compile: {self.name}", *self.place)
        begin = time.perf_counter()
        self._strides = [
            operand.stride() if isinstance(operand, torch.Tensor) else None for operand in operands
        ]
        if all(stride is not None for stride in self._strides):
            try:
                # The first call of an AOT program runs under a dispatch mode that watches custom operators.
                with _disable_current_modes(), torch.no_grad():
                    self._compiled = compile_graph(self.graph_module, list(operands))
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


def _laid_out(operand: Any, stride: tuple[int, ...] | None) -> Any:
    if stride is None or operand.stride() == stride:
        return operand
    empty = torch.empty_strided(operand.shape, stride, dtype=operand.dtype, device=operand.device)
    return empty.copy_(operand)
