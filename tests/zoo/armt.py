"""ARMT, the wrapper of examples/armt.py, over causal language models of transformers as they ship."""

from __future__ import annotations

from typing import Any

from torch import nn

from diagpass import SegmentLoop
from examples import armt
from tests.zoo.case import VOCAB, Case, D, L, T, ids

M = 2  # memory tokens

FAMILIES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma": ("Gemma", {}),
    "gpt_neox": ("GPT-NeoX", {}),
    "mistral": ("Mistral, sliding window", {"sliding_window": 3}),
    "mixtral": ("Mixtral, mixture of experts", {"num_local_experts": 4}),
}
NOTES = {
    "mixtral": '`model.set_experts_implementation("batched_mm")`: the default, `grouped_mm`, has an '
    "operation without a batching rule (`aten.histc`), and its cells run one by one.",
}


def over(base: str, **config: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """An ARMT over a family's causal language model: one segment of it in a `SegmentLoop`."""
    lm = armt.causal_lm(base, L, D, 2, VOCAB, T + M, **config)
    if base == "mixtral":
        lm.set_experts_implementation("batched_mm")
    cell = armt.AssociativeMemoryCell(lm, num_mem_tokens=M, d_mem=4)
    for layer in cell.layers:
        nn.init.normal_(layer.W_mv.weight, std=0.005)  # zero at first, and would read as nothing
    return SegmentLoop(cell, T, reset="zero_mem"), (ids(),)


CASES = [
    Case(
        name=f"ARMT over {title}",
        source=f"transformers, `{base}`; the wrapper of examples/armt.py",
        state="each layer keeps an associative memory of its own",
        build=lambda base=base, config=config: over(base, **config),
        float32_inside=True,
        note=NOTES.get(base, ""),
    )
    for base, (title, config) in FAMILIES.items()
]
