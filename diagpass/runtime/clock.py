"""When waves and groups began and ended: asked for by ``with measuring(device)``, nothing otherwise.

    with measuring(device) as clock:
        fast(x)
    clock.seconds()

On the CPU a *mark* is the wall clock. On CUDA it is also an event on the current stream, so that a call is
not slowed by waiting: times are read when all is over. A wave that is replayed as one CUDA graph is one span,
for nothing can be seen inside of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

__all__ = ["Clock", "Span", "clock_of_groups", "clock_of_wave", "current", "measuring"]

Place = tuple[int, int]
Mark = tuple[float, Any]


@dataclasses.dataclass
class Span:
    """A stretch of time.

    Attributes
    ----------
    kind
        The kind of its cells; None for a wave of which it holds the groups.
    cells
        (segment, layer) of each.
    begin, end
        Marks; after :meth:`Clock.seconds` seconds since the clock began, of the device, and in ``host`` those
        of the host that launched it.
    """

    kind: int | None
    cells: tuple[Place, ...]
    begin: Any
    end: Any = None
    host: tuple[float, float] | None = None
    groups: list[Span] = dataclasses.field(default_factory=list)


class Clock:
    """Remembers when waves and the groups in them began and ended.

    Parameters
    ----------
    device
        What the time is taken of: a CUDA device by events, any other by the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waves: list[Span] = []
        self.total = 0.0
        self._begin = self._mark()
        self._end: Mark | None = None

    def _mark(self) -> Mark:
        event: Any = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        return time.perf_counter(), event

    def open_wave(self) -> None:
        """A wave begins."""
        self.waves.append(Span(None, (), self._mark()))

    def close_wave(self) -> None:
        """It is over."""
        self.waves[-1].end = self._mark()

    @contextlib.contextmanager
    def wave(self) -> Iterator[None]:
        """Whatever runs inside is a wave."""
        self.open_wave()
        yield
        self.close_wave()

    @contextlib.contextmanager
    def group(self, *groups: tuple[int, tuple[Place, ...]]) -> Iterator[None]:
        """Whatever runs inside is these groups of the present wave: of each the kind and the cells."""
        begin = self._mark()
        yield
        end = self._mark()
        self.waves[-1].groups += [Span(kind, cells, begin, end) for kind, cells in groups]

    def stop(self) -> None:
        """The end of what is measured."""
        self._end = self._mark()

    def seconds(self) -> list[Span]:
        """The waves, their marks made seconds since the beginning; those without groups are left out."""
        if self._end is None:
            self.stop()
        assert self._end is not None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.total = self._since(self._end)
        self.waves = [wave for wave in self.waves if wave.groups and wave.end is not None]
        for span in [span for wave in self.waves for span in (wave, *wave.groups)]:
            if self.device.type == "cuda":
                span.host = span.begin[0] - self._begin[0], span.end[0] - self._begin[0]
            span.begin, span.end = self._since(span.begin), self._since(span.end)
        for wave in self.waves:
            wave.cells = tuple(sorted({cell for group in wave.groups for cell in group.cells}))
        return self.waves

    def _since(self, mark: Mark) -> float:
        if self.device.type == "cuda":
            return 1e-3 * self._begin[1].elapsed_time(mark[1])
        return mark[0] - self._begin[0]


_current: ContextVar[Clock | None] = ContextVar("diagpass_clock", default=None)


def current() -> Clock | None:
    """The clock of the innermost ``measuring`` around this code, or None."""
    return _current.get()


def clock_of_wave() -> contextlib.AbstractContextManager[None]:
    """What is to be put around a wave: nothing unless somebody measures."""
    clock = _current.get()
    return _NOTHING if clock is None else clock.wave()


def clock_of_groups(*groups: tuple[Any, Iterable[Any]]) -> contextlib.AbstractContextManager[None]:
    """What is to be put around groups of a wave, of each its kind and its cells."""
    clock = _current.get()
    if clock is None:
        return _NOTHING
    return clock.group(
        *((kind.index, tuple((cell.segment, cell.layer) for cell in cells)) for kind, cells in groups)
    )


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


@contextlib.contextmanager
def measuring(device: torch.device) -> Iterator[Clock]:
    """Have the calls inside note when their waves and groups begin and end."""
    clock = Clock(device)
    token = _current.set(clock)
    try:
        yield clock
    finally:
        _current.reset(token)
        clock.stop()
