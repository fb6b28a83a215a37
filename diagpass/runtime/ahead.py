"""Several graphs compiled by Inductor for the CPU, its compiler working on one while the next is lowered.

Inductor lowers a graph to C++ in this process, has the kernels compiled by others, and waits for them.
Here the graphs of a plan, or of the first waves of recorded segments, are all lowered before anything runs,
and only then is waited for the kernels of each. The kernels of a graph are compiled together
(:mod:`diagpass.runtime.together`), which is all that is gained without a pool of compilers
(``TORCHINDUCTOR_COMPILE_THREADS=1``), and for a graph that is compiled when it is first called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diagpass.replaced import Replaced
from diagpass.runtime.together import compile_together

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
    with _compilers.inside(waits):
        yield waits


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """Stands for a kernel in a generated module until it is compiled."""

    types: Sequence[str]
    source: str


def _cpp_pybinding(self: Any, argtypes: Sequence[str], source_code: str) -> Any:
    """Stands for ``AsyncCompile.cpp_pybinding`` while any thread is inside."""
    if _compilers.state is None:
        return _compilers.original("cpp_pybinding")(self, argtypes, source_code)
    return _Kernel(argtypes, source_code)


def _wait(self: Any, scope: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Stands for ``AsyncCompile.wait`` while any thread is inside."""
    wait = functools.partial(_compilers.original("wait"), self, scope, *args, **kwargs)
    apart = functools.partial(_compilers.original("cpp_pybinding"), self)
    waits = _compilers.state
    if waits is None or scope.get("async_compile") is not self:  # no module of kernels: tuning, say
        wait()
        return
    kernels = {name: value for name, value in scope.items() if isinstance(value, _Kernel)}
    try:
        finish = compile_together([(each.types, each.source) for each in kernels.values()], self.submit)
    except Exception as error:
        finish = functools.partial(_raise, error)

    def finished() -> None:
        try:
            scope.update(zip(kernels, finish(), strict=True))
        except Exception as error:
            log.info("kernels are compiled one by one (%s: %s)", type(error).__name__, error)
            scope.update({name: apart(each.types, each.source) for name, each in kernels.items()})
        wait()

    waits.append(finished)


def _raise(error: Exception) -> Any:
    raise error


_compilers: Replaced[Waits] = Replaced(
    "torch._inductor.async_compile", "AsyncCompile", {"wait": _wait, "cpp_pybinding": _cpp_pybinding}
)
