"""Models unlike those of the zoo, tried both ways: what other people's segment-recurrent models look like.

Each stands for something that it has and the others lack; its docstring says what.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diagpass
from diagpass import SegmentLoop
from tests.helpers import assert_state_same, assert_tree_same, clone_tree, fast_copy
from tests.models import Mix

B, T, D, L = 2, 4, 6, 3


def tokens(segments: int, tail: int = 0) -> Tensor:
    return torch.randn(B, segments * T + tail, D, dtype=torch.float64)


def compare(plain: nn.Module, *calls: tuple[Any, ...], rtol: float = 1e-10, **options: Any) -> Any:
    """Call after call the same as the plain model: outputs, inputs and state."""
    plain = plain.double().eval()
    fast = fast_copy(plain, **options)
    for inputs in calls:
        expected_in, got_in = clone_tree(inputs), clone_tree(inputs)
        with torch.no_grad():
            expected, got = plain(*expected_in), fast(*got_in)
        assert_tree_same(got, expected, rtol, "output ")
        assert_tree_same(got_in, expected_in, 0.0, "input ")
        assert_state_same(fast.original, plain, rtol)
    report = fast.report
    assert report.ran == "wavefront", report.reason
    return report


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of a loss over all outputs."""
    outputs = torch.utils._pytree.tree_leaves(model(x))
    sum((out.double().tanh().sum() for out in outputs if out.requires_grad), start=x.new_zeros(())).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Sorting(nn.Module):
    """Between layers an operation gives two results: one goes on to the next layer, the other leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mix(D) for _ in range(L))

    def segment(self, h: Tensor, memories: list[Tensor], places: list[Tensor]) -> Tensor:
        for at, layer in enumerate(self.layers):
            h, memories[at] = layer(h, memories[at])
            values, order = h.sort(-1)
            h = h + 0.1 * values
            places.append(order.double().var().view(1, 1))
        return h

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memories, places = [x.new_zeros(B, D)] * L, []
        outputs = [self.segment(h, memories, places) for h in x.split(T, 1)]
        return torch.cat(outputs, 1), torch.cat(places, 1)


class SortingStep(Sorting):
    def forward(self, x: Tensor, state: list[Tensor] | None = None) -> Any:
        memories, places = list(state or [x.new_zeros(B, D)] * L), []
        return (self.segment(x, memories, places), torch.cat(places, 1)), memories


def test_the_other_result_of_an_operation_that_a_cell_contains() -> None:
    """It has the values of its own cell, not of the group."""
    compare(Sorting(), (tokens(3),))
    compare(SegmentLoop(SortingStep(), T, carries_state=True), (tokens(5),), (tokens(2, 1),))


class OneRecurrent(nn.Module):
    """A block-recurrent transformer: one layer in the middle has a state, the others have none."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.ModuleList(nn.Sequential(nn.RMSNorm(D), nn.Linear(D, D), nn.GELU()) for _ in range(2))
        self.recurrent, self.gate = Mix(D), nn.Linear(D, D)
        self.high = nn.ModuleList(nn.Sequential(nn.RMSNorm(D), nn.Linear(D, D), nn.GELU()) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory, outputs = x.new_zeros(B, D), []
        for h in x.split(T, 1):
            for layer in self.low:
                h = h + layer(h)
            h, new = self.recurrent(h, memory)
            gate = self.gate(new).sigmoid()
            memory = gate * memory + (1 - gate) * new
            for layer in self.high:
                h = h + layer(h)
            outputs.append(h)
        return torch.cat(outputs, 1), memory


def test_what_backward_needs_of_an_operation_with_several_results() -> None:
    """A norm in a cell saves its mean and deviation for the backward pass."""
    plain, x = OneRecurrent().double(), tokens(4)
    fast = fast_copy(copy.deepcopy(plain))
    expected, got = gradients(plain, x), gradients(fast, x)
    assert fast.report.ran == "wavefront"
    assert_tree_same(got, expected, 1e-10, "gradient ")


# ------------------------------------------------------------------- where a layer keeps its state


class Stacked(nn.Module):
    """Layers in a row; subclasses say how a layer's memory is read and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mix(D) for _ in range(L))


class RingStep(Stacked):
    """The last memories of each layer lie in a ring in one buffer; a tensor says which is written next."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ring", torch.zeros(L, 4, B, D))
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        for at, layer in enumerate(self.layers):
            x, memory = layer(x, self.ring[at].mean(0))
            self.ring[at].index_copy_(0, self.at.view(1), memory[None])
        self.at.add_(1).remainder_(4)
        return x


class ColumnsStep(Stacked):
    """The layers' memories are columns of the last dimension, the batch is not the first."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> Any:
        state = x.new_zeros(D, B, L) if state is None else state
        columns = []
        for at, layer in enumerate(self.layers):
            x, memory = layer(x, state[:, :, at].T)
            columns.append(memory.T)
        return x, torch.stack(columns, -1)


class UnetStep(Stacked):
    """The first layer's output is given to the last, past those between; states in a dict by name."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Linear(2 * D, D)
        self.memories: dict[str, Tensor] = {}

    def reset(self) -> None:
        self.memories.clear()

    def forward(self, x: Tensor) -> Tensor:
        skipped = None
        for at, layer in enumerate(self.layers):
            if at == L - 1:
                x = self.merge(torch.cat([x, skipped], -1))
            memory = self.memories.get(f"m{at}")
            x, new = layer(x, x.new_zeros(B, D) if memory is None else memory)
            self.memories[f"m{at}"] = new
            skipped = x if skipped is None else skipped
        return x


