"""What a row of the zoo is: a model from elsewhere, the loop around it, and what is known of it by hand.

A *case* builds a model as its package ships it, with the loop that its documentation has users write, and
small inputs. `waves` is derived on paper from how the state flows, never read off a run. Models are small:
a few layers and segments, widths of 16 to 32.

Shape letters: B batch, T tokens in a segment, N tokens in all, D width, L layers, S segments.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: tests/zoo/speed.py takes deeper and wider models
L, D = (int(os.environ.get(f"DIAGPASS_ZOO_{name}", small)) for name, small in (("LAYERS", 3), ("WIDTH", 16)))
S, T, B, VOCAB = 6, 4, 2, 31


def diagonal(layers: int, segments: int) -> int:
    """Waves where cell (s, l) needs (s, l-1) for its input and (s-1, l) for its state: t(s, l) = s + l."""
    return layers + segments - 1


@dataclass(frozen=True)
class Case:
    """One row of docs/models.md."""

    #: the row's name, and the test's
    name: str
    #: package and class that it comes from
    source: str
    #: how the state flows from segment to segment
    state: str
    #: -> a `SegmentLoop` or a module that holds its own loop, float64 unless `float32_inside`, and its inputs
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    #: what a user must know, one or two sentences
    note: str = ""
    layers: int = L
    segments: int = S
    #: (layers, segments) -> waves
    waves: Callable[[int, int], int] = diagonal
    #: at least this fraction of the cells runs in groups of two or more, unless `prevented` says why not
    batched: float = 0.7
    prevented: str = ""
    #: the model computes in float32 somewhere, whatever its dtype
    float32_inside: bool = False
    #: what the model is tried in
    dtype: torch.dtype = torch.float64
    #: words of the reason where the model cannot run as a wavefront, and what would lift it
    refused: str = ""
    lifted_by: str = ""
    #: part of every test run; the others run with DIAGPASS_ZOO=all, and in `make models`
    often: bool = False
    #: packages that must be importable
    needs: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """The first package that is not there."""
        return next((name for name in self.needs if importlib.util.find_spec(name) is None), None)

    def make(self, dtype: torch.dtype | None = None) -> tuple[nn.Module, tuple[Any, ...]]:
        """The model with weights that depend on nothing but the name, in evaluation mode, and its inputs."""
        dtype = dtype or self.dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sum(ord(letter) * (at + 1) for at, letter in enumerate(self.name)))
            model, inputs = self.build()
        cast = (x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
        return model.to(dtype).eval(), tuple(cast)


def tokens(segments: int = S, size: int = T, width: int = D) -> Tensor:
    """Random features [B, segments * size, width]."""
    return torch.randn(B, segments * size, width)


def ids(segments: int = S, size: int = T, vocab: int = VOCAB) -> Tensor:
    """Random token numbers [B, segments * size]."""
    return torch.randint(vocab, (B, segments * size))
