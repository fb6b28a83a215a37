"""Steps for `SegmentLoop`: modules that handle one segment, each with its own way to keep state.

The rolled companion of `tests/models.py`. `ROLLED[name]()` builds a `SegmentLoop` in float64 and evaluation
mode with weights that depend on nothing but the name; `inputs(name, length, batch)` makes what it
takes. `EXPECT[name]` holds what can be said about the entry by hand.

Shape letters: B batch, T tokens in a segment, D width, M memory slots, L layers, S segments.

Waves: t(s, l) is the earliest wave of layer l at segment s, the length of the longest path into it. With
(s, l-1) for the input and (s-1, l) for the state, t = s + l: S + L - 1 waves. Entries that differ say why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from diagpass import SegmentLoop
from examples import armt, rnn_stack
from tests.models import Attention, BufferLayer, FeedForward, Mix

B, T, D, M, L = 2, 3, 6, 2, 3
VOCAB = 11


def diagonal(segments: int) -> tuple[int, ...]:
    """Waves where each cell needs its left and lower neighbour."""
    return (segments + L - 1,)


@dataclass(frozen=True)
class Expect:
    """What is known by hand about an entry."""

    #: None: nothing is claimed about cells and waves
    layers: int | None = L
    #: number of segments -> every defensible number of waves, the longest path first
    waves: Callable[[int], tuple[int, ...]] = diagonal
    #: what must run when the wavefront is forced; None where refusing is as good as running it
    ran: str | None = "wavefront"
    #: must cells of a longer input run in groups of two or more (False: cannot, None: no claim)
    batched: bool | None = True
    #: float32 inside a float64 model: batched results agree to float32's rounding only
    float32_inside: bool = False


@dataclass(frozen=True)
class Entry:
    """A factory of loops, and of inputs for them."""

    build: Callable[[], SegmentLoop]
    inputs: Callable[[int, int], Any]
    expect: Expect = field(default_factory=Expect)


ENTRIES: dict[str, Entry] = {}


def tokens(length: int, batch: int = B) -> Tensor:
    """Random float64 input [batch, length, D]."""
    return torch.randn(batch, length, D, dtype=torch.float64)


def ids(length: int, batch: int = B) -> Tensor:
    """Random token numbers [batch, length]."""
    return torch.randint(VOCAB, (batch, length))


def rolled(
    name: str, make_inputs: Callable[[int, int], Any] = tokens, **expect: Any
) -> Callable[[Callable[[], SegmentLoop]], Callable[[], SegmentLoop]]:
    """Register a factory of a loop under `name`."""

    def register(factory: Callable[[], SegmentLoop]) -> Callable[[], SegmentLoop]:
        def build() -> SegmentLoop:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_seed(name))
                return factory().double().eval()

        ENTRIES[name] = Entry(build, make_inputs, Expect(**expect))
        return build

    return register


def _seed(name: str) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(name))


def build(name: str) -> SegmentLoop:
    """A fresh loop."""
    return ENTRIES[name].build()


def inputs(name: str, length: int, batch: int = B, seed: int = 0) -> Any:
    """Inputs of `length` tokens for an entry; the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(name) + 1000 * seed + length)
        return ENTRIES[name].inputs(length, batch)


def expect(name: str) -> Expect:
    """What is known about an entry."""
    return ENTRIES[name].expect


# ----------------------------------------------------------------------------- two common steps


class Step(nn.Module):
    """One segment of a model whose layers keep their own state."""

    def __init__(self, layers: list[nn.Module], width: int = D) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(width, width)

    def reset(self) -> None:
        """Empty the state of every layer that has one."""
        for layer in self.layers:
            if hasattr(layer, "reset"):
                layer.reset()

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


class PureStep(nn.Module):
    """One segment of a model whose layers are pure; subclasses say who keeps the state, and how."""

    def __init__(self, layers: int = L, body: Callable[[], nn.Module] = Mix) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.layers = nn.ModuleList([body() for _ in range(layers)])
        self.head = nn.Linear(D, D)

    def zeros(self, x: Tensor, *lead: int) -> Tensor:
        """[*lead, B, D] like the input."""
        return x.new_zeros(*lead, x.shape[0], D)


def keeps(step: nn.Module, size: int = T, reset: Any = "reset") -> SegmentLoop:
    """A loop whose step keeps its state."""
    return SegmentLoop(step, size, reset=reset)


def carries(step: nn.Module, size: int = T) -> SegmentLoop:
    """A loop whose step returns its state."""
    return SegmentLoop(step, size, carries_state=True)


