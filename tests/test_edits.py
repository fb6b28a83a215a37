"""What a user does to the model after `transform` is seen by the next call, never a stale answer.

Each test makes the same edit to the transformed model and to a plain copy and compares the next two
calls, state included. The edit comes after a call, so that plan and stacked weights exist.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import diagpass
from tests.helpers import (
    assert_state_same,
    assert_tree_same,
    collect_warnings,
    forced,
    leaves,
    run_sequential,
    snapshot,
)
from tests.models import ZOO, D, L

Edit = Callable[[nn.Module], None]
WEIGHTS = ("share", "copy")


def _in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9).add_(0.01)


def _one_layer_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        model.layers[1].body.read.weight.mul_(-1.0)


def _data_in_place(model: nn.Module) -> None:
    for parameter in model.layers[1].parameters():
        parameter.data.mul_(0.5)


def _data_item(model: nn.Module) -> None:
    model.layers[2].body.inp.weight.data[1, 2] = 3.0


def _data_replaced(model: nn.Module) -> None:
    for parameter in model.layers[1].parameters():
        parameter.data = parameter.data * 0.5


def _data_replaced_everywhere(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5


def _transposed(model: nn.Module) -> None:
    for layer in model.layers:
        layer.body.read.weight.data = layer.body.read.weight.data.t()


def _transposed_in_one_layer(model: nn.Module) -> None:
    model.layers[1].body.read.weight.data = model.layers[1].body.read.weight.data.t()


def _numpy_alias(model: nn.Module) -> None:
    model.layers[1].body.inp.weight.detach().numpy()[:] *= 0.5


def _other_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value * 0.8 + 0.01 if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }


def _load(model: nn.Module) -> None:
    model.load_state_dict(_other_weights(model))


def _load_assign(model: nn.Module) -> None:
    model.load_state_dict(_other_weights(model), assign=True)


def _load_one_layer(model: nn.Module) -> None:
    model.layers[1].load_state_dict(_other_weights(model.layers[1]))


def _new_parameter(model: nn.Module) -> None:
    model.layers[1].body.read.weight = nn.Parameter(torch.eye(D, dtype=torch.float64))


def _swap_layers(model: nn.Module) -> None:
    model.layers[0], model.layers[2] = model.layers[2], model.layers[0]


def _replaced_linear(model: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model.layers[1].body.read = nn.Linear(D, D).double()


def _replaced_by_another_type(model: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model.layers[1].body.read = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, D))
        model.layers[1].body.read.double()


def _replaced_layer(model: nn.Module) -> None:
    model.layers[1] = copy.deepcopy(model.layers[0])


def _another_layer(model: nn.Module) -> None:
    model.layers.append(copy.deepcopy(model.layers[0]))


def _one_layer_less(model: nn.Module) -> None:
    del model.layers[1]


def _replaced_head(model: nn.Module) -> None:
    model.head = nn.Identity()


class Lora(nn.Module):
    """A low-rank addition around a linear layer, as one would write it by hand."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


