"""Calls like one before: launched from what is known of that one, segment by segment.

Recording a call (boxes, waves, addresses) takes the host longer than a short call takes a GPU. All of it
follows from which behaviours of the step ran and where their inputs came from; the addresses, too, since
buffers are lent in the same order. So a call whose waves were all replays is written down as a *score*: what
was launched, copied and computed between the waves, in order, and where results and final state lay.

A later call of the same form still asks Dynamo about the same segments, and reads from the score only as
long as the answers are those of the call that was written down: the same behaviours, with inputs from the
same places. If not, :class:`Changed` is raised, nothing that existed before has been written, and the call is
recorded anew.

``Writer`` writes a score while a call is recorded; ``Following`` is the run of a call that follows one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from diagpass.rolled.kinds import Kinds, Standing
from diagpass.rolled.program import StepProgram
from diagpass.rolled.run import Run
from diagpass.rolled.values import Box, Row
from diagpass.runtime.clock import current

__all__ = ["Changed", "Following", "Score", "Scores", "Writer"]

log = logging.getLogger(__name__)

MOST = 16  # scores of one step that are kept
FORMS = 256  # forms of calls that are remembered
ATTEMPTS = 8  # to write down a call of one form: at first waves run that were not recorded

Label = tuple[Hashable, ...]
UNKNOWN: Label = ("unknown",)
FACTS = (
    "segments",
    "cells",
    "waves",
    "widest",
    "batched_cells",
    "state_bytes",
    "layers",
    "grid",
    "edges",
)


class Changed(Exception):
    """The call is another one than the score's; the text says where."""


class _Unwritable(Exception):
    """The call cannot be written down; the text says why."""


class _Sources:
    """Where the tensors that a step is given come from: a segment, a result before, or outside."""

    def __init__(self) -> None:
        self.outside: list[torch.Tensor] = []
        self._places: dict[int, Label] = {}

    def segment(self, number: int, leaves: Sequence[Any]) -> None:
        """Name the leaves of the segment to come."""
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                self._places[id(leaf)] = ("leaf", number, at)

    def known(self, value: torch.Tensor) -> Label | None:
        """The name of a tensor that was met before."""
        return self._places.get(id(value))

    def arguments(self, run: Run, program: StepProgram, args: Sequence[Any]) -> list[Label]:
        """The names of what a step is given, weights aside."""
        return [("counter",) if at in program.idle else self.of(run, args[at]) for at in program.moving]

    def of(self, run: Run, value: Any) -> Label:
        """The name of what a value is."""
        if not isinstance(value, torch.Tensor):
            return "number", type(value), value
        box = run.waiting_box(value)
        if box is not None:
            return box.label or UNKNOWN
        if run.is_token(value):
            return UNKNOWN
        found = self._places.get(id(value))
        if found is None:
            found = self._places[id(value)] = ("outside", len(self.outside))
            self.outside.append(value)
        return found


