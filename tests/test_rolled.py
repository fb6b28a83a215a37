"""The rolled program: one capture of the step, any number of segments, streams in constant memory.

Everything is seen from outside: a plain `SegmentLoop` and a transformed copy of it get the same calls and
must agree in outputs and in all state that is left, call after call. `tests/rolled_models.py` has the steps.
"""

from __future__ import annotations

import copy
import gc
import time
import tracemalloc
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import diagpass
from diagpass import DiagpassError, SegmentLoop
from diagpass.loop import cut, join
from examples import armt
from tests import rolled_models as models
from tests.helpers import (
    assert_closer,
    assert_state_same,
    assert_tree_same,
    clone_tree,
    fast_copy,
    no_diagpass_warnings,
    snapshot,
)
from tests.rolled_models import ENTRIES, B, D, L, T

ACCEPTANCE = ("armt", "gru", "mamba")


def tolerance(name: str) -> float:
    """What batched results may be off by, relative to the largest value."""
    return 1e-4 if models.expect(name).float32_inside else 1e-10


class Pair:
    """A loop as it stands and a transformed copy, given the same calls."""

    def __init__(self, loop: SegmentLoop, rtol: float, **options: Any) -> None:
        self.plain, self.fast = copy.deepcopy(loop), fast_copy(loop, **options)
        self.rtol = rtol
        self.states: tuple[Any, Any] = (None, None)
        self.kept: list[tuple[Any, Any]] = []

    def call(self, x: Any, *, go_on: bool = False, where: str = "", **kwargs: Any) -> diagpass.Report:
        """One call of each; `go_on` passes the state that the last call returned, if it returns one."""
        mine, its = (self.states if go_on else (None, None)) if self.plain.carries_state else ((), ())
        given = clone_tree((x, kwargs))
        with torch.no_grad():
            expected = self.plain(x, *([mine] if self.plain.carries_state else []), **kwargs)
            got = self.fast(given[0], *([its] if self.plain.carries_state else []), **given[1])
        assert_tree_same(got, expected, self.rtol, f"{where} output")
        assert_tree_same(given, (x, kwargs), 0.0, f"{where} input")
        assert_state_same(self.fast.original, self.plain, self.rtol, f"{where} state")
        if self.plain.carries_state:
            self.states = expected[1], got[1]
        self.kept.append((got, clone_tree(got)))
        return self.fast.report

    def check_kept(self) -> None:
        """No call overwrote what an earlier one returned."""
        for at, (got, before) in enumerate(self.kept):
            assert_tree_same(got, before, 0.0, f"result of call {at}, looked at again: ")


def check_report(report: diagpass.Report, name: str, segments: int) -> None:
    """The figures are what the entry says by hand."""
    expect = models.expect(name)
    assert expect.ran is None or report.ran == expect.ran, f"ran {report.ran}: {report.notes}"
    if report.ran != "wavefront" or expect.layers is None:
        return
    assert (report.segments, report.layers) == (segments, expect.layers), str(report)
    assert report.cells == segments * expect.layers and report.waves in expect.waves(segments), str(report)
    if expect.batched is not None and segments > 4:  # the first segments may have kinds of their own
        assert (report.batched_cells > 0) == expect.batched, str(report)


# ------------------------------------------------------------------- all steps, several lengths


def lengths(loop: SegmentLoop) -> list[int]:
    """A few calls: tokens."""
    size = loop.segment_size
    return [2 * size, 6 * size, 9 * size + (size > 1), size, 6 * size]


