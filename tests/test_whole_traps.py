"""What a loop of the model's own may do with results that have no contents yet, and be right all the same.

Between two steps such a loop may reach memory in ways that no operation shows: Python numbers, NumPy, text,
lists of tensors. It may write in place into results, into what deferred operations read, into memory of its
own. And it is run once to find the step, of which nothing may remain.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagpass
from diagpass.rolled import whole
from tests.helpers import assert_state_same, assert_tree_same, clone_tree, collect_warnings, fast_copy
from tests.rolled_models import D, T
from tests.test_whole import ROLLED, Whole, check, tokens

# ------------------------------------------------------------------------------------------- reading


class Reads(Whole):
    """At the end, results are read in the way that `read` says, the one that is ready last first."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.read: Callable[[list[Tensor], Tensor], Any] = lambda results, x: None

    def forward(self, x: Tensor) -> Any:
        self.begin()
        results = [self.step(segment) for segment in self.segments(x)]
        return self.read(results[::-1], x), torch.cat(results, 1)


def _saved(value: Tensor) -> Tensor:
    stored = io.BytesIO()
    torch.save(value, stored)
    stored.seek(0)
    return torch.load(stored)


def _indices(results: list[Tensor]) -> tuple[Tensor, Tensor]:
    return results[0].flatten().argmax() % T, results[1].flatten().argmax() % T


def _by_list(results: list[Tensor], x: Tensor) -> Any:
    first, second = _indices(results)
    return x[:, [first, second]], x[:, first]


READS: dict[str, Callable[[list[Tensor], Tensor], Any]] = {
    "tensor": lambda r, x: torch.tensor([t.sum() for t in r]),
    "as_tensor": lambda r, x: torch.as_tensor([r[0].sum(), r[1].sum()]),
    "asarray": lambda r, x: torch.asarray([r[0].sum()]),
    "new_tensor": lambda r, x: x.new_tensor([r[0].sum(), 1.0]),
    "legacy": lambda r, x: torch.DoubleTensor([r[0].sum(), r[1].sum()]),
    "sparse": lambda r, x: torch.sparse_coo_tensor([[0, 1]], [r[0].sum(), r[1].sum()]).to_dense(),
    "to_sparse": lambda r, x: r[0].to_sparse().to_dense(),
    "list of indices": _by_list,
    "repr": lambda r, x: (repr(r[0]), str(r[1]), f"{r[2]}"),
    "format": lambda r, x: f"{r[0].sum():.6f}",
    "numpy": lambda r, x: r[0].numpy().sum().item(),
    "array": lambda r, x: np.array(r[0]).sum().item(),
    "array of list": lambda r, x: np.array([t.sum() for t in r]).sum().item(),
    "into array": lambda r, x: np.add(np.zeros((2, T, D)), r[0]).sum().item(),
    "saved": lambda r, x: _saved(r[0]),
    "pickled": lambda r, x: pickle.loads(pickle.dumps(r[0])),
    "copied": lambda r, x: copy.deepcopy(r[0]),
    "tolist": lambda r, x: r[0].tolist(),
    "full": lambda r, x: torch.full((2,), r[0].sum()),
    "real of complex": lambda r, x: torch.view_as_real(torch.complex(r[0], r[1])) * 2,
    "imaginary": lambda r, x: torch.complex(r[0], r[1]).imag + 1,
    "conjugate": lambda r, x: torch.complex(r[0], r[1]).conj() * 2,
    "negative imaginary": lambda r, x: torch.complex(r[0], r[1]).conj().imag + 1,
    "bits": lambda r, x: r[0].view(torch.int64) + 1,
}


@pytest.fixture(scope="module")
def reading() -> Iterator[tuple[Reads, Any]]:
    """A model and its transformed copy, captured once for all ways to read."""
    torch.manual_seed(0)
    plain = Reads("attribute")
    yield plain, fast_copy(plain, max_width=1, **ROLLED)


