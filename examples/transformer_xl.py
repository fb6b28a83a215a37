"""Transformer-XL: segments that attend to the cached hidden states of the segment before.

Dai et al. 2019, "Transformer-XL: Attentive Language Models beyond a Fixed-Length Context" (arXiv
1901.02860). Layer l at segment s attends to its own input and to the input it had at segment s - 1,
which is what layer l - 1 put out there. So cell (s, l) needs cells (s, l - 1) and (s - 1, l - 1)
and never (s - 1, l): nothing leads from a layer to itself, and the longest path through the grid
has as many cells as there are layers, however many segments.

Shape letters: B batch, T tokens of a segment, P tokens in the memory, K = P + T, N tokens in all, H
heads, E width of a head, D = H * E.

>>> model, inputs = build(layers=2, segments=3, batch=2, segment_size=8)
>>> logits, mems = model(*inputs)
>>> tuple(logits.shape), len(mems), tuple(mems[0].shape)
((2, 24, 97), 2, (2, 8, 64))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sinusoids(length: int, like: Tensor) -> Tensor:
    """Sinusoidal encodings of the distances ``length - 1, ..., 1, 0``.

    Returns [length, D], with the width, dtype and device of `like` [..., D], D even.
    """
    width = like.shape[-1]
    distance = torch.arange(length - 1, -1, -1, dtype=torch.float32, device=like.device)
    step = torch.arange(0, width, 2, dtype=torch.float32, device=like.device)
    angle = distance[:, None] * 10000 ** (-step / width)
    return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


def relative_shift(x_BHTK: Tensor) -> Tensor:
    """Turn scores by distance into scores by key (appendix B of the paper).

    Column c of the argument belongs to distance ``K - 1 - c``, in every row. Column j of the result
    belongs to key j, which query i (the i-th of the last T positions) sees at distance
    ``K - T + i - j``. Entries for keys after the query are meaningless; mask them.
    """
    batch, heads, rows, columns = x_BHTK.shape
    padded = torch.cat([x_BHTK.new_zeros(batch, heads, rows, 1), x_BHTK], dim=-1)
    return padded.reshape(batch, heads, columns + 1, rows)[:, :, 1:].reshape(x_BHTK.shape)


class RelativeAttention(nn.Module):
    """Causal attention with relative positions (section 3.3 of the paper).

    The score of query i and key j is ``(q_i + u) k_j + (q_i + v) W_kr r_(i - j)``, with learned
    ``u`` and ``v`` and sinusoidal ``r``.

    Parameters
    ----------
    d_model
        Width D.
    heads
        H; divides `d_model`.
    """

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        if d_model % heads:
            raise ValueError(f"heads={heads} must divide d_model={d_model} evenly")
        self.heads = heads
        self.scale = (d_model // heads) ** -0.5
        self.W_q = nn.Linear(d_model, d_model, bias=False)
        self.W_ke = nn.Linear(d_model, d_model, bias=False)
        self.W_v = nn.Linear(d_model, d_model, bias=False)
        self.W_kr = nn.Linear(d_model, d_model, bias=False)
        self.W_o = nn.Linear(d_model, d_model, bias=False)
        self.u = nn.Parameter(0.02 * torch.randn(heads, d_model // heads))
        self.v = nn.Parameter(0.02 * torch.randn(heads, d_model // heads))

    def forward(self, h: Tensor, context: Tensor, r: Tensor, future: Tensor) -> Tensor:
        """Attend from the segment to the memory and the segment.

        Parameters
        ----------
        h
            The segment [B, T, D].
        context
            The memory, then the segment: [B, K, D].
        r
            Encodings [K, D] of the distances K - 1, ..., 0.
        future
            Booleans [T, K], True where a query must not look.

        Returns
        -------
        [B, T, D].
        """
        q_BTHE = self.W_q(h).unflatten(-1, (self.heads, -1))
        k_BKHE = self.W_ke(context).unflatten(-1, (self.heads, -1))
        v_BKHE = self.W_v(context).unflatten(-1, (self.heads, -1))
        r_KHE = self.W_kr(r).unflatten(-1, (self.heads, -1))
        content = torch.einsum("bthe,bkhe->bhtk", q_BTHE + self.u, k_BKHE)
        position = relative_shift(torch.einsum("bthe,khe->bhtk", q_BTHE + self.v, r_KHE))
        scores = ((content + position) * self.scale).masked_fill(future, float("-inf"))
        mixed = torch.einsum("bhtk,bkhe->bthe", scores.softmax(dim=-1), v_BKHE)
        return self.W_o(mixed.flatten(2))


class TransformerXLLayer(nn.Module):
    """Relative attention and a feed-forward block, each with a residual and then a norm.

    Parameters
    ----------
    d_model, heads
        See `RelativeAttention`.
    d_ff
        Inner width of the feed-forward block.
    """

    def __init__(self, d_model: int, heads: int, d_ff: int) -> None:
        super().__init__()
        self.attn = RelativeAttention(d_model, heads)
        self.norm_attn = nn.LayerNorm(d_model)
        self.ff = nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))
        self.norm_ff = nn.LayerNorm(d_model)

    def forward(self, h: Tensor, mem: Tensor | None, r: Tensor, future: Tensor) -> Tensor:
        """Run the layer on a segment [B, T, D] -> [B, T, D].

        `mem` [B, P, D] is what entered this layer before, None at the first segment; `r` and
        `future` are as in `RelativeAttention.forward`.
        """
        context = h if mem is None else torch.cat([mem, h], dim=1)
        h = self.norm_attn(h + self.attn(h, context, r, future))
        return self.norm_ff(h + self.ff(h))


class TransformerXL(nn.Module):
    """A language model over segments, with a memory of `mem_len` hidden states for each layer.

    Parameters
    ----------
    vocab
        Vocabulary.
    layers, d_model, heads, d_ff
        Number and sizes of the layers, see `TransformerXLLayer`.
    segment_size
        Tokens in a segment; the last may be shorter.
    mem_len
        The most hidden states that a layer remembers. More than `segment_size` of them reach back
        further than one segment.
    """

    def __init__(
        self,
        vocab: int,
        layers: int,
        d_model: int,
        heads: int,
        d_ff: int,
        segment_size: int,
        mem_len: int,
    ) -> None:
        super().__init__()
        if segment_size < 1 or mem_len < 1:
            raise ValueError(f"segment_size and mem_len must be at least 1, got {segment_size} and {mem_len}")
        self.segment_size = segment_size
        self.mem_len = mem_len
        self.embed = nn.Embedding(vocab, d_model)
        self.layers = nn.ModuleList(TransformerXLLayer(d_model, heads, d_ff) for _ in range(layers))
        self.head = nn.Linear(d_model, vocab)

    def forward(self, ids: Tensor, mems: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """Run all segments in turn.

        Parameters
        ----------
        ids
            Token numbers [B, N].
        mems
            The memory [B, P, D] of each layer, as returned by an earlier call, to carry on from.

        Returns
        -------
        Logits [B, N, vocabulary] and each layer's memory [B, P, D], P at most `mem_len`.
        """
        memories: list[Tensor | None] = [None] * len(self.layers) if mems is None else list(mems)
        logits = []
        for segment in ids.split(self.segment_size, dim=1):
            h = self.embed(segment)
            past = 0 if memories[0] is None else memories[0].shape[1]
            r = sinusoids(past + h.shape[1], like=h)
            future = torch.ones(h.shape[1], past + h.shape[1], dtype=torch.bool, device=h.device)
            future = future.triu(diagonal=past + 1)
            for at, layer in enumerate(self.layers):
                mem = memories[at]
                remembered = h if mem is None else torch.cat([mem, h], dim=1)
                memories[at] = remembered[:, -self.mem_len :].detach()
                h = layer(h, mem, r, future)
            logits.append(self.head(h))
        return torch.cat(logits, dim=1), memories


def build(
    layers: int = 4,
    segments: int = 6,
    batch: int = 2,
    segment_size: int = 16,
    d_model: int = 64,
    heads: int = 4,
    mem_len: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    vocab: int = 97,
) -> tuple[TransformerXL, tuple[Tensor]]:
    """Make a small Transformer-XL with random weights, in evaluation mode, and inputs for it.

    `mem_len` is `segment_size` unless given. The weights are drawn in float32 and then cast; the
    global random state is left as it was.

    Returns
    -------
    The model and its positional inputs ``(ids [batch, segments * segment_size],)``.
    """
    mem_len = segment_size if mem_len is None else mem_len
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TransformerXL(
            vocab, layers, d_model, heads, 2 * d_model, segment_size=segment_size, mem_len=mem_len
        )
        ids = torch.randint(vocab, (batch, segments * segment_size))
    return model.to(dtype).eval(), (ids,)
