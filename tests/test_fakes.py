"""What a capture does once instead of again and again: fake results and lines of code, against Dynamo's."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch.fx as fx
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._dynamo.output_graph import SubgraphTracer
from torch.torch_version import TorchVersion

from diagpass.capture import dynamo, fakes
from diagpass.capture.marks import source_line
from diagpass.replaced import Replaced


def products(x: Tensor, w: Tensor) -> list[Tensor]:
    return [x @ w, torch.einsum("bsd,de->ebs", x, w), F.linear(x, w), torch.matmul(x, w)]


def views(x: Tensor, w: Tensor) -> list[Tensor]:
    h = x.transpose(1, 2)
    return [h, h.reshape(2, -1), x.view(-1), x.unflatten(-1, (2, 4)), *x.chunk(2, -1), w.expand(3, 8, 8), w.T]


def itself(x: Tensor, w: Tensor) -> list[Tensor]:
    return [x.to(torch.float32), x.contiguous(), F.dropout(x, training=False), x.detach(), x.float()]


def several(x: Tensor, w: Tensor) -> list[Tensor]:
    values, places = x.topk(3, -1)
    mean, deviation = torch.std_mean(x, -1)
    return [values, places, mean, deviation, *torch.unbind(x), torch.sort(x, -1).values]


def other_types(x: Tensor, w: Tensor) -> list[Tensor]:
    return [x > 0, x.to(torch.float64), x.argmax(-1), x.bfloat16() * x, torch.view_as_complex(x.view(-1, 2))]


def other_numbers(x: Tensor, w: Tensor) -> list[Tensor]:
    return [x * 1, x * 1.0, x.to(torch.int64) * 1, x.to(torch.int64) * 1.0, x.to(torch.int64) * True]


def written(x: Tensor, w: Tensor) -> list[Tensor]:
    h = x * 2
    h.add_(1)
    h[:, 0] = 3.0
    h.transpose_(1, 2)
    return [h, h.relu_(), torch.add(x, 1, out=torch.empty_like(x))]


def statistics(x: Tensor, w: Tensor) -> list[Tensor]:
    mean = torch.zeros(8)
    return [F.batch_norm(x.flatten(0, 1), mean, torch.ones(8), training=True), mean]


def automatic(x: Tensor, w: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        made = [x @ w, x + 1]
    return [*made, x @ w]


def shared(x: Tensor, w: Tensor) -> list[Tensor]:
    together = torch.ops.aten.broadcast_tensors.default
    first, other = x[0], x[0] * 1
    return [*together([first[:1], first]), *together([first[:1], other]), *together([other[:1], other])]


def attention(x: Tensor, w: Tensor) -> list[Tensor]:
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return [F.scaled_dot_product_attention(q, q, q), F.scaled_dot_product_attention(q, q, q, is_causal=True)]


def mapped(x: Tensor, w: Tensor) -> list[Tensor]:
    return [torch.func.vmap(lambda row: row @ w)(x), x @ w]


def branches(x: Tensor, w: Tensor) -> list[Tensor]:
    return [torch.cond(x.sum() > 0, lambda h: h @ w, lambda h: h.sin(), (x,)), x @ w]


def needs_gradients(x: Tensor, w: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        h = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((h @ w * 2).square().sum(), h)
    return [gradient, h.detach() * 2]


def numbers(x: Tensor, w: Tensor) -> list[Tensor]:
    number = torch.tensor(2.0, dtype=torch.float64)
    return [x * number, x * torch.full((1,), 2.0, dtype=torch.float64), x.sum() * number, number * 2]


def elsewhere(x: Tensor, w: Tensor) -> list[Tensor]:
    h = x.to("meta")
    return [h, h + 1, h.transpose(0, 1)]


def random(x: Tensor, w: Tensor) -> list[Tensor]:
    return [torch.rand_like(x), F.dropout(x, 0.5), torch.randn(3), torch.bernoulli(x.sigmoid())]


FUNCTIONS: list[Any] = [
    products,
    views,
    itself,
    several,
    other_types,
    other_numbers,
    written,
    statistics,
    automatic,
]
FUNCTIONS += [shared, attention, mapped, branches, numbers, elsewhere, random]

if TorchVersion(torch.__version__) >= TorchVersion("2.13"):  # before, Dynamo does not trace gradients
    FUNCTIONS.append(needs_gradients)


def captured(function: Callable[..., list[Tensor]], *inputs: Tensor, known: bool) -> fx.GraphModule:
    """Dynamo's graph of the function, called three times."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    def thrice(*inputs: Tensor) -> list[Tensor]:
        return [*function(*inputs), *function(*inputs), *function(*inputs)]

    torch._dynamo.reset()
    compiled = torch.compile(thrice, backend=backend, fullgraph=True, dynamic=False)
    with dynamo.settings(), dynamo.capturing() if known else contextlib.nullcontext():
        compiled(*inputs)
    return graphs[0]