@dataclasses.dataclass
class _Asked:
    """A segment that Dynamo was asked about."""

    program: StepProgram
    arguments: list[Label]
    labels: dict[fx.Node, Label] = dataclasses.field(default_factory=dict)
    leaves: list[Label | None] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Joined:
    """One tensor of the call's result."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True)
class _Action:
    """``memory[target] = function(*memory[sources])``; no longer needed after it: ``dead``.

    With ``copies`` the target is written to instead, with ``cut`` (dim, start, length) only that part of it;
    with ``keeps`` what stands for the state of that label.
    """

    function: Callable[..., Any] | None
    sources: tuple[int, ...]
    target: int = -1
    copies: bool = False
    cut: tuple[int, int, int] | None = None
    keeps: Label | None = None
    dead: tuple[int, ...] = ()


@dataclasses.dataclass(eq=False)
class Score:
    """What a call did.

    Attributes
    ----------
    asked
        The segments that Dynamo was asked about, in order.
    repeats
        Per segment, whether it was recorded as a repeated one.
    actions, marks
        What was done, and how much of it after each segment.
    memory
        Constants, and places for what actions read and make.
    places
        Where in ``memory`` the leaves of segments, tensors from outside and results go.
    final
        Per label, the place of what it stood for at the end, or the part (place, dim, start, length) of a
        result.
    settled
        Per time that repeated segments ended, the labels of the last one's inputs and results.
    leaves, spec
        A segment's output: what in it is no tensor, and its structure.
    joined
        Per leaf that is a tensor, what the joined one is like.
    facts
        What a report says of the run.
    standing
        Where cells, stacks and weights were.
    """

    asked: list[_Asked] = dataclasses.field(default_factory=list)
    repeats: list[bool] = dataclasses.field(default_factory=list)
    actions: list[_Action] = dataclasses.field(default_factory=list)
    marks: list[int] = dataclasses.field(default_factory=list)
    memory: list[Any] = dataclasses.field(default_factory=list)
    places: dict[Label, int] = dataclasses.field(default_factory=dict)
    final: dict[Label, Any] = dataclasses.field(default_factory=dict)
    settled: list[tuple[list[Label | None], list[Label | None]]] = dataclasses.field(default_factory=list)
    leaves: list[Any] = dataclasses.field(default_factory=list)
    spec: TreeSpec | None = None
    joined: dict[int, _Joined] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    standing: Standing | None = None


class Writer:
    """Writes down what a run does.

    Parameters
    ----------
    dim
        The dimension along which outputs are joined.
    buffers
        Where all waves read and write.

    Attributes
    ----------
    obstacle
        Why nothing can be written down, or None.
    """

    def __init__(self, dim: int, buffers: Any) -> None:
        self.score = Score()
        self.obstacle: str | None = None
        self._dim, self._buffers = dim, buffers
        self._sources = _Sources()
        self._constants: set[int] = set()
        self._kinds: Kinds | None = None
        self._waiting: list[list[tuple[int, Any]]] = []
        self._filled = 0
        self._starts: dict[int, int] = {}
        self._keep: list[Any] = []

    def stop(self, why: str) -> None:
        """Say that the call cannot be followed."""
        self.obstacle = self.obstacle or why

    # What the run says while it records.

    def segment(self, leaves: Sequence[Any]) -> None:
        """A segment is about to be recorded; what was done until now belongs to those before."""
        score = self.score
        if score.repeats:
            score.marks.append(len(score.actions))
        self._sources.segment(len(score.repeats), leaves)
        self._keep.append(leaves)
        score.repeats.append(False)

    def repeated(self) -> None:
        """The segment was one more of the same."""
        self.score.repeats[-1] = True

    def asked(self, run: Run, program: StepProgram, args: Sequence[Any]) -> None:
        """Dynamo chose a behaviour for the segment."""
        self._kinds = run.kinds
        self._constants.update(map(id, program.constants.values()))
        found = _Asked(program, self._sources.arguments(run, program, args))
        if UNKNOWN in found.arguments:
            self.stop("a result is read after it was handed out")
        self.score.asked.append(found)

    def returned(self, run: Run, program: StepProgram, boxes: dict[Any, Any]) -> None:
        """The segment's results are these."""
        number = len(self.score.asked) - 1
        found = self.score.asked[-1]
        for node in _leaving(program):
            box = run.value(node, boxes)
            if isinstance(box, Box) and not run.kinds.is_fixed(box):
                box.label = box.label or (number, node)
                found.labels[node] = box.label

    def result(self, run: Run, value: Any, tokens: Mapping[int, Box] | None = None) -> None:
        """The segment's output is this; ``tokens`` says what it stands for where Dynamo was not asked."""
        leaves, spec = tree_flatten(value)
        if self.score.spec is None:
            self.score.spec = spec
            self.score.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        found: list[tuple[int, Any]] = []
        for at, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            dim = self._dim % max(leaf.dim(), 1)
            box = run.waiting_box(leaf) if tokens is None else tokens.get(id(leaf))
            found.append((at, (box or leaf, dim, leaf.shape[dim] if leaf.dim() else 0)))
        if tokens is None:
            self.score.asked[-1].leaves = [
                self._sources.of(run, leaf) if isinstance(leaf, torch.Tensor) else None for leaf in leaves
            ]
            if UNKNOWN in self.score.asked[-1].leaves:
                self.stop("an output comes from nowhere known")
        self._waiting.append(found)

    def settled(self, before: Sequence[Any], last: Sequence[Any]) -> None:
        """Repeated segments are over; the last one's inputs and results are these."""
        number = len(self.score.settled)
        found: list[list[Label | None]] = []
        for kind, values in (("before", before), ("last", last)):
            labels: list[Label | None] = []
            for at, box in enumerate(values):
                if isinstance(box, Box):
                    box.label = box.label or (kind, number, at)
                labels.append(box.label if isinstance(box, Box) else None)
            found.append(labels)
        self.score.settled.append((found[0], found[1]))

    # What happens while waves run.

    def called(self, box: Box, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """A deferred value was computed."""
        try:
            sources = tuple(self._place(argument) for argument in arguments)
        except _Unwritable as error:
            self.stop(str(error))
            return
        box.register = self._new()
        self.score.actions.append(_Action(function, sources, box.register))

    def copied(self, box: Box, row: Row) -> None:
        """A value was copied to where waves can read it again."""
        self._copy(box, lambda: self._row(row))

    def launched(self, again: Callable[[], None] | None) -> None:
        """A wave ran, which ``again`` repeats."""
        if again is None:
            self.stop("a wave ran for the first time")
        else:
            self.score.actions.append(_Action(again, ()))

    def filled(self) -> None:
        """The next segment's output is complete, and was handed out."""
        for at, (source, dim, length) in self._waiting[self._filled]:
            start = self._starts.get(at, 0)
            self._starts[at] = start + length
            part = (dim, start, length)
            place = self._at(("result", at))
            if isinstance(source, Box) and source.label is not None:
                self.score.final.setdefault(source.label, (place, *part))
            self._copy(source, lambda place=place: place, part)
        self._waiting[self._filled] = []
        self._filled += 1

    def kept(self, box: Box) -> None:
        """State that no segment will change is there."""
        if box.label is None:
            self.stop("state is kept that no step left")
            return
        try:
            self.score.actions.append(_Action(None, (self._place(box),), keeps=box.label))
        except _Unwritable as error:
            self.stop(str(error))

    def finished(self, run: Run, kept: Sequence[tuple[torch.Tensor, Box]]) -> None:
        """The final state is in these boxes."""
        for _, box in kept:
            if box.label is None:
                self.stop("state is kept that no step left")
                continue
            try:
                self.score.final[box.label] = self._place(box)
            except _Unwritable as error:
                self.stop(str(error))
        self.score.facts = {name: getattr(run, name) for name in FACTS}
        self.score.standing = run.kinds.standing()

    def done(self, joined: Any) -> Score | None:
        """The score of the call whose outputs were joined to this; None if there is an obstacle."""
        score = self.score
        leaves, spec = tree_flatten(joined)
        if spec != score.spec:
            self.stop("outputs differ in structure")
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                score.joined[at] = _Joined(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
        score.marks.append(len(score.actions))
        if self.obstacle is not None or len(score.marks) != len(score.repeats):
            return None
        score.actions = _with_ends(score)
        return score

    def _new(self, value: Any = None) -> int:
        self.score.memory.append(value)
        return len(self.score.memory) - 1

    def _at(self, label: Label) -> int:
        if label not in self.score.places:
            self.score.places[label] = self._new()
        return self.score.places[label]

    def _copy(self, source: Any, target: Callable[[], int], cut: tuple[int, int, int] | None = None) -> None:
        try:
            sources = (self._place(source),)
            self.score.actions.append(_Action(None, sources, target(), copies=True, cut=cut))
        except _Unwritable as error:
            self.stop(str(error))

    def _row(self, row: Row) -> int:
        """The place of a row of a buffer."""
        if row.address is None:
            raise _Unwritable("a value lies where it will not lie again")
        label = ("row", row.address, row.index)
        if label not in self.score.places:
            self.score.places[label] = self._new(self._buffers.at(row.address).select(0, row.index))
        return self.score.places[label]

    def _place(self, item: Any) -> int:
        """The place of an operand."""
        if not isinstance(item, Box):
            return self._tensor(item) if isinstance(item, torch.Tensor) else self._new(item)
        value = item.value
        if type(value) is Row:
            return self._row(value)
        if item.register is not None:
            return item.register
        if not isinstance(value, torch.Tensor):
            return self._new(value)
        return self._tensor(value)

    def _tensor(self, value: torch.Tensor) -> int:
        known = self._sources.known(value)
        if known is not None:
            return self._at(known)
        if id(value) in self._constants or (self._kinds is not None and self._kinds.is_object(value)):
            label = ("constant", id(value))
            if label not in self.score.places:
                self.score.places[label] = self._new(value)
            return self.score.places[label]
        raise _Unwritable("a tensor is read that is neither a weight nor state nor part of a segment")


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
        self._sources = _Sources()
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


def _leaving(program: StepProgram) -> list[fx.Node]:
    """The nodes whose values leave the step."""
    nodes = [*(out.node for out in program.returned if out.passed is None), *program.updates]
    return [node for node in dict.fromkeys(nodes) if isinstance(node, fx.Node)]


def _with_ends(score: Score) -> list[_Action]:
    """The actions, each with the computed values that nobody needs after it."""
    kept: set[int] = {place for place in score.final.values() if isinstance(place, int)}
    made = {action.target for action in score.actions if not action.copies and action.target >= 0}
    moving = {place for label, place in score.places.items() if label[0] == "leaf"}
    free = (made | moving) - kept
    found: list[_Action] = []
    for action in reversed(score.actions):
        used = {*action.sources, action.target} & free
        free -= used
        found.append(dataclasses.replace(action, dead=tuple(used)))
    return found[::-1]


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
        kinds.refresh()
        standing = kinds.standing()
        scores[:] = [
            score for score in scores if score.standing is not None and score.standing.is_same(standing)
        ]
        if not kinds.runner.buffers.are_free:  # a stream is under way
            return []
        kinds.runner.follow_stream()
        self._known.move_to_end(form)
        return list(scores)

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
