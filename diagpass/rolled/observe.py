"""Which module runs one segment of a model's own loop, and how often: seen in a run of the model.

A *family* is two or more modules of one class whose paths differ only in digits. The *step* is the outermost
submodule that is called at least twice in one forward and has a family inside itself. A layer is none, though
it may have a family of norms, say, inside: its own family is called by the loop.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import threading
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diagpass.rolled.writes import memory, writes_weights
from diagpass.state import Snapshot

__all__ = ["Found", "bound", "families", "observe"]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a run showed.

    Attributes
    ----------
    step
        Path of the module that runs one segment, or None.
    cells
        How often members of the largest family were called; where ``complete`` is False, before the run
        was stopped.
    complete
        Whether the run came to its end.
    writes_weights
        Whether it was stopped because the model was about to write into its own parameters, which are not
        put back.
    higher_order
        A higher-order operator that runs outside of the step, such as ``cond``, or None: it is compiled where
        it is called, which cannot be done under the modes that watch the loop.
    """

    step: str | None
    cells: int
    complete: bool
    writes_weights: bool = False
    higher_order: str | None = None


class _Enough(BaseException):
    """Stops the run: enough was seen. User code is not to catch it."""


def families(model: nn.Module, globs: Collection[str] | None = None) -> list[set[int]]:
    """The families of a model, as sets of module ``id``; with ``globs``, the one that they name."""
    found: dict[Any, set[int]] = {}
    for path, module in model.named_modules():
        if globs is not None:
            if any(fnmatch.fnmatchcase(path, glob) for glob in globs):
                found.setdefault(None, set()).add(id(module))
        elif re.search(r"\d", path):
            found.setdefault((type(module), re.sub(r"\d+", "#", path)), set()).add(id(module))
    return [members for members in found.values() if len(members) >= 2]


def bound(model: nn.Module, inputs: Any, globs: Collection[str] | None = None) -> int:
    """No call of a model with these inputs should have more cells: a segment for the shortest slice."""
    largest = max(map(len, families(model, globs)), default=0)
    sizes = [1]
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, torch.Tensor):
            sizes += leaf.shape
        elif type(leaf) is int:
            sizes.append(leaf)
    return largest * max(sizes)


def observe(model: nn.Module, args: tuple, kwargs: dict, globs: Collection[str] | None, enough: int) -> Found:
    """Run the model as it stands, see who is called, and put its state back.

    Parameters
    ----------
    model, args, kwargs
        The call.
    globs
        Paths of the cells, if they are known.
    enough
        Stop when the step is known and more cells than this were seen.
    """
    known = families(model, globs)
    paths = {id(module): path for path, module in model.named_modules()}
    holds = {
        id(module): any(
            sum(id(inner) in members for inner in set(module.modules()) - {module}) >= 2 for members in known
        )
        for module in model.modules()
        if module is not model
    }
    family = {member: at for at, members in enumerate(known) for member in members}
    calls: dict[tuple[int, ...], int] = {}  # by the modules that were running
    counts = [0] * len(known)
    stack: list[int] = []
    thread = threading.get_ident()

    def step() -> str | None:
        called = {chain[-1] for chain in calls}
        layers = {member for members in known for member in members if len(members & called) >= 2}
        for chain in sorted(calls, key=len):
            last = chain[-1]
            if calls[chain] >= 2 and holds.get(last) and last not in chain[:-1] and last not in layers:
                return paths[last]
        return None

    def before(module: nn.Module, _: Any) -> None:
        if threading.get_ident() != thread or id(module) not in paths:
            return
        stack.append(id(module))
        if holds.get(id(module)):
            calls[tuple(stack)] = calls.get(tuple(stack), 0) + 1
        at = family.get(id(module))
        if at is not None:
            counts[at] += 1
            if counts[at] > enough and step() is not None:
                raise _Enough

    def after(module: nn.Module, *_: Any) -> None:
        if threading.get_ident() == thread and stack and stack[-1] == id(module):
            stack.pop()

    state = Snapshot(model, args, kwargs)
    weights = [(weight, weight.data) for weight in model.parameters()]
    handles = [
        hooks.register_module_forward_pre_hook(before),
        hooks.register_module_forward_hook(after, always_call=True),
    ]
    complete, guard = True, _Guard(model, stack)
    try:
        with torch.no_grad(), guard:
            model(*args, **kwargs)
    except _Enough:
        complete = False
    except BaseException:
        state.restore()
        raise
    finally:
        for handle in handles:
            handle.remove()
    replaced = [(weight, data) for weight, data in weights if memory(weight) != memory(data)]
    for weight, data in replaced:
        weight.data = data
    state.restore(keep_setup=True)
    found = step()
    inside = {member for member, path in paths.items() if path == found}
    outside = next((name for name, chain in guard.higher_order if not inside & chain), None)
    return Found(found, max(counts, default=0), complete, guard.stopped or bool(replaced), outside)


class _Guard(TorchDispatchMode):
    """Stops before a weight is written, and sees which modules higher-order operators run in."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, stack: list[int]) -> None:
        super().__init__()
        self.model, self.stopped, self.stack = model, False, stack
        self.higher_order: list[tuple[str, frozenset[int]]] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Whether Dynamo goes on to compile what it is asked to: else it would not do so ever after."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            self.higher_order.append((func.name(), frozenset(self.stack)))
        elif writes_weights(self.model, func, args, kwargs):
            self.stopped = True
            raise _Enough
        return func(*args, **kwargs)
