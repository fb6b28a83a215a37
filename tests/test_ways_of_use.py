"""The ways in which models are used: each gives the sequential results in groups, or says why not."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import diagpass
from diagpass import SegmentLoop
from tests.helpers import assert_tree_same, collect_warnings, fast_copy

B, T, D, L, S = 2, 3, 8, 3, 5


class Layer(nn.Module):
    """A residual linear layer whose state is a running mean of what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        y = self.outer(F.gelu(self.inner(h + m.unsqueeze(1))))
        return h + y, 0.5 * m + y.mean(1)


class Step(nn.Module):
    """One segment; the state is a list with a tensor per layer."""

    def __init__(self, layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D)
        self.layers = nn.ModuleList(layer() for _ in range(L))

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h = self.embed(x)
        state = [torch.zeros_like(h[:, 0]) for _ in self.layers] if state is None else list(state)
        for at, layer in enumerate(self.layers):
            h, state[at] = layer(h, state[at])
        return h, state


def loop_of(step: nn.Module, dtype: torch.dtype = torch.float64) -> SegmentLoop:
    return SegmentLoop(step.to(dtype).eval(), T, carries_state=True)


def features(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, S * T, D, dtype=dtype)


def check(
    loop: SegmentLoop,
    x: Tensor,
    rtol: float = 1e-10,
    around: Callable[[], Any] = torch.no_grad,
) -> diagpass.Report:
    """Batched and unbatched results are the sequential ones, and most cells run in groups."""
    plain, fast, unbatched = copy.deepcopy(loop), fast_copy(loop), fast_copy(loop, max_width=1)
    with collect_warnings() as warned, around():
        expected, got, same = plain(x), fast(x), unbatched(x)
    assert fast.report.ran == "wavefront", fast.report
    assert_tree_same(got, expected, rtol, "batched")
    assert_tree_same(same, expected, 0.0, "unbatched")
    assert not warned and fast.report.waves == L + S - 1, (warned, str(fast.report))
    assert fast.report.batched_cells >= 0.7 * fast.report.cells, fast.report
    return fast.report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    check(loop_of(Step(), dtype), features(dtype), rtol=3e-2)


def test_autocast() -> None:
    @contextlib.contextmanager
    def around() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            yield

    check(loop_of(Step(), torch.float32), features(torch.float32), 3e-2, around)


def test_inference_mode() -> None:
    check(loop_of(Step()), features(), around=torch.inference_mode)


def test_forward_hooks() -> None:
    """Hooks are a part of what a cell computes."""
    loop = loop_of(Step())
    for layer in loop.step.layers:
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.25, args[1]))
        layer.register_forward_hook(lambda module, args, out: (out[0] - 0.5 * args[0], out[1]))
    check(loop, features())


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["inner", "outer"], init_lora_weights=False)
    check(loop_of(peft.get_peft_model(Step(), config)), features())


