"""One call of a rolled program: segments are recorded, cells run wave by wave, tokens are filled.

A *token* is a tensor that Dynamo's own code stores wherever the step keeps state or returns results, with the
right shape and no contents yet. ``Run`` knows by identity which deferred value each token will hold, and
likewise what a tensor that is written in place will hold. Until ``finish`` nothing that existed before the
call is written, so that a failure midway leaves it as it was.

The wave of a cell is one after the last of the values that it reads; it begins no earlier than the segment
before it did, plus one. When a segment has been recorded, all waves up to its first cell's are complete: no
later segment can add to them. So they run at once, and at any time only the segments that a wave reaches
across are held.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from diagpass.capture import aliases
from diagpass.capture.marks import spoken
from diagpass.lowering.emit import restride
from diagpass.pipeline import Refusal
from diagpass.rolled.kinds import Kinds
from diagpass.rolled.program import Lump, StepCell, StepProgram, is_number
from diagpass.rolled.repeat import Repeat
from diagpass.rolled.returns import layout_of
from diagpass.rolled.undo import Undo
from diagpass.rolled.values import NOW, Box, aggregate, derived, read, union
from diagpass.rolled.view import View
from diagpass.rolled.waves import Direct, PendingCell, runner
from diagpass.runtime.clock import clock_of_wave
from diagpass.runtime.layouts import is_shared

log = logging.getLogger(__name__)


RECORDED = 4096  # cells whose place and dependencies are kept for the report


class Conflict(Exception):
    """A segment does something that cannot be deferred; the text says what. The call runs sequentially.

    ``refusal`` is there where the reason is a matter of width.
    """

    def __init__(self, reason: str, refusal: Refusal | None = None) -> None:
        super().__init__(reason)
        self.refusal = refusal


class NotAWeight(Conflict):
    """What was taken for weights is replaced by the step; ``names`` are Dynamo's names of them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(f"{', '.join(names)} replaced by the step itself")
        self.names = tuple(names)


class _Watch(weakref.ref):
    """A weak reference that knows its tensor's id."""

    __slots__ = ("key",)

    key: int


def _forgetting(run: Run) -> Callable[[_Watch], None]:
    """What forgets tensors that are gone. It does not hold the run, which is freed as soon as it may be."""
    alive = weakref.ref(run)

    def gone(reference: _Watch) -> None:
        run = alive()
        if run is not None:
            run._forget(reference.key)

    return gone


