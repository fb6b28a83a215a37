"""ARMT, the associative recurrent memory transformer, over an unmodified Hugging Face causal LM.

Rodkin et al. 2024, "Associative Recurrent Memory Transformer" (arXiv 2407.04841). The input is cut
into segments. Memory tokens are appended to each, and every decoder layer owns an associative
memory: what the layer makes of the memory tokens is written to it (delta rule, DPFP keys), and
every token of the next segment reads from it before it enters the layer. A layer's memory feeds
only that same layer at the next segment, which is what makes waves possible.

Names, parameters, state and loop follow the published implementation, so that its checkpoints
load: `AssociativeLayerWrapper` around each decoder layer, `AssociativeMemoryCell` for one segment,
`AssociativeRecurrentWrapper` for the loop. Not taken over: adaptive computation time, sliding
windows, attention sinks and extra position embeddings for the memory tokens.

Shape letters: B batch, T tokens that enter a layer, M memory tokens, D model width, H memory heads,
K key features of a head (``2 * nu * d_mem / H``), V values of a head (``D / H``).

>>> model, inputs = build(layers=2, segments=3, batch=2, segment_size=8)
>>> tuple(model(*inputs).logits.shape)
(2, 24, 97)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

EPSILON = 1e-5


class DPFP:
    """Deterministic parameter-free projection (Schlag et al. 2021, arXiv 2102.11174, section 5.3).

    Maps ``[..., d]`` to ``[..., 2 * nu * d]`` non-negative features: products of the two rectified
    halves with themselves, rolled by ``1 .. nu`` places.
    """

    def __init__(self, nu: int = 3) -> None:
        self.nu = nu

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., 2 * nu * d]."""
        x = torch.cat([F.relu(x), F.relu(-x)], dim=-1)
        rolled = torch.cat([x.roll(shifts=j, dims=-1) for j in range(1, self.nu + 1)], dim=-1)
        return torch.cat([x] * self.nu, dim=-1) * rolled


