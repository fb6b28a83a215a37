"""Read through aggregates, so that a value depends on what it holds and on nothing else.

State is often kept in one tensor for all layers, written with ``state[l] = new`` and read with
``state[l]``. In a functional graph each write is a scatter into the whole tensor, so that every read
seems to depend on every earlier write, and the wavefront's width is hidden. This stage rewrites

    select(stack), select(cat), slice(cat), slice(slice_scatter), select(select_scatter), slice(roll),
    getitem(split), getitem(unbind), copy, clone, alias, detach

to read the piece itself. Only data movement is touched, so values stay bitwise equal.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_flatten, tree_unflatten

log = logging.getLogger(__name__)
aten = torch.ops.aten

_SAME_VALUE = {
    aten.alias.default,
    aten.detach.default,
    aten.lift.default,
    aten.lift_fresh.default,
}


# Constants that take their shape from a tensor: the value to fill with, None if it is an argument.
_FILLS: dict[Any, float | None] = {
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_full.default: None,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.full_like.default: None,
}


# ``gm.meta`` entry: positions of outputs that share memory with an input or another output only since
# reads were forwarded. They must be copied where they leave the graph: state is written back one tensor
# after the other.
NEWLY_SHARED = "diagpass_newly_shared"


@dataclasses.dataclass(frozen=True)
class _Fragment:
    """``source[start:stop]`` along the dimension in question; a unit lacks that dimension."""

    source: fx.Node
    start: int
    stop: int
    unit: bool = False


def forward_aliases(gm: fx.GraphModule) -> int:
    """Rewrite reads of aggregates in place.

    Returns
    -------
    int
        The number of reads that now bypass an aggregate.
    """
    changed = 0
    before = output_bases(gm.graph)
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        replacement = _replacement(gm.graph, node)
        if replacement is not None and replacement is not node:
            replacement = _same_layout(gm.graph, node, replacement)
            node.replace_all_uses_with(replacement)
            changed += 1
    if changed:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    after = output_bases(gm.graph)
    gm.meta[NEWLY_SHARED] = frozenset(
        at
        for at, base in enumerate(after)
        if base is not None and base is not before[at] and (base.op == "placeholder" or after.count(base) > 1)
    )
    log.debug("forwarded %d reads through aggregates", changed)
    return changed


def aggregate(dim: int, pieces: Sequence[tuple[fx.Node, int, int, bool]]) -> Any:
    """Marks an output that consists of pieces along ``dim``; never run as it stands.

    A piece is ``(source, start, stop, unit)``: ``source[start:stop]`` along ``dim``, or, for a unit, a source
    that lacks that dimension.
    """
    raise AssertionError("an aggregate is put together by whoever reads it")


def restack_outputs(gm: fx.GraphModule, layer_of: Callable[[fx.Node], Any]) -> int:
    """Replace outputs that hold pieces of several layers by :func:`aggregate` of those pieces.

    State kept in one tensor for all layers leaves the graph as a chain of scatters through all of them.
    What the next segment reads is a piece, and that piece has to wait for its own layer alone.

    Parameters
    ----------
    gm
        A functional graph, its reads forwarded.
    layer_of
        Something hashable for the layer that computes a node, None for glue.

    Returns
    -------
    int
        The number of outputs replaced.
    """
    output = gm.graph.find_nodes(op="output")[0]
    leaves, spec = tree_flatten(output.args[0])
    made: dict[fx.Node, fx.Node] = {}
    for leaf in leaves:
        if isinstance(leaf, fx.Node) and leaf not in made and _static(leaf):
            found = _layered(leaf, layer_of)
            if found is not None:
                dim, fragments = found
                pieces = [(f.source, f.start, f.stop, f.unit) for f in fragments]
                with gm.graph.inserting_before(output):
                    new = gm.graph.call_function(aggregate, (dim, pieces))
                new.meta = {"val": leaf.meta["val"]}
                made[leaf] = new
    if made:
        output.args = (tree_unflatten([made.get(leaf, leaf) for leaf in leaves], spec),)
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return len(made)


def _layered(node: fx.Node, layer_of: Callable[[fx.Node], Any]) -> tuple[int, list[_Fragment]] | None:
    """The dimension along which ``node`` holds pieces of two or more layers, and the pieces."""
    for dim in range(node.meta["val"].dim()):
        fragments = _flatten(node, dim)
        layers = {layer_of(fragment.source) for fragment in fragments} - {None}
        if len(layers) >= 2:
            return dim, fragments
    return None


def _flatten(node: fx.Node, dim: int) -> list[_Fragment]:
    """``node`` along ``dim`` as pieces of nodes that are no aggregates themselves."""
    found: list[_Fragment] = []
    pending = [_Fragment(node, 0, node.meta["val"].shape[dim])]
    while pending:
        wanted = pending.pop()
        pieces = None if wanted.unit else _pieces(wanted.source, dim)
        if pieces is None:
            found.append(wanted)
            continue
        inner, offset = [], 0
        for piece in pieces:
            length = piece.stop - piece.start
            low, high = max(wanted.start - offset, 0), min(wanted.stop - offset, length)
            offset += length
            if low < high:
                start = piece.start + low
                inner.append(dataclasses.replace(piece, start=start, stop=piece.start + high))
        pending += reversed(inner)
    return found


def output_bases(graph: fx.Graph) -> list[fx.Node | None]:
    """Per flat output, the node whose memory it may be a view of (itself, if it is no view)."""
    (result,) = graph.find_nodes(op="output")[0].args
    return [_base(leaf) if isinstance(leaf, fx.Node) else None for leaf in tree_flatten(result)[0]]


def _base(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        target: Any = node.target
        view = target is operator.getitem or target is aten.reshape.default
        if isinstance(target, torch._ops.OpOverload):
            arguments = target._schema.arguments
            view = view or any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)
        if not view:
            break
        node = node.args[0]
    return node


def _replacement(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The node that holds the same value with fewer dependencies, or None."""
    if node.target in _FILLS:
        return _filled(graph, node)
    if node.target in _SAME_VALUE:
        return _argument(node, 0, "self", None)
    if node.target is aten.copy.default:
        return _copied(graph, node)
    read = as_range(node)
    if read is None:
        return None
    source, dim, start, stop, drop_dim = read
    fragments = _locate(source, dim, start, stop)
    if [fragment.source for fragment in fragments] == [source]:
        return None
    return _build(graph, node, fragments, dim, drop_dim)


