"""Expansion makes the graph that AOTAutograd would have made, or says that it is not sure."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import diagpass
from diagpass.capture import functional
from diagpass.capture.expand import Unsure, expand
from diagpass.capture.functional import Functional
from tests.helpers import assert_bitwise, assert_same

D = 6


def described(graph: fx.GraphModule) -> list[tuple]:
    """Everything about a graph that a later stage reads, names aside."""
    nodes = list(graph.graph.nodes)
    at = {node: number for number, node in enumerate(nodes)}
    memory: dict[int, int] = {}

    def value(node: fx.Node) -> list[Any]:
        found = []
        for leaf in tree_leaves(node.meta.get("val")):
            if isinstance(leaf, Tensor):
                first = memory.setdefault(leaf.untyped_storage()._cdata, at[node])
                found.append((tuple(leaf.shape), leaf.stride(), leaf.storage_offset(), leaf.dtype, first))
            else:
                found.append(repr(leaf))
        return found

    def arguments(node: fx.Node) -> str:
        return repr(fx.map_arg((node.args, node.kwargs), lambda arg: f"%{at[arg]}"))  # type: ignore[arg-type]

    record = ("nn_module_stack", "stack_trace")
    return [
        (
            node.op,
            str(node.target),
            arguments(node),
            value(node),
            [str(node.meta.get(name)) for name in record] if node.op == "call_function" else None,
        )
        for node in nodes
    ]


def both(model: Callable[..., Any], *inputs: Any) -> tuple[Functional, Functional]:
    """What expansion and AOTAutograd make of the graph that Dynamo captures."""
    found: list[Functional] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        made = expand(gm, examples)
        found.append(Functional(made.graph, made.written, made.passed, ()))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "_expanded", lambda gm, inputs: None)
            by_aot = functional.inference_graph(gm, examples)
        assert by_aot is not None
        found.append(by_aot)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return found[0], found[1]


def assert_alike(model: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    mine, by_aot = both(model, *inputs)
    assert described(mine.graph) == described(by_aot.graph)
    assert (mine.written, mine.passed) == (by_aot.written, by_aot.passed)
    return mine.graph


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, D)), dtype=torch.float64)


class Block(nn.Module):
    """Attention, an einsum and a norm, so operations that consist of others."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(D, 3 * D)
        self.norm = nn.LayerNorm(D)
        self.mix = nn.Parameter(torch.randn(D, D))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.project(self.norm(h)).view(*h.shape[:2], 2, -1).transpose(1, 2).chunk(3, -1)
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape_as(h)
        return h + torch.einsum("btd,de->bte", read, self.mix)


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.register_buffer("state", torch.zeros(2, D, dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        self.count += 1
        self.state.mul_(0.5).add_(h.mean(1), alpha=2)
        return h * self.count + self.state[:, None]


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(D, D), nn.LSTMCell(D, D)

    def forward(self, h: Tensor) -> Tensor:
        a, b = self.gru(h, h), self.gru(h + 1, h)
        c, d = self.lstm(a, (b, h))
        return self.lstm(c, (d, a))[1]


def test_layers_that_repeat() -> None:
    graph = assert_alike(nn.Sequential(*(Block() for _ in range(3))).double(), x())
    values = [id(node.meta["val"]) for node in graph.graph.nodes if node.op == "call_function"]
    assert len(set(values)) == len(values), "each result has a value of its own"


def test_cells_that_write_into_what_they_made() -> None:
    assert_alike(Cells().double(), x(2, D))


def test_state_in_place_and_a_counter() -> None:
    model = Counted()
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for _ in range(2):  # a symbol at the second capture
            model(x())
        torch._dynamo.reset()
        assert_alike(model, x())


def numbers(h: Tensor) -> tuple[Tensor, ...]:
    return h * 1, h * 1.0, h * True, h + 0.0, h + -0.0, torch.full_like(h, -0.0), torch.full_like(h, 0.0)


def one_operand_twice(h: Tensor) -> Tensor:
    other = h + 1
    return (h + h) * torch.sub(h, other) + torch.sub(other, other)


def operands_in_another_order(h: Tensor) -> tuple[Tensor, Tensor]:
    other = h + 1
    return torch.addcmul(h, other, h), torch.addcmul(h, other, other)


def other_strides(h: Tensor) -> tuple[Tensor, ...]:
    square = h[0, :, :3].contiguous()
    part = h[0, :, 3:6]
    return square.reshape(9), square.mT.reshape(9), part.reshape(9), part.contiguous()


def several_results(h: Tensor) -> tuple[Tensor, ...]:
    a, b, c = h.split(2, -1)
    value, index = (a + b).topk(1, dim=-1)
    return value, index, h.max(-1)[0], c, h.unbind(1)[0]


def local_writes(h: Tensor) -> Tensor:
    made = torch.zeros_like(h)
    made[:, 0] = h[:, 1]
    made += h
    made[:, 1:].mul(2)
    made.clamp_(min=0)
    return made.masked_fill_(h > 0, 1.5)


def slices(h: Tensor) -> Tensor:
    return h[:, 1:, ::2].sum() + h[:, :-1, ::2].sum() + h[..., None, 0].sum()


@torch.library.custom_op("diagpass_tests::counted", mutates_args=())
def counted(h: Tensor) -> tuple[Tensor, int]:
    return h + 1, 3


@counted.register_fake
def _(h: Tensor) -> tuple[Tensor, int]:
    return torch.empty_like(h), 3


def a_number_among_results(h: Tensor) -> Tensor:
    """Flash attention on CUDA has some."""
    return counted(counted(h)[0])[0] * 2


def same_tensor(h: Tensor) -> tuple[Tensor, Tensor]:
    packed = (h + 1).contiguous()
    return packed.to(torch.float64), packed.transpose(0, 1).mT


def views_of_another_type(h: Tensor) -> tuple[Tensor, ...]:
    outs = []
    for _ in range(2):  # the second time they are copies
        turned = torch.view_as_complex((h + 1).unflatten(-1, (3, 2)).contiguous())
        h = torch.view_as_real(turned * 2j).flatten(-2) + turned.real.sum()
        outs.append((h * 2).view(torch.int64) + 1)
    return h, *outs


@pytest.mark.parametrize(
    "function",
    [
        numbers,
        views_of_another_type,
        one_operand_twice,
        operands_in_another_order,
        other_strides,
        several_results,
        local_writes,
        slices,
        same_tensor,
        a_number_among_results,
    ],
    ids=lambda function: function.__name__,
)
def test_functions(function: Callable[..., Any]) -> None:
    assert_alike(function, x())


def test_written_inputs_are_results_in_their_order() -> None:
    def step(h: Tensor, first: Tensor, second: Tensor) -> Tensor:
        second.copy_(h + first)
        first.lerp_(second, 0.5)
        return first + second

    mine, _ = both(step, x(), x(), x())
    assert_alike(step, x(), x(), x())
    assert len(mine.written) == 2 and list(mine.written) == sorted(mine.written)


def view_read_after_a_write(h: Tensor) -> Tensor:
    made = h + 1
    part = made[:, 0]
    made.mul_(2)
    return part


def base_read_after_a_write(h: Tensor) -> Tensor:
    made = h + 1
    made[:, 0].mul_(2)
    return made


def view_of_an_input_written(h: Tensor) -> Tensor:
    return h[:, 0].mul_(2)


def with_autocast(h: Tensor) -> Tensor:
    with torch.autocast("cpu"):
        return h.float() @ h.float().mT


def with_a_constant(h: Tensor) -> Tensor:
    return h + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])


