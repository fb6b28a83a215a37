"""ARMT over stock Hugging Face models: the main job, at the size that the issue names."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from examples import armt
from tests.helpers import (
    assert_bitwise,
    assert_closer,
    assert_same,
    assert_state_same,
    assert_tree_same,
    check_schedule,
    check_true_dependencies,
    count_matmuls,
    distance,
    forced,
    no_diagpass_warnings,
    profile_matmuls,
    run_sequential,
    state_of,
)
from tests.test_repeat import run_python

BASES = ("llama", "gpt2")
#: 4 layers x 6 segments; t(s, l) = s + l, so 6 + 4 - 1 waves
SIZE: dict[str, Any] = {"layers": 4, "segments": 6, "batch": 2}
SMALL: dict[str, Any] = {"layers": 3, "segments": 4, "batch": 2, "d_model": 32, "heads": 2}


def memory_of(model: nn.Module) -> dict[str, Tensor]:
    """Every layer's memory: path -> tensor."""
    return {
        path: leaf
        for path, leaf in state_of(model).items()
        if isinstance(leaf, Tensor) and path.endswith((".W_mem", ".z"))
    }


#: the least that has ramps and a steady state, for what does not depend on the size
TINY: dict[str, Any] = {**SMALL, "layers": 2, "segments": 3}


def check_waves_and_kinds(model: nn.Module, inputs: tuple[Tensor, ...], report: diagpass.Report) -> None:
    """What SIZE must give, and that no dependency found by experiment is missing."""
    assert (report.layers, report.segments) == (4, 6)
    assert (report.cells, report.waves, report.max_width) == (24, 9, 4)
    assert len(report.kinds) <= 3, str(report)
    assert report.verdict == "wavefront"
    assert report.chain is None
    check_schedule(report)
    assert check_true_dependencies(model, inputs, report)


@pytest.mark.parametrize("base", BASES)
def test_explain(base: str) -> None:
    model, inputs = armt.build(base=base, **TINY, dtype=torch.float64)
    report = diagpass.explain(model, *inputs)
    assert (report.cells, report.waves, report.max_width, report.ran) == (6, 4, 2, None)
    check_schedule(report)


@pytest.mark.parametrize("base", BASES)
def test_unbatched_is_bitwise_equal(base: str) -> None:
    model, inputs = armt.build(base=base, **SIZE, dtype=torch.float64)
    assert_bitwise(model, inputs)


@pytest.mark.parametrize("base", BASES)
def test_waves_and_kinds_and_batched_float64_within_rounding(base: str) -> None:
    """Logits, every output entry and every layer's memory, within 1e-12 relative.

    A stock Llama norm computes in float32 and would turn a difference of 1e-16 into one of 1e-8, so
    for Llama this says that batched products are bitwise those of the single ones, or all but.
    """
    model, inputs = armt.build(base=base, **SIZE, dtype=torch.float64)
    report = assert_same(model, inputs, rtol=1e-12)
    assert report.batched_cells >= 24 - 6
    assert memory_of(model)
    check_waves_and_kinds(model, inputs, report)


@pytest.mark.parametrize("base", BASES)
def test_float32_through_inductor(base: str) -> None:
    model, inputs = armt.build(base=base, **SIZE, dtype=torch.float32)
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced(compiler="inductor"))
    for call in range(2):
        expected, got = run_sequential(plain, inputs), run_sequential(fast, inputs)
        assert_tree_same(got, expected, 1e-5, f"call {call}")
        assert_state_same(fast.original, plain, 1e-5)
    assert fast.report.ran == "wavefront"
    assert fast.report.batched_cells >= 24 - 6


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("base", BASES)
def test_bfloat16_is_as_close_to_float64_as_the_sequential_run(base: str, compiler: str) -> None:
    if compiler == "inductor" and base == "gpt2":
        pytest.skip("one base is enough for the compiled form")
    size = SIZE if compiler == "eager" else SMALL
    model, inputs = armt.build(base=base, **size, dtype=torch.bfloat16)
    exact = copy.deepcopy(model)
    for parameter in exact.parameters():
        parameter.data = parameter.data.double()
    exact.memory_cell.zero_mem()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced(compiler=compiler))
    reference = run_sequential(exact, inputs)
    competitor, candidate = run_sequential(plain, inputs), run_sequential(fast, inputs)
    assert fast.report.batched_cells >= fast.report.cells - 6
    assert distance(competitor["logits"], reference["logits"]) > 1e-4  # there is something to judge
    assert_closer(dict(reference), dict(candidate), dict(competitor), factor=1.5)
    assert_closer(memory_of(exact), memory_of(fast.original), memory_of(plain), factor=1.5)