@pytest.mark.parametrize("way", READS)
def test_reading_what_has_no_contents_yet(reading: tuple[Reads, Any], way: str) -> None:
    """It gets them first."""
    plain, fast = reading
    plain.read = fast.original.read = READS[way]
    x = tokens(6)
    with torch.no_grad():
        assert_tree_same(fast(x), plain(x), 0.0, way)
    assert fast.report.ran == "wavefront", fast.report.reason


# ------------------------------------------------------------------------------------------- writing


class InResults(Whole):
    """A head's results are written in place, whole and through views; the last is fed back."""

    def forward(self, x: Tensor) -> Any:
        self.begin()
        outputs, past = [], x.new_zeros(x.shape[0], 1, D)
        for segment in self.segments(x):
            y = self.step(segment + past)
            h = self.head(y)
            old = h * 1
            h += y
            h[..., 0] = 0
            h[:, -1].mul_(2).clamp_(-1, 1)
            y += 1
            past = y[:, -1:].tanh()
            past *= 0.5
            outputs += [y, h, old]
        return torch.cat(outputs, 1), past


class InState(Whole):
    """The state that the step left is written in place before the next step reads it."""

    def forward(self, x: Tensor) -> Any:
        self.begin()
        outputs = []
        for segment in self.segments(x):
            outputs.append(self.step(segment))
            for layer in self.step.layers:
                layer.state.mul_(0.5)
                layer.state[:, 0] = 1
        return torch.cat(outputs, 1)


class InWhatIsReadLater(Whole):
    """Results are written after they went into operations that wait, and so is what those read."""

    def forward(self, x: Tensor) -> Any:
        self.begin()
        out, buffer, kept = torch.zeros_like(x), x.new_ones(x.shape[0], T, D), []
        for at, segment in enumerate(self.segments(x)):
            h = self.head(self.step(segment))
            h += buffer
            out[:, at * T : (at + 1) * T] = h
            view = h[:, 0]
            view += 1
            out[:, at * T] += view
            if at == 2:
                kept.append(float(h.sum()))
            buffer.mul_(2)
            kept.append(h)
        return out, kept


class WithOut(Whole):
    """`out` and lists: written, but not as the first argument."""

    def forward(self, x: Tensor) -> Any:
        self.begin()
        outputs, total = [], x.new_zeros(x.shape[0], D)
        for segment in self.segments(x):
            h = self.head(self.step(segment))
            torch.mul(h, 2, out=h)
            torch._foreach_add_([h, h], 1.0)
            torch.add(total, h.sum(1), out=total)
            outputs.append(h + total.unsqueeze(1))
        return torch.cat(outputs, 1)


@pytest.mark.parametrize("kind", [InResults, InState, InWhatIsReadLater, WithOut])
def test_writing_in_place_into_what_has_no_contents_yet(kind: type[Whole]) -> None:
    """What has read it before keeps what it read."""
    check(kind("attribute"), 6, 4, rtol=0.0, max_width=1)
    check(kind("attribute"), 6, 4)


