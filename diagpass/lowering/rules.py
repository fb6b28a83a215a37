"""Batching rules: one operation over a whole group.

A value of a group is *stacked*: a tensor with the group axis first. A rule takes operands of which some
are stacked and returns the stacked result. Operations without a rule of their own go through
``torch.vmap``; where that has no rule either it would fall back to a loop, silently: here that is a
:class:`~diagpass.errors.BatchingError` instead.

Shape letters: G group, B batch, M rows, K inner, N columns, H heads, T tokens, D head width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from diagpass.errors import BatchingError

aten = torch.ops.aten
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stacked:
    """A tensor whose first axis is the group."""

    tensor: torch.Tensor


Width = int | torch.SymInt
Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operations; it is called as ``rule(target, width, args, kwargs)``."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def apply(target: Any, width: Width, args: tuple, kwargs: dict) -> Any:
    """Run one operation over a group.

    Parameters
    ----------
    target
        The operation.
    width
        The group's size G; symbolic in a form for any width.
    args, kwargs
        Its operands; :class:`Stacked` where they differ from cell to cell.

    Returns
    -------
    Any
        What the operation returns, with :class:`Stacked` tensors where the cells' results differ.

    Raises
    ------
    BatchingError
        There is no rule for the operation.
    """
    leaves, _ = tree_flatten((args, kwargs))
    if not any(isinstance(leaf, Stacked) for leaf in leaves):
        return target(*args, **kwargs)
    own = RULES.get(target)
    if own is not None:
        return own(target, width, args, kwargs)
    return _elementwise(target, args, kwargs) or _vmapped(target, args, kwargs)


def _elementwise(target: Any, args: tuple, kwargs: dict) -> Stacked | None:
    """An elementwise operation whose operands align as they are, or None.

    The group axis comes first and operands align at the last axis, so stacked ones must have one rank, and
    shared ones at most that of a cell. A cell's scalars promote otherwise than tensors: none of those.
    """
    tags = getattr(target, "tags", ())
    if torch.Tag.pointwise not in tags or torch.Tag.nondeterministic_seeded in tags:
        return None
    if kwargs.get("memory_format") in (torch.channels_last, torch.channels_last_3d):
        return None  # a layout of a cell's axes
    stacked = [arg.tensor for arg in (*args, *kwargs.values()) if isinstance(arg, Stacked)]
    shared = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
    rank = stacked[0].dim() if stacked else 0
    if rank < 2 or any(s.dim() != rank for s in stacked) or any(s.dim() >= rank for s in shared):
        return None
    given = [arg.tensor if isinstance(arg, Stacked) else arg for arg in args]
    named = {name: arg.tensor if isinstance(arg, Stacked) else arg for name, arg in kwargs.items()}
    found = target(*given, **named)
    return Stacked(found) if isinstance(found, torch.Tensor) else None


def _vmapped(target: Any, args: tuple, kwargs: dict) -> Any:
    """The operation under ``torch.vmap``, or else its decomposition under ``torch.vmap``."""
    leaves, spec = tree_flatten((args, kwargs))
    at = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Stacked)]
    tensors = [leaves[place].tensor for place in at]
    reason: Exception | None = None
    for function in filter(None, (target, decomposition_table.get(target))):

        def one(*operands: torch.Tensor, function: Any = function) -> Any:
            filled = list(leaves)
            for place, operand in zip(at, operands, strict=True):
                filled[place] = operand
            new_args, new_kwargs = tree_unflatten(filled, spec)
            return function(*new_args, **new_kwargs)

        try:
            with _no_vmap_fallback():
                found = torch.vmap(one)(*tensors)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = reason or error
            continue
        return tree_map(lambda out: Stacked(out) if isinstance(out, torch.Tensor) else out, found)
    said = str(reason).strip().split("\n")[0]
    raise BatchingError(f"operation {target} has no batching rule ({said})") from reason


@contextlib.contextmanager
def _no_vmap_fallback() -> Iterator[None]:
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


def _stack(value: Any, width: Width) -> torch.Tensor:
    """The operand with a group axis, whether or not it had one."""
    if isinstance(value, Stacked):
        return value.tensor
    return value.unsqueeze(0).expand(width, *value.shape)


def _fold(value: torch.Tensor) -> torch.Tensor:
    """(G, B, ...) -> (G*B, ...)."""
    return value.reshape(value.shape[0] * value.shape[1], *value.shape[2:])


def _unfold(value: torch.Tensor, width: Width) -> Stacked:
    """(G*B, ...) -> (G, B, ...)."""
    return Stacked(value.reshape(width, value.shape[0] // width, *value.shape[1:]))


@rule(aten.mm.default)
def _mm(target: Any, width: Width, args: tuple, kwargs: dict) -> Stacked:
    left, right = args
    if not isinstance(right, Stacked):  # one layer at several segments: one larger product
        return _unfold(torch.mm(_fold(left.tensor), right), width)
    return Stacked(torch.bmm(_stack(left, width), right.tensor))


@rule(aten.addmm.default)
def _addmm(target: Any, width: Width, args: tuple, kwargs: dict) -> Stacked:
    bias, left, right = args
    if not isinstance(bias, Stacked) and not isinstance(right, Stacked) and bias.dim() == 1:
        return _unfold(torch.addmm(bias, _fold(left.tensor), right, **kwargs), width)
    bias = _stack(bias, width)
    while bias.dim() < 3:  # (G, N): one row for all M; (G,): a number
        bias = bias.unsqueeze(1)
    return Stacked(torch.baddbmm(bias, _stack(left, width), _stack(right, width), **kwargs))


@rule(aten.bmm.default)
def _bmm(target: Any, width: Width, args: tuple, kwargs: dict) -> Stacked:
    left, right = (_fold(_stack(operand, width)) for operand in args)
    return _unfold(torch.bmm(left, right), width)


@rule(aten.baddbmm.default)
def _baddbmm(target: Any, width: Width, args: tuple, kwargs: dict) -> Stacked:
    bias, left, right = (_stack(operand, width) for operand in args)
    left, right = _fold(left), _fold(right)
    shape = (left.shape[0] // width, left.shape[1], right.shape[2])
    while bias.dim() < 4:
        bias = bias.unsqueeze(1)
    bias = _fold(bias.expand(width, *shape))
    return _unfold(torch.baddbmm(bias, left, right, **kwargs), width)


@rule(aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
def _with_number(target: Any, width: Width, args: tuple, kwargs: dict) -> Any:
    """Elementwise with a second operand that may be a stacked *number*, of shape (G,)."""
    left, right = args
    if _is_number(kwargs.get("alpha")):
        kwargs = dict(kwargs)
        scale = kwargs.pop("alpha")
        if not isinstance(right, (torch.Tensor, Stacked)):
            right = torch.full((), right, dtype=_stack(left, width).dtype, device=_stack(left, width).device)
        right = apply(aten.mul.Tensor, width, (right, scale), {})
        return apply(target, width, (left, right), kwargs)
    if not (isinstance(right, Stacked) and right.tensor.dim() == 1 and _is_number(right)):
        return _elementwise(target, args, kwargs) or _vmapped(target, args, kwargs)
    value = _stack(left, width)
    sample = 1.0 if right.tensor.dtype.is_floating_point else 1
    dtype = torch.result_type(torch.empty((), dtype=value.dtype, device="meta").new_empty(1), sample)
    precise = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    number = right.tensor.to(device=value.device, dtype=precise)
    number = number.reshape(width, *(1,) * (value.dim() - 1))
    return Stacked(target(value.to(precise), number, **kwargs).to(dtype))


class Number(Stacked):
    """A stacked Python number: what differs from layer to layer in a literal."""


def _is_number(value: Any) -> bool:
    return isinstance(value, Number)


@rule(
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
)
def _attention(target: Any, width: Width, args: tuple, kwargs: dict) -> tuple:
    """Attention sees the group as more batch: (G, B, H, T, D) -> (G*B, H, T, D)."""
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key, value = (_stack(given[name], width) for name in ("query", "key", "value"))
    batch = query.shape[1]
    given.update(query=_fold(query), key=_fold(key), value=_fold(value))
    for name in ("attn_mask", "attn_bias"):
        if given.get(name) is not None:
            given[name] = _fold_mask(given[name], width, batch)
    out = target(**{name: given[name] for name in given})
    rows = width * batch
    return tuple(
        _unfold(item, width)
        if isinstance(item, torch.Tensor) and item.dim() >= 3 and item.shape[0] == rows
        else item
        for item in out
    )


def _fold_mask(mask: Any, width: Width, batch: int) -> torch.Tensor:
    """A mask for (G*B, H, T, T) scores, copied only where cells or batch entries differ."""
    if not isinstance(mask, Stacked):
        if mask.dim() < 4:
            return mask
        if mask.shape[0] == 1 or mask.stride(0) == 0:
            return mask[:1].expand(width * batch, *mask.shape[1:])
        return _fold(mask.unsqueeze(0).expand(width, *mask.shape))
    inner = mask.tensor
    while inner.dim() < 5:
        inner = inner.unsqueeze(1)
    return _fold(inner.expand(width, batch, *inner.shape[2:]))


@rule(aten.cat.default)
def _cat(target: Any, width: Width, args: tuple, kwargs: dict) -> Any:
    """Along a dimension that has moved one to the right; the rule of ``vmap`` bakes the width in."""
    parts, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    tensors = [_stack(part, width) for part in parts]
    if any(tensor.dim() != tensors[0].dim() for tensor in tensors):  # an empty one may have another shape
        return _vmapped(target, args, kwargs)
    return Stacked(target(tensors, dim + 1 if dim >= 0 else dim))


@rule(aten.native_layer_norm.default)
def _layer_norm(target: Any, width: Width, args: tuple, kwargs: dict) -> Any:
    """Normalise all cells at once, then scale and shift by each cell's own; ``vmap``'s bakes the width in."""
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    value, weight, bias = (given[name] for name in ("input", "weight", "bias"))
    if not isinstance(weight, Stacked) and not isinstance(bias, Stacked):
        out = target(value.tensor, given["normalized_shape"], weight, bias, given["eps"])
        return tuple(map(Stacked, out))
    normal, *moments = target(_stack(value, width), given["normalized_shape"], None, None, given["eps"])
    for own, combine in ((weight, torch.mul), (bias, torch.add)):
        if own is not None:
            own = _stack(own, width)
            lead = normal.dim() - own.dim()
            normal = combine(normal, own.reshape(width, *(1,) * lead, *own.shape[1:]))
    return Stacked(normal), *map(Stacked, moments)


@rule(aten._thnn_fused_lstm_cell.default)
def _lstm_cell(target: Any, width: Width, args: tuple, kwargs: dict) -> tuple:
    """The fused CUDA cell is elementwise over the batch: (G, B, 4D) -> (G*B, 4D), biases added first."""
    gates, hidden, state, *biases = (*args, *kwargs.values())
    gates, hidden, state = (_stack(operand, width) for operand in (gates, hidden, state))
    for bias in biases:
        if bias is not None:
            gates = gates + _stack(bias, width).unsqueeze(1)
    out = target(_fold(gates), _fold(hidden), _fold(state))
    return tuple(_unfold(item, width) for item in out)


@rule(aten.mkldnn_rnn_layer.default)
def _lstm_layer(target: Any, width: Width, args: tuple, kwargs: dict) -> tuple:
    """A whole LSTM layer on the CPU, token by token: (G, T, B, D) -> (G, T, B, N), all states (G, B, N).

    The library's kernel takes one set of weights. The input's product is one for all tokens.
    """
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given["mode"] != 2 or given["bidirectional"] or given["batch_sizes"] or given["num_layers"] != 1:
        raise BatchingError(f"operation {target} has no batching rule for more than one LSTM layer one way")
    x, w_in, w_state, hidden, state = (
        _stack(given[name], width) for name in ("input", "weight0", "weight1", "hx_", "cx_")
    )
    shape = hidden.shape
    hidden, state = (value.reshape(width, -1, value.shape[-1]) for value in (hidden, state))
    gates = torch.matmul(x.flatten(1, 2), w_in.mT).unflatten(1, x.shape[1:3])
    if given["has_biases"]:
        gates = gates + (_stack(given["weight2"], width) + _stack(given["weight3"], width))[:, None, None]
    outputs: list[Any] = [None] * x.shape[1]
    order = range(x.shape[1])
    for at in reversed(order) if given["reverse"] else order:
        now = gates[:, at] + torch.bmm(hidden, w_state.mT)
        i, f, g, o = now.chunk(4, -1)
        state = f.sigmoid() * state + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * state.tanh()
        outputs[at] = hidden
    out = torch.stack(outputs, 1)  # the kernel takes and gives tokens first whatever batch_first says
    workspace = torch.empty(0, dtype=torch.uint8, device=x.device)
    return Stacked(out), Stacked(hidden.reshape(shape)), Stacked(state.reshape(shape)), workspace


@rule(aten.reshape.default, aten.view.default, aten._unsafe_view.default)
def _reshape(target: Any, width: Width, args: tuple, kwargs: dict) -> Any:
    """To a cell's shape behind the group axis."""
    value, shape = args
    if -1 in shape:
        return _vmapped(target, args, kwargs)
    return Stacked(aten.reshape.default(value.tensor, [width, *shape]))


