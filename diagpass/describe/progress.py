"""Progress of long work: a bar on a terminal (rich), one line a stage elsewhere, nothing on request.

The library shows nothing by itself. Inside of ``with Progress(...)`` its stages are shown: capture, analysis,
compilation, segments.
"""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from diagpass.stages import listening

__all__ = ["Progress"]


class Progress:
    """A context manager around long work; what the library does inside is shown.

    Parameters
    ----------
    title
        What is being done.
    silent
        Show nothing at all.
    stream
        Where to; standard error by default, so that results stay alone on standard output.

    Examples
    --------
    >>> import sys, diagpass
    >>> from diagpass.cli import sample
    >>> model, inputs = sample.build(layers=2, segments=2, width=4)
    >>> with diagpass.Progress("my model", silent=True):
    ...     report = diagpass.explain(model, *inputs)
    """

    def __init__(self, title: str, silent: bool = False, stream: TextIO | None = None) -> None:
        self.title, self.silent, self._stream = title, silent, stream
        self._bar: Any = None
        self._task: Any = None
        self._seen: set[str] = set()
        self._begin = 0.0
        self._listening: Any = None

    def __enter__(self) -> Progress:
        self._begin = time.perf_counter()
        if self.silent:
            return self
        self._listening = listening(self.show)
        self._listening.__enter__()
        out = self._out()
        if out.isatty():
            self._open_bar(out)
        if self._bar is None:
            self._line(f"{self.title} ...")
        return self

    def _out(self) -> TextIO:
        return self._stream or sys.stderr

    def _open_bar(self, out: TextIO) -> None:
        try:
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar
        except ImportError:
            return
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        self._bar = Bar(*columns, console=Console(file=out), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(self.title, total=None)

    def show(self, stage: str, done: int, total: int) -> None:
        """Say what is being done, and how much of it is done."""
        if self.silent:
            return
        if self._bar is not None:
            part = f" {done + 1} of {total}" if total and done < total else ""
            self._bar.update(self._task, description=f"{self.title}: {stage}{part}")
            if total:
                self._bar.update(self._task, completed=done, total=total)
        elif (name := stage.partition(":")[0]) not in self._seen:
            self._seen.add(name)
            self._line(f"{self.title}: {name}")

    def __exit__(self, kind: Any, *error: Any) -> None:
        if self._listening is not None:
            self._listening.__exit__(None, None, None)
        if self._bar is not None:
            self._bar.stop()
        elif not self.silent and kind is None:
            self._line(f"{self.title}: {time.perf_counter() - self._begin:.1f} s")

    def _line(self, text: str) -> None:
        self._out().write(text + "\n")
        self._out().flush()
