"""Models with a loop of their own whose step is captured once, for any number of segments."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from diagpass import DiagpassWarning
from diagpass.rolled import whole
from examples import armt
from tests import models as zoo
from tests import rolled_models as models
from tests.helpers import (
    assert_same,
    assert_state_same,
    assert_tree_same,
    clone_tree,
    collect_warnings,
    fast_copy,
    state_of,
)
from tests.rolled_models import D, T

ROLLED = {"loop": "rolled"}


class Whole(nn.Module):
    """The common loop around a step that keeps its state, or returns it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        loop = models.build(name)
        self.step, self.carries, self.reset = loop.step, loop.carries_state, loop.reset
        self.head = nn.Linear(D, D).double()

    def begin(self) -> None:
        if isinstance(self.reset, str):
            getattr(self.step, self.reset)()

    def segments(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(T, dim=1)

    def forward(self, x: Tensor) -> Any:
        self.begin()
        outputs, state = [], None
        for segment in self.segments(x):
            if self.carries:
                output, state = self.step(segment, state)
            else:
                output = self.step(segment)
            outputs.append(output)
        return self.end(outputs)

    def end(self, outputs: list[Tensor]) -> Any:
        return torch.cat(outputs, dim=1)


def tokens(segments: int, tail: int = 0) -> Tensor:
    return models.tokens(segments * T + tail)


def check(
    plain: nn.Module, *lengths: int, rtol: float = 1e-10, ran: str = "wavefront", **options: Any
) -> Any:
    """Call after call the same as the plain model: outputs, inputs and state."""
    fast = fast_copy(plain, loop="rolled", **options)
    report = None
    for length in lengths:
        x, y = (clone_tree(tokens(length)) for _ in range(2))
        y.copy_(x)
        with torch.no_grad():
            expected, got = plain(x), fast(y)
        report = fast.report
        assert report.ran == ran, report.reason
        assert_tree_same(got, expected, rtol, f"{length} segments: ")
        assert_tree_same(y, x, 0.0, "input ")
        assert_state_same(fast.original, plain, rtol)
        assert "forward" not in vars(fast.original.step)
    return report


@pytest.mark.parametrize(
    "name", ["attribute", "first_flag", "buffer", "gru", "stacked", "counter", "fifo_list"]
)
def test_any_number_of_segments_from_one_capture(name: str) -> None:
    """Unbatched every bit is the same; the number of segments adds no capture."""
    short = check(Whole(name), 3, rtol=0.0, max_width=1)
    report = check(Whole(name), 3, 5, 9, 2, rtol=0.0, max_width=1)
    assert report.captures == short.captures
    report = check(Whole(name), 6, 11)
    assert report.batched_cells > 0 and report.waves < report.cells


@pytest.mark.parametrize("name", ["dict_none", "mamba"])
def test_without_observation_the_answer_is_the_same(name: str) -> None:
    """What a step keeps in new containers, or writes in place."""
    check(Whole(name), 5, 4)


class Rich(Whole):
    """Norms, a head, a loss and containers on what the step returns."""

    def end(self, outputs: list[Tensor]) -> dict[str, Any]:
        heads = [self.head(output).tanh() for output in outputs]
        joined = torch.cat(heads, dim=1)
        losses = [(head - output).square().mean() for head, output in zip(heads, outputs, strict=True)]
        last = (outputs[-1][:, -1], joined[:, ::2].sum(1))
        return {"out": joined, "loss": torch.stack(losses).mean(), "last": last, "n": len(heads)}


def test_operations_on_results_are_deferred() -> None:
    report = check(Rich("attribute"), 7, 4, rtol=0.0, max_width=1)
    assert report.waves == report.cells
    report = check(Rich("attribute"), 7, 4)
    assert report.waves == 3 + 4 - 1


@dataclasses.dataclass
class Kept:
    """An output that no pytree knows."""

    first: Tensor
    all: list[Tensor]


class Unknown(Whole):
    def end(self, outputs: list[Tensor]) -> Kept:
        return Kept(outputs[0][:, :1], outputs)


class IntoBuffer(Whole):
    """Results are written into memory of the model's own."""

    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        out = torch.empty_like(x)
        for at, segment in enumerate(self.segments(x)):
            out[:, at * T : at * T + segment.shape[1]] = self.step(segment)
        out *= 2
        return out + out.mean()


class Fed(Whole):
    """The end of a result goes into the next segment, past the layers: a chain."""

    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        past, outputs = x.new_zeros(x.shape[0], 1, D), []
        for segment in self.segments(x):
            outputs.append(self.step(segment + past))
            past = outputs[-1][:, -1:].tanh()
        return torch.cat(outputs, 1)


class FedViews(Whole):
    """A view of a result, with no operation in between, goes into the step."""

    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        outputs = []
        for segment in self.segments(x):
            out = self.step(segment)
            outputs += [out, self.step(out.view(out.shape)), self.step(out.flip(0)[:])]
        return torch.cat(outputs, 1)


class Remembered(Whole):
    """Results and counts are kept in lists and attributes."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.kept: list[Tensor] = []
        self.calls, self.total = 0, torch.zeros(2, D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        for segment in self.segments(x):
            out = self.step(segment)
            self.kept.append(out[:, -1])
            self.calls += 1
            self.total = self.total + out.sum(1)
        return torch.stack(self.kept[-2:]) + self.step.layers[0].state.sum()


@pytest.mark.parametrize("kind", [Unknown, IntoBuffer, Fed, FedViews, Remembered])
def test_loops_of_many_kinds(kind: type[Whole]) -> None:
    check(kind("attribute"), 6, 4, rtol=0.0, max_width=1)
    check(kind("attribute"), 6, 4)


class Stops(Whole):
    """Goes on as long as a result allows."""

    every = 1

    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        outputs = []
        for at, segment in enumerate(self.segments(x)):
            outputs.append(self.step(segment))
            if at % self.every == self.every - 1 and outputs[-1].sum().item() > 1e9:
                break
        return torch.cat(outputs, 1)


def test_a_loop_that_reads_each_result_runs_sequentially() -> None:
    plain = Stops("attribute")
    fast = diagpass.transform(copy.deepcopy(plain), options={"compiler": "eager", **ROLLED})
    x = tokens(8)
    with torch.no_grad(), collect_warnings() as warned:
        assert_tree_same(fast(x), plain(x), 0.0, "output")
    assert_state_same(fast.original, plain)
    assert fast.report.ran == "sequential" and "test_whole.py" in fast.report.reason, fast.report.reason
    assert len(warned) == 1 and "reads a result" in warned[0]
    with pytest.raises(diagpass.DiagpassError, match="reads a result"):
        strict = diagpass.transform(plain, strict=True, options={"compiler": "eager", **ROLLED})
        with torch.no_grad():
            strict(x)


def test_results_read_now_and_then() -> None:
    plain = Stops("attribute")
    plain.every = 4
    report = check(plain, 12)
    assert 12 + 2 < report.waves < report.cells


class Raw(Whole):
    def end(self, outputs: list[Tensor]) -> Any:
        return outputs[0].numpy().sum(), outputs[1].tolist(), copy.deepcopy(outputs[2]), torch.cat(outputs)


def test_memory_reached_without_an_operation() -> None:
    plain = Raw("attribute")
    fast, x = fast_copy(plain, max_width=1, **ROLLED), tokens(5)
    with torch.no_grad():
        expected, got = plain(x), fast(x)
    assert got[:2] == expected[:2] and fast.report.ran == "wavefront"
    assert_tree_same(got[2:], expected[2:], 0.0, "output")


class WritesInput(Whole):
    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        outputs = []
        for segment in self.segments(x):
            outputs.append(self.step(segment))
            segment.zero_()
        return torch.cat(outputs, 1)


class WritesWeight(Whole):
    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        outputs = []
        for segment in self.segments(x):
            outputs.append(self.step(segment))
            self.step.embed.weight.mul_(0.9)
        return torch.cat(outputs, 1)


class Swallows(WritesInput):
    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        outputs = []
        for segment in self.segments(x):
            outputs.append(self.step(segment))
            try:
                segment.zero_()
            except Exception:
                outputs.clear()
        return torch.cat(outputs, 1)


@pytest.mark.parametrize("kind", [WritesInput, Swallows])
def test_writes_that_a_waiting_step_would_see(kind: type[Whole]) -> None:
    """All is put back, and the call runs as it stands."""
    with pytest.warns(DiagpassWarning, match=r"between two steps|in place"):
        report = check(kind("buffer"), 5, ran="sequential", rtol=0.0)
    assert "cannot be deferred" in report.reason


class Fails(Whole):
    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        outputs = []
        for at, segment in enumerate(self.segments(x)):
            if at == 3:
                raise ValueError("the fourth segment")
            outputs.append(self.step(segment))
        return torch.cat(outputs, 1)


def test_weights_are_not_written_twice() -> None:
    """A model that writes its own weights is never run to see what it does."""
    plain, x = WritesWeight("attribute"), tokens(4)
    fast = fast_copy(plain, **ROLLED)
    with torch.no_grad():
        assert_tree_same(fast(x), plain(x), 1e-10, "output")
    assert_state_same(fast.original, plain, 1e-10)


def test_an_error_midway_leaves_the_state_as_it_was() -> None:
    plain = Fails("attribute")
    fast = fast_copy(plain, **ROLLED)
    with torch.no_grad():
        fast(tokens(2))
        before = {name: clone_tree(value) for name, value in state_of(fast.original).items()}
        with pytest.raises(ValueError, match="fourth"):
            fast(tokens(5))
    assert_state_same(fast.original, before)
    assert "forward" not in vars(fast.original.step)
    check(plain, 3)


def test_hooks_of_the_step_run() -> None:
    plain = Whole("attribute")
    plain.step.register_forward_hook(lambda module, args, out: out * 2)
    plain.step.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    check(plain, 5, 3, rtol=0.0, max_width=1)


def test_gradients_run_sequentially() -> None:
    plain = Whole("attribute")
    fast = fast_copy(plain, **ROLLED)
    with pytest.warns(DiagpassWarning, match="gradients are recorded"):
        fast(tokens(4)).sum().backward()
    assert all(p.grad is not None for n, p in fast.original.step.named_parameters() if "read" in n)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes(mode: Any) -> None:
    plain, x = Rich("attribute"), tokens(5)
    fast = fast_copy(plain, max_width=1, **ROLLED)
    with mode():
        expected, got = plain(x), fast(x)
        assert fast.report.ran == "wavefront", fast.report.reason
        assert_tree_same(got, expected, 0.0, "output")


def test_few_cells_are_captured_flat_and_many_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Whole("attribute")
    fast, other = fast_copy(plain), fast_copy(plain)
    with torch.no_grad():
        fast(tokens(4))
        assert fast._step is None and fast.report.ran == "wavefront"
        monkeypatch.setattr(whole, "MANY_CELLS", 20)
        x = tokens(8)
        assert_tree_same(other(x), plain(x), 1e-10, "output")
        assert other._step == "step" and other.report.cells == 24
        assert_state_same(other.original, plain, 1e-10)
        captures = other.report.captures
        for length in (4, 30):
            other(tokens(length))
        assert other.report.captures == captures and other.report.segments == 30


class Flat(nn.Module):
    """The loop walks the layers itself: no module runs a segment."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = models.build("attribute").step.layers

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for segment in x.split(T, 1):
            for layer in self.layers:
                segment = layer(segment)
            outputs.append(segment)
        return torch.cat(outputs, 1)


def test_no_module_runs_a_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "MANY_CELLS", 20)
    plain = Flat()
    fast, x = fast_copy(plain), tokens(8)
    with torch.no_grad(), pytest.warns(DiagpassWarning, match="module of its own"):
        assert_tree_same(fast(x), plain(x), 0.0, "output")
    assert_state_same(fast.original, plain)


