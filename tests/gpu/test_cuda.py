"""The rolled program on CUDA: right in float32 and bfloat16, replayed, and always the same bits.

The reference is the plain loop in float64 on the CPU; a low-precision wavefront is judged by its distance to
it relative to that of the plain loop in the same precision.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

import diagpass
from diagpass import SegmentLoop
from diagpass.runtime.buffers import Buffers
from diagpass.runtime.graphed import Graphed
from examples import armt, rmt
from tests.helpers import assert_closer, leaves

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SEGMENT = 64


def make(
    dtype: torch.dtype = torch.float32, layers: int = 4, batch: int = 1
) -> tuple[SegmentLoop, torch.Tensor]:
    """An ARMT's memory cell in a loop, on the CPU, and token numbers for nine segments."""
    model, (ids,) = armt.build(
        layers=layers, segments=9, batch=batch, segment_size=SEGMENT, num_mem_tokens=8, dtype=dtype
    )
    return SegmentLoop(model.memory_cell, SEGMENT, reset="zero_mem"), ids


def moved(loop: SegmentLoop) -> SegmentLoop:
    """A copy on the device, its memories too."""
    loop = copy.deepcopy(loop).cuda()
    loop.reset_step()
    return loop


def state(loop: SegmentLoop) -> dict[str, torch.Tensor]:
    """The memories of all layers."""
    cell: Any = loop.step
    return {
        f"{at}.{n}": getattr(layer, n).cpu() for at, layer in enumerate(cell.layers) for n in ("W_mem", "z")
    }


def call(loop: Any, ids: torch.Tensor) -> torch.Tensor:
    """Outputs, on the CPU."""
    with torch.no_grad():
        return loop(ids)["logits"].cpu()


def assert_typically_closer(exact: Any, got: Any, expected: Any, factor: float = 1.5) -> None:
    """Half of the sequences are at most ``factor`` times as far off as half of the plain loop's are.

    The memories of random models amplify rounding: in one of a hundred sequences of the plain loop itself, in
    bfloat16, a difference grows to 10 or 100 times the usual one, in others at each change of a last bit. So
    neither the largest nor the mean difference says anything, the median does.
    """
    triples = zip(leaves(exact), leaves(got), leaves(expected), strict=True)
    for (path, true), (_, ours), (_, theirs) in triples:
        if not isinstance(true, torch.Tensor):
            continue
        far, near = (
            (each.double() - true).flatten(1).square().mean(1).sqrt().median().item()
            for each in (ours, theirs)
        )
        assert torch.isfinite(ours).all(), path
        assert far <= factor * near, f"{path}: {far:.3g} against {near:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_state_are_as_good_as_the_plain_loop(dtype: torch.dtype, monkeypatch: Any) -> None:
    lend = Buffers.lend

    def poisoned(self: Buffers, *args: Any) -> torch.Tensor:
        loan = lend(self, *args)
        return loan.fill_(float("nan")) if loan.is_floating_point() else loan

    monkeypatch.setattr(Buffers, "lend", poisoned)
    batch, judge = (16, assert_typically_closer) if dtype == torch.bfloat16 else (1, assert_closer)
    exact_loop, ids = make(torch.float64, batch=batch)
    loop, _ = make(dtype, batch=batch)
    exact = call(exact_loop, ids)
    plain = moved(loop)
    fast: Any = diagpass.transform(moved(loop), options={"schedule": "wavefront"})
    for _ in range(8):
        expected, got = call(plain, ids.cuda()), call(fast, ids.cuda())
        judge(exact, got, expected)
        judge(state(exact_loop), state(fast.original), state(plain))
    assert fast.report.ran == "wavefront"
    assert fast._session.kinds.runner.replays.replayed > 0


def test_ten_runs_give_one_bit_pattern_and_survive_later_ones() -> None:
    loop, ids = make(torch.bfloat16)
    fast: Any = diagpass.transform(moved(loop), options={"schedule": "wavefront"})
    ids = ids.cuda()
    with torch.no_grad():
        found = [fast(ids)["logits"] for _ in range(10)]
        kept = found[0].clone()
        fast(ids.flip(1))
    for result in found:
        assert torch.equal(result, kept)


