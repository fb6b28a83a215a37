"""No cyclic garbage collection for a while: what captures and compilations allocate stays, nearly all of it.

Each pass over a large heap takes long and finds next to nothing there. What is garbage in the meantime is
found by the first pass afterwards.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

__all__ = ["uncollected"]

_lock = threading.Lock()
_inside = 0  # how many are in it, in all threads
_was_enabled = False  # before the first of them


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector from running by itself; it may nest, and several threads may be inside.

    The last one out restores what the first one found. The collector is one for all threads.
    """
    global _inside, _was_enabled
    with _lock:
        if not _inside:
            _was_enabled = gc.isenabled()
            gc.disable()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _was_enabled:
                gc.enable()
