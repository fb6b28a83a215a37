"""Recording a function gives the graph that make_fx gives, or says that the function is not plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

from diagpass.capture.record import NotPlain, graph_of, record

WEIGHT = torch.randn(4, 4)


def described(graph: fx.Graph) -> list[tuple]:
    graph.eliminate_dead_code()
    at = {node: number for number, node in enumerate(graph.nodes)}

    def shown(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return f"%{at[item]}"
        return (item.shape, item.stride(), item.dtype) if isinstance(item, Tensor) else item

    return [
        (
            node.op,
            str(node.target).replace("alias", "detach") if node.op == "call_function" else "",  # torch 2.14
            str(tree_map(shown, (node.args, node.kwargs, node.meta.get("val")))),
        )
        for node in graph.nodes
    ]


def products(x: Tensor) -> Tensor:
    return F.linear(x, x[0].mT) + torch.einsum("btd,bsd->bts", x, x).softmax(-1).sum()


def made_from_nothing(x: Tensor) -> tuple[Tensor, ...]:
    ones = torch.ones_like(x)
    return ones, torch.zeros(4, dtype=x.dtype) + torch.arange(4), x.new_zeros(2), ones.detach() + 1


def several_results(x: Tensor) -> list[Tensor]:
    a, b = x.split(2, 1)
    return [a, x.topk(2)[1], torch.nn.functional.layer_norm(b, (4,)), x]


def mapped(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: torch.outer(row[0], row[1]).cumsum(0))(x)


def several_results_of_an_elementwise_operation(x: Tensor) -> list[Tensor]:
    return [*torch.frexp(x), x.expand(3, 2, 4, 4).select(1, 0)[:, 1:].sum(1)]


def layouts(x: Tensor) -> list[Tensor]:
    turned, part = x.mT + 1, x[:, ::2].relu()
    return [turned, part * 2, turned + x, torch.cat([turned, x.mT], 1), x.mT.clone(), turned.sigmoid() @ x]


def types(x: Tensor) -> list[Tensor]:
    whole = torch.ones_like(x, dtype=torch.int64)
    return [x + whole, whole * 2.5, whole / 2, x.half() + x, torch.where(x > 0, x, whole), x.sum(1) > 0]


def nothing_is_read(x: Tensor) -> Tensor:
    unused = x + 1
    return unused.detach().mul(2) * 0 + x.to(torch.float64).detach()


@pytest.mark.parametrize(
    "function",
    [
        products,
        made_from_nothing,
        several_results,
        several_results_of_an_elementwise_operation,
        layouts,
        types,
        mapped,
        nothing_is_read,
    ],
    ids=lambda function: function.__name__,
)
def test_it_is_what_make_fx_makes(function: Callable[..., Any]) -> None:
    with FakeTensorMode(), torch.no_grad():
        x = torch.randn(2, 4, 4)
        found, expected = record(function, (x,)).graph, make_fx(function)(x).graph
        found.lint()
    assert described(found) == described(expected)


def writes(x: Tensor) -> Tensor:
    return torch.zeros_like(x).add_(x)


def reads_another(x: Tensor) -> Tensor:
    return x @ WEIGHT


def makes_a_constant(x: Tensor) -> Tensor:
    return x + torch.tensor([1.0, 2.0, 3.0, 4.0])


def checks(x: Tensor) -> Tensor:
    torch._assert_async(x.sum() > 0, "positive")
    return x + 1


@pytest.mark.parametrize(
    "function", [writes, reads_another, makes_a_constant, checks], ids=lambda function: function.__name__
)
def test_what_is_not_plain_is_traced(function: Callable[..., Any]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        x = torch.randn(2, 4, 4)
        with pytest.raises(NotPlain):
            record(function, (x,))
        assert described(graph_of(function, (x,)).graph) == described(make_fx(function)(x).graph)


def test_symbols_are_arguments_and_nothing_else() -> None:
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env), torch.no_grad():
        size = env.create_unbacked_symint()
        x = torch.randn(2, 4)
        graph = record(lambda x, n: x * n, (x, size)).graph
        first, second = graph.find_nodes(op="placeholder")
        (product,) = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
        assert product.args == (first, second)
        with pytest.raises(NotPlain, match="SymInt"):
            record(lambda x, n: x * (n + 1), (x, size))


def test_under_inference_mode_operations_still_consist_of_others() -> None:
    with FakeTensorMode(), torch.inference_mode():
        x = torch.randn(2, 4, 4)
        with pytest.raises(NotPlain, match="consists of others"):
            record(products, (x,))
