"""What a followed segment returns without being recorded: the same as recording it would return."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diagpass.rolled.follow import Following
from diagpass.rolled.run import Run
from tests import rolled_models as models
from tests.helpers import fast_copy
from tests.rolled_models import T
from tests.tape import check, poisoned, replaying  # noqa: F401

PLAIN = ("armt", "cache_none", "first_flag", "rwkv_state")
RECORDED = ("counter",)  # writes in place


def alike(value: Any, other: Any) -> bool:
    """Whether values that are no tensors are equal, and tensors are laid out alike."""
    if not isinstance(value, torch.Tensor):
        return type(value) is type(other) and value == other
    return (value.shape, value.stride(), value.dtype, value.device) == (
        other.shape,
        other.stride(),
        other.dtype,
        other.device,
    )


@pytest.mark.parametrize("name", [*PLAIN, *RECORDED])
def test_results_are_those_of_recording(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each segment of calls that are followed: numbers are equal, tokens alike and of the same names."""
    quick = Following.step
    counts = {"quick": 0, "recorded": 0}

    def both(self: Following, program: Any, args: Any) -> Any:
        found = quick(self, program, args)
        asked = self.chosen().asked[self._number - 1]
        counts["recorded" if asked.returns is None else "quick"] += 1
        if asked.returns is not None:
            self._number -= 1
            pending, tokens = dict(self._pending), set(self._tokens)
            again = Run.step(self, program, args)
            assert len(found) == len(again) and all(map(alike, found, again))
            for value, other in zip(found, again, strict=True):
                box = self.waiting_box(other) if isinstance(other, torch.Tensor) else None
                if box is not None and value is not other:
                    assert pending[id(value)][1].label == box.label
            self._pending, self._tokens = pending, tokens
            self.last = program, args, found
        return found

    loop = models.build(name)
    fast: Any = fast_copy(loop)
    rtol = 1e-4 if models.expect(name).float32_inside else 1e-10
    states: list[Any] = [None, None]
    for call in range(9):
        if call == 6:
            monkeypatch.setattr(Following, "step", both)
        check(loop, fast, models.inputs(name, 5 * T, seed=call), states, rtol)
    assert counts["quick" if name in PLAIN else "recorded"] > 0
    assert not counts["recorded" if name in PLAIN else "quick"]


def test_segments_are_watched_only_before_those_that_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in a row at most; calls in which none repeats need no watch."""
    loop = models.build("armt")
    fast: Any = fast_copy(loop)
    states: list[Any] = [None, None]
    watched: list[int] = []
    for segments in (3, 9):
        for call in range(5):
            check(loop, fast, models.inputs("armt", segments * T, seed=call), states, 1e-4)
        with monkeypatch.context() as patch:
            saw = fast._session.scores._known
            repeats = [score.repeats for scores in saw.values() for score in scores][-1]
            seen = Following.saw

            def counting(self: Following, segment: Any, result: Any, seen: Any = seen) -> None:
                seen(self, segment, result)
                if self.repeat._last is not None:
                    watched.append(self._segment)

            patch.setattr(Following, "saw", counting)
            check(loop, fast, models.inputs("armt", segments * T, seed=7), states, 1e-4)
        first = repeats.index(True) if True in repeats else None
        assert watched == ([] if first is None else list(range(max(first - 3, 0), first)))
        watched.clear()
