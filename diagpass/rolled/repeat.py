"""Segments that do what the last ones did: recorded from what those were, without asking Dynamo again.

Asking is sound but slow: guards are checked, Python objects written, tokens made. It can be left out where
the answer is known. Say that a captured behaviour has run on segments s - 1, s and s + 1, that its effects on
Python objects are *closed* (:mod:`diagpass.capture.effects`), and that each of its inputs came, at both
transitions, from the same place: a result of the segment before, an input of the segment before, the segment
itself, or nowhere, being the same object. Then the Python state at the end of s + 1 is that at its beginning,
but for tensors and for counters that no guard asks about; and the tensors have the properties of those
before, since they come from the same outputs of the same graph. So the guards that held will hold, the same
graph will be chosen and its inputs will come from the same places, by induction for any number of segments.

What follows a behaviour is settled by the behaviour, not by what ran before it. So once two transitions have
shown where its inputs come from, it is remembered with the program (:class:`Succession`), and later one
segment of it will do: the guards have held for it, no object is changed but as closed effects say, and the
tensors that replace what it read are like those that took that place then. The circumstances must be those of
then: what the inputs are like, which of them are one object, and what the step keeps, results of the segment
or inputs that stay. Where a segment keeps what was its input in another place, two transitions of the same
call are watched each time.

At the end the step holds what the last segment left. A result that only the step has is filled with it;
anything else that it keeps is given another tensor in its place: a result that was handed out holds that
segment's value for good, and what was an input is perhaps held by others.

``Repeat.saw`` looks at each segment that Dynamo was asked about; ``Repeat.record`` records one more of the
same, or says that it is another one; ``Repeat.settle`` brings tokens and counters up to date, before Dynamo
is asked again and at the end.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from diagpass.capture.effects import resolve
from diagpass.rolled.program import StepProgram
from diagpass.rolled.values import Box

__all__ = ["WATCHED", "Origin", "Repeat", "Succession"]

WATCHED = 3  # segments in a row, two transitions, that show what follows a behaviour
CIRCUMSTANCES = 8  # of one behaviour that are kept


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an input comes from: ``"segment"`` (leaf ``at`` of it), ``"result"`` or ``"input"`` ``at`` of the
    segment before, ``"same"`` (an object or number that does not change), or ``"counter"`` (grown by ``at``).
    """

    place: str
    at: int = 0


class Succession(NamedTuple):
    """Where the inputs of a segment came from that followed one of the same behaviour.

    ``is_sure`` says that another transition showed the same.
    """

    origins: list[Origin]
    is_sure: bool = False


@dataclasses.dataclass
class _Seen:
    """A segment that Dynamo was asked about; tensors are remembered without keeping them."""

    program: StepProgram
    args: list[Any]
    results: list[Any]
    transition: tuple[list[Origin], Hashable] | None = None  # to it, and the circumstances


class _Kept(NamedTuple):
    """A tensor that the step keeps: ``"result"`` or ``"input"`` ``at`` of the segment.

    ``owner`` has it as its ``attribute``, or it is leaf ``leaf`` of the state that is passed on.
    """

    place: str
    at: int
    owner: Any = None
    attribute: str = ""
    leaf: int = 0


@dataclasses.dataclass
class _Steady:
    """What is known once segments repeat; ``kept`` is what the step is given anew at the end."""

    program: StepProgram
    origins: list[Origin]
    entry: list[Any]
    leaves: list[Any]  # of the last segment
    spec: TreeSpec
    result_leaves: list[Any]
    result_spec: TreeSpec
    handed_out: dict[int, int]  # leaf of the result -> result of the graph
    args: list[Any]
    results: list[Any]
    counters: list[tuple[Any, str, int]]
    kept: list[_Kept]
    before: list[Any]
    last: list[Any]
    count: int = 0