def _lora(model: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for layer in model.layers:
            layer.body.inp = Lora(layer.body.inp).double()


def _lora_in_one_layer(model: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model.layers[2].body.inp = Lora(model.layers[2].body.inp).double()


def _peft(model: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        config = peft.LoraConfig(r=2, target_modules=["inp", "write"], lora_dropout=0.0)
        peft.inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    model.double().eval()


def _forward_hook(model: nn.Module) -> None:
    model.layers[1].register_forward_hook(lambda module, args, out: out * 1.25)


def _pre_hook(model: nn.Module) -> None:
    model.layers[0].body.inp.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


def _model_hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, args, out: out + 1.0)


def _state_set(model: nn.Module) -> None:
    for i, layer in enumerate(model.layers):
        layer.state = torch.full_like(layer.state, 0.1 * (i + 1))


def _tie(model: nn.Module) -> None:
    model.layers[2].body.read.weight = model.layers[0].body.read.weight


def _freeze(model: nn.Module) -> None:
    model.layers[0].requires_grad_(False)


def _attribute(model: nn.Module) -> None:
    model.layers[1].body.norm.eps = 0.5


def _patched_method(model: nn.Module) -> None:
    body = model.layers[1].body
    body.forward = lambda h, m: (h.sin(), m * 0.5)


def _to_and_back(model: nn.Module) -> None:
    model.float()
    model.double()
    for layer in model.layers:
        layer.state = layer.state.double()


def _share_memory(model: nn.Module) -> None:
    model.share_memory()


EDITS: dict[str, Edit] = {
    name.removeprefix("_"): edit
    for name, edit in list(globals().items())
    if name.startswith("_")
    and callable(edit)
    and getattr(edit, "__annotations__", {}).get("return") == "None"
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("edit", EDITS)
def test_the_next_call_sees_the_edit(edit: str, weights: str) -> None:
    model, inputs = ZOO["attribute"]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced(weights=weights))
    run_sequential(plain, inputs)
    unedited = run_sequential(fast, inputs)
    EDITS[edit](plain)
    EDITS[edit](fast.original)
    for call in range(2):
        expected, got = run_sequential(plain, inputs), run_sequential(fast, inputs)
        assert_tree_same(got, expected, 1e-12, f"call {call} after the edit")
        assert_state_same(fast.original, plain, 1e-12)
    assert fast.report.ran == "wavefront", fast.report.notes
    assert fast.report.batched_cells > 0
    assert unedited.shape == got.shape


@pytest.mark.parametrize("weights", WEIGHTS)
def test_edits_one_after_the_other(weights: str) -> None:
    """In place, then assigned, then in place again: what was detached once is followed again."""
    model, inputs = ZOO["attribute"]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced(weights=weights))
    steps = [_in_place, _load_assign, _in_place, _data_replaced, _data_in_place, _load, _in_place]
    for step in steps:
        for each in (plain, fast.original):
            step(each)
        expected, got = run_sequential(plain, inputs), run_sequential(fast, inputs)
        assert_tree_same(got, expected, 1e-12, step.__name__)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("through", ["original", "fast"])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.half, 2e-2), (torch.bfloat16, 1e-1)])
def test_another_dtype(dtype: torch.dtype, rtol: float, through: str, weights: str) -> None:
    """`.to(dtype)` and `.half()`: parameters leave the stack and results follow."""
    model, (x,) = ZOO["attribute_none"]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced(weights=weights))
    run_sequential(plain, (x,))
    run_sequential(fast, (x,))
    for each in (plain, fast if through == "fast" else fast.original):
        if dtype == torch.half:
            each.half()
        else:
            each.to(dtype)
    expected, got = (run_sequential(each, (x.to(dtype),)) for each in (plain, fast))
    assert_tree_same(got, expected, rtol, str(dtype))
    assert_state_same(fast.original, plain, rtol)
    for (name, a), (_, b) in zip(fast.original.named_parameters(), plain.named_parameters(), strict=True):
        assert a.dtype == dtype and torch.equal(a, b), name


@pytest.mark.parametrize("weights", WEIGHTS)
def test_calls_leave_the_parameters_alone(weights: str) -> None:
    """Same objects, same values, same names, before and after."""
    model, inputs = ZOO["tied_linears"]()
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    fast = diagpass.transform(model, options=forced(weights=weights))
    for _ in range(2):
        run_sequential(fast, inputs)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity, f"{name} is another object"
        assert torch.equal(after[name], value), name


def test_copy_leaves_the_storage_alone() -> None:
    model, inputs = ZOO["attribute"]()
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    fast = diagpass.transform(model, options=forced(weights="copy"))
    run_sequential(fast, inputs)
    assert fast.report.batched_cells > 0
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers


def test_share_holds_the_weights_once() -> None:
    """The layers' parameters lie side by side, as rows of one stack, each aligned: no second copy."""
    model, inputs = ZOO["attribute"]()
    fast = diagpass.transform(model, options=forced(weights="share"))
    run_sequential(fast, inputs)
    at = sorted(layer.body.read.weight.data_ptr() for layer in model.layers)
    assert [b - a for a, b in itertools.pairwise(at)] == [-(-D * D * 8 // 64) * 64] * (L - 1)


def test_share_is_seen_by_the_plain_model_too() -> None:
    """`fast.original` run as it stands gives the plain results after sharing and editing."""
    model, inputs = ZOO["attribute"]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced(weights="share"))
    run_sequential(fast, inputs)
    run_sequential(plain, inputs)
    _in_place(plain)
    _in_place(fast.original)
    expected, got = run_sequential(plain, inputs), run_sequential(fast.original, inputs)
    assert_tree_same(got, expected, 1e-12, "plain run of the original")


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["tied_linears", "tied_some", "shared_module_list", "embeddings"])
def test_tied_parameters_follow_one_edit(name: str, weights: str) -> None:
    model, inputs = ZOO[name]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced(weights=weights))
    run_sequential(plain, inputs)
    run_sequential(fast, inputs)
    for each in (plain, fast.original):
        with torch.no_grad():
            next(each.layers[0].parameters()).mul_(0.5)
            list(each.layers[0].parameters())[2].add_(0.1)
    expected, got = run_sequential(plain, inputs), run_sequential(fast, inputs)
    assert_tree_same(got, expected, 1e-12, name)
    ids = [[id(p) for p in m.parameters()] for m in (plain, fast.original)]
    assert len(ids[0]) == len(ids[1])


