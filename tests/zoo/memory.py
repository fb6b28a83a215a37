"""Transformers with a memory between segments: Infini-attention, RMT, Transformer-XL."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from diagpass import SegmentLoop
from examples.transformer_xl import build as transformer_xl
from tests.zoo.case import VOCAB, Case, D, L, S, T, ids


class InfiniStep(nn.Module):
    """One segment: compressed memories go in and out, a (kv, norm) pair for each layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, memories: Any) -> tuple[Tensor, Any]:
        logits, _, memories = self.model(x, past_memories=memories, return_new_memories=True)
        return logits, memories


def infini(**options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    from infini_transformer_pytorch import InfiniTransformer

    model = InfiniTransformer(num_tokens=VOCAB, dim=D, depth=L, dim_head=8, heads=2, **options)
    return SegmentLoop(InfiniStep(model), T, carries_state=True), (ids(),)


class RmtStep(nn.Module):
    """One segment of the Recurrent Memory Transformer: write memories become the next read memories."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, memories: Any) -> tuple[Tensor, Any]:
        logits, memories, _ = self.model(x, memories)
        return logits, memories


def rmt(streams: int = 1) -> tuple[nn.Module, tuple[Any, ...]]:
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

    model = RecurrentMemoryTransformer(
        num_tokens=VOCAB,
        num_memory_tokens=2,
        dim=D,
        depth=L,
        causal=True,
        dim_head=8,
        heads=2,
        seq_len=T,
        num_residual_streams=streams,
    )
    return SegmentLoop(RmtStep(model), T, carries_state=True), (ids(),)


def txl() -> tuple[nn.Module, tuple[Any, ...]]:
    return transformer_xl(layers=L, segments=S, segment_size=T, d_model=D, heads=2)


CASES = [
    Case(
        name="Infini-Transformer",
        often=True,
        source="infini-transformer-pytorch, `InfiniTransformer`",
        state="a compressed key-value memory and its normaliser for each layer, returned",
        build=lambda: infini(use_mem_delta_rule=True, learned_delta_update=True),
        note="Its layers keep rotary tables in buffers that the first segment fills: one capture more.",
        needs=("infini_transformer_pytorch",),
    ),
    Case(
        name="Transformer-XL",
        source="examples/transformer_xl.py",
        state="each layer caches its input: what the layer below put out at the segment before",
        build=txl,
        # (s, l) needs (s, l-1) and (s-1, l-1), never (s-1, l): the longest path has L cells
        waves=lambda layers, segments: layers,
        note="Nothing leads from a layer to itself, so there are as many waves as layers.",
        float32_inside=True,
    ),
    Case(
        name="Recurrent Memory Transformer",
        often=True,
        source="recurrent-memory-transformer-pytorch, `RecurrentMemoryTransformer`",
        state="memory tokens leave the top layer and enter the bottom layer of the next segment",
        build=rmt,
        layers=2 * L,  # attention and feed-forward are residual blocks of one class
        waves=lambda layers, segments: layers * segments,
        refused="a chain leaves no width: output of model.layers.2.1 at segment 0 feeds model.layers.0.0",
        lifted_by="a memory that stays within its layer, as in ARMT",
        needs=("recurrent_memory_transformer_pytorch",),
    ),
]
