"""The form that a group runs in: measured once, kept, shown; whichever it is, the results are the same."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor, nn

import diagpass
from diagpass import SegmentLoop
from diagpass.kernels import choose as choose_module
from diagpass.kernels.choose import CLEARLY, choose
from diagpass.lowering.products import products, with_loops
from diagpass.options import Options
from diagpass.report import schema
from diagpass.rolled import run as run_module
from diagpass.rolled.waves import Direct, Replayed
from diagpass.runtime.forms import is_measured
from tests import rolled_models as models
from tests import tape
from tests.helpers import assert_same, assert_tree_same, fast_copy
from tests.models import ZOO
from tests.rolled_models import B, D, L, T

CPU = torch.device("cpu")
FORMS = ("batched", "looped", "single")


class Timer:
    """Says how long a candidate takes, by its name, and counts how often it was asked."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.asked: list[str] = []

    def __call__(self, name: str, run: Callable[[], Any], device: torch.device) -> float:
        self.asked.append(name)
        return self.times.get(name, 1.0)


@pytest.fixture(autouse=True)
def timer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Timer]:
    """A made-up clock, and nothing chosen before."""
    made = Timer()
    monkeypatch.setattr(choose_module, "_made", {})
    monkeypatch.setattr(choose_module, "seconds", made)
    yield made


# ------------------------------------------------------------------------------------- the choice


def ways(log: list[str]) -> dict[str, Callable[[], Any]]:
    """Three candidates that say when they run."""
    return {name: lambda name=name: log.append(name) for name in ("a", "b", "c")}


def test_the_fastest_is_taken_and_stays(timer: Timer) -> None:
    log: list[str] = []
    timer.times = {"a": 3.0, "b": 1.0, "c": 2.0}
    first = choose("key", ways(log), CPU, "what", 0.0)
    assert first.name == "b" and dict(first.seconds) == timer.times
    assert log == ["a", "b", "c"], "each runs once before it is timed"
    asked = len(timer.asked)
    timer.times = {"a": 0.1}
    assert choose("key", ways(log), CPU, "what", 0.0) is first
    assert len(timer.asked) == asked and len(log) == 3, "nothing runs or is timed a second time"
    assert choose("other", ways(log), CPU, "what", 0.0).name == "a"


def test_the_first_is_preferred_unless_another_is_clearly_faster(timer: Timer) -> None:
    timer.times = {"b": CLEARLY + 0.001}
    assert choose("key", ways([]), CPU, "what", 0.0).name == "a"
    timer.times = {"b": CLEARLY - 0.001}
    assert choose("other", ways([]), CPU, "what", 0.0).name == "b"


@pytest.mark.parametrize(
    "budget, longest, rounds", [(1e9, 1, "MOST"), (1e-9, 1e18, "LEAST"), (1e-9, 1, None)]
)
def test_candidates_take_turns_and_the_rounds_are_bounded(
    budget: float, longest: float, rounds: str | None, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose_module, "LONGEST", longest)
    choose("key", ways([]), CPU, "what", budget)
    assert timer.asked == ["a", "b", "c"] * (getattr(choose_module, rounds) if rounds else 1)


def test_one_candidate_is_not_timed(timer: Timer) -> None:
    log: list[str] = []
    assert choose("key", {"a": lambda: log.append("a")}, CPU, "what", 0.0).name == "a"
    assert not log and not timer.asked


def test_another_number_of_threads_is_another_question(timer: Timer) -> None:
    timer.times = {"b": 0.5}
    assert choose("key", ways([]), CPU, "what", 0.0).name == "b"
    timer.times = {"c": 0.5}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert choose("key", ways([]), CPU, "what", 0.0).name == "c"
    finally:
        torch.set_num_threads(threads)
    assert choose("key", ways([]), CPU, "what", 0.0).name == "b"


def test_the_clock_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert choose_module.seconds("a", lambda: sum(range(10_000)), CPU) > 0


