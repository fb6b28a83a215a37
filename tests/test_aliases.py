"""Tensors on one memory, and what else may change a tensor behind the back of whoever watches it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)

from diagpass import DiagpassWarning, SegmentLoop
from tests.helpers import assert_state_same, assert_tree_same, fast_copy
from tests.rolled_models import D, Step, T, tokens
from tests.tape import check, poisoned, replaying  # noqa: F401

# Written in place, then through another name.


def through_a_view(layer: Any, h: Tensor) -> Tensor:
    x = layer.inp(h)
    x += h
    x.view(-1).mul_(2)
    return x


def through_itself(layer: Any, h: Tensor) -> Tensor:
    """`contiguous` is the tensor itself where it is contiguous."""
    x = layer.inp(h)
    x += h
    y = x.contiguous()
    x *= 2
    return y


def twice(layer: Any, h: Tensor) -> Tensor:
    layer.state.mul_(0.5)
    layer.state.view(-1).add_(1.0)
    return layer.inp(h)


def number_as_bias(layer: Any, h: Tensor) -> Tensor:
    return torch.addmm(layer.number, h.flatten(0, 1), layer.inp.weight).view_as(h)


class Layer(nn.Module):
    """Keeps a state, and does one thing with it that others do not."""

    def __init__(self, what: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inp, self.what = nn.Linear(D, D), what
        self.number = nn.Parameter(torch.randn(()))
        self.reset()

    def reset(self) -> None:
        self.state = torch.zeros(2, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.what(self, h) + self.state[:, None])
        self.state = self.state * 0.5 + h.mean(1)
        return h


class Loop(nn.Module):
    """A loop of its own around a step."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.step(segment) for segment in x.split(T, dim=1)], dim=1)


FACES = ["loop", "rolled", "flat"]


def pair_of(step: nn.Module, face: str, reset: Any = None) -> tuple[Any, Any]:
    step = step.double().eval()
    if face == "loop":
        plain: Any = SegmentLoop(step, T, reset=reset)
        return plain, fast_copy(plain)
    plain = Loop(step)
    return plain, fast_copy(plain, loop=face)


def compare(plain: Any, fast: Any, x: Tensor) -> None:
    with torch.no_grad():
        expected, got = plain(x.clone()), fast(x.clone())
    assert_tree_same(got, expected, 1e-10, "output")
    assert_state_same(fast.original, plain, 1e-10, "state")


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("what", [through_a_view, through_itself, twice, number_as_bias])
def test_what_a_layer_writes(what: Any, face: str) -> None:
    torch.manual_seed(1)
    layers = max(D, 5) if what is number_as_bias else 3  # as many as the product has columns, too
    plain, fast = pair_of(Step([Layer(what) for _ in range(layers)]), face)
    for _ in range(2):
        compare(plain, fast, tokens((layers + 1) * T)[:2])


# State that shares memory with other state.


