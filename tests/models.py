"""A zoo of small segment-recurrent models in plain PyTorch, each with its own way to keep state.

None of them knows about diagpass: this file does not import it. Every entry of `ZOO` builds
`(model, inputs)` in float64 and evaluation mode, with fresh weights that depend on nothing but the
entry. `EXPECT` holds what can be said about an entry by hand: cells, waves, whether a chain exists.

Shape letters: B batch, T tokens in a segment, D width, M memory slots, L layers, S segments.

How waves are derived. Write t(s, l) for the earliest wave of the cell of layer l at segment s, the
length of the longest path into it. The common case needs (s, l-1) for its input and (s-1, l) for
its state, so t(s, l) = s + l and there are S + L - 1 waves. Entries that differ say so beside
their registration. The usual size is L=3, S=4: 12 cells, 6 waves.
"""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, D, M = 2, 3, 6, 2
L, S = 3, 4

Built = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class Expect:
    """What is known by hand about a zoo entry; None where nothing is claimed."""

    cells: int | None = None
    #: a tuple holds every defensible answer, the true longest path first
    waves: int | tuple[int, ...] | None = None
    #: does a dependency lead from a layer to a lower one at a later segment and so narrow the waves
    chain: bool = False
    verdict: str = "wavefront"
    #: upper bound on the number of kinds
    kinds: int | None = None
    #: what must run when the wavefront is forced; None where refusing is as good as running it
    ran: str | None = "wavefront"
    #: must some cells really run in groups of two or more (False: cannot, None: no claim)
    batched: bool | None = True
    #: does the plain model hand out its own state, which a later call overwrites
    returns_state: bool = False


ZOO: dict[str, Callable[[], Built]] = {}
EXPECT: dict[str, Expect] = {}


def zoo(name: str, **expect: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], Built]]:
    """Register a factory that returns a model, or a model and its inputs, under `name`."""

    def register(factory: Callable[[], Any]) -> Callable[[], Built]:
        def build() -> Built:
            seed = sum(ord(letter) * (place + 1) for place, letter in enumerate(name))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                built = factory()
                model, inputs = built if isinstance(built, tuple) else (built, (tokens(),))
                training = [m for m in model.modules() if getattr(m, "keep_training", False)]
                model = model.double().eval()
                for module in training:
                    module.train()
            return model, inputs

        build.__doc__ = factory.__doc__
        build.__name__ = name
        ZOO[name] = build
        EXPECT[name] = Expect(**expect)
        return build

    return register


def tokens(segments: int = S, width: int = D, batch: int = B, tail: int = 0) -> Tensor:
    """Random float64 input [batch, segments * T + tail, width]."""
    return torch.randn(batch, segments * T + tail, width, dtype=torch.float64)


COMMON = {"cells": L * S, "waves": S + L - 1}


# ------------------------------------------------------------------------------- layer bodies


class Mix(nn.Module):
    """The plain recurrent body: `(h_BTD, m_BD) -> (h_BTD, m_BD)`, smooth and contracting."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, width)
        self.inp = nn.Linear(width, width)
        self.write = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Read the memory into every token, then update it from the mean token."""
        y = h + torch.tanh(self.inp(self.norm(h)) + self.read(m).unsqueeze(1))
        return y, torch.tanh(0.5 * m + self.write(y.mean(1)))


