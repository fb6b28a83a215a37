"""Calls that cannot be served: a clear result or a clear error, each by its text.

"Clear" means: the words that name the cause are in the warning or in the error, and the result,
where there is one, is that of the plain model.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from tests.helpers import (
    assert_same,
    assert_state_same,
    assert_tree_same,
    collect_warnings,
    fast_copy,
    forced,
    no_diagpass_warnings,
    run_sequential,
    snapshot,
)
from tests.models import ZOO, B, D, L, Loop, Mix, T, dropout_train, tokens

# ------------------------------------------------------------------- wrong dtype, device, shape

WRONG = {
    "dtype": (lambda x: x.float(), r"dtype|float|double"),
    "device": (lambda x: x.to("meta"), r"device|meta"),
    "width": (lambda x: x[..., :-1], r"shape|size"),
    "batch": (lambda x: x[:1].expand(3, -1, -1), r"shape|size|match"),
    "dims": (lambda x: x[0], r"shape|size|dim|split"),
    "type": (lambda x: "hello", r"str|hello|Tensor|attribute|keyword"),
    "none": (lambda x: None, r"None"),
}


@pytest.mark.parametrize("captured", [False, True], ids=["first_call", "after_a_good_call"])
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_inputs_raise_what_says_so_and_leave_the_state(wrong: str, captured: bool) -> None:
    change, words = WRONG[wrong]
    model, (x,) = ZOO["attribute"]()
    fast = fast_copy(model)
    if captured:
        run_sequential(fast, (x,))
        run_sequential(model, (x,))
    before = snapshot(fast.original)
    with pytest.raises(Exception, match=f"(?i){words}"), torch.no_grad():
        fast(change(x))
    assert_state_same(fast.original, before)
    expected = run_sequential(model, (x,))
    assert_tree_same(run_sequential(fast, (x,)), expected, 1e-12, "the next good call")


@pytest.mark.parametrize("bad", [(), (1, 2, 3)])
def test_wrong_arguments_raise_a_type_error(bad: tuple[Any, ...]) -> None:
    model, (x,) = ZOO["attribute"]()
    fast = fast_copy(model)
    run_sequential(fast, (x,))
    with pytest.raises(TypeError, match="argument"):
        fast(*bad)
    with pytest.raises(TypeError, match="nonsense"):
        fast(x, nonsense=1)


def test_another_dtype_that_the_model_can_take_is_a_new_plan() -> None:
    """Token numbers as int32 after int64: right, not stale."""
    model, (ids,) = ZOO["embeddings"]()
    plain, fast = copy.deepcopy(model), fast_copy(model)
    for each in (ids, ids.int(), ids):
        expected = run_sequential(plain, (each,))
        assert_tree_same(run_sequential(fast, (each,)), expected, 1e-12, str(each.dtype))


# --------------------------------------------------------------------------- nothing to batch


def test_no_repeated_module() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D)).double()
    x = tokens()
    words = r"(?i)no (repeated|layer)|repeat"
    with collect_warnings() as texts:
        fast = diagpass.transform(model)
        got = [run_sequential(fast, (x,)) for _ in range(3)]
    assert len(texts) == 1 and re.search(words, texts[0]), texts
    for value in got:
        assert torch.equal(value, model(x))
    assert fast.report.ran == "sequential"
    report = diagpass.explain(model, x)
    assert report.verdict == "sequential" and report.cells == 0
    with pytest.raises(diagpass.DiagpassError, match=words):
        run_sequential(diagpass.transform(model, strict=True), (x,))


def test_cells_option_that_matches_nothing_names_the_glob() -> None:
    model, inputs = ZOO["attribute"]()
    with collect_warnings() as texts:
        fast = fast_copy(model, cells="model.layerz.*")
        got = run_sequential(fast, inputs)
    assert len(texts) == 1 and "model.layerz.*" in texts[0], texts
    assert_tree_same(got, run_sequential(model, inputs), 1e-12, "output")


def test_one_segment() -> None:
    model, inputs = ZOO["one_segment"]()
    words = r"(?i)one segment|1 segment|no width"
    report = diagpass.explain(model, *inputs)
    assert report.verdict == "sequential" and report.segments == 1
    with collect_warnings() as texts:
        fast = diagpass.transform(copy.deepcopy(model), options={"compiler": "eager"})
        got = run_sequential(fast, inputs)
    assert len(texts) == 1 and re.search(words, texts[0]), texts
    assert fast.report.ran == "sequential"
    assert_tree_same(got, run_sequential(model, inputs), 1e-12, "output")
    with pytest.raises(diagpass.DiagpassError, match=words):
        run_sequential(diagpass.transform(model, strict=True), inputs)


def test_zero_length_input() -> None:
    """No tokens: split gives one empty segment, which the plain model can run."""
    model, _ = ZOO["stateless"]()
    x = torch.zeros(B, 0, D, dtype=torch.float64)
    expected = run_sequential(model, (x,))
    for calls_before in (0, 1):
        fast = fast_copy(model)
        for _ in range(calls_before):
            run_sequential(fast, (tokens(),))
        assert_tree_same(run_sequential(fast, (x,)), expected, 1e-12, "empty")


def test_zero_batch() -> None:
    model, _ = ZOO["list_states"]()
    x = torch.zeros(0, 4 * T, D, dtype=torch.float64)
    assert_same(model, (x,), ran=None)


def test_zero_length_input_that_the_plain_model_refuses() -> None:
    """No segments at all: the plain model's error, in its words."""
    model, _ = ZOO["reversed_segments"]()
    x = torch.zeros(B, 0, D, dtype=torch.float64)
    with pytest.raises(Exception) as plain:
        run_sequential(model, (x,))
    for calls_before in (0, 1):
        fast = fast_copy(model)
        for _ in range(calls_before):
            run_sequential(fast, (tokens(),))
        with pytest.raises(Exception) as raised:
            run_sequential(fast, (x,))
        assert "non-empty" in str(plain.value)
        assert re.search("non-empty|empty", str(raised.value)), raised.value


