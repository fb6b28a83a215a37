"""What a batched form computes does not change where it moves fewer bytes.

Products accumulate into the memory of results; attention reads keys and values whose heads are not repeated.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM

from diagpass import SegmentLoop
from diagpass.lowering import accumulate as accumulate_module
from diagpass.lowering.accumulate import accumulate, cut, saves_traffic
from diagpass.lowering.heads import KERNELS, without_repeated_heads
from diagpass.lowering.inplace import write_results
from diagpass.options import Options
from diagpass.runtime.compiled import InductorKind
from diagpass.runtime.forms import Forms
from examples import armt
from tests import rolled_models as models
from tests.helpers import assert_tree_same, fast_copy
from tests.rolled_models import T as TOKENS
from tests.tape import check, poisoned, replaying  # noqa: F401

aten = torch.ops.aten
G, M, D = 3, 5, 4
IN_PLACE = (aten.baddbmm_.default, aten.addmm_.default)


def always(value: Tensor) -> bool:
    """Accumulate wherever it is possible."""
    return True


# ---------------------------------------------------------------------------------- sums in products


def norm(x: Tensor) -> Tensor:
    """Something that reads a sum twice."""
    return x * (x * x).mean(-1, keepdim=True).add(1.0).rsqrt()


def linear(x: Tensor, w: Tensor) -> Tensor:
    """A product with views around it: (G, 1, M, D) and (G, D, D)."""
    return torch.bmm(x.reshape(G, M, D), w.transpose(1, 2)).reshape(G, 1, M, D)


def layer(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Two residual sums after a pointwise one, and a result that reads the last of them."""
    first = h + m
    second = first + linear(norm(first), u)
    third = second + linear(norm(second), v)
    return third, third[:, :, -2:].mean(2)


