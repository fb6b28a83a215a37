"""Every model of the zoo: exactly equal results, and the waves that were derived by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import diagpass
from tests.helpers import (
    assert_bitwise,
    assert_same,
    assert_state_same,
    check_schedule,
    check_true_dependencies,
    forced,
    snapshot,
)
from tests.models import EXPECT, ZOO, Loop, tokens


def check_expected(name: str, report: diagpass.Report) -> None:
    """What was derived by hand for the zoo entry `name` is what the report says."""
    expect = EXPECT[name]
    assert report.cells == expect.cells, str(report)
    waves = expect.waves if isinstance(expect.waves, tuple) else (expect.waves,)
    assert report.waves in waves, str(report)
    assert report.mean_width == pytest.approx(report.cells / report.waves)
    assert report.verdict == expect.verdict
    assert (report.chain is not None) == expect.chain, str(report)
    if expect.kinds is not None:
        assert len(report.kinds) <= expect.kinds, str(report)


@pytest.mark.parametrize("name", ZOO)
def test_results_equal_and_waves_are_those_derived_by_hand(name: str) -> None:
    model, inputs = ZOO[name]()
    expect = EXPECT[name]
    report = assert_same(model, inputs, ran=expect.ran, returns_state=expect.returns_state)
    if report.ran == "wavefront":
        check_schedule(report)
        assert check_true_dependencies(model, inputs, report) or "shared" in name
        if expect.batched is not None:
            assert (report.batched_cells > 0) == expect.batched, str(report)
        assert report.batched_cells <= report.cells
    if expect.cells is not None:
        check_expected(name, report)


@pytest.mark.parametrize("name", ZOO)
def test_unbatched_schedule_is_bitwise_equal(name: str) -> None:
    model, inputs = ZOO[name]()
    expect = EXPECT[name]
    report = assert_bitwise(model, inputs, calls=1, ran=expect.ran, returns_state=expect.returns_state)
    if report.ran == "wavefront":
        check_schedule(report, max_width=1)
        assert report.batched_cells == 0


@pytest.mark.parametrize(
    "name",
    ["attribute", "buffer_copy_", "cache_object", "siblings", "rmt_like", "growing_cache", "taper"]
    + ["global_memory", "two_back", "one_segment", "counters", "returned_tuple_none"],
)
def test_explain_says_the_same_without_running_anything(name: str) -> None:
    model, inputs = ZOO[name]()
    before = snapshot(model)
    report = diagpass.explain(model, *inputs)
    assert_state_same(model, before, where="explain changed")
    check_expected(name, report)
    check_schedule(report)


@pytest.mark.parametrize("name", ["attribute", "siblings", "ragged_tail", "hybrid", "stateless"])
@pytest.mark.parametrize("width", [2, 3])
def test_a_width_cap_is_kept(name: str, width: int) -> None:
    model, inputs = ZOO[name]()
    report = assert_same(model, inputs, {"max_width": width})
    check_schedule(report, max_width=width)


@pytest.mark.parametrize("name", ["siblings", "block_lists", "two_stacks", "attribute"])
def test_cells_can_be_named(name: str) -> None:
    model, inputs = ZOO[name]()
    glob = {
        "siblings": "attns.*",
        "block_lists": "layers.*.0",
        "two_stacks": "decoder.*",
        "attribute": "layers.*",
    }[name]
    report = assert_same(model, inputs, {"cells": glob})
    check_schedule(report)
    prefix = glob.split("*")[0]
    assert all(cell["path"].startswith(prefix) for cell in report.to_dict()["grid"])


@pytest.mark.parametrize("name", ["attribute", "buffer_copy_", "embeddings", "hybrid"])
def test_inductor_gives_the_same_results(name: str) -> None:
    model, inputs = ZOO[name]()
    report = assert_same(model, inputs, {"compiler": "inductor"}, rtol=1e-10)
    assert report.batched_cells > 0


def test_the_default_schedule_runs_the_wavefront_where_there_is_one() -> None:
    model, inputs = ZOO["attribute"]()
    assert_same(model, inputs, {"schedule": "auto"})


def test_the_sequential_schedule_can_be_forced() -> None:
    model, inputs = ZOO["attribute"]()
    report = assert_same(model, inputs, {"schedule": "sequential"}, ran="sequential")
    assert report.batched_cells == 0
    assert report.verdict == "wavefront"  # what the dataflow permits is another question


@pytest.mark.parametrize("name", ["global_memory", "reads_upper_state", "shared_buffer"])
def test_a_chain_that_keeps_width_names_its_edge(name: str) -> None:
    model, inputs = ZOO[name]()
    chain = diagpass.explain(model, *inputs).chain
    assert chain is not None
    assert chain.target.segment > chain.source.segment
    text = str(chain)
    for end in (chain.source, chain.target):
        assert end.path in text
        assert str(end.segment) in text
    lower = {"global_memory": 1, "reads_upper_state": None, "shared_buffer": 1}[name]
    if lower is not None:
        assert chain.source.path == f"layers.{lower}"
        assert chain.target.path == "layers.0"


def test_strict_accepts_what_can_be_batched() -> None:
    model, inputs = ZOO["attribute"]()
    fast = diagpass.transform(model, strict=True, options=forced())
    fast(*inputs)
    assert fast.report.ran == "wavefront"


@pytest.mark.parametrize("name", ["attribute", "buffer_add_", "first_segment_flag", "tied_linears"])
def test_verify_passes_on_right_programs(name: str) -> None:
    model, inputs = ZOO[name]()
    assert_same(model, inputs, {"verify": True})


class Scaled(nn.Module):
    """A layer without state that multiplies by a number of its own, and adds another so many times."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear, self.index = nn.Linear(6, 6), index

    def forward(self, h: Tensor) -> Tensor:
        h = h * (1.0 + 0.1 * self.index)
        return h + torch.add(h, self.linear(h).tanh(), alpha=0.5 + self.index)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_one_layer_at_several_segments_shares_its_number(compiler: str) -> None:
    """Each group is one layer at all segments: the number differs within the kind, not within a group."""
    model = Loop([Scaled(i) for i in range(3)]).double().eval()
    report = assert_same(model, (tokens(4),), {"compiler": compiler}, rtol=1e-11)
    assert (report.cells, report.waves, report.batched_cells, len(report.kinds)) == (12, 3, 12, 1), str(
        report
    )


def test_many_transformed_models_of_one_class() -> None:
    """Twelve models share one code object, more than Dynamo's recompile limit."""
    for _ in range(12):
        model, inputs = ZOO["attribute"]()
        report = assert_same(model, inputs)
        assert report.batched_cells > 0