class BatchNorm(Whole):
    """In training, a batch norm of results updates its running statistics, and no schema says so."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.norm = nn.BatchNorm1d(D).double()

    def forward(self, x: Tensor) -> Any:
        self.norm.train()
        self.begin()
        outputs, means, past = [], [], 0
        for at, segment in enumerate(self.segments(x)):
            y = self.step(segment + past)
            normed = self.norm(y.mT).mT
            past = normed[:, -1:] if at % 2 else 0
            means.append(self.norm.running_mean.sum())
            outputs.append(y)
        return torch.cat(outputs, 1), torch.stack(means)


def test_statistics_of_a_batch_norm_are_updated_in_order() -> None:
    check(BatchNorm("attribute"), 6, 4, rtol=0.0, max_width=1)


class Maps(Whole):
    def end(self, outputs: list[Tensor]) -> Tensor:
        return outputs[-1].map_(outputs[0], lambda a, b: a + b)


def test_writes_element_by_element_in_python_are_refused_by_name() -> None:
    with pytest.warns(diagpass.DiagpassWarning, match="map_"):
        check(Maps("attribute"), 5, ran="sequential", rtol=0.0)


# ------------------------------------------------------------------------------ memory of others


class FromArray(Whole):
    """One NumPy array is filled anew for each segment, and a tensor on it given to the step and the head."""

    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        array, outputs = np.zeros((x.shape[0], T, D)), []
        for segment in self.segments(x):
            array[:] = segment.numpy()
            y = self.step(torch.from_numpy(array))
            outputs.append(y + self.head(y) * torch.from_numpy(array))
        return torch.cat(outputs, 1)


class UnderArray(Whole):
    """A tensor is filled through the NumPy view of it."""

    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        tensor, outputs = x.new_zeros(x.shape[0], T, D), []
        array = tensor.numpy()
        for segment in self.segments(x):
            array[:] = segment.numpy()
            outputs.append(self.step(tensor))
        return torch.cat(outputs, 1)


class IntoArray(Whole):
    """Results are written to a NumPy array's memory, and the array is read."""

    def forward(self, x: Tensor) -> Any:
        self.begin()
        array = np.zeros(tuple(x.shape))
        tensor, sums = torch.from_numpy(array), []
        for at, segment in enumerate(self.segments(x)):
            tensor[:, at * T : at * T + segment.shape[1]] = self.step(segment)
            sums.append(float(array.sum()))
        return tensor, sums


@pytest.mark.parametrize("kind", [FromArray, UnderArray, IntoArray])
def test_memory_that_numpy_writes_or_reads(kind: type[Whole]) -> None:
    check(kind("attribute"), 6, rtol=0.0, max_width=1)


class Inference(Whole):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class InferenceStep(Whole):
    def forward(self, x: Tensor) -> Any:
        self.begin()
        outputs, out = [], torch.zeros_like(x)
        for at, segment in enumerate(self.segments(x)):
            with torch.inference_mode():
                outputs.append(self.step(segment))
            out[:, at * T : (at + 1) * T] = outputs[-1]
        return torch.cat(outputs, 1), out


@pytest.mark.parametrize("kind", [Inference, InferenceStep])
def test_inference_mode_inside_the_model(kind: type[Whole]) -> None:
    """Tensors made under it can be written under it alone, and are filled when it is over."""
    check(kind("attribute"), 6, 4, rtol=0.0, max_width=1)


# --------------------------------------------------------- the run that finds the step leaves nothing


@dataclasses.dataclass(slots=True)
class Slots:
    """A state object without a `__dict__`."""

    count: int = 0
    total: Tensor | None = None