class Diagonal(nn.Module):
    """A state-space layer with complex states."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.turn = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(D))
        self.into, self.out = nn.Parameter(torch.randn(D, D, 2)), nn.Parameter(torch.randn(D, D, 2))
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        pole = torch.exp(torch.complex(-self.decay.exp(), self.turn))
        driven = x.to(torch.complex128) @ torch.view_as_complex(self.into)
        state, states = torch.zeros_like(driven[:, 0]) if self.state is None else self.state, []
        for token in driven.unbind(1):
            state = pole * state + token
            states.append(state)
        self.state = state
        return x + (torch.stack(states, 1) @ torch.view_as_complex(self.out)).real.tanh()


def keeping(step: nn.Module, reset: str | None = None) -> SegmentLoop:
    return SegmentLoop(step, T, reset=reset)


@pytest.mark.parametrize(
    "loop",
    [
        keeping(RingStep()),
        SegmentLoop(ColumnsStep(), T, carries_state=True),
        keeping(UnetStep(), "reset"),
        keeping(nn.Sequential(*(Diagonal() for _ in range(L)))),
    ],
    ids=["ring", "columns", "unet", "complex"],
)
def test_state_in_odd_places(loop: SegmentLoop) -> None:
    """Right, and each layer waits for its own state alone."""
    report = compare(copy.deepcopy(loop), (tokens(6),), (tokens(2, 1),), (tokens(7),))
    assert report.waves == 7 + L - 1 and report.verdict == "wavefront"
    compare(copy.deepcopy(loop), (tokens(3),), rtol=0.0, max_width=1)


# ------------------------------------------------------------------------- loops of other shapes


class Documents(nn.Module):
    """A token that ends a document resets the state; a mask; positions in a buffer and in an int."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(10, D), nn.ModuleList(Mix(D) for _ in range(L))
        self.head = nn.Linear(D, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.seen = 0

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        state = torch.zeros(L, B, D, dtype=self.embed.weight.dtype)
        out = state.new_zeros(*ids.shape, 10)
        for start in range(0, ids.shape[1], T):
            part = slice(start, start + T)
            places = self.place + torch.arange(T) + 0.1 * start
            h = self.embed(ids[:, part]) * mask[:, part, None] + torch.sin(places)[:, None]
            keep, new = ~(ids[:, part] == 0).any(1, keepdim=True), []
            for layer, memory in zip(self.layers, state.unbind(0), strict=True):
                h, memory = layer(h, torch.where(keep, memory, 0.0))
                new.append(memory)
            state, out[:, part] = torch.stack(new), self.head(h)
            self.place += T
            self.seen += T
        return out, state


class Clockwork(Stacked):
    """Layer l runs at every 2**l-th segment."""

    def forward(self, x: Tensor) -> Any:
        memories, last, outputs = [x.new_zeros(B, D)] * L, [x.new_zeros(B, T, D)] * L, []
        for segment, h in enumerate(x.split(T, 1)):
            for at, layer in enumerate(self.layers):
                if segment % 2**at == 0:
                    last[at], memories[at] = layer(h, memories[at])
                h = h + last[at]
            outputs.append(h)
        return torch.cat(outputs, 1), memories


class Overlapping(Stacked):
    """Segments share two tokens; outputs are added where they overlap."""

    def forward(self, x: Tensor) -> Tensor:
        memories, out, weight = [x.new_zeros(B, D)] * L, torch.zeros_like(x), torch.zeros_like(x[:1, :, :1])
        start = 0
        while start + T <= x.shape[1]:
            h = x[:, start : start + T]
            for at, layer in enumerate(self.layers):
                h, memories[at] = layer(h, memories[at])
            out[:, start : start + T] += h
            weight[:, start : start + T] += 1
            start += T - 2
        return out / weight.clamp(min=1)


class EncoderDecoder(nn.Module):
    """Two stacks a segment, the second reads the first one's output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Mix(D) for _ in range(2))
        self.decoder = nn.ModuleList(Mix(D) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Any]:
        memories, outputs = {"e": [x.new_zeros(B, D)] * 2, "d": [x.new_zeros(B, D)] * 2}, []
        for segment in x.split(T, 1):
            h = segment
            for at, layer in enumerate(self.encoder):
                h, memories["e"][at] = layer(h, memories["e"][at])
            y = segment.flip(1)
            for at, layer in enumerate(self.decoder):
                y, memories["d"][at] = layer(y + h.mean(1, keepdim=True), memories["d"][at])
            outputs.append(y)
        return {"y": torch.cat(outputs, 1), "memories": memories}


def documents(segments: int) -> tuple[Tensor, ...]:
    return torch.randint(0, 10, (B, segments * T)), torch.rand(B, segments * T) > 0.2


@pytest.mark.parametrize(
    ("model", "inputs", "waves"),
    [
        (Documents, documents(3), 3 + L - 1),
        (Clockwork, (tokens(4),), 4),  # the longest path is layer 0 at all four segments
        (Overlapping, (tokens(2),), 3 + L - 1),
        (EncoderDecoder, (tokens(3),), 3 + 4 - 1),
    ],
)
def test_loops_of_odd_shapes(model: type[nn.Module], inputs: tuple[Tensor, ...], waves: int) -> None:
    plain = model()
    assert compare(copy.deepcopy(plain), inputs, inputs).waves == waves
    compare(plain, inputs, rtol=0.0, max_width=1)


# ------------------------------------------------------------------------------- odd operations


class Expert(nn.Module):
    """Chooses a matrix for each token; what was chosen is counted by one_hot, which checks its input."""

    def __init__(self) -> None:
        super().__init__()
        self.choose, self.mix = nn.Linear(D, 3), Mix(D)
        self.experts = nn.Parameter(torch.randn(3, D, D) * 0.3)

    def forward(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, chosen = self.choose(h).softmax(-1).max(-1)
        h = h + torch.einsum("btd,btde->bte", h, self.experts[chosen]) * weight[..., None]
        return *self.mix(h, memory), F.one_hot(chosen, 3).double().mean((0, 1))


class ExpertsStep(nn.Module):
    """A loss beside the output, a sum over the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Expert() for _ in range(L))

    def forward(self, x: Tensor, state: list[Tensor] | None = None) -> Any:
        memories, loss = list(state or [x.new_zeros(B, D)] * L), x.new_zeros(3)
        for at, layer in enumerate(self.layers):
            x, memories[at], load = layer(x, memories[at])
            loss = loss + load
        return (x, loss.view(1, 3)), memories


