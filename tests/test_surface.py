"""The public surface: signatures, options, reports, attribute forwarding, the entry point."""

from __future__ import annotations

import copy
import inspect
import json
import warnings

import pytest
import torch
from torch import nn

import diagpass
from tests.helpers import (
    assert_state_same,
    assert_tree_same,
    collect_warnings,
    forced,
    run_sequential,
    snapshot,
)
from tests.models import ZOO, tokens
from tests.test_repeat import run_python

OPTIONS = ("compiler", "schedule", "weights", "cells", "max_width", "strict", "verify")


def test_public_names() -> None:
    for name in (
        "transform",
        "explain",
        "Report",
        "DiagpassError",
        "CaptureError",
        "BatchingError",
        "ChainError",
        "OptionError",
        "DiagpassWarning",
        "__version__",
    ):
        assert hasattr(diagpass, name), name
    for error in ("CaptureError", "BatchingError", "ChainError", "OptionError"):
        assert issubclass(getattr(diagpass, error), diagpass.DiagpassError)
    assert issubclass(diagpass.DiagpassWarning, Warning)
    signature = inspect.signature(diagpass.transform)
    assert list(signature.parameters) == [
        "model",
        "example_inputs",
        "strict",
        "verify",
        "options",
    ]
    for name in ("strict", "verify", "options"):
        assert signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    for name in set(diagpass.__all__) - {"__version__"}:
        assert getattr(diagpass, name).__doc__, name


# ------------------------------------------------------------------------------------ options


def test_an_unknown_option_lists_the_valid_ones() -> None:
    model, _ = ZOO["attribute"]()
    with pytest.raises(diagpass.OptionError, match="compilre") as raised:
        diagpass.transform(model, options={"compilre": "eager"})
    for name in OPTIONS:
        assert name in str(raised.value)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"compiler": "llvm"}, ("llvm", "inductor", "eager")),
        ({"schedule": "fast"}, ("fast", "auto", "wavefront", "sequential")),
        ({"weights": 3}, ("3", "share", "copy")),
        ({"max_width": 0}, ("0", "max_width")),
        ({"max_width": "wide"}, ("wide", "max_width")),
        ({"max_width": True}, ("True", "max_width")),
        ({"cells": 7}, ("7", "cells")),
        ({"strict": "yes"}, ("yes", "strict")),
    ],
)
def test_a_bad_value_names_option_value_and_choices(options: dict, words: tuple[str, ...]) -> None:
    model, _ = ZOO["attribute"]()
    with pytest.raises(diagpass.OptionError) as raised:
        diagpass.transform(model, options=options)
    for word in words:
        assert word in str(raised.value)


def test_not_a_module() -> None:
    with pytest.raises((diagpass.DiagpassError, TypeError), match=r"function|Module"):
        diagpass.transform(lambda x: x)


def test_transforming_twice_is_transforming_once() -> None:
    model, inputs = ZOO["list_states"]()
    fast = diagpass.transform(diagpass.transform(model, options=forced()), options=forced())
    assert fast.original is model
    assert_tree_same(run_sequential(fast, inputs), run_sequential(model, inputs), 1e-12, "twice")


# ------------------------------------------------------------------ what the result looks like


def test_the_result_is_a_module_with_the_models_signature_and_attributes() -> None:
    model, inputs = ZOO["embeddings"]()
    model.some_number = 42
    fast = diagpass.transform(model, options=forced())
    assert isinstance(fast, nn.Module)
    assert fast.original is model
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert fast.some_number == 42
    assert fast.embed is model.embed
    assert fast.layers[1].table is model.layers[1].table
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing
    plain = copy.deepcopy(model)
    expected = run_sequential(plain, inputs, scale=0.5)
    assert_tree_same(run_sequential(fast, inputs, scale=0.5), expected, 1e-12, "keyword")
    expected = run_sequential(plain, inputs, scale=0.5)
    by_name = run_sequential(fast, (), ids=inputs[0], scale=0.5)
    assert_tree_same(by_name, expected, 1e-12, "all by name")


def test_methods_of_the_model_can_be_called() -> None:
    model, inputs = ZOO["attribute_none"]()
    fast = diagpass.transform(model, options=forced())
    run_sequential(fast, inputs)
    assert model.layers[0].state is not None
    fast.reset()
    assert model.layers[0].state is None


