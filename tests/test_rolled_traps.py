"""Every way found to be silently wrong in a rolled program: right, or refused by name.

A *trap* is a step that a program which repeats one captured segment could get wrong: Python values that
decide what is computed, state outside the module, writes to what is not state, tensors that share memory.
Each is run plain and transformed, over 9 segments, 4 more, and a stream of 6, on one going state. The
transformed one must leave the same outputs, inputs, module state and *world* (globals, random number
generators). Where it does not run as a wavefront it says so with a warning that names what stood in the way,
and under `strict` it raises an error that does, and leaves everything as it was. What must be named is said
beside each trap.
"""

from __future__ import annotations

import copy
import itertools
import random
import re
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagpass import DiagpassError, SegmentLoop, VerificationError
from diagpass.loop import cut, join
from tests.helpers import (
    assert_state_same,
    assert_tree_same,
    clone_tree,
    collect_warnings,
    fast_copy,
    snapshot,
)
from tests.models import Attention, Mix

B, T, D, L = 2, 2, 4, 2
RTOL = 1e-10


@dataclass(frozen=True)
class Trap:
    """One step, and what a refusal of it must name (a regular expression; a line of this file will do)."""

    build: Callable[[], SegmentLoop]
    names: str
    #: must it run as a wavefront, because nothing about it is wrong
    runs: bool = False
    #: does the step write to what the caller gave it
    writes_input: bool = False
    #: can what lies outside the module be put back after a refused call (an iterator cannot be turned back)
    world_restored: bool = True


TRAPS: dict[str, Trap] = {}


def trap(name: str, names: str = "", **more: Any) -> Callable[[Any], Any]:
    """Register a class of layers, a factory of steps, or a factory of loops under `name`."""

    def register(made: Any) -> Any:
        def build() -> SegmentLoop:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(TRAPS) + sum(map(ord, name)))
                if isinstance(made, type) and issubclass(made, Layer):
                    built: Any = Step([made() for _ in range(L)])
                else:
                    built = made()
                if not isinstance(built, SegmentLoop):
                    built = SegmentLoop(built, T)
                training = [m for m in built.modules() if getattr(m, "keep_training", False)]
                built = built.double().eval()
                for module in training:
                    module.train()
                return built

        TRAPS[name] = Trap(build, names, **more)
        return made

    return register


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*(shape or (B, D)), dtype=torch.float64)


