"""Several graphs compiled by Inductor for the CPU, its compiler working on one while the next is lowered.

Inductor lowers a graph to C++ in this process, has the kernels compiled by others, and waits for them.
Before the first call of a plan runs anything, its graphs are all lowered, and only then is waited for the
kernels of each, when it is needed. Without a pool of compilers (``TORCHINDUCTOR_COMPILE_THREADS=1``) nothing
is gained and nothing lost.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

log = logging.getLogger(__name__)

Waits = list[Callable[[], None]]

__all__ = ["Waits", "expected", "waiting_later"]


def expected(values: Sequence[Any], operands: Sequence[Any]) -> list[torch.Tensor] | None:
    """Fake operands of a graph: laid out as known ones are, and else as when the graph was traced.

    Parameters
    ----------
    values
        Per operand, the (fake) one that the graph was traced with.
    operands
        Per operand, the tensor that it will be given, or None if that is not known yet.

    Returns
    -------
    list or None
        None if an operand is no tensor, or not on the CPU.
    """
    if not all(isinstance(value, torch.Tensor) and value.device.type == "cpu" for value in values):
        return None
    mode = next((v.fake_mode for v in values if not _is_static(v)), None) or FakeTensorMode()
    with mode:
        return [
            torch.empty_strided(
                value.shape,
                value.stride() if operand is None else operand.stride(),
                dtype=value.dtype,
                device=value.device,
            )
            for value, operand in zip(values, operands, strict=True)
        ]


def _is_static(value: torch.Tensor) -> bool:
    return all(isinstance(size, int) for size in (*value.shape, *value.stride()))


@contextlib.contextmanager
def waiting_later() -> Iterator[Waits]:
    """Inside, Inductor does not wait for the kernels of what this thread compiles.

    Yields
    ------
    list
        What waits, one for each graph compiled; to be called, in this order, before the graph is run. Empty
        where Inductor is another than the one known here: it has waited itself then.
    """
    waits: Waits = []
    compilers: Any = importlib.import_module("torch._inductor.async_compile").AsyncCompile
    wait, thread = getattr(compilers, "wait", None), threading.get_ident()
    if wait is None:
        yield waits
        return

    @functools.wraps(wait)
    def later(self: Any, scope: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        generated = scope.get("async_compile") is self  # a module of kernels; tuning waits by itself
        if threading.get_ident() != thread or not generated:
            wait(self, scope, *args, **kwargs)
        else:
            waits.append(functools.partial(wait, self, scope, *args, **kwargs))

    compilers.wait = later
    try:
        yield waits
    finally:
        compilers.wait = wait
