"""RMT: a chain that leaves no width. Said so, by name, and run as it stands."""

from __future__ import annotations

import copy

import pytest
import torch

import diagpass
from examples import rmt
from tests.helpers import (
    assert_same,
    assert_state_same,
    assert_tree_same,
    check_schedule,
    check_true_dependencies,
    collect_warnings,
    run_sequential,
)
from tests.models import ZOO

SIZE = {"layers": 3, "segments": 3, "batch": 2}


def test_explain_names_the_chain() -> None:
    model, inputs = rmt.build(**SIZE, dtype=torch.float64)
    report = diagpass.explain(model, *inputs)
    assert report.verdict == "sequential"
    assert (report.cells, report.waves) == (9, 9)
    assert report.mean_width == 1.0
    check_schedule(report)
    assert check_true_dependencies(model, inputs, report)
    chain = report.chain
    assert chain is not None
    assert chain.source.path.endswith(".2") and chain.target.path.endswith(".0")
    assert chain.target.segment == chain.source.segment + 1
    for end in (chain.source, chain.target):
        assert end.path in str(chain) and f"segment {end.segment}" in str(chain)
        assert end.path in {name for name, _ in model.named_modules()}
    assert str(chain) in str(report)


def test_default_runs_sequentially_with_one_warning_and_bitwise_results() -> None:
    model, inputs = rmt.build(**SIZE, dtype=torch.float64)
    plain = copy.deepcopy(model)
    with collect_warnings() as texts:
        fast = diagpass.transform(model)
        for call in range(3):
            expected, got = run_sequential(plain, inputs), run_sequential(fast, inputs)
            assert_tree_same(got, expected, 0.0, f"call {call}")
            assert_state_same(fast.original, plain)
    assert len(texts) == 1, texts
    chain = fast.report.chain
    assert str(chain) in texts[0]
    assert fast.report.ran == "sequential"
    assert fast.report.batched_cells == 0


def test_strict_raises_chain_error() -> None:
    model, inputs = rmt.build(**SIZE, dtype=torch.float64)
    chain = diagpass.explain(model, *inputs).chain
    fast = diagpass.transform(model, strict=True)
    with pytest.raises(diagpass.ChainError) as raised:
        run_sequential(fast, inputs)
    assert chain.source.path in str(raised.value) and chain.target.path in str(raised.value)


def test_a_forced_wavefront_of_a_chain_is_right_too() -> None:
    model, inputs = rmt.build(**SIZE, dtype=torch.float64)
    assert_same(model, inputs)


@pytest.mark.parametrize(
    "name, waves",
    # derived beside the models in tests/models.py
    [("global_memory", 11), ("reads_upper_state", 9), ("shared_buffer", 9)],
)
def test_a_chain_that_keeps_some_width(name: str, waves: int) -> None:
    """Chain edge and true wave count are shown, and it still runs as waves."""
    model, inputs = ZOO[name]()
    report = diagpass.explain(model, *inputs)
    assert report.waves == waves
    assert report.verdict == "wavefront"
    assert report.chain is not None
    assert str(report.chain) in str(report)
    ran = assert_same(model, inputs, {"schedule": "auto"})
    assert ran.waves == waves


def test_mean_width_just_below_the_bar_is_sequential() -> None:
    """Common memory over 4 layers x 4 segments: S(L-1) + 1 = 13 waves of 16 cells, 1.23 wide."""
    from tests.models import GlobalLoop, tokens

    model = GlobalLoop(4).double().eval()
    report = diagpass.explain(model, tokens(4))
    assert (report.cells, report.waves) == (16, 13)
    assert report.verdict == "sequential"