@pytest.mark.parametrize("base", BASES)
def test_outputs_keep_their_type_and_keys(base: str) -> None:
    model, inputs = armt.build(base=base, **TINY, dtype=torch.float64)
    fast = diagpass.transform(copy.deepcopy(model), options=forced())
    labels = inputs[0].roll(1, dims=1)
    for kwargs in ({}, {"labels": labels}, {"labels": labels, "output_hidden_states": True}):
        expected = run_sequential(model, inputs, **kwargs)
        got = run_sequential(fast, inputs, **kwargs)
        assert type(got) is type(expected)
        assert list(got.keys()) == list(expected.keys())
        assert_tree_same(dict(got), dict(expected), 1e-12, str(list(kwargs)))
        assert got.logits is got["logits"]


def test_attention_mask_and_ragged_tail() -> None:
    model, (ids,) = armt.build(base="llama", **SMALL, dtype=torch.float64)
    ids = ids[:, :-5]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    assert_same(model, (ids,), kwargs={"attention_mask": mask})


def test_memory_carries_over_between_calls() -> None:
    """zero_mem=False: the second call starts from what the first left."""
    model, inputs = armt.build(base="llama", **TINY, dtype=torch.float64)
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced())
    for zero in (True, False, False):
        expected = run_sequential(plain, inputs, zero_mem=zero)
        got = run_sequential(fast, inputs, zero_mem=zero)
        assert_tree_same(dict(got), dict(expected), 1e-11, f"zero_mem={zero}")
        assert_state_same(fast.original, plain, 1e-11)


def test_generate_after_transform_reads_the_memory() -> None:
    """The wrapper's other methods run the plain modules, on the state the wavefront left."""
    model, inputs = armt.build(base="llama", **TINY, dtype=torch.float64)
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced())
    run_sequential(plain, inputs)
    run_sequential(fast, inputs)
    settings = {"max_new_tokens": 3, "do_sample": False}
    prompt = inputs[0][:, :8]
    expected = plain.memory_cell.generate(prompt, **settings)
    assert torch.equal(fast.memory_cell.generate(prompt, **settings), expected)


@pytest.mark.parametrize("options", [{"use_denom": False}, {"gating": True}, {"n_heads": 2}])
def test_variants_of_the_memory(options: dict[str, Any]) -> None:
    model, inputs = armt.build(base="llama", **TINY, dtype=torch.float64, **options)
    report = assert_same(model, inputs)
    assert report.waves == 3 + 2 - 1


# -------------------------------------------------------------------------- really batched


def _products(report: diagpass.Report, each: float) -> float:
    """Products that the report's schedule predicts to be saved, at `each` products a cell."""
    groups = [len(group["cells"]) for wave in report.to_dict()["schedule"] for group in wave]
    return each * sum(size - 1 for size in groups if size > 1)


def test_cells_are_really_batched_by_count_of_matrix_products() -> None:
    """6 layers x 12 segments: at most 0.45 of the products, and as the report says."""
    size = {**SMALL, "segments": 12, "batch": 1}
    model, inputs = armt.build(base="llama", **{**size, "layers": 6})
    smaller, _ = armt.build(base="llama", **{**size, "layers": 5})
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced())
    run_sequential(fast, inputs)
    sequential = count_matmuls(lambda: plain(*inputs))
    diagonal = count_matmuls(lambda: fast(*inputs))
    assert sequential > 6 * 12 * 7  # q, k, v, o, gate, up, down at the least
    assert diagonal <= 0.45 * sequential, f"{diagonal} of {sequential} products"
    report = fast.report
    assert report.waves == 17
    groups = [len(group["cells"]) for wave in report.to_dict()["schedule"] for group in wave]
    assert report.batched_cells == sum(size for size in groups if size > 1)
    each = (sequential - count_matmuls(lambda: smaller(*inputs))) / 12
    saved = _products(report, each)
    assert abs((sequential - diagonal) - saved) <= 0.15 * saved, (sequential, diagonal, saved)


