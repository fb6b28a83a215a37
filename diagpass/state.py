"""A model's Python and tensor state: take it, put it back, compare it.

Used where user code must run once more than the user asked for (a first call that sets a library up, a
verification): the model is afterwards as if that run had not happened.
"""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

_ATOMS = (
    int, float, complex, bool, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size,
    types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, slice, range,
)  # fmt: skip


class Snapshot:
    """Everything reachable from some roots (a model, its inputs) that a call may change.

    Containers (module attributes, dicts, lists, sets, deques, plain objects) are remembered shallowly,
    tensors that are not parameters, gradients and NumPy arrays by value, random number generators (the global
    ones and those that are reached) by their state.

    Parameters
    ----------
    roots
        Where to begin.
    values
        Whether to remember the values of tensors and generators, and not only which object is where.
    """

    def __init__(self, *roots: Any, values: bool = True) -> None:
        self._values = values
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, int | None, bool]] = []
        self._gradients: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._generators: list[tuple[Callable[[Any], Any], Any]] = []
        self._seen: set[int] = set()
        self._numpy: Any = sys.modules.get("numpy")
        self._python = random.getstate() if values else None
        self._cpu = torch.get_rng_state() if values else None
        initialised = torch.cuda.is_available() and torch.cuda.is_initialized()
        self._cuda = torch.cuda.get_rng_state_all() if initialised and values else None
        if self._numpy is not None and values:
            self._generators.append((self._numpy.random.set_state, self._numpy.random.get_state()))
        for root in roots:
            self._take(root)

    def holds(self, number: int) -> bool:
        """Whether the object with this ``id`` is one that :meth:`restore` puts back."""
        return number in self._seen

    def changed(self) -> list[tuple[Any, Any]]:
        """Containers and objects that hold other things than they did, each with what it held."""
        return [(item, content) for item, content in self._containers if not _holds(item, content)]

    def restore(self, keep_setup: bool = False) -> None:
        """Put everything back, in place.

        Parameters
        ----------
        keep_setup
            Keep what a library sets up at a first call: hooks that were registered since, and the flags
            by which modules remember that (new attributes that are True).
        """
        hooks = {id(item) for item, _ in self._containers if isinstance(item, torch.nn.Module)}
        hooks = {
            id(value)
            for item, _ in self._containers
            if id(item) in hooks
            for name, value in vars(item).items()
            if name.endswith("_hooks") and isinstance(value, dict)
        }
        grown = keep_setup and any(
            id(item) in hooks and len(item) > len(content) for item, content in self._containers
        )
        for container, content in self._containers:
            if grown and id(container) in hooks:
                continue
            if grown and isinstance(container, torch.nn.Module):
                new = {name: value for name, value in vars(container).items() if name not in content}
                content = {**content, **{name: True for name, value in new.items() if value is True}}
            put_back(container, content)
        for tensor, value, version, needed_grad in self._tensors:
            with torch.inference_mode(version is None), torch.no_grad():
                if tensor.requires_grad and not needed_grad:
                    tensor.detach_()
                if tensor.shape != value.shape:
                    tensor.resize_(value.shape)
                if tensor.is_meta:  # there is nothing in it
                    continue
                if version is None or tensor._version != version or not torch.equal(tensor, value):
                    tensor.copy_(value)
        for tensor, gradient in self._gradients:
            tensor.grad = gradient
        for array, value in self._arrays:
            array[...] = value
        for set_state, generator_state in self._generators:
            set_state(generator_state)
        if self._cpu is not None:
            torch.set_rng_state(self._cpu)
        if self._python is not None:
            random.setstate(self._python)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)

    def _take(self, root: Any) -> None:
        pending = [root]
        while pending:
            item = pending.pop()
            if isinstance(item, _ATOMS) or id(item) in self._seen:
                continue
            self._seen.add(id(item))
            if isinstance(item, torch.Tensor):
                if self._values and item.is_leaf and item.requires_grad:
                    self._gradients.append((item, item.grad))
                    pending.append(item.grad)
                if self._values and not isinstance(item, torch.nn.Parameter):
                    version = None if item.is_inference() else item._version
                    self._tensors.append((item, item.detach().clone(), version, item.requires_grad))
                continue
            if self._values and self._take_by_value(item):
                continue
            content = contents_of(item)
            if content is None:
                continue
            self._containers.append((item, content))
            pending.extend(_children(item))

    def _take_by_value(self, item: Any) -> bool:
        """Remember a NumPy array or a random number generator."""
        numpy = self._numpy
        if numpy is not None and isinstance(item, numpy.ndarray) and item.flags.writeable:
            self._arrays.append((item, item.copy()))
        elif isinstance(item, torch.Generator):
            self._generators.append((item.set_state, item.get_state()))
        elif isinstance(item, random.Random):
            self._generators.append((item.setstate, item.getstate()))
        elif numpy is not None and isinstance(item, numpy.random.RandomState):
            self._generators.append((item.set_state, item.get_state()))
        elif numpy is not None and isinstance(item, numpy.random.Generator):
            bits = item.bit_generator
            self._generators.append((functools.partial(setattr, bits, "state"), bits.state))
        else:
            return False
        return True


