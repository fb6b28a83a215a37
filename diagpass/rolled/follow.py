"""The run of a call that does what a score says.

It still asks Dynamo about the same segments, and reads from the score only as long as the answers are those
of the call that was written down: the same behaviours, with inputs from the same places. If not,
:class:`Changed` is raised, nothing that existed before has been written, and the call is recorded anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from diagpass.rolled.kinds import Kinds
from diagpass.rolled.program import StepProgram
from diagpass.rolled.run import Run
from diagpass.rolled.score import Label, Score, Sources
from diagpass.rolled.values import Box

__all__ = ["Changed", "Following"]


class Changed(Exception):
    """The call is another one than the score's; the text says where."""


class Following(Run):
    """The run of a call that does what a score says.

    Parameters
    ----------
    kinds
        As of :class:`Run`.
    scores
        What earlier calls of this form did; the one that begins like this call is followed.
    """

    def __init__(self, kinds: Kinds, scores: Sequence[Score]) -> None:
        super().__init__(kinds)
        self.score: Score | None = None
        self._scores = scores
        self._sources = Sources()
        self._number = self._settled = self._position = self._segment = 0
        self._placeholders: dict[Label, Box] = {}
        self._tokens_of: dict[Label, list[int]] = {}
        self._leaves: list[Sequence[Any]] = []  # tensors are known by their ids
        self._memory: list[Any] = []

    @property
    def repeats(self) -> bool:
        """Whether the next segment was a repeated one."""
        return self.score is not None and self.score.repeats[self._segment]

    def begin(self, leaves: Sequence[Any]) -> None:
        """Take a segment's leaves."""
        self._sources.segment(self._segment, leaves)
        self._leaves.append(leaves)
        if self.score is not None:
            self._set_places("leaf", self._segment, leaves)

    def step(self, program: StepProgram, args: Sequence[Any]) -> list[Any]:
        """Compare one segment with the score; see :meth:`Run.step`."""
        known = len(self._sources.outside)
        found = self._sources.arguments(self, program, args)
        if self.score is None:
            self._choose(program, found)
        score = self._chosen()
        asked = score.asked[self._number] if self._number < len(score.asked) else None
        if asked is None or program is not asked.program or found != asked.arguments:
            raise Changed(f"segment {self._segment} does something else, or reads from elsewhere")
        for at, value in enumerate(self._sources.outside[known:], known):
            place = score.places.get(("outside", at))
            if place is not None:
                self._memory[place] = value
        return super().step(program, args)

    def _choose(self, program: StepProgram, arguments: list[Label]) -> None:
        """Take the score that begins in this way."""
        for score in self._scores:
            if score.asked[0].program is program and score.asked[0].arguments == arguments:
                self.score = score
                self._memory = list(score.memory)
                for at, item in score.joined.items():
                    made = torch.empty_strided(item.shape, item.stride, dtype=item.dtype, device=item.device)
                    self._memory[score.places["result", at]] = made
                self._set_places("leaf", 0, self._leaves[0])
                return
        raise Changed("it begins in another way")

    def _chosen(self) -> Score:
        assert self.score is not None
        return self.score

    def _set_places(self, kind: str, number: int, leaves: Sequence[Any]) -> None:
        for at, leaf in enumerate(leaves):
            place = self._chosen().places.get((kind, number, at))
            if place is not None:
                self._memory[place] = leaf

    def _check_weights(self, program: StepProgram, args: Sequence[Any]) -> None:
        cells = self.kinds.cells
        super()._check_weights(program, args)
        if self.kinds.cells is not cells:
            raise Changed("weights were replaced")

    def core(self, program: StepProgram, inputs: Sequence[Any]) -> dict[Any, Any]:
        """Stand-ins for what the segment leaves; see :meth:`Run.core`."""
        labels = self._chosen().asked[self._number].labels
        self._number += 1
        boxes: dict[Any, Any] = {
            program.placeholders[at]: value for at, value in zip(program.moving, inputs, strict=True)
        }
        boxes.update((node, self._placeholder(label)) for node, label in labels.items())
        return boxes

    def agree(self, value: Any) -> None:
        """Compare an asked segment's output with the score's."""
        leaves, spec = tree_flatten(value)
        asked = self._chosen().asked[self._number - 1]
        same = spec == self._chosen().spec and all(
            self._sources.of(self, leaf) == label
            if isinstance(leaf, torch.Tensor)
            else label is None and type(leaf) is type(known) and leaf == known
            for leaf, label, known in zip(leaves, asked.leaves, self._chosen().leaves, strict=True)
        )
        if not same:
            raise Changed(f"segment {self._segment} returns something else")

    def perform(self) -> None:
        """Do what was done after the segment that was taken, and before the next."""
        memory, stop = self._memory, self._chosen().marks[self._segment]
        if self._segment + 1 == len(self._chosen().marks):
            self.close()
        for action in self._chosen().actions[self._position : stop]:
            if action.copies:
                target = memory[action.target]
                if action.cut is not None:
                    target = target.narrow(*action.cut)
                target.copy_(memory[action.sources[0]])
            elif action.keeps is not None:
                self._fill_tokens(self._standing_for(action.keeps), memory[action.sources[0]])
            elif action.target < 0:
                action.function()  # type: ignore[misc]
            else:
                values = [memory[at] for at in action.sources]
                memory[action.target] = action.function(*values)  # type: ignore[misc]
            for at in action.dead:
                memory[at] = None
        self._position = stop
        self._segment += 1

    def settling(self, steady: Any) -> None:
        """Stand-ins for what repeated segments leave; see :meth:`Run.settling`."""
        if self._settled >= len(self._chosen().settled):
            raise Changed("segments repeat that did not")
        before, last = self._chosen().settled[self._settled]
        self._settled += 1
        steady.before = [None if label is None else self._placeholder(label) for label in before]
        steady.last = [None if label is None else self._placeholder(label) for label in last]

    def result(self) -> Any:
        """The outputs of all segments, joined."""
        leaves = list(self._chosen().leaves)
        for at in self._chosen().joined:
            leaves[at] = self._memory[self._chosen().places["result", at]]
        spec = self._chosen().spec
        assert spec is not None
        return tree_unflatten(leaves, spec)

    def finish(self) -> None:
        """Put the final state where the step keeps it; see :meth:`Run.finish`."""
        super().finish()
        for name, value in self._chosen().facts.items():
            setattr(self, name, value)
        self._memory, self._leaves = [], []

    def final(self, box: Box) -> torch.Tensor:
        """The value of a box at the end; see :meth:`Run.final`."""
        found = None if box.label is None else self._chosen().final.get(box.label)
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