def test_a_hook_that_records_sees_every_cell() -> None:
    """A hook with a Python side effect is called as often as in the plain model."""
    model, inputs = ZOO["attribute"]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced())
    run_sequential(plain, inputs)
    run_sequential(fast, inputs)
    seen: list[list[Tensor]] = [[], []]
    for each, record in ((plain, seen[0]), (fast.original, seen[1])):
        each.layers[1].register_forward_hook(
            lambda module, args, out, record=record: record.append(out.detach())
        )
    with collect_warnings():
        for _ in range(2):
            expected, got = run_sequential(plain, inputs), run_sequential(fast, inputs)
            assert_tree_same(got, expected, 1e-12, "output")
    assert_tree_same(seen[1], seen[0], 1e-12, "recorded")


def test_a_removed_hook_is_gone() -> None:
    model, inputs = ZOO["list_states"]()
    fast = diagpass.transform(model, options=forced())
    expected = run_sequential(model, inputs)
    handle = model.layers[1].register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    hooked = run_sequential(fast, inputs)
    assert not torch.equal(hooked, expected)
    handle.remove()
    assert_tree_same(run_sequential(fast, inputs), expected, 1e-12, "after removal")


def test_buffers_that_are_constants_may_be_edited() -> None:
    """A mask or running statistics that no call writes may be stacked, and must be followed."""
    model, inputs = ZOO["batchnorm_eval"]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced())
    run_sequential(plain, inputs)
    run_sequential(fast, inputs)
    for step in range(3):
        for each in (plain, fast.original):
            bn = each.layers[1].bn
            if step == 0:
                bn.running_mean.add_(1.0)
            elif step == 1:
                bn.running_var = torch.full_like(bn.running_var, 0.5)
            else:
                bn.running_var.data.mul_(3.0)
        expected, got = run_sequential(plain, inputs), run_sequential(fast, inputs)
        assert_tree_same(got, expected, 1e-12, f"step {step}")


def test_two_transforms_of_one_model() -> None:
    """Both see each other's edits: the model is one."""
    model, inputs = ZOO["list_states"]()
    fasts = [diagpass.transform(model, options=forced(weights=weights)) for weights in WEIGHTS]
    fasts.append(diagpass.transform(model, options=forced(weights="share")))
    for _ in range(2):
        expected = run_sequential(model, inputs)
        for fast in fasts:
            assert_tree_same(run_sequential(fast, inputs), expected, 1e-12, "either")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)


def test_the_inductor_program_follows_edits_too() -> None:
    model, inputs = ZOO["attribute"]()
    plain = copy.deepcopy(model)
    fast = diagpass.transform(model, options=forced(compiler="inductor"))
    for step in (_in_place, _data_in_place, _load_assign, _new_parameter):
        for each in (plain, fast.original):
            step(each)
        expected, got = run_sequential(plain, inputs), run_sequential(fast, inputs)
        assert_tree_same(got, expected, 1e-10, step.__name__)


def test_moving_to_another_device_and_back() -> None:
    """`.to("meta")` loses the values; loading them again gives a model that runs."""
    model, inputs = ZOO["list_states"]()
    weights = copy.deepcopy(model.state_dict())
    expected = run_sequential(model, inputs)
    fast = diagpass.transform(model, options=forced())
    run_sequential(fast, inputs)
    fast.to("meta")
    assert all(p.is_meta for p in fast.original.parameters())
    fast.to_empty(device="cpu")
    fast.load_state_dict(weights)
    assert_tree_same(run_sequential(fast, inputs), expected, 1e-12, "after the journey")


def test_state_is_no_view_of_something_larger() -> None:
    """State left on the model is storage of its own size, so that saving it saves just it."""
    model, inputs = ZOO["attribute"]()
    fast = diagpass.transform(model, options=forced())
    run_sequential(fast, inputs)
    for path, leaf in leaves(snapshot(model)):
        assert not isinstance(leaf, Tensor) or leaf.numel() >= 0, path
    for layer in model.layers:
        held = layer.state.untyped_storage().nbytes()
        assert held <= 2 * layer.state.numel() * layer.state.element_size(), held
