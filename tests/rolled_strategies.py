"""Random steps for `SegmentLoop`, and the calls to make: a specification, how to draw and to build it.

The rolled companion of `tests/strategies.py`, whose layer bodies it uses. `RolledSpec` is plain data, so
a failing example prints as one line that can be pasted back: `build(RolledSpec(...))` gives the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from diagpass import SegmentLoop
from tests.strategies import BODIES, Body, D, M

#: the step keeps its state in ...
KEPT = ("attribute", "buffer", "none", "list", "rebuilt", "dict", "object")
#: the step returns its state as ...
CARRIED = ("carried list", "carried dict", "carried stack")
#: kinds that can remember the segment before last, too
TWO_BACK = ("attribute", "buffer", "carried list")


@dataclass(frozen=True)
class Call:
    """One call: how many whole segments and tokens after them, as a stream or not, from which state."""

    segments: int
    tail: int = 0
    stream: bool = False
    #: pass on the state that the last call returned, where it is returned
    go_on: bool = False


@dataclass(frozen=True)
class RolledSpec:
    """One loop and what to do with it."""

    layers: tuple[str, ...]
    calls: tuple[Call, ...]
    state: str = "list"
    size: int = 3
    batch: int = 1
    #: (target, source) pairs: the layer `target` also reads the output of `source`, same segment
    skips: tuple[tuple[int, int], ...] = ()
    #: (target, source) pairs: the layer `target` also reads the latest state of `source`
    reads: tuple[tuple[int, int], ...] = ()
    #: the first segment after a reset takes another way
    first_branch: bool = False
    #: layers read the state of the segment before last
    two_back: bool = False
    #: segments are counted in Python ints that nothing reads or resets
    counter: bool = False
    #: the layer's index is used as a number
    indexed: bool = False
    #: the step is reset at each call (only where it keeps its state)
    reset: bool = True
    seed: int = 0

    @property
    def carries(self) -> bool:
        """Does the step return its state."""
        return self.state in CARRIED

    @property
    def must_run(self) -> bool:
        """Is there nothing in the way of a wavefront."""
        upward = any(source > target for target, source in self.reads)
        return len(self.layers) > 1 and not upward and not self.two_back

    @property
    def cells(self) -> int:
        """Cells of all calls together."""
        return len(self.layers) * sum(call.segments + (call.tail > 0) for call in self.calls)


class Memories:
    """A plain object that holds the memory of each layer."""

    def __init__(self, values: list[Tensor]) -> None:
        self.values = dict(enumerate(values))


class RolledStep(nn.Module):
    """One segment, with its state kept or returned as `spec` says."""

    def __init__(self, spec: RolledSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed, self.head = nn.Linear(D, D), nn.Linear(D, D)
        self.layers = nn.ModuleList(Body(kind) for kind in spec.layers)
        for layer in self.layers:
            layer.segments_seen = 0
            if spec.state == "buffer":
                layer.register_buffer("memory", torch.zeros(spec.batch, M, D))
                layer.register_buffer("before", torch.zeros(spec.batch, M, D))
        self.reset()

    def zeros(self) -> Tensor:
        """An empty memory [B, M, D]."""
        return torch.zeros(self.spec.batch, M, D, dtype=torch.float64)

    def reset(self) -> None:
        """Empty memories, and a first segment to come."""
        self.first = True
        self.kept: Any = None
        if self.spec.state in ("list", "rebuilt"):
            self.kept = [self.zeros() for _ in self.layers]
        elif self.spec.state == "dict":
            self.kept = {f"layer {i}": self.zeros() for i in range(len(self.layers))}
        for layer in self.layers:
            if self.spec.state == "buffer":
                layer.memory.zero_()
                layer.before.zero_()
            elif self.spec.state in ("attribute", "none"):
                layer.memory = None if self.spec.state == "none" else self.zeros()
                layer.before = self.zeros()

    def open(self, state: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The memories of all layers after the last segment, and after the one before."""
        how, many = self.spec.state, len(self.layers)
        if how in ("attribute", "buffer", "none"):
            now = [self.zeros() if layer.memory is None else layer.memory for layer in self.layers]
            return now, [layer.before for layer in self.layers]
        if how == "object":
            self.kept = Memories([self.zeros() for _ in self.layers]) if self.kept is None else self.kept
            return [self.kept.values[i] for i in range(many)], []
        if how in ("list", "rebuilt"):
            return list(self.kept), []
        if how == "dict":
            return [self.kept[f"layer {i}"] for i in range(many)], []
        if state is None:
            return [self.zeros() for _ in self.layers], [self.zeros() for _ in self.layers]
        if how == "carried stack":
            return list(state.unbind(0)), []
        if how == "carried dict":
            return [value for value, _ in state["memories"]], []
        return list(state[0]), list(state[1])

    def write(self, i: int, new: Tensor) -> None:
        """Keep the memory of layer i, where the step keeps it."""
        how, layer = self.spec.state, self.layers[i]
        if how == "buffer":
            if self.spec.two_back:
                layer.before.copy_(layer.memory)
            layer.memory[:, :1] = new[:, :1]
            layer.memory[:, 1:].copy_(new[:, 1:])
        elif how in ("attribute", "none"):
            if self.spec.two_back:
                layer.before = layer.memory
            layer.memory = new
        elif how == "list":
            self.kept[i] = new
        elif how == "dict":
            self.kept[f"layer {i}"] = new
        elif how == "object":
            self.kept.values[i] = new

    def close(self, now: list[Tensor], old: list[Tensor]) -> Any:
        """The state to return; `old` are the memories that the segment began with."""
        if self.spec.state == "rebuilt":
            self.kept = now
        if self.spec.state == "carried stack":
            return torch.stack(now)
        if self.spec.state == "carried dict":
            return {"memories": [(memory, memory.sum()) for memory in now]}
        return now, old

    def layer(self, i: int, h: Tensor, memory: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """Run layer i."""
        layer = self.layers[i]
        if self.spec.counter:
            layer.segments_seen += 1
        if self.spec.indexed:
            h = h * (1.0 + 0.1 * i)
        if first and self.spec.first_branch:
            return h + layer.inp(h), memory + h.mean(1, keepdim=True)
        return layer(h, memory)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        """[B, T, D] -> [B, T, D], with the state where it is returned."""
        spec = self.spec
        first = state is None if spec.carries else self.first
        self.first = False
        now, before = self.open(state)
        old, outs = list(now), []
        h = self.embed(x)
        for i in range(len(self.layers)):
            for target, source in spec.skips:
                if target == i:
                    h = h + 0.5 * outs[source]
            for target, source in spec.reads:
                if target == i:
                    h = h + 0.1 * now[source].mean(1, keepdim=True)
            h, new = self.layer(i, h, before[i] if spec.two_back else now[i], first)
            outs.append(h)
            self.write(i, new)
            now[i] = new
        returned = self.close(now, old)
        return (self.head(h), returned) if spec.carries else self.head(h)


def build(spec: RolledSpec) -> SegmentLoop:
    """Make the loop, in float64 and evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        step = RolledStep(spec).double().eval()
    reset = "reset" if spec.reset and not spec.carries else None
    return SegmentLoop(step, spec.size, carries_state=spec.carries, reset=reset)


def inputs(spec: RolledSpec, call: int) -> Tensor:
    """What to call it with, [B, N, D]."""
    generator = torch.Generator().manual_seed(1000 * spec.seed + call)
    length = spec.calls[call].segments * spec.size + spec.calls[call].tail
    return torch.randn(spec.batch, length, D, dtype=torch.float64, generator=generator)


@st.composite
def rolled_specs(
    draw: Callable[..., Any],
    max_layers: int = 4,
    max_segments: int = 40,
    states: tuple[str, ...] = KEPT + CARRIED,
) -> RolledSpec:
    """Draw a `RolledSpec`."""
    state = draw(st.sampled_from(states), label="state")
    size = draw(st.integers(1, 4), label="segment length")
    num_layers = draw(st.integers(1, max_layers), label="layers")
    types = draw(st.lists(st.sampled_from(BODIES), min_size=1, max_size=2, unique=True))
    layers = tuple(draw(st.sampled_from(types)) for _ in range(num_layers))
    tails = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=2, unique=True), label="tails")
    calls = []
    for _ in range(draw(st.integers(1, 4), label="calls")):
        tail = draw(st.sampled_from(tails))
        segments = draw(st.integers(0 if tail else 1, max_segments - (tail > 0)), label="segments")
        calls.append(Call(segments, tail, stream=draw(st.booleans()), go_on=draw(st.booleans())))
    below = [(t, s) for t in range(num_layers) for s in range(t)]
    others = [(t, s) for t in range(num_layers) for s in range(num_layers) if s != t]
    skips = draw(st.lists(st.sampled_from(below), max_size=2, unique=True)) if below else []
    reads = draw(st.lists(st.sampled_from(others), max_size=1)) if others else []
    return RolledSpec(
        layers=layers,
        calls=tuple(calls),
        state=state,
        size=size,
        batch=draw(st.integers(1, 3)),
        skips=tuple(sorted(skips)),
        reads=tuple(reads) if draw(st.integers(0, 2)) == 0 else (),
        first_branch=draw(st.booleans()),
        two_back=state in TWO_BACK and draw(st.integers(0, 3)) == 0,
        counter=draw(st.booleans()),
        indexed=draw(st.booleans()),
        reset=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )
