"""The run of a call that does what a score says.

It still asks Dynamo about the same segments, and reads from the score only as long as the answers are those
of the call that was written down: the same behaviours, with inputs from the same places. If not,
:class:`Changed` is raised, nothing that existed before has been written, and the call is recorded anew.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from diagpass.rolled.fills import Fills
from diagpass.rolled.kinds import Kinds
from diagpass.rolled.layout import fixed_layout
from diagpass.rolled.pages import Playing, new_results
from diagpass.rolled.program import StepProgram
from diagpass.rolled.repeat import WATCHED
from diagpass.rolled.run import Run
from diagpass.rolled.score import Asked, Label, Score, Sources
from diagpass.rolled.values import Box

__all__ = ["Changed", "Following", "Given"]


class Changed(Exception):
    """The call is another one than the score's; the text says where."""


class Given:
    """The segments of a call, in the layout in which the step is given them; made when they are asked for."""

    def __init__(self, segments: Sequence[Any]) -> None:
        self._segments = segments

    @functools.cached_property
    def segments(self) -> list[Any]:
        """The segments."""
        return [_laid_out(segment) for segment in self._segments]

    @functools.cached_property
    def leaves(self) -> list[list[Any]]:
        """The leaves of each."""
        return [
            [segment] if isinstance(segment, torch.Tensor) else tree_leaves(segment)
            for segment in self.segments
        ]


def _laid_out(segment: Any) -> Any:
    lay_out = functools.partial(fixed_layout, own=False)
    if isinstance(segment, torch.Tensor):
        return lay_out(segment)
    return tree_map_only(torch.Tensor, lay_out, segment)


