"""Stacks of recurrent layers fed in chunks, a stack of ConvLSTMs, and a hybrid of different layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagpass import SegmentLoop
from tests.zoo.case import B, Case, D, L, S, T, tokens


class RnnStep(nn.Module):
    """A chunk through a stack of one-layer `nn.LSTM`s or `nn.GRU`s, with residuals."""

    def __init__(self, cls: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(cls(D, D, batch_first=True) for _ in range(L))

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = [None] * len(self.layers) if state is None else state
        new = []
        for layer, old in zip(self.layers, state, strict=True):
            y, last = layer(x, old)
            x = x + y
            new.append(last)
        return x, new


class ConvLSTMCell(nn.Module):
    """Shi et al. 2015, an LSTM of convolutions: `(x, (h, c)) -> (h, c)`, each [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gates = nn.Conv2d(2 * channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        h, c = (torch.zeros_like(x), torch.zeros_like(x)) if state is None else state
        i, f, o, g = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class ConvLSTM(nn.Module):
    """Frame by frame through a stack of ConvLSTM cells: x [B, 1, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ConvLSTMCell(channels) for _ in range(L))

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = [None] * len(self.layers) if state is None else state
        h, new = x[:, 0], []
        for layer, old in zip(self.layers, state, strict=True):
            h, c = layer(h, old)
            new.append((h, c))
        return h[:, None], new


class Recurrent(nn.Module):
    """A gated linear recurrence over the tokens, in the manner of RG-LRU, with its state as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.inp, self.gate, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.decay = nn.Parameter(torch.randn(D))
        self.state: Tensor | None = None

    def reset(self) -> None:
        self.state = None

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm(h)
        u, gate = self.inp(x), torch.sigmoid(self.gate(x))
        state = torch.zeros_like(u[:, 0]) if self.state is None else self.state
        rows = []
        for at in range(u.shape[1]):
            a = torch.exp(-8 * F.softplus(self.decay) * gate[:, at])
            state = a * state + (1 - a * a).sqrt() * u[:, at]
            rows.append(state)
        self.state = state
        return h + self.out(torch.stack(rows, 1))


class LocalAttention(nn.Module):
    """Attention to the segment and the one before it, whose keys and values are kept."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(D), heads
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.register_buffer("past", torch.zeros(2, B, T, D))

    def reset(self) -> None:
        self.past.zero_()

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        keys, values = torch.cat([self.past[0], k], 1), torch.cat([self.past[1], v], 1)
        self.past.copy_(torch.stack([k, v]))
        q, keys, values = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, keys, values))
        mask = torch.ones(T, 2 * T, dtype=torch.bool, device=h.device).tril(T)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        return h + self.out(y.transpose(1, 2).flatten(2))


class Hybrid(nn.Module):
    """Attention, recurrent, recurrent, attention, recurrent, recurrent: Griffin's order."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [LocalAttention, Recurrent, Recurrent] * 2
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def rnn(cls: type[nn.RNNBase]) -> tuple[nn.Module, tuple[Any, ...]]:
    return SegmentLoop(RnnStep(cls), T, carries_state=True), (tokens(),)


def conv_lstm() -> tuple[nn.Module, tuple[Any, ...]]:
    return SegmentLoop(ConvLSTM(3), 1, carries_state=True), (torch.randn(B, S, 3, 5, 5),)


def hybrid() -> tuple[nn.Module, tuple[Any, ...]]:
    return SegmentLoop(Hybrid(), T, reset="reset"), (tokens(),)


CASES = [
    Case(
        name="Stack of nn.LSTM",
        often=True,
        source="torch, `nn.LSTM` layers with residuals",
        state="(h, c) of each layer, returned",
        build=lambda: rnn(nn.LSTM),
    ),
    Case(
        name="Stack of nn.GRU",
        often=True,
        source="torch, `nn.GRU` layers with residuals",
        state="h of each layer, returned",
        build=lambda: rnn(nn.GRU),
    ),
    Case(
        name="ConvLSTM stack",
        often=True,
        source="tests/zoo/stacked.py",
        state="(h, c) maps of each layer, returned",
        build=conv_lstm,
    ),
    Case(
        name="Hybrid of attention and recurrence",
        often=True,
        source="tests/zoo/stacked.py, in the order of Griffin",
        state="last segment's keys and values in a buffer; a recurrent state in an attribute",
        build=hybrid,
        layers=6,
    ),
]
