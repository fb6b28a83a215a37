"""Unrolled programs as one replay: the same results, whatever is done between the calls.

A tape stands in for CUDA graphs. It repeats a call on the memory that it was recorded with, which holds
nothing of an earlier call when the next one begins.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagpass.runtime import graphed as graphed_module
from diagpass.runtime.clock import measuring
from diagpass.runtime.compiled import InductorKind
from diagpass.runtime.graphed import MOST_KEYS, Graphed, _Recording
from tests.helpers import (
    MatmulCounter,
    assert_same,
    assert_state_same,
    assert_tree_same,
    fast_copy,
    run_sequential,
)
from tests.models import EXPECT, ZOO, Mix, tokens
from tests.tape import Tape
from tests.test_threads import _in_threads

OPTIONS = {"compiler": "inductor", "loop": "flat"}
CPU = torch.device("cpu")


def spoil(value: Tensor) -> None:
    """Leave nothing of what was there."""
    value.fill_(float("nan") if value.is_floating_point() else 0)


class Forgetful(_Recording):
    """A recording that keeps no contents between calls, and weights only by where they were."""

    def __init__(self, module: Any, args: Any, *more: Any) -> None:
        args = [value.detach() if isinstance(value, nn.Parameter) else value for value in args]
        super().__init__(module, args, *more)
        self._forget()

    def play(self, args: Any) -> Any:
        found = super().play(args)
        self._forget()
        return found

    def _forget(self) -> None:
        for value in (*self._stage.values(), *self._left):
            spoil(value)


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Graphed]:
    """All programs are recorded, by a tape, and not compiled; the programs, the last one last."""
    programs: list[Graphed] = []

    def uncompiled(self: InductorKind, operands: tuple) -> None:
        self._strides = [x.stride() if isinstance(x, Tensor) else None for x in operands]
        self._compiled = self.graph_module

    init = Graphed.__init__

    def noted(self: Graphed, *args: Any) -> None:
        init(self, *args)
        programs.append(self)

    monkeypatch.setattr(graphed_module, "recorder_for", lambda device: Tape)
    monkeypatch.setattr(graphed_module, "_Recording", Forgetful)
    monkeypatch.setattr(InductorKind, "_compile", uncompiled)
    monkeypatch.setattr(Graphed, "__init__", noted)
    return programs


def pair(name: str, **options: Any) -> tuple[nn.Module, Any]:
    """A model of the zoo and its transformed copy."""
    model, _ = ZOO[name]()
    return model, fast_copy(model, **OPTIONS, **options)


def agree(model: nn.Module, fast: Any, *inputs: Any) -> Any:
    """A call of each: the same outputs and state."""
    expected, got = run_sequential(model, inputs), run_sequential(fast, inputs)
    assert_tree_same(got, expected, 1e-12, "output")
    assert_state_same(fast.original, model, 1e-12)
    return got


RECORDED = (
    "attribute",
    "attribute_none",
    "buffer_columns",
    "buffer_ring",
    "alias_view",
    "returns_buffer",
    "int_buffer",
    "list_states",
    "stacked_inplace",
    "stacked_cat",
    "returned_tuple",
    "fifo_memory",
    "tied_some",
    "hybrid",
    "layer_scale",
    "embeddings",
    "experts",
    "batchnorm_train",
    "sdpa_eval",
    "nested_io",
    "inplace_input",
    "out_slices",
    "scratch_slots",
)


@pytest.mark.parametrize("name", RECORDED)
def test_replays_compute_the_same(name: str, made: list[Graphed]) -> None:
    model, inputs = ZOO[name]()
    assert_same(
        model, inputs, OPTIONS, calls=5, ran=EXPECT[name].ran, returns_state=EXPECT[name].returns_state
    )
    program = made[-1]
    assert (program.plain, program.recorded) == (2, 1) and program.replayed >= 2


@pytest.mark.parametrize("name", ["first_segment_flag", "counters", "cache_object"])
def test_what_is_another_call_each_time_runs_as_it_stands(name: str, made: list[Graphed]) -> None:
    model, inputs = ZOO[name]()
    assert_same(model, inputs, OPTIONS, calls=2 * MOST_KEYS, ran=None)
    assert made[-1].recorded == 0 and len(made[-1]._known) <= MOST_KEYS


def test_several_lengths_in_turn(made: list[Graphed]) -> None:
    model, fast = pair("attribute")
    for _ in range(4):
        for segments in (4, 2, 3):
            agree(model, fast, tokens(segments))
    assert [(each.plain, each.recorded, each.replayed) for each in made] == 3 * [(2, 1, 2)]


def test_weights_edited_replaced_and_moved(made: list[Graphed]) -> None:
    model, fast = pair("attribute")
    x = tokens()
    edits: list[Callable[[nn.Parameter], Any]] = [
        lambda p: p.mul_(0.9),
        lambda p: p.data.add_(0.1),
        lambda p: setattr(p, "data", p.data * 0.8),
        lambda p: setattr(p, "data", p.data.clone()),
    ]
    for edit in edits:
        for _ in range(3):
            agree(model, fast, x)
        with torch.no_grad():
            for each in (model, fast.original):
                for parameter in each.parameters():
                    edit(parameter)
    agree(model, fast, x)
    kept = {name: value.clone() * 0.7 for name, value in model.state_dict().items()}
    for each in (model, fast.original):
        each.load_state_dict(copy.deepcopy(kept), assign=True)
    for _ in range(4):
        agree(model, fast, x)
    assert sum(each.recorded for each in made) >= 3


def test_what_earlier_calls_returned_stays(made: list[Graphed]) -> None:
    model, fast = pair("list_states")
    inputs = [tokens() for _ in range(6)]
    found = [run_sequential(fast, (x,)) for x in inputs]
    assert made[-1].replayed == 4
    for x, got in zip(inputs, found, strict=True):
        assert_tree_same(got, run_sequential(model, (x,)), 1e-12, "output")


def test_inference_mode_and_no_grad_in_turn(made: list[Graphed]) -> None:
    model, fast = pair("buffer_setitem")
    for number in range(10):
        mode = torch.inference_mode if number % 2 else torch.no_grad
        x = tokens()
        with mode():
            got, expected = fast(x), model(x)
        assert got.is_inference() == expected.is_inference()
        assert_tree_same(got.clone(), expected.clone(), 1e-12, "output")
    assert sum(each.replayed for each in made) >= 4


def test_gradients_are_not_recorded(made: list[Graphed]) -> None:
    model, fast = pair("list_states")
    for _ in range(4):
        x = tokens()
        for each in (model, fast):
            each(x).square().sum().backward()
        for ours, theirs in zip(fast.original.parameters(), model.parameters(), strict=True):
            assert_tree_same(ours.grad, theirs.grad, 1e-10, "gradient")
    assert not made


class Returning(nn.Module):
    """Two layers over segments; returns what ``extra`` makes of the model, the input and the result."""

    def __init__(self, extra: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mix() for _ in range(3)]).double()
        self.extra = extra

    def forward(self, x: Tensor) -> Any:
        states = [x.new_zeros(x.shape[0], x.shape[2]) for _ in self.layers]
        outputs = []
        for h in x.split(3, 1):
            for at, layer in enumerate(self.layers):
                h, states[at] = layer(h, states[at])
            outputs.append(h)
        y = torch.cat(outputs, 1)
        return y, self.extra(self, x, y)


EXTRAS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "input": lambda model, x, y: x,
    "weight": lambda model, x, y: model.layers[1].read.weight,
    "part_of_the_input": lambda model, x, y: x[:, 1:],
    "twice": lambda model, x, y: (y, y),
    "view": lambda model, x, y: (y[:, 2:], y.transpose(0, 1)),
    "expanded": lambda model, x, y: y.sum().expand(3),
    "number": lambda model, x, y: x.shape[1],
    "nothing": lambda model, x, y: None,
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_is_returned_is_what_the_model_returns(extra: str) -> None:
    torch.manual_seed(0)
    model = Returning(EXTRAS[extra]).eval()
    fast: Any = fast_copy(model, **OPTIONS)
    for _ in range(5):
        x = tokens()
        with torch.no_grad():
            expected, got = model(x), fast(x)
        assert_tree_same(got, expected, 1e-12, "output")
        if extra == "input":
            assert got[1] is x
        elif extra == "weight":
            assert got[1] is fast.original.layers[1].read.weight
        elif extra == "part_of_the_input":
            assert got[1].data_ptr() == x[:, 1:].data_ptr()
        elif extra == "twice":
            assert got[1][0] is got[0] and got[1][1] is got[0]
        elif extra == "view":
            got[0].zero_()
            assert not got[1][0].any() and not got[1][1].any()


def test_inputs_of_other_layouts(made: list[Graphed]) -> None:
    model, fast = pair("list_states")
    for _ in range(4):
        wide = torch.cat([tokens(), tokens()], 2)
        for x in (wide[..., ::2], wide[..., 6:], tokens(batch=1).expand(2, -1, -1), tokens()):
            with torch.no_grad():
                assert_tree_same(fast(x), model(x), 1e-12, "output")
    assert {each.recorded for each in made} == {0, 1}  # what overlaps itself is not


def test_threads(made: list[Graphed]) -> None:
    model, fast = pair("list_states")
    inputs = [tokens() for _ in range(2)]
    expected = [run_sequential(model, (x,)) for x in inputs]
    run_sequential(fast, (inputs[0],))
    program = made[-1]
    for results, value in zip(_in_threads(fast, inputs, 10), expected, strict=True):
        for result in results:
            assert_tree_same(result, value, 1e-12, "thread")
    assert program.replayed >= 15


def test_threads_without_a_lock(made: list[Graphed]) -> None:
    model, _ = ZOO["list_states"]()
    inputs = [tokens() for _ in range(3)]
    expected = [run_sequential(model, (x,)) for x in inputs]
    fast = torch.compile(model, backend="diagonal", options={"schedule": "wavefront", "form": "batched"})
    run_sequential(fast, (inputs[0],))
    for results, value in zip(_in_threads(fast, inputs, 20), expected, strict=True):
        for result in results:
            assert_tree_same(result, value, 1e-12, "thread")
    assert made[-1].replayed >= 40


def test_what_cannot_be_recorded_runs_as_it_stands(
    made: list[Graphed], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Tape):
        def press(self, work: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphed_module, "recorder_for", lambda device: Broken)
    model, fast = pair("attribute")
    with caplog.at_level(logging.WARNING, "diagpass"):
        for _ in range(5):
            agree(model, fast, tokens())
    assert made[-1].recorded == 0 and len(caplog.records) == 1


def test_much_memory_is_not_copied(made: list[Graphed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_module, "MOST_BYTES", 1000)
    model, fast = pair("attribute")
    for _ in range(4):
        agree(model, fast, tokens())
    assert made[-1].recorded == 0


def test_keys_are_bounded_and_the_oldest_goes(made: list[Graphed]) -> None:
    model, fast = pair("list_states")
    x = tokens()
    for _ in range(2 * MOST_KEYS):
        for parameter in fast.original.parameters():
            parameter.data = parameter.data.clone()
        for _ in range(3):
            agree(model, fast, x)
    program = made[-1]
    assert program.recorded > MOST_KEYS and len(program._known) == MOST_KEYS


def test_who_watches_operations_sees_them(made: list[Graphed]) -> None:
    model, fast = pair("list_states")
    x = tokens()
    for _ in range(4):
        agree(model, fast, x)
    with MatmulCounter() as counter:
        agree(model, fast, x)
    assert sum(counter.counts.values()) > 36  # those of the model, and of its copy
    assert made[-1].replayed == 2
    with measuring(CPU) as clock:
        agree(model, fast, x)
    assert clock.seconds() and made[-1].replayed == 2


def test_a_program_on_two_devices_is_not_recorded() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.to("meta")

    traced = torch.fx.symbolic_trace(Plain())
    for node, device in zip(traced.graph.nodes, ("cpu", "meta", "meta"), strict=True):
        node.meta["val"] = torch.empty(2, device=device)
    for node in traced.graph.find_nodes(op="call_method"):
        node.op, node.target = "call_function", torch.ops.aten._to_copy.default
    assert graphed_module.graphed(traced, traced, [False]) is traced