def statistics(h: Tensor) -> Tensor:
    return F.batch_norm(h, h.new_zeros(3), h.new_ones(3), training=True)


def transposed_in_place(h: Tensor) -> Tensor:
    made = h + 1
    return made.transpose_(0, 1)


def number_read(h: Tensor) -> Tensor:
    return torch.zeros(2) + h.sum().item()


def conjugated(h: Tensor) -> Tensor:
    turned = torch.complex(h, h + 1)
    return (turned.conj() * turned).real


def negated(h: Tensor) -> Tensor:
    return torch.complex(h, h + 1).conj().imag + 1


@pytest.mark.parametrize(
    "function",
    [
        view_read_after_a_write,
        conjugated,
        negated,
        base_read_after_a_write,
        view_of_an_input_written,
        with_autocast,
        with_a_constant,
        statistics,
        transposed_in_place,
        number_read,
    ],
    ids=lambda function: function.__name__,
)
def test_it_says_where_it_is_not_sure(function: Callable[..., Any]) -> None:
    found: list[BaseException] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        try:
            expand(gm, examples)
        except Unsure as reason:
            found.append(reason)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        torch.compile(function, backend=backend)(x())
    assert found and str(found[0])


def test_gradients_are_for_aot_autograd() -> None:
    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        with pytest.raises(Unsure, match="gradients"):
            expand(gm, examples)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(nn.Linear(D, D), backend=backend)(torch.randn(2, D))


