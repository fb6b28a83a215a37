"""Masks that are constant and causal become causal attention; any other mask stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from diagpass.capture.masks import drop_causal_masks

T = 6
OPERATION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attention(mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask(q))

    return run


def causal(q: Tensor) -> Tensor:
    place = torch.arange(T)
    return (place[None, :] <= place[:, None])[None, None]


def causal_floats(q: Tensor) -> Tensor:
    return torch.full((T, T), float("-inf")).triu(1)


def window(q: Tensor) -> Tensor:
    place = torch.arange(T)
    return (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - 3)


def soft(q: Tensor) -> Tensor:
    return torch.full((T, T), -10.0).triu(1)


def from_values(q: Tensor) -> Tensor:
    return torch.full((T, T), float("-inf")).triu(1) + 0 * q.sum()


@pytest.mark.parametrize(
    ("mask", "dropped"),
    [(causal, 1), (causal_floats, 1), (window, 0), (soft, 0), (from_values, 0)],
)
def test_only_constant_causal_masks_are_dropped(mask: Callable, dropped: int) -> None:
    run = attention(mask)
    q = torch.randn(2, 3, T, 4)
    with torch.no_grad():
        gm = make_fx(run, tracing_mode="fake")(q)
        assert len(gm.graph.find_nodes(op="call_function", target=OPERATION)) == 1
        assert drop_causal_masks(gm) == dropped
        other = torch.randn(2, 3, T, 4)
        torch.testing.assert_close(gm(other), run(other))
        if dropped:
            assert torch.equal(gm(other), F.scaled_dot_product_attention(other, other, other, is_causal=True))


def test_more_keys_than_queries_are_left_alone() -> None:
    def run(q: Tensor, k: Tensor) -> Tensor:
        mask = torch.full((T, 2 * T), float("-inf")).triu(1)
        return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)

    q, k = torch.randn(1, 1, T, 4), torch.randn(1, 1, 2 * T, 4)
    with torch.no_grad():
        assert drop_causal_masks(make_fx(run, tracing_mode="fake")(q, k)) == 0
