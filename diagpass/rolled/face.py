"""The module that ``transform(SegmentLoop(...))`` returns.

It stands in for the loop: same signature, same results, same state afterwards, any number of segments from
one capture of the step. What cannot be deferred runs as it stands, with a warning that says why.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo.config
from torch._dynamo.exc import RecompileError
from torch.utils._pytree import tree_leaves, tree_map

from diagpass.capture import dynamo, stances
from diagpass.errors import DiagpassError, DiagpassWarning, SequentialError
from diagpass.loop import (
    SegmentLoop,
    SegmentStream,
    check_segments,
    cut,
    go_on,
    join,
    length_of,
    split_result,
)
from diagpass.options import Options
from diagpass.pipeline import LEAST_MEAN_WIDTH, Refusal
from diagpass.report import Report
from diagpass.rolled.check import compare, named_results, run_in_double
from diagpass.rolled.fills import Fills
from diagpass.rolled.follow import Changed, Following, Given
from diagpass.rolled.layout import fixed_layout
from diagpass.rolled.pages import Playing
from diagpass.rolled.plain import plainly, same_bits
from diagpass.rolled.program import Refused
from diagpass.rolled.run import Conflict, NotAWeight, Run, as_captured
from diagpass.rolled.score import Score
from diagpass.rolled.session import OutsideWrite, StepSession
from diagpass.rolled.summary import accepted, rolled_report
from diagpass.rolled.undo import Undo
from diagpass.rolled.values import listening
from diagpass.rolled.view import Carried, View
from diagpass.stages import say
from diagpass.state import Memos, Snapshot
from diagpass.transformed import (
    CaptureFailed,
    Transformed,
    Uncaptured,
    call_entry,
    call_key,
    is_disabled,
    make_entry,
    not_captured,
    with_signature,
)

log = logging.getLogger(__name__)

MAX_PROGRAMS = 64  # behaviours and shapes of a step that are kept
MAX_FRESH = 8  # captures in one call, one segment after the other, before we stop learning


class TransformedLoop(Transformed):
    """A :class:`~diagpass.SegmentLoop` whose calls and streams run as wavefronts, at any length.

    The step is captured once per behaviour (first segment, later ones, a shorter last one), never for a
    length. Where autograd would record the step, it runs as it stands.

    Attributes
    ----------
    original
        The loop.
    report
        The :class:`~diagpass.report.Report` of the last call or stream, or None.
    """

    _original: SegmentLoop

    def _renew(self) -> None:
        session = StepSession(self._original.step, self._options)
        self.__dict__.update(
            _session=session,
            _entry=make_entry(self._original.step, session),
            _failed={},
            _warned=set(),
            _warmed=False,
            _filled=0,
            _broken=None,
            _last=None,
            _verified=set(),
            forward=with_signature(self._run, self._original.forward),
        )

    @property
    def report(self) -> Report | None:
        """What the last call or stream found and did; None before the first.

        It is made when it is asked for: for a short call that takes as long as the call.
        """
        last: Any = self._last
        if callable(last):
            last = self.__dict__["_last"] = last()
        return last

    def capture(self, inputs: Any, /, state: Any = None, **kwargs: Any) -> Report | None:
        """Capture the step for these inputs without running it; the state stays as it is.

        Returns
        -------
        Report or None
            What a call would do.
        """
        if is_disabled():
            return None
        with self._lock:
            segments = cut(inputs, self._original.segment_size, self._original.dim)
            try:
                self._remember(self._dry_run(segments, state, kwargs), None)
            except _STOPS as stopped:
                self._refuse_because(stopped, _key(self, segments[0], kwargs))
        return self.report

    def _dry_run(self, segments: list[Any], state: Any, kwargs: dict, reset: bool = True) -> Run:
        """Record a call without running anything; the state stays as it is."""
        before = Snapshot(self._original.step, state)
        try:
            while True:
                if reset:
                    self._original.reset_step()
                run = Run(self._session.kinds, self._options.max_width, dry=True)
                run.carried = Carried(state)
                try:
                    for _ in self._record(run, segments, kwargs):
                        pass
                except NotAWeight as found:
                    before.restore()
                    self._take_for_state(found.names)
                    continue
                except OutsideWrite as refused:
                    before.restore()
                    self._fill_memos(refused, segments[: run.segments + 1], state, kwargs)
                    continue
                run.drain()
                return run
        finally:
            before.restore()

    def _run(self, inputs: Any, /, state: Any = None, **kwargs: Any) -> Any:
        """One call of the loop."""
        loop = self._original
        if is_disabled():
            return loop(inputs, state, **kwargs)
        with self._lock:
            loop.check_state(state)
            segments = cut(inputs, loop.segment_size, loop.dim)
            self._check_whole()
            if self._must_run_plainly(segments[0], state, kwargs):
                return loop(inputs, state, **kwargs)
            key = _key(self, segments[0], kwargs)
            if self._options.verify and key not in self._verified:
                self.verify(inputs, state, **kwargs)
                self._verified.add(key)
            try:
                result, run = self._deferred(segments, state, kwargs, self._options.max_width)
            except _STOPS as stopped:
                narrow = isinstance(stopped, Conflict) and stopped.refusal is not None
                whole = self._dry_run(segments, state, kwargs, reset=False) if narrow else None
                self._refuse_because(stopped, key, whole)
                return go_on(loop, segments, state, kwargs)
            except Uncaptured:
                if not stances.may_run_plainly():
                    raise
                return go_on(loop, segments, state, kwargs)
            self._remember(run, "wavefront")
            return result

    def _deferred(
        self, segments: list[Any], state: Any, kwargs: dict, max_width: int | None
    ) -> tuple[Any, Run]:
        """The call as a wavefront: its result and how it went.

        Raises
        ------
        CaptureFailed, Refused, Conflict
            It has to run as it stands, from the state after the reset.
        """
        loop = self._original
        self._make_room()
        whole = call_key(loop, (segments[0], segments[-1], state), kwargs)
        form = whole, len(segments), max_width
        given, session = Given(segments), self._session
        scores = session.scores.get(form, session.kinds)
        in_place = session.kinds.follow_weights  # else the reset may write what a stack is a copy of
        ahead = _ahead(scores, given) if in_place else None
        fills = self._begin(any(score.pages is not None and score.pages.watched for score in scores))
        if fills is None or fills.is_lost or not in_place:
            scores = session.scores.still(scores, session.kinds)
        while True:
            session = self._session
            run = (
                Following(session.kinds, scores, given.leaves, ahead, fills)
                if scores
                else Run(session.kinds, max_width)
            )
            run.undo = Undo(loop.step, state, whole=not session.programs)
            run.carried = carried = Carried(state)
            try:
                if isinstance(run, Following):
                    joined = self._follow(run, given.segments, kwargs)
                else:
                    joined = self._recorded(run, segments, kwargs, form)
            except Changed as changed:
                log.info("a call of %d segments is recorded anew: %s", len(segments), changed)
                run.undo.restore()
                session.scores.drop(form, run.score if isinstance(run, Following) else None)
                scores = []
                continue
            except NotAWeight as found:
                run.undo.restore()
                self._take_for_state(found.names)
                scores = []
                continue
            except OutsideWrite as refused:
                run.undo.restore()
                self._fill_memos(refused, segments[: run.segments + 1], state, kwargs)
                continue
            except BaseException:
                run.undo.restore()
                raise
            return ((joined, carried.value) if loop.carries_state else joined), run

    def _recorded(self, run: Run, segments: list[Any], kwargs: dict, form: Hashable) -> Any:
        """Record a call and run it; its outputs, joined."""
        dim, scores = self._original.dim, self._session.scores
        run.writer = writer = scores.writer(form, dim, run.kinds)
        with listening(writer):
            outputs = [out for done in self._record(run, segments, kwargs) for out in done]
            self._check_width(run)
            outputs += run.drain(final=True)
            run.finish()
        joined = join(outputs, dim)
        if writer is not None:
            scores.keep(form, writer.done(joined))
        return joined

    def _follow(self, run: Following, segments: list[Any], kwargs: dict) -> Any:
        """Do what the score says, if Dynamo says that the call is the same; the outputs, joined."""
        with dynamo.settings(self._session.symbols, self._session.answers):
            for segment in segments:
                run.begin()
                if run.repeats:
                    if not run.repeat.skip(segment):
                        raise Changed("a segment does not repeat that did")
                else:
                    run.repeat.settle(run)
                    result = self._ask(run, segment, kwargs, is_set=True)
                    run.agree(result)
                    run.saw(segment, result)
                    del result  # a result that somebody holds at the end is to be filled
                with as_captured():
                    run.perform()
        joined, given = run.result(), run.given()
        run.finish()
        self._session.scores.was_followed(run.chosen(), given, run.kinds)
        return joined

    def verify(self, inputs: Any, /, state: Any = None, **kwargs: Any) -> dict[str, dict[str, float]]:
        """Compare with the sequential run of this call; the step's state stays as it is.

        Two checks (see :mod:`diagpass.verify`): the schedule run unbatched is bitwise equal to the sequential
        run, which proves the reordering; the batched run is as close to a run in float64 as the sequential
        run is, up to a small factor, which proves the arithmetic.

        Returns
        -------
        dict
            Per output and state, by name: relative errors ``"unbatched"`` (against the sequential run),
            ``"batched"`` and ``"sequential"`` (against the float64 run, or for a float64 model against the
            sequential run).

        Raises
        ------
        VerificationError
            A value differs by more than that; the message names the worst.
        DiagpassError
            The call cannot run as a wavefront.
        """
        loop = self._original
        with self._lock:
            segments = cut(inputs, loop.segment_size, loop.dim)
            before = Snapshot(loop.step, inputs, state, kwargs)

            def run(call: Callable[[], Any]) -> dict[str, torch.Tensor]:
                try:
                    with torch.no_grad():
                        return named_results(call(), loop.step)
                finally:
                    before.restore()

            try:
                unbatched = run(lambda: self._deferred(segments, state, kwargs, 1)[0])
                batched = run(lambda: self._deferred(segments, state, kwargs, self._options.max_width)[0])
            except _STOPS as stopped:
                raise SequentialError(f"there is no wavefront to verify: {stopped}") from None
            sequential = run(lambda: loop(inputs, state, **kwargs))
            exact = run_in_double(loop, (inputs, state), kwargs, "step")
            return compare(sequential, unbatched, batched, exact)

    def _take_for_state(self, names: Iterable[str]) -> None:
        """Buffers that the step replaces are state, not weights: capture anew."""
        log.info("%s replaced by the step: taken for state", ", ".join(names))
        session = self._session
        renewed = StepSession(
            self._original.step,
            self._options,
            symbols=session.symbols - session.foreseen,
            captures=session.captures,
            changing={*session.changing, *names},
        )
        self.__dict__.update(_session=renewed, _entry=make_entry(self._original.step, renewed))

    def stream(
        self, segments: Iterable[Any], state: Any = None, *, progress: bool = False, **kwargs: Any
    ) -> SegmentStream:
        """Run segments as they come; arguments and result are those of :meth:`diagpass.SegmentLoop.stream`.

        At most as many segments are held as a wave reaches across (L for a stack of L layers). An output is
        handed out as soon as its last cell has run. Between two outputs the step's attributes are what they
        were before the stream; the final state is there with the last output.

        Raises
        ------
        DiagpassError
            While iterating: a stream was abandoned midway and nothing has reset the state since, or another
            call came between and the step keeps one state.
        """
        if is_disabled():
            return self._original.stream(segments, state, progress=progress, **kwargs)
        self._original.check_state(state)
        check_segments(segments)
        outputs = self._stream(segments, Carried(state), kwargs)
        return SegmentStream(outputs, progress=progress, total=length_of(segments))

    def _stream(self, segments: Iterable[Any], carried: Carried, kwargs: dict) -> Generator[Any, None, Any]:
        loop = self._original
        run = Run(self._session.kinds, self._options.max_width)
        run.carried = carried
        items = iter(segments)
        with self._lock:
            self._check_whole()
            view = View(loop.step)
            self._make_room()
            self._begin()
            view.begin()
            run.undo = view
            number = loop._runs
        complete = False
        records_gradients = torch.is_grad_enabled()
        try:
            for at, segment in enumerate(items):
                plain, done = False, []
                with self._lock, view, torch.set_grad_enabled(records_gradients):
                    self._check_alone(number, at)
                    if at == 0 and self._must_run_plainly(segment, carried.value, kwargs):
                        plain = True
                    else:
                        try:
                            for done in self._record(run, [segment], kwargs, stream=True):  # noqa: B007
                                pass
                        except (*_STOPS, Uncaptured) as stopped:
                            if isinstance(stopped, NotAWeight):
                                self._take_for_state(stopped.names)
                            elif not isinstance(stopped, Uncaptured):
                                self._refuse_because(stopped, _key(self, segment, kwargs))
                            elif not stances.may_run_plainly():
                                raise
                            done = run.drain()
                            run.finish()
                            plain = True
                    if plain:
                        view.keep()
                if plain:
                    yield from done
                    complete = True
                    rest = itertools.chain([segment], items)
                    return (yield from plainly(loop, rest, carried.value, kwargs))
                yield from done
            with self._lock, view:
                self._check_alone(number, run.segments)
                done = run.drain(final=True)
            yield from done[:-1]
            with self._lock, view:
                self._check_alone(number, run.segments)
                run.finish()
                view.keep()
            complete = True
            self._remember(run, "wavefront")
            yield from done[-1:]
            return carried.value if loop.carries_state else None
        finally:
            if not complete and not loop.carries_state:
                self.__dict__["_broken"] = f"a stream was abandoned or failed after {run.segments} segments"

    def _record(
        self, run: Run, segments: Iterable[Any], kwargs: dict, stream: bool = False
    ) -> Iterator[list[Any]]:
        """Send segments through the step; yield the outputs that are complete after each.

        In a stream the segments are copied, for their memory may be used for the next one, and Dynamo is
        asked about each, for others may have changed what guards ask about.
        """
        for segment in segments:
            say("segments", run.segments, len(segments) if isinstance(segments, list) else 0)
            self._check_width(run)  # before: a stream that stops here runs this segment as it stands
            segment = tree_map(functools.partial(_fixed, own=stream), segment)
            if run.writer is not None:
                run.writer.segment(tree_leaves(segment))
            if not stream and run.repeat.record(run, segment):
                run.fresh_captures = 0
                if run.writer is not None:
                    run.writer.repeated()
                run.advance()
                yield run.take()
                continue
            run.repeat.settle(run)
            captures = self._session.captures
            result = self._ask(run, segment, kwargs)
            run.outputs(result)
            if not stream:
                run.repeat.saw(run, segment, result, run.carried.value)
            fresh = self._session.captures > captures
            run.fresh_captures = run.fresh_captures + 1 if fresh else 0
            if not fresh:  # learn what comes next before anything is compiled
                run.advance()
            yield run.take()

    def _ask(self, run: Run, segment: Any, kwargs: dict, is_set: bool = False) -> Any:
        """Send a segment through the step by way of Dynamo; what it returns, with the state passed on.

        ``is_set`` says that Dynamo has its settings already.
        """
        loop, carried = self._original, run.carried
        args = (segment, carried.value) if loop.carries_state else (segment,)
        run.guard_inputs(segment)
        run.scope = {"model": loop.step, "args": args, "kwargs": kwargs}
        back = run.mark() if isinstance(run.undo, View) else None
        result = self._step(run, args, kwargs, is_set)
        if loop.carries_state:
            result, carried.value = split_result(result, loop.step)
        try:
            run.check_results(result)
        except Conflict:
            if back is not None and isinstance(run.undo, View):  # a stream goes on before this segment
                back()
                run.undo.undo()
            raise
        return result

    def _step(self, run: Run, args: tuple, kwargs: dict, is_set: bool) -> Any:
        """One call of the step, recorded."""
        session = self._session
        config: Any = torch._dynamo.config
        learning = run.fresh_captures < MAX_FRESH
        session.run, session.carried = run, args[1:]
        try:
            with contextlib.nullcontext() if learning else config.patch(error_on_recompile=True):
                try:
                    with contextlib.nullcontext() if is_set else dynamo.capturing():
                        return call_entry(self._entry, session, args, kwargs, is_set)
                except CaptureFailed as failed:
                    if self._warmed or run.segments or not dynamo.in_library(failed.__cause__):
                        raise
                    self._warm_up(args, kwargs)
                    with dynamo.capturing():
                        return call_entry(self._entry, session, args, kwargs)
        except RecompileError as error:
            raise Conflict(
                f"the step is another one at each of {run.segments} segments, so there is nothing to repeat: "
                f"{dynamo.changed(error)}"
            ) from None
        finally:
            session.run, session.carried = None, ()

    def _warm_up(self, args: tuple, kwargs: dict) -> None:
        """Run the step once as it stands: some libraries set themselves up at a first call."""
        self.__dict__["_warmed"] = True
        before = Snapshot(self._original.step, args, kwargs)
        with torch.no_grad():
            self._original.step(*args, **kwargs)
        before.restore(keep_setup=True)

    def _fill_memos(self, refused: OutsideWrite, segments: list[Any], state: Any, kwargs: dict) -> None:
        """Run segments twice as they stand: what the step changes outside may be what a library keeps of a
        look-up. It is so if the second run changes nothing there and gives the same bits.

        Raises
        ------
        OutsideWrite
            It is not so; everything is as before.
        """
        if len(segments) <= self._filled or not all(map(Memos.can_hold, refused.objects)):
            raise refused
        loop = self._original
        self.__dict__["_filled"] = len(segments)
        memos = Memos(refused.objects)
        before = Snapshot(loop.step, segments, state, kwargs)

        def run() -> dict[str, torch.Tensor]:
            try:
                with torch.no_grad():
                    loop.reset_step()
                    plain = plainly(loop, segments, state, kwargs)
                    return named_results(list(plain), loop.step)
            finally:
                before.restore()

        try:
            first = run()
            filled = Memos(refused.objects)
            second = run()
        except BaseException:
            memos.restore()
            raise
        if not filled.unchanged() or not same_bits(first, second):
            memos.restore()
            raise refused
        log.info("run twice as it stands, which fills what is kept outside of the step")

    def _begin(self, is_watched: bool = False) -> Fills | None:
        """Start a call: reset, and say that earlier streams are over; what a watched reset made."""
        weights = self._session.kinds.numbered()[1]
        fills = Fills(weights) if is_watched and self._original.reset is not None else None
        with fills or contextlib.nullcontext():
            self._original.reset_step()
        self._original._runs += 1
        self.__dict__["_broken"] = None
        return fills

    def _make_room(self) -> None:
        """Forget what was captured if it is too much."""
        if len(self._session.programs) > MAX_PROGRAMS:
            log.info("dropped %d captured behaviours: too many", len(self._session.programs))
            captures = self._session.captures
            session = StepSession(self._original.step, self._options, captures=captures)
            self.__dict__.update(_session=session, _entry=make_entry(self._original.step, session))

    def _check_whole(self) -> None:
        if self._broken is not None and self._original.reset is None and not self._original.carries_state:
            raise DiagpassError(
                f"{self._broken}, and the state of {type(self._original.step).__name__} is not what any "
                "number of segments leaves; reset it and call fast.resume(), or make the loop with reset="
            )

    def resume(self) -> None:
        """Say that the state is good again after a stream was abandoned."""
        self.__dict__["_broken"] = None

    def _check_alone(self, number: int, at: int) -> None:
        if self._original._runs != number and not self._original.carries_state:
            raise DiagpassError(
                f"another call of the loop came before segment {at} of this stream, and its step "
                f"{type(self._original.step).__name__} keeps one state; finish one stream before the next "
                "call"
            )

    def _must_run_plainly(self, segment: Any, state: Any, kwargs: dict) -> bool:
        """Whether this call is known not to be deferrable; says so once."""
        key = _key(self, segment, kwargs)
        known = self._failed.get(key)
        if known is None and self._options.schedule == "sequential":
            refusal = Refusal("schedule='sequential' was asked for")
            self.__dict__["_last"] = rolled_report(None, self._session, refusal, "sequential")
            return True
        if known is None and torch.is_grad_enabled():
            tensors = [*self._original.parameters(), *tree_leaves((segment, state, kwargs))]
            if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tensors):
                refusal = Refusal(
                    "gradients are recorded, and a rolled program has none; call it under torch.no_grad()"
                )
                known = refusal, rolled_report(None, self._session, refusal, "sequential")
        if known is None:
            return False
        self._failed[key] = known
        refusal, report = known
        self._refuse(refusal, report)
        return True

    def _refuse_because(self, stopped: Exception, key: tuple, run: Run | None = None) -> None:
        """Remember why a call is not deferred; warn, or raise in strict mode."""
        if isinstance(stopped, Refused):
            refusal = stopped.refusal
        elif isinstance(stopped, CaptureFailed):
            refusal = not_captured(self._original.step, stopped, "step")
        elif isinstance(stopped, Conflict) and stopped.refusal is not None:
            refusal = stopped.refusal
        else:
            refusal = Refusal(f"the step cannot be deferred: {stopped}", SequentialError)
        report = rolled_report(run, self._session, refusal, "sequential")
        if isinstance(stopped, CaptureFailed) and not self._warmed:
            self.__dict__["_warmed"] = True  # the plain run to come may set the step up: try once more
        else:
            self._failed[key] = refusal, report
        self._refuse(refusal, report)

    def _refuse(self, refusal: Refusal, report: Report) -> None:
        self.__dict__["_last"] = report
        if self._options.strict:
            raise refusal.error(refusal.reason)
        if refusal.reason not in self._warned:
            self._warned.add(refusal.reason)
            warnings.warn(f"running sequentially: {refusal.reason}", DiagpassWarning, stacklevel=4)

    def _check_width(self, run: Run) -> None:
        """Stop where the steady state leaves no width, unless that was asked for, or pays all the same."""
        if not self._is_wide(run):
            run.narrow = accepted(run, self._options)

    def _is_wide(self, run: Run) -> bool:
        if self._options.schedule != "auto" or run.dry or run.fresh_captures or run.segments < 4:
            return True
        if run.narrow is not None:
            return True
        return run.steady_width() >= LEAST_MEAN_WIDTH

    def _remember(self, run: Run, ran: str | None) -> None:
        self.__dict__["_last"] = functools.partial(rolled_report, run, self._session, None, ran)
        for note in run.notes:
            if note not in self._warned:
                self._warned.add(note)
                warnings.warn(note, DiagpassWarning, stacklevel=4)


def explain_loop(loop: SegmentLoop, args: tuple, kwargs: dict) -> Report:
    """What ``transform`` would do with a call of a loop; nothing is compiled or changed."""
    fast = TransformedLoop(loop, Options())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DiagpassWarning)
        report = fast.capture(*args, **kwargs)
    if report is None:
        raise DiagpassError("DIAGPASS_DISABLE is set, so there is nothing to explain")
    return dataclasses.replace(report, ran=None)


_STOPS = (CaptureFailed, Refused, Conflict)


def _ahead(scores: Sequence[Score], given: Given) -> Playing | None:
    """Begin to play what an earlier call did, if all that is there before this one is foreseen."""
    for score in scores:
        if score.pages is not None and score.pages.are_foreseen:
            playing = Playing(score.pages, given.leaves)
            playing.play_ahead()
            return playing
    return None


def _fixed(leaf: Any, own: bool) -> Any:
    return fixed_layout(leaf, own) if isinstance(leaf, torch.Tensor) else leaf


def _key(fast: TransformedLoop, segment: Any, kwargs: dict) -> tuple:
    return call_key(fast.original, (segment,), kwargs)