# -------------------------------------------------------------------------------- randomness


def test_dropout_in_training_mode_runs_sequentially_with_the_same_random_numbers() -> None:
    model, inputs = dropout_train()
    plain = copy.deepcopy(model)
    with collect_warnings() as texts:
        fast = fast_copy(model)
        for seed in (1, 2):
            torch.manual_seed(seed)
            expected = run_sequential(plain, inputs)
            torch.manual_seed(seed)
            got = run_sequential(fast, inputs)
            assert_tree_same(got, expected, 1e-12, f"seed {seed}")
            assert_state_same(fast.original, plain, 1e-12)
    assert len(texts) == 1 and re.search(r"(?i)random|dropout", texts[0]), texts
    assert re.search(r"layers\.\d", texts[0]), texts
    assert fast.report.batched_cells == 0


def test_dropout_in_training_mode_strict() -> None:
    model, inputs = dropout_train()
    fast = diagpass.transform(model, strict=True, options=forced())
    with pytest.raises(diagpass.DiagpassError, match=r"(?i)random|dropout"):
        run_sequential(fast, inputs)


def test_switching_to_evaluation_mode_gives_the_wavefront_and_back() -> None:
    model, inputs = dropout_train()
    plain, fast = copy.deepcopy(model), fast_copy(model)
    ran = []
    with collect_warnings():
        for training in (True, False, True, False):
            plain.train(training)
            fast.train(training)
            assert fast.original.training == training
            torch.manual_seed(3)
            expected = run_sequential(plain, inputs)
            torch.manual_seed(3)
            got = run_sequential(fast, inputs)
            assert_tree_same(got, expected, 1e-12, f"training={training}")
            ran.append(fast.report.batched_cells > 0)
    assert ran == [False, True, False, True]


