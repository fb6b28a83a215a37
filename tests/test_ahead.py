"""Graphs compiled ahead of a plan's first call give the same, however that goes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import diagpass
from diagpass.runtime import ahead, compiled, forms
from diagpass.runtime.ahead import waiting_later
from diagpass.runtime.compiled import InductorKind
from tests.helpers import assert_same

D = 6
WAIT = AsyncCompile.wait


@pytest.fixture
def compilations(monkeypatch: Any) -> list[str]:
    """What Inductor was given, in order, and whether it had to wait for each."""
    found: list[str] = []
    by_inductor, at_once = compiled._by_inductor, compiled._at_once

    def count(graph: fx.GraphModule, operands: list[Any]) -> Any:
        found.append("ahead")
        return by_inductor(graph, operands)

    def say(graph: fx.GraphModule, operands: list[Any]) -> Any:
        made = at_once(graph, operands)
        found[-1] = "at once"
        return made

    monkeypatch.setattr(compiled, "_by_inductor", count)
    monkeypatch.setattr(compiled, "_at_once", say)
    return found


def graph_of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> fx.GraphModule:
    with FakeTensorMode():
        fakes = [torch.empty(shape) for shape in shapes]
    return make_fx(lambda *args: (function(*args),))(*fakes)


def halved(x: Tensor, y: Tensor) -> Tensor:
    return (x * 0.5 + y).cos()


def test_it_waits_when_it_is_needed(compilations: list[str]) -> None:
    kind = InductorKind(graph_of(halved, (3, 4), (4,)), "kind0")
    x, y = torch.randn(3, 4), torch.randn(4)
    kind.begin([x, None])
    assert compilations == ["ahead"]
    kind.begin([x, None])
    torch.testing.assert_close(kind(x, y)[0], halved(x, y))
    kind.begin([x, None])
    assert compilations == ["ahead"], "once"


def test_operands_that_lie_otherwise_are_compiled_for(compilations: list[str]) -> None:
    kind = InductorKind(graph_of(halved, (3, 4), (4,)), "kind0")
    x, y = torch.randn(4, 3).mT, torch.randn(4)
    kind.begin([None, y])
    torch.testing.assert_close(kind(x, y)[0], halved(x, y))
    assert compilations == ["ahead", "at once"]


def test_a_guess_that_fits_no_operand_costs_no_result(compilations: list[str]) -> None:
    kind = InductorKind(graph_of(halved, (3, 4), (4,)), "kind0")
    x, y = torch.randn(3, 4), torch.randn(4)
    kind.begin([y, None])
    assert compilations == []
    torch.testing.assert_close(kind(x, y)[0], halved(x, y))
    assert compilations == ["at once"]


def test_where_there_is_one_element_any_stride_will_do(compilations: list[str]) -> None:
    kind = InductorKind(graph_of(halved, (3, 1), (1,)), "kind0")
    x, y = torch.randn(3, 1).as_strided((3, 1), (1, 7)), torch.randn(1)
    kind.begin([None, y])
    for _ in range(2):
        torch.testing.assert_close(kind(x, y)[0], halved(x, y))
    assert compilations == ["ahead"]


def test_kernels_that_fail_are_compiled_again(compilations: list[str]) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no compiler")

    kind = InductorKind(graph_of(halved, (3, 5), (5,)), "kind0")
    kind.begin([None, None])
    assert kind._ahead is not None
    kind._ahead = dataclasses.replace(kind._ahead, waits=[fail])
    x, y = torch.randn(3, 5), torch.randn(5)
    torch.testing.assert_close(kind(x, y)[0], halved(x, y))
    assert compilations == ["ahead", "at once"]


def test_what_cannot_be_lowered_is_said_when_it_is_called(monkeypatch: Any) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no lowering")

    monkeypatch.setattr(compiled, "_by_inductor", fail)
    kind = InductorKind(graph_of(halved, (3, 5), (5,)), "kind0")
    kind.begin([None, None])
    x, y = torch.randn(3, 5), torch.randn(5)
    with pytest.warns(diagpass.DiagpassWarning, match="could not compile kind0"):
        found = kind(x, y)[0]
    torch.testing.assert_close(found, halved(x, y))


def test_an_operand_that_is_no_tensor_is_waited_for(compilations: list[str]) -> None:
    graph = make_fx(lambda x, n: (x * 2,))(torch.randn(3), 2)
    InductorKind(graph, "kind0").begin([None, 2])
    assert compilations == []


def test_other_threads_wait_as_ever() -> None:
    waited: list[bool] = []

    def compile_and_run() -> None:
        x, y = torch.randn(3, 9), torch.randn(9)
        kind = InductorKind(graph_of(halved, (3, 9), (9,)), "other")
        torch.testing.assert_close(kind(x, y)[0], halved(x, y))
        waited.append(True)

    with waiting_later() as waits:
        thread = threading.Thread(target=compile_and_run)
        thread.start()
        thread.join()
        assert waited and not waits
    assert AsyncCompile.wait is WAIT


def test_threads_that_compile_at_the_same_time() -> None:
    """The second one in is the last one out."""
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with waiting_later() as waits:
            entered.set()
            left.wait(60)
            x, y = torch.randn(3, 11), torch.randn(11)
            kind = InductorKind(graph_of(halved, (3, 11), (11,)), "other")
            kind.begin([x, y])
            torch.testing.assert_close(kind(x, y)[0], halved(x, y))
            assert not waits

    thread = threading.Thread(target=other)
    with waiting_later():
        thread.start()
        assert entered.wait(60)
    assert AsyncCompile.wait is not WAIT
    left.set()
    thread.join()
    assert AsyncCompile.wait is WAIT


def test_an_inductor_that_waits_elsewhere_is_left_alone(monkeypatch: Any) -> None:
    monkeypatch.delattr(AsyncCompile, "wait")
    with waiting_later() as waits:
        assert waits == []
    assert not hasattr(AsyncCompile, "wait")


def two_kernels(x: Tensor, y: Tensor) -> Tensor:
    return ((x * 0.5 + 1) @ y).cos()


@pytest.fixture
def together(monkeypatch: Any) -> list[int]:
    """How many kernels were compiled together, per graph."""
    found: list[int] = []
    own = ahead.compile_together

    def count(kernels: Any, submit: Any) -> Any:
        found.append(len(kernels))
        return own(kernels, submit)

    monkeypatch.setattr(ahead, "compile_together", count)
    return found


@pytest.mark.timeout(120)
@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_waits_for_itself_where_nothing_is_cached(
    threads: int, begin: bool, together: list[int]
) -> None:
    """Inductor keeps binaries on disk: one that is there needs no compiler, and no lock."""
    x, y = torch.randn(3, 8), torch.randn(8, 5)
    kind = InductorKind(graph_of(two_kernels, x.shape, y.shape), "kind0")
    with fresh_cache(), inductor_config.patch(compile_threads=threads):
        if begin:
            kind.begin([x, y])
        torch.testing.assert_close(kind(x, y)[0], two_kernels(x, y))
    assert together == [2]


@pytest.mark.parametrize("most", [1, 12])
def test_a_graph_s_kernels_are_one_source(
    most: int, together: list[int], monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("diagpass.runtime.together.MOST", most)
    x, y = torch.randn(3, 4 + most), torch.randn(4 + most, 5)
    kind = InductorKind(graph_of(two_kernels, x.shape, y.shape), "kind0")
    with caplog.at_level("INFO", logger="diagpass"):
        kind.begin([x, y])
        torch.testing.assert_close(kind(x, y)[0], two_kernels(x, y))
    assert together == [2] and "one by one" not in caplog.text


def test_a_graph_without_kernels(together: list[int]) -> None:
    x, y = torch.randn(3, 4), torch.randn(4, 5)
    kind = InductorKind(graph_of(torch.mm, x.shape, y.shape), "kind0")
    kind.begin([x, y])
    torch.testing.assert_close(kind(x, y)[0], x @ y)
    assert together == [0]


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("when", ["begin", "finish"])
def test_kernels_that_do_not_go_together(
    when: str, begin: bool, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("redefined")

    monkeypatch.setattr(ahead, "compile_together", fail if when == "begin" else lambda *args: fail)
    x, y = torch.randn(3, 6), torch.randn(6, 7)
    kind = InductorKind(graph_of(two_kernels, x.shape, y.shape), "kind0")
    with caplog.at_level("INFO", logger="diagpass"):
        if begin:
            kind.begin([x, y])
        torch.testing.assert_close(kind(x, y)[0], two_kernels(x, y))
    assert "one by one (RuntimeError: redefined)" in caplog.text


class Layer(nn.Module):
    """Its bias has one element, so that the rows of its stack are not packed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gate = nn.Linear(D, D), nn.Linear(D, 1)
        self.register_buffer("state", torch.zeros(2, D))

    def forward(self, h: Tensor) -> Tensor:
        out = h + torch.tanh(self.linear(h) + self.state[:, None])
        self.state = self.state + (out * self.gate(out)).mean(1)
        return out


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        outs = []
        for segment in h.split(2, 1):
            for layer in self.layers:
                segment = layer(segment)
            outs.append(segment)
        return torch.cat(outs, 1)