class Keeps(Whole):
    """State of many kinds, all of it read by the loop."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.slots, self.array = Slots(), np.zeros(1)
        self.numbers, self.python = np.random.default_rng(0), random.Random(1)
        self.old, self.torch = np.random.RandomState(2), torch.Generator()
        with torch.inference_mode():
            self.inference = torch.zeros(1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        outputs = []
        for segment in self.segments(x):
            y = self.step(segment)
            self.slots.count += 1
            self.slots.total = y.sum() + (0 if self.slots.total is None else self.slots.total)
            self.array[0] += 1
            with torch.inference_mode():
                self.inference.add_(1)
            drawn = self.numbers.random() + self.python.random() + self.old.rand() + np.random.rand()
            noise = torch.rand(1, generator=self.torch, dtype=torch.float64)
            outputs.append(y * self.slots.count + self.slots.total * drawn + noise * float(self.array[0]))
            outputs[-1] = outputs[-1] + self.inference.item()
        return torch.cat(outputs, 1)

    def __deepcopy__(self, memo: dict) -> Keeps:
        made = Keeps("attribute")
        made.load_state_dict(self.state_dict())
        return made


def test_the_run_that_finds_the_step_is_undone() -> None:
    """Objects with slots, arrays, generators of random numbers, tensors of inference mode."""
    plain = Keeps("attribute")
    fast, x = fast_copy(plain, max_width=1, **ROLLED), tokens(5)
    results = []
    for model in (plain, fast):
        np.random.seed(3)
        with torch.no_grad():
            results.append((model(x), model(x), np.random.rand()))
    assert fast.report.ran == "wavefront", fast.report.reason
    assert_tree_same(results[1], results[0], 0.0, "output")
    assert_state_same(fast.original, plain)
    assert fast.original.array == plain.array


class ReplacesWeights(Whole):
    def forward(self, x: Tensor) -> Tensor:
        self.begin()
        outputs = []
        for segment in self.segments(x):
            outputs.append(self.step(segment))
            self.step.embed.bias.data = self.step.embed.bias.data * 0.9
        return torch.cat(outputs, 1)


def test_weights_are_not_replaced_twice() -> None:
    """As with writes: the run that finds the step stops before."""
    plain, x = ReplacesWeights("attribute"), tokens(4)
    fast = fast_copy(plain, **ROLLED)
    with torch.no_grad(), collect_warnings():
        assert_tree_same(fast(x), plain(x), 1e-10, "output")
    assert_state_same(fast.original, plain, 1e-10)


# ----------------------------------------------------------------------------------- which module


class Cache:
    """A state object that the loop makes and the step changes."""

    def __init__(self) -> None:
        self.memories: list[Tensor] = []
        self.seen = 0


class CacheLayer(nn.Module):
    """Has two norms, a family in itself."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.norm1, self.norm2 = at, nn.LayerNorm(D), nn.LayerNorm(D)
        self.read, self.inner = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h: Tensor, cache: Cache) -> Tensor:
        new = self.at == len(cache.memories)
        memory = h.new_zeros(h.shape[0], D) if new else cache.memories[self.at]
        h = h + torch.tanh(self.inner(self.norm1(h)) + self.read(memory).unsqueeze(1))
        memory = torch.tanh(0.5 * memory + self.norm2(h).mean(1))
        if new:
            cache.memories.append(memory)
        else:
            cache.memories[self.at] = memory
        return h


class CacheStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CacheLayer(at) for at in range(3))

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        for layer in self.layers:
            x = layer(x, cache)
        cache.seen += x.shape[1]
        return x


class CacheLoop(nn.Module):
    """The cache goes to the step as an argument; `fails` says at which segment the loop raises."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.fails: int | None = None
        self.step = CacheStep().double()
        self.cache = Cache() if keeps else None

    def forward(self, x: Tensor, cache: Cache | None = None) -> Any:
        cache = cache or self.cache or Cache()
        outputs = []
        for at, segment in enumerate(x.split(T, 1)):
            if at == self.fails:
                raise ValueError("as told")
            outputs.append(self.step(segment, cache=cache))
        return torch.cat(outputs, 1), cache.memories, cache.seen


@pytest.mark.parametrize("keeps", [False, True])
def test_a_state_object_that_the_loop_gives_to_its_step(keeps: bool) -> None:
    """Changed as by the plain model, and put back where the call fails."""
    plain = CacheLoop(keeps)
    fast, x = fast_copy(plain, max_width=1, **ROLLED), tokens(6)
    with torch.no_grad():
        for _ in range(2):
            assert_tree_same(fast(x), plain(x), 0.0, "output")
            assert fast.report.ran == "wavefront", fast.report.reason
            assert_state_same(fast.original, plain)
        given = Cache()
        assert_tree_same(fast(x, given), plain(x, Cache()), 0.0, "output")
        memories, before = list(given.memories), clone_tree(given.memories)
        plain.fails = fast.original.fails = 4
        with pytest.raises(ValueError, match="as told"):
            fast(x, given)
    assert given.seen == x.shape[1]
    assert all(now is then for now, then in zip(given.memories, memories, strict=True))
    assert_tree_same(given.memories, before, 0.0, "after the failure")
    assert_state_same(fast.original, plain)


class NoStep(nn.Module):
    """The loop walks the layers itself. Each layer has a family of norms inside, but is no step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CacheLayer(at) for at in range(3)).double()

    def forward(self, x: Tensor) -> Any:
        cache, outputs = Cache(), []
        for segment in x.split(T, 1):
            for layer in self.layers:
                segment = layer(segment, cache)
            outputs.append(segment)
        return torch.cat(outputs, 1), F.softmax(outputs[-1], -1)