class Repeat:
    """Watches the segments of one run, and records those that repeat.

    It does not hold the run, which holds it: what a run holds is freed as soon as the run is.
    """

    def __init__(self) -> None:
        self._last: _Seen | None = None
        self._steady: _Steady | None = None
        self.recorded = 0

    # Watching.

    def missed(self) -> None:
        """Nobody looked at a segment: those before it are no longer the last ones."""
        self._last = self._steady = None

    def saw(self, run: Any, segment: Any, result: Any, state: Any) -> None:
        """Look at a segment that was recorded by way of Dynamo.

        Parameters
        ----------
        run
            The :class:`~diagpass.rolled.run.Run` that it was recorded in.
        segment, result, state
            What the step was given, what it returned, and the state that it passed on.
        """
        last = run.last
        before, self._last, self._steady = self._last, None, None
        if last is None:
            return
        program, args, results = last
        args = [args[at] for at in program.moving]
        found = program.step.effects
        if not found.closed or (program.step.written and any(g is not None for g in program.step.groups)):
            return
        seen = self._last = _Seen(
            program, [_weak(value) for value in args], [_weak(value) for value in results]
        )
        follows = before is not None and before.program is program
        if not follows and not program.successions:
            return
        keeping = _keeping(run, program, args, results, state)
        passed = [leaf for leaf in tree_leaves((result, state)) if not isinstance(leaf, torch.Tensor)]
        if keeping is None or not all(isinstance(leaf, _ATOMS) for leaf in passed):
            return
        if _are_numbers(args) and _are_numbers(passed):  # which may follow from those
            return
        given = tree_flatten(segment)
        circumstances = _circumstances(program, args, given[0], keeping, passed)
        known = program.successions.get(circumstances)
        is_watched = False
        if before is not None and follows:
            origins = _origins(before, program, args, given[0])
            seen.transition = None if origins is None else (origins, circumstances)
            is_watched = origins is not None and before.transition == seen.transition
            known = _learn(program, circumstances, origins)
        if known is not None and known.is_sure and (is_watched or _stays(known.origins, keeping)):
            self._steady = self._arm(run, known.origins, args, results, given, result, keeping)

    def _arm(
        self,
        run: Any,
        origins: list[Origin],
        args: Sequence[Any],
        results: Sequence[Any],
        given: tuple[list[Any], TreeSpec],
        result: Any,
        keeping: Sequence[_Kept],
    ) -> _Steady | None:
        seen = self._last
        assert seen is not None
        program = seen.program
        out_leaves, out_spec = tree_flatten(result)
        places = {id(value): at for at, value in enumerate(results) if _is_own(program, at, value)}
        handed_out: dict[int, int] = {}
        for at, leaf in enumerate(out_leaves):
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in places:
                    return None
                handed_out[at] = places[id(leaf)]
        given_away = set(handed_out.values())
        kept: list[_Kept] = []
        for item in keeping:
            if item.place == "result":
                if item.at in given_away:
                    kept.append(item)
            elif origins[item.at].place != "same":
                if origins[item.at].place != "segment" and not run.is_token(args[item.at]):
                    return None  # from before the call: the step may keep that very tensor
                kept.append(item)
        try:
            counters = [
                (resolve(owner, run.scope), attribute, added)
                for owner, attribute, added in program.step.effects.counters
            ]
        except LookupError:
            return None
        if any(_is_grouped(program, item) for item in kept):
            return None
        owners = [item.owner for item in kept if item.owner is not None] + [owner for owner, *_ in counters]
        if not all(type(owner).__setattr__ in _PLAIN for owner in owners):  # Dynamo has done what others do
            return None
        lost = given_away - {item.at for item in kept if item.place == "result"}
        if any(o.place == "result" and o.at in lost for o in origins):
            return None
        written = {at for at, place in enumerate(program.moving) if place in program.step.written}
        if any(origins[at].place not in ("same", "result") for at in written):
            return None
        own = {at for at in written if origins[at].place == "same"}
        entry = _entry(run, origins, args, results)
        return _Steady(
            program=program,
            origins=origins,
            entry=entry,
            leaves=given[0],
            spec=given[1],
            result_leaves=[None if at in handed_out else leaf for at, leaf in enumerate(out_leaves)],
            result_spec=out_spec,
            handed_out=handed_out,
            args=[value if at in own else None for at, value in enumerate(seen.args)],
            results=[None if at in given_away else value for at, value in enumerate(seen.results)],
            counters=counters,
            kept=kept,
            before=[],
            last=[],
        )

    # Recording.

    def record(self, run: Any, segment: Any) -> bool:
        """Record a segment if it is one more of the same; whether it was.

        Its result goes where :meth:`~diagpass.rolled.run.Run.outputs` puts those of others.
        """
        steady = self._expected(segment)
        if steady is None:
            return False
        leaves = tree_leaves(segment)
        program = steady.program
        if not steady.count:  # until they stand for what the last segment left, tokens hold no memory
            for reference, _, written in _standing(steady):
                run.stand_for(_alive(reference), Box(), written)
            _let_go(run, steady)
        inputs = [
            Box(leaves[origin.at]) if origin.place == "segment" else value
            for origin, value in zip(steady.origins, steady.entry, strict=True)
        ]
        boxes = run.core(program, inputs)
        found = [None if out.passed is not None else run.value(out.node, boxes) for out in program.returned]
        updates = {
            program.moving.index(at): run.value(node, boxes)
            for at, node in zip(program.step.written, program.updates, strict=True)
        }
        result = list(steady.result_leaves)
        tokens = {
            number: (run.new_token(program.returned[number].node), found[number])
            for number in steady.handed_out.values()
        }
        for at, number in steady.handed_out.items():
            result[at] = tokens[number][0]
        run.wait_for(tree_unflatten(result, steady.result_spec), list(tokens.values()))
        steady.leaves = leaves
        steady.before = [updates.get(at, value) for at, value in enumerate(inputs)]
        steady.last = found
        steady.entry = [_next(origin, at, steady.before, found) for at, origin in enumerate(steady.origins)]
        steady.count += 1
        self.recorded += 1
        return True

    def skip(self, segment: Any) -> bool:
        """Count a segment if it is one more of the same, and record nothing; whether it was."""
        steady = self._expected(segment)
        if steady is None:
            return False
        steady.leaves = tree_leaves(segment)
        steady.count += 1
        self.recorded += 1
        return True

    def _expected(self, segment: Any) -> _Steady | None:
        steady = self._steady
        if steady is None:
            return None
        leaves, spec = tree_flatten(segment)
        return steady if spec == steady.spec and all(map(_alike, leaves, steady.leaves)) else None

    def settle(self, run: Any) -> None:
        """Let the tokens that the step holds stand for what the last segment left, and set its counters."""
        steady, self._steady = self._steady, None
        if steady is None or not steady.count:
            return
        self._last = None
        run.settling(steady)
        for reference, box, written in _standing(steady):
            run.stand_for(_alive(reference), box, written)
        _put_back(run, steady)
        for owner, attribute, added in steady.counters:
            setattr(owner, attribute, getattr(owner, attribute) + added * steady.count)


