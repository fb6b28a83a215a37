"""What a cell costs, from the shapes in its graph: FLOPs and bytes. Nothing runs.

FLOPs are those of matrix products, convolutions and attention, counted by PyTorch's own formulas
(``torch.utils.flop_counter``): two for a multiplication and an addition; elementwise work counts as none.
Bytes are those of a cell's operands and results at its border: what has to be moved however well the
inside is fused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diagpass.ir import Cell, Kind

__all__ = [
    "cell_flops",
    "formula_of",
    "kind_bytes",
    "node_flops",
    "result_bytes",
    "stack_bytes",
    "value_bytes",
]


_FORMULAS: dict[Any, Callable[..., int]] = {
    # PyTorch (2.11 to 2.13) has one for each attention kernel but the CPU's, which takes the same operands
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    **flop_registry,
}


def value_bytes(value: Any) -> int:
    """Bytes of a (fake) tensor, or of all in a pytree of them; sizes that depend on values count as none."""
    return sum(
        math.prod(map(_known, leaf.shape)) * leaf.element_size()
        for leaf in tree_leaves(value)
        if isinstance(leaf, torch.Tensor)
    )


def _known(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 0)


def cell_flops(cell: Cell) -> int:
    """The FLOPs of one cell."""
    return sum(map(node_flops, cell.nodes))


def formula_of(node: fx.Node) -> Callable[..., int] | None:
    """PyTorch's FLOP formula of an operation, or None."""
    return _FORMULAS.get(getattr(node.target, "overloadpacket", None))


def node_flops(node: fx.Node) -> int:
    """The FLOPs of one operation by PyTorch's formula; 0 where there is none."""
    formula = formula_of(node)
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta.get("val"))
    try:
        return int(formula(*args, **kwargs, out_val=node.meta.get("val")))
    except (TypeError, AttributeError, AssertionError, IndexError, ValueError):
        return 0  # an operand without a recorded shape: not counted


def result_bytes(kind: Kind) -> int:
    """Bytes of what one cell of a kind leaves to others."""
    return sum(
        value_bytes(next(node for node in nodes if node is not None).meta.get("val"))
        for nodes in kind.outputs
    )


def kind_bytes(kind: Kind, is_weight: Callable[[Any], bool]) -> tuple[int, int]:
    """Bytes of the weights that one cell of a kind reads, and of all its operands and results."""
    weights = others = 0
    for slot in kind.slots:
        if slot.literal:
            continue
        source = slot.sources[0]
        found = value_bytes(source.meta.get("val"))
        if is_weight(source):
            weights += found
        else:
            others += found
    return weights, weights + others + result_bytes(kind)


def stack_bytes(rows: Iterable[torch.Tensor], alignment: int) -> int:
    """Bytes of a stack of weights whose rows begin at multiples of ``alignment`` bytes."""
    return sum(-(-value_bytes(row) // alignment) * alignment for row in rows)
