"""Recurrent language models of transformers, fed chunk by chunk with the state they return."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from diagpass import SegmentLoop
from tests.zoo.case import VOCAB, Case, D, L, T, ids


class RwkvStep(nn.Module):
    """A chunk through `RwkvModel`, which takes and returns five tensors [B, D, L]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        out = self.model(x, state=state, use_cache=True)
        return out.last_hidden_state, out.state


class CacheStep(nn.Module):
    """A chunk through a model that takes and returns `cache_params`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, cache: Any) -> tuple[Tensor, Any]:
        out = self.model(x, cache_params=cache, use_cache=True)
        return out.last_hidden_state, out.cache_params


def rwkv() -> tuple[nn.Module, tuple[Any, ...]]:
    config = transformers.RwkvConfig(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=L, attention_hidden_size=D, rescale_every=0
    )
    return SegmentLoop(RwkvStep(transformers.RwkvModel(config)), T, carries_state=True), (ids(),)


def xlstm() -> tuple[nn.Module, tuple[Any, ...]]:
    config = transformers.xLSTMConfig(
        vocab_size=VOCAB,
        hidden_size=128,  # heads are rounded up to widths of 64
        num_hidden_layers=L,
        num_blocks=L,
        num_heads=2,
        inference_state_dtype="float32",
        autocast_kernel_dtype="float32",
    )
    return SegmentLoop(CacheStep(transformers.xLSTMModel(config)), T, carries_state=True), (ids(),)


def mamba(kind: str = "Mamba", size: int = T) -> tuple[nn.Module, tuple[Any, ...]]:
    options: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": L, "state_size": 4}
    if kind == "Mamba2":
        options.update(num_heads=4, head_dim=8, n_groups=2, chunk_size=T, expand=2)
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}Model")(config)
    return SegmentLoop(CacheStep(model), size, carries_state=True), (ids(size=size),)


CASES = [
    Case(
        name="RWKV-4",
        often=True,
        source="transformers, `RwkvModel`",
        state="five tensors that hold all layers, a column each, written in place and returned",
        build=rwkv,
        float32_inside=True,
    ),
    Case(
        name="xLSTM",
        source="transformers, `xLSTMModel`",
        state="an `xLSTMCache` of matrix memories, written in place and returned",
        build=xlstm,
        dtype=torch.float32,  # its kernels know no other
        float32_inside=True,
    ),
    Case(
        name="Mamba",
        source="transformers, `MambaModel`",
        state="a `DynamicCache` of convolution and state-space states, made by the first chunk",
        build=mamba,
        note="Chunks of several tokens with a cache work in transformers 5; the first chunk is another kind.",
        float32_inside=True,
    ),
    Case(
        name="Mamba-2",
        often=True,
        source="transformers, `Mamba2Model`",
        state="as Mamba's",
        build=lambda: mamba("Mamba2"),
        note="As Mamba.",
        float32_inside=True,
    ),
]
