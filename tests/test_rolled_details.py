"""What the rolled program must hold to in detail: layouts, casts, numbers, proposals of cells."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import diagpass
from diagpass import DiagpassWarning, SegmentLoop
from diagpass.rolled.kinds import usual_widths
from diagpass.rolled.layout import fixed_layout, packed, sliced_dim
from tests import rolled_models as models
from tests.helpers import assert_state_same, assert_tree_same, fast_copy

D, T = 6, 3


@pytest.mark.parametrize("segments", [2, 5, 40])
@pytest.mark.parametrize("shape", [(2, 4), (3, 4, 5), (2, 1, 4, 5), (1, 4, 5)])
def test_a_segment_does_not_tell_how_many_there_are(shape: tuple[int, ...], segments: int) -> None:
    dim = len(shape) - 2 if len(shape) > 2 else 1
    whole = [*shape[:dim], shape[dim] * segments, *shape[dim + 1 :]]
    first = torch.randn(*shape[:dim], shape[dim] * 2, *shape[dim + 1 :]).narrow(dim, 0, shape[dim])
    x = torch.randn(whole).narrow(dim, shape[dim], shape[dim])
    for own in (False, True):
        fixed = fixed_layout(x, own)
        assert torch.equal(fixed, x) and fixed.stride() == fixed_layout(first, own).stride()
        assert fixed.is_contiguous() == x.is_contiguous()
        assert not own or fixed.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_other_layouts_are_kept() -> None:
    x = torch.randn(4, 5, 6).transpose(0, 2)
    assert sliced_dim(x.shape, x.stride()) is None and fixed_layout(x, False) is x
    y = torch.randn(3, 4)
    assert fixed_layout(y, False) is y and packed(y.shape) == y.stride()


def test_usual_widths_leave_no_cell_alone() -> None:
    for count in range(2, 200):
        widths = usual_widths(count)
        assert sum(widths) == count and min(widths) > 1
        assert all(width in {2**k for k in range(8)} | {3 * 2**k for k in range(7)} for width in widths)


def single(loop: SegmentLoop) -> SegmentLoop:
    """The loop and its tensor attributes in float32."""
    loop = loop.float()
    for module in loop.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.dtype == torch.float64:
                setattr(module, name, value.float())
    return loop


@pytest.mark.parametrize("name", ["gru", "mamba"])
def test_autocast_casts_once(name: str) -> None:
    """The casts are in the captured graph: run under autocast once more it would be another program."""
    plain = single(models.build(name))
    unbatched, batched = fast_copy(plain, max_width=1), fast_copy(plain)
    x = models.inputs(name, 7 * plain.segment_size).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected, same, near = plain(x), unbatched(x), batched(x)
    assert_tree_same(same, expected, 0.0, "unbatched")
    assert_tree_same(near, expected, 2e-2, "batched")
    assert batched.report.batched_cells > 0 and not batched.report.notes


class Scaled(nn.Module):
    """A recurrent layer that multiplies by a number of its own."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear, self.index, self.state = nn.Linear(D, D), index, torch.zeros(1, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        h = h * (1.0 + 0.1 * self.index) + self.state.unsqueeze(1)
        h = h + torch.add(h, self.linear(h).tanh(), alpha=0.5 + self.index)
        self.state = h.mean(1)
        return h / 4


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_numbers_that_differ_by_layer(compiler: str) -> None:
    torch.manual_seed(0)
    plain = SegmentLoop(models.Step([Scaled(i) for i in range(3)]).double().eval(), T)
    fast = fast_copy(plain, compiler=compiler)
    for segments in (2, 5, 3):
        x = torch.randn(2, segments * T, D, dtype=torch.float64)
        with torch.no_grad():
            assert_tree_same(fast(x), plain(x), 1e-11, f"{segments} segments")
        assert_state_same(fast.original, plain, 1e-11)
    assert len(fast.report.kinds) == 1 and fast.report.batched_cells > 0


def test_equal_glue_of_another_proposal_stays_in_the_cells() -> None:
    """Inner modules of a layer are proposals, too; trying them must not take the layers apart."""
    loop = models.build("armt")
    cells = {cell["path"] for cell in _explained(loop).grid}
    assert cells == {f"model.model.layers.{at}" for at in range(3)}


def _explained(loop: SegmentLoop):
    import diagpass

    report = diagpass.explain(loop, models.inputs("armt", 5 * loop.segment_size))
    assert report.ran is None and report.verdict == "wavefront" and report.segments == 5
    return report


def test_a_stream_keeps_the_mode_it_began_in() -> None:
    """Begun without gradients it goes on so, wherever its outputs are asked for."""
    plain = models.build("gru")
    fast = fast_copy(plain)
    x = models.inputs("gru", 5 * plain.segment_size)
    with torch.no_grad():
        expected, _ = plain(x)
        stream = fast.stream(list(x.split(plain.segment_size, 1)))
        first = next(stream)
    rest = list(stream)
    got = torch.cat([first, *rest], 1)
    assert not got.requires_grad and fast.report.ran == "wavefront"
    assert_tree_same(got, expected, 1e-10, "stream")


def test_copies_are_loops() -> None:
    fast = fast_copy(models.build("gru"))
    again = copy.deepcopy(fast)
    x = models.inputs("gru", 4 * T)
    with torch.no_grad():
        assert type(again) is type(fast)
        assert_tree_same(again(x), fast(x), 0.0, "copy")
        assert len(list(again.stream([x[:, :T]]))) == 1


def test_a_stream_that_stops_for_want_of_width_runs_no_segment_twice() -> None:
    """A chain is seen after a few segments; the stream goes on as it stands with the next one."""
    plain = models.build("rmt")
    fast = fast_copy(plain, schedule="auto")
    x = models.inputs("rmt", 9 * plain.segment_size)
    with torch.no_grad(), pytest.warns(DiagpassWarning, match="a chain leaves no width"):
        got = list(fast.stream(list(x.split(plain.segment_size, 1))))
        expected = list(plain.stream(list(x.split(plain.segment_size, 1))))
    assert len(got) == 9
    assert_tree_same(got, expected, 1e-10, "stream")
    assert_state_same(fast.original, plain, 1e-10)


@pytest.mark.parametrize("name", ["attribute", "gru", "rmt"])
def test_the_default_schedule(name: str) -> None:
    """With width waves, without it one warning and the loop as it stands: call, stream and verify."""
    plain = models.build(name)
    fast = diagpass.transform(copy.deepcopy(plain), options={"compiler": "eager"})
    x, size = models.inputs(name, 9 * plain.segment_size), plain.segment_size
    ran = "sequential" if name == "rmt" else "wavefront"
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for part in (x, x[:, : 2 * size], x[:, : 7 * size + 1]):
            assert_tree_same(fast(part), plain(part), 1e-10, "call")
            assert_state_same(fast.original, plain, 1e-10)
        assert fast.report.ran == ran
        outputs = list(fast.stream(x.split(size, 1)))
        assert_tree_same(outputs, list(plain.stream(x.split(size, 1))), 1e-10, "stream")
        assert_state_same(fast.original, plain, 1e-10)
        assert fast.report.ran == ran
        if ran == "wavefront":
            assert all(figure["unbatched"] == 0.0 for figure in fast.verify(x).values())
        else:
            with pytest.raises(diagpass.DiagpassError, match="no wavefront to verify"):
                fast.verify(x)
    assert bool([w for w in caught if issubclass(w.category, DiagpassWarning)]) == (ran == "sequential")