def _holds(item: Any, content: Any) -> bool:
    """Whether a container holds the very same things as when ``content`` was taken."""
    now = contents_of(item)
    if isinstance(content, dict):
        return list(now) == list(content) and all(now[key] is value for key, value in content.items())
    if isinstance(content, set):
        return now == content
    return len(now) == len(content) and all(a is b for a, b in zip(now, content, strict=True))


class Memos:
    """Objects outside of a model in which a library may keep what it has found out.

    Dicts, lists, sets, and plain objects with attributes (a ``threading.local``, say).
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._known = [(item, contents_of(item)) for item in objects]

    @staticmethod
    def can_hold(item: Any) -> bool:
        """Whether the object can be put back: no module, class or function."""
        if isinstance(item, (dict, list, set)):
            return True
        atom = isinstance(item, (*_ATOMS, tuple, deque, torch.nn.Module, torch.Tensor))
        return not atom and isinstance(getattr(item, "__dict__", None), dict)

    def unchanged(self) -> bool:
        """Whether they hold what they held, the very same objects."""
        return all(_same_content(item, content) for item, content in self._known)

    def restore(self) -> None:
        """Put back what they held."""
        for item, content in self._known:
            put_back(item, content)


def _same_content(item: Any, content: Any) -> bool:
    if not isinstance(item, (dict, list, set)):
        item = vars(item)
    if len(item) != len(content):
        return False
    if isinstance(item, dict):
        return all(key in item and item[key] is value for key, value in content.items())
    if isinstance(item, set):
        return item == content
    return all(a is b for a, b in zip(item, content, strict=True))


def contents_of(item: Any) -> Any:
    """A shallow copy of what a container or object holds; None for what holds nothing."""
    if isinstance(item, (dict, list, set, deque)):
        return item.copy()
    if isinstance(item, tuple):
        return ()
    if hasattr(item, "__dict__") or slots_of(type(item)):
        return attributes_of(item)
    return None


def attributes_of(item: Any) -> dict[str, Any]:
    """What the attributes of an object hold: those in its ``__dict__`` and in the slots of its class."""
    found = dict(getattr(item, "__dict__", ()))
    found.update((name, getattr(item, name)) for name in slots_of(type(item)) if hasattr(item, name))
    return found


@functools.cache
def slots_of(cls: type) -> tuple[str, ...]:
    """The names of the slots of a class, its own and inherited ones; none of a class written in C."""
    found: list[str] = []
    for base in cls.__mro__:
        names = vars(base).get("__slots__", ())
        names = (names,) if isinstance(names, str) else tuple(names)
        found += [name for name in names if isinstance(vars(base).get(name), types.MemberDescriptorType)]
    return tuple(found)


def _children(item: Any) -> Iterator[Any]:
    if isinstance(item, dict):
        yield from item.values()
    elif isinstance(item, (list, tuple, set, deque)):
        yield from item
    yield from attributes_of(item).values()


def put_back(container: Any, content: Any) -> None:
    """Give a container or object the contents that it had."""
    if isinstance(container, dict):
        container.clear()
        container.update(content)
    elif isinstance(container, list):
        container[:] = content
    elif isinstance(container, set):
        container.clear()
        container.update(content)
    elif isinstance(container, deque):
        container.clear()
        container.extend(content)
    elif not isinstance(container, tuple):
        slots = slots_of(type(container))
        if hasattr(container, "__dict__"):
            vars(container).clear()
            vars(container).update({name: value for name, value in content.items() if name not in slots})
        for name in slots:
            if name in content:
                object.__setattr__(container, name, content[name])
            elif hasattr(container, name):
                object.__delattr__(container, name)


def named_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the model that is not a parameter, by a readable path.

    Buffers, tensor attributes, and tensors inside the lists, dicts and plain objects that attributes
    hold. The same tensor appears under its first path alone.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()

    def visit(path: str, item: Any) -> None:
        if isinstance(item, _ATOMS) or id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if not isinstance(item, torch.nn.Parameter):
                found[path] = item
        elif isinstance(item, torch.nn.Module):
            for name, value in vars(item).items():
                if name in ("_buffers", "_modules"):
                    for key, inner in value.items():
                        visit(f"{path}.{key}".strip("."), inner)
                elif not name.startswith("_") or isinstance(value, torch.Tensor):
                    visit(f"{path}.{name}".strip("."), value)
        elif isinstance(item, dict):
            for key, value in item.items():
                visit(f"{path}[{key!r}]", value)
        elif isinstance(item, (list, tuple, deque)):
            for at, value in enumerate(item):
                visit(f"{path}[{at}]", value)
        else:
            for name, value in attributes_of(item).items():
                visit(f"{path}.{name}", value)

    visit("", module)
    return found