def _standing(steady: _Steady) -> list[tuple[Any, Any, bool]]:
    """Tensors (weakly) that only the step has, what each stands for, whether it is written in place."""
    found = []
    for at, reference in enumerate(steady.args):
        if reference is not None:
            found.append((reference, steady.before[at] if steady.before else None, True))
    for at, reference in enumerate(steady.results):
        if reference is not None and steady.program.returned[at].passed is None:
            found.append((reference, steady.last[at] if steady.last else None, False))
    return found


def _let_go(run: Any, steady: _Steady) -> None:
    """Forget what the last segment was given, as far as nobody else has it."""
    run.last, run.scope = None, {}
    given = [item for item in steady.kept if item.place == "input"]
    _give(run, given, {(item.place, item.at): None for item in given})


def _put_back(run: Any, steady: _Steady) -> None:
    """Give the step anew what it keeps of the last segment and has not for itself."""
    program = steady.program
    made: dict[tuple[str, int], torch.Tensor] = {}
    for item in steady.kept:
        key = item.place, item.at
        if key not in made:
            origin = steady.origins[item.at] if item.place == "input" else None
            if origin is not None and origin.place == "segment":
                made[key] = steady.leaves[origin.at]
            elif origin is not None:
                node = program.placeholders[program.moving[item.at]]
                made[key] = run.stand_in(node, steady.before[item.at])
            else:
                made[key] = run.stand_in(program.returned[item.at].node, steady.last[item.at])
    _give(run, steady.kept, made)


