"""Dynamo's fake results, each distinct call worked out once a capture.

Dynamo runs every operation that it meets on fake tensors, to know the result's size and type. A
segment-recurrent model calls the same operations on tensors of the same sizes once a layer and segment.

Where a call made nothing but ordinary tensors, without a gradient, the next one with the same arguments is
given tensors of the same geometry in the same memory: an argument's, or their own. Anything else is worked
out again: gradients, writes, numbers that change, transformations of functions, operations that PyTorch
does not bring itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch._dispatch.python import no_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.autograd import forward_ad

from diagpass.capture.plain import constant, is_plain, writes
from diagpass.replaced import Replaced

__all__ = ["known_results"]


@dataclasses.dataclass(frozen=True)
class _Made:
    """A tensor that a call makes: the argument that it is, or in whose memory it lies, and its geometry."""

    itself: int | None
    memory: int | None
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self, mode: FakeTensorMode, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.itself is not None:
            return tensors[self.itself]
        if self.memory is None:
            bare = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device="meta")
        else:
            storage: Any = tensors[self.memory].untyped_storage()
            bare = torch.empty(0, dtype=self.dtype, device="meta")
            bare.set_(storage, self.offset, self.size, self.stride)
        return FakeTensor(mode, bare, self.device)


Result = tuple[pytree.TreeSpec, tuple[_Made, ...]]
Known = dict[Hashable, "Result | None"]  # per call: what it makes, or None if it is to be worked out


@contextlib.contextmanager
def known_results() -> Iterator[None]:
    """Inside, what Dynamo captures in this thread has its fake results from here."""
    with _runner.inside({}):
        yield


def _run_node(tracer: Any, node: fx.Node, args: Any, kwargs: Any, nnmodule: Any) -> Any:
    """Stands for Dynamo's ``run_node``."""
    run = _runner.original("run_node")
    known = _runner.state
    if known is None or writes(node) or not is_plain(node) or not _is_usual(tracer):
        return run(tracer, node, args, kwargs, nnmodule)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
    key = _key(node, leaves, spec, tensors)
    if key is None:
        return run(tracer, node, args, kwargs, nnmodule)
    mode = _mode(tensors[0])
    if key in known:
        result = known[key]
        if result is None:
            return run(tracer, node, args, kwargs, nnmodule)
        result_spec, made = result
        with in_kernel_invocation_manager(mode), no_python_dispatcher():
            return pytree.tree_unflatten([each.make(mode, tensors) for each in made], result_spec)
    before = [tensor._version for tensor in tensors]
    value = run(tracer, node, args, kwargs, nnmodule)
    written = before != [tensor._version for tensor in tensors]
    known[key] = None if written else _learned(value, tensors)
    return value


def _is_usual(tracer: Any) -> bool:
    """Whether an operation does what it says: no mode, no transformation, no function of an operator's."""
    return not (
        torch.is_inference_mode_enabled()
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or len(getattr(tracer, "tracers", "unknown")) > 1
    )


def _key(node: fx.Node, leaves: list[Any], spec: pytree.TreeSpec, tensors: list[torch.Tensor]) -> Hashable:
    """All that a call's result may depend on, or None if that is not plain."""
    own = not isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    if not tensors or not (own or getattr(node.target, "namespace", "") == "aten"):
        return None
    if not all(_is_ordinary(tensor) and _mode(tensor) is _mode(tensors[0]) for tensor in tensors):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    place = {id(tensor): at for at, tensor in enumerate(tensors)}
    constants: list[Hashable] = []
    for leaf in leaves:
        if id(leaf) in place:
            constants.append(("tensor", place[id(leaf)]))
        elif isinstance(leaf, _CONSTANTS):
            constants.append(constant(leaf))
        else:
            return None
    owners: dict[int, int] = {}
    described = (
        (t.shape, t.stride(), t.storage_offset(), t.dtype, t.device, owners.setdefault(_memory(t), at))
        for at, t in enumerate(tensors)
    )
    settings = _settings({tensor.device.type for tensor in tensors})
    return node.op, node.target, spec, tuple(constants), tuple(described), settings


_CONSTANTS = (
    *(int, float, complex, str, type(None), type(Ellipsis)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def _is_ordinary(value: torch.Tensor) -> bool:
    """Whether a fake tensor is a strided one of fixed size that nobody knows more of."""
    return (
        isinstance(value, FakeTensor)
        and value.constant is None
        and getattr(value, "real_tensor", None) is None
        and value.layout is torch.strided
        and value.device.type != "meta"
        and value.dim() > 0  # one number may be promoted otherwise than another
        and not (value.is_conj() or value.is_neg() or value.is_quantized or value.is_nested)
        and all(isinstance(n, int) for n in (*value.shape, *value.stride(), value.storage_offset()))
    )


def _settings(device_types: set[str]) -> Hashable:
    """What is set that the geometry of results depends on."""
    attention = torch.backends.cuda
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        *((name, torch.get_autocast_dtype(name)) for name in device_types if torch.is_autocast_enabled(name)),
        torch.backends.cudnn.enabled,
        torch.backends.mkldnn.enabled,
        attention.flash_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        attention.math_sdp_enabled(),
        attention.cudnn_sdp_enabled(),
    )


def _learned(value: Any, tensors: list[torch.Tensor]) -> Result | None:
    """What a call made, or None if it is more than ordinary tensors."""
    leaves, spec = pytree.tree_flatten(value)
    owners = {_memory(tensor): at for at, tensor in enumerate(tensors)}
    places = {id(tensor): at for at, tensor in enumerate(tensors)}
    made = []
    for leaf in leaves:
        if id(leaf) not in places:
            if not isinstance(leaf, torch.Tensor) or not _is_ordinary(leaf) or leaf.requires_grad:
                return None
            if isinstance(leaf, torch.nn.Parameter) or _mode(leaf) is not _mode(tensors[0]):
                return None
        made.append(
            _Made(
                places.get(id(leaf)),
                owners.get(_memory(leaf)),
                int(leaf.storage_offset()),
                leaf.shape,
                leaf.stride(),
                leaf.dtype,
                leaf.device,
            )
        )
    own = [_memory(leaf) for leaf, each in zip(leaves, made, strict=True) if each.memory is None]
    if len(set(own)) < len(own) or any(each.memory is None and each.offset for each in made):
        return None
    return (spec, tuple(made)) if made else None


def _mode(tensor: Any) -> FakeTensorMode:
    return tensor.fake_mode


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


_runner: Replaced[Known] = Replaced("torch._dynamo", "utils", {"run_node": _run_node})