@pytest.mark.parametrize("name", ENTRIES)
def test_batched(name: str) -> None:
    loop = models.build(name)
    pair = Pair(loop, tolerance(name))
    for call, length in enumerate(lengths(loop)):
        where = f"call {call}, {length} tokens:"
        report = pair.call(models.inputs(name, length, seed=call), go_on=call % 2 == 1, where=where)
        check_report(report, name, -(-length // loop.segment_size))
    pair.check_kept()


@pytest.mark.parametrize("name", ENTRIES)
def test_unbatched_is_bitwise_equal(name: str) -> None:
    loop = models.build(name)
    pair = Pair(loop, 0.0, max_width=1)
    for call, length in enumerate(lengths(loop)):
        x = models.inputs(name, length, seed=call)
        report = pair.call(x, go_on=call % 2 == 1, where=f"call {call}, {length} tokens:")
        assert report.batched_cells == 0
    pair.check_kept()


@pytest.mark.parametrize("name", [name for name in ENTRIES if models.expect(name).ran == "wavefront"])
def test_streams(name: str) -> None:
    """`list(stream)`, joined, is the forward; the state left is the same; no warning says otherwise."""
    loop = models.build(name)
    size = loop.segment_size
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    for call, length in enumerate([7 * size + (size > 1), 4 * size]):
        x = models.inputs(name, length, seed=call)
        with torch.no_grad(), no_diagpass_warnings():
            expected = plain(x)
            stream = fast.stream(iter(cut(x, size, 1)))
            outputs = list(stream)
        assert len(outputs) == -(-length // size)
        got = join(outputs, 1)
        if loop.carries_state:
            got = got, stream.final_state
        else:
            assert stream.final_state is None
        assert_tree_same(got, expected, tolerance(name), f"stream {call}: ")
        assert_state_same(fast.original, plain, tolerance(name), f"stream {call}: ")


# -------------------------------------------------------------------- acceptance: any number of segments


@pytest.mark.parametrize("unbatched", [False, True], ids=["batched", "unbatched"])
@pytest.mark.parametrize("name", ACCEPTANCE)
def test_any_length_from_one_capture(name: str, unbatched: bool) -> None:
    """S = 1, 2, 3, 5, 17, 200 and ragged tails; what is captured does not grow with the lengths."""
    loop = models.build(name)
    pair = Pair(loop, 0.0, max_width=1) if unbatched else Pair(loop, tolerance(name))
    size, captures = loop.segment_size, {}
    with no_diagpass_warnings():
        for segments in (1, 2, 3, 5, 17, 200):
            x = models.inputs(name, segments * size)
            report = pair.call(x, go_on=segments == 17, where=f"S={segments}:")
            captures[segments] = report.captures
            assert report.ran == "wavefront" and report.segments == segments
            assert report.max_width == (1 if unbatched else min(L, segments))
            assert report.batched_cells == 0 or not unbatched
        assert captures[5] == captures[17] == captures[200], f"captures by S: {captures}"
        assert captures[3] <= 6, f"captures by S: {captures}"
        tails = []
        for segments, tail in ((5, 1), (17, 1), (5, 2), (2, 1), (3, 2)):
            x = models.inputs(name, segments * size + tail)
            report = pair.call(x, where=f"S={segments} and {tail} tokens:")
            tails.append(report.captures)
            assert report.ran == "wavefront" and report.segments == segments + 1
    assert tails[0] <= captures[200] + 1 and tails[1] == tails[0], f"{captures}, with tails {tails}"
    assert tails[2] <= tails[1] + 1 and tails[4] == tails[3] == tails[2], f"{captures}, with tails {tails}"
    pair.check_kept()


@pytest.mark.parametrize("name", ACCEPTANCE)
def test_calls_continue_each_other(name: str) -> None:
    """One call over 12 segments, or three of 5, 1 and 6 that go on from each other."""
    loop = models.build(name)
    loop.reset = None
    size = loop.segment_size
    x = models.inputs(name, 12 * size)
    whole = copy.deepcopy(loop)
    pair = Pair(loop, tolerance(name))
    with torch.no_grad():
        expected = whole(x)
    for at, (start, end) in enumerate(((0, 5), (5, 6), (6, 12))):
        pair.call(x[:, start * size : end * size], go_on=True, where=f"call {at}:")
    outputs = [got[0] if loop.carries_state else got for got, _ in pair.kept]
    joined = join(outputs, 1), pair.states[1]
    expected = expected if loop.carries_state else (expected, None)
    assert_tree_same(joined, expected, tolerance(name), "three calls against one: ")


def test_armt_in_float32_is_as_close_to_float64_as_the_sequential_run() -> None:
    loop = models.build("armt")
    exact = copy.deepcopy(loop)
    single = loop.float()
    single.step.zero_mem()
    fast = fast_copy(single)
    logits, memories = ([], [], []), ([], [], [])
    for seed in range(5):  # one layer at one input is a draw of luck: judged over all
        x = models.inputs("armt", 40 * T, seed=seed)
        for at, each in enumerate((exact, fast, single)):
            with torch.no_grad():
                logits[at].append(each(x)["logits"])
            loop_of = fast.original if each is fast else each
            memories[at].append(torch.stack([layer.W_mem for layer in loop_of.step.layers]))
    assert fast.report.ran == "wavefront" and fast.report.batched_cells > 0
    assert_closer(*(torch.stack(found) for found in logits))
    assert_closer(*(torch.stack(found) for found in memories))


def test_a_width_cap_is_kept() -> None:
    pair = Pair(models.build("gru"), 1e-10, max_width=2)
    report = pair.call(models.inputs("gru", 8 * T))
    assert report.max_width == 2 and report.batched_cells > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gru", "buffer"])
def test_inductor(name: str) -> None:
    """Compiled, it is right over several lengths, too, and they share what was captured."""
    pair = Pair(models.build(name), 1e-10, compiler="inductor")
    captures = []
    for segments in (5, 9, 6):
        report = pair.call(models.inputs(name, segments * T), where=f"S={segments}:")
        assert report.ran == "wavefront" and report.batched_cells > 0
        captures.append(report.captures)
    assert captures[0] == captures[1] == captures[2], captures
    pair.check_kept()


# --------------------------------------------------------------------------- prefill, then generation


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_generation_goes_on_from_the_prompt(base: str, batch: int) -> None:
    """40 segments by wavefront, then 64 tokens by Hugging Face's greedy search: those of the plain model."""
    torch.manual_seed(batch)
    lm = armt.causal_lm(base, layers=L, d_model=16, heads=2, vocab=97, positions=100)
    cell = armt.wrap(lm, segment_size=8, num_mem_tokens=2, d_mem=4).memory_cell.eval()
    for (
        layer
    ) in cell.layers:  # so large that the prompt matters to the tokens, so small that rounding does not
        nn.init.normal_(layer.W_mv.weight, std={"llama": 0.02, "gpt2": 0.2}[base])
    plain = SegmentLoop(cell, 8, reset="zero_mem")
    fast = fast_copy(plain)
    prompt, question = torch.randint(97, (batch, 40 * 8)), torch.randint(97, (batch, 8))
    tokens = []
    for loop in (plain, fast):
        with torch.no_grad():
            loop(prompt)
            tokens.append(loop.step.generate(question, max_new_tokens=64, do_sample=False, eos_token_id=None))
    assert tokens[0].shape == (batch, 64) and torch.equal(tokens[1], tokens[0])
    assert fast.report.ran == "wavefront" and fast.report.cells == 40 * L
    assert_state_same(fast.original, plain, 1e-3)
    with torch.no_grad():
        assert_tree_same(fast(prompt), plain(prompt), 1e-3, "the next prompt")


# ----------------------------------------------------------- acceptance: constant memory, cheap plans


def rss() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def live_tensors() -> int:
    """Tensors that the garbage collector knows."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gru", "buffer"])
def test_ten_thousand_segments_in_constant_memory(name: str) -> None:
    """From segment 1,000 on nothing grows, in a process that did nothing else before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(stream_ten_thousand, name).result()


def stream_ten_thousand(name: str) -> None:
    """Watch Python memory over 2,000 segments, then tensors and resident memory over 9,000."""
    fast = fast_copy(models.build(name))
    segment = models.inputs(name, T)

    def source(count: int) -> Iterator[Tensor]:
        for number in range(count):
            yield segment * (1 + number % 7)

    total, tensors, resident, traced = torch.zeros(()), {}, {}, {}
    with torch.no_grad():
        tracemalloc.start()
        for done, _ in enumerate(fast.stream(source(4_000)), 1):
            if done in (1_500, 3_500):
                gc.collect()
                traced[done] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()  # what it keeps itself would be seen in the resident memory
        start = time.monotonic()
        for done, y in enumerate(fast.stream(source(10_000)), 1):
            total = total + y.sum()
            if done in (1_000, 9_990):
                gc.collect()
                tensors[done], resident[done] = live_tensors(), rss()
    seconds = time.monotonic() - start
    assert done == 10_000 and total.isfinite()
    assert tensors[9_990] <= tensors[1_000] + 2, tensors
    assert traced[3_500] - traced[1_500] < 30_000, f"{traced} bytes: more than 15 a segment"
    assert resident[9_990] < 1.01 * resident[1_000], resident
    assert seconds < 180, f"{seconds:.0f} s"


class TinyLayer(nn.Module):
    """As small as a layer with state can be."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mem = nn.Linear(2, 2), nn.Linear(2, 2)
        self.state = torch.zeros(1, 1, 2)

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.inp(h) + self.mem(self.state))
        self.state = h
        return h


@pytest.mark.alone
@pytest.mark.slow
def test_planning_is_cheap_and_linear() -> None:
    """16 layers: a new S = 128 costs less than 50 ms to plan, and 8 times as many segments 8 times that."""
    torch.manual_seed(0)
    loop = SegmentLoop(nn.Sequential(*[TinyLayer() for _ in range(16)]), 1)
    fast = fast_copy(loop)
    seconds = {}
    with torch.no_grad():
        for segments in (4, 8, 128, 256, 512, 1024):
            fast(torch.randn(1, segments, 2))
            report = fast.report
            assert report.ran == "wavefront" and report.cells == 16 * segments
            seconds[segments] = report.planning_seconds
    assert seconds[128] < 0.05, seconds
    assert seconds[1024] < 3 * 8 * seconds[128] + 0.02, seconds
    assert seconds[1024] < 3 * 4 * seconds[256] + 0.02, seconds


# ------------------------------------------------------------------------------------ streaming


class Source:
    """Segments from a generator that remembers what it was asked for, and which are still held."""

    def __init__(self, name: str, segments: int) -> None:
        self.asked = 0
        self.refs: list[weakref.ref[Tensor]] = []
        self.data = models.inputs(name, segments * T)

    def __iter__(self) -> Iterator[Tensor]:
        for at in range(self.data.shape[1] // T):
            self.asked += 1
            segment = self.data[:, at * T : (at + 1) * T].clone()
            self.refs.append(weakref.ref(segment))
            yield segment
            del segment

    def held(self) -> int:
        """Segments that somebody still holds (the generator itself holds the last it gave)."""
        return sum(ref() is not None for ref in self.refs)


@pytest.mark.parametrize("name", ["gru", "list_none"])
def test_outputs_come_as_soon_as_they_are_complete(name: str) -> None:
    """Output s, of L layers, needs segments up to s + L - 1 and no more; at most L segments are held."""
    source, fast = Source(name, 12), fast_copy(models.build(name))
    with torch.no_grad():
        fast(models.inputs(name, 5 * T))  # the capture may look further ahead
        for at, _ in enumerate(fast.stream(source)):
            assert source.asked <= at + L, f"output {at} came after {source.asked} segments"
            assert source.held() <= L + 1, f"{source.held()} segments are held at output {at}"
    assert fast.report.ran == "wavefront"


def test_a_first_stream_holds_few_segments_too() -> None:
    """Without a capture before: whatever is looked at for it, the outputs are right and come in order."""
    loop = models.build("gru")
    source, fast = Source("gru", 12), fast_copy(loop)
    with torch.no_grad():
        outputs = []
        for at, y in enumerate(fast.stream(source)):
            outputs.append(y)
            assert source.asked <= at + max(L, 4) + 1
        torch.testing.assert_close(torch.cat(outputs, 1), loop(source.data)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["gru", "mamba", "rwkv_state"])
def test_outputs_are_never_overwritten(name: str) -> None:
    fast = fast_copy(models.build(name))
    kept = []
    with torch.no_grad():
        for _ in range(2):
            for y in fast.stream(cut(models.inputs(name, 9 * T), T, 1)):
                kept.append((y, y.clone()))
    for at, (y, before) in enumerate(kept):
        assert torch.equal(y, before), f"output {at} was overwritten"


def test_a_stream_goes_on_from_a_state() -> None:
    loop = models.build("gru")
    x, fast = models.inputs("gru", 10 * T), fast_copy(loop)
    with torch.no_grad():
        expected, end = loop(x)
        _, state = fast(x[:, : 4 * T])
        stream = fast.stream(x[:, 4 * T :].split(T, 1), state)
        got = torch.cat(list(stream), 1)
    torch.testing.assert_close(got, expected[:, 4 * T :], rtol=1e-10, atol=1e-12)
    assert_tree_same(stream.final_state, end, 1e-10, "final state")


def test_the_final_state_is_there_at_the_end_only() -> None:
    fast = fast_copy(models.build("gru"))
    with torch.no_grad():
        stream = fast.stream(models.inputs("gru", 3 * T).split(T, 1))
        for _ in range(3):
            with pytest.raises(DiagpassError, match="final_state"):
                _ = stream.final_state
            next(stream)
        assert next(stream, "end") == "end"
        assert len(stream.final_state) == L
        with fast.stream(models.inputs("gru", 3 * T).split(T, 1)) as stream:
            next(stream)
    with pytest.raises(DiagpassError, match="closed"):
        _ = stream.final_state


@pytest.mark.parametrize("segments", [0, 1, 2])
def test_streams_shorter_than_the_ramp(segments: int) -> None:
    loop = models.build("gru")
    fast = fast_copy(loop)
    x = models.inputs("gru", 6 * T)
    with torch.no_grad():
        for data in (x, x[:, : segments * T], x):
            parts = list(data.split(T, 1)) if data.shape[1] else []
            stream, plain = fast.stream(parts), loop.stream(parts)
            assert_tree_same(list(stream), list(plain), 1e-10, "outputs")
            assert_tree_same(stream.final_state, plain.final_state, 1e-10, "final state")


def test_segments_of_many_lengths() -> None:
    """Nothing says that a short segment is the last one."""
    loop = models.build("mamba")
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    parts = [models.inputs("mamba", length) for length in (3, 3, 2, 3, 1, 3, 3, 2, 3)]
    with torch.no_grad():
        for _ in range(2):
            assert_tree_same(list(fast.stream(parts)), list(plain.stream(parts)), 1e-10, "outputs")
            assert_state_same(fast.original, plain, 1e-10)


def failing(segments: list[Tensor]) -> Iterator[Tensor]:
    """Segments, and then the disk is full."""
    yield from segments
    raise OSError("disk")


@pytest.mark.parametrize("how", ["closed", "dropped", "error"])
def test_an_abandoned_stream_leaves_a_state_that_is_refused(how: str) -> None:
    """The layers are at different segments then; only a reset makes that good."""
    loop = models.build("attribute")
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    x = models.inputs("attribute", 6 * T)
    segments = list(x.split(T, 1))
    with torch.no_grad():
        fast(x)
        if how == "error":
            with pytest.raises(OSError, match="disk"):
                list(fast.stream(failing(segments)))
        else:
            stream = fast.stream(segments)
            next(stream)
            next(stream)
            if how == "closed":
                stream.close()
            del stream
        for call in (fast, lambda x: list(fast.stream(x.split(T, 1)))):
            with pytest.raises(DiagpassError, match="stream"):
                call(x)
        fast.reset = "reset"
        assert_tree_same(fast(x), plain(x), 1e-10, "after the reset")
        assert_state_same(fast.original.step, plain.step, 1e-10, "after the reset")
        assert_tree_same(fast(x), _after_reset(plain)(x), 1e-10, "a call later")


def _after_reset(loop: SegmentLoop) -> SegmentLoop:
    loop.step.reset()
    return loop


@pytest.mark.parametrize("how", ["closed", "error"])
@pytest.mark.parametrize("name", ["gru", "list_none"])
def test_an_abandoned_stream_harms_nobody_who_resets_or_carries(name: str, how: str) -> None:
    loop = models.build(name)
    fast = fast_copy(loop)
    x = models.inputs(name, 6 * T)
    with torch.no_grad():
        expected = loop(x)
        for _ in range(2):
            if how == "error":
                with pytest.raises(OSError, match="disk"):
                    list(fast.stream(failing(list(x.split(T, 1)))))
            else:
                with fast.stream(x.split(T, 1)) as stream:
                    next(stream)
            assert_tree_same(fast(x), expected, 1e-10, "the next call")


def test_a_stream_that_was_never_asked_leaves_no_mark() -> None:
    loop = models.build("attribute")
    fast = fast_copy(loop)
    x = models.inputs("attribute", 4 * T)
    with torch.no_grad():
        for _ in range(2):
            fast.stream(x.split(T, 1)).close()
            assert_tree_same(fast(x), loop(x), 1e-10, "output")


def test_two_streams_do_not_mix() -> None:
    loop = models.build("gru")
    fast = fast_copy(loop)
    x, y = models.inputs("gru", 7 * T, seed=1), models.inputs("gru", 9 * T, seed=2)
    with torch.no_grad():
        first, second = fast.stream(x.split(T, 1)), fast.stream(y.split(T, 1))
        outputs: tuple[list[Tensor], list[Tensor]] = [next(first)], []
        for at in range(9):
            outputs[1].append(next(second))
            if at < 6:
                outputs[0].append(next(first))
            if at == 3:
                assert_tree_same(fast(x), loop(x), 1e-10, "a call between")
        assert next(first, None) is None and next(second, None) is None
        for stream, got, data in ((first, outputs[0], x), (second, outputs[1], y)):
            assert_tree_same((torch.cat(got, 1), stream.final_state), loop(data), 1e-10, "stream")


def test_a_second_stream_over_one_kept_state_ends_the_first() -> None:
    loop = models.build("list_none")
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    x, y = models.inputs("list_none", 7 * T, seed=1), models.inputs("list_none", 5 * T, seed=2)
    with torch.no_grad():
        first = fast.stream(x.split(T, 1))
        next(first)
        second = list(fast.stream(y.split(T, 1)))
        with pytest.raises(DiagpassError, match="another call"):
            list(first)
        assert_tree_same(torch.cat(second, 1), plain(y), 1e-10, "the second stream")


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    fast = fast_copy(models.build("gru"))
    segments = models.inputs("gru", 5 * T).split(T, 1)
    with torch.no_grad():
        list(fast.stream(segments))
        capsys.readouterr()
        list(fast.stream(segments))
        assert capsys.readouterr() == ("", "")
        list(fast.stream(segments, progress=True))
    captured = capsys.readouterr()
    assert captured.out == "" and "5 of 5 segments" in captured.err


# ----------------------------------------------------------------------------- inputs and outputs


def test_keyword_inputs() -> None:
    """Tensors and Python values alike are those of the call, not of the capture."""
    pair = Pair(models.build("masked"), 1e-10)
    for call, (scale, power) in enumerate(((0.5, 1), (2.0, 1), (2.0, 2), (0.5, 1))):
        x = models.inputs("masked", 7 * T + 1, seed=call)
        pair.call(x, where=f"call {call}:", scale=torch.tensor(scale).double(), power=power)
    pair.call(models.inputs("masked", 5 * T), where="without:")
    segments = cut(models.inputs("masked", 5 * T), T, 1)
    kwargs = {"scale": torch.tensor(0.25).double(), "power": 2}
    with torch.no_grad():
        got, expected = (list(each.stream(segments, **kwargs)) for each in (pair.fast, pair.plain))
    assert_tree_same(join(got, 1), join(expected, 1), 1e-10, "stream")


class OutStep(models.ListStep):
    """Outputs of every sort, equal values over the segments among them."""

    def forward(self, x: Tensor, state: Any) -> tuple[Any, Any]:
        y, state = super().forward(x, state)
        top = state[-1].unsqueeze(1)
        return {"y": y, "memory": (top, None), "more": [{"raw": x, "count": 3, "name": "out"}]}, state


def test_outputs_of_any_structure() -> None:
    torch.manual_seed(0)
    pair = Pair(models.carries(OutStep().double().eval()), 1e-10)
    for call, length in enumerate((5 * T, 7 * T + 1, 5 * T)):
        pair.call(models.inputs("gru", length, seed=call), go_on=call == 1, where=f"call {call}:")
    pair.check_kept()
    assert pair.fast.report.ran == "wavefront"


class ValueStep(models.ListStep):
    """A Python value among the outputs that is another for each segment."""

    def forward(self, x: Tensor, state: Any) -> tuple[Any, Any]:
        count = 0 if state is None else state[1]
        y, memory = super().forward(x, None if state is None else state[0])
        return {"y": y, "count": count}, (memory, count + 1)


def test_a_value_that_differs_between_segments_is_refused_by_name() -> None:
    torch.manual_seed(0)
    loop = models.carries(ValueStep().double().eval())
    fast = fast_copy(loop)
    x = models.inputs("gru", 4 * T)
    for each in (loop, fast):
        with torch.no_grad(), pytest.raises(DiagpassError, match=r"output\['count'\]"):
            each(x)


def test_dim_zero() -> None:
    """Time first: the batch is dimension 1."""

    class TimeFirst(models.ListStep):
        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, state = super().forward(x.transpose(0, 1), state)
            return y.transpose(0, 1), state

    torch.manual_seed(0)
    pair = Pair(SegmentLoop(TimeFirst().double().eval(), T, dim=0, carries_state=True), 1e-10)
    for call, segments in enumerate((5, 9, 5)):
        pair.call(models.inputs("gru", segments * T, seed=call).transpose(0, 1), where=f"call {call}:")
    assert pair.fast.report.ran == "wavefront"


@pytest.mark.parametrize("length", [1, T - 1])
def test_an_input_shorter_than_a_segment(length: int) -> None:
    for name in ("gru", "first_flag"):
        pair = Pair(models.build(name), 1e-10)
        pair.call(models.inputs(name, length), where=f"{name}, short first:")
        pair.call(models.inputs(name, 4 * T), where=f"{name}, long:")
        pair.call(models.inputs(name, length), where=f"{name}, short again:")


# -------------------------------------------------------------------- another batch, dtype, length


def test_another_batch_is_another_plan_and_the_old_one_is_kept() -> None:
    pair = Pair(models.build("gru"), 1e-10)
    captures = [
        pair.call(models.inputs("gru", 6 * T, batch), where=f"batch {batch}:").captures
        for batch in (2, 3, 2, 3, 1, 2)
    ]
    assert captures[0] < captures[1] < captures[4], captures
    assert captures[1:4] == [captures[1]] * 3 and captures[5] == captures[4], captures
    assert pair.fast.report.ran == "wavefront"


def test_another_segment_length() -> None:
    pair = Pair(models.build("gru"), 1e-10)
    x = models.inputs("gru", 24)
    for size in (3, 4, 3, 2):
        pair.plain.segment_size = size
        pair.fast.segment_size = size
        report = pair.call(x, where=f"segments of {size}:")
        assert report.segments == 24 // size and report.ran == "wavefront"


@pytest.mark.parametrize("name", ["gru", "mamba"])
def test_another_dtype(name: str) -> None:
    pair = Pair(models.build(name), 1e-10)
    x = models.inputs(name, 6 * T)
    pair.call(x, where="float64:")
    pair.rtol = 1e-4
    pair.plain.float()
    pair.fast.float()
    report = pair.call(x.float(), where="float32:")
    assert report.ran == "wavefront"
    pair.plain.double()
    pair.fast.double()
    pair.call(x, where="float64 again:")


def test_mode_and_weights_may_change_between_calls() -> None:
    """Weights are edited in place, replaced, and loaded; the next call sees it."""
    pair = Pair(models.build("mamba"), 1e-10)
    x = models.inputs("mamba", 6 * T)
    pair.call(x)
    for each in (pair.plain, pair.fast):
        with torch.no_grad():
            each.step.layers[1].inp.weight.mul_(0.5)
    pair.call(x, where="in place:")
    for each in (pair.plain, pair.fast):
        each.step.layers[0].out.weight = nn.Parameter(each.step.layers[0].out.weight.detach() * 2)
    pair.call(x, where="replaced:")
    other = models.build("mamba").state_dict()
    for each in (pair.plain, pair.fast):
        each.load_state_dict({key: value * 0.5 for key, value in other.items()})
    pair.call(x, where="loaded:")


def test_state_may_be_edited_between_calls() -> None:
    """The caller owns the state: it may zero it, set it, or put another tensor there."""
    pair = Pair(models.build("buffer"), 1e-10)
    x = models.inputs("buffer", 6 * T)
    held = pair.fast.original.step.layers[0].buf
    pair.call(x)
    assert pair.fast.original.step.layers[0].buf is held, "in place means in place"
    for each in (pair.plain, pair.fast):
        each.step.layers[0].buf.zero_()
    pair.call(x, where="zeroed:")
    for each in (pair.plain, pair.fast):
        each.step.layers[1].buf = torch.full_like(each.step.layers[1].buf, 0.25)
    pair.call(x, where="another tensor:")


def test_dynamo_may_be_reset() -> None:
    pair = Pair(models.build("gru"), 1e-10)
    for call, segments in enumerate((5, 6, 7)):
        pair.call(models.inputs("gru", segments * T), where=f"call {call}:")
        torch._dynamo.reset()
    assert pair.fast.report.ran == "wavefront"


# --------------------------------------------------------------------------------- errors, gradients


class BoundedStep(models.MaskedStep):
    """Token numbers alone."""

    def forward(self, batch: Tensor) -> Tensor:
        return super().forward({"ids": batch, "mask": torch.ones_like(batch)}).logits


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "first call"])
def test_an_error_in_the_step_leaves_the_state_as_it_was(captured: bool) -> None:
    torch.manual_seed(0)
    loop = models.keeps(BoundedStep().double().eval(), reset=None)
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    x = models.ids(8 * T)
    bad = x.clone()
    bad[0, 5 * T + 1] = 1000
    with torch.no_grad():
        if captured:
            fast(x), plain(x)
        before = snapshot(fast.original)
        with pytest.raises(IndexError):
            fast(bad)
        assert_state_same(fast.original, before, 0.0, "after the error")
        assert_tree_same(fast(x), plain(x), 1e-10, "the next call")
        assert_state_same(fast.original, plain, 1e-10, "the next call")


def test_an_error_in_the_step_of_a_stream_leaves_no_half_written_state() -> None:
    """The state is refused from then on, or it is a whole one: as before the stream or after a segment."""
    torch.manual_seed(0)
    loop = models.keeps(BoundedStep().double().eval(), reset=None)
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    x, first = models.ids(8 * T), models.ids(8 * T)
    bad = x.clone()
    bad[0, 5 * T + 1] = 1000
    with torch.no_grad():
        fast(first), plain(first)
        right = []
        for done in range(6):
            whole = copy.deepcopy(plain)
            if done:
                whole(bad[:, : done * T])
            right.append(whole(x))
        with pytest.raises(IndexError):
            list(fast.stream(bad.split(T, 1)))
        try:
            got = fast(x)
        except DiagpassError as error:
            assert "stream" in str(error)
            fast.reset = loop.reset = "reset"
            got, right = fast(x), [loop(x)]
        assert any(torch.allclose(got, y, rtol=1e-10, atol=1e-12) for y in right)


@pytest.mark.parametrize("name", ["gru", "first_flag", "stacked"])
def test_gradients_enabled(name: str) -> None:
    """Outputs, `requires_grad` and gradients are the sequential loop's."""
    loop = models.build(name)
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    with torch.no_grad():
        fast(models.inputs(name, 5 * T)), plain(models.inputs(name, 5 * T))
    x = models.inputs(name, 7 * T)
    expected, got = plain(x), fast(x)
    assert_tree_same(got, expected, 1e-10, "output")
    assert_state_same(fast.original, plain, 1e-10)
    for outputs in (expected, got):
        leaves = tree_leaves(outputs)
        sum(leaf.square().sum() for leaf in leaves).backward()
    grads = dict(fast.original.named_parameters())
    for key, parameter in plain.named_parameters():
        assert_tree_same(grads[key].grad, parameter.grad, 1e-8, f"gradient of {key}")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes(mode: Any) -> None:
    loop = models.build("mamba").requires_grad_(False)
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    x = models.inputs("mamba", 6 * T)
    for call in range(2):
        with mode():
            assert_tree_same(fast(x), plain(x), 1e-10, f"call {call}: ")


def test_inputs_that_cannot_be_cut() -> None:
    fast = fast_copy(models.build("gru"))
    with pytest.raises(DiagpassError, match="length 0 along dim 1"):
        fast(torch.ones(B, 0, D).double())
    with pytest.raises(DiagpassError, match="got one Tensor"):
        fast.stream(torch.ones(B, 3 * T, D).double())
    with pytest.raises(DiagpassError, match="carries_state"):
        fast_copy(models.build("list_none"))(models.inputs("list_none", 2 * T), ["state"])


# ------------------------------------------------------------------------------------ the interface


def test_stands_in_for_the_loop() -> None:
    loop = models.build("list_none")
    fast = diagpass.transform(loop, options={"compiler": "eager"})
    assert fast.original is loop and fast.step is loop.step and fast.segment_size == T
    assert list(fast.state_dict()) == list(loop.state_dict())
    assert all(key.startswith("step.") for key in fast.state_dict())


def test_example_inputs_capture_and_leave_the_state_alone() -> None:
    loop = models.build("mamba")
    loop.reset = None
    plain = copy.deepcopy(loop)
    before = snapshot(loop)
    x = models.inputs("mamba", 6 * T)
    with torch.no_grad():  # as the call below: another mode would be another plan
        fast = diagpass.transform(loop, (x,), options={"compiler": "eager", "schedule": "wavefront"})
    assert_state_same(loop, before, 0.0, "after the capture")
    captures = fast.report.captures
    assert captures > 0
    with torch.no_grad():
        assert_tree_same(fast(x), plain(x), 1e-10, "output")
    assert fast.report.captures == captures


@pytest.mark.parametrize("name", ["gru", "mamba", "armt"])
def test_verify(name: str) -> None:
    """Figures for outputs and state; the state is as before, and so is the next call."""
    loop = models.build(name)
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    x = models.inputs(name, 6 * T)
    with torch.no_grad():
        before = snapshot(fast.original)
        figures = fast.verify(x)
        assert_state_same(fast.original, before, 0.0, "after verify")
        assert figures and all(isinstance(key, str) for key in figures)
        assert_tree_same(fast(x), plain(x), tolerance(name), "the next call")


def test_verify_as_an_option() -> None:
    pair = Pair(models.build("gru"), 1e-10, verify=True)
    for call, segments in enumerate((5, 9, 5)):
        pair.call(models.inputs("gru", segments * T, seed=call), where=f"call {call}:")


def test_copies_and_the_switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(models.build("list_none"), 1e-10)
    x = models.inputs("list_none", 5 * T)
    pair.call(x)
    other = copy.deepcopy(pair.fast)
    with torch.no_grad():
        assert_tree_same(other(x), pair.plain(x), 1e-10, "a copy")
        monkeypatch.setenv("DIAGPASS_DISABLE", "1")
        assert torch.equal(other(x), pair.plain(x))
        assert torch.equal(torch.cat(list(other.stream(x.split(T, 1))), 1), pair.plain(x))


def test_a_stream_of_dicts() -> None:
    """A generator that makes segments out of a file, say."""
    loop = models.build("masked")
    plain, fast = copy.deepcopy(loop), fast_copy(loop)
    x = models.inputs("masked", 8 * T)

    def source() -> Iterator[Any]:
        for at in range(8):
            yield tree_map(lambda part, at=at: part[:, at * T : (at + 1) * T].clone(), x)

    with torch.no_grad():
        got = join(list(fast.stream(source())), 1)
        assert_tree_same(got, plain(x), 1e-10, "stream")
