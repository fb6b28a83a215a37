"""The sequential loop, from the state that is there: what a call goes on with that cannot be deferred."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

import torch

from diagpass.loop import SegmentLoop, own, split_result

__all__ = ["plainly", "same_bits"]


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