def test_a_new_length_and_a_shorter_tail() -> None:
    exact_loop, ids = make(torch.float64)
    loop, _ = make()
    plain: Any = moved(loop)
    fast: Any = diagpass.transform(moved(loop), options={"schedule": "wavefront"})
    for length in (9 * SEGMENT, 5 * SEGMENT, 7 * SEGMENT - 10, 9 * SEGMENT, 2 * SEGMENT):
        part = ids[:, :length]
        assert_closer(call(exact_loop, part), call(fast, part.cuda()), call(plain, part.cuda()))


def test_streams() -> None:
    exact_loop, ids = make(torch.float64)
    loop, _ = make()
    plain: Any = moved(loop)
    fast: Any = diagpass.transform(moved(loop), options={"schedule": "wavefront"})
    parts = ids.cuda().split(SEGMENT, dim=1)
    for _ in range(3):
        with torch.no_grad():
            got = torch.cat([y["logits"] for y in fast.stream(parts)], 1).cpu()
        assert_closer(call(exact_loop, ids), got, call(plain, ids.cuda()))


def test_weights_are_held_once() -> None:
    loop, ids = make(layers=6)
    plain = moved(loop)
    size = sum(p.numel() * p.element_size() for p in plain.parameters())
    fast: Any = diagpass.transform(plain, options={"schedule": "wavefront", "compiler": "eager"})
    ids = ids.cuda()
    one = torch.ones(16, 16, device="cuda")
    torch.mm(one, one)  # what cuBLAS keeps for a stream is not ours; it comes with the first product
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    call(fast, ids)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 0.5 * size


