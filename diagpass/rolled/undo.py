"""Putting back what a call changed in the step's Python objects, if it cannot be finished.

Remembering the whole step costs more than a short call. So only what a captured behaviour is about to change
is remembered, each time that one runs; the whole step where that is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    def __init__(self, *roots: Any, whole: bool) -> None:
        self._roots = roots
        self._snapshot = Snapshot(*roots, values=False) if whole else None
        self._noted: dict[int, tuple[Any, Any]] = {}

    def note(self, effects: Effects, scope: Mapping[str, Any]) -> None:
        """Remember what is about to be changed; ``scope`` holds what its names begin with."""
        if self._snapshot is not None:
            return
        owners = changed_by(effects, scope)
        if owners is None:
            self._snapshot = Snapshot(*self._roots, values=False)
            return
        for owner in owners:
            if id(owner) not in self._noted:
                self._noted[id(owner)] = owner, contents_of(owner)

    def restore(self) -> None:
        """Put it back."""
        if self._snapshot is not None:
            self._snapshot.restore()
        for owner, contents in self._noted.values():
            put_back(owner, contents)
