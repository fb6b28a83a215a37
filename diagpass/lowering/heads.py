"""Attention over repeated keys and values -> attention over the keys and values themselves.

With grouped queries (Ainslie et al. 2023, arXiv 2305.13245) several heads of queries share a head of keys
and values. Models repeat the shared heads before they call attention as if there were no groups; but the
kernels in ``KERNELS`` know of them and need no copies: query head ``h`` reads head ``h // n``.

Shape letters: B batch, H heads, T tokens, D head width; n how often a head is repeated.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten
log = logging.getLogger(__name__)

__all__ = ["without_repeated_heads"]

#: What takes fewer heads of keys and values than of queries: what torch may choose for
#: ``scaled_dot_product_attention(enable_gqa=True)``. The memory-efficient kernel is not among them.
KERNELS = (
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)

_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_COPIES = (aten.clone.default, aten.contiguous.default)


@dataclasses.dataclass(frozen=True)
class _Factor:
    """A part of a dimension: ``size`` steps through the source, or the source again ``size`` times."""

    size: int
    repeats: bool = False


def without_repeated_heads(form: fx.GraphModule) -> fx.GraphModule:
    """Hand attention the keys and values whose repeated heads it was given.

    Parameters
    ----------
    form
        A functional graph of ATen operations with known sizes.

    Returns
    -------
    fx.GraphModule
        Another one; ``form`` itself if there is nothing to change.
    """
    if not any(node.target in KERNELS for node in form.graph.nodes):
        return form
    graph = fx.Graph()
    graph.output(graph.graph_copy(form.graph, {}))
    changed = sum(
        _take_sources(node) for node in graph.nodes if node.target in KERNELS and _has_no_dropout(node)
    )
    if not changed:
        return form
    graph.eliminate_dead_code()
    graph.lint()
    log.debug("%d attentions read keys and values without repeated heads", changed)
    return fx.GraphModule(form, graph)


def _has_no_dropout(node: fx.Node) -> bool:
    """Whether nothing is drawn: a kernel that goes through the heads otherwise may draw otherwise."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return not given.get("dropout_p", 0.0)


def _take_sources(node: fx.Node) -> bool:
    """Replace an attention's keys and values, if both repeat their heads alike."""
    query, key, value = node.args[:3]
    found = _source(key), _source(value)
    if found[0] is None or found[1] is None or found[0][1] != found[1][1]:
        return False
    graph = node.graph
    made = []
    with graph.inserting_before(node):
        for source, repeats in found:  # type: ignore[misc]
            repeated: Any = key if not made else value
            batch, heads, tokens, width = repeated.meta["val"].shape
            shape = [int(size) for size in (batch, heads // repeats, tokens, width)]
            new = graph.call_function(aten.reshape.default, (source, shape))
            new.meta = {"val": source.meta["val"].reshape(shape)}
            made.append(new)
    node.args = (query, *made, *node.args[3:])
    return True


def _source(repeated: Any) -> tuple[fx.Node, int] | None:
    """What (B, H, T, D) keys or values repeat, with n; None if they repeat nothing or not head by head."""
    steps: list[fx.Node] = []
    source: Any = repeated
    while not steps or steps[0].target is not aten.expand.default or _sizes(source) == _sizes(steps[0]):
        if not isinstance(source, fx.Node) or not _is_followed(source):
            return None
        steps.insert(0, source)
        source = source.args[0]
    dims = [[_Factor(size)] if size > 1 else [] for size in _sizes(source)]
    for step in steps:
        following = _follow(dims, step)
        if following is None:
            return None
        dims = following
    return _repeats(source, dims)


def _repeats(source: fx.Node, dims: list[list[_Factor]]) -> tuple[fx.Node, int] | None:
    """The source and n, if its steps are the dimensions but for the last factor of the heads."""
    if len(dims) != 4 or not dims[1] or not dims[1][-1].repeats:
        return None
    rest = [*dims[0], *dims[1][:-1], *dims[2], *dims[3]]
    return None if any(factor.repeats for factor in rest) else (source, dims[1][-1].size)


def _sizes(node: Any) -> list[int]:
    return list(node.meta["val"].shape)


def _is_followed(node: fx.Node) -> bool:
    """Whether a node keeps the order of what it shows, but for repeating it, and its sizes are known."""
    known = (*_RESHAPES, *_COPIES, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim)
    value = node.meta.get("val")
    return (
        node.target in known
        and isinstance(value, torch.Tensor)
        and all(isinstance(size, int) for size in value.shape)
        and value.numel() > 0
    )


def _follow(dims: list[list[_Factor]], step: fx.Node) -> list[list[_Factor]] | None:
    """The factors of each dimension after a step; None where they cannot be told."""
    sizes = _sizes(step)
    if step.target is not aten.expand.default:  # the order stays: only where dimensions begin and end changes
        return _regrouped([factor for dim in dims for factor in dim], sizes)
    dims = [*([[]] * (len(sizes) - len(dims))), *dims]
    return [
        [_Factor(size, repeats=True)] if size > 1 and not dim else dim
        for dim, size in zip(dims, sizes, strict=True)
    ]


def _regrouped(factors: list[_Factor], sizes: list[int]) -> list[list[_Factor]] | None:
    """Factors in order as dimensions of these sizes, split where a dimension ends inside of one."""
    rest = list(reversed(factors))
    dims: list[list[_Factor]] = []
    for size in sizes:
        dim: list[_Factor] = []
        while (left := size // math.prod(factor.size for factor in dim)) > 1:
            factor = rest.pop()
            if factor.size > left:
                if factor.size % left:
                    return None
                rest.append(_Factor(factor.size // left, factor.repeats))
                factor = _Factor(left, factor.repeats)
            elif left % factor.size:
                return None
            dim.append(factor)
        dims.append(dim)
    return None if rest else dims