def test_verify_and_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "MANY_CELLS", 20)
    plain, x = Whole("attribute"), tokens(8)
    before = {name: clone_tree(value) for name, value in state_of(plain).items()}
    report = diagpass.explain(plain, x)
    assert report.ran is None and report.waves == 8 + 2 and report.segments == 8
    fast = fast_copy(plain, verify=True)
    figures = fast.verify(x)
    assert figures["output"]["unbatched"] == 0.0 and figures["output"]["batched"] < 1e-12
    assert_state_same(fast.original, before)
    assert_state_same(plain, before)
    with torch.no_grad():
        assert_tree_same(fast(x), plain(x), 1e-10, "output")
    assert fast_copy(plain).capture(x).waves == 10


class Four(nn.Module):
    """Any model of the zoo, its own loop and all, is the step of a loop around it."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.step(part) for part in x.chunk(4, dim=1)], 1) * 2


@pytest.mark.parametrize("name", list(zoo.ZOO)[5::14])
def test_the_zoo_as_steps(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    x = torch.cat([inputs[0], inputs[0].flip(1), inputs[0].roll(1, 1), inputs[0]], 1)
    assert_same(Four(model), (x,), {"max_width": 1, **ROLLED}, 0.0, ran=None, returns_state=True)


def build_armt(base: str, layers: int, segments: int, batch: int = 2) -> tuple[nn.Module, Tensor]:
    model, inputs = armt.build(base=base, layers=layers, segments=segments, segment_size=8, batch=batch)
    return model, inputs[0]


def test_armt() -> None:
    """Keys, types, loss per segment, hidden states, masks; the state for what comes after."""
    plain, ids = build_armt("llama", 2, 5)
    fast = fast_copy(plain, max_width=1, **ROLLED)
    for kwargs in ({}, {"labels": ids, "output_hidden_states": True, "attention_mask": torch.ones_like(ids)}):
        for length in (5, 4):
            part = {k: v[:, : 8 * length] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
            with torch.no_grad():
                expected, got = plain(ids[:, : 8 * length], **part), fast(ids[:, : 8 * length], **part)
            assert fast.report.ran == "wavefront", fast.report.reason
            assert_tree_same(got, expected, 0.0, "output")
            assert_state_same(fast.original, plain)


def test_armt_over_gpt2_continues() -> None:
    """Batched; then the sequential model goes on from the state, and it is where it would be."""
    plain, ids = build_armt("gpt2", 2, 6)
    fast = fast_copy(plain, **ROLLED)
    with torch.no_grad():
        expected, got = plain(ids), fast(ids)
        assert fast.report.batched_cells > 0
        assert_tree_same(got, expected, 1e-4, "output")
        more = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(
            fast.memory_cell.generate(ids[:, :3], **more), plain.memory_cell.generate(ids[:, :3], **more)
        )


@pytest.mark.alone
def test_sixteen_layers_times_128_segments() -> None:
    """Acceptance: the first call within 60 s, another length within 25 s, nothing traced again."""
    plain, ids = build_armt("llama", 16, 128, batch=1)
    fast = diagpass.transform(copy.deepcopy(plain), options={"compiler": "eager"})
    with torch.no_grad():
        begin = time.perf_counter()
        got = fast(ids)
        first = time.perf_counter() - begin
        assert_tree_same(got, plain(ids), 1e-3, "first")
        captures = fast.report.captures
        begin = time.perf_counter()
        got = fast(ids[:, : 96 * 8])
        second = time.perf_counter() - begin
        assert_tree_same(got, plain(ids[:, : 96 * 8]), 1e-3, "second")
    assert fast.report.ran == "wavefront" and fast.report.captures == captures
    assert fast.report.waves == 96 + 15
    assert first < 60 and second < 25, (first, second)
