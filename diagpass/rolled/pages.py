"""A score as few launches: what some segments in a row let run becomes one replay, a *page*.

Between the launches of two waves the host copies, computes glue and keeps state; for a short call that takes
longer than the waves. A page has all of it in one recording. What a call gives (segments, state from before)
is copied to where the pages read it, what leaves a page (outputs, final state) is copied from there when it
has been played. A page that needs nothing that is not known yet is played at once, while Dynamo is still
asked whether the call is the one that the score says: until it has said so, nobody sees what pages wrote.

The values of state that a reset has just made are known without a look (:mod:`diagpass.rolled.fills`). If
all state at the start is such, pages are played before the reset.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from diagpass.capture.functional import is_random
from diagpass.rolled.fills import Fill, Fills
from diagpass.rolled.run import as_captured
from diagpass.rolled.score import Action, Label, Score
from diagpass.runtime.buffers import Buffers
from diagpass.runtime.layouts import like, overlaps
from diagpass.runtime.replay import Recorder

__all__ = ["Pages", "Playing", "new_results", "press"]

log = logging.getLogger(__name__)

SEGMENTS = 16  # of a page
LEADING = 4  # waves of the first one, at most
MOST_SEGMENTS = 256  # of a call that is pressed
MOST_BYTES = 2**25  # that a call gives


class _Unpressable(Exception):
    """The score cannot be pressed; the text says why."""


class Page:
    """Some segments' actions in one recording.

    Attributes
    ----------
    again
        Does them.
    outputs
        What leaves it for the call's results: a tensor, a place in memory, and the part of it.
    kept
        What leaves it for final state, by label.
    ready
        The segment with which the last of what it reads is known.
    """

    def __init__(self, pressing: _Pressing, actions: Sequence[Action], ready: int) -> None:
        self.ready = ready
        found: list[tuple[Action, torch.Tensor]] = []

        def work() -> list[torch.Tensor]:
            found[:] = pressing.do(actions)
            return [tensor for _, tensor in found]

        self.again, tensors = pressing.recorder.press(work)
        pairs = list(zip([action for action, _ in found], tensors, strict=True))
        found.clear()
        self.outputs = [(tensor, action.target, action.cut) for action, tensor in pairs if action.copies]
        self.kept = [(action.keeps, tensor) for action, tensor in pairs if action.keeps is not None]


class _Pressing:
    """Does a score's actions one after the other while they are recorded."""

    def __init__(self, score: Score, given: Mapping[int, torch.Tensor], recorder: Recorder, buffers: Buffers):
        self.recorder, self._buffers = recorder, buffers
        self.stage = {place: like(value) for place, value in given.items()}
        self.memory: list[Any] = [*score.memory]
        for place, value in given.items():
            self.memory[place] = self.stage[place].copy_(value)
        self._device = next(iter(given.values())).device
        self._results = {place for label, place in score.places.items() if label[0] == "result"}
        self._made: set[int] = set()

    def do(self, actions: Sequence[Action]) -> list[tuple[Action, torch.Tensor]]:
        """Do actions; those that let something leave, and what."""
        memory = self.memory
        found: list[tuple[Action, torch.Tensor]] = []
        for action in actions:
            values = [memory[at] for at in action.sources]
            if action.keeps is not None or (action.copies and action.target in self._results):
                found.append((action, self._leaving(action.sources[0], values[0])))
            elif action.copies:
                _part(memory[action.target], action.cut).copy_(values[0])
            elif action.target >= 0:
                assert action.function is not None
                memory[action.target] = self._checked(action.function(*self._checked(values)))
                self._made.add(action.target)
            elif action.works:
                self.recorder.beside(action.works)
            for at in self._made.intersection(action.dead):
                memory[at] = None
        return found

    def _leaving(self, place: int, value: torch.Tensor) -> torch.Tensor:
        """A value that nothing in the page will write over."""
        own = place in self._made and not self._buffers.holds(value)
        return value if own else value.clone()

    def _checked(self, values: Any) -> Any:
        """Values, none of them on another device, where nothing would be recorded."""
        for value in tree_leaves(values):
            if isinstance(value, torch.Tensor) and value.device != self._device:
                raise _Unpressable(f"glue reads or makes a tensor on {value.device}")
        return values