@pytest.mark.parametrize("name", ["attribute", "buffer_copy_", "tied_some", "batchnorm_eval"])
def test_state_dict_and_names_are_the_models(name: str) -> None:
    model, inputs = ZOO[name]()
    keys = list(model.state_dict())
    parameters = [key for key, _ in model.named_parameters()]
    buffers = [key for key, _ in model.named_buffers()]
    fast = diagpass.transform(model, options=forced())
    for _ in range(2):
        assert list(fast.state_dict()) == keys
        assert list(model.state_dict()) == keys
        assert [key for key, _ in fast.named_parameters()] == parameters
        assert [key for key, _ in fast.named_buffers()] == buffers
        run_sequential(fast, inputs)
    assert not fast.load_state_dict(model.state_dict()).missing_keys


def test_training_mode_is_the_models() -> None:
    model, _ = ZOO["sdpa_eval"]()
    fast = diagpass.transform(model)
    assert not fast.training
    assert fast.train() is fast
    assert model.training and fast.training and model.layers[0].training
    fast.eval()
    assert not model.training and not fast.training


def test_hooks_on_the_transformed_module_and_on_the_model_run() -> None:
    model, inputs = ZOO["list_states"]()
    expected = run_sequential(model, inputs)
    fast = diagpass.transform(model, options=forced())
    handle = fast.register_forward_hook(lambda module, args, out: out + 1.0)
    assert_tree_same(run_sequential(fast, inputs), expected + 1.0, 1e-12, "hook on fast")
    handle.remove()
    model.register_forward_hook(lambda module, args, out: out + 2.0)
    assert_tree_same(run_sequential(fast, inputs), expected + 2.0, 1e-12, "hook on the model")


def test_repr_names_the_model() -> None:
    model, _ = ZOO["attribute"]()
    assert "AttributeLayer" in repr(diagpass.transform(model))


# ------------------------------------------------------------------------ capture and explain