class Attention(nn.Module):
    """Self-attention of a segment over itself and a memory of earlier tokens, by SDPA."""

    def __init__(self, width: int = D, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.o = nn.Linear(width, width)

    def forward(self, h: Tensor, past: Tensor | None = None) -> Tensor:
        """h [B, T, D], past [B, M, D] -> [B, T, D], residual included."""
        x = self.norm(h)
        context = x if past is None else torch.cat([past, x], dim=1)
        q, (k, v) = self.q(x), self.kv(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return h + self.o(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """A stateless gated feed-forward block, residual not included."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 8), nn.Linear(width, 8)
        self.down = nn.Linear(8, width)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = self.norm(h)
        return self.down(F.silu(self.gate(x)) * self.up(x))


# ------------------------------------------------------------------------------- whole loops


class Loop(nn.Module):
    """The common loop: layers keep their own state, `forward` cuts the input and walks them.

    `reset` is called at the start of each forward; the base class resets nothing, so state
    carries over from call to call.
    """

    def __init__(self, layers: list[nn.Module], width: int = D) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, width)

    def reset(self) -> None:
        """Forget nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        self.reset()
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            for layer in self.layers:
                h = layer(h)
            outs.append(self.head(h))
        return torch.cat(outs, dim=1)


class StateLoop(nn.Module):
    """The other common loop: bodies are pure, the loop owns the state. Subclasses say how."""

    def __init__(self, layers: int = L, width: int = D, body: Callable[[], nn.Module] = Mix) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList([body() for _ in range(layers)])
        self.head = nn.Linear(width, width)

    def zeros(self, x: Tensor, *lead: int) -> Tensor:
        """Zero state [*lead, B, D] like the input."""
        return x.new_zeros(*lead, x.shape[0], self.width)


# -- state as an attribute that forward reassigns


class AttributeLayer(nn.Module):
    """Keeps `self.state`, a plain tensor attribute, reassigned by each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, self.state = self.body(h, self.state)
        return h


@zoo("attribute", **COMMON, kinds=1)
def attribute() -> nn.Module:
    """State in a reassigned attribute, carried from call to call."""
    return Loop([AttributeLayer() for _ in range(L)])


class NoneLayer(nn.Module):
    """`self.state` is None until the first segment has run: another code path there."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.start = nn.Parameter(torch.randn(D))
        self.state: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        state = self.start.tanh().expand(h.shape[0], -1) if self.state is None else self.state
        h, self.state = self.body(h, state)
        return h


class ResetLoop(Loop):
    """Sets every layer's state to None at the start of a call."""

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.state = None


@zoo("attribute_none", **COMMON, kinds=3)
def attribute_none() -> nn.Module:
    """State is None at first and reset by each call; the first segment runs other code."""
    return ResetLoop([NoneLayer() for _ in range(L)])


class FlagLayer(nn.Module):
    """A Python flag chooses what the first segment does, as in the published ARMT."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.plain = nn.Linear(D, D)
        self.register_buffer("memory", torch.zeros(B, D), persistent=False)
        self.first_seg = True
        self.segments_seen = 0

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.first_seg:
            y = h + self.plain(h)
            self.memory = y.mean(1)
            self.first_seg = False
        else:
            y, self.memory = self.body(h, self.memory)
        self.segments_seen += 1
        return y


class FlagLoop(Loop):
    """Sets the layers' flags and zeroes their memory at the start of a call."""

    def reset(self) -> None:
        """Forget everything but the count of segments."""
        for layer in self.layers:
            layer.first_seg = True
            layer.memory = torch.zeros_like(layer.memory)


@zoo("first_segment_flag", **COMMON, kinds=3)
def first_segment_flag() -> nn.Module:
    """A `first_seg` flag, a memory buffer that is reassigned, and a counter never reset."""
    return FlagLoop([FlagLayer() for _ in range(L)])


class FirstBranchLoop(StateLoop):
    """`if s == 0` in the layer, told by an argument."""

    class Body(nn.Module):
        """Skips the read in the first segment."""

        def __init__(self) -> None:
            super().__init__()
            self.mix = Mix()

        def forward(self, h: Tensor, m: Tensor, s: int) -> tuple[Tensor, Tensor]:
            """[B, T, D], [B, D], segment number -> [B, T, D], [B, D]."""
            if s == 0:
                return h.sin(), h.mean(1)
            return self.mix(h, m)

    def __init__(self) -> None:
        super().__init__(body=FirstBranchLoop.Body)

    def forward(self, x: Tensor) -> dict[str, Any]:
        """[B, S * T, D] -> a dict with the joined output and the list of segment outputs."""
        state = [self.zeros(x) for _ in self.layers]
        outs = []
        for s, segment in enumerate(x.split(T, dim=1)):
            h = self.embed(segment)
            for i, layer in enumerate(self.layers):
                h, state[i] = layer(h, state[i], s)
            outs.append(self.head(h))
        return {"out": torch.cat(outs, 1), "segments": outs, "count": len(outs)}


@zoo("first_branch", **COMMON, kinds=3)
def first_branch() -> nn.Module:
    """A first-segment branch on a Python argument; the output is a dict with an int inside."""
    return FirstBranchLoop()


# -- buffers in place


class BufferLayer(nn.Module):
    """Keeps a registered buffer [B, D] that is written in place, in the way `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = Mix()
        self.register_buffer("buf", torch.randn(B, D))

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, new = self.body(h, self.buf)
        if self.how == "copy_":
            self.buf.copy_(new)
        elif self.how == "setitem":
            self.buf[:] = new
        elif self.how == "columns":  # two half-writes, the second reads what the first left
            self.buf[:, : D // 2] = new[:, : D // 2]
            self.buf[:, D // 2 :] = new[:, D // 2 :] + 0.1 * self.buf[:, : D - D // 2]
        elif self.how == "add_":
            self.buf.add_(new, alpha=0.1)
        elif self.how == "mul_":
            self.buf.mul_(0.5).add_(new)
        elif self.how == "iadd":
            self.buf += 0.1 * new
        elif self.how == "data":
            self.buf.data = new
        elif self.how == "lerp_":
            self.buf.lerp_(new, 0.25)
        elif self.how == "index_copy_":
            self.buf.index_copy_(0, torch.arange(B), new)
        elif self.how == "masked_fill_":
            self.buf.copy_(new).masked_fill_(self.buf > 0.3, 0.25)
        elif self.how == "out=":
            torch.mul(new, 0.5, out=self.buf)
        else:
            raise ValueError(self.how)
        return h


def _buffer(how: str) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        return Loop([BufferLayer(how) for _ in range(L)])

    factory.__doc__ = f"State in a buffer, written in place by `{how}`."
    return factory


for _how in (
    "copy_",
    "setitem",
    "columns",
    "add_",
    "mul_",
    "iadd",
    "lerp_",
    "index_copy_",
    "masked_fill_",
):
    zoo(f"buffer_{_how}", **COMMON, kinds=1)(_buffer(_how))


class RingLayer(nn.Module):
    """A ring buffer [B, M, D]: `buf[:, s % M] = new`, all of it read by each segment."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.register_buffer("buf", torch.zeros(B, M, D))

    def forward(self, h: Tensor, s: int) -> Tensor:
        """[B, T, D], segment number -> [B, T, D]."""
        h, new = self.body(h, self.buf.mean(1))
        self.buf[:, s % M] = new
        return h


class RingLoop(Loop):
    """Passes the segment number to the layers."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        outs = []
        for s, segment in enumerate(x.split(T, dim=1)):
            h = self.embed(segment)
            for layer in self.layers:
                h = layer(h, s)
            outs.append(self.head(h))
        return torch.cat(outs, dim=1)


@zoo("buffer_ring", **COMMON)
def buffer_ring() -> nn.Module:
    """State written to one slot of a ring buffer, slot = segment number modulo M."""
    return RingLoop([RingLayer() for _ in range(L)])


class ViewLayer(nn.Module):
    """A buffer [2, B, D] and a saved view of its row 0: written through one, read through both."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.buf = torch.zeros(2, B, D, dtype=torch.float64)
        self.row = self.buf[0]

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, new = self.body(h, self.buf.sum(0))
        self.buf[1].copy_(0.5 * self.row)
        self.row.copy_(new)
        return h


@zoo("alias_view", **COMMON)
def alias_view() -> nn.Module:
    """A saved view aliases the state; what is written through it is read through the base."""
    return Loop([ViewLayer() for _ in range(L)])


class SharedBufferLayer(nn.Module):
    """Writes a buffer in place; the same buffer object may be registered in two layers."""

    def __init__(self, buf: Tensor) -> None:
        super().__init__()
        self.body = Mix()
        self.register_buffer("buf", buf)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, new = self.body(h, self.buf)
        self.buf.copy_(new)
        return h


# Layers 0 and 1 read and write one buffer, so (s, 1) follows (s, 0) and (s+1, 0) follows (s, 1):
# t(s, 0) = 2s, t(s, 1) = 2s + 1, t(s, 2) = 2s + 2. Last wave is 2(S-1) + 2: 2S + 1 waves.
@zoo("shared_buffer", cells=L * S, waves=2 * S + 1, chain=True, batched=None)
def shared_buffer() -> nn.Module:
    """One buffer object in two layers: a chain between them, and still some width."""
    buf = torch.zeros(B, D, dtype=torch.float64)
    return Loop([SharedBufferLayer(buf), SharedBufferLayer(buf), SharedBufferLayer(buf.clone())])


class ReturnsBuffer(Loop):
    """Returns its own in-place buffer next to the output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S * T, D] -> [B, S * T, D] and the last layer's buffer itself."""
        return super().forward(x), self.layers[-1].buf


@zoo("returns_buffer", **COMMON, returns_state=True)
def returns_buffer() -> nn.Module:
    """The model's output contains its own state buffer."""
    return ReturnsBuffer([BufferLayer("copy_") for _ in range(L)])


class IntBufferLayer(nn.Module):
    """An integer step buffer counts in place and picks a position vector."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.positions = nn.Embedding(16, D)
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.register_buffer("m", torch.zeros(B, D))

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, new = self.body(h + self.positions(self.step % 16), self.m)
        self.m.copy_(new)
        self.step += 1
        return h


@zoo("int_buffer", **COMMON, kinds=1)
def int_buffer() -> nn.Module:
    """A 0-d integer buffer, incremented in place, is part of the state."""
    return Loop([IntBufferLayer() for _ in range(L)])


# -- the loop owns the state


class ListLoop(StateLoop):
    """A Python list of states, local to the call."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        state = [self.zeros(x) for _ in self.layers]
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            for i, layer in enumerate(self.layers):
                h, state[i] = layer(h, state[i])
            outs.append(self.head(h))
        return torch.cat(outs, dim=1)


@zoo("list_states", **COMMON, kinds=2)
def list_states() -> nn.Module:
    """State in a local Python list."""
    return ListLoop()


class QueueLoop(StateLoop):
    """State in a dict of queues that lives on the module and survives the call."""

    def __init__(self, kind: type = list) -> None:
        super().__init__()
        zeros = [[torch.zeros(B, D, dtype=torch.float64) for _ in range(2)] for _ in range(L)]
        self.store = {f"layer{i}": deque(z, maxlen=2) if kind is deque else z for i, z in enumerate(zeros)}

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            for i, layer in enumerate(self.layers):
                queue = self.store[f"layer{i}"]
                h, new = layer(h, 0.5 * queue[0] + queue[1])
                queue.append(new)
                if isinstance(queue, list):
                    queue.pop(0)
            outs.append(self.head(h))
        return torch.cat(outs, dim=1)


@zoo("dict_queue", **COMMON, kinds=1)
def dict_queue() -> nn.Module:
    """State in a dict of lists on the module, appended to and popped from the front."""
    return QueueLoop()


# Dynamo (2.13) appends to a full bounded deque without dropping the oldest entry and computes
# something else, without a word. Right or refused: an answer of Dynamo's is neither.
@zoo("deque_maxlen", ran=None, batched=None)
def deque_maxlen() -> nn.Module:
    """State in deques with a maxlen."""
    return QueueLoop(deque)


class StackedLoop(StateLoop):
    """One state tensor for all layers, in the way `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        if how == "buffer_dim1":
            self.register_buffer("state", torch.zeros(B, L, D))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        kept = self.how == "buffer_dim1"
        state = self.state if kept else self.zeros(x, L)
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            new_states = []
            for i, layer in enumerate(self.layers):
                h, new = layer(h, state[:, i] if kept else state[i])
                if self.how == "inplace":
                    state[i] = new
                elif kept:
                    state[:, i] = new
                elif self.how == "scatter":
                    state = torch.select_scatter(state, new, 0, i)
                else:
                    new_states.append(new)
            if self.how == "stack":
                state = torch.stack(new_states)
            elif self.how == "cat":
                state = torch.cat([new.unsqueeze(0) for new in new_states])
            outs.append(self.head(h))
        return torch.cat(outs, dim=1)


def _stacked(how: str) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        return StackedLoop(how)

    factory.__doc__ = f"State of all layers in one tensor, written by `{how}`."
    return factory


# One tensor, yet each cell touches its own row only: the same S + L - 1 waves. The last segment may
# be a kind of its own where nobody can see the state that it leaves.
for _how in ("inplace", "buffer_dim1", "scatter", "stack", "cat"):
    zoo(f"stacked_{_how}", **COMMON, kinds=2)(_stacked(_how))


class TupleLoop(StateLoop):
    """State goes in and out of forward as a tuple, as in RWKV or nn.GRU."""

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None = None) -> Any:
        """[B, S * T, D], state -> output, new state (a named tuple)."""
        states = [self.zeros(x) for _ in self.layers] if state is None else list(state)
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            for i, layer in enumerate(self.layers):
                h, states[i] = layer(h, states[i])
            outs.append(self.head(h))
        return Result(torch.cat(outs, dim=1), tuple(states))


Result = namedtuple("Result", ["out", "state"])


@zoo("returned_tuple", **COMMON, kinds=2)
def returned_tuple() -> Built:
    """State passed in and returned; the output is a named tuple."""
    state = tuple(torch.randn(B, D, dtype=torch.float64) for _ in range(L))
    return TupleLoop(), (tokens(), state)


@zoo("returned_tuple_none", **COMMON, kinds=2)
def returned_tuple_none() -> nn.Module:
    """The same model without a state passed in."""
    return TupleLoop()


class FifoLayer(nn.Module):
    """Attention over a first-in first-out memory of the layer's own earlier inputs."""

    def __init__(self, slots: int = 4) -> None:
        super().__init__()
        self.slots = slots
        self.attn = Attention()
        self.memory = torch.zeros(B, slots, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y = self.attn(h, self.memory)
        self.memory = torch.cat([self.memory, y], dim=1)[:, -self.slots :].detach()
        return y


@zoo("fifo_memory", **COMMON, kinds=1)
def fifo_memory() -> nn.Module:
    """Compressed memory by cat and slice: the tail reaches back further than one segment."""
    return Loop([FifoLayer() for _ in range(L)])


class RollLayer(nn.Module):
    """A memory [B, M, D] rolled by one, its last row overwritten in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.memory = torch.zeros(B, M + 1, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, new = self.body(h, self.memory.mean(1))
        rolled = torch.roll(self.memory, -1, dims=1)
        rolled[:, -1] = new
        self.memory = rolled
        return h


@zoo("roll_memory", **COMMON, kinds=1)
def roll_memory() -> nn.Module:
    """State shifted by torch.roll, the freed row written in place."""
    return Loop([RollLayer() for _ in range(L)])


class WindowCache:
    """A plain Python object with `update(layer, new)`, in the manner of transformers' Cache."""

    def __init__(self, layers: int, slots: int) -> None:
        self.slots = slots
        self.seen = 0
        self.kept = [torch.zeros(B, slots, D, dtype=torch.float64) for _ in range(layers)]

    def update(self, layer: int, new: Tensor) -> Tensor:
        """Append new [B, T, D] to the layer's window and return what was there with it."""
        whole = torch.cat([self.kept[layer], new], dim=1)
        self.kept[layer] = whole[:, -self.slots :]
        if layer == 0:
            self.seen += new.shape[1]
        return whole


class CacheAttention(nn.Module):
    """Attention over the window that a cache object keeps for this layer."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.q, self.kv, self.o = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, h: Tensor, cache: WindowCache) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        k, v = self.kv(cache.update(self.index, h)).chunk(2, dim=-1)
        weights = torch.softmax(self.q(h) @ k.mT / D**0.5, dim=-1)
        return h + self.o(weights @ v)


class CacheLoop(nn.Module):
    """Passes a cache object down; it lives on the model and survives the call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CacheAttention(i) for i in range(L)])
        self.cache = WindowCache(L, slots=4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        outs = []
        for h in x.split(T, dim=1):
            for layer in self.layers:
                h = layer(h, self.cache)
            outs.append(h)
        return torch.cat(outs, dim=1)


# The cache holds inputs of layer l, which are outputs of layer l-1: t(s, l) = l, L waves. They pass
# through a cat inside cell (s-1, l), so who takes that for work of the cell finds S + L - 1.
@zoo("cache_object", cells=L * S, waves=(L, S + L - 1), kinds=3)
def cache_object() -> nn.Module:
    """State in a plain object with update(layer_idx, x), on the model; it counts tokens, too."""
    return CacheLoop()


class GrowingLoop(StateLoop):
    """A KV cache that grows by a segment each time: each segment has other shapes."""

    def __init__(self) -> None:
        super().__init__(body=Attention)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        past: list[list[Tensor]] = [[] for _ in self.layers]
        outs = []
        for h in x.split(T, dim=1):
            for layer, seen in zip(self.layers, past, strict=True):
                new = layer(h, torch.cat(seen, 1) if seen else None)
                seen.append(h)
                h = new
            outs.append(h)
        return torch.cat(outs, dim=1)


# (s, l) reads the *inputs* of layer l at every earlier segment, which are outputs of layer l-1:
# nothing in it comes from layer l itself. So t(s, l) = t(s, l-1) + 1 = l: L waves of S cells, in S
# kinds that share no shape, and nothing to batch.
@zoo("growing_cache", cells=L * S, waves=L, batched=False)
def growing_cache() -> nn.Module:
    """A growing KV cache: as many kinds as segments."""
    return GrowingLoop()


# -- unusual edges


class SkipLoop(StateLoop):
    """Layer l also reads the output of layer l-2 of the same segment."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        state = [self.zeros(x) for _ in self.layers]
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            seen: list[Tensor] = []
            for i, layer in enumerate(self.layers):
                inp = h + 0.5 * seen[i - 2] if i >= 2 else h
                h, state[i] = layer(inp, state[i])
                seen.append(h)
            outs.append(self.head(h) + seen[0])
        return torch.cat(outs, dim=1)


# A skip never leads further than the path through the layer between: t(s, l) = s + l still.
@zoo("skips", cells=4 * S, waves=S + 3)
def skips() -> nn.Module:
    """Skip connections two layers up, and from the first layer to the head."""
    return SkipLoop(layers=4)


class TwoBackLoop(StateLoop):
    """State reaches two segments back; the one between is not read."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        now = [self.zeros(x) for _ in self.layers]
        before = [self.zeros(x) for _ in self.layers]
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            for i, layer in enumerate(self.layers):
                h, new = layer(h, before[i])
                before[i], now[i] = now[i], new
            outs.append(self.head(h))
        return torch.cat(outs, dim=1)


# (s, l) needs (s, l-1) and (s-2, l): t(s, l) = l + floor(s / 2), so L + floor((S-1) / 2) waves.
@zoo("two_back", cells=L * S, waves=L + (S - 1) // 2, kinds=2)
def two_back() -> nn.Module:
    """State of the last segment but one."""
    return TwoBackLoop()


class NeighbourLayer(nn.Module):
    """Reads its own state and one of its neighbour's, through a plain reference to the module."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)
        self.peer: list[nn.Module] = []  # in a list, so that it is no submodule

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        seen = self.state + sum(0.5 * peer.state for peer in self.peer)
        h, self.state = self.body(h, seen)
        return h


def _neighbours(offset: int) -> nn.Module:
    layers = [NeighbourLayer() for _ in range(L)]
    for i, layer in enumerate(layers):
        if 0 <= i + offset < L:
            layer.peer = [layers[i + offset]]
    return Loop(list(layers))


# (s, l) reads what (s, l-1) has just left: on the way of the input anyway.
@zoo("reads_lower_state", **COMMON)
def reads_lower_state() -> nn.Module:
    """A layer reads the state that the layer below has just written."""
    return _neighbours(-1)


# (s, l) reads what (s-1, l+1) left: t(s, l) >= t(s-1, l+1) + 1. So t(s, l) = 2s + l, and there are
# 2(S-1) + L waves: 9 for 12 cells, mean width 1.33.
@zoo("reads_upper_state", cells=L * S, waves=2 * (S - 1) + L, chain=True, batched=None)
def reads_upper_state() -> nn.Module:
    """A layer reads the state that the layer above left in the segment before: a chain."""
    return _neighbours(+1)


class ListInputs(StateLoop):
    """Each layer's memory is its own input of the segment before (Transformer-XL's pattern)."""

    def __init__(self) -> None:
        super().__init__(body=Attention)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        past = [x.new_zeros(x.shape[0], T, D) for _ in self.layers]
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            for i, layer in enumerate(self.layers):
                h, past[i] = layer(h, past[i].detach()), h
            outs.append(self.head(h))
        return torch.cat(outs, dim=1)


# (s, l) needs (s, l-1) and (s-1, l-1), nothing of its own layer: t(s, l) = l, so L waves, S wide.
@zoo("cached_inputs", cells=L * S, waves=L, kinds=2)
def cached_inputs() -> nn.Module:
    """Cached layer inputs: all segments of a layer are independent, shorter than S + L - 1."""
    return ListInputs()


class StatelessLoop(StateLoop):
    """No state at all: segments are independent."""

    def __init__(self) -> None:
        super().__init__(body=FeedForward)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            for layer in self.layers:
                h = h + layer(h)
            outs.append(self.head(h))
        return torch.cat(outs, dim=1)


@zoo("stateless", cells=L * S, waves=L, kinds=1)
def stateless() -> nn.Module:
    """Layers without state: t(s, l) = l, one layer at S segments in a wave."""
    return StatelessLoop()


class GlobalLayer(nn.Module):
    """A layer that reads a memory common to all layers besides its own state."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.glob = nn.Linear(D, D)

    def forward(self, h: Tensor, m: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D], own [B, D], common [B, D] -> [B, T, D], [B, D]."""
        return self.body(h + self.glob(g).unsqueeze(1), m)


class GlobalLoop(StateLoop):
    """A memory read by all layers and written by the last but one."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers, body=GlobalLayer)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        state = [self.zeros(x) for _ in self.layers]
        memory = self.zeros(x)
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            read = memory
            for i, layer in enumerate(self.layers):
                h, state[i] = layer(h, state[i], read)
                if i == len(self.layers) - 2:
                    memory = h.mean(1)
            outs.append(self.head(h))
        return torch.cat(outs, dim=1)


# (s, 0) needs (s-1, L-2): t(s, 0) = t(s-1, 0) + L - 1 = s(L-1), t(s, l) = s(L-1) + l. The last cell
# is (S-1, L-1), so (S-1)(L-1) + L waves. L=3, S=5: 11 waves for 15 cells, mean width 1.36.
@zoo("global_memory", cells=15, waves=11, chain=True, batched=None)
def global_memory() -> Built:
    """A chain that keeps some width: common memory, written by the last layer but one."""
    return GlobalLoop(3), (tokens(5),)


class RmtLoop(StateLoop):
    """Recurrent memory transformer: memory tokens leave at the top and enter at the bottom."""

    def __init__(self) -> None:
        super().__init__(body=Attention)
        self.memory = nn.Parameter(torch.randn(M, D))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        memory = self.memory.expand(x.shape[0], -1, -1)
        outs = []
        for segment in x.split(T, dim=1):
            h = torch.cat([self.embed(segment), memory], dim=1)
            for layer in self.layers:
                h = layer(h)
            memory = h[:, -M:]
            outs.append(self.head(h[:, :-M]))
        return torch.cat(outs, dim=1)


# (s, 0) needs (s-1, L-1): no two cells are independent.
@zoo("rmt_like", cells=L * S, waves=L * S, chain=True, verdict="sequential", batched=False)
def rmt_like() -> nn.Module:
    """The chain that leaves nothing to gain."""
    return RmtLoop()


class ReversedLoop(ListLoop):
    """Walks the segments from the last to the first."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        state = [self.zeros(x) for _ in self.layers]
        outs = {}
        for s in reversed(range(x.shape[1] // T)):
            h = self.embed(x[:, s * T : (s + 1) * T])
            for i, layer in enumerate(self.layers):
                h, state[i] = layer(h, state[i])
            outs[s] = self.head(h)
        return torch.cat([outs[s] for s in sorted(outs)], dim=1)


@zoo("reversed_segments", **COMMON, kinds=2)
def reversed_segments() -> nn.Module:
    """The loop runs over the segments backwards: the schedule follows the run, not the input."""
    return ReversedLoop()


@zoo("ragged_tail", **COMMON)
def ragged_tail() -> Built:
    """The last segment is shorter: more kinds, the same waves (S counts it)."""
    return ListLoop(), (tokens(S - 1, tail=1),)


# -- weights and layers that are not alike


class SharedLoop(StateLoop):
    """One module run L times a segment, with a state for each of its depths."""

    def __init__(self, as_list: bool) -> None:
        super().__init__(layers=1)
        body = self.layers[0]
        if as_list:
            self.layers = nn.ModuleList([body] * L)
        else:
            self.layers = nn.Identity()
            self.body = body
        self.as_list = as_list

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        state = [self.zeros(x) for _ in range(L)]
        outs = []
        for segment in x.split(T, dim=1):
            h = self.embed(segment)
            for i in range(L):
                layer = self.layers[i] if self.as_list else self.body
                h, state[i] = layer(h, state[i])
            outs.append(self.head(h))
        return torch.cat(outs, dim=1)


@zoo("shared_module_list", **COMMON, kinds=2)
def shared_module_list() -> nn.Module:
    """The same module three times in a ModuleList (ALBERT): one set of weights, L layers."""
    return SharedLoop(as_list=True)


@zoo("shared_module", batched=None)
def shared_module() -> nn.Module:
    """The same module called L times a segment. No list says that it is L layers."""
    return SharedLoop(as_list=False)


class SharedStep(nn.Module):
    """One segment: the same module L times, its memories in a list of the step's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.memories: list[Tensor] | None = None

    def forward(self, h: Tensor) -> Tensor:
        before = self.memories or [h.new_zeros(h.shape[0], D) for _ in range(L)]
        self.memories = []
        for memory in before:
            h, memory = self.body(h, memory)
            self.memories.append(memory)
        return h


class SharedStepLoop(nn.Module):
    """Calls a module for each segment, which calls one layer L times."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = SharedStep(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        self.step.memories = None
        return torch.cat([self.head(self.step(segment)) for segment in x.split(T, 1)], 1)


@zoo("shared_module_in_a_step", **COMMON, kinds=1)
def shared_module_in_a_step() -> nn.Module:
    """The module that runs a segment is called again and again, and the layer inside more often."""
    return SharedStepLoop()


@zoo("tied_linears", **COMMON, kinds=2)
def tied_linears() -> nn.Module:
    """Layers that share one of their weight matrices and nothing else."""
    model = ListLoop()
    for layer in list(model.layers)[1:]:
        layer.read.weight = model.layers[0].read.weight
    return model


@zoo("tied_some", **COMMON)
def tied_some() -> nn.Module:
    """Layers 0 and 2 share all weights, layer 1 has its own."""
    model = ListLoop()
    model.layers[2] = model.layers[0]
    return model


class TaperLayer(nn.Module):
    """Maps width `inp` to width `out`."""

    def __init__(self, inp: int, out: int) -> None:
        super().__init__()
        self.up = nn.Linear(inp, out)
        self.body = Mix(out)
        self.state = torch.zeros(B, out, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, inp] -> [B, T, out]."""
        h, self.state = self.body(self.up(h), self.state)
        return h


# Waves are those of the dataflow, whether or not anything in a wave can be batched.
@zoo("taper", **COMMON, batched=False)
def taper() -> nn.Module:
    """Each layer has its own width: nothing to batch, never an error."""
    return Loop([TaperLayer(6, 8), TaperLayer(8, 4), TaperLayer(4, 6)])


class AttnLayer(nn.Module):
    """Attention with a memory of the last M outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.memory = torch.zeros(B, M, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = self.attn(h, self.memory)
        self.memory = h[:, -M:]
        return h


class GruLayer(nn.Module):
    """A GRU cell over the mean token of each segment."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(D, D)
        self.h = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        self.h = self.cell(x.mean(1), self.h)
        return x + self.h.unsqueeze(1)


@zoo("hybrid", cells=4 * S, waves=S + 3)
def hybrid() -> nn.Module:
    """Attention and GRU layers in turn: two kinds, each batched within its own."""
    return Loop([AttnLayer(), GruLayer(), AttnLayer(), GruLayer()])


class PlainLayer(nn.Module):
    """A layer without state."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = FeedForward()

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return h + self.ff(h)


# (s, l) of a stateless layer needs only (s, l-1); the stateful ones at l = 0, 2 keep t = s + l.
@zoo("some_stateless", cells=4 * S, waves=S + 3)
def some_stateless() -> nn.Module:
    """Every second layer has no state."""
    return Loop([AttributeLayer(), PlainLayer(), AttributeLayer(), PlainLayer()])


class IndexedLayer(nn.Module):
    """A float scale and a table row that depend on the layer's index alone."""

    def __init__(self, idx: int, table: nn.Embedding) -> None:
        super().__init__()
        self.idx, self.table = idx, table
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = h * (1.0 + 0.1 * self.idx) + self.table.weight[self.idx]
        h, self.state = self.body(h, self.state / (self.idx + 1))
        return h


@zoo("layer_index", **COMMON, kinds=1)
def layer_index() -> nn.Module:
    """Values that differ only by layer: one kind, not L."""
    table = nn.Embedding(L, D)
    return Loop([IndexedLayer(i, table) for i in range(L)])


class ScaleLayer(nn.Module):
    """The per-layer scale as a Python float attribute, and a per-layer dilation as an int."""

    def __init__(self, idx: int) -> None:
        super().__init__()
        self.scale = 0.3 + 0.1 * idx
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, state = self.body(self.scale * h, self.state)
        self.state = torch.add(state, h.mean(1), alpha=self.scale) - self.scale
        return h


@zoo("layer_scale", **COMMON, kinds=1)
def layer_scale() -> nn.Module:
    """A Python float per layer, also as an `alpha=` argument."""
    return Loop([ScaleLayer(i) for i in range(L)])


class RollByIndexLayer(nn.Module):
    """The layer's index is the shift of a roll: no tensor can stand in for it."""

    def __init__(self, idx: int) -> None:
        super().__init__()
        self.idx = idx
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, self.state = self.body(torch.roll(h, self.idx, dims=1), self.state)
        return h


@zoo("layer_shift", **COMMON, batched=None)
def layer_shift() -> nn.Module:
    """A per-layer int that must stay a constant: as many kinds as layers, never a wrong merge."""
    return Loop([RollByIndexLayer(i) for i in range(L)])


class AttnState(nn.Module):
    """Attention with its memory, residual left to the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.memory = torch.zeros(B, M, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        y = self.attn(h, self.memory)
        self.memory = y[:, -M:]
        return y - h


class SiblingLoop(nn.Module):
    """Two sibling ModuleLists, with the residual glue in the model's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.attns = nn.ModuleList([AttnState() for _ in range(L)])
        self.ffs = nn.ModuleList([FeedForward() for _ in range(L)])
        self.scales = nn.Parameter(torch.rand(L, 2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        outs = []
        for h in x.split(T, dim=1):
            for i in range(L):
                h = h + self.scales[i, 0] * self.attns[i](h)
                h = h + self.scales[i, 1] * self.ffs[i](h)
            outs.append(h)
        return torch.cat(outs, dim=1)


# As single cells t(s, attn l) = s + 2l and 2L + S - 1 = 9 waves of 24 cells. As one layer each,
# t = s + l and 6 waves of 12 cells, which is shorter: that is what the issue asks for.
@zoo("siblings", **COMMON)
def siblings() -> nn.Module:
    """attns[l] and ffs[l] with glue between count as one layer."""
    return SiblingLoop()


class BlockListLoop(nn.Module):
    """A layer is a ModuleList([attn, ff]) that the model's forward takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([AttnState(), FeedForward()]) for _ in range(L)])
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        outs = []
        for h in x.split(T, dim=1):
            for attn, ff in self.layers:
                h = attn(h) + h
                h = ff(h) + h
            outs.append(self.norm(h))
        return torch.cat(outs, dim=1)


@zoo("block_lists", **COMMON)
def block_lists() -> nn.Module:
    """ModuleList([attn, ff]) blocks, never called themselves: one layer each."""
    return BlockListLoop()


class TwoStacks(nn.Module):
    """An encoder and a decoder stack of other code, both recurrent over segments."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([AttributeLayer() for _ in range(2)])
        self.decoder = nn.ModuleList([GruLayer() for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, S * T, D] -> a list of S tensors [B, T, D]."""
        outs = []
        for h in x.split(T, dim=1):
            for layer in self.encoder:
                h = layer(h)
            for layer in self.decoder:
                h = layer(h)
            outs.append(h)
        return outs


@zoo("two_stacks", cells=4 * S, waves=S + 3)
def two_stacks() -> nn.Module:
    """Two families of layers, one above the other, in sibling lists of the same length."""
    return TwoStacks()


class HeadsLayer(nn.Module):
    """A layer that holds a ModuleList of its own: the outer list is the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(D, D // 2) for _ in range(2)])
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = h + torch.cat([head(h).sin() for head in self.heads], dim=-1)
        h, self.state = self.body(h, self.state)
        return h


@zoo("inner_list", **COMMON, kinds=1)
def inner_list() -> nn.Module:
    """Repeated modules inside the repeated modules."""
    return Loop([HeadsLayer() for _ in range(L)])


class NamedLoop(nn.Module):
    """Layers that are attributes `block1 ... block3`, in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.block3 = (AttributeLayer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        outs = []
        for h in x.split(T, dim=1):
            outs.append(self.block3(self.block2(self.block1(h))))
        return torch.cat(outs, dim=1)


@zoo("named_blocks", **COMMON, kinds=1)
def named_blocks() -> nn.Module:
    """Layers found by digits in attribute names."""
    return NamedLoop()


class SequentialLoop(Loop):
    """Layers in an nn.Sequential that is called as a whole."""

    def __init__(self) -> None:
        super().__init__([AttributeLayer() for _ in range(L)])
        self.layers = nn.Sequential(*self.layers)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        return torch.cat([self.head(self.layers(h)) for h in x.split(T, dim=1)], dim=1)


@zoo("sequential_container", **COMMON, kinds=1)
def sequential_container() -> nn.Module:
    """nn.Sequential instead of ModuleList."""
    return SequentialLoop()


# -- counters


class CountingLayer(nn.Module):
    """Counts its calls in a Python int that nothing ever resets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.seen = 0
        self.tokens = 0
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        self.seen += 1
        self.tokens += h.shape[1]
        h, self.state = self.body(h, self.state)
        return h


class CountingLoop(Loop):
    """Counts its own calls, too."""

    def __init__(self) -> None:
        super().__init__([CountingLayer() for _ in range(L)])
        self.calls = 0
        self.done = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        self.calls += 1
        self.done = True
        return super().forward(x)


@zoo("counters", **COMMON, kinds=1)
def counters() -> nn.Module:
    """Never-reset Python counters on the model and its layers."""
    return CountingLoop()


# -- operations


class ConvLayer(nn.Module):
    """Causal convolution whose left context is the state."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(D, D, 3, groups=2)
        self.context = torch.zeros(B, D, 2, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = torch.cat([self.context, h.mT], dim=-1)
        self.context = x[..., -2:].clone()
        return h + self.conv(x).mT


# The context is the layer's own *input* of the segment before, which is an output of layer l-1:
# (s, l) needs (s, l-1) and (s-1, l-1) only, so t(s, l) = l and there are L waves. The copy is made
# inside cell (s-1, l), so who takes that for work of the cell finds S + L - 1.
@zoo("conv1d", cells=L * S, waves=(L, S + L - 1), kinds=3)
def conv1d() -> nn.Module:
    """Causal grouped convolution with its context carried over."""
    return Loop([ConvLayer() for _ in range(L)])


class LstmLayer(nn.Module):
    """An LSTM cell over the mean token; its state is a tuple in one attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(D, D)
        zero = torch.zeros(B, D, dtype=torch.float64)
        self.hc = (zero, zero.clone())

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        self.hc = self.cell(x.mean(1), self.hc)
        return x + self.hc[0].unsqueeze(1)


@zoo("gru_cells", **COMMON, kinds=1)
def gru_cells() -> nn.Module:
    """nn.GRUCell in each layer."""
    return Loop([GruLayer() for _ in range(L)])


@zoo("lstm_cells", **COMMON, kinds=1)
def lstm_cells() -> nn.Module:
    """nn.LSTMCell in each layer, state a tuple."""
    return Loop([LstmLayer() for _ in range(L)])


class DeltaLayer(nn.Module):
    """Associative memory with the delta rule, by einsum, and a low-rank state [B, D, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, D, D) * 0.3)
        self.beta = nn.Linear(D, 1)
        self.w = torch.zeros(B, D, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = torch.einsum("btd,nde->nbte", h, self.qkv).unbind(0)
        q, k = q.softmax(-1), k.softmax(-1)
        out = torch.einsum("btk,bkv->btv", q, self.w)
        delta = (v - torch.einsum("btk,bkv->btv", k, self.w)) * self.beta(h).sigmoid()
        self.w = self.w + torch.einsum("btk,btv->bkv", k, delta)
        return h + out


@zoo("einsum_delta", **COMMON, kinds=1)
def einsum_delta() -> nn.Module:
    """Associative memory with einsum and softmax keys."""
    return Loop([DeltaLayer() for _ in range(L)])


class LookupLayer(nn.Module):
    """Looks token numbers up in a table of its own, next to the hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, D)
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor, ids: Tensor) -> Tensor:
        """[B, T, D], ids [B, T] -> [B, T, D]."""
        h, self.state = self.body(h + self.table(ids), self.state)
        return h


class LookupLoop(nn.Module):
    """Token numbers in, logits out, with the output matrix tied to the input table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.layers = nn.ModuleList([LookupLayer() for _ in range(L)])
        self.head = nn.Linear(D, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, *, scale: float = 1.0, bias: Tensor | None = None) -> list[Tensor]:
        """ids [B, S * T] -> S tensors of logits [B, T, 11]."""
        outs = []
        for part in ids.split(T, dim=1):
            h = self.embed(part) * scale
            for layer in self.layers:
                h = layer(h, part)
            logits = self.head(h)
            outs.append(logits if bias is None else logits + bias)
        return outs


@zoo("embeddings", **COMMON, kinds=1)
def embeddings() -> Built:
    """Integer inputs, an embedding in each layer, tied head."""
    return LookupLoop(), (torch.randint(11, (B, S * T)),)


class ExpertsLayer(nn.Module):
    """Dense mixture of experts: top-2 routing, every expert evaluated."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(D, experts)
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(experts)])
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        scores, chosen = self.router(h).topk(2, dim=-1)
        gates = torch.zeros_like(self.router(h)).scatter(-1, chosen, scores.softmax(-1))
        mixed = torch.stack([expert(h) for expert in self.experts], dim=-1)
        h = h + (mixed * gates.unsqueeze(-2)).sum(-1)
        h, self.state = self.body(h, self.state)
        return h


@zoo("experts", **COMMON, kinds=1)
def experts() -> nn.Module:
    """Top-k routing with scatter, dense evaluation."""
    return Loop([ExpertsLayer() for _ in range(L)])


class BatchNormLayer(nn.Module):
    """BatchNorm over tokens, in evaluation or in training mode, beside a recurrent state."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(D)
        self.bn.running_mean += torch.randn(D)
        self.bn.running_var *= 2.0
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = h + self.bn(h.mT).mT
        h, self.state = self.body(h, self.state)
        return h


@zoo("batchnorm_eval", **COMMON, kinds=1, batched=None)
def batchnorm_eval() -> nn.Module:
    """BatchNorm with running statistics as constants."""
    return Loop([BatchNormLayer() for _ in range(L)])


@zoo("batchnorm_train", **COMMON, batched=None)
def batchnorm_train() -> nn.Module:
    """BatchNorm in training mode: running statistics are state, written in place."""
    model = Loop([BatchNormLayer() for _ in range(L)])
    for layer in model.layers:
        layer.bn.keep_training = True
    return model


class SdpaLayer(nn.Module):
    """SDPA with dropout in its configuration and a memory of the last M outputs."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.attn = Attention(dropout=dropout)
        self.drop = nn.Dropout(dropout)
        self.memory = torch.zeros(B, M, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = self.drop(self.attn(h, self.memory))
        self.memory = h[:, -M:]
        return h


@zoo("sdpa_eval", **COMMON, kinds=1)
def sdpa_eval() -> nn.Module:
    """Attention and dropout modules in evaluation mode: nothing random happens."""
    return Loop([SdpaLayer() for _ in range(L)])


def dropout_train() -> Built:
    """The same in training mode. Not in the zoo: its cells draw random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Loop([SdpaLayer() for _ in range(L)]).double().train()
        return model, (tokens(),)


class NoGradLayer(nn.Module):
    """Updates its state under `no_grad`, with a detach, and reads it with a clone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.register_buffer("state", torch.zeros(B, D))

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, new = self.body(h, self.state.clone())
        with torch.no_grad():
            self.state.copy_(new.detach())
        return h


@zoo("no_grad_state", **COMMON, kinds=1)
def no_grad_state() -> nn.Module:
    """State updated under no_grad from a detached value."""
    return Loop([NoGradLayer() for _ in range(L)])


class WeightNormLayer(nn.Module):
    """A parametrised weight (torch.nn.utils.parametrizations.weight_norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.extra = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, self.state = self.body(h + self.extra(h).sin(), self.state)
        return h


@zoo("weight_norm", **COMMON, kinds=1)
def weight_norm() -> nn.Module:
    """Weights computed from parameters by a parametrisation."""
    return Loop([WeightNormLayer() for _ in range(L)])


class OutLayer(nn.Module):
    """Returns a dict, takes keywords only and a mask that all segments share."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()

    def forward(self, *, hidden: Tensor, mask: Tensor, memory: Tensor) -> dict[str, Tensor]:
        """hidden [B, T, D], mask [T, T], memory [B, D] -> the same names."""
        weights = (hidden @ hidden.mT).masked_fill(~mask, float("-inf")).softmax(-1)
        hidden, memory = self.body(hidden + weights @ hidden, memory)
        return {"hidden": hidden, "memory": memory}


class MaskLoop(StateLoop):
    """Segment mask as glue, keyword calls, nested containers in and out."""

    def __init__(self) -> None:
        super().__init__(body=OutLayer)

    def forward(self, batch: dict[str, Any], labels: Tensor | None = None) -> dict[str, Any]:
        """batch {"x": [B, S * T, D], "scales": [S floats]} -> nested dict of outputs."""
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        memory = OrderedDict((i, self.zeros(batch["x"])) for i in range(len(self.layers)))
        outs, loss = [], None
        for segment, scale in zip(batch["x"].split(T, dim=1), batch["scales"], strict=True):
            h = self.embed(segment) * scale
            for i, layer in enumerate(self.layers):
                got = layer(hidden=h, mask=mask, memory=memory[i])
                h, memory[i] = got["hidden"], got["memory"]
            outs.append(self.head(h))
        joined = torch.cat(outs, dim=1)
        if labels is not None:
            loss = F.mse_loss(joined, labels)
        return {"out": joined, "loss": loss, "memory": dict(memory), "per_segment": tuple(outs)}


@zoo("nested_io", **COMMON, kinds=2)
def nested_io() -> Built:
    """Nested inputs with Python floats, keyword-only layers, nested outputs with ints and None."""
    return MaskLoop(), ({"x": tokens(), "scales": [1.0, 0.5, 2.0, 1.5]},)


@zoo("nested_io_labels", **COMMON, kinds=2)
def nested_io_labels() -> Built:
    """The same with labels: a loss over all segments."""
    return MaskLoop(), ({"x": tokens(), "scales": [1.0, 0.5, 2.0, 1.5]}, tokens())


class InplaceInputLoop(ListLoop):
    """Writes to its own input in place before it reads it."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]; x is doubled for the caller, too."""
        x.mul_(2.0)
        return super().forward(x)


@zoo("inplace_input", **COMMON, kinds=2)
def inplace_input() -> nn.Module:
    """The caller's tensor is changed in place, as the plain model would."""
    return InplaceInputLoop()


class InplaceHiddenLayer(nn.Module):
    """Works on the hidden state in place: the tensor that went in is the one that comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(D, D)
        self.register_buffer("acc", torch.zeros(B, D))

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> the same tensor."""
        h += self.lin(h + self.acc.unsqueeze(1)).sin()
        h[:, 0].mul_(0.5)
        self.acc.add_(h.mean(1)).tanh_()
        return h


@zoo("inplace_hidden", **COMMON, kinds=1)
def inplace_hidden() -> nn.Module:
    """Layers that write into their input tensor."""
    return Loop([InplaceHiddenLayer() for _ in range(L)])


class OutBufferLoop(ListLoop):
    """Fills an output tensor by slices instead of a list."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        out = torch.empty_like(x)
        state = [self.zeros(x) for _ in self.layers]
        for s, segment in enumerate(x.split(T, dim=1)):
            h = self.embed(segment)
            for i, layer in enumerate(self.layers):
                h, state[i] = layer(h, state[i])
            out[:, s * T : (s + 1) * T] = self.head(h)
        return out


@zoo("out_slices", **COMMON, kinds=2)
def out_slices() -> nn.Module:
    """Outputs written into one preallocated tensor: no dependency between segments."""
    return OutBufferLoop()


class SlotsLoop(StateLoop):
    """Hidden states of all segments and layers in one big scratch tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, S * T, D] -> [B, S * T, D]."""
        parts = x.split(T, dim=1)
        scratch = x.new_zeros(len(parts) + 1, len(self.layers), x.shape[0], D)
        outs = []
        for s, segment in enumerate(parts):
            h = self.embed(segment)
            for i, layer in enumerate(self.layers):
                h, scratch[s + 1, i] = layer(h, scratch[s, i])
            outs.append(self.head(h))
        return torch.cat(outs, dim=1) + scratch[-1].mean()


@zoo("scratch_slots", **COMMON, kinds=2)
def scratch_slots() -> nn.Module:
    """State history in one [S+1, L, B, D] tensor, written in place."""
    return SlotsLoop()


@zoo("one_segment", cells=L, waves=L, verdict="sequential", batched=False)
def one_segment() -> Built:
    """A single segment: a path of L cells, nothing to gain."""
    return ListLoop(), (tokens(1),)


@zoo("one_layer", batched=None)
def one_layer() -> nn.Module:
    """A single stateful layer over S segments: no repeated module."""
    return ListLoop(layers=1)
