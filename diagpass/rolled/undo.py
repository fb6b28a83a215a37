"""Putting back what a call changed in the step's Python objects, if it cannot be finished.

Remembering the whole step costs more than a short call. So only what a captured behaviour is about to change
is remembered, each time that one runs; the whole step where that is not known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from diagpass.capture.effects import Effects, changed_by
from diagpass.state import Snapshot, contents_of, put_back

__all__ = ["Undo"]


class Undo:
    """What a call changed, to be put back by :meth:`restore`.

    Parameters
    ----------
    roots
        The step, and the state that it is given.
    whole
        Whether to remember all of them from the start.

    Attributes
    ----------
    roots
        May be replaced where each segment is given other objects.
    """

    def __init__(self, *roots: Any, whole: bool) -> None:
        self.roots = roots
        self._whole = whole
        self._steps: list[Callable[[], None]] = []
        self._known: set[int] = set()
        self._kept: list[Any] = []  # alive, so that no other object gets their ids
        if whole:
            self._steps.append(Snapshot(*roots, values=False).restore)

    def note(self, effects: Effects, scope: Mapping[str, Any]) -> None:
        """Remember what is about to be changed; ``scope`` holds what its names begin with."""
        if self._whole:
            return
        owners = changed_by(effects, scope)
        if owners is None:
            self._steps.append(Snapshot(*self.roots, values=False).restore)
            return
        for owner in owners:
            if id(owner) not in self._known:
                self._known.add(id(owner))
                self._kept.append(owner)
                self._steps.append(functools.partial(put_back, owner, contents_of(owner)))

    def restore(self) -> None:
        """Put it back, what was changed last first."""
        for step in reversed(self._steps):
            step()