class NoiseLayer(nn.Module):
    """Adds noise, in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        h, self.state = self.body(h + 0.1 * torch.randn_like(h), self.state)
        return h


def test_noise_in_a_layer_keeps_its_random_numbers() -> None:
    model = Loop([NoiseLayer() for _ in range(L)]).double().eval()
    plain, fast = copy.deepcopy(model), fast_copy(model)
    x = tokens()
    with collect_warnings() as texts:
        for seed in (1, 2):
            torch.manual_seed(seed)
            expected = run_sequential(plain, (x,))
            torch.manual_seed(seed)
            got = run_sequential(fast, (x,))
            assert_tree_same(got, expected, 1e-12, f"seed {seed}")
    assert len(texts) == 1 and re.search(r"(?i)random|randn", texts[0]), texts


# -------------------------------------------------------------------- control flow and .item()


class BranchLayer(nn.Module):
    """Looks at its data to decide what to do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Mix()
        self.state = torch.zeros(B, D, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        if h.sum() > 0:
            h = h * 0.5
        h, self.state = self.body(h, self.state)
        return h


class ItemLayer(BranchLayer):
    """Takes a number out of a tensor and computes with it."""

    def forward(self, h: Tensor) -> Tensor:
        scale = self.state.abs().sum().item()
        h, self.state = self.body(h * (1.0 + 0.1 * scale), self.state)
        return h


class ItemIntLayer(BranchLayer):
    """Compares a step tensor's value with a number: `if int(step) == 5`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, h: Tensor) -> Tensor:
        if self.step.item() == 5:
            h = h.sin()
        h, self.state = self.body(h, self.state)
        self.step += 1
        return h


class PrintLayer(BranchLayer):
    """Prints, which Dynamo cannot put into a graph."""

    def forward(self, h: Tensor) -> Tensor:
        print("a layer runs")
        h, self.state = self.body(h, self.state)
        return h


class NumpyLayer(BranchLayer):
    """Leaves for NumPy and comes back."""

    def forward(self, h: Tensor) -> Tensor:
        scale = float(self.state.numpy().sum())
        h, self.state = self.body(h * (1.0 + 0.01 * scale), self.state)
        return h


class TryLayer(BranchLayer):
    """Catches an exception that depends on the data."""

    def forward(self, h: Tensor) -> Tensor:
        try:
            if not bool((h.abs() < 3.0).all()):
                raise ValueError("large")
        except ValueError:
            h = h.clamp(-3.0, 3.0)
        h, self.state = self.body(h, self.state)
        return h


UNCAPTURABLE = {
    BranchLayer: r"(?i)data.dependent|branch",
    ItemIntLayer: r"(?i)item|data.dependent",
    TryLayer: r"(?i)data.dependent|branch|bool",
}


@pytest.mark.parametrize("layer", [BranchLayer, ItemLayer, ItemIntLayer, PrintLayer, NumpyLayer, TryLayer])
def test_what_cannot_be_captured_gives_the_plain_models_results(layer: type[nn.Module]) -> None:
    """Call after call, with data that takes every branch, batched or not."""
    model = Loop([layer() for _ in range(L)]).double().eval()
    plain, fast = copy.deepcopy(model), fast_copy(model)
    with collect_warnings() as texts:
        for call in range(5):
            x = tokens() * (-1) ** call
            assert_tree_same(run_sequential(fast, (x,)), run_sequential(plain, (x,)), 1e-12, f"call {call}")
            assert_state_same(fast.original, plain, 1e-12)
    assert len(texts) <= 1, texts
    if fast.report is None or fast.report.ran == "sequential":
        assert len(texts) == 1


@pytest.mark.parametrize("layer", UNCAPTURABLE)
def test_control_flow_on_data_is_named_with_the_users_line(layer: type[nn.Module]) -> None:
    words = UNCAPTURABLE[layer]
    model = Loop([layer() for _ in range(L)]).double().eval()
    x = tokens()
    with collect_warnings() as texts:
        run_sequential(fast_copy(model), (x,))
    assert len(texts) == 1 and re.search(words, texts[0]), texts
    assert re.search(r"test_bad_calls\.py.{0,12}\d+", texts[0]), texts[0]
    fast = diagpass.transform(copy.deepcopy(model), strict=True, options=forced())
    before = snapshot(fast.original)
    with pytest.raises(diagpass.CaptureError, match=words) as raised:
        run_sequential(fast, (x,))
    assert "test_bad_calls.py" in str(raised.value)
    assert_state_same(fast.original, before)
    report = diagpass.explain(model, x)
    assert report.verdict == "sequential"
    assert re.search(words, " ".join(report.notes) + str(report))


def test_sequential_fallback_prints_as_the_plain_model(capfd: pytest.CaptureFixture[str]) -> None:
    """Side effects happen as often as in the plain model, not once more for a failed capture."""
    model = Loop([PrintLayer() for _ in range(L)]).double().eval()
    x = tokens()
    run_sequential(copy.deepcopy(model), (x,))
    expected = capfd.readouterr().out
    fast = fast_copy(model)
    with collect_warnings():
        for _ in range(2):
            run_sequential(fast, (x,))
            assert capfd.readouterr().out == expected


# --------------------------------------------------------------------- non-tensor inputs, NaN


class ArgumentsLoop(nn.Module):
    """Takes about everything that is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mix() for _ in range(L)])

    def forward(
        self,
        x: Tensor,
        scale: float = 1.0,
        power: int = 1,
        *,
        mode: str = "tanh",
        names: tuple[str, ...] = (),
        extra: dict[str, Any] | None = None,
        reverse: bool = False,
    ) -> dict[str, Any]:
        """The arguments change what is computed."""
        state = [x.new_zeros(x.shape[0], D) for _ in self.layers]
        outs = []
        for h in x.split(T, dim=1):
            h = h * scale
            for i, layer in enumerate(self.layers):
                h, state[i] = layer(h, state[i])
            h = getattr(torch, mode)(h) ** power
            outs.append(h if extra is None else h + extra["bias"] * extra["times"])
        out = torch.cat(outs[::-1] if reverse else outs, dim=1)
        return {"out": out, "names": names, "mode": mode, "power": power}


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"scale": 0.5},
    {"scale": 0.75},
    {"power": 2},
    {"power": 3},
    {"mode": "sin"},
    {"names": ("a", "b")},
    {"extra": {"bias": torch.ones(D, dtype=torch.float64), "times": 2}},
    {"extra": {"bias": torch.full((D,), 2.0, dtype=torch.float64), "times": 3}},
    {"reverse": True},
]


