"""Checkpoints of a transformed model: safetensors, save_pretrained, torch.save, copies."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import diagpass
from tests.helpers import assert_state_same, assert_tree_same, forced, run_sequential
from tests.models import ZOO

WEIGHTS = ("share", "copy")


def _pair(name: str, weights: str) -> tuple[nn.Module, nn.Module, tuple]:
    """A plain model, the transformed one after a call, and the inputs."""
    model, inputs = ZOO[name]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced(weights=weights))
    run_sequential(plain, inputs)
    run_sequential(fast, inputs)
    assert fast.report.batched_cells > 0
    return plain, fast, inputs


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["attribute", "buffer_copy_", "tied_linears", "tied_some"])
def test_safetensors_save_model_round_trip(name: str, weights: str, tmp_path: Path) -> None:
    plain, fast, _ = _pair(name, weights)
    save_model(plain, str(tmp_path / "plain"))
    save_model(fast.original, str(tmp_path / "fast"))
    expected, got = load_file(tmp_path / "plain"), load_file(tmp_path / "fast")
    assert sorted(got) == sorted(expected)
    fresh, _ = ZOO[name]()
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    load_model(fresh, str(tmp_path / "fast"))
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[key], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_safetensors_accepts_the_transformed_module_itself(weights: str, tmp_path: Path) -> None:
    plain, fast, _ = _pair("attribute", weights)
    save_model(fast, str(tmp_path / "fast"))
    assert sorted(load_file(tmp_path / "fast")) == sorted(plain.state_dict())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_safetensors_save_file_of_the_state_dict(weights: str, tmp_path: Path) -> None:
    """save_file refuses tensors that share storage, so a state dict must not hold such."""
    plain, fast, _ = _pair("attribute", weights)
    save_file(fast.state_dict(), str(tmp_path / "fast"))
    loaded = load_file(tmp_path / "fast")
    for key, value in plain.state_dict().items():
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("weights", WEIGHTS)
def test_torch_save_of_one_layer_is_not_the_whole_stack(weights: str) -> None:
    plain, fast, _ = _pair("attribute", weights)
    sizes = []
    for owner in (plain, fast.original):
        stream = io.BytesIO()
        torch.save(owner.layers[1].state_dict(), stream)
        sizes.append(len(stream.getvalue()))
    assert sizes[1] <= 1.2 * sizes[0], sizes


@pytest.mark.parametrize("weights", WEIGHTS)
def test_torch_save_of_the_state_dict_is_no_larger(weights: str) -> None:
    plain, fast, _ = _pair("attribute", weights)
    sizes, loaded = [], []
    for owner in (plain, fast):
        stream = io.BytesIO()
        torch.save(owner.state_dict(), stream)
        sizes.append(len(stream.getvalue()))
        loaded.append(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
    assert sizes[1] <= 1.2 * sizes[0], sizes
    assert list(loaded[1]) == list(loaded[0])
    fresh, _ = ZOO["attribute"]()
    fresh.load_state_dict(loaded[1])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["attribute", "tied_linears", "counters"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_the_transformed_module_work(name: str, weights: str, how: str) -> None:
    """A copy gives the plain model's next results, and does not share weights with the first."""
    plain, fast, inputs = _pair(name, weights)
    if how == "deepcopy":
        other = copy.deepcopy(fast)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fast))
    else:
        stream = io.BytesIO()
        torch.save(fast, stream)
        other = torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    with torch.no_grad():
        fast.original.head.weight.zero_()
        for parameter in fast.original.layers[0].parameters():
            parameter.zero_()
    expected = run_sequential(plain, inputs)
    assert_tree_same(run_sequential(other, inputs), expected, 1e-12, how)
    assert other.report.ran == "wavefront"
    assert_state_same(other.original, plain, 1e-12)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_copy_of_the_original_alone_works(weights: str) -> None:
    """The model itself, deep-copied or pickled after transform, is the plain model."""
    plain, fast, inputs = _pair("attribute", weights)
    copies = [copy.deepcopy(fast.original), pickle.loads(pickle.dumps(fast.original))]
    expected = run_sequential(plain, inputs)
    for other in copies:
        assert_tree_same(run_sequential(other, inputs), expected, 1e-12, "copy")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_tied_parameters_stay_tied(weights: str) -> None:
    _, fast, _ = _pair("tied_linears", weights)
    matrices = [layer.read.weight for layer in fast.original.layers]
    assert all(matrix is matrices[0] for matrix in matrices)


def test_save_pretrained_of_a_wrapped_base(tmp_path: Path) -> None:
    """`save_pretrained` of the Hugging Face model inside writes its whole, loadable self."""
    from examples import armt

    model, inputs = armt.build(layers=2, segments=3, d_model=32, heads=2, dtype=torch.float64)
    fast = diagpass.transform(model, options=forced())
    run_sequential(fast, inputs)
    base = next(m for m in fast.original.modules() if hasattr(m, "save_pretrained"))
    base.save_pretrained(tmp_path)
    saved: dict[str, torch.Tensor] = {}
    for file in sorted(tmp_path.glob("*.safetensors")):
        saved.update(load_file(file))
    for key, value in base.state_dict().items():
        if key in saved:
            assert torch.equal(saved[key], value), key
    missing = set(base.state_dict()) - set(saved)
    tied = {key for key in missing if "lm_head" in key}
    assert missing == tied, missing


def test_checkpoint_of_the_plain_model_loads_into_the_transformed_one() -> None:
    model, inputs = ZOO["attribute"]()
    donor, _ = ZOO["attribute"]()
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.mul_(0.7)
    fast = diagpass.transform(model, options=forced())
    run_sequential(fast, inputs)
    fast.load_state_dict(donor.state_dict())
    for layer, other in zip(fast.original.layers, donor.layers, strict=True):
        other.state = layer.state.clone()
    assert_tree_same(run_sequential(fast, inputs), run_sequential(donor, inputs), 1e-12, "loaded")
