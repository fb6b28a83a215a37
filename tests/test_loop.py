"""`SegmentLoop`, the sequential loop in plain PyTorch, against loops written by hand."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

import diagpass
import diagpass.loop as loop_module
from diagpass import DiagpassError, OptionError, SegmentLoop, SegmentStream
from diagpass.loop import cut, join
from tests.helpers import assert_tree_same

B, T, D = 2, 3, 4


class Kept(nn.Module):
    """Keeps its state in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.clear()

    def clear(self) -> None:
        self.state: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        y = torch.tanh(self.linear(x)) * scale
        self.state = y.mean(1, keepdim=True) + (0 if self.state is None else 0.5 * self.state)
        return y + self.state


class Carried(nn.Module):
    """Returns its state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(D, D)

    def forward(self, x: Tensor, state: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor]]:
        h = x.new_zeros(x.shape[0], D) if state is None else state["h"]
        h = self.cell(x.mean(1), h)
        return x + h.unsqueeze(1), {"h": h}


class Returns(nn.Module):
    """Returns what a function makes of its input and the number of the call."""

    def __init__(self, make: Callable[[Any, int], Any]) -> None:
        super().__init__()
        self.make, self.numbers = make, itertools.count()

    def forward(self, x: Any) -> Any:
        return self.make(x, next(self.numbers))


def numbers(length: int) -> Tensor:
    return torch.randn(B, length, D)


# ------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("length", [1, T, T + 1, 5 * T, 5 * T + 2])
def test_equal_to_the_loop_by_hand(length: int) -> None:
    step, x = Kept(), numbers(length)
    by_hand = copy.deepcopy(step)
    expected = torch.cat([by_hand(part) for part in x.split(T, dim=1)], dim=1)
    assert torch.equal(SegmentLoop(step, T)(x), expected)
    assert torch.equal(step.state, by_hand.state) and step.calls == by_hand.calls


@pytest.mark.parametrize("length", [1, T, 5 * T + 2])
def test_a_carried_state(length: int) -> None:
    step, x = Carried(), numbers(length)
    outputs, state = [], None
    for part in x.split(T, dim=1):
        y, state = step(part, state)
        outputs.append(y)
    y, final = SegmentLoop(step, T, carries_state=True)(x)
    assert torch.equal(y, torch.cat(outputs, dim=1)) and torch.equal(final["h"], state["h"])


def test_a_carried_state_goes_on_where_it_is_passed() -> None:
    loop, x = SegmentLoop(Carried(), T, carries_state=True), numbers(4 * T)
    whole, end = loop(x)
    first, state = loop(x[:, : 2 * T])
    second, state = loop(x[:, 2 * T :], state)
    assert torch.equal(torch.cat([first, second], dim=1), whole) and torch.equal(state["h"], end["h"])
    afresh, _ = loop(x)
    assert torch.equal(afresh, whole)


@pytest.mark.parametrize("reset", ["clear", Kept.clear, lambda step: step.clear()])
def test_reset_comes_before_each_call_and_stream(reset: Any) -> None:
    x = numbers(2 * T)
    fresh = SegmentLoop(Kept(), T, reset=reset)
    expected = fresh(x)
    assert torch.equal(fresh(x), expected) and fresh.step.calls == 2
    assert torch.equal(torch.cat(list(fresh.stream(x.split(T, 1))), 1), expected) and fresh.step.calls == 2
    fresh.reset_step()
    assert fresh.step.state is None


def test_without_reset_the_state_goes_on() -> None:
    x = numbers(4 * T)
    step = Kept()
    whole = SegmentLoop(copy.deepcopy(step), T)(x)
    loop = SegmentLoop(step, T)
    assert torch.equal(torch.cat([loop(x[:, :T]), loop(x[:, T:])], dim=1), whole)
    loop.reset_step()
    assert step.calls == 4


@pytest.mark.parametrize("dim", [0, 2, -1])
def test_another_dim(dim: int) -> None:
    x = torch.arange(60).reshape(5, 4, 3)
    seen: list[Tensor] = []
    step = Returns(lambda part, _: seen.append(part) or part * 2)
    assert torch.equal(SegmentLoop(step, 2, dim=dim)(x), x * 2)
    assert [part.shape[dim] for part in seen] == [2] * (x.shape[dim] // 2) + [1] * (x.shape[dim] % 2)


def test_keyword_inputs_are_passed_whole() -> None:
    step, x = Kept(), numbers(2 * T)
    expected = SegmentLoop(copy.deepcopy(step), T)(x) * 0.5
    torch.testing.assert_close(SegmentLoop(step, T)(x, scale=0.5), expected)


def test_keywords_called_inputs_and_segments_are_the_steps() -> None:
    class Step(nn.Module):
        def forward(self, x: Tensor, inputs: int) -> Tensor:
            return x + inputs

    assert torch.equal(SegmentLoop(Step(), 1)(torch.zeros(1, 2), inputs=3), torch.full((1, 2), 3.0))


def test_a_pytree_of_inputs_is_cut_alike() -> None:
    ids, mask = torch.arange(10).reshape(1, 10), torch.ones(1, 10, 2)
    seen: list[Any] = []
    step = Returns(lambda x, _: seen.append(x) or x["ids"])
    SegmentLoop(step, 4)({"ids": ids, "more": (mask, None)})
    assert [x["ids"].tolist() for x in seen] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9]]]
    assert [x["more"][0].shape[1] for x in seen] == [4, 4, 2] and seen[0]["more"][1] is None


def test_gradients_flow() -> None:
    loop, x = SegmentLoop(Kept(), T), numbers(3 * T).requires_grad_()
    loop(x).sum().backward()
    assert x.grad is not None and x.grad[:, 0].abs().sum() > 0


def test_the_parameters_lie_under_step() -> None:
    loop = SegmentLoop(Kept(), T, reset="clear")
    assert list(loop.state_dict()) == ["step.linear.weight", "step.linear.bias"]
    assert "segment_size=3" in repr(loop) and "reset=clear" in repr(loop)


def test_copies_reset_their_own_step() -> None:
    loop = SegmentLoop(step := Kept(), T, reset="clear")
    with torch.no_grad():
        loop(numbers(T))
    for other in (copy.deepcopy(loop), pickle.loads(pickle.dumps(loop))):
        other.reset_step()
        assert other.step.calls == 0 and step.calls == 1


# ------------------------------------------------------------------------- cut, join: structures


def test_segments_are_views() -> None:
    x = numbers(7)
    parts = cut(x, T, 1)
    assert [part.shape[1] for part in parts] == [3, 3, 1]
    assert all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in parts)


@dataclasses.dataclass
class Out:
    y: Tensor
    count: int
    extra: list[Tensor]


register_dataclass(Out)


def test_outputs_of_any_structure() -> None:
    def make(x: Tensor, number: int) -> Any:
        return {"a": (x, None), "b": Out(x + 1, 7, [x + 2]), "c": CausalLMOutputWithCrossAttentions(logits=x)}

    x = numbers(7)
    out = SegmentLoop(Returns(make), T)(x)
    assert torch.equal(out["a"][0], x) and out["a"][1] is None
    assert isinstance(out["b"], Out) and out["b"].count == 7
    assert torch.equal(out["b"].y, x + 1) and torch.equal(out["b"].extra[0], x + 2)
    assert type(out["c"]) is CausalLMOutputWithCrossAttentions and torch.equal(out["c"].logits, x)


def test_a_nan_is_equal_to_itself_and_one_is_not_true() -> None:
    assert join([(float("nan"),), (float("nan"),)], 1)[0] != 0
    with pytest.raises(DiagpassError, match=r"output\[0\] is 1 for segment 0 and True for segment 1"):
        join([(1,), (True,)], 1)


def test_a_joined_output_is_a_new_tensor() -> None:
    x = numbers(T)
    assert join([x], 1) is not x and join([x], 1).data_ptr() != x.data_ptr()


NO_JOIN = {
    "differs": (lambda x, n: {"n": n, "y": x}, r"output\['n'\] is 0 for segment 0 and 1 for segment 1"),
    "none": (lambda x, n: (x, x if n else None), r"output\[1\] is None for segment 0 and a tensor"),
    "tensor or not": (lambda x, n: [None if n else x], r"output\[0\] is a tensor \(2, 3, 4\) for segment 0"),
    "scalar": (lambda x, n: {"loss": x.sum()}, r"output\['loss'\] has the shape \(\) and no dimension 1"),
    "flat": (lambda x, n: x[0, 0], r"output has the shape \(4,\) and no dimension 1"),
    "structure": (lambda x, n: {"y": x} if n else (x,), "segments 0 and 1 differ in structure"),
    "keys": (lambda x, n: {"y": x, f"y_{n}": x}, "segments 0 and 1 differ in structure"),
    "width": (lambda x, n: x[..., : 4 - n], r"output cannot be joined along dim 1.*\(2, 3, 4\), \(2, 3, 3\)"),
    "object": (lambda x, n: (x, object()), r"output\[1\] is <object"),
}


@pytest.mark.parametrize("name", NO_JOIN)
def test_outputs_that_cannot_be_joined(name: str) -> None:
    make, message = NO_JOIN[name]
    with pytest.raises(DiagpassError, match=message):
        SegmentLoop(Returns(make), T)(numbers(2 * T))


NO_CUT = {
    "empty": (torch.ones(2, 0, 4), "length 0 along dim 1"),
    "scalar": (torch.tensor(1.0), r"input has the shape \(\) and no dimension 1"),
    "lengths": ({"a": torch.ones(2, 3), "b": torch.ones(2, 4)}, r"input\['a'\] has 3, input\['b'\] has 4"),
    "number": ([torch.ones(2, 3), 5], r"input\[1\] is a int, and inputs are tensors.*by keyword"),
    "nothing": ({"a": None}, "no tensor among the inputs"),
    "no input": ((), "no tensor among the inputs"),
}


@pytest.mark.parametrize("name", NO_CUT)
def test_inputs_that_cannot_be_cut(name: str) -> None:
    inputs, message = NO_CUT[name]
    step = Kept()
    with pytest.raises(DiagpassError, match=message):
        SegmentLoop(step, T)(inputs)
    assert step.calls == 0


WRONG = {
    "step": ((lambda x: x, T), {}, "step is a torch.nn.Module; got function"),
    "no size": ((Kept(), 0), {}, "segment_size is an int of at least 1; got 0"),
    "size": ((Kept(), 2.0), {}, "segment_size is an int of at least 1; got 2.0"),
    "bool": ((Kept(), True), {}, "segment_size is an int"),
    "dim": ((Kept(), T), {"dim": "1"}, "dim is an int; got '1'"),
    "both": ((Kept(), T), {"carries_state": True, "reset": "clear"}, "leave reset out"),
    "name": ((Kept(), T), {"reset": "cleer"}, "'cleer' is not a method of Kept"),
    "value": ((Kept(), T), {"reset": "calls"}, "'calls' is not a method of Kept"),
    "reset": ((Kept(), T), {"reset": 3}, "reset is None, a callable"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    args, kwargs, message = WRONG[name]
    with pytest.raises(OptionError, match=message):
        SegmentLoop(*args, **kwargs)


def test_a_state_that_the_step_does_not_take() -> None:
    loop, x = SegmentLoop(Kept(), T), numbers(T)
    for call in (loop, loop.stream):
        with pytest.raises(DiagpassError, match=r"Kept keeps its state itself.*carries_state=True"):
            call([x] if call is not loop else x, {"h": x})


@pytest.mark.parametrize(("result", "told"), [((1, 2, 3), "a tuple of 3"), (torch.ones(2), "Tensor")])
def test_a_step_that_should_return_its_state(result: Any, told: str) -> None:
    class Step(nn.Module):
        def forward(self, x: Tensor, state: Any) -> Any:
            return result

    with pytest.raises(DiagpassError, match=f"Step returned {told}"):
        SegmentLoop(Step(), T, carries_state=True)(numbers(T))


# ----------------------------------------------------------------- outputs that a step overwrites


class InPlace(nn.Module):
    """Returns the buffer that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(B, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.sum(1, keepdim=True)
        return self.total


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_returned_buffer_is_not_overwritten(mode: Any) -> None:
    x = numbers(4 * T)
    expected = x.unflatten(1, (4, T)).sum(2).cumsum(1)
    with mode():
        torch.testing.assert_close(SegmentLoop(InPlace(), T)(x), expected)
        yields = list(SegmentLoop(InPlace(), T).stream(x.split(T, 1)))
    torch.testing.assert_close(torch.cat(yields, 1), expected)


class LateWrite(nn.Module):
    """Returns a fresh tensor that the next call writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.last is not None:
            self.last.mul_(0.5)
        self.last = x + 1
        return {"y": self.last}


def test_a_write_to_an_earlier_output_is_refused() -> None:
    with pytest.raises(DiagpassError, match=r"wrote in place to output\['y'\], which it had returned"):
        SegmentLoop(LateWrite(), T)(numbers(3 * T))


def test_the_consumer_may_write_to_an_output() -> None:
    x = numbers(3 * T)
    expected = list(SegmentLoop(step := Kept(), T, reset="clear").stream(x.split(T, 1)))
    with torch.no_grad():
        for y, wanted in zip(
            SegmentLoop(step, T, reset="clear").stream(x.split(T, 1)), expected, strict=True
        ):
            assert torch.equal(y, wanted)
            y.zero_()


def test_dynamo_traces_the_loop_as_one_graph() -> None:
    x = numbers(3 * T + 1)
    for make, kwargs in ((InPlace, {}), (Kept, {"reset": "clear"}), (Carried, {"carries_state": True})):
        step = make()
        loop = SegmentLoop(step, T, **kwargs)
        compiled = torch.compile(
            SegmentLoop(copy.deepcopy(step), T, **kwargs), backend="eager", fullgraph=True
        )
        with torch.no_grad():
            for _ in range(3):
                assert_tree_same(compiled(x), loop(x), 0.0, make.__name__)


# ------------------------------------------------------------------------------------- streams


def test_a_stream_is_the_loop() -> None:
    step, x = Kept(), numbers(4 * T + 1)
    expected = SegmentLoop(copy.deepcopy(step), T)(x)
    stream = SegmentLoop(step, T).stream(x.split(T, dim=1))
    assert isinstance(stream, SegmentStream) and iter(stream) is stream
    assert torch.equal(torch.cat(list(stream), dim=1), expected)
    assert stream.final_state is None and next(stream, "end") == "end"


def test_a_stream_passes_the_state_and_keywords() -> None:
    class Step(nn.Module):
        def forward(self, x: Tensor, state: int | None, add: int) -> tuple[Tensor, int]:
            state = add + (state or 0)
            return x + state, state

    loop = SegmentLoop(Step(), T, carries_state=True)
    stream = loop.stream([torch.zeros(1)] * 3, 10, add=2)
    assert [y.item() for y in stream] == [12, 14, 16] and stream.final_state == 16
    assert [y.item() for y in loop.stream([torch.zeros(1)] * 2, add=1)] == [1, 2]


def test_a_segment_is_asked_for_when_its_output_is() -> None:
    asked: list[int] = []

    def source() -> Iterator[Tensor]:
        for number in range(5):
            asked.append(number)
            yield torch.full((1, 1), float(number))

    step = Returns(lambda x, number: (x, number))
    for number, (x, at) in enumerate(SegmentLoop(step, 1).stream(source())):
        assert x.item() == at == number and asked == list(range(number + 1))


def test_segments_are_handed_on_as_they_are() -> None:
    given = [{"ids": torch.ones(2), "note": object()}, [1, 2], "text", torch.tensor(0.0)]
    seen: list[Any] = []
    list(SegmentLoop(Returns(lambda x, _: seen.append(x)), 7).stream(given))
    assert all(a is b for a, b in zip(seen, given, strict=True))


def test_an_empty_stream_hands_the_state_back() -> None:
    stream = SegmentLoop(Carried(), T, carries_state=True).stream([], "state")
    assert list(stream) == [] and stream.final_state == "state"


def test_the_final_state_is_there_at_the_end() -> None:
    loop, x = SegmentLoop(Carried(), T, carries_state=True), numbers(2 * T)
    stream = loop.stream(x.split(T, 1))
    for done in range(2):
        with pytest.raises(DiagpassError, match=f"has not ended yet after {done} segments"):
            _ = stream.final_state
        next(stream)
    with pytest.raises(DiagpassError, match="has not ended yet after 2"):
        _ = stream.final_state
    assert next(stream, None) is None
    assert torch.equal(stream.final_state["h"], loop(x)[1]["h"])
    stream.close()
    assert torch.equal(stream.final_state["h"], loop(x)[1]["h"])


def test_closing() -> None:
    loop, x = SegmentLoop(Carried(), T, carries_state=True), numbers(3 * T)
    with loop.stream(x.split(T, 1)) as stream:
        next(stream)
    stream.close()
    assert next(stream, "end") == "end"
    with pytest.raises(DiagpassError, match="was closed after 1 segments"):
        _ = stream.final_state


def test_errors_pass_through_and_end_the_stream() -> None:
    def source() -> Iterator[Tensor]:
        yield numbers(T)
        raise OSError("disk")

    stream = SegmentLoop(Carried(), T, carries_state=True).stream(source())
    next(stream)
    with pytest.raises(OSError, match="disk"):
        next(stream)
    assert next(stream, "end") == "end"
    with pytest.raises(DiagpassError, match="ended by OSError after 1 segments"):
        _ = stream.final_state


def test_streams_with_their_own_state_may_interleave() -> None:
    loop, x, y = SegmentLoop(Carried(), T, carries_state=True), numbers(3 * T), numbers(3 * T)
    pairs = list(zip(loop.stream(x.split(T, 1)), loop.stream(y.split(T, 1)), strict=True))
    for at, inputs in enumerate((x, y)):
        assert torch.equal(torch.cat([pair[at] for pair in pairs], 1), loop(inputs)[0])


@pytest.mark.parametrize("reset", ["clear", None])
def test_streams_over_one_kept_state_do_not_mix(reset: str | None) -> None:
    loop, x = SegmentLoop(Kept(), T, reset=reset), numbers(3 * T)
    first = loop.stream(x.split(T, 1))
    next(first)
    loop(x)
    with pytest.raises(DiagpassError, match=r"another call of the loop came before segment 1.*Kept"):
        next(first)
    second, third = loop.stream(x.split(T, 1)), loop.stream(x.split(T, 1))
    assert loop.step.calls == (3 if reset else 4), "a stream has run before it was asked to"
    assert len(list(second)) == len(list(third)) == 3


@pytest.mark.parametrize("segments", [torch.ones(2, 3), {"a": torch.ones(2)}, "abc", 5, None])
def test_what_is_no_iterable_of_segments(segments: Any) -> None:
    with pytest.raises(DiagpassError, match=f"got one {type(segments).__name__}"):
        SegmentLoop(Kept(), T).stream(segments)


def test_a_stream_made_from_any_generator() -> None:
    """The wavefront makes its own generator; the stream needs no more of it than this."""
    closed: list[bool] = []

    def outputs() -> Any:
        try:
            yield from "ab"
        finally:
            closed.append(True)
        return "state"

    stream = SegmentStream(outputs())
    assert list(stream) == ["a", "b"] and stream.final_state == "state"
    stream = SegmentStream(outputs())
    next(stream)
    stream.close()
    assert closed == [True, True]


# ------------------------------------------------------------------------------------ progress


class Clock:
    """Half a second passes at every look."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += 0.5
        return self.now


def test_progress_in_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "time", Clock())
    loop = SegmentLoop(Kept(), T)
    list(loop.stream([numbers(T)] * 6, progress=True))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "3 of 6 segments, 1.0 s" and lines[-1] == "6 of 6 segments, 3.0 s", lines
    list(loop.stream((numbers(T) for _ in range(2)), progress=True))
    assert capsys.readouterr().err.splitlines()[-1].startswith("2 segments, ")


def test_no_progress_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    list(SegmentLoop(Kept(), T).stream([numbers(T)] * 3))
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(SegmentLoop(Kept(), T).stream([numbers(T)] * 3, progress=True))
    assert "3/3" in terminal.getvalue()


def test_lines_on_a_terminal_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    stream = SegmentLoop(Kept(), T).stream([numbers(T)] * 3, progress=True)
    next(stream)
    stream.close()
    assert terminal.getvalue().startswith("1 of 3 segments, ")


def test_exported_and_alone() -> None:
    """The file needs nothing of diagpass but its errors."""
    assert diagpass.SegmentLoop is SegmentLoop and "SegmentLoop" in diagpass.__all__
    with open(loop_module.__file__) as file:
        imported = [line for line in file if line.startswith(("import diagpass", "from diagpass"))]
    assert imported == ["from diagpass.errors import DiagpassError, OptionError\n"]
