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