def as_range(node: fx.Node) -> tuple[fx.Node, int, int, int, bool] | None:
    """``node`` as ``source[start:stop]`` along ``dim``; the flag says whether dim is dropped."""
    args: Any = node.args
    if node.target is aten.select.int:
        source, dim, index = args
        if not _static(source) or not isinstance(index, int):
            return None
        dim, size = _dim_size(source, dim)
        return source, dim, index % size, index % size + 1, True
    if node.target is aten.slice.Tensor:
        found = _slice_range(node)
        return None if found is None else (*found, False)
    if node.target is operator.getitem and isinstance(args[0], fx.Node):
        parent, index = args
        if not isinstance(index, int) or parent.op != "call_function" or not parent.args:
            return None
        source = _argument(parent, 0, "self", None)
        if not _static(source):
            return None
        if parent.target is aten.unbind.int:
            dim, size = _dim_size(source, _argument(parent, 1, "dim", 0))
            return source, dim, index % size, index % size + 1, True
        if parent.target in (aten.split.Tensor, aten.split_with_sizes.default):
            dim, size = _dim_size(source, _argument(parent, 2, "dim", 0))
            sizes = _argument(parent, 1, "split_sizes", None)
            if isinstance(sizes, int):
                start = index * sizes
                return source, dim, start, min(start + sizes, size), False
            if all(isinstance(length, int) for length in sizes):
                start = sum(sizes[:index])
                return source, dim, start, start + sizes[index], False
    return None


