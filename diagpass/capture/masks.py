"""Attention under a mask that is always the causal one -> causal attention without a mask.

Libraries that leave the mask out in an ordinary run often build it while they are traced: whether it could be
left out would be a question about values. In the graph it is a constant, so its values are known. Kernels
skip half of the work when told that attention is causal, and the ordinary run is the reference.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import _disable_current_modes

log = logging.getLogger(__name__)

aten = torch.ops.aten

MASK_ARGUMENTS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: "attn_mask",
    aten._scaled_dot_product_efficient_attention.default: "attn_bias",
    aten._scaled_dot_product_cudnn_attention.default: "attn_bias",
}
MOST_ELEMENTS = 1 << 28
CUDNN_FLOOR = -65504.0  # what torch makes of False in a mask of booleans for cuDNN, minus infinity elsewhere


def drop_causal_masks(gm: fx.GraphModule) -> int:
    """Rewrite attention whose mask is constant and causal, in place.

    Parameters
    ----------
    gm
        A functional ATen graph.

    Returns
    -------
    int
        How many operations were rewritten.
    """
    known: dict[fx.Node, bool] = {}
    count = 0
    for target, name in MASK_ARGUMENTS.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            given = _arguments(node)
            mask = given.get(name)
            if not isinstance(mask, fx.Node) or given.get("is_causal", False):
                continue
            query, key = (given[side].meta["val"].shape[-2] for side in ("query", "key"))
            if query != key:
                continue
            if mask not in known:
                floors = (float("-inf"), CUDNN_FLOOR) if "cudnn" in str(target) else (float("-inf"),)
                known[mask] = any(_is_causal(gm, mask, query, floor) for floor in floors)
            if not known[mask]:
                continue
            _set_arguments(node, {**given, name: None, "is_causal": True})
            count += 1
    if count:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
        log.debug("%d attention operations have a causal mask: told so instead", count)
    return count


def _arguments(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _set_arguments(node: fx.Node, given: dict[str, Any]) -> None:
    target: Any = node.target
    positional = [a.name for a in target._schema.arguments if not a.kwarg_only]
    used = max(at for at, name in enumerate(positional) if name in given) + 1
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    node.args = tuple(given.get(name, defaults.get(name)) for name in positional[:used])
    node.kwargs = {name: value for name, value in given.items() if name not in positional}


def _is_causal(gm: fx.GraphModule, mask: fx.Node, length: int, floor: float) -> bool:
    """Whether the node is a constant that is 0 up to the diagonal and ``floor`` above it."""
    example = mask.meta.get("val")
    if not isinstance(example, torch.Tensor) or not example.dtype.is_floating_point:
        return False
    if not all(isinstance(size, int) for size in example.shape) or example.numel() > MOST_ELEMENTS:
        return False
    if tuple(example.shape[-2:]) != (length, length):
        return False
    order = _constant_ancestors(mask)
    if order is None:
        return False
    with _disable_current_modes(), torch.no_grad():
        try:
            value = _evaluate(gm, order)[mask]
        except Exception as error:  # a constant that cannot be computed here stays a mask
            log.debug("the mask %s could not be evaluated: %s", mask, error)
            return False
        causal = torch.full((length, length), floor, dtype=value.dtype, device=value.device).triu(1)
        return bool((value == causal).all())


def _constant_ancestors(node: fx.Node) -> list[fx.Node] | None:
    """All that the node is computed from, in order; None if an input or chance is among it."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in found:
            continue
        tags = getattr(current.target, "tags", ())
        if current.op not in ("call_function", "get_attr") or torch.Tag.nondeterministic_seeded in tags:
            return None
        found.add(current)
        pending += current.all_input_nodes
    return [current for current in node.graph.nodes if current in found]


def _evaluate(gm: fx.GraphModule, order: list[fx.Node]) -> dict[fx.Node, Any]:
    interpreter = fx.Interpreter(gm, garbage_collect_values=False)
    interpreter.env = {}
    for node in order:
        interpreter.env[node] = interpreter.run_node(node)
    return interpreter.env
