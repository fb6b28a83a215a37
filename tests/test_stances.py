"""torch.compiler's stances: what they say of compilation holds, and nothing is ever computed wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from diagpass import DiagpassError, SegmentLoop
from tests.helpers import assert_state_same, assert_tree_same, fast_copy, no_diagpass_warnings
from tests.rolled_models import D, Step, T, tokens
from tests.tape import check, replaying  # noqa: F401

set_stance = torch.compiler.set_stance


class Layer(nn.Module):
    """Three behaviours: of the first segment, of those after it, and of those where the model says so."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mem = nn.Linear(D, D), nn.Linear(D, D)
        self.other = False
        self.reset()

    def reset(self) -> None:
        self.state: Tensor | None = None

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(self.inp(h))
        if self.state is not None:
            h = h + self.mem(self.state)
            if self.other:
                h = h * 2
        self.state = h.mean(1, keepdim=True)
        return h


def loops() -> tuple[SegmentLoop, Any]:
    torch.manual_seed(7)
    loop = SegmentLoop(Step([Layer() for _ in range(3)]), T, reset="reset").double().eval()
    return loop, fast_copy(loop)


def warm(loop: SegmentLoop, fast: Any, segments: int = 6, calls: int = 4) -> None:
    for _ in range(calls):
        check(loop, fast, tokens(segments * T), [], 1e-10)


def set_other(loop: SegmentLoop, fast: Any, value: bool) -> None:
    for step in (loop.step, fast.original.step):
        step.layers[1].other = value


@pytest.mark.parametrize("stance", ["force_eager", "eager_on_recompile", "eager_then_compile", "default"])
@pytest.mark.parametrize("known", ["nothing", "first", "all"])
def test_a_loop_computes_the_same(stance: Any, known: str) -> None:
    """Whatever was captured before: the first behaviour only, all of them, or none."""
    loop, fast = loops()
    if known != "nothing":
        warm(loop, fast, segments=1 if known == "first" else 6)
    with set_stance(stance), no_diagpass_warnings():
        warm(loop, fast)
        set_other(loop, fast, True)
        warm(loop, fast)
        warm(loop, fast, segments=3)
        set_other(loop, fast, False)
        warm(loop, fast)
    warm(loop, fast)
    assert fast.report.ran == "wavefront", "afterwards all is as before"


@pytest.mark.parametrize("stance", ["eager_on_recompile", "force_eager", "eager_then_compile"])
def test_a_stream_computes_the_same(stance: Any) -> None:
    loop, fast = loops()
    warm(loop, fast, segments=1)
    segments = list(tokens(6 * T).split(T, dim=1))
    with set_stance(stance), torch.no_grad():
        loop.reset_step()
        fast.original.reset_step()
        got, expected = torch.cat(list(fast.stream(segments)), 1), torch.cat(list(loop.stream(segments)), 1)
    torch.testing.assert_close(got, expected)
    assert_state_same(fast.original, loop, 1e-10, "state")


def test_what_may_not_be_captured_is_said_as_pytorch_says_it() -> None:
    loop, fast = loops()
    warm(loop, fast)
    set_other(loop, fast, True)
    with torch.no_grad(), set_stance("fail_on_recompile"):
        with pytest.raises(RuntimeError, match="Detected recompile"):
            fast(tokens(6 * T))
        loop.reset_step()
        assert_state_same(fast.original, loop, 0.0, "as the reset left it")
        with pytest.raises(RuntimeError, match="Detected recompile"):
            list(fast.stream(tokens(6 * T).split(T, dim=1)))
        fast.resume()
        set_other(loop, fast, False)
        warm(loop, fast)
    set_other(loop, fast, True)
    warm(loop, fast)
    assert fast.report.ran == "wavefront"


def test_guards_that_need_not_be_asked() -> None:
    """The user promises that what was captured will do; the behaviours are told apart still."""
    loop, fast = loops()
    warm(loop, fast)
    warm(loop, fast, segments=2)
    captures, followed = fast._session.captures, fast._session.scores.followed
    with set_stance("default", skip_guard_eval_unsafe=True):
        warm(loop, fast)
        warm(loop, fast, segments=2)
        warm(loop, fast, segments=5)
        with torch.no_grad(), pytest.raises(RuntimeError, match="skip_guard_eval_unsafe"):
            fast(tokens(6 * T).repeat(2, 1, 1))
    assert fast._session.captures == captures and fast._session.scores.followed >= followed + 8
    warm(loop, fast)


class Whole(nn.Module):
    """A loop of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step([Layer() for _ in range(3)]).double().eval()

    def forward(self, x: Tensor) -> Tensor:
        self.step.reset()
        return torch.cat([self.step(segment) for segment in x.split(T, dim=1)], dim=1)


@pytest.mark.parametrize("stance", ["eager_on_recompile", "force_eager", "eager_then_compile"])
@pytest.mark.parametrize("loop", ["rolled", "flat"])
def test_a_model_computes_the_same(loop: str, stance: Any) -> None:
    torch.manual_seed(3)
    model = Whole()
    fast: Any = fast_copy(model, loop=loop)

    def compare(segments: int) -> None:
        x = tokens(segments * T)
        assert_tree_same(fast(x), model(x), 1e-10, "output")
        assert_state_same(fast.original, model, 1e-10, "state")

    with torch.no_grad(), no_diagpass_warnings():
        compare(1)
        with set_stance(stance):
            for segments in (5, 6, 5):
                compare(segments)
        compare(6)
    assert fast.report.ran == "wavefront"


def test_a_model_where_nothing_may_be_captured() -> None:
    torch.manual_seed(3)
    model = Whole()
    fast: Any = fast_copy(model, loop="rolled")
    with torch.no_grad():
        fast(tokens(T))
        with set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="Detected recompile"):
            fast(tokens(6 * T))
        x = tokens(6 * T)
        with no_diagpass_warnings():
            assert_tree_same(fast(x), model(x), 1e-10, "output")
    assert fast.report.ran == "wavefront"


def test_another_backend_that_is_forced_gets_no_stand_ins() -> None:
    loop, fast = loops()
    warm(loop, fast)
    with set_stance(force_backend="eager"):
        warm(loop, fast)
    warm(loop, fast)


def test_there_is_nothing_to_explain_where_compilation_is_off() -> None:
    loop, _ = loops()
    with set_stance("force_eager"), pytest.raises(DiagpassError, match="switched off"):
        diagpass.explain(loop, tokens(4 * T))
