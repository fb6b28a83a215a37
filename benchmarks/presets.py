"""Models to measure: Hugging Face Llamas with random weights under the ARMT wrapper of ``examples``.

In: a :class:`Preset`, a segment size. Out: a memory cell (one segment of an ARMT) and its token numbers. As
in the paper's measurements the head is the identity unless asked for, so that outputs are hidden states.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from examples.armt import AssociativeMemoryCell


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sizes of a Llama.

    Parameters
    ----------
    d_model, layers, heads, kv_heads, d_ff, vocab
        As in the paper's models.
    memory_tokens, d_mem
        Of the associative memory.
    """

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    d_ff: int
    vocab: int = 32000
    memory_tokens: int = 128
    d_mem: int = 64


PRESETS = {
    "160M": Preset(768, 12, 12, 12, 3072),
    "1B": Preset(2048, 16, 32, 8, 8192),
    "3B": Preset(3072, 28, 24, 8, 8192),
    "cpu": Preset(256, 8, 4, 4, 704, vocab=1000),
    "tiny": Preset(256, 8, 4, 4, 704, vocab=1000, memory_tokens=8, d_mem=16),
}


def make_llama(preset: Preset, tokens: int, device: str, dtype: torch.dtype, head: bool) -> LlamaForCausalLM:
    """A Llama that takes up to ``tokens`` tokens at a time; without ``head`` it returns hidden states."""
    config = LlamaConfig(
        hidden_size=preset.d_model,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        intermediate_size=preset.d_ff,
        vocab_size=preset.vocab,
        max_position_embeddings=tokens,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    if not head:
        model.lm_head = nn.Identity()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def make_cell(
    preset: Preset, segment_size: int, device: str, dtype: torch.dtype, head: bool = False, seed: int = 0
) -> AssociativeMemoryCell:
    """One segment of an ARMT, in evaluation mode, with weights from a fixed seed.

    Its memory is not at its initial zero, where it would read as nothing.
    """
    torch.manual_seed(seed)
    llama = make_llama(preset, segment_size + preset.memory_tokens, device, dtype, head)
    cell = AssociativeMemoryCell(llama, preset.memory_tokens, preset.d_mem)
    for layer in cell.layers:
        projection: Any = layer.W_mv
        nn.init.normal_(projection.weight, std=0.005)
    return cell.eval().requires_grad_(False)


def make_ids(preset: Preset, tokens: int, device: str, seed: int = 1) -> torch.Tensor:
    """Token numbers [1, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(preset.vocab, (1, tokens), generator=generator).to(device)


def flops(preset: Preset, segment_size: int, tokens: int, head: str = "none") -> float:
    """Matrix and attention operations of the model over all segments.

    Causal attention counts half of its square; memory tokens are included. ``head`` is ``"none"``, ``"all"``
    or ``"last"``: of no position, of all, or of the last one of each segment.
    """
    per_token = (
        2
        * preset.d_model
        * (
            2 * preset.d_model  # query and output projections
            + 2 * preset.d_model * preset.kv_heads // preset.heads
            + 3 * preset.d_ff
        )
    )
    keys = 6 * preset.d_mem
    total = 0.0
    for start in range(0, tokens, segment_size):
        length = min(segment_size, tokens - start) + preset.memory_tokens
        attention = 2 * 2 * preset.d_model * length * length / 2
        read = 2 * length * (preset.d_model * preset.d_mem + keys * preset.d_model)
        write = 2 * preset.memory_tokens * preset.d_model * (preset.d_mem + preset.d_model + 2 * keys)
        total += preset.layers * (length * per_token + attention + (read if start else 0) + write)
        positions = {"none": 0, "all": length - preset.memory_tokens, "last": 1}[head]
        total += 2 * positions * preset.d_model * preset.vocab
    return total
