"""The scores that are kept: of one step, by the form of the call."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

import torch

from diagpass.rolled.kinds import Kinds, Standing
from diagpass.rolled.pages import press
from diagpass.rolled.score import Score, Writer
from diagpass.runtime.clock import current

__all__ = ["Scores"]

log = logging.getLogger(__name__)

MOST = 16  # scores of one step that are kept
FORMS = 256  # forms of calls that are remembered
ATTEMPTS = 8  # to write down a call of one form: at first waves run that were not recorded


class Scores:
    """The scores of one step, by the form of the call; a bounded number of them.

    Attributes
    ----------
    followed
        How many calls did what a score says.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, list[Score]] = OrderedDict()
        self._attempts: dict[Hashable, int] = {}
        self.followed = 0

    def get(self, form: Hashable, kinds: Kinds) -> list[Score]:
        """The scores for a form that still hold: weights and buffers are where they were."""
        scores = self._known.get(form)
        if not scores or current() is not None:  # a clock is to see each wave
            return []
        standing = kinds.glance() if kinds.follow_weights else kinds.standing()
        scores[:] = [score for score in scores if _stands(score, standing)]
        if not kinds.runner.buffers.are_free:  # a stream is under way
            return []
        kinds.runner.follow_stream()
        self._known.move_to_end(form)
        return list(scores)

    def still(self, scores: Sequence[Score], kinds: Kinds) -> list[Score]:
        """Those of the scores that hold after the reset, too, which may have written weights."""
        standing = kinds.glance() if scores else None
        return [score for score in scores if standing is not None and _stands(score, standing)]

    def was_followed(self, score: Score, given: Mapping[int, torch.Tensor], kinds: Kinds) -> None:
        """Count; a score that was followed for the first time is pressed.

        Parameters
        ----------
        score, kinds
            What was followed, and the kinds of its cells.
        given
            What the call gave, by its place in the score's memory.
        """
        self.followed += 1
        score.followed += 1
        if score.followed == 1:
            score.pages = press(score, given, kinds.runner.recorder, kinds.runner.buffers)

    def writer(self, form: Hashable, dim: int, kinds: Kinds) -> Writer | None:
        """What writes a score for a form; None where there is no use in one."""
        buffers = getattr(kinds.runner, "buffers", None)
        attempts = self._attempts.get(form, 0)
        if buffers is None or attempts >= ATTEMPTS:
            return None
        if len(self._attempts) > FORMS:
            self._attempts.clear()
        self._attempts[form] = attempts + 1
        return Writer(dim, buffers)

    def keep(self, form: Hashable, score: Score | None) -> None:
        """Keep what a writer wrote."""
        if score is None:
            return
        log.debug("wrote down a call of %d segments: %d actions", len(score.repeats), len(score.actions))
        self._known.setdefault(form, []).append(score)
        self._known.move_to_end(form)
        if len(self._known) > MOST:
            self._known.popitem(last=False)

    def drop(self, form: Hashable, score: Score | None) -> None:
        """Forget a score that does not hold."""
        scores = self._known.get(form, [])
        if score in scores:
            scores.remove(score)


def _stands(score: Score, standing: Standing) -> bool:
    """Whether weights and buffers are where they were."""
    return score.standing is not None and score.standing.is_same(standing)
