"""Random segment-recurrent models: a small specification, how to draw one, how to build one.

`Spec` is plain data, so a failing example prints as one line that can be pasted back:
`build(Spec(...))` gives `(model, inputs)`. `specs(...)` is the hypothesis strategy.

Shape letters: B batch, T tokens in a segment, D width, M memory slots, L layers, S segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

T, D, M = 3, 6, 2

STATES = ("attribute", "buffer", "list", "stacked", "restacked", "tuple", "module_list")
BODIES = ("rnn", "gru", "attn", "conv", "delta", "plain")


@dataclass(frozen=True)
class Spec:
    """One model. Everything that `build` needs and nothing else."""

    layers: tuple[str, ...]
    segments: int
    batch: int = 1
    state: str = "list"
    #: (target, source) pairs: the layer `target` also reads the output of `source`, same segment
    skips: tuple[tuple[int, int], ...] = ()
    #: (target, source) pairs: the layer `target` also reads the latest state of `source`
    reads: tuple[tuple[int, int], ...] = ()
    first_branch: bool = False
    #: tokens in an additional, shorter last segment
    tail: int = 0
    #: "none", "modules" (layers of one type are one module) or "linears" (one weight is tied)
    shared: str = "none"
    #: state read by a layer is that of the segment before last
    two_back: bool = False
    #: the layer's index is used as a number in the layer
    indexed: bool = False
    #: layers count their calls in a Python int that is never reset
    counter: bool = False
    seed: int = 0

    @property
    def num_segments(self) -> int:
        """Segments with the ragged one."""
        return self.segments + (self.tail > 0)

    @property
    def cells(self) -> int:
        """Layers times segments."""
        return len(self.layers) * self.num_segments


class Body(nn.Module):
    """Pure layer: `(h_BTD, m_BMD) -> (h_BTD, m_BMD)`; `kind` is one of BODIES."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(D)
        self.inp = nn.Linear(D, D)
        if kind == "rnn":
            self.mem, self.out = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        elif kind == "gru":
            self.cell = nn.GRUCell(D, D)
        elif kind == "attn":
            self.kv, self.out = nn.Linear(D, 2 * D), nn.Linear(D, D)
        elif kind == "conv":
            self.conv = nn.Conv1d(D, D, M + 1)
        elif kind == "delta":
            self.qk, self.beta = nn.Linear(D, 2 * M), nn.Linear(D, 1)

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Read the memory, then write it; "plain" does neither."""
        x = self.inp(self.norm(h))
        if self.kind == "rnn":
            y = h + torch.tanh(x + self.mem(m.mean(1, keepdim=True)))
            return y, torch.tanh(self.out(m) + y.mean(1, keepdim=True))
        if self.kind == "gru":
            new = self.cell(x.mean(1), m[:, 0])
            return h + new.unsqueeze(1), torch.stack([new, m[:, 0]], dim=1)
        if self.kind == "attn":
            context = torch.cat([m, x], dim=1)
            k, v = self.kv(context).chunk(2, dim=-1)
            y = h + self.out(F.scaled_dot_product_attention(x, k, v))
            return y, torch.cat([m, y], dim=1)[:, -M:]
        if self.kind == "conv":
            context = torch.cat([m, x], dim=1)
            return h + self.conv(context.mT).mT.sin(), context[:, -M:]
        if self.kind == "delta":
            q, k = self.qk(x).chunk(2, dim=-1)
            q, k = q.softmax(-1), k.softmax(-1)
            delta = self.beta(h).sigmoid() * (x - torch.einsum("btm,bmd->btd", k, m))
            y = h + torch.einsum("btm,bmd->btd", q, m)
            return y, m + torch.einsum("btm,btd->bmd", k, delta)
        return h + F.silu(x), m


class Layer(nn.Module):
    """A body and, where the layer itself keeps state, its memory and what else a layer may hold."""

    def __init__(self, spec: Spec, index: int) -> None:
        super().__init__()
        self.body = Body(spec.layers[index])
        self.spec, self.index = spec, index
        self.seen = 0
        self.first = True
        memory = torch.zeros(spec.batch, M, D, dtype=torch.float64)
        if spec.state == "buffer":
            self.register_buffer("memory", memory)
            self.register_buffer("before", memory.clone())
        elif spec.state == "attribute":
            self.memory, self.before = memory, memory.clone()

    def step(self, h: Tensor, m: Tensor, extra: list[Tensor], first: bool) -> tuple[Tensor, Tensor]:
        """The layer as a function of input, memory and the states of other layers."""
        if self.spec.counter:
            self.seen += 1
        if self.spec.indexed:
            h = h * (1.0 + 0.1 * self.index)
        for other in extra:
            h = h + 0.1 * other.mean(1, keepdim=True)
        if first and self.spec.first_branch:
            return h + self.body.inp(h), m + h.mean(1, keepdim=True)
        return self.body(h, m)

    def forward(self, h: Tensor, m: Tensor | None, extra: list[Tensor], first: bool) -> tuple[Tensor, Tensor]:
        """As `step`; m is None where the layer keeps its memory itself."""
        if m is not None:
            return self.step(h, m, extra, first)
        read = self.before if self.spec.two_back else self.memory
        h, new = self.step(h, read, extra, first)
        if self.spec.state == "buffer":
            if self.spec.two_back:
                self.before.copy_(self.memory)
            self.memory[:, :1] = new[:, :1]
            self.memory[:, 1:].copy_(new[:, 1:])
        else:
            self.before, self.memory = self.memory, new
        return h, self.memory


class Model(nn.Module):
    """The loop over segments and layers, in the manner that `spec` says."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.embed, self.head = nn.Linear(D, D), nn.Linear(D, D)
        layers = [Layer(spec, i) for i in range(len(spec.layers))]
        first_of = {kind: spec.layers.index(kind) for kind in spec.layers}
        for i, kind in enumerate(spec.layers):
            if spec.shared == "modules":
                layers[i] = layers[first_of[kind]]
            elif spec.shared == "linears":
                layers[i].body.inp.weight = layers[0].body.inp.weight
        self.layers = nn.ModuleList(layers)
        if spec.state == "module_list":
            self.kept = [torch.zeros(spec.batch, M, D, dtype=torch.float64) for _ in layers]

    @property
    def own_state(self) -> bool:
        """Do the layers keep their memory themselves."""
        return self.spec.state in ("attribute", "buffer")

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None = None) -> Any:
        """[B, S * T + tail, D] -> outputs [B, S * T + tail, D]; with the state for "tuple"."""
        spec, num_layers = self.spec, len(self.layers)
        zeros = [x.new_zeros(x.shape[0], M, D) for _ in range(num_layers)]
        if spec.state == "tuple" and state is not None:
            now = list(state)
        elif spec.state == "module_list":
            now = self.kept
        elif spec.state == "stacked":
            now = torch.stack(zeros)
        else:
            now = zeros
        before = torch.stack(list(now)) if spec.state == "stacked" else list(now)
        outs = []
        for s, segment in enumerate(x.split(T, dim=1)):
            h = self.embed(segment)
            seen: list[Tensor] = []
            fresh: list[Tensor] = []
            for i, layer in enumerate(self.layers):
                for target, source in spec.skips:
                    if target == i:
                        h = h + 0.5 * seen[source]
                extra = []
                for target, source in spec.reads:
                    if target == i:
                        extra.append(self.layers[source].memory if self.own_state else now[source])
                if self.own_state:
                    h, _ = layer(h, None, extra, s == 0)
                else:
                    read = before[i] if spec.two_back else now[i]
                    h, new = layer(h, read.clone() if spec.state == "stacked" else read, extra, s == 0)
                    if spec.two_back:
                        before[i] = now[i]
                    if spec.state == "restacked":
                        fresh.append(new)
                    else:
                        now[i] = new
                seen.append(h)
            if fresh:
                now = list(torch.stack(fresh).unbind(0))
            outs.append(self.head(h))
        out = torch.cat(outs, dim=1)
        if spec.state == "tuple":
            return out, tuple(now)
        return out