def _give(run: Any, kept: Iterable[_Kept], values: Mapping[tuple[str, int], Any]) -> None:
    """Let the step keep these."""
    passed: dict[int, Any] = {}
    for item in kept:
        value = values[item.place, item.at]
        if item.owner is not None:
            setattr(item.owner, item.attribute, value)
        else:
            passed[item.leaf] = value
    if passed:
        leaves, spec = tree_flatten(run.carried.value)
        leaves = [passed.get(at, leaf) for at, leaf in enumerate(leaves)]
        run.carried.value = tree_unflatten(leaves, spec)


def _is_grouped(program: StepProgram, item: _Kept) -> bool:
    """Whether something kept shares its memory with others."""
    if item.place == "input":
        return program.moving[item.at] in program.step.input_groups
    return program.returned[item.at].group is not None


def _are_numbers(values: Iterable[Any]) -> bool:
    """Whether there are numbers among values."""
    return any(isinstance(value, (int, float)) for value in values)


def _entry(run: Any, origins: Sequence[Origin], args: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """The values of the inputs of the segment to come; None where the segment itself is read."""
    entry: list[Any] = []
    for at, origin in enumerate(origins):
        if origin.place == "segment":
            entry.append(None)
            continue
        if origin.place == "counter":
            entry.append(args[at] + origin.at)
            continue
        value = {"result": results, "input": args, "same": args}[origin.place]
        value = value[at if origin.place == "same" else origin.at]
        entry.append(run.value_of(value) if isinstance(value, torch.Tensor) else value)
    return entry


def _keeping(
    run: Any, program: StepProgram, args: Sequence[Any], results: Sequence[Any], state: Any
) -> list[_Kept] | None:
    """Where the tensors come from that a segment left in attributes, and in the state that it passed on; None
    if one comes from elsewhere.
    """
    places = {id(value): ("input", at) for at, value in enumerate(args) if isinstance(value, torch.Tensor)}
    for at, value in enumerate(results):
        if _is_own(program, at, value):
            places[id(value)] = ("result", at)
    found: list[_Kept] = []
    try:
        for name, attribute in program.step.effects.tensors:
            owner = resolve(name, run.scope)
            found.append(_Kept(*places[id(getattr(owner, attribute))], owner, attribute))
        for at, leaf in enumerate(tree_leaves(state)):
            if isinstance(leaf, torch.Tensor):
                found.append(_Kept(*places[id(leaf)], leaf=at))
    except (LookupError, AttributeError):
        return None
    return found


def _circumstances(
    program: StepProgram,
    args: Sequence[Any],
    leaves: Sequence[Any],
    keeping: Iterable[_Kept],
    passed: Iterable[Any],
) -> Hashable:
    """What has to be the same again where a segment is to be followed as one before was.

    ``leaves`` are the segment's; ``passed`` is what it returned and passed on that is no tensor.
    """
    counters = _counters(program)
    described = tuple(
        _description(value)
        if isinstance(value, torch.Tensor) or program.step.names[at] in counters
        else (type(value), repr(value))
        for at, value in zip(program.moving, args, strict=True)
    )
    first: dict[int, int] = {}
    same = tuple(
        first.setdefault(id(value), at)
        for at, value in enumerate((*args, *leaves))
        if isinstance(value, torch.Tensor)
    )
    plain = tuple((type(value), repr(value)) for value in passed)
    return described, same, tuple((item.place, item.at) for item in keeping), plain


def _learn(program: StepProgram, circumstances: Hashable, origins: list[Origin] | None) -> Succession | None:
    """Remember a transition; what is known now."""
    before = program.successions.pop(circumstances, None)
    if origins is None:
        return None
    if len(program.successions) >= CIRCUMSTANCES:
        program.successions.clear()
    known = Succession(origins, before is not None and before.origins == origins)
    program.successions[circumstances] = known
    return known


def _stays(origins: Sequence[Origin], keeping: Iterable[_Kept]) -> bool:
    """Whether no state that was an input of a segment goes elsewhere."""
    return all(origin.place != "input" for origin in origins) and all(
        item.place == "result" or origins[item.at].place in ("same", "segment") for item in keeping
    )


def _origins(
    before: _Seen, program: StepProgram, args: Sequence[Any], leaves: Sequence[Any]
) -> list[Origin] | None:
    """Where each input came from; None if one came from nowhere known."""
    places = {id(leaf): at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    results = {
        id(value): at
        for at, value in enumerate(map(_alive, before.results))
        if isinstance(value, torch.Tensor) and program.returned[at].passed is None
    }
    inputs = {id(v): at for at, v in enumerate(map(_alive, before.args)) if isinstance(v, torch.Tensor)}
    counters = _counters(program)
    found: list[Origin] = []
    for at, value in enumerate(args):
        if not isinstance(value, torch.Tensor):
            added = counters.get(program.step.names[program.moving[at]])
            old = before.args[at]
            if added is not None and type(old) is type(value) and value == old + added:
                found.append(Origin("counter", added))
            elif type(old) is type(value) and old == value:
                found.append(Origin("same"))
            else:
                return None
        elif id(value) in places:
            found.append(Origin("segment", places[id(value)]))
        elif id(value) in results:
            found.append(Origin("result", results[id(value)]))
        elif _alive(before.args[at]) is value:
            found.append(Origin("same"))
        elif id(value) in inputs:
            found.append(Origin("input", inputs[id(value)]))
        else:
            return None
    return found


def _counters(program: StepProgram) -> Mapping[str, int]:
    """By Dynamo's names of counters, what is added to them."""
    return {
        name: added
        for owner, attribute, added in program.step.effects.counters
        for name in (f"{owner}.{attribute}", f"{owner}.__dict__['{attribute}']")
    }


def _next(origin: Origin, at: int, before: Sequence[Any], found: Sequence[Any]) -> Any:
    if origin.place == "segment":
        return None
    if origin.place == "counter":
        return before[at] + origin.at
    if origin.place == "result":
        return found[origin.at]
    return before[at if origin.place == "same" else origin.at]


def _is_own(program: StepProgram, at: int, value: Any) -> bool:
    return isinstance(value, torch.Tensor) and program.returned[at].passed is None


def _weak(value: Any) -> Any:
    return weakref.ref(value) if isinstance(value, torch.Tensor) else value


def _alive(reference: Any) -> Any:
    return reference() if isinstance(reference, weakref.ref) else reference


def _description(value: Any) -> Any:
    """What guards ask of a tensor, beside which one it is."""
    if not isinstance(value, torch.Tensor):
        return type(value)
    return (
        type(value),
        value.shape,
        value.stride(),
        value.dtype,
        value.device,
        value.requires_grad,
        value.is_inference(),
    )


def _alike(value: Any, other: Any) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(other, torch.Tensor):
        return _description(value) == _description(other)
    return value is other or (type(value) is type(other) and isinstance(value, _ATOMS) and value == other)


_PLAIN = (object.__setattr__, torch.nn.Module.__setattr__)
_ATOMS = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device)
