"""The cost model: its parts, the machine's figures, and estimates against what GPUs measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import make_fx

import diagpass
from benchmarks.estimates import compare, report_of
from diagpass.calibration import measure_machine
from diagpass.describe.estimate import estimate, utilisation
from diagpass.describe.work import NO_WORK, total_work, work_of
from diagpass.machine import Machine
from tests import rolled_models

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def nodes_of(function: Any, *operands: torch.Tensor) -> fx.Graph:
    return make_fx(function, tracing_mode="fake")(*operands).graph


def test_products_and_chains_are_counted() -> None:
    """Two products; the elementwise work before, between and after them is a chain each."""

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        x = x * 2 + 1
        y = torch.mm(x, a).relu()
        return torch.mm(y * y.sum(1, keepdim=True), b) + x

    work = work_of(nodes_of(function, torch.ones(6, 4), torch.ones(4, 8), torch.ones(8, 4)).nodes)
    assert work["chains"] == 3
    first, second = work["products"]
    assert (first["m"], first["n"], first["flops"]) == (6, 8, 2 * 6 * 4 * 8)
    assert first["bytes"] == 4 * (6 * 4 + 4 * 8 + 6 * 8) and second["dtype"] == "float32"
    # before: reads x, writes x; between: reads and writes 6 x 8; after: reads two of 6 x 4, writes one
    assert work["moved"] == 4 * (2 * 24 + 2 * 48 + 3 * 24)
    twice = total_work([(work, 2), (NO_WORK, 5)])
    assert twice["moved"] == 2 * work["moved"] and [each["count"] for each in twice["products"]] == [2, 2]


def test_a_residual_is_read_and_not_merged_around_a_product() -> None:
    def function(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        x = x.tanh()
        return torch.mm(x, a) + x

    assert work_of(nodes_of(function, torch.ones(4, 4), torch.ones(4, 4)).nodes)["chains"] == 2


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_a_product_and_causal_attention_half_of_one(causal: bool) -> None:
    def function(q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)

    work = work_of(nodes_of(function, torch.ones(2, 3, 8, 4)).nodes)
    (product,) = work["products"]
    assert product["flops"] == 2 * (2 * 2 * 3 * 8 * 8 * 4) // (2 if causal else 1)
    assert (product["batch"], product["m"], work["chains"]) == (6, 8, 0)


def test_a_batch_of_products_fills_a_machine_that_one_leaves_idle() -> None:
    assert utilisation(1, 64, 64, 0) == 1.0
    alone, eight, many = (utilisation(count, 256, 256, 132) for count in (1, 8, 264))
    assert alone < 0.2 and 4 * alone < eight <= many <= 1.0 and many > 0.9
    assert utilisation(1, 8192, 8192, 132) == 1.0


def test_unbatched_kinds_gain_nothing_and_the_host_may_be_the_limit() -> None:
    product = {"dtype": "float32", "batch": 1, "m": 8, "n": 8, "flops": 100, "bytes": 10, "count": 1}
    kind = {"index": 0, "unbatchable": None, "products": [product], "chains": 1, "moved": 10}
    schedule = [[{"kind": 0, "cells": [0, 1]}], [{"kind": 0, "cells": [2, 3]}]]
    machine = Machine("m", {"float32": 100.0}, 10.0, start_seconds=0.5)
    found = estimate([kind], schedule, NO_WORK, 4, machine)
    assert found == {"sequential": 12.0, "wavefront": 10.0, "device": 10.0, "host": 0.0}
    lonely = estimate([{**kind, "unbatchable": "why"}], schedule, NO_WORK, 4, machine)
    assert lonely["wavefront"] == 12.0
    assert estimate([kind], schedule, NO_WORK, 40, machine)["device"] == 100.0  # the first of more like them
    slow = dataclasses.replace(machine, cell_seconds=5.0, call_seconds=1.0)
    assert estimate([kind], schedule, kind, 4, slow)["wavefront"] == 21.0
    with pytest.raises(
        diagpass.DiagpassError, match="no rate of float32 matrix products for m; it has those"
    ):
        estimate([kind], schedule, NO_WORK, 4, Machine("m", {"bfloat16": 1.0}, 1.0))


def test_the_machine_at_hand_is_measured() -> None:
    machine = measure_machine("cpu")
    assert machine.matmul["float32"] > 1e8 and machine.bytes_per_second > 1e8 and machine.units == 0
    assert 1e-8 < machine.start_seconds < 1e-2 and 0 < machine.cell_seconds < 0.1
    loop, x = rolled_models.build("gru").float(), rolled_models.inputs("gru", 12).float()
    found = diagpass.explain(loop, x).estimate(machine)
    assert 0 < found["device"] <= found["wavefront"] and found["host"] > 0


class Headed(torch.nn.Module):
    """Two layers with state, and a head that belongs to no cell."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.states = [torch.zeros(2, 4) for _ in self.layers]
        self.head = torch.nn.Linear(4, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for at, layer in enumerate(self.layers):
            x = self.states[at] = torch.tanh(layer(x + self.states[at]))
        return self.head(x)


def test_the_glue_of_a_loop_counts_for_every_segment() -> None:
    fast = diagpass.transform(diagpass.SegmentLoop(Headed().eval(), segment_size=2, dim=0))
    with torch.no_grad():
        two, five = (fast.capture(torch.ones(2 * segments, 4)).glue for segments in (2, 5))
    head = 2 * 2 * 4 * 9
    assert [(each["flops"], each["count"]) for each in two["products"]] == [(head, 2)]
    assert [(each["flops"], each["count"]) for each in five["products"]] == [(head, 5)]
    flat = diagpass.explain(*_flat())
    assert flat.glue["chains"] > 0 and flat.glue["moved"] > 0


def _flat() -> tuple[torch.nn.Module, torch.Tensor]:
    from diagpass.cli import sample

    model, (x,) = sample.build(layers=2, segments=2, width=4)
    return torch.nn.Sequential(torch.nn.Tanh(), model), x


@pytest.fixture(scope="module", params=["1B-1024", "160M-1024", "1B-512", "1B-256"])
def recorded(request: pytest.FixtureRequest) -> tuple[diagpass.Report, list[dict[str, Any]]]:
    """A preset's report, and the rows that were measured."""
    preset, segment = request.param.split("-")
    files = [RESULTS / f"{device}-{request.param}.json" for device in ("h100", "h200")]
    rows = [row for file in files for row in json.loads(file.read_text("utf-8"))]
    return report_of(preset, int(segment)), rows


@pytest.mark.parametrize("start", [None, 1e-6, 3e-6])
def test_estimates_are_within_30_percent_where_the_device_is_the_limit(
    recorded: Any, start: float | None
) -> None:
    """All lengths of the best sequential run, and all of the wavefront but, on the H100, short ones of the
    small model.

    There the host is the limit, and was slower than its figures say (docs/derivations.md). What a kernel
    takes to start was measured; on the H100, for segments of 1,024 tokens, the result does not hang on it
    (on the H200 two segments of the large model would be 32 % off with 3 us, where some 1 us was measured).
    """
    report, rows = recorded
    if start is not None:
        rows = [row for row in rows if row["segment"] == 1024 and "H100" in row["device"]]
    for row in rows:
        sides = compare(report, row, start)
        assert abs(sides["sequential"]["error"]) < 0.3, row["case"]
        if row["preset"] == "1B" or row["tokens"] >= 32 * row["segment"] or "H200" in row["device"]:
            assert abs(sides["wavefront"]["error"]) < 0.3, row["case"]
        else:
            assert sides["wavefront"]["error"] < 0, row["case"]