def test_an_assertion_on_values_is_batched() -> None:
    report = compare(SegmentLoop(ExpertsStep(), T, carries_state=True), (tokens(5),))
    assert report.batched_cells > L, report.notes


class Trained(nn.Module):
    """A memory that is trained as it runs, by the gradient of what it recalls."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value, self.query = (nn.Linear(D, D) for _ in range(3))

    def gradient(self, h: Tensor, memory: Tensor) -> Tensor:
        with torch.enable_grad():
            tried = memory.detach().requires_grad_()
            loss = (self.key(h).detach() @ tried - self.value(h).detach()).square().mean()
            return torch.autograd.grad(loss, tried)[0]

    def forward(self, h: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        return h + (self.query(h) @ memory).tanh(), 0.95 * memory - 0.1 * self.gradient(h, memory)


class TrainedBackward(Trained):
    """The same by `backward()`, which adds to the gradients of parameters."""

    def gradient(self, h: Tensor, memory: Tensor) -> Tensor:
        with torch.enable_grad():
            tried = memory.detach().requires_grad_()
            (self.key(h) @ tried - self.value(h)).square().mean().backward()
            return tried.grad


class TrainedStep(nn.Module):
    def __init__(self, layer: type[Trained]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(L))

    def forward(self, x: Tensor, state: list[Tensor] | None = None) -> Any:
        memories = list(state or [x.new_zeros(B, D, D)] * L)
        for at, layer in enumerate(self.layers):
            x, memories[at] = layer(x, memories[at])
        return x, memories


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Dynamo does not capture it")
def test_a_gradient_inside_a_layer() -> None:
    compare(SegmentLoop(TrainedStep(Trained), T, carries_state=True), (tokens(5),), (tokens(2, 1),))


class TrainedLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = TrainedStep(TrainedBackward)

    def forward(self, x: Tensor) -> Any:
        outputs, state = [], None
        for segment in x.split(T, 1):
            output, state = self.step(segment, state)
            outputs.append(output)
        return torch.cat(outputs, 1), state


def test_gradients_that_are_left_behind_are_the_plain_models() -> None:
    """The run that finds the step leaves none."""
    plain, x = TrainedLoop().double(), tokens(4)
    fast = fast_copy(plain, loop="rolled")
    said = r"autograd\.grad|backward" if torch.__version__ >= "2.13" else "requires_grad_"
    with torch.no_grad(), pytest.warns(diagpass.DiagpassWarning, match=said):
        assert_tree_same(fast(x), plain(x), 0.0, "output ")
    for name, parameter in plain.named_parameters():
        got = fast.original.get_parameter(name).grad
        assert (got is None) == (parameter.grad is None), name
        assert got is None or torch.equal(got, parameter.grad), name


class Positive(nn.Module):
    """A size that depends on values, inside of a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(L))

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = [x.new_zeros(B, D) for _ in self.layers], []
        for h in x.split(T, 1):
            for at, layer in enumerate(self.layers):
                h = torch.tanh(layer(h) + state[at][:, None])
                state[at] = h.mean(1)
                h = h + h[h > 0].sum()
            outputs.append(h)
        return torch.cat(outputs, 1)


def test_sizes_that_depend_on_values() -> None:
    compare(Positive(), *((tokens(4) * scale - 1,) for scale in (1, 2, 3)))