class Stack(nn.Module):
    """Layers over segments; ``write`` says how a layer keeps its state."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(write) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        outs = []
        for segment in h.split(2, 1):
            for layer in self.layers:
                segment = layer(segment)
            outs.append(segment)
        return torch.cat(outs, 1)


class Layer(nn.Module):
    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = write
        self.linear = nn.Linear(D, D)
        self.register_buffer("state", torch.zeros(2, D))

    def forward(self, h: Tensor) -> Tensor:
        out = torch.tanh(self.linear(h)) + self.state[:, None]
        new = out.mean(1)
        if self.write == "copy":
            self.state.copy_(new)
        elif self.write == "slot":
            self.state[:, 1:] = new[:, 1:]
        elif self.write == "view":
            part = self.state[:, :2]
            self.state.mul_(0.5)
            out = out + part.sum()
            part.add_(1.0)
        elif self.write == "set":
            self.state = new
        return out


@pytest.mark.parametrize("write", ["copy", "slot", "view", "set"])
def test_state_is_what_the_model_leaves(write: str) -> None:
    torch.manual_seed(0)
    model = Stack(write).double().eval()
    assert_same(copy.deepcopy(model), (x(2, 8, D),), ran="wavefront")
    assert_bitwise(model, (x(2, 8, D),), ran="wavefront")


def test_a_result_that_is_an_input_is_that_input() -> None:
    class Returns(Stack):
        def forward(self, h: Tensor) -> Any:
            return super().forward(h), h, h[0]

    model = Returns("copy").double().eval()
    fast = diagpass.transform(model, options={"compiler": "eager"})
    given = x(2, 8, D)
    with torch.no_grad():
        _, same, part = fast(given)
    assert same is given and part.data_ptr() == given.data_ptr()


def test_a_result_that_is_a_written_input_is_that_input() -> None:
    class Returns(Stack):
        def forward(self, h: Tensor) -> Any:
            h.mul_(0.5)
            return super().forward(h), h

    model = Returns("copy").double().eval()
    fast = diagpass.transform(copy.deepcopy(model), options={"compiler": "eager"})
    given = x(2, 8, D)
    other = given.clone()
    with torch.no_grad():
        (want, _), (got, same) = model(other), fast(given)
    assert same is given and torch.equal(given, other)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_around_a_call(grad: bool) -> None:
    """The casts are in the graph; what runs it must not cast again."""
    torch.manual_seed(0)
    model = Stack("copy").eval().requires_grad_(False)
    plain, fast = copy.deepcopy(model), diagpass.transform(model, options={"compiler": "eager"})
    given = torch.randn(2, 8, D)
    for _ in range(2):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            want, got = plain(given), fast(given)
        assert fast.report is not None and fast.report.ran == "wavefront"
        assert got.dtype == want.dtype and not got.requires_grad
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert plain.layers[0].state.dtype == fast.layers[0].state.dtype


def test_what_nobody_thought_of_goes_to_aot_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("diagpass.capture.expand._kept", fail)
    assert_same(Stack("copy").double().eval(), (x(2, 8, D),), ran="wavefront")