def reversed_sums(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The product on the left."""
    first = linear(m, u) + h * 2
    return (linear(norm(first), v) + first,)


def several_results(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """A sum on the way is a result too, and one is returned twice."""
    first = h * m
    second = first + linear(norm(first), u)
    third = second + linear(norm(second), v)
    return second, third, third


def two_chains(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Two results that are read across each other's sums."""
    left, right = h * 2, m * 2
    more = left + linear(norm(right), u)
    other = right + linear(norm(more), v)
    return more, other, other * more


def viewed(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """A result that is a view of the sum."""
    return ((h * m + linear(m, u)).reshape(G, M, D),)


def plain(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """One layer at several segments: a product of matrices."""
    x = (h * m).reshape(G * M, D)
    return (x + torch.mm(m.reshape(G * M, D), u[0]),)


def parts(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """What an operation with several results leaves is read on both sides of a sum."""
    values, places = torch.max(h, -1, keepdim=True)
    left, right = torch.split(m, D // 2, -1)
    total = h * values + linear(m, u)
    return total, total * places + torch.cat([right, left], -1)


# Per function how many products accumulate.
SUMS: dict[Callable[..., Any], int] = {
    layer: 2,
    reversed_sums: 2,
    several_results: 2,
    two_chains: 2,
    viewed: 1,
    plain: 1,
    parts: 1,
}


def read_later(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    first = h * m
    total = first + linear(m, u)
    return total, total * first


def read_later_as_view(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    first = h * m
    row = first[:, :, 0]
    total = first + linear(m, u)
    return total, total[:, :, 1] + row


def factor_of_its_own_product(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    first = h * m
    return (first + linear(first, u),)


def factor_of_a_later_product(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The product reads what the first sum takes the place of, and its own sum stands behind it."""
    first, other = h * m, m * 2
    late = linear(first, v)
    total = first + linear(m, u)
    return total, other + late


def broadcast(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return ((h * m)[:, :, :1] + linear(m, u),)


def scaled(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (torch.add(h * m, linear(m, u), alpha=2),)


def product_read_twice(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    product = linear(m, u)
    return h * m + product, product * 2


def product_with_itself(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    product = torch.bmm(m.reshape(G, M, D), u)
    return (product + product,)


def given_value(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """It would have to be copied: nothing is won."""
    return (h + linear(m, u),)


def two_products(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (linear(h, u) + linear(m, v),)


def moved(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The product does not lie as the sum does."""
    return (u * v + torch.bmm(u, v).transpose(1, 2),)


def no_result(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return ((h * m + linear(m, u)).tanh(),)


def transposed_result(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return ((h * m + linear(m, u)).reshape(G, M, D).transpose(1, 2).contiguous(),)


REFUSED = (
    read_later,
    read_later_as_view,
    factor_of_its_own_product,
    broadcast,
    scaled,
    product_read_twice,
    product_with_itself,
    given_value,
    two_products,
    moved,
    no_result,
    transposed_result,
)


def operands(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """h, m (G, 1, M, D) and u, v (G, D, D)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((G, 1, M, D), (G, 1, M, D), (G, D, D), (G, D, D))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def traced(function: Callable[..., Any], dtype: torch.dtype) -> fx.GraphModule:
    """A form as :func:`diagpass.lowering.batch.batch_kind` leaves it."""
    with FakeTensorMode() as mode:
        examples = [mode.from_tensor(value) for value in operands(dtype)]
        form = make_fx(function)(*examples)
    form.graph.eliminate_dead_code()
    form.recompile()
    return form


def count(form: fx.GraphModule) -> int:
    """How many products accumulate."""
    return sum(node.target in IN_PLACE for node in form.graph.nodes)


def children(pieces: fx.GraphModule) -> list[Any]:
    """The graphs of a form that was cut."""
    return list(pieces.children())


def results_of(run: Any, written: fx.GraphModule, values: list[Tensor]) -> list[Tensor]:
    """What a form leaves in memory that held NaN."""
    given = [
        torch.full(node.meta["val"].shape, float("nan"), dtype=node.meta["val"].dtype)
        for node in written.graph.find_nodes(op="placeholder")[len(values) :]
    ]
    before = copy.deepcopy(values)
    with torch.no_grad():
        run(*values, *given)
    assert_tree_same(values, before, 0.0, "operands")
    return given


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", SUMS)
def test_products_accumulate_into_results(function: Callable[..., Any], dtype: torch.dtype) -> None:
    values = operands(dtype)
    written = write_results(traced(function, dtype))
    whole = accumulate(written, always)
    assert count(whole) == SUMS[function] and count(written) == 0
    expected = list(function(*values))
    rtol = 1e-13 if dtype == torch.float64 else 1e-5
    assert_tree_same(results_of(written, written, values), expected, 0.0, "unchanged form")
    found = results_of(whole, written, values)
    assert_tree_same(found, expected, rtol, "accumulated")
    pieces = cut(whole)
    assert_tree_same(results_of(pieces, written, values), found, 0.0, "in pieces")
    assert count(pieces) == SUMS[function]
    assert not any(map(count, children(pieces)))


@pytest.mark.parametrize("function", [layer, parts])
def test_pieces_are_compiled_each_for_itself(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accumulate_module, "saves_traffic", always)
    values = operands(torch.float64)
    form = traced(function, torch.float64)
    run = Forms(Options())._compiled(form, "form", given=True)
    names = [piece.name for piece in run.children() if isinstance(piece, InductorKind)]
    assert names == [f"form_piece_{at}" for at in range(SUMS[function] + 1)]
    written = write_results(form)
    for _ in range(2):
        assert_tree_same(results_of(run, written, values), list(function(*values)), 1e-12, "compiled")


def test_a_value_that_lies_in_a_result_does_not_cross_pieces() -> None:
    """It is written once, there, and whoever reads it later reads it there."""
    written = write_results(traced(layer, torch.float64))
    whole = accumulate(written, always)
    pieces = cut(whole)
    outputs = [piece.graph.find_nodes(op="output")[0].args[0] for piece in children(pieces)]
    assert list(map(len, outputs)) == [1, 1, 0], "a factor of each product"
    copies = [node for node in whole.graph.nodes if node.target is aten.copy_.default]
    assert len(copies) == 2, "the first value of the chain, and the other result"


def test_half_precision_is_as_close_as_the_separate_sum() -> None:
    """The sum is rounded once, and not the product before it."""
    written = write_results(traced(layer, torch.bfloat16))

    def distance(run: Any, seed: int) -> float:
        values = operands(torch.bfloat16, seed)
        exact = layer(*(value.double() for value in values))[0]
        return float((results_of(run, written, values)[0].double() - exact).norm() / exact.norm())

    whole = accumulate(written, always)
    accumulated, separate = (sum(distance(run, seed) for seed in range(30)) for run in (whole, written))
    assert 0 < accumulated < separate


@pytest.mark.parametrize("function", REFUSED)
def test_sums_that_are_left_alone(function: Callable[..., Any]) -> None:
    written = write_results(traced(function, torch.float64))
    assert accumulate(written, always) is written


def program(seed: int) -> Callable[..., tuple[Tensor, ...]]:
    """Sums, products, views and pointwise operations on one another, at random; up to four results."""

    def run(h: Tensor, m: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        draw = random.Random(seed)
        values = [h * 2, m + 1, h, m]
        for _ in range(draw.randint(4, 14)):
            one, other = draw.choice([values[-1], draw.choice(values)]), draw.choice(values)
            product = linear(draw.choice([norm(other), other]), draw.choice([u, v]))
            turned = one.reshape(G, M, D).transpose(1, 2).tanh().transpose(1, 2).reshape(G, 1, M, D)
            left, right = torch.split(one, D // 2, -1)
            choices = [one + product, product + one, one + product, norm(one), one * other, turned]
            choices += [torch.cat([right, left], -1), one[:, :, :1] + other]
            values += [product] * (draw.random() < 0.1) + [draw.choice(choices)]
        return tuple(value.contiguous() for value in (values[-1], *draw.sample(values, draw.randint(0, 3))))

    return run


def test_random_programs_that_accumulate_compute_the_same() -> None:
    accumulated = []
    for seed in range(40):
        values = operands(torch.float64, seed)
        written = write_results(traced(program(seed), torch.float64))
        whole = accumulate(written, always)
        accumulated.append(count(whole))
        if whole is not written:
            expected = list(program(seed)(*values))
            for run in (whole, cut(whole)):
                assert_tree_same(results_of(run, written, values), expected, 1e-10, f"program {seed}")
    assert accumulated.count(0) < 30 and max(accumulated) > 1


def test_of_two_sums_only_the_one_that_takes_nothing_away() -> None:
    values = operands(torch.float64)
    function = factor_of_a_later_product
    written = write_results(traced(function, torch.float64))
    whole = accumulate(written, always)
    assert count(whole) == 1
    assert_tree_same(results_of(whole, written, values), list(function(*values)), 1e-13, "accumulated")


def test_only_half_precision_on_an_accelerator_by_default() -> None:
    written = write_results(traced(layer, torch.bfloat16))
    assert accumulate(written) is written
    with FakeTensorMode():
        for device, dtype, expected in (
            ("cuda", torch.bfloat16, True),
            ("cuda", torch.float16, True),
            ("cuda", torch.float32, False),
            ("cpu", torch.bfloat16, False),
        ):
            assert saves_traffic(torch.empty(2, dtype=dtype, device=device)) is expected


class ResidualLayer(nn.Module):
    """Memory is added to the tokens, then two residual products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(models.D, models.D, bias=False) for _ in range(2))
        self.reset()

    def reset(self) -> None:
        """Zero memory."""
        self.m = torch.zeros(models.B, 1, models.D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = h + self.m
        h = h + self.first(norm(h))
        h = h + self.second(norm(h))
        self.m = h.mean(1, keepdim=True)
        return h


def residual() -> SegmentLoop:
    """A loop with a chain of sums in each layer."""
    return models.keeps(models.Step([ResidualLayer() for _ in range(models.L)])).double().eval()


def test_waves_that_accumulate_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []

    def counted(form: fx.GraphModule) -> fx.GraphModule:
        whole = accumulate(form, always)
        found.append(count(whole))
        return whole

    monkeypatch.setattr("diagpass.runtime.forms.accumulate", counted)
    loop = residual()
    fast: Any = fast_copy(loop)
    states: list[Any] = [None, None]
    for seed in range(4):
        check(loop, fast, models.inputs("gru", 7 * TOKENS, seed=seed), states, 1e-10)
    assert set(found) == {2}


# --------------------------------------------------------------------------- keys and values of few heads

B, HEADS, FEW, T, WIDTH = 2, 6, 2, 5, 8
CPU_KERNEL = aten._scaled_dot_product_flash_attention_for_cpu.default
CUDNN = aten._scaled_dot_product_cudnn_attention.default
FLASH = aten._scaled_dot_product_flash_attention.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default
MORE = {CUDNN: (None, False), EFFICIENT: (None, False)}  # what stands between the values and the rest


def repeat(x: Tensor, n: int = HEADS // FEW) -> Tensor:
    """As Hugging Face models do it."""
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, n, tokens, width).reshape(batch, heads * n, tokens, width)


def folded(x: Tensor) -> Tensor:
    """As a batched form does it: the group's axis (of one) comes first, and is folded into the batch."""
    x = x.unflatten(0, (1, B))
    repeated = x.unsqueeze(3).expand(1, B, FEW, HEADS // FEW, T, WIDTH).clone().view(1, B, HEADS, T, WIDTH)
    return repeated.reshape(B, HEADS, T, WIDTH)


def interleaved(x: Tensor) -> Tensor:
    return x.repeat_interleave(HEADS // FEW, 1)


def of_strided(x: Tensor) -> Tensor:
    """What is repeated is a view of tokens side by side."""
    return repeat(x.transpose(1, 2).contiguous().transpose(1, 2))


def in_two_steps(x: Tensor) -> Tensor:
    """Only the last step is undone."""
    return repeat(repeat(x[:, :1], 2), 3)


def from_one(x: Tensor) -> Tensor:
    """One head for all, and no copy at all."""
    return x[:, :1].expand(B, HEADS, T, WIDTH)


REPEATED = (repeat, folded, interleaved, of_strided, in_two_steps, from_one)


def tiled(x: Tensor) -> Tensor:
    """Heads 0, 1, 0, 1, ... and not 0, 0, 1, 1, ..."""
    return x[:, None].expand(B, HEADS // FEW, FEW, T, WIDTH).reshape(B, HEADS, T, WIDTH)


def halved(x: Tensor) -> Tensor:
    """Each head repeated, but torn apart: half a head's width is a head."""
    return repeat(x).reshape(B, 2 * HEADS, T, WIDTH // 2)[:, :HEADS].repeat(1, 1, 1, 2)


def over_tokens(x: Tensor) -> Tensor:
    return x[:, :1, :1].expand(B, HEADS, T, WIDTH)


def own(x: Tensor) -> Tensor:
    return torch.cat([x, x, x], 1)


def attention(
    keys: Callable[[Tensor], Tensor], values: Callable[[Tensor], Tensor], kernel: Any, dropout: float = 0.0
) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel(q, keys(k), values(v), *MORE.get(kernel, ()), dropout, True)[0]

    return run


def heads(dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    """q (B, HEADS, T, WIDTH), k and v (B, FEW, T, WIDTH)."""
    torch.manual_seed(0)
    return [torch.randn(B, count, T, WIDTH, dtype=dtype).to(device) for count in (HEADS, FEW, FEW)]


def key_heads(form: fx.GraphModule, kernel: Any) -> int:
    """How many heads of keys the attention reads."""
    (node,) = form.graph.find_nodes(op="call_function", target=kernel)
    return int(node.args[1].meta["val"].shape[1])  # type: ignore[union-attr]


@pytest.mark.parametrize("repeated", REPEATED)
def test_repeated_heads_are_read_where_they_are(repeated: Callable[..., Any]) -> None:
    """The same bits: the kernel computes the same on the same numbers."""
    function = attention(repeated, repeated, CPU_KERNEL)
    values = heads()
    expected = function(*values)
    form = without_repeated_heads(make_fx(function)(*values))
    assert key_heads(form, CPU_KERNEL) == {in_two_steps: 2, from_one: 1}.get(repeated, FEW)
    assert_tree_same(form(*values), expected, 0.0, "output")
    targets = [node.target for node in form.graph.nodes]
    assert repeated is in_two_steps or aten.expand.default not in targets


@pytest.mark.parametrize("kernel", [CUDNN, FLASH])
@pytest.mark.parametrize("repeated", REPEATED)
def test_kernels_of_accelerators_read_few_heads(repeated: Callable[..., Any], kernel: Any) -> None:
    """On meta tensors for the shapes; with another attention in the kernel's place for the numbers."""
    function = attention(repeated, repeated, kernel)
    form = make_fx(function)(*heads(torch.float16, "meta"))
    assert key_heads(form, kernel) == HEADS
    form = without_repeated_heads(form)
    few = key_heads(form, kernel)
    assert few < HEADS
    assert form(*heads(torch.float16, "meta")).shape == (B, HEADS, T, WIDTH)

    def reference(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        assert k.shape[1] == v.shape[1] == few
        k, v = (x.repeat_interleave(HEADS // few, 1) for x in (k, v))
        return (torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),)

    (node,) = form.graph.find_nodes(op="call_function", target=kernel)
    node.target = reference
    form.recompile()
    values = heads()
    assert_tree_same(form(*values), attention(repeated, repeated, CPU_KERNEL)(*values), 1e-13, "output")


@pytest.mark.parametrize(
    "keys, values, kernel, dropout",
    [
        (tiled, tiled, CPU_KERNEL, 0.0),
        (halved, halved, CPU_KERNEL, 0.0),
        (over_tokens, over_tokens, CPU_KERNEL, 0.0),
        (own, own, CPU_KERNEL, 0.0),
        (repeat, tiled, CPU_KERNEL, 0.0),
        (repeat, own, CPU_KERNEL, 0.0),
        (repeat, from_one, CPU_KERNEL, 0.0),
        (repeat, repeat, EFFICIENT, 0.0),
        (repeat, repeat, FLASH, 0.5),
    ],
)
def test_attention_that_is_left_alone(
    keys: Callable[..., Any], values: Callable[..., Any], kernel: Any, dropout: float
) -> None:
    function = attention(keys, values, kernel, dropout)
    form = make_fx(function)(*heads(torch.float16, "cpu" if kernel is CPU_KERNEL else "meta"))
    before = form.code
    assert without_repeated_heads(form).code == before and key_heads(form, kernel) == HEADS
    assert kernel in (*KERNELS, EFFICIENT)


def test_masks_are_of_queries_heads() -> None:
    mask = torch.randn(B, HEADS, T, T, dtype=torch.float64)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return CPU_KERNEL(q, repeat(k), repeat(v), attn_mask=mask)[0]

    values = heads()
    form = without_repeated_heads(make_fx(function)(*values))
    assert key_heads(form, CPU_KERNEL) == FEW
    assert_tree_same(form(*values), function(*values), 0.0, "output")


def test_a_model_of_grouped_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hugging Face Llama with a mask repeats its heads, and none is repeated in a wave."""
    found: list[fx.GraphModule] = []

    def kept(form: fx.GraphModule) -> fx.GraphModule:
        found.append(without_repeated_heads(form))
        return form

    monkeypatch.setattr("diagpass.lowering.batch.without_repeated_heads", kept)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, num_key_value_heads=2, **sizes)
    config._attn_implementation = "sdpa"
    model = armt.wrap(LlamaForCausalLM(config), 8).eval()
    ids = torch.randint(97, (2, 24))
    expected = copy.deepcopy(model)(ids).logits
    fast: Any = fast_copy(model)
    with torch.no_grad():
        assert_tree_same(fast(ids).logits, expected.detach(), 1e-4, "logits")
    assert found and {key_heads(form, CPU_KERNEL) for form in found} == {2}