def test_a_plan_s_graphs_are_all_compiled_ahead(
    compilations: list[str], together: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Stack().double().eval()
    inputs = (torch.randn(2, 8, D, dtype=torch.float64),)
    with caplog.at_level("INFO", logger="diagpass"):
        assert_same(model, inputs, {"compiler": "inductor"})
    assert compilations and set(compilations) == {"ahead"}
    assert len(together) == len(compilations) and "one by one" not in caplog.text


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, segment: Tensor) -> Tensor:
        for layer in self.layers:
            segment = layer(segment)
        return segment


class Stepped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = Step()

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([self.step(segment) for segment in h.split(2, 1)], 1)


@pytest.mark.parametrize("make, loop", [(Stack, "flat"), (Stepped, "rolled")])
def test_forms_are_timed_with_no_compiler_beside_them(
    make: Callable[[], nn.Module],
    loop: str,
    compilations: list[str],
    together: list[int],
    monkeypatch: Any,
) -> None:
    waited: dict[InductorKind, bool] = {}
    timed: list[int] = []
    begin, finish, choose = InductorKind.begin, InductorKind.finish, forms.choose

    def begun(kind: InductorKind, known: Any) -> None:
        begin(kind, known)
        waited[kind] = False

    def finished(kind: InductorKind) -> None:
        finish(kind)
        waited[kind] = True

    def choosing(*args: Any) -> Any:
        assert all(waited.values())
        timed.append(len(waited))
        return choose(*args)

    monkeypatch.setattr(InductorKind, "begin", begun)
    monkeypatch.setattr(InductorKind, "finish", finished)
    monkeypatch.setattr(forms, "choose", choosing)
    torch.manual_seed(0)
    inputs = (torch.randn(2, 12, D, dtype=torch.float64),)
    assert_same(make().double().eval(), inputs, {"compiler": "inductor", "loop": loop, "form": "measured"})
    assert compilations[0] == "ahead" and compilations.count("ahead") >= 2 and max(timed) >= 2
    assert len(together) == len(compilations)