def test_a_layer_is_not_taken_for_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "MANY_CELLS", 20)
    plain, x = NoStep(), tokens(9)
    fast = fast_copy(plain)
    with (
        torch.no_grad(),
        pytest.warns(diagpass.DiagpassWarning, match="put what the loop does for a segment"),
    ):
        assert_tree_same(fast(x), plain(x), 0.0, "output")
    assert fast.report.ran == "sequential"


# ----------------------------------------------------------------------------- higher-order operators


class Halves(nn.Module):
    """A layer that calls `torch.cond`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.read = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        h = h + torch.tanh(self.inner(h) + self.read(memory).unsqueeze(1))
        memory = torch.tanh(0.5 * memory + h.mean(1))
        return h, torch.cond(memory.sum() > 0, lambda m: m * 0.5, lambda m: m * 2.0, (memory,))


class CondStep(nn.Module):
    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(3))

    def forward(self, h: Tensor, state: list[Tensor] | None = None) -> Any:
        memories = list(state or [h.new_zeros(2, D)] * 3)
        for at, layer in enumerate(self.layers):
            h, memories[at] = layer(h, memories[at])
        return h, memories


class CondLoop(nn.Module):
    """`outside`: the loop calls it, too, with functions that read results without contents yet."""

    def __init__(self, layer: type[nn.Module], outside: bool) -> None:
        super().__init__()
        self.step, self.outside = CondStep(layer).double(), outside

    def forward(self, x: Tensor) -> Any:
        outputs, state = [], None
        for segment in x.split(T, 1):
            y, state = self.step(segment, state)
            if self.outside:
                y = torch.cond(y.sum() > 0, lambda v, y=y: v + y, lambda v, y=y: v - y, (y * 0.5,))
            outputs.append(y)
        return torch.cat(outputs, 1), state


class Flexible(Halves):
    """A layer that calls `flex_attention` with a function of its own."""

    def forward(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        from torch.nn.attention.flex_attention import flex_attention

        q = self.inner(h).unsqueeze(1)
        h = h + flex_attention(q, q, q, score_mod=lambda s, b, n, i, j: s + 0.1 * (i - j)).squeeze(1)
        return h, torch.tanh(0.5 * memory + self.read(h).mean(1))


@pytest.mark.parametrize(
    ("layer", "outside", "ran"),
    [
        (Halves, False, "wavefront"),
        (Halves, True, "sequential"),
        pytest.param(Flexible, False, "wavefront", marks=pytest.mark.slow),
    ],
)
def test_higher_order_operators(layer: type[nn.Module], outside: bool, ran: str) -> None:
    """They compile themselves where they are called eagerly, now and afterwards."""
    plain, x = CondLoop(layer, outside), tokens(5)
    fast = fast_copy(plain, max_width=1, **ROLLED)
    with torch.no_grad(), collect_warnings():
        assert_tree_same(fast(x), plain(x), 0.0, "output")
        assert fast.report.ran == ran, fast.report.reason
        batched = fast_copy(plain, **ROLLED)
        assert_tree_same(batched(x), plain(x), 1e-10, "output")


class OnlyPlain(Whole):
    """Raises while it is watched, as a library may that asks which modes are on."""

    def end(self, outputs: list[Tensor]) -> Tensor:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise NotImplementedError("not under a mode")
        return torch.cat(outputs, 1)


def test_what_fails_only_while_it_is_watched_runs_as_it_stands() -> None:
    plain, x = OnlyPlain("attribute"), tokens(5)
    fast = fast_copy(plain, **ROLLED)
    fast.__dict__["_step"] = "step"  # as if it had been found by a call that did not fail
    fast._renew_step()
    with torch.no_grad(), pytest.warns(diagpass.DiagpassWarning, match="not under a mode"):
        assert_tree_same(fast(x), plain(x), 0.0, "output")
    assert_state_same(fast.original, plain)


class Halving(nn.Module):
    """Writes the memory that it is given in place."""

    def forward(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory.mul_(0.5)
        return h + memory.unsqueeze(1), memory


class OneStorage(CondLoop):
    """The layers' memories are views of one tensor."""

    def forward(self, x: Tensor) -> Any:
        outputs, state = [], list(x.new_ones(3, 2, D).unbind(0))
        for segment in x.split(T, 1):
            output, state = self.step(segment, state)
            outputs.append(output)
        return torch.cat(outputs, 1)


