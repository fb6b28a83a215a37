"""The report: what its text says (golden), its JSON against the schema, its figures against a run."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import diagpass
from diagpass.describe.figures import ranges, size
from diagpass.describe.text import as_html, sections
from diagpass.machine import Machine
from diagpass.report import schema
from examples import armt, rmt
from tests.helpers import forced, run_sequential
from tests.models import ZOO


def explain(model: nn.Module, inputs: tuple[Any, ...]) -> diagpass.Report:
    report = diagpass.explain(model, *inputs)
    jsonschema.validate(report.to_dict(), schema())
    return report


def assert_says(report: diagpass.Report, golden: str) -> None:
    """The golden lines appear in the text in this order; ``#`` stands for digits, ``...`` for anything."""
    text, start = str(report), 0
    for line in filter(None, (line.strip() for line in golden.splitlines())):
        pattern = re.escape(line).replace(r"\#", r"[\d,.]+").replace(r"\.\.\.", ".*?")
        found = re.compile(pattern).search(text, start)
        assert found, f"{line!r} is not in, or not in this place of:\n{text}"
        start = found.end()


def test_armt_golden() -> None:
    report = explain(*armt.build(layers=3, segments=4))
    assert_says(
        report,
        """
        verdict: wavefront: the cells run in 6 waves instead of 12 steps one after the other
        coverage: 7 of 12 cells batched, 6 waves, mean width 2.00, max width 3
        5 cells run alone: the wave has no other cell to batch them with
        grid: 3 layers x 4 segments, 12 cells
        kinds: 2 kinds
        A: 3 cells, layers 0-2, segment 0; each # operations, # MFLOP, # kB (# kB of weights)
        not of kind B: a branch of the first segment (this kind is it): lacks ... (examples/armt.py:#)
        B: 9 cells, layers 0-2, segments 1-3
        critical path: 6 cells, ...
        from memory_cell.layers.0 at segment 0 to memory_cell.layers.2 at segment 3
        2 steps from the layer below
        3 steps state, from the same layer at the segment before
        blocking: no edge
        memory: stacked weights 555.5 kB (no second copy), state 74.9 kB
        to change: nothing
        """,
    )


def test_rmt_golden() -> None:
    layers = "memory_cell.model.model.layers"
    report = explain(*rmt.build(layers=3, segments=3))
    assert_says(
        report,
        f"""
        verdict: sequential (a chain leaves no width: output of {layers}.2 at segment 0
        feeds {layers}.0 at segment 1
        coverage: 0 of 9 cells batched, 9 waves, mean width 1.00
        critical path: 9 cells
        6 steps from the layer below
        2 steps chain, from 2 layers above at the segment before
        blocking: 2 edges chain, ...; without them 3 waves would do instead of 9
        made by {layers}.2 at segment 0: aten.add in {layers}.2 (...modeling_llama.py:#)
        handed on by glue: aten.slice in memory_cell (examples/rmt.py:#)
        read by {layers}.0 at segment 1: ... in {layers}.0.input_layernorm (...modeling_llama.py:#)
        refused: the whole model runs as it stands [module {layers}.2, ...modeling_llama.py:#]
        to change: let each layer carry its own state to its own next segment
        """,
    )
    assert report.blocking and report.blocking["waves_without"] == 3


def test_hybrid_golden() -> None:
    report = explain(*ZOO["hybrid"]())
    assert_says(
        report,
        """
        verdict: wavefront: the cells run in 7 waves instead of 16 steps
        coverage: 8 of 16 cells batched, 7 waves, mean width 2.29, max width 4
        A: 8 cells, layers 0, 2, segments 0-3
        not of kind B: layers.0 is a AttnLayer, layers.1 a GruLayer;
        this kind has # operations that kind B has not
        first aten.native_layer_norm in layers.0.attn.norm (tests/models.py:#)
        B: 8 cells, layers 1, 3, segments 0-3
        critical path: 7 cells
        to change: nothing
        """,
    )


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if x.sum() > 0:
            x = x + 1
        return x


