"""The sequential loop, from the state that is there: what a call goes on with that cannot be deferred."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import torch

from diagpass.loop import SegmentLoop, join, one_step, own, split_result

__all__ = ["go_on", "plainly", "same_bits"]


def go_on(loop: SegmentLoop, segments: Iterable[Any], state: Any, kwargs: dict) -> Any:
    """The call of a loop segment by segment, from the state that is there; its joined outputs."""
    outputs: list[Any] = []
    for segment in segments:
        output, state = one_step(loop, segment, state, kwargs, outputs[-1:])
        outputs.append(output)
    joined = join(outputs, loop.dim)
    return (joined, state) if loop.carries_state else joined


def plainly(
    loop: SegmentLoop, segments: Iterable[Any], state: Any, kwargs: dict
) -> Generator[Any, None, Any]:
    """The outputs of a loop segment by segment, from the state that is there."""
    for segment in segments:
        if loop.carries_state:
            output, state = split_result(loop.step(segment, state, **kwargs), loop.step)
        else:
            output = loop.step(segment, **kwargs)
        yield own(output)
    return state if loop.carries_state else None


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether named values are bitwise equal."""
    return left.keys() == right.keys() and all(
        a.shape == right[name].shape and torch.equal(a.nan_to_num(), right[name].nan_to_num())
        for name, a in left.items()
    )