def test_the_profiler_agrees_with_the_dispatch_mode() -> None:
    """The dispatch mode must not be what makes the model run otherwise."""
    model, inputs = armt.build(base="llama", **SMALL)
    fast = diagpass.transform(model, options=forced())
    run_sequential(fast, inputs)
    counted = count_matmuls(lambda: fast(*inputs))
    assert fast.report.captures == fast.report.plans == 1
    profiled = profile_matmuls(lambda: fast(*inputs))
    assert abs(counted - profiled) <= 0.1 * counted


BACKEND = """
import sys, torch
from examples import armt
assert not any(name.split(".")[0] == "diagpass" for name in sys.modules)
torch.set_num_threads(1)
layers, segments = map(int, sys.argv[2:])
size = dict(base=sys.argv[1], layers=layers, segments=segments, batch=1, d_model=32, heads=2)
model, inputs = armt.build(**size, dtype=torch.float64)
plain, _ = armt.build(**size, dtype=torch.float64)
options = {"compiler": "eager", "schedule": "wavefront"}
fast = torch.compile(model, backend="diagonal", options=options)
products = []
with torch.no_grad():
    for _ in range(2):
        expected, got = plain(*inputs), fast(*inputs)
        assert list(got.keys()) == list(expected.keys()), list(got.keys())
        for key in expected:
            off = (got[key] - expected[key]).abs().max() / expected[key].abs().max()
            assert off <= 1e-12, (key, off)
    for a, b in zip(model.memory_cell.layers, plain.memory_cell.layers):
        assert (a.W_mem - b.W_mem).abs().max() <= 1e-12 * b.W_mem.abs().max()
        assert (a.seg_num, a.first_seg) == (b.seg_num, b.first_seg)
    for run in (plain, fast):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(*inputs)
        names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
        products.append(sum(event.name in names for event in profile.events()))
assert "diagpass" in sys.modules
print("products", *products)
"""


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_torch_compile_without_importing_diagpass(base: str) -> None:
    """Results, and that cells are really batched: matrix products of 6 layers x 12 segments."""
    out = run_python(BACKEND, base, "6", "12")
    sequential, diagonal = map(int, out.split("products")[1].split())
    assert sequential > 6 * 12 * 4
    assert diagonal <= 0.45 * sequential, f"{diagonal} of {sequential} products"


COLD = """
import resource, sys, time, torch
import diagpass
from examples import armt
torch.set_num_threads(2)

def cpu():
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)

model, inputs = armt.build(base="llama", layers=4, segments=4)
begin, used = time.perf_counter(), cpu()
with torch.no_grad():
    fast = diagpass.transform(model, options={"compiler": sys.argv[1]})
    fast(*inputs)
print("seconds", time.perf_counter() - begin, cpu() - used, fast.report.ran)
"""


@pytest.mark.alone
@pytest.mark.parametrize("compiler, seconds", [("eager", 15.0), ("inductor", 60.0)])
def test_cold_start(compiler: str, seconds: float, tmp_path: Any) -> None:
    """transform and the first call, with empty caches, 4 layers x 4 segments.

    The limit is one of wall time on an idle machine. Where other tests share the cores, time spent
    computing is what the wall time would at most have been. One run on a machine that others share may
    be slow by a third: where the first is beyond the limit, the median of three has to be within it.
    """
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "2"}
    taken: list[float] = []
    while len(taken) < 3 and max(taken, default=seconds + 1) > seconds:
        cache = tmp_path / str(len(taken))
        cache.mkdir()
        out = run_python(COLD, compiler, TORCHINDUCTOR_CACHE_DIR=str(cache), **env)
        wall, computing, ran = out.split("seconds")[1].split()
        assert ran == "wavefront"
        taken.append(min(float(wall), float(computing)))
    assert statistics.median(taken) <= seconds, f"{taken} s"


def test_the_default_options_warn_of_nothing() -> None:
    model, inputs = armt.build(base="llama", **TINY)
    with no_diagpass_warnings():
        fast = diagpass.transform(model, options={"compiler": "eager"})
        run_sequential(fast, inputs)
    assert fast.report.ran == "wavefront"
