"""RMT, the recurrent memory transformer, over an unmodified Hugging Face causal LM.

Bulatov et al. 2022, "Recurrent Memory Transformer" (arXiv 2207.06881). Memory tokens stand before
each segment, to be read, and after it, to be written: ``[memory; tokens; memory]``. What the *top*
layer makes of the written ones is the memory that enters the *bottom* layer with the next segment.
So the first layer of a segment waits for the last layer of the segment before: a chain, and no two
cells are independent. `MemoryCell` and `RecurrentWrapper` are named as in the published code.

>>> model, inputs = build(layers=2, segments=3, batch=2, segment_size=8)
>>> tuple(model(*inputs).logits.shape)
(2, 24, 97)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

from examples.armt import cast_parameters, causal_lm, cut, next_token_loss


class MemoryCell(nn.Module):
    """One segment: a causal LM between memory tokens to read and memory tokens to write.

    Parameters
    ----------
    base_model
        A Hugging Face causal LM, unmodified, of width D.
    num_mem_tokens
        M, on either side of the segment.

    Attributes
    ----------
    memory
        Parameter [M, D]: the memory that the first segment reads.
    """

    memory: Tensor

    def __init__(self, base_model: PreTrainedModel, num_mem_tokens: int) -> None:
        super().__init__()
        if num_mem_tokens < 1:
            raise ValueError(f"num_mem_tokens must be at least 1, got {num_mem_tokens}")
        self.model = base_model
        self.num_mem_tokens = num_mem_tokens
        embeddings = base_model.get_input_embeddings().weight
        memory = torch.randn(
            num_mem_tokens, embeddings.shape[-1], dtype=embeddings.dtype, device=embeddings.device
        )
        self.memory = nn.Parameter(memory * embeddings.detach().std())

    def forward(
        self,
        input_ids: Tensor,
        memory_state: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[CausalLMOutputWithCrossAttentions, Tensor]:
        """Run one segment.

        Parameters
        ----------
        input_ids
            [B, T] token numbers.
        memory_state
            [B, M, D] memory that the segment before has written; None for the first segment.
        attention_mask
            [B, T], 1 for tokens to attend to.
        output_hidden_states
            Return the hidden states, too: layers + 1 tensors [B, T, D].

        Returns
        -------
        The outputs, ``logits`` [B, T, vocabulary] among them, and the memory written [B, M, D].
        """
        if memory_state is None:
            memory_state = self.memory.repeat(input_ids.shape[0], 1, 1)
        out = self.model(**self.process_input(input_ids, memory_state, attention_mask))
        return self.process_output(out, output_hidden_states)

    def process_input(
        self, input_ids: Tensor, memory_state: Tensor, attention_mask: Tensor | None
    ) -> dict[str, Any]:
        """Embed the tokens and put the memory on both sides: the base model's arguments."""
        embeds = self.model.get_input_embeddings()(input_ids)
        if attention_mask is not None:
            seen = attention_mask.new_ones(input_ids.shape[0], self.num_mem_tokens)
            attention_mask = torch.cat([seen, attention_mask, seen], dim=1)
        return {
            "inputs_embeds": torch.cat([memory_state, embeds, memory_state], dim=1),
            "attention_mask": attention_mask,
            "use_cache": False,
            "output_hidden_states": True,
        }

    def process_output(
        self, model_outputs: Any, output_hidden_states: bool
    ) -> tuple[CausalLMOutputWithCrossAttentions, Tensor]:
        """Split the base model's outputs into those of the tokens and the memory written."""
        tokens = slice(self.num_mem_tokens, -self.num_mem_tokens)
        memory_state = model_outputs.hidden_states[-1][:, -self.num_mem_tokens :]
        out = CausalLMOutputWithCrossAttentions()
        out["logits"] = model_outputs.logits[:, tokens]
        if output_hidden_states:
            out["hidden_states"] = [hidden[:, tokens] for hidden in model_outputs.hidden_states]
        return out, memory_state


class RecurrentWrapper(nn.Module):
    """The segment loop around a `MemoryCell`.

    Parameters
    ----------
    memory_cell
        Runs one segment.
    segment_size
        Tokens in a segment, memory tokens not counted; the last segment may be shorter.
    """

    def __init__(self, memory_cell: MemoryCell, segment_size: int) -> None:
        super().__init__()
        self.memory_cell = memory_cell
        self.segment_size = segment_size

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> CausalLMOutputWithCrossAttentions:
        """Run all segments in turn, handing the memory on.

        Parameters
        ----------
        input_ids, labels, attention_mask
            [B, N]; labels are shifted here by one, and -100 is ignored.
        output_hidden_states
            Return hidden states, too.

        Returns
        -------
        A mapping with ``logits`` [B, N, vocabulary]; ``loss`` if there are labels;
        ``hidden_states``, a tuple of layers + 1 tensors [B, N, D], if asked for.
        """
        memory_state = None
        cell_outputs = []
        for segment in cut(self.segment_size, input_ids=input_ids, attention_mask=attention_mask):
            cell_out, memory_state = self.memory_cell(
                **segment, memory_state=memory_state, output_hidden_states=output_hidden_states
            )
            cell_outputs.append(cell_out)
        out = CausalLMOutputWithCrossAttentions()
        logits = torch.cat([o["logits"] for o in cell_outputs], dim=1)
        if labels is not None:
            out["loss"] = next_token_loss(logits, labels)
        out["logits"] = logits
        if output_hidden_states:
            per_layer = zip(*[o["hidden_states"] for o in cell_outputs], strict=True)
            out["hidden_states"] = tuple(torch.cat(segments, dim=1) for segments in per_layer)
        return out


def wrap(base_model: PreTrainedModel, segment_size: int, num_mem_tokens: int = 4) -> RecurrentWrapper:
    """Make an RMT of any Hugging Face causal LM."""
    return RecurrentWrapper(MemoryCell(base_model, num_mem_tokens), segment_size)


def build(
    base: str = "llama",
    layers: int = 4,
    segments: int = 6,
    batch: int = 2,
    segment_size: int = 16,
    d_model: int = 64,
    heads: int = 4,
    num_mem_tokens: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocab: int = 97,
) -> tuple[RecurrentWrapper, tuple[Tensor]]:
    """Make a small RMT with random weights, in evaluation mode, and inputs for it.

    Weights and random state as in `examples.armt.build`.

    Returns
    -------
    The model and its positional inputs ``(input_ids [batch, segments * segment_size],)``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = causal_lm(base, layers, d_model, heads, vocab, segment_size + 2 * num_mem_tokens)
        model = wrap(lm, segment_size, num_mem_tokens)
        input_ids = torch.randint(vocab, (batch, segments * segment_size))
    cast_parameters(model, dtype)
    return model.eval(), (input_ids,)
