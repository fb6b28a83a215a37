"""The demo's model: a stack of layers, each with a state of its own, over a few segments."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["build"]


class Layer(nn.Module):
    """A gated recurrent layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.cell = nn.LayerNorm(width), nn.GRUCell(width, width)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """[batch, width] twice -> the new state, [batch, width]."""
        return self.cell(self.norm(x), state)


class Stack(nn.Module):
    """Layers over segments: the loop that the pass turns into waves."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, xs: Tensor) -> Tensor:
        """[segments, batch, width] -> the same."""
        states = [xs.new_zeros(xs.shape[1:]) for _ in self.layers]
        out = []
        for x in xs.unbind():
            for at, layer in enumerate(self.layers):
                states[at] = layer(x, states[at])
                x = x + states[at]
            out.append(x)
        return torch.stack(out)


def build(layers: int = 4, segments: int = 6, width: int = 64) -> tuple[Stack, tuple[Tensor]]:
    """A small model with random weights, in evaluation mode, and inputs for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Stack(layers, width).eval(), (torch.randn(segments, 2, width),)