class AssociativeLayerWrapper(nn.Module):
    """One decoder layer with an associative memory (section 3 of the paper).

    Parameters
    ----------
    layer
        The decoder layer. Its first positional argument is the hidden states; it returns hidden
        states, or a tuple that begins with them.
    d_model
        Width D of the hidden states.
    num_mem_tokens
        M; the last M hidden states that the layer returns are written to the memory.
    d_mem
        Width of queries and keys before the feature map.
    n_heads
        Memory heads H; divides `d_mem` and `d_model`.
    correction
        Add only the part of a key to the normaliser that it does not hold yet.
    info
        Anything; kept as an attribute.
    use_denom
        Normalise what is read by ``z``, the sum of the keys written.
    gating
        One write strength per value instead of one per head.

    Attributes
    ----------
    W_mem, z
        The memory ``[B, H, K, V]`` and its normaliser ``[B, H, K]``: plain tensors that `forward`
        reassigns. Their batch is 1 until the first write.
    first_seg
        True until the first write: there is nothing to read yet.
    seg_num
        Number of segments written since `zero_mem`.
    generate_mode
        True to read from the memory without writing to it.
    """

    W_mem: Tensor
    z: Tensor

    def __init__(
        self,
        layer: nn.Module,
        d_model: int,
        num_mem_tokens: int,
        d_mem: int,
        n_heads: int = 1,
        correction: bool = True,
        info: Any = None,
        use_denom: bool = True,
        gating: bool = False,
    ) -> None:
        super().__init__()
        if num_mem_tokens < 1:
            raise ValueError(f"num_mem_tokens must be at least 1, got {num_mem_tokens}")
        if d_mem % n_heads or d_model % n_heads:
            raise ValueError(f"n_heads={n_heads} must divide d_mem={d_mem} and d_model={d_model} evenly")
        self.info = info
        self.d_model = d_model
        self.num_mem_tokens = num_mem_tokens
        self.d_mem = d_mem
        self.n_heads = n_heads
        self.correction = correction
        self.use_denom = use_denom
        self.gating = gating
        self.generate_mode = False
        self.phi = DPFP(nu=3)
        self.d_key = 2 * self.phi.nu * d_mem

        like = next(layer.parameters())
        place = {"dtype": like.dtype, "device": like.device}
        self.W_mq = nn.Linear(d_model, d_mem, bias=False, **place)
        self.W_mk = nn.Linear(d_model, d_mem, bias=False, **place)
        self.W_mv = nn.Linear(d_model, d_model, bias=False, **place)
        self.W_mb = nn.Linear(d_model, d_model if gating else n_heads, **place)
        # an untrained memory reads as nothing: training starts from the plain language model
        nn.init.zeros_(self.W_mv.weight)
        self.layer = layer
        # some base models ask a layer for its type, to choose between their attention masks
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.zero_mem()

    def zero_mem(self) -> None:
        """Forget everything: an empty memory and a first segment to come."""
        like = self.W_mv.weight
        d_key, d_value = self.d_key // self.n_heads, self.d_model // self.n_heads
        self.W_mem = torch.zeros(1, self.n_heads, d_key, d_value, dtype=like.dtype, device=like.device)
        if self.use_denom:
            self.z = torch.zeros(1, self.n_heads, d_key, dtype=like.dtype, device=like.device)
        self.first_seg = True
        self.seg_num = 0

    def freeze_mem(self) -> None:
        """Take the memory's own weights out of training."""
        for projection in (self.W_mq, self.W_mk, self.W_mv, self.W_mb):
            projection.requires_grad_(False)

    def _to_heads(self, x_BTD: Tensor) -> Tensor:
        """[B, T, H * d] -> [B, H, T, d]."""
        return x_BTD.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def _from_heads(self, x_BHTV: Tensor) -> Tensor:
        """[B, H, T, d] -> [B, T, H * d]."""
        return x_BHTV.transpose(1, 2).flatten(2)

    def _features(self, x: Tensor) -> Tensor:
        """Queries or keys [B, T, d_mem] -> unit-length features [B, H, T, K]."""
        return F.normalize(self.phi(self._to_heads(x)), dim=-1, p=2.0)

    def _read(self, keys_BHTK: Tensor) -> tuple[Tensor, Tensor | None]:
        """Look keys up: values [B, H, T, V] and normalisers [B, H, T, 1], None without `use_denom`.

        `zero_mem` may lie before a move of the module to another dtype or device; plain attributes
        do not move with it.
        """
        values = torch.einsum("bhtk,bhkv->bhtv", keys_BHTK, self.W_mem.to(keys_BHTK))
        if not self.use_denom:
            return values, None
        denom = torch.einsum("bhk,bhtk->bht", self.z.to(keys_BHTK), keys_BHTK)[..., None] + EPSILON
        return values / denom, denom

    def associate(self, hidden_states: Tensor) -> Tensor:
        """Read the memory for every token: [B, T, D] -> [B, T, D]."""
        values, _ = self._read(self._features(self.W_mq(hidden_states)))
        return self._from_heads(values)

    def update_mem(self, mem_tokens: Tensor) -> None:
        """Write the memory tokens [B, M, D] by the delta rule: replace what their keys hold."""
        keys = self._features(self.W_mk(mem_tokens))
        values = self._to_heads(self.W_mv(mem_tokens))
        strength = self._to_heads(torch.sigmoid(self.W_mb(mem_tokens)))  # [B, H, M, 1 or V]
        new_keys = keys
        if not self.first_seg:
            known, denom = self._read(keys)
            values = values - known
            if denom is not None and self.correction:
                length = torch.linalg.norm(keys, dim=-1, keepdim=True) ** 2
                new_keys = keys * torch.clip(1 - denom / length, 0, 1).detach()
        written = torch.einsum("bhmk,bhmv->bhkv", keys, strength * values)
        self.W_mem = self.W_mem.to(written) + written
        if self.use_denom:
            self.z = self.z.to(written) + new_keys.sum(dim=-2)
        self.seg_num += 1

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Read, run the layer, write.

        Parameters
        ----------
        hidden_states
            [B, T, D], the last M of the T tokens being memory tokens.
        *args, **kwargs
            Passed to the layer as they are.

        Returns
        -------
        What the layer returns: hidden states [B, T, D], or a tuple that begins with them.
        """
        if not self.first_seg:
            hidden_states = hidden_states + self.associate(hidden_states)
        # positionally: transformers' output hooks look for the hidden states in args[0]
        out = self.layer(hidden_states, *args, **kwargs)
        if not self.generate_mode:
            hidden = out[0] if isinstance(out, tuple) else out
            self.update_mem(hidden[:, -self.num_mem_tokens :])
            self.first_seg = False
        return out


def decoder_layers(model: nn.Module, layers_attr: str | None = None) -> nn.ModuleList:
    """Find the list of decoder layers of a causal LM: the `ModuleList` with most parameters.

    Parameters
    ----------
    model
        Any module.
    layers_attr
        The list's dotted path in `model`, instead of the search.

    Raises
    ------
    ValueError
        If there is no such list.
    """
    if layers_attr is not None:
        found = model.get_submodule(layers_attr)
        if not isinstance(found, nn.ModuleList):
            raise ValueError(f"{layers_attr!r} is a {type(found).__name__}, expected a ModuleList")
        return found
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"{type(model).__name__} holds no ModuleList of decoder layers")
    return max(lists, key=lambda modules: sum(p.numel() for p in modules.parameters()))


class AssociativeMemoryCell(nn.Module):
    """One segment: a causal LM whose decoder layers are wrapped, and the memory tokens.

    The layers are wrapped in place in `base_model`. They keep their memories from call to call
    until `zero_mem`.

    Parameters
    ----------
    base_model
        A Hugging Face causal LM, unmodified.
    num_mem_tokens
        M, appended to the end of the segment.
    d_mem
        Width of the memory's queries and keys.
    layers_attr
        Dotted path of the list of decoder layers; found by `decoder_layers` unless given.
    n_heads, correction, use_denom, gating
        See `AssociativeLayerWrapper`.
    freeze_mem
        Take the memory's own weights out of training.

    Attributes
    ----------
    memory
        Parameter [M, D].
    layers
        The wrapped layers; the same list as in the base model. As in the published code it is
        registered, so `state_dict` names the layers' weights twice.
    """

    memory: Tensor

    def __init__(
        self,
        base_model: PreTrainedModel,
        num_mem_tokens: int,
        d_mem: int,
        layers_attr: str | None = None,
        n_heads: int = 1,
        correction: bool = True,
        use_denom: bool = True,
        gating: bool = False,
        freeze_mem: bool = False,
    ) -> None:
        super().__init__()
        self.model = base_model
        self.num_mem_tokens = num_mem_tokens
        self.d_mem = d_mem
        embeddings = base_model.get_input_embeddings().weight
        self.d_model = embeddings.shape[-1]
        self.layers = decoder_layers(base_model, layers_attr)
        for at, layer in enumerate(self.layers):
            self.layers[at] = AssociativeLayerWrapper(
                layer,
                self.d_model,
                num_mem_tokens,
                d_mem,
                n_heads=n_heads,
                correction=correction,
                info={"layer": at},
                use_denom=use_denom,
                gating=gating,
            )
            if freeze_mem:
                self.layers[at].freeze_mem()
        memory = torch.randn(num_mem_tokens, self.d_model, dtype=embeddings.dtype, device=embeddings.device)
        self.memory = nn.Parameter(memory * embeddings.detach().std())

    def zero_mem(self) -> None:
        """Empty the memory of every layer."""
        for layer in self.layers:
            layer.zero_mem()

    def generate_mode(self, is_on: bool) -> None:
        """Stop (True) or allow (False) writing to the memories."""
        for layer in self.layers:
            layer.generate_mode = is_on

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        zero_mem: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """Run one segment; the memories carry over to the next call.

        Parameters
        ----------
        input_ids
            [B, T] token numbers of the segment.
        labels
            [B, T], shifted here by one; -100 is ignored.
        attention_mask
            [B, T], 1 for tokens to attend to.
        output_hidden_states
            Return the hidden states, too. The first of them is what entered the first wrapped
            layer, that is, the embeddings with what was read from memory added.
        zero_mem
            Empty the memories first.
        **kwargs
            Passed to the base model.

        Returns
        -------
        A mapping with ``logits`` [B, T, vocabulary]; ``hidden_states``, a list of layers + 1
        tensors [B, T, D], if asked for; ``ce_loss`` if there are labels.
        """
        if zero_mem:
            self.zero_mem()
        seg_kwargs = self.process_input(
            input_ids, attention_mask, output_hidden_states=output_hidden_states, **kwargs
        )
        out = self.model(**seg_kwargs)
        return self.process_output(out, labels, output_hidden_states)

    def process_input(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Embed the tokens and append the memory tokens: the base model's keyword arguments."""
        embeds = self.model.get_input_embeddings()(input_ids)
        memory = self.memory.repeat(input_ids.shape[0], 1, 1)
        if attention_mask is not None:
            seen = attention_mask.new_ones(input_ids.shape[0], self.num_mem_tokens)
            attention_mask = torch.cat([attention_mask, seen], dim=1)
        return {
            "inputs_embeds": torch.cat([embeds, memory], dim=1),
            "attention_mask": attention_mask,
            "use_cache": False,
            **kwargs,
        }

    def process_output(
        self, model_outputs: Any, labels: Tensor | None, output_hidden_states: bool
    ) -> CausalLMOutputWithCrossAttentions:
        """Cut the memory tokens off the base model's outputs and compute the segment's loss."""
        out = CausalLMOutputWithCrossAttentions()
        out["logits"] = model_outputs.logits[:, : -self.num_mem_tokens]
        if output_hidden_states:
            out["hidden_states"] = [
                hidden[:, : -self.num_mem_tokens] for hidden in model_outputs.hidden_states
            ]
        # one token alone has nothing to predict
        if labels is not None and labels.shape[1] > 1:
            out["ce_loss"] = next_token_loss(out["logits"], labels)
        return out

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        zero_mem: bool = False,
        **generate_kwargs: Any,
    ) -> Tensor:
        """Continue a segment [B, T] by the base model's `generate`, reading the memories only.

        Returns the new tokens alone, [B, new tokens].
        """
        if zero_mem:
            self.zero_mem()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self.generate_mode(True)
        try:
            return self.model.generate(
                inputs_embeds=self.model.get_input_embeddings()(input_ids),
                attention_mask=attention_mask,
                **generate_kwargs,
            )
        finally:
            self.generate_mode(False)


