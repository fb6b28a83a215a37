"""What a stream sees of the step while others do not: its attributes, and the state that is passed on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from diagpass.capture.effects import Effects, changed_by
from diagpass.state import Snapshot, contents_of, put_back


@dataclasses.dataclass
class Carried:
    """The state that goes from step to step where it is passed."""

    value: Any


class View:
    """A stream's view of the step's attributes, put in place while the stream works.

    Outside they are what they were before the stream, so that half-written state is never seen and what is
    done to them between two outputs does not disturb the stream. Only objects that the stream changed are
    swapped, where it is known which; else all that the step holds.
    """

    def __init__(self, step: torch.nn.Module) -> None:
        self._step = step
        self._outside: dict[int, tuple[Any, Any]] = {}
        self._inside: dict[int, tuple[Any, Any]] = {}
        self._all_outside: Snapshot | None = Snapshot(step, values=False)
        self._all_inside: Snapshot | None = None
        self._swaps_all = False
        self._kept = False
        self._restore: Callable[[], None] = lambda: None

    def begin(self) -> None:
        """Take the view away for the first time, after the reset."""
        assert self._all_outside is not None
        self._outside = {id(item): (item, content) for item, content in self._all_outside.changed()}
        self.leave()
        self._all_outside = None

    def note(self, effects: Effects, scope: Mapping[str, Any]) -> None:
        """Remember what is about to be changed; ``scope`` holds what its names begin with."""
        owners = None if self._swaps_all else changed_by(effects, scope)
        if owners is None:
            if not self._swaps_all:
                self._swaps_all, self._all_outside = True, Snapshot(self._step, values=False)
            self._restore = Snapshot(self._step, values=False).restore
            return
        self._restore = functools.partial(_put_all_back, [(owner, contents_of(owner)) for owner in owners])
        for owner in owners:
            if id(owner) not in self._outside:
                self._outside[id(owner)] = owner, contents_of(owner)

    def undo(self) -> None:
        """Put back what the last segment has changed."""
        self._restore()

    def leave(self) -> None:
        """Take the stream's view away."""
        self._inside = {key: (owner, contents_of(owner)) for key, (owner, _) in self._outside.items()}
        if self._swaps_all and self._all_outside is not None:
            self._all_inside = Snapshot(self._step, values=False)
            self._all_outside.restore()
        for owner, contents in self._outside.values():
            put_back(owner, contents)

    def keep(self) -> None:
        """Let the stream's view stay: it is whole."""
        self._kept = True

    def __enter__(self) -> None:
        if self._swaps_all:
            self._all_outside = Snapshot(self._step, values=False)
            if self._all_inside is not None:
                self._all_inside.restore()
        self._outside = {key: (owner, contents_of(owner)) for key, (owner, _) in self._inside.items()}
        for owner, contents in self._inside.values():
            put_back(owner, contents)

    def __exit__(self, *error: Any) -> None:
        if not self._kept:
            self.leave()


def _put_all_back(found: Iterable[tuple[Any, Any]]) -> None:
    for owner, contents in found:
        put_back(owner, contents)