# --------------------------------------------------------------------- the three of the issue


@rolled("armt", ids, float32_inside=True)
def _armt() -> SegmentLoop:
    """ARMT over an unmodified Hugging Face Llama: attributes, a flag and a counter per layer."""
    model, _ = armt.build(
        layers=L,
        segments=1,
        segment_size=T,
        d_model=16,
        heads=2,
        num_mem_tokens=2,
        d_mem=4,
        vocab=VOCAB,
        dtype=torch.float64,
    )
    return keeps(model.memory_cell, reset="zero_mem")


class GruLayer(nn.Module):
    """A GRU cell fed with the mean token: `(h_BTD, m_BD) -> (h_BTD, m_BD)`."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(D, D)

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Advance the memory, add it to every token."""
        m = self.cell(h.mean(1), m)
        return h + m.unsqueeze(1), m


class ListStep(PureStep):
    """Returns a list with a tensor [B, D] per layer; zeros if there is none."""

    def forward(self, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """[B, T, D] and the state -> [B, T, D] and the state."""
        state = [self.zeros(x) for _ in self.layers] if state is None else list(state)
        h = self.embed(x)
        for i, layer in enumerate(self.layers):
            h, state[i] = layer(h, state[i])
        return self.head(h), state


@rolled("gru")
def _gru() -> SegmentLoop:
    """A stack of GRU cells with returned state."""
    return carries(ListStep(body=GruLayer))


class MambaLayer(nn.Module):
    """A causal convolution and a diagonal recurrence over the tokens, both states in place.

    ``conv_state`` [B, D, K] holds the last K inputs and is rolled; ``ssm_state`` [B, D] is overwritten.
    """

    K = 4

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.inp, self.gate, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.conv = nn.Conv1d(D, D, self.K + 1, groups=D)
        self.decay = nn.Parameter(torch.randn(D))
        self.register_buffer("conv_state", torch.zeros(B, D, self.K))
        self.register_buffer("ssm_state", torch.zeros(B, D))

    def reset(self) -> None:
        """Zero in place."""
        self.conv_state.zero_()
        self.ssm_state.zero_()

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = self.norm(h)
        u = self.inp(x).mT
        context = torch.cat([self.conv_state, u], dim=-1)
        self.conv_state.copy_(self.conv_state.roll(-u.shape[-1], dims=-1))
        self.conv_state[:, :, -u.shape[-1] :] = u
        u = F.silu(self.conv(context))
        decay, state, ys = torch.sigmoid(self.decay), self.ssm_state, []
        for at in range(u.shape[-1]):
            state = decay * state + (1 - decay) * u[:, :, at]
            ys.append(state)
        self.ssm_state.copy_(state)
        return h + self.out(torch.stack(ys, dim=1) * F.silu(self.gate(x)))


@rolled("mamba")
def _mamba() -> SegmentLoop:
    """A Mamba-like stack: a convolution state that is rolled, a recurrent one that is overwritten."""
    return keeps(Step([MambaLayer() for _ in range(L)]))


@rolled("rnn_stack", waves=lambda s: (s + L - 1,))
def _rnn_stack() -> SegmentLoop:
    """The LSTM stack of the examples; a segment is one time step, the state a list of tuples."""
    model, _ = rnn_stack.build(kind="lstm", layers=L, d_model=D, dtype=torch.float64)
    return carries(model, size=1)


# ---------------------------------------------------------------- where the state lies, and since when


class AttributeLayer(nn.Module):
    """A reassigned attribute; `first` chooses between zeros and None before the first segment."""

    def __init__(self, none: bool) -> None:
        super().__init__()
        self.body, self.none = Mix(), none
        self.reset()

    def reset(self) -> None:
        """Zeros or None."""
        self.state = None if self.none else torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        state = h.mean(1).cos() if self.state is None else self.state
        h, self.state = self.body(h, state)
        return h


@rolled("attribute")
def _attribute() -> SegmentLoop:
    """State in a reassigned attribute, and no reset: calls go on where the last one ended."""
    return keeps(Step([AttributeLayer(none=False) for _ in range(L)]), reset=None)


@rolled("attribute_none")
def _attribute_none() -> SegmentLoop:
    """As before, but None at first."""
    return keeps(Step([AttributeLayer(none=True) for _ in range(L)]))


def _copying() -> nn.Module:
    layer = BufferLayer("copy_")
    layer.buf.zero_()
    return layer


@rolled("buffer")
def _buffer() -> SegmentLoop:
    """A buffer per layer, overwritten in place, never reset."""
    return keeps(Step([_copying() for _ in range(L)]), reset=None)


class Cache:
    """A plain object with the states of all layers, as a Hugging Face cache is."""

    def __init__(self) -> None:
        self.memory: dict[int, Tensor] = {}
        self.seen_tokens = 0

    def get(self, layer: int, like: Tensor) -> Tensor:
        """The memory of a layer [B, D], zeros at first."""
        return self.memory[layer] if layer in self.memory else torch.zeros_like(like)

    def put(self, layer: int, value: Tensor) -> None:
        """Remember."""
        self.memory[layer] = value


@dataclass
class Memory:
    """The state of one layer."""

    value: Tensor
    peak: Tensor


class CreatingStep(PureStep):
    """Creates its state at the first call, in the manner that `how` says; None before."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.reset()

    def reset(self) -> None:
        """Back to None."""
        self.state: Any = None

    def create(self, x: Tensor) -> Any:
        """An empty state for inputs [B, T, D]."""
        zeros = [self.zeros(x) for _ in self.layers]
        if self.how == "list":
            return zeros
        if self.how == "dict":
            return {f"layer_{i}": (zero, zero + 1) for i, zero in enumerate(zeros)}
        if self.how == "dataclass":
            return [Memory(zero, zero - 1) for zero in zeros]
        return Cache()

    def read(self, i: int, like: Tensor) -> Tensor:
        """Memory of layer i, [B, D]."""
        if self.how == "list":
            return self.state[i]
        if self.how == "dict":
            value, count = self.state[f"layer_{i}"]
            return value / count
        if self.how == "dataclass":
            return self.state[i].value + 0.1 * self.state[i].peak
        return self.state.get(i, like)

    def write(self, i: int, new: Tensor) -> None:
        """Keep what layer i remembers."""
        if self.how == "list":
            self.state[i] = new
        elif self.how == "dict":
            self.state[f"layer_{i}"] = (new, self.state[f"layer_{i}"][1] + 1)
        elif self.how == "dataclass":
            self.state[i] = Memory(new, torch.maximum(self.state[i].peak, new))
        else:
            self.state.put(i, new)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        if self.state is None:
            self.state = self.create(x)
        h = self.embed(x)
        for i, layer in enumerate(self.layers):
            h, new = layer(h, self.read(i, h[:, 0]))
            self.write(i, new)
        return self.head(h)


@rolled("list_none")
def _list_none() -> SegmentLoop:
    """A list of tensors, created at the first call."""
    return keeps(CreatingStep("list"))


@rolled("dict_none")
def _dict_none() -> SegmentLoop:
    """A dict of tuples, created at the first call."""
    return keeps(CreatingStep("dict"))


@rolled("dataclass_none")
def _dataclass_none() -> SegmentLoop:
    """A list of dataclass objects, replaced at each segment."""
    return keeps(CreatingStep("dataclass"))


@rolled("cache_none")
def _cache_none() -> SegmentLoop:
    """A cache object, created at the first call and filled layer by layer."""
    return keeps(CreatingStep("cache"))


class StackedStep(PureStep):
    """All states in one returned tensor; `how` says where the layers lie and how they are written."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, T, D], [L, B, D] or [B, D, L] -> the same."""
        if state is None:
            state = self.zeros(x, L)
            state = state.permute(1, 2, 0).contiguous() if self.how == "last" else state
        h, fresh = self.embed(x), []
        if self.how == "last":
            state = state.clone()
        for i, layer in enumerate(self.layers):
            h, new = layer(h, state[:, :, i] if self.how == "last" else state[i])
            if self.how == "last":
                state[:, :, i] = new
            fresh.append(new)
        return self.head(h), state if self.how == "last" else torch.stack(fresh)


@rolled("stacked")
def _stacked() -> SegmentLoop:
    """One state tensor [L, B, D], restacked at the end of each segment."""
    return carries(StackedStep("first"))


@rolled("rwkv_state")
def _rwkv_state() -> SegmentLoop:
    """One state tensor [B, D, L], written by `state[:, :, l] = new`, as RWKV does."""
    return carries(StackedStep("last"))


class FifoLayer(nn.Module):
    """A list of the last M memories: the oldest drops out, the newest is appended."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.reset()

    def reset(self) -> None:
        """M zeros."""
        self.past = [torch.zeros(B, D, dtype=torch.float64) for _ in range(M)]

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h, new = self.body(h, sum(self.past) / M)
        self.past = [*self.past[1:], new]
        return h


@rolled("fifo_list")
def _fifo_list() -> SegmentLoop:
    """State tensors that move through the places of a list unchanged."""
    return keeps(Step([FifoLayer() for _ in range(L)]))


# ------------------------------------------------------------------------ who reads whose state


class XlStep(PureStep):
    """Layer l attends to what entered it in the segment before (Transformer-XL, arXiv 1901.02860)."""

    def __init__(self) -> None:
        super().__init__(body=Attention)

    def forward(self, x: Tensor, past: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """[B, T, D], L tensors [B, M, D] -> the same."""
        past = tuple(x.new_zeros(x.shape[0], M, D) for _ in self.layers) if past is None else past
        h, kept = self.embed(x), []
        for layer, memory in zip(self.layers, past, strict=True):
            kept.append(torch.cat([memory, h], dim=1)[:, -M:])
            h = layer(h, memory)
        return self.head(h), tuple(kept)


def _xl_waves(segments: int) -> tuple[int, ...]:
    # (s, l) needs (s, l-1) and the input of (s-1, l), which (s-1, l-1) made: no path along a layer
    # where T >= M; a ragged tail keeps part of the old memory, which is a copy and no cell either
    return L, segments + L - 1


@rolled("transformer_xl", waves=_xl_waves)
def _transformer_xl() -> SegmentLoop:
    """Cached hidden states of the layer below."""
    return carries(XlStep())


@rolled("some_stateless", waves=lambda s: (s + 3,), layers=4)
def _some_stateless() -> SegmentLoop:
    """Layers of another class without state between those with state."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = FeedForward()

        def forward(self, h: Tensor) -> Tensor:
            return h + self.body(h)

    return keeps(Step([_copying(), Plain(), _copying(), Plain()]), reset=None)


class XlLayer(nn.Module):
    """Attention over the segment and M tokens of the last one, kept in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Attention()
        self.reset()

    def reset(self) -> None:
        """Zeros."""
        self.past = torch.zeros(B, M, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        out = self.body(h, self.past)
        self.past = torch.cat([self.past, out], dim=1)[:, -M:]
        return out


@rolled("hybrid", waves=lambda s: (s + 3,), layers=4)
def _hybrid() -> SegmentLoop:
    """Two classes of layers, each with state, in turn."""
    layers = [XlLayer(), AttributeLayer(none=False), XlLayer(), AttributeLayer(none=False)]
    return keeps(Step(layers))


class FlagLayer(nn.Module):
    """A flag chooses what the first segment does; a number of segments seen that nothing resets."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.plain = Mix(), nn.Linear(D, D)
        self.register_buffer("memory", torch.zeros(B, D), persistent=False)
        self.seen = 0
        self.reset()

    def reset(self) -> None:
        """The next segment is a first one."""
        self.first = True

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        self.seen += 1
        if self.first:
            self.first = False
            h = h + self.plain(h)
            self.memory = h.mean(1)
            return h
        h, self.memory = self.body(h, self.memory)
        return h


@rolled("first_flag")
def _first_flag() -> SegmentLoop:
    """A first-segment branch by a flag."""
    return keeps(Step([FlagLayer() for _ in range(L)]))


class CountingStep(Step):
    """Counts segments in Python, on the step and on each layer; nothing ever reads it."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.segments_seen = 0

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        self.segments_seen += 1
        return super().forward(x)


@rolled("counter")
def _counter() -> SegmentLoop:
    """Pure counters that are never reset."""
    return keeps(CountingStep([_copying() for _ in range(L)]), reset=None)


class RmtStep(PureStep):
    """The top layer's memory tokens enter the next segment's bottom (arXiv 2207.06881)."""

    def __init__(self) -> None:
        super().__init__(body=Attention)
        self.start = nn.Parameter(torch.randn(M, D))

    def forward(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, T, D], [B, M, D] -> the same."""
        memory = self.start.expand(x.shape[0], -1, -1) if memory is None else memory
        h = torch.cat([memory, self.embed(x)], dim=1)
        for layer in self.layers:
            h = layer(h)
        return self.head(h[:, M:]), h[:, :M]


# (s, 0) needs (s-1, L-1): one cell after the other
@rolled("rmt", waves=lambda s: (L * s,), ran=None, batched=False)
def _rmt() -> SegmentLoop:
    """A chain from the top to the next bottom: no width at all."""
    return carries(RmtStep())


class NeighbourStep(PureStep):
    """Layer l reads its own state and what the layer `offset` above had for the last segment."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """[B, T, D], L tensors [B, D] -> the same."""
        state = [self.zeros(x) for _ in self.layers] if state is None else state
        h, new = self.embed(x), list(state)
        for i, layer in enumerate(self.layers):
            other = state[(i + self.offset) % L] if i + self.offset < L else state[i]
            h, new[i] = layer(h, state[i] + 0.3 * other)
        return self.head(h), new


# (s, l) needs (s-1, l+1): t = 2 s + l
@rolled("reads_upper", waves=lambda s: (2 * (s - 1) + L,), ran=None, batched=None)
def _reads_upper() -> SegmentLoop:
    """A carry from each layer to the one below: half the width is left."""
    return carries(NeighbourStep(1))


class LowerStep(PureStep):
    """Layer l also reads the old state of layer l - 1."""

    def forward(self, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """[B, T, D], L tensors [B, D] -> the same."""
        state = [self.zeros(x) for _ in self.layers] if state is None else state
        h, new = self.embed(x), list(state)
        for i, layer in enumerate(self.layers):
            h, new[i] = layer(h, state[i] + 0.3 * state[max(i - 1, 0)])
        return self.head(h), new


@rolled("reads_lower")
def _reads_lower() -> SegmentLoop:
    """A carry from each layer to the one above, which costs nothing."""
    return carries(LowerStep())


class TwoBackStep(PureStep):
    """Layers read what they wrote two segments ago."""

    def forward(
        self, x: Tensor, state: tuple[list[Tensor], list[Tensor]] | None
    ) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
        """[B, T, D], two lists of L tensors [B, D] -> the same."""
        if state is None:
            state = [self.zeros(x) for _ in self.layers], [self.zeros(x) + 0.5 for _ in self.layers]
        oldest, older = state
        h, new = self.embed(x), []
        for layer, memory in zip(self.layers, oldest, strict=True):
            h, kept = layer(h, memory)
            new.append(kept)
        return self.head(h), (older, new)


# (s, l) needs (s-2, l): two segments fit in a wave
@rolled("two_back", waves=lambda s: (L + (s - 1) // 2, s + L - 1))
def _two_back() -> SegmentLoop:
    """State that skips a segment, and moves between two places unchanged."""
    return carries(TwoBackStep())


class SkipStep(PureStep):
    """Every layer but the first also reads the embedding, and the last the first layer's output."""

    def forward(self, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """[B, T, D], L tensors [B, D] -> the same."""
        state = [self.zeros(x) for _ in self.layers] if state is None else list(state)
        embedded = self.embed(x)
        h, outs = embedded, []
        for i, layer in enumerate(self.layers):
            if i:
                h = h + 0.2 * embedded
            if i == L - 1:
                h = h + 0.4 * outs[0]
            h, state[i] = layer(h, state[i])
            outs.append(h)
        return self.head(h), state


@rolled("skips")
def _skips() -> SegmentLoop:
    """Skip edges inside a segment."""
    return carries(SkipStep())


@rolled("one_layer", layers=None, ran=None, batched=False)
def _one_layer() -> SegmentLoop:
    """A single layer: nothing is repeated, and there is no width."""
    return keeps(Step([_copying()]))


# --------------------------------------------------------------------------- inputs and outputs


class MaskedStep(PureStep):
    """Token numbers and a mask in a dict; a ModelOutput out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, D)
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.state: list[Tensor] | None = None

    def forward(
        self, batch: dict[str, Tensor], scale: Tensor | None = None, power: int = 1
    ) -> CausalLMOutputWithCrossAttentions:
        """ids [B, T], mask [B, T] -> logits [B, T, D] and the hidden states of all layers."""
        mask = batch["mask"].unsqueeze(-1).to(self.embed.weight.dtype)
        h = self.embed(self.table(batch["ids"])) * mask
        if scale is not None:
            h = h * scale**power
        state = [self.zeros(h) for _ in self.layers] if self.state is None else self.state
        hidden, new = [h], []
        for layer, memory in zip(self.layers, state, strict=True):
            h, kept = layer(h, memory)
            h = h * mask
            hidden.append(h)
            new.append(kept)
        self.state = new
        return CausalLMOutputWithCrossAttentions(logits=self.head(h), hidden_states=tuple(hidden))


def masked(length: int, batch: int = B) -> dict[str, Tensor]:
    """Token numbers and a mask, [batch, length] each."""
    return {"ids": ids(length, batch), "mask": torch.rand(batch, length) > 0.3}


@rolled("masked", masked)
def _masked() -> SegmentLoop:
    """A dict of inputs, a ModelOutput of outputs, keyword inputs."""
    return keeps(MaskedStep())