def stack(*layers: nn.Module) -> nn.Module:
    """``layers`` over two segments, the state of each being added to its next input."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, xs: torch.Tensor) -> torch.Tensor:
            state: list[Any] = [0.0] * len(self.layers)
            for x in xs.unbind():
                for at, layer in enumerate(self.layers):
                    state[at] = x = layer(x + state[at])
            return x

    return Stack().eval()


def test_refused_golden() -> None:
    report = explain(stack(Branch(), Branch()), (torch.randn(3, 2, 4),))
    assert_says(
        report,
        """
        verdict: sequential (the model could not be captured as one graph: ...branching ...
        (...test_report.py:#)
        refused: the whole model runs as it stands [module layers.0, tests/test_report.py:#]
        to change: write that line with tensor operations (torch.where instead of if
        """,
    )


def test_random_numbers_are_refused_with_their_place() -> None:
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)]
    report = explain(stack(*layers).train(), (torch.randn(2, 2, 4),))
    (refusal,) = report.refusals
    assert refusal["module"] == "layers.0.1" and refusal["line"]
    assert report.advice[0].startswith("call model.eval()")


def test_layers_of_another_shape_say_which_weight() -> None:
    class Narrow(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, width), nn.Linear(width, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).tanh())

    report = explain(stack(Narrow(6), Narrow(6), Narrow(8)), (torch.randn(4, 2, 4),))
    differs = report.kinds[0]["differs"]
    assert differs["cause"] == "shape" and differs["place"]["line"].startswith("tests/test_report.py:")
    assert "layers.0.up.weight is 6 x 4 float32, layers.2.up.weight in kind B 8 x 4" in differs["text"]
    assert "batched apart" in report.advice[0]


def step(layers: int = 3) -> tuple[diagpass.SegmentLoop, torch.Tensor, int]:
    """A loop, an input of five segments, and the bytes of its state."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.state = torch.zeros(2, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.state = torch.tanh(self.linear(x) + self.state)
            return self.state

    model = nn.Sequential(*(Layer() for _ in range(layers)))
    return diagpass.SegmentLoop(model, segment_size=2, dim=0), torch.randn(10, 4), layers * 2 * 4 * 4


def test_the_forecast_is_what_a_rolled_run_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    from diagpass.rolled.run import Run

    widest = [0]
    run_wave = Run._wave

    def measured(self: Run, cells: list[Any]) -> None:
        run_wave(self, cells)
        rows = [box._value for cell in cells for box in cell.outputs.values()]
        held = {id(t): t.nbytes for t in (getattr(row, "stacked", row) for row in rows) if t is not None}
        widest[0] = max(widest[0], sum(held.values()))

    loop, x, state = step()
    with torch.no_grad():
        told = explain(loop, (x,))
        monkeypatch.setattr(Run, "_wave", measured)
        fast = diagpass.transform(loop, options=forced())
        fast(x)
    report = fast.report
    jsonschema.validate(report.to_dict(), schema())
    stacks = fast._session.kinds._stacks._held
    assert (told.waves, told.coverage) == (report.waves, report.coverage) and told.coverage[
        "batched_cells"
    ] > 0
    assert told.memory == report.memory
    assert told.memory["weights"] == sum(held.tensor.untyped_storage().nbytes() for held in stacks)
    assert told.memory["state"] == state
    assert told.memory["wave"] == widest[0]


@pytest.mark.parametrize("name", ["attribute", "hybrid"])
def test_the_forecast_is_what_an_unrolled_run_measures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx._lazy_graph_module import _LazyGraphModule

    from diagpass import pipeline

    model, inputs = ZOO[name]()
    told = explain(model, inputs)
    by_wave: dict[str, int] = {}
    stacks: list[Any] = []
    emit, make_stacks = pipeline.emit, pipeline.WeightStacks

    def watched(*args: Any, **kwargs: Any) -> Any:
        emitted = emit(*args, **kwargs)
        calls = [node for node in emitted.module.graph.nodes if node.op == "call_module"]
        order = iter(calls * 9)

        def count(module: Any, args: Any, results: Any) -> None:
            wave = str(next(order).name).split("_")[0]
            by_wave[wave] = by_wave.get(wave, 0) + sum(result.nbytes for result in results)

        for _, child in emitted.module.named_children():
            _LazyGraphModule.force_recompile(child)  # else its first call is two
            child.register_forward_hook(count)
        return emitted

    def kept(*args: Any, **kwargs: Any) -> Any:
        stacks.append(make_stacks(*args, **kwargs))
        return stacks[-1]

    monkeypatch.setattr(pipeline, "emit", watched)
    monkeypatch.setattr(pipeline, "WeightStacks", kept)
    fast = diagpass.transform(model, options=forced())
    run_sequential(fast, inputs)
    report = fast.report
    jsonschema.validate(report.to_dict(), schema())
    assert (told.waves, told.coverage, told.memory) == (report.waves, report.coverage, report.memory)
    assert told.coverage["batched_cells"] == report.batched_cells > 0
    held = sum(stack.tensor.untyped_storage().nbytes() for stack in stacks[-1]._held)
    assert told.memory["weights"] == held
    assert told.memory["wave"] == max(by_wave.values())
    if name != "hybrid":  # there some state is no tensor on the model
        state = sum(layer.state.nbytes for layer in model.layers)
        assert told.memory["state"] == state


def test_all_forms_have_the_same_content() -> None:
    rich = pytest.importorskip("rich.console")
    report = explain(*ZOO["rmt_like"]())
    console = rich.Console(width=500, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert [line.rstrip() for line in console.export_text().rstrip().splitlines()] == str(report).splitlines()
    page = as_html(report)
    assert page == report._repr_html_()
    for title, lines in sections(report):
        assert f">{title}<" in page
        assert lines[0].replace("'", "&#x27;").replace("<", "&lt;") in page
    assert report.timed(sequential=0.5).to_dict()["times"] == {"sequential": 0.5}
    assert "sequential 500.00 ms, " in str(report.timed(sequential=0.5))


def test_the_estimate_counts_starts_once_a_group() -> None:
    loop, x, _ = step(layers=2)
    with torch.no_grad():
        report = explain(loop, (x,))
    (kind,) = report.kinds
    assert (kind["products"][0]["count"], kind["chains"]) == (1, 1)  # a product; its sum with the state, tanh
    starts = report.estimate(Machine("", {"float32": 1e30}, 1e30, start_seconds=1.0))
    assert starts["sequential"] == pytest.approx(10 * 2)
    assert starts["wavefront"] == pytest.approx(report.waves * 2)
    work = report.estimate(Machine("", {"float32": 1.0}, 1e30))
    assert work["sequential"] == pytest.approx(work["wavefront"]) == 10 * kind["flops"] == 10 * 2 * 2 * 4 * 4


def test_a_model_on_the_meta_device_is_explained_as_one_with_weights() -> None:
    """So a model that does not fit can be asked about."""
    loop, x, _ = step()
    with torch.no_grad():
        told = explain(loop, (x,))
        loop = loop.to("meta")
        for layer in loop.step:  # type: ignore[union-attr]
            layer.state = layer.state.to("meta")
        found = explain(loop, (x.to("meta"),))
    took = {"planning_seconds": 0.0}
    assert {**found.to_dict(), **took} == {**told.to_dict(), **took}


def test_words() -> None:
    assert ranges([0, 1, 2, 5]) == "0-2, 5"
    assert (size(12), size(1500), size(2e9)) == ("12 B", "1.5 kB", "2.0 GB")


class ChainStep(nn.Module):
    """The last layer's result is added to the first layer's next input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.memory = torch.zeros(2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.memory
        for layer in self.layers:
            x = layer(x)
        self.memory = x * 0.5
        return x


def test_a_chain_of_a_step_is_named_with_both_ends() -> None:
    loop = diagpass.SegmentLoop(ChainStep().eval(), segment_size=2, dim=0)
    with torch.no_grad():
        report = explain(loop, (torch.randn(10, 4),))
    assert report.verdict == "sequential" and report.coverage["batched_cells"] == 0
    block = report.blocking
    assert block and (block["count"], block["waves"], block["waves_without"]) == (4, 15, 3)
    assert block["source"]["path"] == "layers.2" and block["target"]["path"] == "layers.0"
    for end in ("source", "target"):
        assert block[end]["operation"] and block[end]["line"].startswith("tests/test_report.py:")
    assert_says(
        report,
        """
        verdict: sequential (a chain leaves no width: output of layers.2 at segment 0
        feeds layers.0 at segment 1
        blocking: 4 edges chain
        made by layers.2 at segment 0
        read by layers.0 at segment 1
        to change: let each layer carry its own state
        """,
    )