def _slice_range(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    source = _argument(node, 0, "self", None)
    start = _argument(node, 2, "start", None)
    stop = _argument(node, 3, "end", None)
    step = _argument(node, 4, "step", 1)
    if not _static(source) or step != 1:
        return None
    dim, size = _dim_size(source, _argument(node, 1, "dim", 0))
    bounds = _clamp(start, stop, size)
    return None if bounds is None else (source, dim, *bounds)


def _clamp(start: Any, stop: Any, size: int) -> tuple[int, int] | None:
    start = 0 if start is None else start
    stop = size if stop is None else stop
    if not isinstance(start, int) or not isinstance(stop, int):
        return None
    start = min(max(start + size if start < 0 else start, 0), size)
    stop = min(max(stop + size if stop < 0 else stop, start), size)
    return start, stop


def _pieces(node: fx.Node, dim: int) -> list[_Fragment] | None:
    """``node`` as a concatenation along ``dim`` of parts of other nodes, or None if it is a leaf."""
    if node.op != "call_function" or not _static(node):
        return None
    target: Any = node.target
    args: Any = node.args
    size = node.meta["val"].shape[dim]
    if target in _SAME_VALUE or target is aten.clone.default:
        return [_Fragment(args[0], 0, size)] if _static(args[0]) else None
    if target is aten.copy.default and _same_type(node, args[1]):
        return [_Fragment(args[1], 0, size)]
    if target is aten.cat.default:
        if _dim_size(node, _argument(node, 1, "dim", 0))[0] != dim:
            return None
        if not all(_static(part) and part.meta["val"].dim() == node.meta["val"].dim() for part in args[0]):
            return None
        if any(part.meta["val"].dtype != node.meta["val"].dtype for part in args[0]):
            return None
        return [_Fragment(part, 0, part.meta["val"].shape[dim]) for part in args[0]]
    if target is aten.stack.default:
        if _dim_size(node, _argument(node, 1, "dim", 0))[0] != dim:
            return None
        if any(part.meta["val"].dtype != node.meta["val"].dtype for part in args[0]):
            return None
        return [_Fragment(part, 0, 1, unit=True) for part in args[0]]
    if target is aten.unsqueeze.default:
        same = _dim_size(node, args[1])[0] == dim
        return [_Fragment(args[0], 0, 1, unit=True)] if same else None
    if target is aten.select_scatter.default:
        base, source = args[:2]
        at, _ = _dim_size(node, _argument(node, 2, "dim", None))
        index = _argument(node, 3, "index", None)
        if at != dim or not isinstance(index, int) or not _static(base):
            return None
        index %= size
        parts = [
            _Fragment(base, 0, index),
            _Fragment(source, 0, 1, unit=True),
            _Fragment(base, index + 1, size),
        ]
        return [part for part in parts if part.start < part.stop]
    if target is aten.slice_scatter.default:
        base, source = args[:2]
        at, _ = _dim_size(node, _argument(node, 2, "dim", 0))
        bounds = _clamp(
            _argument(node, 3, "start", None),
            _argument(node, 4, "end", None),
            size if at == dim else node.meta["val"].shape[at],
        )
        if bounds is None or _argument(node, 5, "step", 1) != 1 or not _static(base):
            return None
        start, stop = bounds
        if (start, stop) == (0, node.meta["val"].shape[at]):
            return [_Fragment(source, 0, size)]
        if at != dim:
            return None
        parts = [
            _Fragment(base, 0, start),
            _Fragment(source, 0, stop - start),
            _Fragment(base, stop, size),
        ]
        return [part for part in parts if part.start < part.stop]
    if target is aten.roll.default:
        shifts, dims = args[1], _argument(node, 2, "dims", [])
        if len(shifts) != 1 or len(dims) != 1 or not isinstance(shifts[0], int) or size == 0:
            return None
        if _dim_size(node, dims[0])[0] != dim:
            return None
        cut = (-shifts[0]) % size
        parts = [_Fragment(args[0], cut, size), _Fragment(args[0], 0, cut)]
        return [part for part in parts if part.start < part.stop]
    found = _slice_range(node) if target is aten.slice.Tensor else None
    if found is not None:
        source, at, start, stop = found
        if at == dim:
            return [_Fragment(source, start, stop)]
        if (start, stop) == (0, source.meta["val"].shape[at]):
            return [_Fragment(source, 0, size)]
    return None


def _locate(node: fx.Node, dim: int, start: int, stop: int) -> list[_Fragment]:
    """``node[start:stop]`` along ``dim`` as fragments of the nodes that it consists of.

    Follows as long as one piece holds the whole range. Where several do, they are returned if others
    are left out; if the range touches them all there is nothing to gain, and a FIFO memory would look
    different in every segment.
    """
    while True:
        pieces = _pieces(node, dim)
        if pieces is None:
            return [_Fragment(node, start, stop)]
        touched: list[_Fragment] = []
        offset = 0
        for piece in pieces:
            length = piece.stop - piece.start
            low, high = max(start - offset, 0), min(stop - offset, length)
            offset += length
            if low < high:
                touched.append(dataclasses.replace(piece, start=piece.start + low, stop=piece.start + high))
        if len(touched) != 1 or touched[0].unit:
            sources = {piece.source for piece in pieces}
            gains = touched and (len(touched) == 1 or {piece.source for piece in touched} < sources)
            return touched if gains else [_Fragment(node, start, stop)]
        node, start, stop = touched[0].source, touched[0].start, touched[0].stop


def _build(graph: fx.Graph, node: fx.Node, fragments: list[_Fragment], dim: int, drop_dim: bool) -> fx.Node:
    """Emit the fragments just before ``node``."""
    with graph.inserting_before(node):
        if drop_dim:
            (only,) = fragments
            if only.unit:
                return only.source
            return _emit(graph, node, aten.select.int, (only.source, dim, only.start))
        parts = []
        for fragment in fragments:
            source = fragment.source
            if fragment.unit:
                parts.append(_emit(graph, node, aten.unsqueeze.default, (source, dim)))
            elif (fragment.start, fragment.stop) == (0, source.meta["val"].shape[dim]):
                parts.append(source)
            else:
                args = (source, dim, fragment.start, fragment.stop)
                parts.append(_emit(graph, node, aten.slice.Tensor, args))
        return parts[0] if len(parts) == 1 else _emit(graph, node, aten.cat.default, (parts, dim))


def _filled(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """A constant shaped like a tensor does not depend on the tensor's values."""
    if not _static(node) or not node.meta["val"].is_contiguous():
        return None
    value = _FILLS[node.target]
    if value is None:
        value = _argument(node, len(node.args) - 1, "fill_value", None)
        if not isinstance(value, (int, float, bool)):
            return None
    like = node.meta["val"]
    kwargs = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
    with graph.inserting_before(node):
        new = graph.call_function(aten.full.default, (list(like.shape), value), kwargs)
    new.meta = dict(node.meta)
    return new


def _copied(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """``copy(destination, source)`` holds the source's values alone."""
    source = _argument(node, 1, "src", None)
    if not _static(source) or not _static(node):
        return None
    if _same_type(node, source):
        return source
    value, wanted = source.meta["val"], node.meta["val"]
    with graph.inserting_before(node):
        if value.dtype != wanted.dtype or value.device != wanted.device:
            kwargs = {"dtype": wanted.dtype, "device": wanted.device}
            source = _emit(graph, node, aten._to_copy.default, (source,), kwargs)
        if value.shape != wanted.shape:
            source = _emit(graph, node, aten.expand.default, (source, list(wanted.shape)))
    return source


def _same_layout(graph: fx.Graph, node: fx.Node, replacement: fx.Node) -> fx.Node:
    """Keep a contiguous value contiguous, so that kernels choose the same path as before."""
    before, after = node.meta.get("val"), replacement.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return replacement
    if before.is_contiguous() and not after.is_contiguous():
        with graph.inserting_before(node):
            kwargs = {"memory_format": torch.contiguous_format}
            return _emit(graph, node, aten.clone.default, (replacement,), kwargs)
    return replacement


def _emit(graph: fx.Graph, like: fx.Node, target: Any, args: tuple, kwargs: dict | None = None) -> fx.Node:
    """A new call with its example value; its place in the module tree is that of ``like``."""
    new = graph.call_function(target, args, kwargs or {})
    values: Any = fx.map_arg((args, kwargs or {}), lambda arg: arg.meta["val"])
    new.meta = {key: value for key, value in like.meta.items() if key != "val"}
    new.meta["val"] = target(*values[0], **values[1])
    return new


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def _static(node: Any) -> bool:
    """Whether the node holds one tensor with sizes that are plain ints."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and all(type(size) is int for size in value.shape)


def _dim_size(node: fx.Node, dim: int) -> tuple[int, int]:
    shape = node.meta["val"].shape
    dim %= len(shape)
    return dim, shape[dim]


def _same_type(node: fx.Node, source: Any) -> bool:
    if not _static(source) or not _static(node):
        return False
    left, right = node.meta["val"], source.meta["val"]
    return (left.shape, left.dtype, left.device) == (right.shape, right.dtype, right.device)