class Following(Run):
    """The run of a call that does what a score says.

    Parameters
    ----------
    kinds
        As of :class:`Run`.
    scores
        What earlier calls of this form did; the one that begins like this call is followed.
    leaves
        The leaves of each segment.
    ahead, fills
        What is played already, and what the reset made, if it was watched.
    """

    def __init__(
        self,
        kinds: Kinds,
        scores: Sequence[Score],
        leaves: Sequence[Sequence[Any]],
        ahead: Playing | None = None,
        fills: Fills | None = None,
    ) -> None:
        super().__init__(kinds)
        self.score: Score | None = None
        self._scores, self._leaves = scores, leaves  # alive: tensors are known by their ids
        self._playing, self._fills = ahead, fills
        self._sources = Sources()
        self._number = self._settled = self._position = self._segment = self._met = 0
        self._placeholders: dict[Label, Box] = {}
        self._tokens_of: dict[Label, list[int]] = {}
        self._memory: list[Any] = []

    @property
    def repeats(self) -> bool:
        """Whether the next segment was a repeated one."""
        return self.score is not None and self.score.repeats[self._segment]

    def begin(self) -> None:
        """Take the next segment."""
        self._sources.segment(self._segment, self._leaves[self._segment])

    def step(self, program: StepProgram, args: Sequence[Any]) -> list[Any]:
        """Compare one segment with the score; see :meth:`Run.step`."""
        if self.score is None:
            self._choose(program, self._sources.arguments(self, program, args))
            asked = self.chosen().asked[0]
        else:
            known = self.score.asked
            asked = known[self._number] if self._number < len(known) else None
            if asked is None or program is not asked.program or not self._reads_the_same(asked, args):
                raise Changed(f"segment {self._segment} does something else, or reads from elsewhere")
        self._meet()
        if asked.returns is None or self._written:
            return super().step(program, args)
        begin = time.perf_counter()
        if self.undo is not None:
            self.undo.note(program.step.effects, self.scope)
        self._check_weights(program, args)
        self._number += 1
        results, tokens = asked.returns.make(args)
        for token, box in tokens:
            key = id(token)
            self._pending[key] = self._watch(token), box
            self._tokens.add(key)
        self.last = program, args, results
        self.seconds += time.perf_counter() - begin
        return results

    def _reads_the_same(self, asked: Asked, args: Sequence[Any]) -> bool:
        """Whether a segment's inputs, weights and counters aside, come from where the score says."""
        for at, label in asked.told:
            value = args[at]
            found = self._pending.get(id(value)) if isinstance(value, torch.Tensor) else None
            if found is not None and found[0]() is value:
                if found[1].label != label:
                    return False
            elif self._sources.of(self, value) != label:
                return False
        return True

    def _meet(self) -> None:
        """Put tensors from outside that were met just now where actions read them."""
        for at, value in enumerate(self._sources.outside[self._met :], self._met):
            place = self.chosen().places.get(("outside", at))
            if place is None:
                continue
            self._memory[place] = value
            if self._playing is not None:
                self._playing.give(place, value, self._fills)
        self._met = len(self._sources.outside)

    def _choose(self, program: StepProgram, arguments: list[Label]) -> None:
        """Take the score that begins in this way."""
        for score in self._scores:
            if score.asked[0].program is program and score.asked[0].arguments == arguments:
                self.score = score
                self._take(score)
                return
        raise Changed("it begins in another way")

    def chosen(self) -> Score:
        """What is followed."""
        assert self.score is not None
        return self.score

    def _take(self, score: Score) -> None:
        if self._playing is not None and self._playing.pages is not score.pages:
            self._playing.pages.watched = False  # it was played ahead in vain
            self._playing = None
        if self._playing is None and score.pages is not None:
            self._playing = Playing(score.pages, self._leaves)
        self._memory = list(score.memory)
        for label, place in score.places.items():
            if label[0] == "leaf":
                self._memory[place] = self._leaves[label[1]][label[2]]  # type: ignore[index, call-overload]
        results = new_results(score) if self._playing is None else self._playing.results
        for place, made in results.items():
            self._memory[place] = made

    def _check_weights(self, program: StepProgram, args: Sequence[Any]) -> None:
        if not self._written and self.kinds.are_known(program, args):
            return  # and so none of them is a token
        cells = self.kinds.cells
        super()._check_weights(program, args)
        if self.kinds.cells is not cells:
            raise Changed("weights were replaced")

    def core(self, program: StepProgram, inputs: Sequence[Any]) -> dict[Any, Any]:
        """Stand-ins for what the segment leaves; see :meth:`Run.core`."""
        labels = self.chosen().asked[self._number].labels
        self._number += 1
        boxes: dict[Any, Any] = {
            program.placeholders[at]: value for at, value in zip(program.moving, inputs, strict=True)
        }
        boxes.update((node, self._placeholder(label)) for node, label in labels.items())
        return boxes

    def check_results(self, outputs: Any) -> None:
        """The call that was written down passed; see :meth:`Run.check_results`."""

    def agree(self, value: Any) -> None:
        """Compare an asked segment's output with the score's."""
        leaves, spec = tree_flatten(value)
        asked = self.chosen().asked[self._number - 1]
        same = spec == self.chosen().spec and all(
            self._sources.of(self, leaf) == label
            if isinstance(leaf, torch.Tensor)
            else label is None and type(leaf) is type(known) and leaf == known
            for leaf, label, known in zip(leaves, asked.leaves, self.chosen().leaves, strict=True)
        )
        if not same:
            raise Changed(f"segment {self._segment} returns something else")
        self._meet()

    def saw(self, segment: Any, result: Any) -> None:
        """Look at a segment that was asked about, if it is one of those that later ones repeat."""
        if any(self.chosen().repeats[self._segment : self._segment + WATCHED + 1]):
            self.repeat.saw(self, segment, result, self.carried.value)
        else:
            self.repeat.missed()

    def perform(self) -> None:
        """Do what was done after the segment that was taken, and before the next."""
        is_last = self._segment + 1 == len(self.chosen().marks)
        if is_last:
            self.close()
        if self._playing is None:
            self._act(self.chosen().marks[self._segment])
        else:
            self._playing.advance(self._segment)
            if is_last:
                self._end(self._playing)
        self._segment += 1

    def _act(self, stop: int) -> None:
        """Do the score's actions up to this one."""
        memory = self._memory
        for action in self.chosen().actions[self._position : stop]:
            if action.copies:
                target = memory[action.target]
                if action.cut is not None:
                    target = target.narrow(*action.cut)
                target.copy_(memory[action.sources[0]])
            elif action.keeps is not None:
                keys = self._standing_for(action.keeps)
                self._fill_tokens(keys, [memory[action.sources[0]]] * len(keys))
            elif action.target < 0:
                action.function()  # type: ignore[misc]
            else:
                values = [memory[at] for at in action.sources]
                memory[action.target] = action.function(*values)  # type: ignore[misc]
            for at in action.dead:
                memory[at] = None
        self._position = stop

    def _end(self, playing: Playing) -> None:
        """Take what the pages leave."""
        playing.finish(self._fills)
        kept = [(key, value) for label, value in playing.kept() for key in self._standing_for(label)]
        self._fill_tokens([key for key, _ in kept], [value for _, value in kept])
        for place in self.chosen().final.values():
            if isinstance(place, int):
                self._memory[place] = playing.pages.memory[place]

    def settling(self, steady: Any) -> None:
        """Stand-ins for what repeated segments leave; see :meth:`Run.settling`."""
        if self._settled >= len(self.chosen().settled):
            raise Changed("segments repeat that did not")
        before, last = self.chosen().settled[self._settled]
        self._settled += 1
        steady.before = [None if label is None else self._placeholder(label) for label in before]
        steady.last = [None if label is None else self._placeholder(label) for label in last]

    def result(self) -> Any:
        """The outputs of all segments, joined."""
        leaves = list(self.chosen().leaves)
        for at in self.chosen().joined:
            leaves[at] = self._memory[self.chosen().places["result", at]]
        spec = self.chosen().spec
        assert spec is not None
        return tree_unflatten(leaves, spec)

    def given(self) -> dict[int, torch.Tensor]:
        """What the call gave, by its place in the score's memory; before :meth:`finish`."""
        score = self.chosen()
        found = {}
        for label, place in score.places.items():
            if label[0] == "leaf":
                found[place] = self._leaves[label[1]][label[2]]  # type: ignore[index, call-overload]
            elif label[0] == "outside":
                found[place] = self._sources.outside[label[1]]  # type: ignore[index]
        return found

    def finish(self) -> None:
        """Put the final state where the step keeps it; see :meth:`Run.finish`."""
        super().finish()
        for name, value in self.chosen().facts.items():
            setattr(self, name, value)
        self._memory, self._leaves, self._playing = [], [], None

    def final(self, box: Box) -> torch.Tensor:
        """The value of a box at the end; see :meth:`Run.final`."""
        found = None if box.label is None else self.chosen().final.get(box.label)
        if found is None:
            raise Changed("state is kept that was not kept then")
        if isinstance(found, tuple):
            place, dim, start, length = found
            return self._memory[place].narrow(dim, start, length)
        return self._memory[found]

    def _standing_for(self, label: Label) -> list[int]:
        """The tokens (their keys) that stand for what has a label; asked when no segment follows."""
        if not self._tokens_of:
            for key, (_, box) in self._pending.items():
                if key in self._tokens and box.label is not None:
                    self._tokens_of.setdefault(box.label, []).append(key)
        return self._tokens_of.get(label, [])

    def _placeholder(self, label: Label) -> Box:
        box = self._placeholders.get(label)
        if box is None:
            box = self._placeholders[label] = Box()
            box.label = label
        return box
