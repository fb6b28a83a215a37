"""Streaming speech encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diagpass import SegmentLoop
from tests.zoo.case import Case, D, L, T, tokens


class EmformerStep(nn.Module):
    """One segment through `Emformer.infer`, without right context."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, states: Any) -> tuple[Tensor, Any]:
        lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
        y, _, states = self.model.infer(x, lengths, states)
        return y, states


def emformer() -> tuple[nn.Module, tuple[Any, ...]]:
    from torchaudio.models import Emformer

    model = Emformer(D, 2, 2 * D, L, T, left_context_length=T, max_memory_size=2)
    return SegmentLoop(EmformerStep(model), T, carries_state=True), (tokens(),)


CASES = [
    Case(
        name="Emformer",
        often=True,
        source="torchaudio, `Emformer.infer`",
        state="memory, left-context keys and values, and the length so far, for each layer, returned",
        build=emformer,
        refused="a number is read from a tensor",
        lifted_by="the length so far as a Python number; it is read from the state by `.item()`",
        needs=("torchaudio",),
    ),
]
