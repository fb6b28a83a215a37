"""What `tests/__init__.py` fixes for the bitwise tests, and that it is needed for nothing but that."""

from __future__ import annotations

import copy
import platform

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import assert_bitwise, assert_same
from tests.models import ZOO


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86 kernels")
def test_a_result_depends_on_values_alone() -> None:
    """Neither strides nor addresses change a bit; without the settings both do."""
    torch.manual_seed(0)
    assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    wide = torch.randn(500, 18, dtype=torch.float64)
    part = wide[:, :6]
    for function in (torch.sigmoid, torch.tanh, torch.exp, nn.functional.silu, nn.functional.gelu):
        strided = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype).copy_(part)
        assert torch.equal(function(strided), function(part.contiguous())), function
    weight, bias = torch.randn(18, 6, dtype=torch.float64), torch.randn(18, dtype=torch.float64)
    x = torch.randn(2, 6, dtype=torch.float64)
    memory = torch.empty(64, dtype=torch.float64)
    expected = nn.functional.linear(x, weight, bias)
    for offset in range(16):
        moved = memory[offset : offset + 12].view(2, 6).copy_(x)
        assert torch.equal(nn.functional.linear(moved, weight, bias), expected), offset


class OddRows(nn.Module):
    """All layers' states in one tensor, each row a count followed by the state.

    The sequential run so multiplies states at odd multiples of eight bytes; the wavefront reads what was
    written there, a value in memory of its own. `nn.GRUCell` writes into chunks in place besides.
    """

    def __init__(self, layers: int = 3, batch: int = 2, width: int = 6) -> None:
        super().__init__()
        self.batch, self.width = batch, width
        self.layers = nn.ModuleList([nn.GRUCell(width, width) for _ in range(layers)])
        self.register_buffer("state", torch.zeros(layers, 1 + batch * width, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """[S, batch, width] -> [S, batch, width]."""
        out = []
        for h in x:
            for l, layer in enumerate(self.layers):
                h = layer(h, self.state[l, 1:].view(self.batch, self.width))
                self.state[l, 1:] = h.flatten()
                self.state[l, 0] += 1
            out.append(h)
        return torch.stack(out)


def test_states_at_odd_addresses() -> None:
    model, x = OddRows().double().eval(), torch.randn(4, 2, 6, dtype=torch.float64)
    assert_bitwise(copy.deepcopy(model), (x,))
    report = assert_same(model, (x,))
    assert report.batched_cells == 10


def test_the_weights_of_two_copies_lie_elsewhere_and_give_the_same_bits() -> None:
    """What a bitwise test compares with is itself reproducible."""
    model, inputs = ZOO["gru_cells"]()
    first, keep = copy.deepcopy(model), []
    with torch.no_grad():
        expected = first(*inputs)
        for size in (1, 3, 5):
            for parameter in model.parameters():  # weights at odd multiples of eight bytes
                memory = torch.empty(parameter.numel() + 8, dtype=parameter.dtype)
                moved = memory[size : size + parameter.numel()].view(parameter.shape)
                keep.append(memory)
                parameter.data = moved.copy_(parameter)
            other = copy.deepcopy(model)
            for (_, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
                q.data = p.data
            assert torch.equal(other(*inputs), expected)