def test_a_refusal_names_arguments_and_attributes_as_users_do() -> None:
    plain, x = OneStorage(Halving, False), tokens(4)
    fast = fast_copy(plain, **ROLLED)
    with torch.no_grad(), collect_warnings() as warned:
        assert_tree_same(fast(x), plain(x), 0.0, "output")
    assert fast.report.ran == "sequential" and warned
    assert "L[" not in fast.report.reason and "argument 1[" in fast.report.reason, fast.report.reason


class InPlaceLayer(nn.Module):
    """Writes the memory that it is given in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.read = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h: Tensor, memory: Tensor) -> Tensor:
        h = h + torch.tanh(self.inner(h) + self.read(memory).unsqueeze(1))
        memory.mul_(0.5).add_(h.mean(1))
        return h


class InPlaceStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InPlaceLayer() for _ in range(3))

    def forward(self, h: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        for at, layer in enumerate(self.layers):
            h = layer(h, state[:, :, at])
        return h, state


class GivenInPlace(nn.Module):
    """The loop makes the state, a column a layer, and the step writes in it, as RWKV in transformers does.

    `what` is given to the first step: memory of the loop's own, of the input, or a slice of the input.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.step, self.what = InPlaceStep().double(), what

    def forward(self, x: Tensor) -> Any:
        state = {"own": lambda: x.new_zeros(2, D, 3), "slice": lambda: x.mT[:, :, :3]}[self.what]()
        outputs = []
        for segment in x.split(T, 1):
            output, state = self.step(segment, state)
            outputs.append(output)
        return torch.cat(outputs, 1), state


@pytest.mark.parametrize("what", ["own", "slice"])
def test_a_state_that_the_step_is_given_and_writes_in_place(what: str) -> None:
    plain, x = GivenInPlace(what), tokens(6)
    for width, bound in ((1, 0.0), (None, 1e-10)):
        fast, mine, its = fast_copy(plain, max_width=width, **ROLLED), x.clone(), x.clone()
        with torch.no_grad(), collect_warnings():
            assert_tree_same(fast(mine), plain(its), bound, "output")
        assert_tree_same(mine, its, bound, "input")
        assert what != "own" or fast.report.ran == "wavefront", fast.report.reason


class ReadsBuffers(Whole):
    """What the step writes in place is read at the end, and every `every`-th segment before."""

    every = 100

    def forward(self, x: Tensor) -> Any:
        self.begin()
        outputs, read = [], []
        for at, segment in enumerate(self.segments(x)):
            outputs.append(self.step(segment))
            if at % self.every == self.every - 1:
                read.append(sum(buffer.sum() for buffer in self.step.buffers()))
                read.append(torch.as_tensor(next(self.step.buffers()).numpy().sum()))
        return torch.cat(outputs, 1), read, [buffer.clone() for buffer in self.step.buffers()]


def test_what_the_step_writes_in_place_may_be_read() -> None:
    """It is written first, as at the end of the call."""
    for every, waves in ((100, 6 + 3 - 1), (4, 4 + 3 - 1 + 2 + 3 - 1), (1, 18)):
        plain = ReadsBuffers("buffer")
        plain.every = every
        check(plain, 6, 4, rtol=0.0, max_width=1)
        assert check(plain, 6).waves == waves