class AssociativeRecurrentWrapper(nn.Module):
    """The segment loop around an `AssociativeMemoryCell`.

    Parameters
    ----------
    memory_cell
        Runs one segment.
    segment_size
        Tokens in a segment, memory tokens not counted; the last segment may be shorter.
    """

    def __init__(self, memory_cell: AssociativeMemoryCell, segment_size: int) -> None:
        super().__init__()
        if segment_size < 1:
            raise ValueError(f"segment_size must be at least 1, got {segment_size}")
        self.memory_cell = memory_cell
        self.segment_size = segment_size

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        zero_mem: bool = True,
    ) -> CausalLMOutputWithCrossAttentions:
        """Run all segments in turn.

        Parameters
        ----------
        input_ids
            [B, N] token numbers.
        labels
            [B, N], shifted here by one; -100 is ignored.
        attention_mask
            [B, N], 1 for tokens to attend to.
        output_hidden_states
            Return hidden states, too.
        zero_mem
            Begin with empty memories; False to carry on from the last call.

        Returns
        -------
        A mapping with ``logits`` [B, N, vocabulary]; ``loss`` and ``ce_loss`` (the same scalar) if
        there are labels; ``hidden_states``, a tuple of layers + 1 tensors [B, N, D], if asked for;
        and each segment's own entries, with ``_0``, ``_1``, ... after their names.
        """
        if zero_mem:
            self.memory_cell.zero_mem()
        cell_outputs = []
        for segment in self.segment(input_ids=input_ids, labels=labels, attention_mask=attention_mask):
            cell_out = self.memory_cell(**segment, output_hidden_states=output_hidden_states)
            cell_outputs.append(cell_out)
        return self.process_outputs(cell_outputs, labels, output_hidden_states)

    def segment(self, **tensors: Tensor | None) -> list[dict[str, Tensor]]:
        """Cut tensors [B, N] into segments: for each segment, name -> [B, at most segment_size]."""
        return cut(self.segment_size, **tensors)

    def process_outputs(
        self,
        cell_outputs: list[CausalLMOutputWithCrossAttentions],
        labels: Tensor | None,
        output_hidden_states: bool,
    ) -> CausalLMOutputWithCrossAttentions:
        """Join what the segments returned, and list it segment by segment."""
        out = CausalLMOutputWithCrossAttentions()
        logits = torch.cat([o["logits"] for o in cell_outputs], dim=1)
        if labels is not None:
            out["loss"] = next_token_loss(logits, labels)
            out["ce_loss"] = out["loss"]
        out["logits"] = logits
        if output_hidden_states:
            per_layer = zip(*[o["hidden_states"] for o in cell_outputs], strict=True)
            out["hidden_states"] = tuple(torch.cat(segments, dim=1) for segments in per_layer)
        for seg_num, cell_out in enumerate(cell_outputs):
            for key, value in cell_out.items():
                out[f"{key}_{seg_num}"] = value
        return out

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **generate_kwargs: Any
    ) -> Tensor:
        """Read all segments of a prompt [B, N] but the last, then continue the last one.

        Returns the new tokens alone, [B, new tokens].
        """
        self.memory_cell.zero_mem()
        *segments, last = self.segment(input_ids=input_ids, attention_mask=attention_mask)
        for segment in segments:
            self.memory_cell(**segment)
        return self.memory_cell.generate(**last, **generate_kwargs)