def described(gm: fx.GraphModule) -> list[tuple]:
    """Per operation what its fake results are, and which earlier ones they are or share memory with."""
    objects: dict[int, int] = {}
    memories: dict[int, int] = {}
    alive = []
    found: list[tuple] = []
    for node in gm.graph.nodes:
        found.append((node.op, str(node.target)))
        for leaf in pytree.tree_leaves(node.meta.get("example_value")):
            if isinstance(leaf, Tensor) and not torch._C._functorch.is_batchedtensor(leaf):
                alive.append(leaf)
                memory = leaf.untyped_storage()._cdata
                found.append(
                    (
                        objects.setdefault(id(leaf), len(objects)),
                        memories.setdefault(memory, len(memories)),
                        *(leaf.shape, leaf.stride(), leaf.storage_offset(), leaf.dtype, leaf.device),
                        *(leaf.requires_grad, type(leaf), isinstance(leaf, nn.Parameter)),
                    )
                )
    return found


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_fake_results_and_lines_are_those_of_dynamo(function: Callable, gradients: bool) -> None:
    x, w = torch.randn(2, 8, 8), nn.Parameter(torch.randn(8, 8))
    with torch.set_grad_enabled(gradients):
        ours, theirs = (captured(function, x, w, known=known) for known in (True, False))
    assert described(ours) == described(theirs)
    for mine, its in zip(ours.graph.nodes, theirs.graph.nodes, strict=True):
        assert source_line(mine) == source_line(its) or its.stack_trace is None


def test_a_call_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    own = torch._dynamo.utils.run_node
    monkeypatch.setattr(
        torch._dynamo.utils,
        "run_node",
        lambda tracer, node, *rest: (ran.append(node), own(tracer, node, *rest))[1],
    )
    with torch.no_grad():
        captured(products, torch.randn(2, 8, 8), nn.Parameter(torch.randn(8, 8)), known=True)
    assert len(ran) == 4  # of 12


def test_an_operation_that_somebody_brings_is_asked_each_time() -> None:
    asked: list[Any] = []

    @torch.library.custom_op("diagpass_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    @twice.register_fake
    def _(x: Tensor) -> Tensor:
        asked.append(x.shape)
        return torch.empty_like(x)

    with torch.no_grad():
        captured(lambda x: [twice(x)], torch.randn(3), known=True)
    assert len(asked) >= 3


def test_only_inside_and_only_in_this_thread() -> None:
    run_node, create_node = torch._dynamo.utils.run_node, SubgraphTracer.create_node
    states: list[Any] = []
    with dynamo.capturing():
        assert torch._dynamo.utils.run_node is not run_node
        assert SubgraphTracer.create_node is not create_node
        with dynamo.capturing():
            assert fakes._runner.state == {}
        other = threading.Thread(target=lambda: states.append(fakes._runner.state))
        other.start()
        other.join()
        assert torch._dynamo.utils.run_node is not run_node
    assert states == [None]
    assert torch._dynamo.utils.run_node is run_node
    assert SubgraphTracer.create_node is create_node


def test_another_version_of_torch_is_left_alone() -> None:
    known = Replaced[int]("tests.test_fakes", "captured", {"__call__": print, "no_such_method": print})
    with known.inside(1) as are_replaced:
        assert not are_replaced
        assert known.state is None