def build(spec: Spec) -> tuple[nn.Module, tuple[Any, ...]]:
    """Make the model and one input, in float64 and evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = Model(spec).double().eval()
        x = torch.randn(spec.batch, spec.segments * T + spec.tail, D, dtype=torch.float64)
        if spec.state == "tuple":
            state = tuple(torch.randn(spec.batch, M, D, dtype=torch.float64) for _ in spec.layers)
            return model, (x, state)
        return model, (x,)


@st.composite
def specs(
    draw: Callable[..., Any],
    max_layers: int = 6,
    max_segments: int = 9,
    max_cells: int | None = None,
    states: tuple[str, ...] = STATES,
) -> Spec:
    """Draw a `Spec`; `max_cells` bounds layers times segments, the ragged tail included."""
    shapes = [
        (layers, segments)
        for layers in range(1, max_layers + 1)
        for segments in range(1, max_segments + 1)
        if max_cells is None or layers * segments <= max_cells
    ]
    wide = [shape for shape in shapes if min(shape) > 1]  # three times as likely: these have waves
    num_layers, num_segments = draw(st.sampled_from([*shapes, *wide, *wide]), label="shape")
    tail = draw(st.sampled_from([0, 0, 1, 2]), label="tail") if num_segments > 1 else 0
    segments = num_segments - (tail > 0)
    types = draw(st.lists(st.sampled_from(BODIES), min_size=1, max_size=3, unique=True))
    layers = tuple(draw(st.sampled_from(types)) for _ in range(num_layers))
    pairs = [(t, s) for t in range(num_layers) for s in range(t)]
    skips = draw(st.lists(st.sampled_from(pairs), max_size=2, unique=True)) if pairs else []
    others = [(t, s) for t in range(num_layers) for s in range(num_layers) if s != t]
    reads = draw(st.lists(st.sampled_from(others), max_size=1)) if others else []
    return Spec(
        layers=layers,
        segments=segments,
        batch=draw(st.integers(1, 3)),
        state=draw(st.sampled_from(states)),
        skips=tuple(sorted(skips)),
        reads=tuple(reads) if draw(st.integers(0, 2)) == 0 else (),
        first_branch=draw(st.booleans()),
        tail=tail,
        shared=draw(st.sampled_from(["none", "none", "modules", "linears"])),
        two_back=draw(st.integers(0, 3)) == 0,
        indexed=draw(st.booleans()),
        counter=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


def expected_edges(spec: Spec) -> set[tuple[tuple[int, int], tuple[int, int]]] | None:
    """Direct dependencies ((s, l), (s', l')) that the specification itself implies; by hand.

    Never more than there are (every pair must be a path in any correct dependency graph). None
    where layers share a module that keeps state: who reads what depends on more than this then.
    """
    own = spec.state in ("attribute", "buffer")
    if own and spec.shared == "modules":
        return None
    edges = set()
    for s in range(spec.num_segments):
        for i, kind in enumerate(spec.layers):
            if i > 0:
                edges.add(((s, i - 1), (s, i)))
            for target, source in spec.skips:
                if target == i:
                    edges.add(((s, source), (s, i)))
            back = s - (2 if spec.two_back else 1)
            # "conv" keeps its own normed inputs, "plain" keeps nothing: no claim for these two
            if back >= 0 and kind not in ("plain", "conv") and not (spec.first_branch and s == 0):
                edges.add(((back, i), (s, i)))
            for target, source in spec.reads:
                wrote = s if source < i and spec.state != "restacked" else s - 1
                if target == i and wrote >= 0 and spec.layers[source] not in ("plain", "conv"):
                    edges.add(((wrote, source), (s, i)))
    return edges
