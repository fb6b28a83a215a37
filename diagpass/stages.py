"""What long work is at: told to whoever listens, to nobody by default.

    with listening(lambda stage, done, total: ...):
        fast(x)

A *stage* is a word or two, perhaps with a colon and what it is about (``"compile: kind0_w4"``); ``total`` is
0 where it is not known. Each stage is logged with its time as well (``TORCH_LOGS="diagpass"``).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

__all__ = ["listening", "say", "stage"]

log = logging.getLogger(__name__)

Listener = Callable[[str, int, int], None]
_listener: ContextVar[Listener | None] = ContextVar("diagpass_listener", default=None)


def say(name: str, done: int = 0, total: int = 0) -> None:
    """Tell the listener, if there is one, what is being done and how much of it is done."""
    listener = _listener.get()
    if listener is not None:
        listener(name, done, total)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Say that a stage begins, and log how long it took."""
    say(name)
    begin = time.perf_counter()
    yield
    log.info("%s: %.3f s", name, time.perf_counter() - begin)


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Have the listener told of what is done inside; with None nobody is."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
