"""What a run would batch: one batched form is traced for each kind, nothing is compiled or run."""

from __future__ import annotations

from collections.abc import Iterable

from diagpass.errors import BatchingError
from diagpass.ir import Kind
from diagpass.lowering.batch import batch_kind
from diagpass.stages import say

__all__ = ["obstacles"]


def obstacles(kinds: Iterable[Kind]) -> dict[int, str]:
    """Kinds without a batched form, each with the reason; kinds of one cell are not asked."""
    found = {}
    for kind in kinds:
        say(f"batch: kind{kind.index}")
        if len(kind.cells) < 2:
            continue
        pairs = [slot.sources[:2] for slot in kind.slots]
        shared = tuple(not slot.literal and a is b for slot, (a, b) in zip(kind.slots, pairs, strict=True))
        try:
            batch_kind(kind, 2, shared)
        except BatchingError as error:
            found[kind.index] = str(error)
    return found