class Step(nn.Module):
    """Embed, layers, head; the layers keep their state."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(D, D), nn.Linear(D, D)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


class Layer(nn.Module):
    """A layer with its state in an attribute; traps override `setup` and `change`, or `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix(D)
        self.state = zeros()
        self.setup()

    def setup(self) -> None:
        """What the trap needs."""

    def change(self, h: Tensor) -> Tensor:
        """What the trap does to the layer's input."""
        return h

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, self.state = self.body(self.change(h), self.state)
        return h


class PureStep(Step):
    """Returns its state, a list of L tensors [B, D]."""

    def __init__(self) -> None:
        super().__init__([Mix(D) for _ in range(L)])

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """[B, T, D] and the state -> the same."""
        state = [x.new_zeros(x.shape[0], D) for _ in self.layers] if state is None else list(state)
        h = self.embed(x)
        for i, layer in enumerate(self.layers):
            h, state[i] = layer(h, state[i])
        return self.head(h), state


# ------------------------------------------------------------------- the world outside the modules

COUNT = 0
TALLY = {"count": 0}
LOG: list[int] = []
HIDDEN: list[Tensor] = []
NUMBERS = itertools.count()
GLOBAL = zeros()
REPLACED = zeros()


def _closure() -> tuple[Callable[[], int], Callable[[], None]]:
    count = 0

    def tick() -> int:
        nonlocal count
        count += 1
        return count

    def clear() -> None:
        nonlocal count
        count = 0

    return tick, clear


TICK, CLEAR = _closure()


def reset_world() -> None:
    """Everything outside the modules as at the start."""
    global COUNT, NUMBERS, REPLACED
    COUNT, NUMBERS, REPLACED = 0, itertools.count(), zeros()
    TALLY["count"] = 0
    LOG.clear()
    HIDDEN.clear()
    GLOBAL.zero_()
    CLEAR()
    ClassCounter.total = 0
    torch.manual_seed(0)
    random.seed(0)


def world() -> dict[str, Any]:
    """Everything outside the modules that a trap changes."""
    return {
        "COUNT": COUNT,
        "TALLY": dict(TALLY),
        "LOG": list(LOG),
        "HIDDEN": [h.clone() for h in HIDDEN],
        "NUMBERS": repr(NUMBERS),
        "GLOBAL": GLOBAL.clone(),
        "REPLACED": REPLACED.clone(),
        "TICK": TICK.__closure__[0].cell_contents,
        "ClassCounter.total": ClassCounter.total,
        "torch's random state": torch.get_rng_state(),
        "Python's random state": repr(random.getstate()),
    }


def odd_state(loop: SegmentLoop) -> dict[str, str]:
    """Attributes that `state_of` does not look into: sets, iterators."""
    kinds = (set, itertools.count, type(iter([])), type(iter(())))
    return {
        f"{prefix}.{name}": repr(copy.copy(value)) if isinstance(value, set) else repr(value.__reduce__())
        for prefix, module in loop.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, kinds)
    }


# ------------------------------------------------------------------------- Python numbers and flags


@trap("int equal", r"\bsegments_done\b")
class IntEqual(Layer):
    def setup(self) -> None:
        self.segments_done = 0

    def change(self, h: Tensor) -> Tensor:
        self.segments_done += 1
        return h.sin() if self.segments_done == 5 else h


@trap("int at least", r"\bsegments_done\b")
class IntAtLeast(IntEqual):
    def change(self, h: Tensor) -> Tensor:
        self.segments_done += 1
        return h.sin() if self.segments_done >= 5 else h


@trap("int modulo", r"\bsegments_done\b")
class IntModulo(IntEqual):
    def change(self, h: Tensor) -> Tensor:
        self.segments_done += 1
        return h.sin() if self.segments_done % 4 == 3 else h


@trap("counter as data", r"\bsegments_done\b")
class CounterAsData(IntEqual):
    def change(self, h: Tensor) -> Tensor:
        self.segments_done += 1
        return h * (1 + 0.01 * self.segments_done)


@trap("counter as an index", r"\bsegments_done\b")
class CounterAsIndex(IntEqual):
    def setup(self) -> None:
        self.segments_done = 0
        self.table = nn.Parameter(torch.randn(40, D))

    def change(self, h: Tensor) -> Tensor:
        self.segments_done += 1
        return h + self.table[self.segments_done]


@trap("counter as a length", r"\bsegments_done\b")
class CounterAsLength(IntEqual):
    def change(self, h: Tensor) -> Tensor:
        self.segments_done += 1
        return h + torch.arange(self.segments_done, dtype=h.dtype).sum()


@trap("float above", r"\belapsed\b")
class FloatAbove(Layer):
    def setup(self) -> None:
        self.elapsed = 0.0

    def change(self, h: Tensor) -> Tensor:
        self.elapsed += 0.5
        return h.sin() if self.elapsed > 2 else h


@trap("float as data", r"\bscale\b")
class FloatAsData(Layer):
    def setup(self) -> None:
        self.scale = 1.0

    def change(self, h: Tensor) -> Tensor:
        self.scale *= 0.9
        return h * self.scale


@trap("counter of the step", r"\bsegments_done\b")
class CountingStep(Step):
    def __init__(self) -> None:
        super().__init__([Layer() for _ in range(L)])
        self.segments_done = 0

    def forward(self, x: Tensor) -> Tensor:
        self.segments_done += 1
        return super().forward(x) if self.segments_done != 5 else -super().forward(x)


@trap("counter in an object", r"\bdone\b|\bprogress\b")
class ObjectCounter(Layer):
    def setup(self) -> None:
        self.progress = types.SimpleNamespace(done=0)

    def change(self, h: Tensor) -> Tensor:
        self.progress.done += 1
        return h.sin() if self.progress.done == 5 else h


@trap("counter in a dict", r"\bprogress\b")
class DictCounter(Layer):
    def setup(self) -> None:
        self.progress = {"done": 0}

    def change(self, h: Tensor) -> Tensor:
        self.progress["done"] += 1
        return h.sin() if self.progress["done"] == 5 else h


@trap("pure counters", runs=True)
class PureCounters(Layer):
    """Nothing reads them: they cost nothing."""

    def setup(self) -> None:
        self.segments_done, self.calls = 0, 7

    def change(self, h: Tensor) -> Tensor:
        self.segments_done += 1
        self.calls += 2
        return h


@trap("pure counter that is a float", r"\belapsed\b")
class FloatCounter(Layer):
    """Dynamo takes a float for a constant of the capture, read or not: refused by name."""

    def setup(self) -> None:
        self.elapsed = 0.0

    def change(self, h: Tensor) -> Tensor:
        self.elapsed += 0.25
        return h


@trap("flag flips", r"\bflag\b")
class FlagFlips(Layer):
    def setup(self) -> None:
        self.flag = False

    def change(self, h: Tensor) -> Tensor:
        self.flag = not self.flag
        return h if self.flag else h.sin()


@trap("flag late", r"\bstage\b")
class FlagLate(Layer):
    """A name that walks through five stages and stays in the last."""

    def setup(self) -> None:
        self.stage = "a"

    def change(self, h: Tensor) -> Tensor:
        self.stage = chr(min(ord(self.stage) + 1, ord("f")))
        return h.sin() if self.stage == "f" else h


@trap("growing string", r"\btrace\b")
class GrowingString(Layer):
    def setup(self) -> None:
        self.trace = ""

    def change(self, h: Tensor) -> Tensor:
        self.trace += "x"
        return h.sin() if len(self.trace) == 5 else h


@trap("growing set", r"\bseen\b")
class GrowingSet(Layer):
    def setup(self) -> None:
        self.seen: set[int] = set()

    def change(self, h: Tensor) -> Tensor:
        self.seen.add(len(self.seen))
        return h.sin() if len(self.seen) == 5 else h


@trap("count of an iterator", r"\bnumbers\b|itertools|count")
class IteratorCount(Layer):
    def setup(self) -> None:
        self.numbers = itertools.count()

    def change(self, h: Tensor) -> Tensor:
        return h.sin() if next(self.numbers) == 5 else h


@trap("list iterator", r"\bnumbers\b|iterator")
class ListIterator(Layer):
    def setup(self) -> None:
        self.numbers = iter([0.01 * number for number in range(40)])

    def change(self, h: Tensor) -> Tensor:
        return h + next(self.numbers)


@trap("number of an item", r"\bcount\b|item")
class Item(Layer):
    def setup(self) -> None:
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def change(self, h: Tensor) -> Tensor:
        self.count += 1
        return h.sin() if self.count.item() == 5 else h


@trap("number of a tensor")
class TensorCount(Layer):
    """All in tensors: right as it is."""

    def setup(self) -> None:
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def change(self, h: Tensor) -> Tensor:
        self.count += 1
        return torch.where(self.count == 5, h.sin(), h)


@trap("branch on data", r"test_rolled_traps|branch|control flow|if ")
class BranchOnData(Layer):
    def change(self, h: Tensor) -> Tensor:
        return h.sin() if h.sum() > 0 else h.cos()


# ------------------------------------------------------------------------------ things that grow


@trap("growing list", r"\bpast\b")
class GrowingList(Layer):
    def setup(self) -> None:
        self.past: list[Tensor] = []

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, sum(self.past, zeros()) / (1 + len(self.past)))
        self.past.append(new)
        return h


@trap("log of tensors", r"\blog\b")
class TensorLog(Layer):
    """Appended, never read."""

    def setup(self) -> None:
        self.log: list[Tensor] = []

    def change(self, h: Tensor) -> Tensor:
        self.log.append(h.mean(1))
        return h


@trap("growing dict", r"\bpast\b|\bsegments_done\b")
class GrowingDict(Layer):
    def setup(self) -> None:
        self.past = {0: zeros()}
        self.segments_done = 0

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, self.past[self.segments_done])
        self.segments_done += 1
        self.past[self.segments_done] = new
        return h


class KvLayer(Layer):
    """Attends to at most `window` earlier tokens; the cache is empty at first."""

    window = 1000

    def __init__(self) -> None:
        super().__init__()
        self.body = Attention(D)
        self.past: Tensor | None = None
        del self.state

    def forward(self, h: Tensor) -> Tensor:
        out = self.body(h, self.past)
        self.past = (h if self.past is None else torch.cat([self.past, h], dim=1))[:, -self.window :]
        return out


@trap("growing cache", r"\bpast\b")
class GrowingKv(KvLayer):
    pass


@trap("window that fills late", r"\bpast\b")
class LateWindow(KvLayer):
    """Periodic, but from the sixth segment on only."""

    window = 5 * T


@trap("window that fills at once", runs=True)
class ShortWindow(KvLayer):
    """Periodic from the second segment on."""

    window = T


def append_hidden(module: nn.Module, args: Any, out: Tensor) -> None:
    """A forward hook that keeps outputs in a list of the file."""
    HIDDEN.append(out)


def append_own(module: nn.Module, args: Any, out: Tensor) -> None:
    """A forward hook that keeps outputs in a list of the module."""
    module.kept.append(out)


@trap("hook that appends", r"\bHIDDEN\b|hook")
def hooked() -> nn.Module:
    step = Step([Layer() for _ in range(L)])
    for layer in step.layers:
        layer.register_forward_hook(append_hidden)
    return step


@trap("hook that appends to the module", r"\bkept\b|hook")
def hooked_own() -> nn.Module:
    step = Step([Layer() for _ in range(L)])
    for layer in step.layers:
        layer.kept = []
        layer.register_forward_hook(append_own)
    return step


# ---------------------------------------------------------------------- state outside the module


@trap("global int", r"\bCOUNT\b")
class GlobalInt(Layer):
    def change(self, h: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return h.sin() if COUNT == 5 * L else h


@trap("global int as data", r"\bCOUNT\b")
class GlobalIntData(Layer):
    def change(self, h: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return h * (1 + 0.01 * COUNT)


@trap("global int, not read", r"\bCOUNT\b")
class GlobalIntPure(Layer):
    def change(self, h: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return h


@trap("global dict", r"\bTALLY\b")
class GlobalDict(Layer):
    def change(self, h: Tensor) -> Tensor:
        TALLY["count"] += 1
        return h.sin() if TALLY["count"] == 5 * L else h


@trap("global list", r"\bLOG\b")
class GlobalList(Layer):
    def change(self, h: Tensor) -> Tensor:
        LOG.append(h.shape[1])
        return h


@trap("global iterator", r"\bNUMBERS\b|itertools|count", world_restored=False)
class GlobalIterator(Layer):
    def change(self, h: Tensor) -> Tensor:
        return h.sin() if next(NUMBERS) == 5 * L else h


@trap("closure", r"\bcount\b|\btick\b|\bTICK\b")
class Closure(Layer):
    def change(self, h: Tensor) -> Tensor:
        return h.sin() if TICK() == 5 * L else h


@trap("class attribute", r"\btotal\b")
class ClassCounter(Layer):
    total = 0

    def change(self, h: Tensor) -> Tensor:
        ClassCounter.total += 1
        return h.sin() if ClassCounter.total == 5 * L else h


@trap("global tensor written in place", r"\bGLOBAL\b")
class GlobalTensor(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, GLOBAL)
        GLOBAL.copy_(new)
        return h


@trap("global tensor replaced", r"\bREPLACED\b")
class GlobalReplaced(Layer):
    def forward(self, h: Tensor) -> Tensor:
        global REPLACED
        h, REPLACED = self.body(h, REPLACED)
        return h


@trap("randn", r"rand|RNG")
class Noise(Layer):
    def change(self, h: Tensor) -> Tensor:
        return h + 0.1 * torch.randn_like(h)


@trap("noise outside the layers", r"rand|RNG|bernoulli")
class NoisyStep(Step):
    def __init__(self) -> None:
        super().__init__([Layer() for _ in range(L)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.rand_like(x))


@trap("dropout", r"rand|RNG|dropout|bernoulli")
class Dropout(Layer):
    keep_training = True

    def change(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.3, self.training)


@trap("Python's random numbers", r"rand")
class PythonRandom(Layer):
    def change(self, h: Tensor) -> Tensor:
        return h * (1 + 0.1 * random.random())


# ---------------------------------------------------------------------- writes and shared memory


@trap("writes to its input", r"\binput|\bx\b|argument|test_rolled_traps", writes_input=True)
class WritesInput(Step):
    def __init__(self) -> None:
        super().__init__([Layer() for _ in range(L)])

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.mul_(0.5)
        return y


@trap("writes to its input first", r"\binput|\bx\b|argument|test_rolled_traps", writes_input=True)
class WritesInputFirst(Step):
    def __init__(self) -> None:
        super().__init__([Layer() for _ in range(L)])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.add_(1.0))


@trap("writes to a parameter", r"\bfast\b|parameter")
class WritesParameter(Layer):
    """A fast weight, trained by hand."""

    def setup(self) -> None:
        self.fast = nn.Parameter(torch.randn(D), requires_grad=False)

    def change(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.fast.mul_(0.9).add_(h.mean((0, 1)))
        return h * self.fast


class BufferLayer(Layer):
    """State in the buffer `buf`, written in place."""

    def setup(self) -> None:
        del self.state
        self.register_buffer("buf", zeros())

    def write(self, new: Tensor) -> None:
        """Keep it."""
        self.buf.copy_(new)

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, self.buf)
        self.write(new)
        return h


@trap("one buffer in two layers", r"\bbuf\b")
def shared_buffer() -> nn.Module:
    step = Step([BufferLayer() for _ in range(L)])
    step.layers[1].buf = step.layers[0].buf
    return step


@trap("overlapping views", r"\bbuf\b|as_strided in .*layers\.1")
def overlapping() -> nn.Module:
    step = Step([BufferLayer() for _ in range(L)])
    whole = zeros(B, D + D // 2)
    step.layers[0].buf, step.layers[1].buf = whole[:, :D], whole[:, D // 2 :]
    return step.double()


@trap("views side by side", r"\bbuf\b")
def side_by_side() -> nn.Module:
    """One storage, no common element: nothing is wrong with these."""
    step = Step([BufferLayer() for _ in range(L)])
    whole = zeros(B, 2 * D)
    step.layers[0].buf, step.layers[1].buf = whole[:, :D], whole[:, D:]
    return step.double()


@trap("overlapping writes", r"\bbuf\b")
class OverlappingWrites(BufferLayer):
    def write(self, new: Tensor) -> None:
        self.buf[:, :3] = new[:, :3]
        self.buf[:, 1:].mul_(0.5).add_(new[:, 1:])


@trap("write through .data", r"\bbuf\b|\.data|test_rolled_traps")
class DataCopy(BufferLayer):
    def write(self, new: Tensor) -> None:
        self.buf.data.copy_(new)


@trap("replacement of .data", r"\bbuf\b|\.data|set_|test_rolled_traps")
class DataReplaced(BufferLayer):
    def write(self, new: Tensor) -> None:
        self.buf.data = new


@trap("set_", r"\bbuf\b|set_|test_rolled_traps")
class SetLayer(BufferLayer):
    def write(self, new: Tensor) -> None:
        self.buf.set_(new.clone())


class TopBuffer(Step):
    """Returns the in-place state of the top layer."""

    def __init__(self) -> None:
        super().__init__([BufferLayer() for _ in range(L)])

    def forward(self, x: Tensor) -> Any:
        """[B, T, D] -> the output and [B, 1, D]."""
        y = super().forward(x)
        return y, self.layers[-1].buf.unsqueeze(1)


@trap("returns its own buffer", r"\bbuf\b|output")
def returns_buffer() -> nn.Module:
    return TopBuffer()


@trap("returns a buffer it has yet to write", r"\bbuf\b|output|written")
class ReturnsOld(TopBuffer):
    """A view taken before the write shows what was written; a copy taken before does not."""

    def forward(self, x: Tensor) -> Any:
        view = self.layers[0].buf.unsqueeze(1)
        copied = view * 2
        return Step.forward(self, x), view, copied


@trap("returns its state", runs=True)
class ReturnsState(Step):
    """A state that is replaced, not written."""

    def __init__(self) -> None:
        super().__init__([Layer() for _ in range(L)])

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.layers[-1].state.unsqueeze(1)


@trap("returns its input", runs=True)
class ReturnsInput(Step):
    def __init__(self) -> None:
        super().__init__([Layer() for _ in range(L)])

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x, x[:, -1:]


@trap("keeps its input")
class KeepsInput(Step):
    """The state is a view of what the caller gave."""

    def __init__(self) -> None:
        super().__init__([Layer() for _ in range(L)])
        self.last = zeros(B, 1, D)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x + self.last)
        self.last = x[:, -1:]
        return y


@trap("shift of two buffers")
class ShiftLayer(BufferLayer):
    def setup(self) -> None:
        super().setup()
        self.register_buffer("before", zeros())

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, self.buf + 0.5 * self.before)
        self.before.copy_(self.buf)
        self.buf.copy_(new)
        return h


# ------------------------------------------------------------------------- tensors that move


@trap("deque", r"\bpast\b|deque")
class DequeLayer(Layer):
    """The newest is appended, the oldest drops out by itself."""

    def setup(self) -> None:
        self.past = deque([zeros(), zeros() + 1, zeros() + 2], maxlen=3)

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, self.past[0] + 0.5 * self.past[2])
        self.past.append(new)
        return h


@trap("deque rotation", r"\bpast\b|deque")
class RotatingLayer(DequeLayer):
    """One of three is read and replaced at each segment."""

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, self.past[0])
        self.past[0] = new
        self.past.rotate(1)
        return h


@trap("pair that moves", r"\bolder\b|\bnewer\b")
class MovingPair(Layer):
    def setup(self) -> None:
        self.older, self.newer = zeros(), zeros() + 1

    def forward(self, h: Tensor) -> Tensor:
        h, new = self.body(h, self.older)
        self.older, self.newer = self.newer, new
        return h


@trap("pair that swaps", r"\bone\b|\bother\b")
class SwappingPair(Layer):
    """Nothing is ever computed for it: the two change places."""

    def setup(self) -> None:
        self.one, self.other = zeros(), zeros() + 1

    def change(self, h: Tensor) -> Tensor:
        self.one, self.other = self.other, self.one
        return h + self.one.mean()


# --------------------------------------------------------------------- layers that read layers


class NeighbourLayer(Layer):
    """Reads the state of another layer, which it holds outside its submodules."""

    def setup(self) -> None:
        self.reads: list[nn.Module] = []

    def change(self, h: Tensor) -> Tensor:
        return h + sum(layer.state.unsqueeze(1) for layer in self.reads)


def neighbours(reader: int, read: int) -> nn.Module:
    """A step in which one layer reads another's state."""
    step = Step([NeighbourLayer() for _ in range(3)])
    step.layers[reader].reads.append(step.layers[read])
    return step


@trap("reads the new state of the layer below", runs=True)
def reads_below() -> nn.Module:
    return neighbours(1, 0)


@trap("reads the old state of the layer above", r"layers\.[12]|layer")
def reads_above() -> nn.Module:
    return neighbours(1, 2)


@trap("the bottom reads the old state of the top", r"layers\.[02]|layer")
def reads_top() -> nn.Module:
    return neighbours(0, 2)


# --------------------------------------------------------------------------- a state that is returned


def carries(step: nn.Module) -> SegmentLoop:
    return SegmentLoop(step, T, carries_state=True)


class CountedState(PureStep):
    """The state is a pair: memories, and the number of the segment."""

    def at(self, y: Tensor, number: int) -> Tensor:
        """What the number does."""
        return y

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        memory, number = (None, 0) if state is None else state
        y, memory = super().forward(x, memory)
        return self.at(y, number), (memory, number + 1)


@trap("counter in the state")
def counted_state() -> SegmentLoop:
    return carries(CountedState())


class BranchingState(CountedState):
    def at(self, y: Tensor, number: int) -> Tensor:
        return -y if number == 5 else y


@trap("counter in the state, compared", r"state|\bnumber\b|\[1\]")
def branching_state() -> SegmentLoop:
    return carries(BranchingState())


class ScalingState(CountedState):
    def at(self, y: Tensor, number: int) -> Tensor:
        return y * (1 + 0.01 * number)


@trap("counter in the state, as data", r"state|\bnumber\b|\[1\]")
def scaling_state() -> SegmentLoop:
    return carries(ScalingState())


class InPlaceState(PureStep):
    """Writes the state [B, D, L] that it was given, as RWKV in transformers does."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = x.new_zeros(x.shape[0], D, L) if state is None else state
        h = self.embed(x)
        for i, layer in enumerate(self.layers):
            h, new = layer(h, state[:, :, i].clone())
            state[:, :, i] = new
        return self.head(h), state


@trap("state written in place", r"state|input|argument")
def in_place_state() -> SegmentLoop:
    return carries(InPlaceState())


class TwiceState(PureStep):
    """One tensor in two places of the state."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, memory = super().forward(x, None if state is None else state["memory"])
        return y, {"memory": memory, "top": memory[-1]}


@trap("one tensor twice in the state")
def twice_state() -> SegmentLoop:
    return carries(TwiceState())


class GrowingState(PureStep):
    """All memories so far."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        past = [] if state is None else state
        y, memory = super().forward(x, past[-1] if past else None)
        return y, [*past, memory]


@trap("growing state", r"state")
def growing_state() -> SegmentLoop:
    return carries(GrowingState())


class KeptAndCarried(PureStep):
    """Returns one part of its state and keeps another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", zeros(1, 1, D))

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = super().forward(x + self.mean, state)
        self.mean.lerp_(y.mean((0, 1), keepdim=True), 0.25)
        return y, state


@trap("a kept state beside the carried one", r"\bmean\b")
def kept_and_carried() -> SegmentLoop:
    return carries(KeptAndCarried())


# ------------------------------------------------------------------------------------ the tests


def run(loop: Any, plain: bool) -> tuple[list[Any], list[Any]]:
    """9 segments, 4, and a stream of 6: outputs with states, and the inputs as they are afterwards."""
    generator = torch.Generator().manual_seed(7)
    carried = (loop if plain else loop.original).carries_state
    results, given, state = [], [], None
    with torch.no_grad():
        for segments in (9, 4, 6):
            x = torch.randn(B, segments * T, D, dtype=torch.float64, generator=generator)
            given.append(x)
            if segments == 6:
                stream = loop.stream(cut(x, T, 1), state)
                y, state = join(list(stream), 1), stream.final_state
            elif carried:
                y, state = loop(x, state)
            else:
                y = loop(x)
            # the state as it is now: a later call may write to it, as it does to the loop's own
            results.append((y, clone_tree(state)))
    return results, given


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    reset_world()
    yield
    reset_world()


def check_named(found: Trap, texts: list[str]) -> None:
    """One of the texts names what the trap says, or a line of this file."""
    named = found.names + r"|test_rolled_traps\.py" if found.names else "."
    assert any(re.search(named, text) for text in texts), f"nothing names {found.names!r}: {texts}"


@pytest.mark.parametrize("name", TRAPS)
def test_right_or_refused_by_name(name: str) -> None:
    """Under `strict`, and where that refuses, without it: the same call then runs as it stands and warns."""
    found = TRAPS[name]
    plain = found.build()
    start = copy.deepcopy(plain)
    before_world = world()
    expected, expected_in = run(plain, True)
    expected_world, expected_odd = world(), odd_state(plain)

    def check(fast: Any) -> None:
        """Do everything, and compare everything."""
        got, got_in = run(fast, False)
        assert_tree_same(got, expected, RTOL, "results")
        assert_tree_same(got_in, expected_in, RTOL if found.writes_input else 0.0, "inputs")
        assert_state_same(fast.original, plain, RTOL)
        assert odd_state(fast.original) == expected_odd
        assert_tree_same(world(), expected_world, RTOL, "world")

    reset_world()
    fast = fast_copy(start, strict=True)
    before = snapshot(fast.original)
    try:
        check(fast)
    except DiagpassError as error:
        assert not found.runs, f"refused: {error}"
        check_named(found, [str(error)])
        assert_state_same(fast.original, before, 0.0, "after the error")
        if found.world_restored:
            assert_tree_same(world(), before_world, 0.0, "world after the error")
    else:
        assert fast.report.ran == "wavefront" and (fast.report.batched_cells > 0 or not found.runs)
        return

    reset_world()
    fast = fast_copy(start)
    with collect_warnings() as texts:
        check(fast)
    if fast.report.ran != "wavefront":
        check_named(found, texts)


def test_a_step_that_changes_after_the_capture_is_seen() -> None:
    """The counter passes its mark in a later call, far from what was captured."""

    class Late(IntEqual):
        def change(self, h: Tensor) -> Tensor:
            self.segments_done += 1
            return h.sin() if self.segments_done >= 25 else h

    torch.manual_seed(0)
    plain = SegmentLoop(Step([Late() for _ in range(L)]).double().eval(), T)
    fast = fast_copy(plain)
    with torch.no_grad(), collect_warnings() as texts:
        for call in range(5):
            x = torch.randn(B, 8 * T, D, dtype=torch.float64)
            assert_tree_same(fast(x), plain(x), RTOL, f"call {call}: ")
            assert_state_same(fast.original, plain, RTOL, f"call {call}: ")
    assert fast.report.ran == "wavefront" or any("segments_done" in text for text in texts), texts


@pytest.mark.parametrize(
    "name", ["int equal", "counter as data", "number of an item", "global int", "growing list"]
)
@pytest.mark.parametrize("verify", [False, True])
def test_whole_loops_too(name: str, verify: bool) -> None:
    """The same steps inside a loop that is the model's own: right, or refused, or found by `verify`."""

    class WholeLoop(nn.Module):
        def __init__(self, step: nn.Module) -> None:
            super().__init__()
            self.step = step

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.step(part) for part in x.split(T, dim=1)], dim=1)

    plain = WholeLoop(TRAPS[name].build().step)
    fast = fast_copy(plain, verify=verify)
    inputs = [torch.randn(B, 7 * T, D, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        expected = [plain(x) for x in inputs]
        reset_world()
        try:
            with collect_warnings():
                got = [fast(x) for x in inputs]
        except VerificationError:
            assert verify
            return
    assert_tree_same(got, expected, RTOL, "outputs")
    assert_state_same(fast.original, plain, RTOL)


def test_a_ragged_tail_may_take_another_way() -> None:
    """The step branches on the length of its segment."""

    class Short(Layer):
        def change(self, h: Tensor) -> Tensor:
            return h.sin() if h.shape[1] < T else h

    torch.manual_seed(0)
    plain = SegmentLoop(Step([Short() for _ in range(L)]).double().eval(), T)
    fast = fast_copy(plain)
    with torch.no_grad():
        for length in (6 * T, 6 * T + 1, 9 * T + 1, 1, 6 * T):
            x = torch.randn(B, length, D, dtype=torch.float64)
            assert_tree_same(fast(x), plain(x), RTOL, f"{length} tokens: ")
            assert_state_same(fast.original, plain, RTOL, f"{length} tokens: ")
    assert fast.report.ran == "wavefront"


def test_more_shapes_than_dynamo_recompiles() -> None:
    """After 8 recompiles Dynamo runs a function eagerly, with a line in its own log: that must not happen."""
    torch.manual_seed(0)
    size = 12
    plain = SegmentLoop(Step([Layer() for _ in range(L)]).double().eval(), size)
    fast = fast_copy(plain)
    captures = []
    with torch.no_grad():
        for tail in range(size):
            x = torch.randn(B, 4 * size + tail, D, dtype=torch.float64)
            assert_tree_same(fast(x), plain(x), RTOL, f"tail {tail}: ")
            assert fast.report.ran == "wavefront" and fast.report.batched_cells > 0, f"tail {tail}"
            captures.append(fast.report.captures)
    growth = [after - before for before, after in itertools.pairwise(captures)]
    assert max(growth) <= 1, captures
    assert_state_same(fast.original, plain, RTOL)


def test_a_generator_that_reuses_one_tensor() -> None:
    """Sequentially it is used up before it is overwritten; a wavefront that holds it must notice or copy."""
    torch.manual_seed(0)
    plain = SegmentLoop(Step([Layer() for _ in range(L)]).double().eval(), T)
    fast = fast_copy(plain)
    data = torch.randn(9, B, T, D, dtype=torch.float64)

    def source() -> Iterator[Tensor]:
        segment = torch.empty(B, T, D, dtype=torch.float64)
        for part in data:
            segment.copy_(part)
            yield segment

    with torch.no_grad():
        for _ in range(2):
            expected = list(plain.stream(source()))
            try:
                got = list(fast.stream(source()))
            except DiagpassError as error:
                assert re.search("overwritten|in place|segment", str(error))
                return
            assert_tree_same(got, expected, RTOL, "outputs")
            assert_state_same(fast.original, plain, RTOL)


def test_the_consumer_may_write_to_what_it_got() -> None:
    """An output is the caller's own: changing it changes nothing else."""
    torch.manual_seed(0)
    plain = SegmentLoop(ReturnsState().double().eval(), T)
    fast = fast_copy(plain)
    x = torch.randn(B, 8 * T, D, dtype=torch.float64)
    results: list[list[Tensor]] = []
    with torch.no_grad():
        for each in (plain, fast):
            kept = []
            for y, state in each.stream(x.split(T, 1)):
                kept += [y.clone(), state.clone()]
                y.zero_()
            results.append(kept)
    assert_tree_same(results[1], results[0], RTOL, "outputs")


def test_globals_that_change_between_calls_are_seen() -> None:
    """Not written by the step, but read: the next call sees the new value."""
    torch.manual_seed(0)

    class Reads(Layer):
        def change(self, h: Tensor) -> Tensor:
            return h * (1 + TALLY["count"]) + GLOBAL.mean()

    plain = SegmentLoop(Step([Reads() for _ in range(L)]).double().eval(), T)
    fast = fast_copy(plain)
    with torch.no_grad():
        for call in range(4):
            TALLY["count"] = call // 2
            GLOBAL.fill_(call)
            x = torch.randn(B, 6 * T, D, dtype=torch.float64)
            assert_tree_same(fast(x), plain(x), RTOL, f"call {call}: ")
            assert_state_same(fast.original, plain, RTOL, f"call {call}: ")


@pytest.mark.parametrize("edit", ["flag", "hook", "method", "size"])
def test_the_step_may_be_edited_between_calls(edit: str) -> None:
    """What the user changes on the step between calls is part of the next call."""
    torch.manual_seed(0)

    class Editable(Layer):
        def setup(self) -> None:
            self.scale, self.twice = 1.0, False

        def change(self, h: Tensor) -> Tensor:
            return h * self.scale * (2.0 if self.twice else 1.0)

    plain = SegmentLoop(Step([Editable() for _ in range(L)]).double().eval(), T)
    fast = fast_copy(plain)
    with torch.no_grad():
        for call in range(4):
            if call == 2:
                for loop in (plain, fast.original):
                    layer = loop.step.layers[1]
                    if edit == "flag":
                        layer.twice = True
                    elif edit == "hook":
                        layer.register_forward_hook(lambda module, args, out: out * 0.5)
                    elif edit == "method":
                        layer.change = lambda h: h.sin()
                    else:
                        loop.step.layers.append(Editable().double())
                        loop.step.layers[-1].load_state_dict(layer.state_dict())
            x = torch.randn(B, 6 * T, D, dtype=torch.float64)
            assert_tree_same(fast(x), plain(x), RTOL, f"call {call}: ")
            assert_state_same(fast.original, plain, RTOL, f"call {call}: ")
