"""What a stream sees of the step while others do not: its attributes, and the state that is passed on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from diagpass.state import Snapshot


@dataclasses.dataclass
class Carried:
    """The state that goes from step to step where it is passed."""

    value: Any


class View:
    """A stream's view of the step's attributes, put in place while the stream works.

    Outside they are what they were before the stream, so that half-written state is never seen and what is
    done to them between two outputs does not disturb the stream.
    """

    def __init__(self, step: torch.nn.Module) -> None:
        self._step = step
        self._outside = Snapshot(step, values=False)
        self._inside: Snapshot | None = None
        self._kept = False

    def leave(self) -> None:
        """Take the stream's view away."""
        self._inside = Snapshot(self._step, values=False)
        self._outside.restore()

    def keep(self) -> None:
        """Let the stream's view stay: it is whole."""
        self._kept = True

    def __enter__(self) -> None:
        if self._inside is not None:
            self._inside.restore()

    def __exit__(self, *error: Any) -> None:
        if not self._kept:
            self.leave()
