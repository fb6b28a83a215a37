"""Gradients through the wavefront: not the goal, but nothing shuts them out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import diagpass
from tests.helpers import distance, forced, leaves
from tests.models import ZOO


def _loss(value: object) -> Tensor:
    """A scalar that every floating-point output takes part in, each entry with another weight."""
    total = torch.zeros((), dtype=torch.float64)
    for _, leaf in leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            ramp = torch.linspace(0.5, 1.5, leaf.numel(), dtype=torch.float64)
            total = total + (leaf.reshape(-1) * ramp).sum()
    return total


@pytest.mark.parametrize("weights", ["share", "copy"])
@pytest.mark.parametrize(
    "name", ["list_states", "returned_tuple", "attribute_none", "tied_linears", "cached_inputs"]
)
def test_gradients_of_weights_and_inputs_equal(name: str, weights: str) -> None:
    model, inputs = ZOO[name]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(copy.deepcopy(model), options=forced(weights=weights))
    grads: list[dict[str, Tensor | None]] = []
    for run, owner in ((plain, plain), (fast, fast.original)):
        x = inputs[0].clone().requires_grad_()
        _loss(run(x, *inputs[1:])).backward()
        grads.append({name: p.grad for name, p in owner.named_parameters()})
        grads[-1]["input"] = x.grad
    assert fast.report.ran == "wavefront"
    assert fast.report.batched_cells > 0
    expected, got = grads
    assert list(got) == list(expected)
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            assert got[name] is not None, f"{name} has no gradient"
            assert distance(got[name], value) <= 1e-11, name


def test_a_training_step_is_seen_by_the_next_call() -> None:
    """Three steps of SGD on the transformed model and on the plain one end at the same weights."""
    model, inputs = ZOO["list_states"]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(copy.deepcopy(model), options=forced())
    for run, owner in ((plain, plain), (fast, fast.original)):
        optimizer = torch.optim.SGD(owner.parameters(), lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            _loss(run(*inputs)).backward()
            optimizer.step()
    for (name, a), (_, b) in zip(fast.original.named_parameters(), plain.named_parameters(), strict=True):
        assert distance(a, b) <= 1e-11, name


def test_parameters_stay_leaves_that_an_optimizer_accepts() -> None:
    model, inputs = ZOO["list_states"]()
    fast = diagpass.transform(model, options=forced())
    with torch.no_grad():
        fast(*inputs)
    for name, parameter in fast.original.named_parameters():
        assert isinstance(parameter, nn.Parameter), name
        assert parameter.is_leaf and parameter.requires_grad, name
    torch.optim.AdamW(fast.parameters())


class Flagged(nn.Module):
    """A flag flips in place after each segment; what is logged of a segment would need it as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
        self.register_buffer("flag", torch.zeros(1, dtype=torch.bool))
        self.logged: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        states = [x.new_zeros(x.shape[0], 1, 4) for _ in self.layers]
        for h in x.split(3, 1):
            for at, layer in enumerate(self.layers):
                h = h + torch.tanh(layer(h + states[at]))
                states[at] = (states[at] + h.mean(1, keepdim=True)) / 2
            self.logged = torch.where(self.flag, h, 2 * h).mean()
            self.flag[0] = ~self.flag[0]
            outs.append(h)
        return torch.cat(outs, 1)


def test_gradients_of_some_results_where_others_have_none() -> None:
    """Backward through all results fails, through those that are wanted it does not: so it runs as it is."""
    plain = Flagged()
    model = copy.deepcopy(plain)
    fast = diagpass.transform(model, options={**forced(), "loop": "flat"})
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    expected = plain(x)
    expected.sum().backward()
    with pytest.warns(
        diagpass.DiagpassWarning, match="overwrites what they need; call it under torch.no_grad"
    ):
        got = fast(x)
    got.sum().backward()
    assert fast.report.ran == "sequential"
    assert torch.equal(got, expected)
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)
    with torch.no_grad():
        assert distance(fast(x), plain(x)) <= 1e-12
        assert fast.report.ran == "wavefront"
    strict = diagpass.transform(copy.deepcopy(plain), strict=True, options={**forced(), "loop": "flat"})
    with pytest.raises(diagpass.SequentialError, match="gradients are recorded"):
        strict(x)


class Normed(nn.Module):
    """Batch norm over a transposed view: its result lies otherwise than it is said to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.memory: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        memory = h.new_zeros(h.shape[0], 1, 4) if self.memory is None else self.memory
        out = torch.tanh(self.linear(h + memory))
        self.memory = (memory + out.mean(1, keepdim=True)) / 2
        return self.norm((h + out).transpose(1, 2)).transpose(1, 2)


class NormedStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Normed() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for segment in x.split(3, 1):
            for layer in self.layers:
                segment = layer(segment)
            outs.append(segment)
        return torch.cat(outs, 1)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_results_that_lie_otherwise_than_they_were_traced(training: bool) -> None:
    plain = NormedStack().double().train(training)
    model = copy.deepcopy(plain)
    fast = diagpass.transform(model, options={**forced(), "loop": "flat"})
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    for run in (plain, fast):
        run(x).pow(3).sum().backward()
    assert fast.report.ran == "wavefront"
    for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
        assert distance(mine.grad, its.grad) <= 1e-9
    for mine, its in zip(model.buffers(), plain.buffers(), strict=True):
        assert distance(mine, its) <= 1e-12
