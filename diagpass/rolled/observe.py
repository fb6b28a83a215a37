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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diagpass.rolled.writes import writes_weights
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
    """

    step: str | None
    cells: int
    complete: bool
    writes_weights: bool = False


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
    handles = [
        hooks.register_module_forward_pre_hook(before),
        hooks.register_module_forward_hook(after, always_call=True),
    ]
    complete, guard = True, _Guard(model)
    try:
        with torch.no_grad(), guard, _DataGuard(guard):
            model(*args, **kwargs)
    except _Enough:
        complete = False
    finally:
        for handle in handles:
            handle.remove()
    state.restore(keep_setup=True)
    return Found(step(), max(counts, default=0), complete, guard.stopped)


class _Guard(TorchDispatchMode):
    """Stops before a weight is written."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.stopped = model, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable and writes_weights(self.model, func, args, kwargs):
            self.stopped = True
            raise _Enough
        return func(*args, **kwargs)


class _DataGuard(TorchFunctionMode):
    """Stops before a weight is given other memory (``weight.data = ...``)."""

    def __init__(self, guard: _Guard) -> None:
        super().__init__()
        self.guard = guard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__set__ and isinstance(args[0], nn.Parameter):  # type: ignore[attr-defined]
            self.guard.stopped = True
            raise _Enough
        return func(*args, **(kwargs or {}))