def test_only_compiled_forms_on_the_cpu_are_measured_by_default() -> None:
    cuda = torch.device("cuda")
    assert is_measured(Options(), CPU) and not is_measured(Options(), cuda)
    assert not is_measured(Options(compiler="eager"), CPU)
    assert is_measured(Options(form="measured"), cuda)
    assert is_measured(Options(form="measured", compiler="eager"), CPU)
    assert not any(is_measured(Options(form=form), CPU) for form in FORMS)


# ---------------------------------------------------------------------------------- single products


def test_products_one_by_one_compute_the_same() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def form(bias: Tensor, x: Tensor, w: Tensor, row: Tensor) -> Tensor:
        hidden = torch.baddbmm(bias, x, w.mT, beta=0.5, alpha=2.0)
        return torch.bmm(torch.baddbmm(row, hidden, w), w.mT)

    operands = [
        torch.randn(3, 4, 5, dtype=torch.float64),
        torch.randn(3, 4, 6, dtype=torch.float64),
        torch.randn(6, 5, 6, dtype=torch.float64)[::2],
        torch.randn(1, 1, 6, dtype=torch.float64),
    ]
    traced = make_fx(form)(*operands)
    found = products(traced)
    assert [each.rows for each in found] == [3, 3, 3]
    for wanted in itertools.chain.from_iterable(itertools.combinations(found, n) for n in (0, 1, 3)):
        looped = with_loops(traced, [each.node for each in wanted])
        left = len(products(looped))
        assert left == 3 - len(wanted) and (looped is traced) == (not wanted)
        torch.testing.assert_close(looped(*operands), form(*operands), rtol=1e-13, atol=1e-13)
    for each in found:
        for run in each.ways().values():
            run()


# -------------------------------------------------------------------------------- the same results


