"""ARMT, the wrapper of examples/armt.py, over causal language models of transformers as they ship."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diagpass import SegmentLoop

from examples import armt
from tests.zoo.case import D, L, S, T, VOCAB, Case

FAMILIES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gpt_neox": "GPT-NeoX",
    "mistral": "Mistral, sliding window",
    "mixtral": "Mixtral, mixture of experts",
}


def over(base: str, **options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """An ARMT over a family's causal language model: one segment of it in a `SegmentLoop`."""
    model, inputs = armt.build(
        base,
        layers=L,
        segments=S,
        batch=2,
        segment_size=T,
        d_model=D,
        heads=2,
        num_mem_tokens=2,
        d_mem=4,
        vocab=VOCAB,
        **options,
    )
    return SegmentLoop(model.memory_cell, T, reset="zero_mem"), inputs


CASES = [
    Case(
        name=f"ARMT over {title}",
        source=f"transformers, `{base}`; the wrapper of examples/armt.py",
        state="each layer keeps an associative memory of its own",
        build=lambda base=base: over(base),
        float32_inside=True,
        dtype=torch.float32 if base == "mixtral" else torch.float64,
    )
    for base, title in FAMILIES.items()
]