def cut(segment_size: int, **tensors: Tensor | None) -> list[dict[str, Tensor]]:
    """Cut tensors [B, N] along their tokens: for each segment, name -> [B, at most segment_size].

    What is None is left out.
    """
    parts = {k: t.split(segment_size, dim=1) for k, t in tensors.items() if t is not None}
    return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits [B, N, vocabulary] for labels [B, N], shifted by one token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def causal_lm(
    base: str,
    layers: int,
    d_model: int,
    heads: int,
    vocab: int,
    positions: int,
    **config_options: Any,
) -> PreTrainedModel:
    """Make a small causal LM with random float32 weights from nothing but its configuration.

    Parameters
    ----------
    base
        A `model_type` of transformers: "llama", "gpt2", "qwen2", "mistral", "gpt_neox", ...
    layers, d_model, heads, vocab, positions
        Decoder layers, width, attention heads, vocabulary and most tokens at a time.
    **config_options
        More settings of the family's configuration.
    """
    config = AutoConfig.for_model(
        base,
        num_hidden_layers=layers,
        hidden_size=d_model,
        num_attention_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
        # families differ in whether they have these; where they do, the defaults are far too large
        **{
            name: value
            for name, value in {
                "intermediate_size": 2 * d_model,
                "num_key_value_heads": heads,
                "head_dim": d_model // heads,
            }.items()
            if hasattr(AutoConfig.for_model(base), name)
        },
        **config_options,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place, and leave its buffers, as loading a checkpoint does.

    A rotary embedding keeps its frequencies in float32 that way, whatever the dtype.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def wrap(
    base_model: PreTrainedModel,
    segment_size: int,
    num_mem_tokens: int = 4,
    d_mem: int = 8,
    **cell_options: Any,
) -> AssociativeRecurrentWrapper:
    """Make an ARMT of any Hugging Face causal LM, whose decoder layers are wrapped in place.

    `cell_options` are those of `AssociativeMemoryCell`.
    """
    cell = AssociativeMemoryCell(base_model, num_mem_tokens, d_mem, **cell_options)
    return AssociativeRecurrentWrapper(cell, segment_size)


def build(
    base: str = "llama",
    layers: int = 4,
    segments: int = 6,
    batch: int = 2,
    segment_size: int = 16,
    d_model: int = 64,
    heads: int = 4,
    num_mem_tokens: int = 4,
    d_mem: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocab: int = 97,
    **cell_options: Any,
) -> tuple[AssociativeRecurrentWrapper, tuple[Tensor]]:
    """Make a small ARMT with random weights, in evaluation mode, and inputs for it.

    The weights are drawn in float32 and then cast, so they are the same in every dtype up to its
    rounding. The global random state is left as it was. Arguments are those of `causal_lm` and
    `AssociativeMemoryCell`.

    Returns
    -------
    The model and its positional inputs ``(input_ids [batch, segments * segment_size],)``.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = causal_lm(base, layers, d_model, heads, vocab, segment_size + num_mem_tokens)
        model = wrap(lm, segment_size, num_mem_tokens, d_mem, **cell_options)
        for layer in model.memory_cell.layers:
            # At its initial zero a memory would read as nothing. Much larger than this, and random
            # layers amplify rounding by a factor of 1e3 and more over a few segments.
            nn.init.normal_(layer.W_mv.weight, std=0.005)
        input_ids = torch.randint(vocab, (batch, segments * segment_size))
    cast_parameters(model, dtype)
    model.memory_cell.zero_mem()
    return model.eval(), (input_ids,)