class ScaledLayer(nn.Module):
    """A number of its own in each layer, which is an operand of the batched form."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.mix, self.scale = nn.Linear(D, D), scale
        self.register_buffer("m", torch.zeros(B, D), persistent=False)
        self.m: Tensor

    def reset(self) -> None:
        """Zero memory."""
        self.m = torch.zeros_like(self.m)

    def forward(self, h: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        h = self.mix(h).tanh() * self.scale + self.m.unsqueeze(1)
        self.m = self.m + h.mean(1)
        return h


def scaled() -> SegmentLoop:
    """A loop whose layers differ by a number."""
    step = models.Step([ScaledLayer(0.5 + at) for at in range(L)])
    return models.keeps(step).double().eval()


def build(name: str) -> SegmentLoop:
    """A loop by name."""
    return scaled() if name == "scaled" else models.build(name)


def check(loop: SegmentLoop, fast: Any, name: str, rtol: float) -> None:
    """Two calls of each; outputs and state agree."""
    states: list[Any] = [None, None]
    for seed in range(2):
        x = models.inputs("rnn_stack" if name == "scaled" else name, 7 * T, seed=seed)
        tape.check(loop, fast, x, states, rtol)


def ran(report: Any) -> set[tuple[str, bool]]:
    """The forms that groups ran in, and whether products ran one by one."""
    assert report.forms
    return {(fact["form"], fact["looped"] > 0) for fact in report.forms}


WINNERS: dict[str, tuple[dict[str, float], tuple[str, bool]]] = {
    "batched": ({}, ("batched", False)),
    "looped": ({"looped": 0.5}, ("batched", True)),
    "single": ({"single": 0.5}, ("single", False)),
}


ROLLED = [
    *itertools.product(("gru", "scaled"), WINNERS),
    ("mamba", "single"),
    ("transformer_xl", "looped"),
]


@pytest.mark.parametrize("name, winner", ROLLED)
def test_whichever_form_wins_a_rolled_run_is_the_same(name: str, winner: str, timer: Timer) -> None:
    timer.times, expected = WINNERS[winner]
    loop = build(name)
    fast: Any = fast_copy(loop, form="measured")
    check(loop, fast, name, 1e-10)
    report = fast.report
    assert expected in ran(report)
    jsonschema.validate(report.to_dict(), schema())
    assert "forms: how groups of cells ran" in str(report) and "(measured: batched" in str(report)


@pytest.mark.parametrize("winner", WINNERS)
def test_whichever_form_wins_an_unrolled_run_is_the_same(winner: str, timer: Timer) -> None:
    timer.times, expected = WINNERS[winner]
    model, inputs = ZOO["attribute"]()
    report = assert_same(model, inputs, {"form": "measured"}, rtol=1e-10)
    assert expected in ran(report)
    jsonschema.validate(report.to_dict(), schema())


@pytest.mark.parametrize("winner", ["looped", "single"])
def test_compiled_forms_are_the_same(winner: str, timer: Timer) -> None:
    timer.times, expected = WINNERS[winner]
    loop = build("rnn_stack")
    fast: Any = fast_copy(loop, compiler="inductor", form="auto")
    check(loop, fast, "rnn_stack", 1e-10)
    assert expected in ran(fast.report)


def test_a_single_cell_is_not_compiled_where_its_products_are_hopeless(timer: Timer) -> None:
    timer.times = {"looped": 2.0, "single": 0.5}
    fast: Any = fast_copy(build("rnn_stack"), form="measured")
    with torch.no_grad():
        fast(models.inputs("rnn_stack", 5 * T))
    assert ran(fast.report) == {("batched", False)}
    assert all(not fact["seconds"] for fact in fast.report.forms) and "single" not in timer.asked


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["gru", "scaled"])
def test_a_pinned_form_runs_and_is_not_timed(name: str, form: str, timer: Timer) -> None:
    loop = build(name)
    fast: Any = fast_copy(loop, form=form)
    check(loop, fast, name, 1e-10)
    assert not timer.asked
    assert {fact["form"] for fact in fast.report.forms} == (set() if form == "batched" else {form})


@pytest.mark.parametrize("winner", WINNERS)
@pytest.mark.parametrize("name", ["gru", "scaled"])
def test_forms_that_write_their_results_are_the_same(
    name: str, winner: str, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runner(kinds: Any, max_width: int | None) -> Any:
        if max_width == 1:
            return Direct(kinds)
        if kinds.runner is None:
            kinds.runner = Replayed(kinds, tape.Tape())  # type: ignore[arg-type]
        return kinds.runner

    monkeypatch.setattr(run_module, "runner", runner)
    timer.times, expected = WINNERS[winner]
    loop = build(name)
    fast: Any = fast_copy(loop, form="measured")
    check(loop, fast, name, 1e-10)
    replays = fast._session.kinds.runner.replays
    assert expected in ran(fast.report) and replays.recorded + replays.replayed > 0


# ------------------------------------------------------------------------------------ made once


def test_a_choice_outlives_the_plan(timer: Timer) -> None:
    """The same kinds at the same shapes get the form that was chosen first, and the same bits."""
    timer.times = {"single": 0.5}
    loop, x = build("rnn_stack"), models.inputs("rnn_stack", 7 * T)
    fast: Any = diagpass.transform(copy.deepcopy(loop), options={"compiler": "eager", "form": "measured"})
    with torch.no_grad():
        first = fast(x)
        asked, told = len(timer.asked), fast.report.forms
        timer.times = {"batched": 0.5}
        again = fast(x)
        other: Any = diagpass.transform(
            copy.deepcopy(loop), options={"compiler": "eager", "form": "measured"}
        )
        anew = other(x)
    assert len(timer.asked) == asked > 0
    assert told == fast.report.forms == other.report.forms
    for result in (again, anew):
        assert_tree_same(result, first, 0.0, "output")


def test_nothing_is_timed_without_a_compiler_or_a_run(timer: Timer) -> None:
    loop, x = build("rnn_stack"), models.inputs("rnn_stack", 7 * T)
    with torch.no_grad():
        fast: Any = fast_copy(loop)
        fast(x)
    assert fast.report.forms == [] and "forms:" not in str(fast.report)
    report = diagpass.explain(loop, x)
    assert report.forms == [] and not timer.asked