def test_non_tensor_inputs_are_never_stale() -> None:
    model = ArgumentsLoop().double().eval()
    fast = fast_copy(model)
    x = tokens()
    for arguments in ARGUMENTS + ARGUMENTS[::-1]:
        expected = run_sequential(model, (x,), **arguments)
        got = run_sequential(fast, (x,), **arguments)
        assert_tree_same(got, expected, 1e-12, str(arguments))
        assert fast.report.ran == "wavefront"


def test_many_python_floats_do_not_fall_back() -> None:
    """Ten values of a Python float, more than Dynamo's limit of 8: right, and a wavefront, each time."""
    model = ArgumentsLoop().double().eval()
    fast = fast_copy(model)
    x = tokens()
    for i in range(10):
        arguments = {"scale": 0.3 + 0.05 * i}
        expected = run_sequential(model, (x,), **arguments)
        assert_tree_same(run_sequential(fast, (x,), **arguments), expected, 1e-12, str(arguments))
        assert fast.report.ran == "wavefront"


@pytest.mark.parametrize("name", ["attribute", "sdpa_eval", "gru_cells"])
def test_nan_inputs_give_nan_in_the_same_places(name: str) -> None:
    model, (x,) = ZOO[name]()
    x = x.clone()
    x[0, 4] = float("nan")
    x[1, 7, 2] = float("inf")
    plain, fast = copy.deepcopy(model), fast_copy(model)
    expected, got = run_sequential(plain, (x,)), run_sequential(fast, (x,))
    assert expected.isnan().any() and not expected.isnan().all()
    assert_tree_same(got, expected, 1e-12, "output")
    assert fast.report.ran == "wavefront"