@pytest.mark.parametrize("name", ["attribute", "buffer_copy_", "counters", "cache_object"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_example_inputs_capture_now_and_leave_the_state(name: str, as_dict: bool) -> None:
    model, inputs = ZOO[name]()
    plain = copy.deepcopy(model)
    before = snapshot(model)
    example = {"x": inputs[0]} if as_dict else inputs
    with torch.no_grad():  # as the call below: a call that needs gradients is another capture
        fast = diagpass.transform(model, example, options=forced())
    assert_state_same(model, before)
    assert fast.report is not None and fast.report.captures >= 1
    assert fast.report.waves == 6 or name == "cache_object"
    captures = fast.report.captures
    arguments = ((), {"x": inputs[0]}) if as_dict else (inputs, {})
    expected = run_sequential(plain, *arguments[:1], **arguments[1])
    assert_tree_same(run_sequential(fast, *arguments[:1], **arguments[1]), expected, 1e-12, "call")
    assert fast.report.captures == captures
    assert_state_same(fast.original, plain, 1e-12)


@pytest.mark.parametrize("name", ["buffer_copy_", "attribute", "stacked_buffer_dim1"])
def test_capturing_with_gradients_enabled_leaves_the_state(name: str) -> None:
    """In grad mode, a buffer that is written in place would begin to require gradients."""
    model, inputs = ZOO[name]()
    before = snapshot(model)
    diagpass.transform(model, inputs, options=forced())
    assert_state_same(model, before)
    diagpass.explain(model, *inputs)
    assert_state_same(model, before)


def test_example_inputs_under_strict_raise_at_once() -> None:
    model, inputs = ZOO["rmt_like"]()
    with pytest.raises(diagpass.ChainError):
        diagpass.transform(model, inputs, strict=True)


@pytest.mark.parametrize(
    "name", ["attribute", "buffer_copy_", "counters", "cache_object", "inplace_input", "rmt_like"]
)
def test_explain_leaves_state_inputs_and_random_numbers_untouched(name: str) -> None:
    model, inputs = ZOO[name]()
    before, held = snapshot(model), [x.clone() for x in inputs]
    rng = torch.get_rng_state()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    report = diagpass.explain(model, *inputs)
    assert_state_same(model, before)
    assert all(map(torch.equal, inputs, held))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert report.ran is None or not report.batched_cells


def test_explain_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.compile_fx as compile_fx

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("explain compiled something")

    for name in ("compile_fx", "compile_fx_inner"):
        monkeypatch.setattr(compile_fx, name, forbidden)
    monkeypatch.setattr(torch._inductor, "compile", forbidden)
    model, inputs = ZOO["attribute"]()
    assert diagpass.explain(model, *inputs).verdict == "wavefront"


def test_explain_takes_keywords_and_a_transformed_model() -> None:
    model, inputs = ZOO["embeddings"]()
    first = diagpass.explain(model, ids=inputs[0], scale=0.5)
    second = diagpass.explain(diagpass.transform(model), *inputs, scale=0.5)
    assert first.to_dict() == second.to_dict()
    assert first.waves == 6


def test_report_fields() -> None:
    model, inputs = ZOO["hybrid"]()
    report = diagpass.explain(model, *inputs)
    assert isinstance(report, diagpass.Report)
    for name in ("segments", "layers", "cells", "waves", "max_width"):
        assert type(getattr(report, name)) is int, name
    assert type(report.mean_width) is float
    assert isinstance(report.kinds, list) and len(report.kinds) >= 2
    assert (report.segments, report.layers, report.cells) == (4, 4, 16)
    assert (report.waves, report.max_width) == (7, 4)
    assert report.mean_width == pytest.approx(16 / 7)
    assert report.verdict == "wavefront" and report.chain is None
    text = str(report)
    for words in ("wavefront", "16", "7"):
        assert words in text
    told = report.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert {"segments", "layers", "cells", "waves", "max_width", "mean_width"} <= set(told)
    assert set(told["grid"][0]) >= {"segment", "layer", "path", "kind", "wave"}
    assert {cell["path"] for cell in told["grid"]} == {f"layers.{i}" for i in range(4)}


def test_report_after_a_call() -> None:
    model, inputs = ZOO["attribute"]()
    fast = diagpass.transform(model, options=forced())
    assert fast.report is None or fast.report.ran is None
    run_sequential(fast, inputs)
    report = fast.report
    assert (report.ran, report.plans) == ("wavefront", 1)
    # one kind, waves of 1, 2, 3, 3, 2, 1: all but the two corner cells
    assert report.batched_cells == 10
    assert "wavefront" in str(report)
    json.dumps(report.to_dict())
    compile(report.code, "emitted", "exec")


def test_disabled_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIAGPASS_DISABLE", "1")
    model, inputs = ZOO["rmt_like"]()
    fast = diagpass.transform(model, inputs, strict=True)  # would raise ChainError
    with collect_warnings() as texts:
        assert torch.equal(run_sequential(fast, inputs), run_sequential(model, inputs))
    assert not texts
    assert fast.report is None or fast.report.captures == 0
    monkeypatch.delenv("DIAGPASS_DISABLE")
    with pytest.raises(diagpass.ChainError):
        run_sequential(fast, inputs)


# ------------------------------------------------------------------------------------ backend

BACKEND = """
import sys, warnings
import torch
from tests.models import ZOO
assert not any(name.split(".")[0] == "diagpass" for name in sys.modules)
warnings.simplefilter("error")
model, inputs = ZOO["attribute"]()
plain, _ = ZOO["attribute"]()
compiled = torch.compile(model, backend="diagonal", options={"compiler": "eager"})
products = []
with torch.no_grad():
    for _ in range(3):
        expected, got = plain(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
        for a, b in zip(model.layers, plain.layers):
            torch.testing.assert_close(a.state, b.state, rtol=1e-12, atol=1e-14)
    for run in (plain, compiled):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(*inputs)
        names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
        products.append(sum(event.name in names for event in profile.events()))
assert "diagpass" in sys.modules
print("products", *products)
"""


def test_the_backend_is_found_by_its_entry_point_without_an_import() -> None:
    plain, fast = map(int, run_python(BACKEND).split("products")[1].split())
    # 3 linears in each of 12 cells, in one product for each of 6 waves; embed and head per segment
    assert plain == 3 * 12 + 2 * 4
    assert fast <= 3 * 6 + 2 * 4


def _backend(model: nn.Module, **options: object) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="diagonal", options={"compiler": "eager", **options})


@pytest.mark.parametrize(
    "name", ["attribute", "buffer_copy_", "first_segment_flag", "nested_io", "hybrid", "stateless"]
)
def test_the_backend_gives_the_plain_results(name: str) -> None:
    model, inputs = ZOO[name]()
    plain = copy.deepcopy(model)
    compiled = _backend(model, schedule="wavefront")
    for call in range(3):
        expected, got = run_sequential(plain, inputs), run_sequential(compiled, inputs)
        assert_tree_same(got, expected, 1e-12, f"call {call}")
        assert_state_same(model, plain, 1e-12)


def test_the_backend_leaves_storage_alone_by_default() -> None:
    model, inputs = ZOO["attribute"]()
    pointers = [p.data_ptr() for p in model.parameters()]
    run_sequential(_backend(model), inputs)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_the_backend_follows_edits() -> None:
    model, inputs = ZOO["attribute"]()
    plain = copy.deepcopy(model)
    compiled = _backend(model, schedule="wavefront")
    for step in range(4):
        expected, got = run_sequential(plain, inputs), run_sequential(compiled, inputs)
        assert_tree_same(got, expected, 1e-12, f"step {step}")
        for each in (plain, model):
            weight = each.layers[1].body.read.weight
            if step == 0:
                weight.data.mul_(0.5)
            elif step == 1:
                weight.data = weight.data * 0.5
            elif step == 2:
                each.layers[1].body.read.weight = nn.Parameter(weight.detach() * 0.5)


def _inner(error: BaseException) -> BaseException:
    assert isinstance(error, torch._dynamo.exc.BackendCompilerFailed), type(error)
    return error.inner_exception


def test_the_backend_raises_with_a_diagpass_error_inside() -> None:
    model, inputs = ZOO["rmt_like"]()
    with pytest.raises(Exception) as raised:
        run_sequential(_backend(model, strict=True), inputs)
    inner = _inner(raised.value)
    assert isinstance(inner, diagpass.ChainError)
    assert "layers.2" in str(inner) and "layers.0" in str(inner)


def test_the_backend_checks_its_options() -> None:
    model, inputs = ZOO["attribute"]()
    with pytest.raises(Exception) as raised:
        run_sequential(_backend(model, max_widht=3), inputs)
    error = raised.value
    inner = error if isinstance(error, diagpass.DiagpassError) else _inner(error)
    assert isinstance(inner, diagpass.OptionError)
    assert "max_widht" in str(inner) and "max_width" in str(inner)


def test_the_backend_runs_a_chain_as_it_stands_with_one_warning() -> None:
    model, inputs = ZOO["rmt_like"]()
    expected = run_sequential(model, inputs)
    with collect_warnings() as texts:
        compiled = _backend(model)
        for _ in range(3):
            assert_tree_same(run_sequential(compiled, inputs), expected, 1e-12, "call")
    assert len(texts) == 1 and "layers.2" in texts[0], texts


def test_the_backend_names_a_graph_break() -> None:
    from tests.test_bad_calls import BranchLayer, Loop

    model = Loop([BranchLayer() for _ in range(3)]).double().eval()
    plain = copy.deepcopy(model)
    x = tokens()
    with collect_warnings() as texts:
        compiled = _backend(model)
        for sign in (1, -1):
            expected = run_sequential(plain, (sign * x,))
            assert_tree_same(run_sequential(compiled, (sign * x,)), expected, 1e-12, "call")
    assert len(texts) == 1, texts
    assert "test_bad_calls.py" in texts[0]


def test_importing_is_quiet_and_patches_nothing() -> None:
    """Importing diagpass warns of nothing and leaves Dynamo's settings as they were."""
    code = """
import warnings; warnings.simplefilter("error", UserWarning)
import torch
import torch._dynamo
before = torch._dynamo.config.get_config_copy()
import diagpass
assert torch._dynamo.config.get_config_copy() == before
assert "transformers" not in __import__("sys").modules
assert "matplotlib" not in __import__("sys").modules
print(diagpass.__version__)
"""
    assert run_python(code).strip()


def test_the_librarys_dynamo_settings_do_not_leak() -> None:
    model, inputs = ZOO["counters"]()
    before = torch._dynamo.config.get_config_copy()
    run_sequential(diagpass.transform(model, options=forced()), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diagpass.explain(*ZOO["rmt_like"]()[:1], *ZOO["rmt_like"]()[1])
    assert torch._dynamo.config.get_config_copy() == before
