"""Plans that lack nothing but width: they run all the same where that pays, and say what they are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from diagpass import ChainError, DiagpassWarning, SegmentLoop, SequentialError, pipeline
from diagpass.options import Options
from diagpass.rolled import summary
from examples import rmt
from tests.helpers import assert_state_same, assert_tree_same
from tests.rolled_models import D, Step, T, tokens

EAGER = {"compiler": "eager"}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device where calls are recorded."""
    for module in (pipeline, summary):
        monkeypatch.setattr(module, "records", lambda options, device_types: True)


class Chained(Step):
    """The top of a segment is added to the bottom of the next."""

    def reset(self) -> None:
        super().reset()
        self.top = torch.zeros(1, 1, D, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x + self.top)
        self.top = y.mean(1, keepdim=True)
        return y


def chained() -> SegmentLoop:
    torch.manual_seed(3)
    step = Chained([nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(3)]).double().eval()
    step.reset()
    return SegmentLoop(step, T, reset="reset")


def said(call: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as found, torch.no_grad():
        warnings.simplefilter("always", DiagpassWarning)
        call()
    return [str(each.message) for each in found if issubclass(each.category, DiagpassWarning)]


def test_only_on_cuda_under_inductor() -> None:
    assert pipeline.records(Options(), {"cuda"})
    assert not pipeline.records(Options(), {"cpu"})
    assert not pipeline.records(Options(), {"cpu", "cuda"})
    assert not pipeline.records(Options(compiler="eager"), {"cuda"})


def test_on_the_cpu_a_chain_runs_as_it_stands() -> None:
    fast = diagpass.transform(chained(), options=EAGER)
    (message,) = said(lambda: fast(tokens(8 * T)))
    assert message.startswith("running sequentially: a chain leaves no width")
    assert fast.report.ran == fast.report.verdict == "sequential"


@pytest.mark.usefixtures("recorded")
def test_a_loop() -> None:
    """Calls of any length and streams; one warning for all of them."""
    loop = chained()
    fast = diagpass.transform(copy.deepcopy(loop), options=EAGER)
    x = tokens(8 * T)
    (message,) = said(lambda: fast(x))
    assert message.startswith("the cells run one after the other, compiled: a chain leaves no width")
    for length in (8 * T, 5 * T - 1, 8 * T, 8 * T, 2 * T):
        x = tokens(length)
        with torch.no_grad():
            expected = loop(x)
        got: list[Tensor] = []
        assert not said(lambda x=x, got=got: got.append(fast(x)))
        assert_tree_same(got[0], expected, 1e-12, "output")
        assert_state_same(fast.original, loop, 1e-12, "state")
    report = fast.report
    assert report.ran == "wavefront" and report.verdict == "sequential" and report.mean_width < 1.25
    assert "one after the other" in str(report) and "as it stands" not in str(report)
    x = tokens(8 * T)
    with torch.no_grad():
        streamed = torch.cat(list(fast.stream(x.split(T, 1))), 1)
        assert_tree_same(streamed, loop(x), 1e-12, "stream")


@pytest.mark.usefixtures("recorded")
def test_strict_wants_a_wavefront() -> None:
    fast = diagpass.transform(chained(), strict=True, options=EAGER)
    with torch.no_grad(), pytest.raises(ChainError, match="a chain leaves no width"):
        fast(tokens(8 * T))


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("loop", ["flat", "rolled"])
def test_a_model_of_its_own_loop(loop: str) -> None:
    model, inputs = rmt.build(layers=3, segments=6, d_model=16, heads=2, segment_size=4, dtype=torch.float64)
    fast = diagpass.transform(copy.deepcopy(model), options={**EAGER, "loop": loop})
    (message,) = said(lambda: fast(*inputs))
    assert message.startswith("the cells run one after the other, compiled: a chain leaves no width")
    with torch.no_grad():
        assert_tree_same(fast(*inputs).logits, model(*inputs).logits, 1e-12, "logits")
    assert fast.report.ran == "wavefront" and fast.report.verdict == "sequential"


@pytest.mark.usefixtures("recorded")
def test_one_segment() -> None:
    model, (ids,) = rmt.build(layers=3, segments=1, d_model=16, heads=2, segment_size=4, dtype=torch.float64)
    fast = diagpass.transform(copy.deepcopy(model), options=EAGER)
    (message,) = said(lambda: fast(ids))
    assert "the input has one segment" in message
    with torch.no_grad():
        assert_tree_same(fast(ids).logits, model(ids).logits, 1e-12, "logits")
    assert fast.report.ran == "wavefront"
    strict = diagpass.transform(model, strict=True, options=EAGER)
    with torch.no_grad(), pytest.raises(SequentialError, match="one segment"):
        strict(ids)


@pytest.mark.usefixtures("recorded")
def test_what_autograd_records_runs_as_it_stands() -> None:
    model, (ids,) = rmt.build(layers=3, segments=1, d_model=16, heads=2, segment_size=4, dtype=torch.float64)
    fast = diagpass.transform(copy.deepcopy(model), options=EAGER)
    with pytest.warns(DiagpassWarning, match="running sequentially"):
        fast(ids).logits.sum().backward()
    model(ids).logits.sum().backward()
    for (name, got), (_, expected) in zip(
        fast.original.named_parameters(), model.named_parameters(), strict=True
    ):
        assert (got.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            assert_tree_same(got.grad, expected.grad, 1e-12, name)


def test_explain_says_what_cuda_would_do() -> None:
    text = str(diagpass.explain(chained(), tokens(8 * T)))
    assert "runs the model as it stands" in text and "on CUDA under Inductor" in text
