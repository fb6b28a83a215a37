"""One batched form for any width: at each width it is the form for that width, or it does not serve it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from diagpass import SegmentLoop
from diagpass.errors import BatchingError
from diagpass.ir import Kind
from diagpass.kernels.choose import Choice
from diagpass.lowering import widths as widths_module
from diagpass.lowering.batch import batch_kind
from diagpass.lowering.inplace import results_of, write_results
from diagpass.lowering.widths import at_width, batch_any_width, holds, same_program, width_of
from diagpass.options import Options
from diagpass.rolled import kinds as kinds_module
from diagpass.rolled import run as run_module
from diagpass.rolled.waves import Direct, Replayed
from diagpass.runtime import forms as forms_module
from diagpass.runtime.compiled import InductorKind, InductorWidths
from diagpass.runtime.forms import Forms
from tests import rolled_models as models
from tests import tape
from tests.helpers import assert_same, fast_copy
from tests.models import ZOO
from tests.rolled_models import B, D, T

DEEP = 7  # layers: the ramps are 2 to 6 cells wide

NAMES = ("gru", "rnn_stack", "stacked", "transformer_xl", "hybrid", "masked", "rwkv_state", "fifo_list")


def batched_kinds(loop: SegmentLoop, x: Any) -> list[tuple[Kind, tuple[bool, ...]]]:
    """The kinds that ran in groups, each with which operands were shared."""
    fast: Any = fast_copy(loop)
    with torch.no_grad():
        fast(x)
    kinds = fast._session.kinds
    by_key = {kinds._keys[kind.index]: kind for kind in kinds.kinds}
    found = {(key, shared): None for key, _, shared in kinds._traced}
    return [(by_key[key], shared) for key, shared in found]


def made_up(graph: torch.fx.GraphModule) -> list[Tensor]:
    """Operands for a form of one width."""
    made = []
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        shape = tuple(int(size) for size in value.shape)
        floating = value.dtype.is_floating_point
        made.append(
            torch.randn(shape, dtype=value.dtype) if floating else torch.ones(shape, dtype=value.dtype)
        )
    return made


@pytest.mark.parametrize("name", NAMES)
def test_at_each_width_it_is_the_form_for_that_width(name: str) -> None:
    found = batched_kinds(models.build(name), models.inputs(name, 5 * T))
    assert found
    for kind, shared in found:
        graph, stacked = batch_any_width(kind, shared)
        symbol = width_of(graph)
        assert symbol is not None
        for width in (2, 3, 4, 7, 10):
            fixed, also_stacked = batch_kind(kind, width, shared)
            assert stacked == also_stacked and holds(symbol, width)
            assert same_program(graph, width, fixed)
            operands = made_up(fixed)
            expected = fixed(*operands)
            for form in (graph, at_width(graph, width)):
                for got, wanted in zip(form(*operands), expected, strict=True):
                    assert got.is_contiguous() and got.dtype == wanted.dtype
                    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())
            assert not same_program(graph, width + 1, fixed)


def test_a_transformer_has_one_form() -> None:
    """Attention, float32 norms, rotary tables: ARMT over a Llama as it stands."""
    found = batched_kinds(models.build("armt"), models.inputs("armt", 4 * T))
    kind, shared = found[0]
    graph, _ = batch_any_width(kind, shared)
    for width in (2, 5):
        fixed, _ = batch_kind(kind, width, shared)
        operands = made_up(fixed)
        assert same_program(graph, width, fixed)
        for got, wanted in zip(graph(*operands), fixed(*operands), strict=True):
            assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


def test_an_operation_that_fixes_the_width_is_refused() -> None:
    ((kind, shared),) = batched_kinds(models.build("mamba"), models.inputs("mamba", 5 * T))
    with pytest.raises(BatchingError, match="fixes the width"):
        batch_any_width(kind, shared)


def symbolic_width() -> Any:
    """A width about which nothing has been decided."""
    ((kind, shared),) = batched_kinds(models.build("rnn_stack"), models.inputs("rnn_stack", 5 * T))
    return width_of(batch_any_width(kind, shared)[0])


def test_a_decision_on_the_width_limits_whom_it_serves() -> None:
    width = symbolic_width()
    assert not holds(width, 1) and all(holds(width, at) for at in range(2, 50))
    assert width > 4 and width * 3 != 27
    assert [at for at in range(1, 12) if holds(width, at)] == [5, 6, 7, 8, 10, 11]
    assert int(width) == widths_module.HINT
    assert not any(holds(width, at) for at in range(1, 12))


# ------------------------------------------------------------------------------------ whole runs


class Layer(nn.Module):
    """A layer with a norm, a product and a state."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.mem = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)
        self.reset()

    def reset(self) -> None:
        """Zero memory."""
        self.state = torch.zeros(B, 1, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = torch.cat([self.mix(self.norm(h)).tanh(), self.mem(self.state)], 1)[:, :T] + h
        self.state = self.state * 0.5 + h.mean(1, keepdim=True)
        return h


def deep(layer: Callable[[], nn.Module] = Layer, layers: int = DEEP) -> SegmentLoop:
    """A loop with many layers."""
    torch.manual_seed(1)
    return models.keeps(models.Step([layer() for _ in range(layers)])).double().eval()


def widths_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the groups that run from now on."""
    found: list[int] = []
    split = kinds_module.Kinds.split

    def counted(self: Any, cells: Any) -> Any:
        groups = split(self, cells)
        found.extend(map(len, groups))
        return groups

    monkeypatch.setattr(kinds_module.Kinds, "split", counted)
    return found


def check(loop: SegmentLoop, fast: Any, rtol: float = 1e-12, calls: int = 2) -> None:
    """Calls of several lengths agree."""
    states: list[Any] = [None, None]
    for segments in (2, 5, DEEP + 4):
        for seed in range(calls):
            torch.manual_seed(seed)
            tape.check(loop, fast, models.tokens(segments * T), states, rtol)


def traced_widths(fast: Any) -> list[int | None]:
    """The widths that forms were traced for, None for any."""
    return [width for _, width, _ in fast._session.kinds._traced]


def test_ramps_run_in_one_group_each(monkeypatch: pytest.MonkeyPatch) -> None:
    found = widths_run(monkeypatch)
    loop = deep()
    fast: Any = fast_copy(loop)
    check(loop, fast)
    assert set(found) == set(range(1, DEEP + 1))
    assert set(traced_widths(fast)) == {None, DEEP}


@pytest.mark.parametrize("layers", [2, 3])
def test_two_narrow_widths_at_least_or_it_is_not_worth_it(layers: int) -> None:
    loop = deep(layers=layers)
    fast: Any = fast_copy(loop)
    check(loop, fast)
    assert None not in traced_widths(fast)


def test_a_limit_on_the_width_is_the_steady_width() -> None:
    loop = deep()
    fast: Any = fast_copy(loop, max_width=5)
    check(loop, fast)
    assert set(traced_widths(fast)) == {None, 5}


def test_layers_with_a_convolution_run_in_usual_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    found = widths_run(monkeypatch)
    loop = deep(models.MambaLayer)
    fast: Any = fast_copy(loop)
    check(loop, fast)
    assert set(found) == {1, 2, 3, 4, 6, DEEP} and fast._session.kinds.notes == {}


def test_a_width_that_ran_as_one_group_goes_on_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """When 5 is met it shows that the form for any width is not for all: the same call splits as before."""
    monkeypatch.setattr(kinds_module, "holds", lambda _, at: at < 5)
    found = widths_run(monkeypatch)
    loop = deep()
    fast: Any = fast_copy(loop)
    x = models.tokens((DEEP + 2) * T)
    with torch.no_grad():
        first = fast(x)
        assert set(found) == set(range(1, DEEP + 1)) and set(traced_widths(fast)) == {None, 5, 6, DEEP}
        del found[:]
        assert torch.equal(fast(x), first) and 5 in found and None in traced_widths(fast)
    check(loop, fast_copy(loop), calls=1)


def test_a_form_that_is_not_the_one_for_the_steady_width_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds_module, "same_program", lambda *_: False)
    found = widths_run(monkeypatch)
    loop = deep()
    check(loop, fast_copy(loop))
    assert set(found) == {1, 2, 3, 4, 6, DEEP}


@pytest.mark.parametrize("form", ["measured", "looped", "single"])
def test_forms_that_are_measured_or_pinned_are_for_their_width(form: str) -> None:
    fast: Any = fast_copy(deep(layers=5), form=form)
    with torch.no_grad():
        fast(models.tokens(6 * T))
    assert set(traced_widths(fast)) == {2, 3, 4, 5}


# -------------------------------------------------------------------------------------- compiled


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the graphs that are compiled, in order; glue is not."""
    found: list[str] = []
    compile_it, begin_it = InductorKind._compile, InductorKind.begin

    def named(self: InductorKind, operands: tuple) -> None:
        if self.name == "glue":
            self._compiled, self._strides = self.graph_module, [None] * len(operands)
            return
        found.append(self.name)
        compile_it(self, operands)

    def begun(self: InductorKind, known: Sequence[Any]) -> None:
        if self.name != "glue":
            begin_it(self, known)
        if self._ahead is not None:
            found.append(self.name)

    monkeypatch.setattr(InductorKind, "_compile", named)
    monkeypatch.setattr(InductorKind, "begin", begun)
    return found


def replay(kinds: Any, max_width: int | None) -> Any:
    """The runner of CUDA, with a tape for its graphs."""
    if max_width == 1:
        return Direct(kinds)
    if kinds.runner is None:
        kinds.runner = Replayed(kinds, tape.Tape())  # type: ignore[arg-type]
    return kinds.runner


def test_three_compilations_serve_all_widths(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "runner", replay)
    loop = deep()
    options = {"compiler": "inductor", "form": "batched"}
    fast: Any = diagpass.transform(copy.deepcopy(loop), options=options)
    check(loop, fast)
    assert len(compiled) == 3 and [name for name in compiled if name.endswith("any_width")]
    (common,) = (run for run in fast._session.kinds._runs.values() if isinstance(run, InductorWidths))
    assert common._served == set(range(2, DEEP)) and common.alone == {}


@pytest.mark.parametrize("given", [False, True])
def test_compiled_it_computes_the_same_at_each_width(given: bool) -> None:
    ((kind, shared),) = batched_kinds(deep(layers=3), models.tokens(5 * T))
    graph, _ = batch_any_width(kind, shared)
    run = InductorWidths(write_results(graph) if given else graph, "any")
    for width in (2, 15, 3, 7, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14):
        fixed, _ = batch_kind(kind, width, shared)
        operands = made_up(fixed)
        targets = [torch.empty(shape, dtype=dtype) for shape, dtype, _ in results_of(graph, width)]
        got = run(*operands, *targets) if given else run(*operands)
        for left, right in zip(targets if given else got, fixed(*operands), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)
    assert run.alone == {}


def test_what_the_compiler_decides_on_the_width_is_checked(
    compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor

    compile_it = torch._inductor.compile

    def decides(graph: Any, examples: Any) -> Any:
        for example in examples:
            if isinstance(example.shape[0], torch.SymInt):
                assert example.shape[0] > 4
        return compile_it(graph, examples)

    monkeypatch.setattr(torch._inductor, "compile", decides)
    ((kind, shared),) = batched_kinds(deep(layers=3), models.tokens(5 * T))
    run = InductorWidths(batch_any_width(kind, shared)[0], "any")
    for width in (2, 7, 3, 5, 2, 3):
        fixed, _ = batch_kind(kind, width, shared)
        operands = made_up(fixed)
        for left, right in zip(run(*operands), fixed(*operands), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-13, atol=1e-13)
    assert set(run.alone) == {2, 3} and compiled == ["any", "any_w2", "any_w3"]


class Residual(nn.Module):
    """Two sums with products, one behind the other, and state."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.state = torch.zeros(1, 1, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        h = torch.sin(h) + self.state
        h = h + self.first(torch.tanh(h))
        h = h + self.second(torch.tanh(h))
        self.state = h.mean((0, 1), keepdim=True)
        return h


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_products_accumulate_at_each_width(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diagpass.lowering.accumulate.saves_traffic", lambda value: True)
    torch.manual_seed(0)
    loop = SegmentLoop(models.Step([Residual() for _ in range(4)]), T).double().eval()
    ((kind, shared),) = batched_kinds(loop, models.tokens(5 * T))
    graph, _ = batch_any_width(kind, shared)
    symbol: Any = width_of(graph)
    run = Forms(Options.parse({"compiler": compiler}))._compiled(graph, "form", given=True)
    assert "baddbmm_" in getattr(run, "code", "")
    for width in (2, 9, 3, 7, 4):
        fixed, _ = batch_kind(kind, width, shared)
        operands = made_up(fixed)
        targets = [torch.empty(shape, dtype=dtype) for shape, dtype, _ in results_of(graph, width)]
        run(*operands, *targets)
        for got, wanted in zip(targets, fixed(*operands), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        assert holds(symbol, width)
    assert not symbol.node.shape_env.guards


def test_two_compilations_serve_an_unrolled_run(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU; its groups have several widths, its corners are single cells."""
    batched = Choice("batched", {"batched": 1.0, "looped": 2.0})
    monkeypatch.setattr(forms_module, "_measured", lambda product: batched)
    model, inputs = ZOO["attribute"]()
    report = assert_same(model, inputs, options={"compiler": "inductor"}, ran="wavefront")
    assert report.mean_width > 1
    assert [name for name in compiled if name.endswith("any_width")], compiled
    assert not [name for name in compiled if "_w" in name and not name.endswith("any_width")], compiled
