"""Unrolled programs as one replay: the same results, whatever is done between the calls.

A tape stands in for CUDA graphs. It repeats a call on the memory that it was recorded with, which holds nothing
of an earlier call when the next one begins.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from diagpass.runtime import graphed as graphed_module
from diagpass.runtime.clock import measuring
from diagpass.runtime.compiled import InductorKind
from diagpass.runtime.graphed import MOST_KEYS, Graphed, _Recording
from tests.helpers import (
    MatmulCounter,
    assert_same,
    assert_state_same,
    assert_tree_same,
    fast_copy,
    run_sequential,
)
from tests.models import EXPECT, ZOO, Mix, tokens
from tests.tape import Tape
from tests.test_threads import _in_threads

OPTIONS = {"compiler": "inductor", "loop": "flat"}
CPU = torch.device("cpu")


def spoil(value: Tensor) -> None:
    """Leave nothing of what was there."""
    value.fill_(float("nan") if value.is_floating_point() else 0)


class Forgetful(_Recording):
    """A recording that keeps no contents between calls, and weights only by where they were."""

    def __init__(self, module: Any, args: Any, *more: Any) -> None:
        args = [value.detach() if isinstance(value, nn.Parameter) else value for value in args]
        super().__init__(module, args, *more)
        self._forget()

    def play(self, args: Any) -> Any:
        found = super().play(args)
        self._forget()
        return found

    def _forget(self) -> None:
        for value in (*self._stage.values(), *self._left):
            spoil(value)


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Graphed]:
    """All programs are recorded, by a tape, and not compiled; the programs, the last one last."""
    programs: list[Graphed] = []

    def uncompiled(self: InductorKind, operands: tuple) -> None:
        self._strides = [x.stride() if isinstance(x, Tensor) else None for x in operands]
        self._compiled = self.graph_module

    init = Graphed.__init__

    def noted(self: Graphed, *args: Any) -> None:
        init(self, *args)
        programs.append(self)

    monkeypatch.setattr(graphed_module, "recorder_for", lambda device: Tape)
    monkeypatch.setattr(graphed_module, "_Recording", Forgetful)
    monkeypatch.setattr(InductorKind, "_compile", uncompiled)
    monkeypatch.setattr(Graphed, "__init__", noted)
    return programs


def pair(name: str, **options: Any) -> tuple[nn.Module, Any]:
    """A model of the zoo and its transformed copy."""
    model, _ = ZOO[name]()
    return model, fast_copy(model, **OPTIONS, **options)


def agree(model: nn.Module, fast: Any, *inputs: Any) -> Any:
    """A call of each: the same outputs and state."""
    expected, got = run_sequential(model, inputs), run_sequential(fast, inputs)
    assert_tree_same(got, expected, 1e-12, "output")
    assert_state_same(fast.original, model, 1e-12)
    return got


NOT_RECORDED = {
    # recorded never, since what leaves shares memory
}


@pytest.mark.parametrize("name", list(ZOO))
def test_the_zoo(name: str, made: list[Graphed]) -> None:
    model, inputs = ZOO[name]()
    expect = EXPECT[name]
    assert_same(
        model, inputs, OPTIONS, calls=5, ran=expect.ran, returns_state=expect.returns_state, rtol=1e-10
    )
    print(name, [(p.plain, p.recorded, p.replayed) for p in made])