class Pages:
    """A score, pressed.

    Attributes
    ----------
    score
        What they play.
    pages
        In the order in which they are played.
    outside, leaves
        By place, the number of a tensor that is there before the call; the segment of one that is part of
        it, and its number there.
    memory
        The score's, with what the pages make.
    fills
        By place, what the tensor outside held at the start of the last call, where that is a fill.
    watched
        Whether the reset is worth watching.
    """

    def __init__(self, score: Score, pressing: _Pressing) -> None:
        self.score = score
        self.pages: list[Page] = []
        places = score.places.items()
        self.outside: dict[int, Any] = {place: label[1] for label, place in places if label[0] == "outside"}
        self.leaves: dict[int, Any] = {place: label[1:] for label, place in places if label[0] == "leaf"}
        self.memory = pressing.memory
        self.fills: dict[int, Fill] = {}
        self.watched = True
        self._stage = pressing.stage
        self._staged: dict[int, Fill] = {}

    def ready(self, actions: Sequence[Action]) -> int:
        """The segment with which all is known that actions read."""
        read = {at for action in actions for at in action.sources}
        return max((self.score.met[self.outside[at]] for at in read & self.outside.keys()), default=0)

    @property
    def are_foreseen(self) -> bool:
        """Whether all that is there before the next call may be known to be fills."""
        return self.watched and self.fills.keys() == self.outside.keys()

    def stage(self, values: Mapping[int, torch.Tensor]) -> None:
        """Put what a call gives where pages read it."""
        if values:
            torch._foreach_copy_([self._stage[place] for place in values], list(values.values()))
        for place in values:
            self._staged.pop(place, None)

    def stage_fills(self) -> None:
        """Put there what is foreseen."""
        for place, fill in self.fills.items():
            if self._staged.get(place) != fill:
                self._stage[place].fill_(fill.value)
                self._staged[place] = fill


class Playing:
    """One playing of pages, for one call.

    Parameters
    ----------
    pages
        What is played.
    leaves
        The leaves of each segment.

    Attributes
    ----------
    results
        By place, the joined outputs.
    """

    def __init__(self, pages: Pages, leaves: Sequence[Sequence[Any]]) -> None:
        self.pages = pages
        self.results = new_results(pages.score)
        self._leaves = {place: leaves[segment][at] for place, (segment, at) in pages.leaves.items()}
        self._outside: dict[int, torch.Tensor] = {}
        self._waiting = dict(self._leaves)
        self._next = 0
        self._is_ahead = False

    def play_ahead(self) -> None:
        """Play all, with what is foreseen."""
        self._is_ahead = True
        with as_captured():
            self.pages.stage_fills()
            self._play(len(self.pages.pages))

    def give(self, place: int, value: torch.Tensor, fills: Fills | None) -> None:
        """Say what is there before the call.

        Parameters
        ----------
        place, value
            A tensor outside and its place.
        fills
            What the reset made, if it was watched.
        """
        self._outside[place] = value
        fill = None if fills is None else fills.of(value)
        if self._is_ahead and fill != self.pages.fills[place]:
            self._begin_again()
        if not self._is_ahead:
            self._waiting[place] = value
            if fill is not None:
                self.pages.fills[place] = fill

    def advance(self, segment: int) -> None:
        """Play what can be played when Dynamo has been asked about this segment."""
        pages = self.pages.pages
        stop = self._next
        while stop < len(pages) and pages[stop].ready <= segment:
            stop += 1
        if stop > self._next:
            self._play(stop)

    def finish(self, fills: Fills | None) -> None:
        """No segment follows: what was played ahead is right, or is played again."""
        if fills is not None and not fills.wrote_only(self._outside.values()):
            if self._is_ahead:
                self._begin_again()
            self.pages.fills.clear()
        self.pages.watched = self.pages.fills.keys() == self.pages.outside.keys()
        self.advance(len(self.pages.score.marks))

    def kept(self) -> list[tuple[Label, torch.Tensor]]:
        """The final state; all has been played."""
        return self.pages.pages[-1].kept

    def _begin_again(self) -> None:
        log.info("pages were played ahead in vain: the state at the start is another")
        self._is_ahead, self._next = False, 0
        self.pages.fills.clear()
        self._waiting = {**self._leaves, **self._outside}

    def _play(self, stop: int) -> None:
        self.pages.stage(self._waiting)
        self._waiting = {}
        for page in self.pages.pages[self._next : stop]:
            page.again()
            if page.outputs:
                targets = [_part(self.results[place], cut) for _, place, cut in page.outputs]
                torch._foreach_copy_(targets, [value for value, *_ in page.outputs])
        self._next = stop