class Int8Linear(nn.Module):
    """Weights in int8 with a scale per row, made wide at each call, as weight-only quantisation does it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_int8_weights() -> None:
    """Weight-only quantisation: the stacks of int8 weights are int8."""
    step = Step()
    for layer in step.layers:
        layer.inner, layer.outer = Int8Linear(layer.inner), Int8Linear(layer.outer)
    assert loop_of(step).step.layers[0].inner.weight.dtype == torch.int8
    check(loop_of(step), features())


def test_tensor_subclasses_are_refused_by_name() -> None:
    """As weights are that a quantisation library has replaced."""
    loop, x = loop_of(Step()), features()
    for layer in loop.step.layers:
        weight = layer.inner.weight.detach()
        layer.inner.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    with torch.no_grad(), collect_warnings() as warned:
        expected, got = plain(x), fast(x)
    assert_tree_same(tree_map(inner, got), tree_map(inner, expected), 0.0, "sequential")
    assert fast.report.ran == "sequential" and len(warned) == 1
    assert "layers" in warned[0] and "TwoTensor, a tensor that stands for several others" in warned[0], warned


def inner(value: Tensor) -> Tensor:
    return value.a if isinstance(value, TwoTensor) else value


class Checkpointed(Layer):
    """Recomputes in backward, whether or not there will be one."""

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(super().forward, h, m, use_reentrant=False)


def test_gradient_checkpointing() -> None:
    check(loop_of(Step(Checkpointed)), features())


def test_parametrised_weights() -> None:
    def layer() -> nn.Module:
        made = Layer()
        parametrizations.weight_norm(made.inner)
        return made

    check(loop_of(Step(layer)), features())


def test_compiled_submodules() -> None:
    """What the user has compiled is captured as it stands."""
    step = Step()
    for layer in step.layers:
        layer.compile(backend="eager")
    check(loop_of(step), features())


def test_submodules_wrapped_by_compile() -> None:
    step = Step()
    for at, layer in enumerate(step.layers):
        step.layers[at] = torch.compile(layer, backend="eager")
    check(loop_of(step), features())


def test_beartype() -> None:
    beartype = pytest.importorskip("beartype").beartype

    class Checked(Layer):
        @beartype
        def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            return Layer.forward(self, h, m)

    check(loop_of(Step(Checked)), features())


def jaxtyped_layer(checks: bool) -> type[nn.Module]:
    """A layer whose forward states its shapes, checked at run time or not."""
    jaxtyping = pytest.importorskip("jaxtyping")
    beartype = pytest.importorskip("beartype").beartype
    Tokens, Mean = jaxtyping.Float[Tensor, "b t d"], jaxtyping.Float[Tensor, "b d"]

    class Checked(Layer):
        @jaxtyping.jaxtyped(typechecker=beartype if checks else None)
        def forward(self, h: Tokens, m: Mean) -> tuple[Tokens, Mean]:
            return Layer.forward(self, h, m)

    return Checked


@pytest.mark.parametrize("checks", [False, True])
def test_jaxtyping(checks: bool) -> None:
    """It keeps what it has bound on a stack in a global, which is empty again after each call."""
    check(loop_of(Step(jaxtyped_layer(checks))), features())


class Spread(Step):
    """The upper layers lie on another device."""

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        h = self.embed(x)
        state = [None] * L if state is None else list(state)
        for at, layer in enumerate(self.layers):
            h = h.to(layer.inner.weight.device)
            m = torch.zeros_like(h[:, 0]) if state[at] is None else state[at]
            h, state[at] = layer(h, m)
        return h, state


def test_layers_on_several_devices_are_grouped_per_device() -> None:
    """Seen without a second device: the kinds differ, and no group mixes them."""
    loop = loop_of(Spread())
    loop.step.layers[-1].to("meta")
    with torch.no_grad():
        report = diagpass.explain(loop, features())
    told = report.to_dict()
    for wave in told["schedule"]:
        for group in wave:
            layers = {told["grid"][cell]["layer"] for cell in group["cells"]}
            assert layers <= {0, 1} or layers == {2}, group


class Branches(Layer):
    """Chooses by a value."""

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        if h.sum() > 0:
            h = h.sin()
        return super().forward(h, m)


class Counts(Layer):
    """Cuts by a number that lies in a tensor."""

    def forward(self, h: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        h, m = super().forward(h, m)
        return h, m * int(m.argmax())


@pytest.mark.parametrize("layer", [Branches, Counts])
def test_control_flow_by_values_is_refused_by_line(layer: type[nn.Module]) -> None:
    """The first call and explain name the reason and the user's line; the results are the sequential ones."""
    loop, x = loop_of(Step(layer)), features()
    with torch.no_grad():
        said = str(diagpass.explain(loop, x).reason)
        fast = fast_copy(loop)
        with collect_warnings() as warned:
            got = fast(x)
        assert_tree_same(got, loop(x), 0.0, "sequential")
    assert fast.report.ran == "sequential" and len(warned) == 1
    for text in (said, warned[0]):
        assert f"{__file__}:" in text, text