class Aliased(nn.Module):
    """`b` is a view of `a`."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.inp, self.writes = nn.Linear(D, D), writes
        self.a = torch.zeros(2, D, dtype=torch.float64)
        self.b = self.a[:, 0]

    def forward(self, h: Tensor) -> Tensor:
        if self.writes:
            self.a.add_(1)
        h = torch.tanh(self.inp(h) + self.a[:, None] + self.b[:, None, None])
        self.a = h.mean(1) * 0.5 + self.a
        self.b = self.a[:, 0]
        return h


@pytest.mark.filterwarnings("ignore::diagpass.DiagpassWarning")
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("writes", [False, True])
def test_views_among_state_stay_views(writes: bool, face: str) -> None:
    """Of the layers in a group, too; whoever writes one of them, writes the other."""
    torch.manual_seed(2)
    plain, fast = pair_of(Step([Aliased(writes) for _ in range(5)]), face)
    for _ in range(3):
        x = tokens(4 * T)[:2]
        compare(plain, fast, x)
        for model in (plain, fast.original):
            for layer in model.step.layers:
                layer.a.mul_(0.5)
    assert face != "flat" or writes or fast.report.ran == "wavefront"


class Halves(nn.Module):
    """Two halves of one tensor: nobody sees that they lie side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(D, 2 * D)
        self.k = self.v = torch.zeros(2, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        self.k, self.v = (self.inp(h).mean(1) + torch.cat([self.k, self.v], 1)).chunk(2, dim=1)
        return torch.tanh(h + self.k[:, None] * self.v[:, None])


@pytest.mark.parametrize("face", FACES)
def test_parts_that_do_not_overlap_are_deferred(face: str) -> None:
    torch.manual_seed(3)
    plain, fast = pair_of(Step([Halves() for _ in range(3)]), face)
    for _ in range(2):
        compare(plain, fast, tokens(4 * T)[:2])
    assert fast.report.ran == "wavefront"


class Wrapped(Tensor):
    """A subclass with nothing of its own."""


@pytest.mark.parametrize("face", FACES)
def test_tensors_of_a_subclass(face: str) -> None:
    """Dynamo hands out and keeps other objects than its graph's results, on the same memory."""
    torch.manual_seed(4)
    plain, fast = pair_of(Step([Layer(lambda layer, h: layer.inp(h)) for _ in range(3)]), face)
    x = tokens(4 * T)[:2]
    with torch.no_grad(), pytest.warns(DiagpassWarning, match="sequentially"):
        for _ in range(2):
            got, expected = fast(x.as_subclass(Wrapped)), plain(x.as_subclass(Wrapped))
            assert type(got) is type(expected) is Wrapped
            torch.testing.assert_close(got.as_subclass(Tensor), expected.as_subclass(Tensor))


# Weights that a reset writes.


class Scaled(nn.Module):
    """The step only reads `scale`, so it is stacked like a weight, as a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(D, D)
        self.register_buffer("scale", torch.ones(D))
        self.state = torch.zeros(1, 1, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.inp(h) * self.scale + self.state)
        self.state = h.mean((0, 1), keepdim=True)
        return h


class Rescaled(Step):
    """Its reset writes the buffer."""

    value, copies = 1.0, False

    def reset(self) -> None:
        layers: Any = self.layers
        for layer in layers:
            layer.state = torch.zeros(1, 1, D, dtype=torch.float64)
            if self.copies:
                layer.scale.copy_(torch.full((D,), self.value))
            else:
                layer.scale.fill_(self.value)


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("weights", ["share", "copy"])
def test_a_reset_that_writes_what_is_stacked(weights: str, copies: bool) -> None:
    """Also where the call is like one before, and was launched from what is known of that one."""
    torch.manual_seed(5)
    loop = SegmentLoop(Rescaled([Scaled() for _ in range(3)]), T, reset="reset").double().eval()
    fast: Any = fast_copy(loop, weights=weights)
    for value in (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 3.0, 3.0, 3.0, 1.0):
        for step in (loop.step, fast.original.step):
            step.value, step.copies = value, copies
        check(loop, fast, tokens(6 * T), [], 1e-10)


# Hooks of all modules.


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2 if isinstance(module, nn.Linear) else None


def halved(module: nn.Module, args: Any, output: Any) -> Any:
    return output / 2 if isinstance(module, nn.Linear) else None


def scaled(module: nn.Module, args: Any) -> Any:
    return tuple(arg * 2 for arg in args) if isinstance(module, nn.Linear) else None


@contextmanager
def hooked(register: Any, *hooks: Any) -> Iterator[None]:
    handles = [register(hook) for hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("face", FACES)
def test_hooks_of_all_modules_are_seen(face: str) -> None:
    """Whenever they come and go: Dynamo has no guard for those that are not there yet."""
    torch.manual_seed(6)
    plain, fast = pair_of(Step([Layer(lambda layer, h: layer.inp(h)) for _ in range(3)]), face)
    x = tokens(5 * T)[:2]
    for _ in range(3):
        compare(plain, fast, x)
    for register, *hooks in (
        (register_module_forward_hook, doubled),
        (register_module_forward_hook, halved),
        (register_module_forward_hook, halved, halved),
        (register_module_forward_pre_hook, scaled),
    ):
        with hooked(register, *hooks):
            for _ in range(3):
                compare(plain, fast, x)
        compare(plain, fast, x)
    assert fast.report.ran == "wavefront"


@pytest.mark.filterwarnings("ignore::diagpass.DiagpassWarning")
def test_backward_hooks_of_all_modules_are_seen() -> None:
    def gradients(model: Any) -> list[Tensor]:
        model.zero_grad()
        for layer in getattr(model, "original", model).step.layers:
            layer.reset()
        model(x).square().sum().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    def both() -> None:
        assert_tree_same(gradients(fast), gradients(plain), 1e-10, "gradients")

    def scale(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        return tuple(None if grad is None else grad * 2 for grad in grad_input)

    torch.manual_seed(7)
    plain, fast = pair_of(Step([Layer(lambda layer, h: layer.inp(h)) for _ in range(3)]), "flat")
    x = tokens(4 * T)[:2]
    both()
    with hooked(register_module_full_backward_hook, scale):
        both()
    both()
    assert fast.report.ran == "wavefront"


@dataclasses.dataclass
class Said:
    """With a number that Dynamo sees being set."""

    y: Tensor
    count: int = 0


class Says(Loop):
    """Returns an object of its own class."""

    def forward(self, x: Tensor) -> Any:
        return Said(super().forward(x))


def test_a_dataclass_that_is_made_inside() -> None:
    torch.manual_seed(8)
    plain = Says(Step([Layer(lambda layer, h: layer.inp(h)) for _ in range(3)]).double())
    fast: Any = fast_copy(plain, loop="flat")
    x = tokens(4 * T)[:2]
    with torch.no_grad():
        got, expected = fast(x), plain(x)
    assert got.count == 0 and fast.report.ran == "wavefront"
    torch.testing.assert_close(got.y, expected.y)