@rule(aten.permute.default, aten.transpose.int, aten.t.default)
def _permute(target: Any, width: Width, args: tuple, kwargs: dict) -> Stacked:
    """A permutation of a cell's axes; the group axis stays where it is."""
    value, *dims = args
    rank = value.tensor.dim() - 1
    order = list(range(rank))
    if target is aten.permute.default:
        order = [dim % rank for dim in dims[0]]
    elif rank > 1:
        first, second = (dim % rank for dim in dims or (0, 1))
        order[first], order[second] = order[second], order[first]
    return Stacked(aten.permute.default(value.tensor, [0, *(dim + 1 for dim in order)]))


@rule(aten.unsqueeze.default)
def _unsqueeze(target: Any, width: Width, args: tuple, kwargs: dict) -> Stacked:
    """A new axis behind the group axis."""
    value, dim = args
    return Stacked(target(value.tensor, dim + 1 if dim >= 0 else dim))


@rule(aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default)
def _same(target: Any, width: Width, args: tuple, kwargs: dict) -> Stacked:
    return args[0]


@rule(aten._assert_async.msg, aten._assert_async.default)
def _assert_all(target: Any, width: Width, args: tuple, kwargs: dict) -> None:
    """What must hold for each cell must hold for all; ``one_hot`` checks its input so."""
    condition, *message = args
    target(condition.tensor.all(), *message, **kwargs)


@rule(aten.select_scatter.default, aten.slice_scatter.default)
def _scatter(target: Any, width: Width, args: tuple, kwargs: dict) -> Stacked:
    """Scatter along a dimension that has moved one to the right."""
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    base, source = _stack(given.pop("self"), width), _stack(given.pop("src"), width)
    dim = given.pop("dim", 0)
    return Stacked(target(base, source, dim + 1 if dim >= 0 else dim, **given))