def test_a_nan_in_one_cell_does_not_spread_to_the_cells_beside_it() -> None:
    """Cells of one batch do not see each other: a NaN in the last segment stays there."""
    model, (x,) = ZOO["list_states"]()
    x = x.clone()
    x[:, -T:] = float("nan")
    got = run_sequential(fast_copy(model), (x,))
    assert got[:, :-T].isfinite().all()
    assert got[:, -T:].isnan().all()


# -------------------------------------------------------------------------- views, subclasses


def test_non_contiguous_and_expanded_inputs() -> None:
    model, (x,) = ZOO["list_states"]()
    fast = fast_copy(model)
    variants = [
        x,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.repeat(1, 1, 2)[..., ::2],
        x[:1].expand(2, -1, -1),
    ]
    for variant in variants:
        expected = run_sequential(model, (variant,))
        with torch.no_grad():
            got = fast(variant)
        assert_tree_same(got, expected, 1e-12, str(variant.stride()))


def test_inference_mode_and_no_grad_and_grad_in_turn() -> None:
    model, (x,) = ZOO["list_states"]()
    fast = fast_copy(model)
    for _ in range(2):
        with torch.inference_mode():
            assert_tree_same(fast(x), model(x), 1e-12, "inference")
        with torch.no_grad():
            assert_tree_same(fast(x), model(x), 1e-12, "no_grad")
        assert_tree_same(fast(x), model(x), 1e-12, "grad")


def test_good_models_give_no_warning() -> None:
    for name in ("attribute", "buffer_copy_", "stacked_inplace", "hybrid", "embeddings"):
        model, inputs = ZOO[name]()
        with no_diagpass_warnings():
            run_sequential(fast_copy(model), inputs)


# ---------------------------------------------------------------------------- failing midway

FAIL = {"at": -1, "calls": 0, "error": RuntimeError}


@torch.library.custom_op("diagpass_tests::may_fail", mutates_args=())
def may_fail(x: Tensor) -> Tensor:
    """The identity, that raises at the call that FAIL says."""
    FAIL["calls"] += 1
    if FAIL["calls"] == FAIL["at"]:
        raise FAIL["error"]("planned failure")
    return x.clone()


@may_fail.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class FailingHead(nn.Module):
    """The failure sits in glue, after the layers of each segment."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.diagpass_tests.may_fail(x)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", ["buffer_copy_", "counters", "cache_object"])
def test_a_call_that_fails_midway_leaves_the_state_as_it_was(
    name: str, error: type[BaseException], compiler: str
) -> None:
    if compiler == "inductor" and (name != "buffer_copy_" or error is not RuntimeError):
        pytest.skip("one combination is enough for the compiled form")
    model, inputs = ZOO[name]()
    if name == "cache_object":
        model.layers.append(FailingLayer())
    else:
        model.head = FailingHead()
    FAIL.update(at=-1, calls=0, error=error)
    plain, fast = copy.deepcopy(model), fast_copy(model, compiler=compiler)
    run_sequential(plain, inputs)
    run_sequential(fast, inputs)
    assert fast.report.ran == "wavefront"
    before = snapshot(fast.original)
    FAIL.update(at=3, calls=0)
    # Inductor and Dynamo hand KeyboardInterrupt and MemoryError through unchanged, like the others
    with pytest.raises(error, match="planned failure"):
        run_sequential(fast, inputs)
    FAIL.update(at=-1, calls=0)
    assert_state_same(fast.original, before, where="after the failed call")
    expected, got = run_sequential(plain, inputs), run_sequential(fast, inputs)
    assert_tree_same(got, expected, 1e-10, "the next call")
    assert_state_same(fast.original, plain, 1e-10)


class FailingLayer(nn.Module):
    """A stateless layer of another type that may fail."""

    def forward(self, h: Tensor, cache: Any) -> Tensor:
        return torch.ops.diagpass_tests.may_fail(h)