def new_results(score: Score) -> dict[int, torch.Tensor]:
    """Memory for the joined outputs, by place."""
    return {
        score.places["result", at]: torch.empty_strided(
            item.shape, item.stride, dtype=item.dtype, device=item.device
        )
        for at, item in score.joined.items()
    }


def press(
    score: Score, given: Mapping[int, torch.Tensor], recorder: Recorder, buffers: Buffers
) -> Pages | None:
    """Record a score as pages.

    Parameters
    ----------
    score
        What is pressed.
    given
        What a call gave, by its place in the score's memory.
    recorder, buffers
        Those of the waves.

    Returns
    -------
    Pages or None
        None if it cannot be done; the log says why.
    """
    try:
        _check(score, given)
        with torch.inference_mode(False), as_captured():
            pressing = _Pressing(score, given, recorder, buffers)
            pages, begin = Pages(score, pressing), 0
            for stop in _stops(score):
                actions = score.actions[begin:stop]
                pages.pages.append(Page(pressing, actions, pages.ready(actions)))
                begin = stop
        if any(page.kept for page in pages.pages[:-1]):
            raise _Unpressable("state is kept before the last segments")
    except (_Unpressable, RuntimeError) as error:
        log.info("a call of %d segments cannot be pressed: %s", len(score.marks), error)
        return None
    log.debug("pressed a call of %d segments: %d pages", len(score.marks), len(pages.pages))
    return pages


def _stops(score: Score) -> list[int]:
    """Where pages end, as numbers of actions.

    A device begins when all of a page has been handed to it. So the first one is short: while it is played,
    the next is handed over. State is kept by the last page alone.
    """
    marks = len(score.marks)
    stops = [score.marks[min(at, marks) - 1] for at in range(SEGMENTS, marks + SEGMENTS, SEGMENTS)]
    waves = [at for at, action in enumerate(score.actions) if action.works]
    kept = next((at for at, action in enumerate(score.actions) if action.keeps is not None), stops[-1])
    first = min([kept, *(at for at in waves[LEADING : LEADING + 1])])
    return [first, *stops] if 0 < first < stops[0] else stops


def _check(score: Score, given: Mapping[int, torch.Tensor]) -> None:
    if len(score.marks) > MOST_SEGMENTS:
        raise _Unpressable("it is long")
    if not given:
        raise _Unpressable("it is given nothing")
    if sum(value.nbytes for value in given.values()) > MOST_BYTES:
        raise _Unpressable("it is given much")
    devices = {value.device for value in given.values()}
    devices |= {item.device for item in score.joined.values()}
    if len(devices) > 1:
        raise _Unpressable("it is on several devices")
    if any(overlaps(value) for value in given.values()):
        raise _Unpressable("it is given a tensor that overlaps itself")
    for program in {asked.program for asked in score.asked}:
        if any(is_random(node) for node in program.step.graph.graph.nodes):
            raise _Unpressable("it draws random numbers")


def _part(value: torch.Tensor, cut: tuple[int, int, int] | None) -> torch.Tensor:
    return value if cut is None else value.narrow(*cut)