class Run:
    """One call, from its first segment to its final state.

    Parameters
    ----------
    kinds
        The cells of all programs, shared by all calls.
    max_width
        The largest number of cells in a wave; with 1 cells run one by one, unbatched.
    dry
        Only record: nothing is computed and no token is filled.
    """

    def __init__(self, kinds: Kinds, max_width: int | None = None, dry: bool = False) -> None:
        self.kinds, self.max_width, self.dry = kinds, max_width, dry
        self.segments = self.cells = self.waves = self.widest = self.batched_cells = 0
        self.fresh_captures = 0
        self.state_bytes = 0  # what comes in from the segment before, at most
        self.narrow: Refusal | None = None  # why no cell runs beside another, where they run all the same
        self.seconds = 0.0
        self.layers: set[int] = set()
        self.programs: Counter[StepProgram] = Counter()  # how many segments each has recorded
        self.grid: list[tuple[int, int, int, int]] = []  # segment, layer, cell number, wave
        self.edges: list[frozenset[int]] = []
        self._floor = 0
        self._advance: deque[tuple[int, int]] = deque(maxlen=4)  # base wave and cells of the last segments
        self._done = -1
        self._fresh = False
        self._waves: dict[int, list[PendingCell]] = {}
        self._pending: dict[int, tuple[Callable[[], torch.Tensor | None], Box]] = {}
        self._held: dict[int, torch.Tensor] = {}
        self._written: dict[int, int] = {}
        self._families: dict[int, list[weakref.ref]] = {}
        self._tokens: set[int] = set()
        self._rewritten: set[int] = set()
        self._inputs: dict[int, torch.Tensor] = {}
        self._handed_out: dict[int, weakref.ref] = {}
        self._weights_of: dict[StepProgram, tuple] = {}
        self._lumps: dict[Any, tuple[list, list[Box]]] = {}
        self.undo: Undo | View | None = None
        self.scope: dict[str, Any] = {}
        self.carried: Any = None
        self.writer: Any = None  # told what the call does
        self.repeat = Repeat()
        self.last: tuple[StepProgram, Sequence[Any], list[Any]] | None = None
        self._waiting: deque[tuple[Any, int, list[tuple[torch.Tensor, Box]]]] = deque()
        self._complete: list[Any] = []
        self._gone = _forgetting(self)

    # Recording.

    def step(self, program: StepProgram, args: Sequence[Any]) -> list[Any]:
        """Record one segment.

        Parameters
        ----------
        program
            What Dynamo's guards chose.
        args
            The captured graph's inputs.

        Returns
        -------
        list
            The captured graph's results, tensors being tokens.
        """
        begin = time.perf_counter()
        if self.undo is not None:
            self.undo.note(program.step.effects, self.scope)
        self._check_weights(program, args)
        for at in program.step.written:
            self._check_write(spoken(program.step.names[at]), args[at])
        inputs = [
            self.value_of(args[at]) if isinstance(args[at], torch.Tensor) else args[at]
            for at in program.moving
        ]
        held = sum(args[at].nbytes for at in program.moving if id(args[at]) in self._pending)
        self.state_bytes = max(self.state_bytes, held)
        if self.writer is not None:
            self.writer.asked(self, program, args)
        boxes = self.core(program, inputs)
        if self.writer is not None:
            self.writer.returned(self, program, boxes)
        results = self._results(program, args, boxes)
        self.last = program, args, results
        self.seconds += time.perf_counter() - begin
        return results

    def core(self, program: StepProgram, inputs: Sequence[Any]) -> dict[Any, Any]:
        """Record the cells and glue of one segment.

        Parameters
        ----------
        program
            What the segment does.
        inputs
            Per input of the graph that is no weight its box or number (``program.moving``).

        Returns
        -------
        dict
            Per node its box or number.
        """
        boxes: dict[Any, Any] = {node: Box(value) for node, value in program.constants.items()}
        for at, value in zip(program.moving, inputs, strict=True):
            boxes[program.placeholders[at]] = value
        for node, source, dim, start, stop, drop in program.reads:
            found = read(boxes[source], dim, start, stop, drop)
            if found is None:
                found = derived(_piece, boxes[source], dim, start, stop, drop)
            boxes[node] = found
        self.programs[program] += 1
        floor, base = self._floor, None
        for unit in program.units:
            if isinstance(unit, Lump):
                self._lump(unit, boxes)
            else:
                wave = self._cell(program, unit, boxes, floor)
                base = wave if base is None else min(base, wave)
        self._floor = (floor if base is None else base) + 1
        self._advance.append((self._floor, len(program.cells)))
        self.segments += 1
        return boxes

    def _check_weights(self, program: StepProgram, args: Sequence[Any]) -> None:
        found = self._weights_of.get(program)
        if found is None:
            at = [place for place, is_weight in enumerate(program.step.weights) if is_weight]
            weights = [args[place] for place in at]
            known = self._pending.keys() | self._tokens
            replaced = [place for place, weight in zip(at, weights, strict=True) if id(weight) in known]
            if replaced:
                raise NotAWeight([program.step.names[place] for place in replaced])
            for place, weight in zip(at, weights, strict=True):
                if self._written and weight.untyped_storage().data_ptr() in self._written:
                    name = spoken(program.step.names[place])
                    raise Conflict(f"{name} shares memory with what is written in place")
            if self.kinds.use(program, weights) and self._weights_of:
                raise Conflict("weights were replaced by the step itself")
            self._weights_of[program] = (at, weights)
            self._fresh = False
            return
        replaced = [place for place, weight in zip(*found, strict=True) if args[place] is not weight]
        if replaced:
            raise NotAWeight([program.step.names[place] for place in replaced])

    def value_of(self, value: torch.Tensor) -> Box:
        """The box of a tensor that a segment reads."""
        found = self._pending.get(id(value))
        if found is not None and found[0]() is value:
            return found[1]
        if self._written:
            owner = self._written.get(value.untyped_storage().data_ptr())
            if owner is not None and owner != id(value):
                raise Conflict("a tensor is read that shares memory with one that was written in place")
        if id(value) in self._tokens and id(value) not in self._handed_out:
            raise AssertionError("a token without a value")
        return Box(value)

    def value(self, node: Any, boxes: dict[Any, Any]) -> Any:
        """A box, or a number, for a node."""
        if not isinstance(node, fx.Node):
            return node
        found = boxes.get(node)
        if found is not None:
            return found
        if self.kinds.is_weight(node):
            return self.kinds.weight(node)
        if is_number(node) and node.op == "call_function":
            arguments = fx.map_arg((node.args, node.kwargs), lambda source: self.value(source, boxes))
            target: Any = node.target
            boxes[node] = target(*arguments[0], **arguments[1])
            return boxes[node]
        if node.target is aliases.aggregate:
            boxes[node] = self._aggregate(node, boxes)
            return boxes[node]
        raise AssertionError(f"{node.format_node()} has no value")

    def _aggregate(self, node: fx.Node, boxes: dict[Any, Any]) -> Box:
        dim, pieces = node.args
        parts: list[tuple[Box, int, int, bool]] = []
        for source, start, stop, unit in pieces:  # type: ignore[union-attr]
            box = self.value(source, boxes)
            inner = None if unit or box.parts is None or box.parts[0] != dim else box.parts[1]
            if inner is None:
                parts.append((box, start, stop, unit))
                continue
            offset = 0
            for piece, low, high, is_unit in inner:  # an untouched piece: what it was before this segment
                first, last = max(start - offset, 0), min(stop - offset, high - low)
                offset += high - low
                if first < last:
                    parts.append((piece, low + first, low + last, is_unit))
        return aggregate(dim, parts)  # type: ignore[arg-type]

    def _lump(self, lump: Lump, boxes: dict[Any, Any]) -> None:
        """Make boxes for a lump's results; those of a lump with the same inputs as before are taken again."""
        inputs = [self.value(node, boxes) for node in lump.inputs]
        now = [box.value if isinstance(box, Box) and box.is_plain else box for box in inputs]
        fixed = all(not isinstance(box, Box) or box.ready == NOW for box in inputs)
        if fixed:
            known = self._lumps.get(lump.key)
            if known is not None and len(known[0]) == len(now) and all(map(_same, known[0], now)):
                for node, box in zip(lump.outputs, known[1], strict=True):
                    boxes[node] = box
                return
        made = derived(_run_glue, self.kinds.glue(lump.module, lump.key), *inputs)
        results = [derived(operator.getitem, made, at) for at in range(len(lump.outputs))]
        boxes.update(zip(lump.outputs, results, strict=True))
        if fixed:
            self._lumps[lump.key] = (now, results)

    def _cell(self, program: StepProgram, unit: StepCell, boxes: dict[Any, Any], floor: int) -> int:
        number = program.first_cell + unit.cell.index
        order = self.cells
        self.cells += 1
        cell = PendingCell(number, unit.cell.layer, self.segments, order)
        wave = floor
        read_boxes = []
        for node in unit.reads:
            box = self.value(node, boxes)
            cell.boxes[node] = box
            if isinstance(box, Box):
                read_boxes.append(box)
                if box.ready >= wave:
                    wave = box.ready + 1
        behind = frozenset((order,))
        for node in unit.outputs:
            boxes[node] = cell.outputs[node] = Box(ready=wave, cells=behind)
        self._waves.setdefault(wave, []).append(cell)
        if order < RECORDED:
            self.edges.append(union(read_boxes))
            self.grid.append((self.segments, unit.cell.layer, number, wave))
        self.layers.add(unit.cell.layer)
        return wave

    def _results(self, program: StepProgram, args: Sequence[Any], boxes: dict[Any, Any]) -> list[Any]:
        results: list[Any] = []
        families: dict[int, list[weakref.ref]] = {}
        for at, number in program.step.input_groups.items():
            families[number] = self._family(args[at])
        for out in program.returned:
            if out.passed is not None:
                value = args[out.passed]
                if (
                    program.step.written
                    and out.passed in program.step.written
                    and id(value) not in self._tokens
                ):
                    self._held[id(value)] = value
                results.append(value)
                continue
            box = self.value(out.node, boxes)
            if not isinstance(box, Box) or not isinstance(out.node, fx.Node):
                results.append(box)
                continue
            token = self.stand_in(out.node, box)
            if out.group is not None:
                family = families.setdefault(out.group, [])
                family.append(weakref.ref(token))
                self._families[id(token)] = family
            results.append(token)
        for at, node in zip(program.step.written, program.updates, strict=True):
            self._write(args[at], self.value(node, boxes))
            self._rewritten.add(id(args[at]))
        return results

    def new_token(self, node: fx.Node) -> torch.Tensor:
        """A tensor like the one that a node stands for, with no contents yet."""
        (sizes, strides), (dtype, device) = layout_of(node)
        return torch.empty_strided(sizes, strides, dtype=dtype, device=device)

    def waiting_box(self, tensor: torch.Tensor) -> Box | None:
        """What the tensor will hold; None if it holds it by now."""
        found = self._pending.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def is_token(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor was made by this run, with contents by now or not."""
        return id(tensor) in self._tokens

    def settling(self, steady: Any) -> None:
        """Hear that repeated segments are over."""
        if self.writer is not None:
            self.writer.settled(steady.before, steady.last)

    def stand_in(self, node: fx.Node, box: Any) -> torch.Tensor:
        """A new tensor that will hold what ``box`` stands for."""
        token = self.new_token(node)
        self._set(token, box)
        self._tokens.add(id(token))
        return token

    def stand_for(self, tensor: torch.Tensor | None, box: Any, written: bool) -> None:
        """Say what a tensor that the step keeps, or writes in place, will hold; None if it is gone."""
        if tensor is None or not isinstance(box, Box):
            return
        if written:
            self._write(tensor, box)
            self._rewritten.add(id(tensor))
        elif id(tensor) in self._pending or id(tensor) in self._tokens:
            self._set(tensor, box)

    def _family(self, value: torch.Tensor) -> list[weakref.ref]:
        """The tensors that share memory with ``value``, itself among them."""
        found = self._families.get(id(value))
        if found is None:
            found = self._families[id(value)] = [weakref.ref(value)]
            weakref.finalize(value, self._families.pop, id(value), None)
        return found

    def _set(self, tensor: torch.Tensor, box: Box) -> None:
        self._handed_out.pop(id(tensor), None)
        self._rewritten.discard(id(tensor))
        self._pending[id(tensor)] = (self._watch(tensor), box)

    def _watch(self, tensor: torch.Tensor) -> weakref.ref:
        """A reference that forgets all about the tensor when it is gone: another may get its id."""
        found = _Watch(tensor, self._gone)
        found.key = id(tensor)
        return found

    def _forget(self, key: int) -> None:
        self._pending.pop(key, None)
        self._tokens.discard(key)
        if self._rewritten or self._handed_out or self._families:
            self._rewritten.discard(key)
            self._handed_out.pop(key, None)
            self._families.pop(key, None)

    def _check_write(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse a write in place that others would have to see."""
        if id(tensor) in self._inputs:
            raise Conflict(f"the step writes into its own input {name}")
        others = [ref() for ref in self._families.get(id(tensor), ())]
        if any(other is not None and other is not tensor for other in others):
            raise Conflict(f"{name} is written in place while a view of it is kept")
        if id(tensor) in self._handed_out or self._is_waiting(tensor):
            raise Conflict(f"{name} is written in place after it was returned; return a copy (clone)")
        if id(tensor) not in self._tokens:
            storage = tensor.untyped_storage().data_ptr()
            if self._written.setdefault(storage, id(tensor)) != id(tensor):
                raise Conflict(f"{name} shares memory with another tensor that is written in place")

    def _is_waiting(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is an output of a segment that is not complete yet."""
        return id(tensor) in self._tokens and any(
            token is tensor for *_, tokens in self._waiting for token, _ in tokens
        )

    def _write(self, tensor: torch.Tensor, box: Box) -> None:
        """Record that a tensor is written in place."""
        if id(tensor) in self._tokens:
            self._pending[id(tensor)] = (self._pending[id(tensor)][0], box)
            return
        self._held[id(tensor)] = tensor
        self._pending[id(tensor)] = (lambda: tensor, box)

    def guard_inputs(self, segment: Any) -> None:
        """Name the tensors of the segment to come: the step must not write to them."""
        self._inputs = {id(leaf): leaf for leaf in tree_leaves(segment) if isinstance(leaf, torch.Tensor)}

    def outputs(self, value: Any) -> None:
        """Say that the recorded segment's result is ``value``; its tokens are filled as soon as may be.

        A tensor that the step writes in place is handed out as a copy.
        """
        leaves, spec = tree_flatten(value)
        tokens, ready = [], NOW
        for at, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            found = self._pending.get(id(leaf))
            if found is None or found[0]() is not leaf:
                continue
            box = found[1]
            if id(leaf) in self._rewritten:
                leaf = leaves[at] = torch.empty_like(leaf)
                self._set(leaf, box)
                self._tokens.add(id(leaf))
            tokens.append((leaf, box))
            ready = max(ready, box.ready)
        result = tree_unflatten(leaves, spec)
        if self.writer is not None:
            self.writer.result(self, result)
        self._waiting.append((result, ready, tokens))

    def check_results(self, outputs: Any) -> None:
        """Refuse what tokens cannot stand for, when Dynamo has been asked about a segment.

        Parameters
        ----------
        outputs
            What the step hands out.
        """
        if self.last is None:
            return
        program, _, results = self.last
        if any(id(value) in self._tokens and is_shared(value) for value in results):
            raise Conflict(
                "a result of the step becomes another tensor on the same memory (of a subclass, say); "
                "give it ordinary tensors"
            )
        handed_out = {id(leaf) for leaf in tree_leaves(outputs)} if program.overlapping else set()
        for pair in program.overlapping:
            if not handed_out.intersection(id(results[at]) for at in pair):
                raise Conflict("two tensors that the step keeps share memory; keep a copy of one (clone)")

    def mark(self) -> Callable[[], None]:
        """What takes back what the segment to come says of tensors; its cells may run, for nobody."""
        names = ("_pending", "_held", "_written", "_rewritten", "_handed_out", "_families")
        found = {name: copy.copy(getattr(self, name)) for name in names}
        state = self.carried.value

        def back() -> None:
            self.__dict__.update(found)
            self.carried.value = state

        return back

    def wait_for(self, value: Any, tokens: list[tuple[torch.Tensor, Box]]) -> None:
        """Say that a recorded segment's result is ``value``, which holds these tokens."""
        ready = max((box.ready for _, box in tokens), default=NOW)
        if self.writer is not None:
            self.writer.result(self, value, {id(token): box for token, box in tokens})
        self._waiting.append((value, ready, tokens))

    @property
    def notes(self) -> list[str]:
        """What a user is told of a run that is done."""
        return [*self.kinds.notes, *([self.narrow.note] if self.narrow else [])]

    @property
    def width(self) -> int | None:
        """The largest number of cells in a wave; None for no limit."""
        return self.max_width if self.max_width == 1 else self.kinds.width(self.max_width)

    def steady_width(self) -> float:
        """Cells per wave, from the last segments recorded."""
        if not self._advance:
            return 0.0
        first, last = self._advance[0], self._advance[-1]
        cells = sum(count for _, count in list(self._advance)[1:])
        return cells / max(last[0] - first[0], 1)

    # Running.

    def advance(self) -> None:
        """Run the waves that no later segment can add to."""
        self._run_waves(self._floor - 1)

    def take(self) -> list[Any]:
        """The results of segments, in order, that are complete by now; their tokens are filled."""
        self._fill_results()
        found, self._complete = self._complete, []
        return found

    def _fill_results(self) -> None:
        """Fill the tokens of results that are complete: right after a wave, to free what it left for them."""
        while self._waiting and self._waiting[0][1] <= self._done:
            value, _, tokens = self._waiting.popleft()
            for token, box in tokens:
                if not self.dry:
                    _fill(token, box.tensor())
                if self._pending.get(id(token), (None, None))[1] is box:
                    del self._pending[id(token)]
                    self._handed_out[id(token)] = self._watch(token)
            if self.writer is not None:
                self.writer.filled()
            self._complete.append(value)

    def drain(self, final: bool = False) -> list[Any]:
        """Run all that is left; the results of the last segments.

        With ``final`` no segment follows: state is put where it stays as soon as it is there, so that it does
        not hold the memory of a whole wave.
        """
        final = final and not self.dry
        if final:
            self.close()
            with as_captured():
                self._keep_states()
        self._run_waves(max(self._waves, default=self._done), self._keep_states if final else None)
        self._done = max(self._done, self._floor)
        return self.take()

    def _keep_states(self) -> None:
        """Fill the tokens that stand for final state, of all state that is there by now."""
        found: dict[int, tuple[Box, list[int]]] = {}
        for key, (_, box) in list(self._pending.items()):
            if key in self._tokens and NOW < box.ready <= self._done:
                found.setdefault(id(box), (box, []))[1].append(key)
        for box, keys in found.values():
            if self.writer is not None:
                self.writer.kept(box)
            self._fill_tokens(keys, [box.tensor()] * len(keys))

    def _fill_tokens(self, keys: Sequence[int], values: Sequence[torch.Tensor]) -> None:
        """Fill tokens that stand for final state, as far as somebody still has them."""
        found = [
            (token, value)
            for key, value in zip(keys, values, strict=True)
            if key in self._pending and (token := self._pending[key][0]()) is not None
        ]
        fill_all([token for token, _ in found], [value for _, value in found])
        for token, _ in found:
            del self._pending[id(token)]

    def close(self) -> None:
        """No segment follows: let go of what recording another would need."""
        self.repeat.settle(self)
        self.last, self.scope, self._lumps = None, {}, {}

    def finish(self) -> None:
        """Put the final state where the step keeps it."""
        self.close()
        self.put()

    def put(self) -> list[torch.Tensor]:
        """Give all tensors what they stand for; what has been recorded has run."""
        kept = [(reference(), box) for reference, box in list(self._pending.values())]
        found = [(tensor, box) for tensor, box in kept if tensor is not None and not self.dry]
        values = [self.final(box) for _, box in found]
        if self.writer is not None:
            self.writer.finished(self, found)
        written = {tensor.untyped_storage().data_ptr() for tensor, _ in found}
        values = [
            value.clone() if value.untyped_storage().data_ptr() in written else value for value in values
        ]
        fill_all([tensor for tensor, _ in found], values)
        self._pending, self._held, self._written, self._lumps = {}, {}, {}, {}
        return [tensor for tensor, _ in found]

    def final(self, box: Box) -> torch.Tensor:
        """The value of a box at the end."""
        return box.tensor()

    def _run_waves(self, last: int, after: Callable[[], None] | None = None) -> None:
        if self._done < last and not self.dry and not self._fresh:
            self.kinds.refresh()
            self._fresh = True
        with as_captured():
            if self.kinds.compiles_ahead and not self.dry:
                direct = runner(self.kinds, self.max_width)
                if isinstance(direct, Direct):
                    waves = (self._waves.get(wave, []) for wave in range(self._done + 1, last + 1))
                    parts = [part for cells in waves for part in self._parts(cells)]
                    direct.compile_ahead(self.programs, parts)
            while self._done < last:
                self._done += 1
                cells = self._waves.pop(self._done, [])
                if cells:
                    self._wave(cells)
                    self._fill_results()
                    if after is not None:
                        after()

    def _parts(self, cells: list[PendingCell]) -> list[list[PendingCell]]:
        """A wave's cells, no more at a time than may run together."""
        cells.sort(key=lambda cell: (cell.layer, cell.segment))
        limit = self.width or max(len(cells), 1)
        return [cells[start : start + limit] for start in range(0, len(cells), limit)]

    def _wave(self, cells: list[PendingCell]) -> None:
        for part in self._parts(cells):
            self.waves += 1
            self.widest = max(self.widest, len(part))
            if self.dry:
                continue
            with clock_of_wave():
                self.batched_cells += runner(self.kinds, self.max_width)(part)


def _run_glue(function: Callable[..., Any], *values: Any) -> list[Any]:
    """A lump of one segment: runs when the first of its results is read."""
    with as_captured():
        return list(function(*values))


@contextlib.contextmanager
def as_captured() -> Iterator[None]:
    """Captured operations run as they are: gradients are not recorded, and casts are in the graph already."""
    disable: Any = getattr(torch._C, "_DisableAutocast")  # noqa: B009
    with torch.no_grad(), disable():
        yield


def _piece(value: torch.Tensor, dim: int, start: int, stop: int, drop: bool) -> torch.Tensor:
    return value.select(dim, start) if drop else value.narrow(dim, start, stop - start)


def _same(a: Any, b: Any) -> bool:
    return a is b or (not isinstance(a, torch.Tensor) and type(a) is type(b) and a == b)


def fill_all(tokens: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Give tokens their contents, in few kernels."""
    alike: dict[bool, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for token, value in zip(tokens, values, strict=True):
        if _is_expanded(token):
            _fill(token, value)
        else:
            targets, sources = alike.setdefault(token.is_inference(), ([], []))
            targets.append(token)
            sources.append(value)
    for inference, (targets, sources) in alike.items():
        with torch.inference_mode(inference), torch.no_grad():
            torch._foreach_copy_(targets, sources)


def _is_expanded(token: torch.Tensor) -> bool:
    return 0 in token.stride() and token.numel() > 0


def _fill(token: torch.Tensor, value: torch.Tensor) -> None:
    with torch.inference_mode(token.is_inference()), torch.no_grad():
        if _is_expanded(token):
            token.set_(restride(value, token.stride(), True))
        else:
            token.copy_(value)
