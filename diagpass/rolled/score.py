"""Calls like one before: launched from what is known of that one, segment by segment.

Recording a call (boxes, waves, addresses) takes the host longer than a short call takes a GPU. All of it
follows from which behaviours of the step ran and where their inputs came from; the addresses, too, since
buffers are lent in the same order. So a call whose waves were all replays is written down as a *score*: what
was launched, copied and computed between the waves, in order, and where results and final state lay.

``Writer`` writes a score while a call is recorded; :mod:`diagpass.rolled.follow` has the run of a call that
follows one, :mod:`diagpass.rolled.pages` plays many waves of one as a single launch.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import TreeSpec, tree_flatten

from diagpass.rolled.kinds import Kinds, Standing
from diagpass.rolled.program import StepProgram
from diagpass.rolled.returns import Returns, plan_returns
from diagpass.rolled.run import Run
from diagpass.rolled.values import Box, Row
from diagpass.rolled.waves import WaveWork

__all__ = ["Action", "Asked", "Label", "Score", "Sources", "Writer"]

log = logging.getLogger(__name__)

Label = tuple[Hashable, ...]
UNKNOWN: Label = ("unknown",)
_COUNTER: Label = ("counter",)
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


class _Unwritable(Exception):
    """The call cannot be written down; the text says why."""


class Sources:
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
        idle = program.idle
        return [_COUNTER if at in idle else self.of(run, args[at]) for at in program.moving]

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
class Asked:
    """A segment that Dynamo was asked about."""

    program: StepProgram
    arguments: list[Label]
    labels: dict[fx.Node, Label] = dataclasses.field(default_factory=dict)
    leaves: list[Label | None] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def told(self) -> list[tuple[int, Label]]:
        """The inputs whose names say something, counters aside, with these."""
        pairs = zip(self.program.moving, self.arguments, strict=True)
        return [(at, label) for at, label in pairs if at not in self.program.idle]

    @functools.cached_property
    def returns(self) -> Returns | None:
        """What it returns where nothing has to be recorded for it; see :mod:`diagpass.rolled.returns`."""
        return plan_returns(self.program, self.labels)


@dataclasses.dataclass(frozen=True)
class _Joined:
    """One tensor of the call's result."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True)
class Action:
    """``memory[target] = function(*memory[sources])``; no longer needed after it: ``dead``.

    With ``copies`` the target is written to instead, with ``cut`` (dim, start, length) only that part of it;
    with ``keeps`` what stands for the state of that label. ``works`` are what a replay repeats, which do not
    depend on each other.
    """

    function: Callable[..., Any] | None
    sources: tuple[int, ...]
    target: int = -1
    copies: bool = False
    cut: tuple[int, int, int] | None = None
    keeps: Label | None = None
    dead: tuple[int, ...] = ()
    works: Sequence[Callable[[], None]] = ()


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
    met
        Per tensor outside, with which segment it was met.
    followed
        How many calls did the same.
    pages
        The score as few launches; None as long as there is none.
    """

    asked: list[Asked] = dataclasses.field(default_factory=list)
    repeats: list[bool] = dataclasses.field(default_factory=list)
    actions: list[Action] = dataclasses.field(default_factory=list)
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
    met: list[int] = dataclasses.field(default_factory=list)
    followed: int = 0
    pages: Any = None


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
        self._sources = Sources()
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
        found = Asked(program, self._sources.arguments(run, program, args))
        if UNKNOWN in found.arguments:
            self.stop("a result is read after it was handed out")
        self.score.asked.append(found)
        self._met()

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
            self._met()
        self._waiting.append(found)

    def _met(self) -> None:
        """Say with which segment tensors outside were met that were not known before."""
        fresh = len(self._sources.outside) - len(self.score.met)
        self.score.met += [len(self.score.repeats) - 1] * fresh

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
        self.score.actions.append(Action(function, sources, box.register))

    def copied(self, box: Box, row: Row) -> None:
        """A value was copied to where waves can read it again."""
        self._copy(box, lambda: self._row(row))

    def launched(self, again: Callable[[], None] | None, work: WaveWork) -> None:
        """A wave ran, which ``again`` repeats."""
        if again is None:
            self.stop("a wave ran for the first time")
        else:
            self.score.actions.append(Action(again, (), works=work.launches(self._buffers)))

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
            self.score.actions.append(Action(None, (self._place(box),), keeps=box.label))
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
            self.score.actions.append(Action(None, sources, target(), copies=True, cut=cut))
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


def _leaving(program: StepProgram) -> list[fx.Node]:
    """The nodes whose values leave the step."""
    nodes = [*(out.node for out in program.returned if out.passed is None), *program.updates]
    return [node for node in dict.fromkeys(nodes) if isinstance(node, fx.Node)]


def _with_ends(score: Score) -> list[Action]:
    """The actions, each with the computed values that nobody needs after it."""
    kept: set[int] = {place for place in score.final.values() if isinstance(place, int)}
    made = {action.target for action in score.actions if not action.copies and action.target >= 0}
    moving = {place for label, place in score.places.items() if label[0] == "leaf"}
    free = (made | moving) - kept
    found: list[Action] = []
    for action in reversed(score.actions):
        used = {*action.sources, action.target} & free
        free -= used
        found.append(dataclasses.replace(action, dead=tuple(used)))
    return found[::-1]