def test_a_whole_loop_model() -> None:
    model, (ids,) = armt.build(layers=3, segments=4, batch=1, segment_size=16)
    exact = copy.deepcopy(model).double()
    exact.memory_cell.zero_mem()
    device = copy.deepcopy(model).cuda()
    device.memory_cell.zero_mem()
    fast: Any = diagpass.transform(copy.deepcopy(device), options={"schedule": "wavefront"})
    with torch.no_grad():
        got = fast(ids.cuda()).logits.cpu()
        assert_closer(exact(ids).logits, got, device(ids.cuda()).logits.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_loop_model_as_one_graph(dtype: torch.dtype, monkeypatch: Any) -> None:
    programs: list[Graphed] = []
    init = Graphed.__init__

    def noted(self: Graphed, *args: Any) -> None:
        init(self, *args)
        programs.append(self)

    monkeypatch.setattr(Graphed, "__init__", noted)
    model, (ids,) = armt.build(layers=3, segments=4, batch=1, segment_size=16)
    exact: Any = copy.deepcopy(model).double()
    plain: Any = copy.deepcopy(model).to("cuda", dtype)
    for each in (exact, plain):
        each.memory_cell.zero_mem()
    fast: Any = diagpass.transform(copy.deepcopy(plain), options={"schedule": "wavefront", "loop": "flat"})
    results = []
    for number in range(5):
        part = ids.roll(number, 1)
        with torch.no_grad():
            expected = [each(part.to(where)).logits for each, where in ((exact, "cpu"), (plain, "cuda"))]
            results.append((expected[0], fast(part.cuda()).logits, expected[1].cpu()))
    for reference, got, competitor in results:  # none was overwritten by a later call
        assert_closer(reference, got.cpu(), competitor)
    assert (programs[-1].recorded, programs[-1].replayed) == (1, 3)


@pytest.mark.parametrize("segments", [1, 6])
def test_without_width_cells_run_one_by_one(segments: int) -> None:
    """Compiled and recorded, as right as the model as it stands; each call of its own memory."""
    model, (ids,) = rmt.build(layers=3, segments=segments, batch=1, segment_size=16)
    exact, device = copy.deepcopy(model).double(), copy.deepcopy(model).cuda()
    fast: Any = diagpass.transform(copy.deepcopy(device))
    results = []
    with torch.no_grad():
        for number in range(4):
            part = ids.roll(number, 1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if not number else "error", diagpass.DiagpassWarning)
                got = fast(part.cuda()).logits
            results.append((exact(part).logits, got, device(part.cuda()).logits.cpu()))
    assert fast.report.ran == "wavefront" and fast.report.verdict == "sequential"
    for reference, got, competitor in results:
        assert_closer(reference, got.cpu(), competitor)


def test_a_loop_without_width_follows_scores() -> None:
    """The memory of a segment is read by the first layer of the next."""

    class Carried(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                [torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh()) for _ in range(4)]
            )

        def forward(self, x: torch.Tensor, state: Any) -> Any:
            h = x if state is None else x + state
            for layer in self.layers:
                h = layer(h)
            return h, h.mean(1, keepdim=True)

    loop = SegmentLoop(Carried(), 8, carries_state=True).cuda().eval()
    fast: Any = diagpass.transform(copy.deepcopy(loop))
    exact = copy.deepcopy(loop).cpu().double()
    x = torch.randn(2, 8 * 9, 32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", diagpass.DiagpassWarning)
        for length in (9, 9, 9, 6, 6, 6, 2):
            part = x[:, : 8 * length]
            (got, state), (plain, other) = fast(part.cuda()), loop(part.cuda())
            reference, last = exact(part.double())
            assert_closer(reference, got.cpu(), plain.cpu())
            assert_closer(last, state.cpu(), other.cpu())
    assert fast.report.ran == "wavefront" and fast._session.scores.followed >= 2


def disturb() -> None:
    """What Inductor does before it records graphs of its own: cuBLAS's workspaces are freed, and their memory
    is given back and used by others.
    """
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    taken = [torch.full((1 << 21,), float("nan"), device="cuda") for _ in range(64)]
    torch.cuda.synchronize()
    assert all(bool(one.isnan().all()) for one in taken)
    del taken
    torch.cuda.empty_cache()


@pytest.mark.parametrize("loop", ["flat", "rolled"])
def test_graphs_outlive_the_workspaces_of_others(loop: str) -> None:
    """Several lengths, recorded before and after; none writes where others have put something since."""
    model, (ids,) = armt.build(
        layers=3, segments=6, batch=1, segment_size=128, d_model=256, heads=4, dtype=torch.bfloat16
    )  # wide enough for kernels that use a workspace
    model = model.cuda()
    model.memory_cell.zero_mem()
    fast: Any = diagpass.transform(model, options={"schedule": "wavefront", "loop": loop})

    def check(segments: int) -> None:
        part = ids[:, : 128 * segments].cuda()
        with torch.no_grad():
            for _ in range(4):  # the last of them is a replay
                got = fast(part).logits
        assert torch.equal(got, results.setdefault(segments, got))

    results: dict[int, torch.Tensor] = {}
    for segments in (4, 6):
        check(segments)
    for _ in range(2):
        disturb()
        bystander = torch.zeros(1 << 26, device="cuda")
        for segments in (4, 6, 3, 4):
            check(segments)
        torch.cuda.synchronize()
        assert not bystander.any()


def test_beside_graphs_of_inductor() -> None:
    """A step compiled with mode="reduce-overhead" in the same process."""
    model, (ids,) = rmt.build(layers=3, segments=3, batch=1, segment_size=64, d_model=128, heads=4)
    model, ids = model.cuda(), ids.cuda()
    fast: Any = diagpass.transform(copy.deepcopy(model), options={"schedule": "wavefront"})
    other: Any = torch.compile(
        copy.deepcopy(model.memory_cell.model.model.layers[0].mlp), mode="reduce-overhead"
    )
    x = torch.randn(1, 64, 128, device="cuda")
    with torch.no_grad():
        expected = model(ids).logits
        for _ in range(4):
            for _ in range(4):
                torch.testing.assert_close(fast(ids).logits, expected, rtol=1e-3, atol=1e-3)
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                other(x)
