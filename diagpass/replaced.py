"""Methods of a class of torch's, or functions of a module, that are others for a while, in some threads."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

__all__ = ["Replaced"]

State = TypeVar("State")


class Replaced(Generic[State]):
    """Replaces methods while any thread is inside; each replacement asks :attr:`state` whether it is its own.

    Parameters
    ----------
    module, owner
        The class, or the module: names, because it is looked for when it is needed.
    methods
        What stands for which method. Each calls :meth:`original` where :attr:`state` is None.
    """

    def __init__(self, module: str, owner: str, methods: Mapping[str, Callable[..., Any]]) -> None:
        self._module, self._owner, self._methods = module, owner, methods
        self._lock = threading.Lock()
        self._inside = 0  # threads
        self._originals: dict[str, Any] = {}  # while any thread is inside
        self._local = threading.local()

    @property
    def state(self) -> State | None:
        """What this thread went inside with, or None if it is not inside."""
        return getattr(self._local, "state", None)

    def original(self, name: str) -> Callable[..., Any]:
        """The method that another stands for."""
        return self._originals[name]

    @contextlib.contextmanager
    def inside(self, state: State) -> Iterator[bool]:
        """Replace the methods, for this thread; it may nest.

        Yields
        ------
        bool
            Whether they are replaced. Not where torch is another than the one known here.
        """
        owner: Any = getattr(importlib.import_module(self._module), self._owner, None)
        if not all(hasattr(owner, name) for name in self._methods):
            yield False
            return
        with self._lock:
            if not self._inside:
                for name, method in self._methods.items():
                    self._originals[name] = getattr(owner, name)
                    setattr(owner, name, method)
            self._inside += 1
        before, self._local.state = self.state, state
        try:
            yield True
        finally:
            self._local.state = before
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    for name in self._methods:
                        setattr(owner, name, self._originals[name])
