"""The module that ``transform`` returns for a model with a loop of its own.

Few cells: the model is captured flat, loop and all (:mod:`diagpass.transformed`). Many: its loop runs as it
stands, and the module that runs one segment, the *step*, is captured once and recorded at each call
(:mod:`diagpass.rolled.outer`), so that the capture costs the same for any number of segments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.config
from torch import nn
from torch._dynamo.exc import RecompileError
from torch.utils._pytree import tree_leaves, tree_map

from diagpass.capture import dynamo, stances
from diagpass.capture.foresight import submodule_source
from diagpass.errors import CaptureError, DiagpassWarning, SequentialError
from diagpass.options import Options
from diagpass.pipeline import LEAST_MEAN_WIDTH, Refusal
from diagpass.report import Report
from diagpass.rolled.check import compare, named_results, run_in_double
from diagpass.rolled.layout import fixed_layout
from diagpass.rolled.observe import Found, bound, observe
from diagpass.rolled.outer import Outer, OuterRun
from diagpass.rolled.program import Refused
from diagpass.rolled.run import Conflict, NotAWeight
from diagpass.rolled.session import StepSession
from diagpass.rolled.summary import accepted, rolled_report
from diagpass.rolled.undo import Undo
from diagpass.stages import say
from diagpass.state import Snapshot
from diagpass.transformed import (
    CaptureFailed,
    Transformed,
    Uncaptured,
    call_entry,
    call_key,
    is_disabled,
    make_entry,
)
from diagpass.verify import Reference

log = logging.getLogger(__name__)

MANY_CELLS = 256  # flat capture costs about a third of a second a cell
MAX_PROGRAMS = 64  # behaviours and shapes of a step that are kept
MAX_FRESH = 8  # captures in one call, one segment after the other, before we stop learning
_STOPS = (CaptureFailed, Refused, Conflict)


class TransformedModel(Transformed):
    """A model whose calls run as wavefronts: captured flat if it has few cells, else step by step."""

    def _renew(self) -> None:
        super()._renew()
        self.__dict__.update(
            _found={}, _step=None, _rolled=None, _step_entry=None, _last=None, _refused={}, _warned=set()
        )

    @property
    def report(self) -> Report | None:
        """What the plan that ran last is and did; None before the first capture."""
        last: Any = self._last
        if callable(last):
            last = self.__dict__["_last"] = last()
        return last if last is not None else self._session.report()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model."""
        if is_disabled():
            return self._original(*args, **kwargs)
        with self._lock:
            if not self._is_rolled(args, kwargs):
                self.__dict__["_last"] = None
                return super()._run(*args, **kwargs)
            key = call_key(self._original, args, kwargs)
            if self._must_run_plainly(key, args, kwargs):
                return self._original(*args, **kwargs)
            if self._options.verify and key not in self._verified:
                self.verify(*args, **kwargs)
                self._verified.add(key)
            before = Snapshot(self._original, args, kwargs)
            try:
                result, run = self._deferred(args, kwargs, self._options.max_width)
            except _STOPS as stopped:
                before.restore(keep_setup=True)
                self._refuse_because(stopped, key)
                return self._original(*args, **kwargs)
            except Uncaptured:
                before.restore(keep_setup=True)
                if not stances.may_run_plainly():
                    raise
                return self._original(*args, **kwargs)
            except (NotImplementedError, RuntimeError) as error:  # the modes may be the cause
                before.restore(keep_setup=True)
                try:
                    result = self._original(*args, **kwargs)
                except BaseException:
                    before.restore()
                    raise
                said = str(error).strip().split("\n")[0]
                self._refuse_because(Conflict(f"{type(error).__name__}: {said}"), key)
                return result
            except BaseException:
                before.restore()
                raise
            self._remember(run, "wavefront")
            return result

    def capture(self, *args: Any, **kwargs: Any) -> Report | None:
        """Capture and plan this call without changing anything.

        A call with many cells is run to find out, and the state put back.

        Returns
        -------
        Report or None
            The plan's report.
        """
        if is_disabled():
            return None
        with self._lock:
            if not self._is_rolled(args, kwargs):
                self.__dict__["_last"] = None
                return super().capture(*args, **kwargs)
            before = Snapshot(self._original, args, kwargs)
            with torch.no_grad():
                key = call_key(self._original, args, kwargs)
                if self._must_run_plainly(key, args, kwargs):
                    return self.report
            try:
                with torch.no_grad():
                    _, run = self._deferred(args, kwargs, self._options.max_width)
                self._remember(run, None)
                _undo(run)
            except _STOPS as stopped:
                before.restore(keep_setup=True)
                self._refuse_because(stopped, key)
            finally:
                before.restore(keep_setup=True)
        return self.report

    def verify(self, *args: Any, **kwargs: Any) -> dict[str, dict[str, float]]:
        """Compare with the sequential run of this call; the model's state stays as it is.

        Returns
        -------
        dict
            Per output and state, by name: relative errors. For a call whose step is deferred those of
            :meth:`diagpass.rolled.face.TransformedLoop.verify`, else ``"batched"`` alone.

        Raises
        ------
        VerificationError
            A value differs by more than rounding explains; the message names the worst.
        DiagpassError
            The call cannot run as a wavefront.
        """
        model = self._original
        with self._lock:
            before = Snapshot(model, args, kwargs)
            if not self._is_rolled(args, kwargs):
                reference = Reference.take(model, args, kwargs)
                try:
                    with torch.no_grad():
                        errors = reference.compare(
                            model, call_entry(self._entry, self._session, args, kwargs)
                        )
                except CaptureFailed as failed:
                    raise SequentialError(f"there is no wavefront to verify: {failed}") from None
                finally:
                    before.restore()
                return {name: {"batched": error} for name, error in errors.items()}

            def run(call: Callable[[], tuple[Any, OuterRun | None]]) -> dict[str, torch.Tensor]:
                try:
                    with torch.no_grad():
                        result, done = call()
                        found = named_results(result, model)
                    _undo(done)
                    return found
                finally:
                    before.restore(keep_setup=True)

            try:
                unbatched = run(lambda: self._deferred(args, kwargs, 1))
                batched = run(lambda: self._deferred(args, kwargs, self._options.max_width))
            except _STOPS as stopped:
                raise SequentialError(f"there is no wavefront to verify: {stopped}") from None
            sequential = run(lambda: (model(*args, **kwargs), None))
            exact = run_in_double(model, args, kwargs)
            return compare(sequential, unbatched, batched, exact)

    # Which way.

    def _is_rolled(self, args: tuple, kwargs: dict) -> bool:
        """Whether this call goes step by step; finds the step if need be."""
        choice = self._options.loop
        if choice == "flat":
            return False
        if self._step is not None:
            return True
        if choice == "auto" and bound(self._original, (args, kwargs), self._options.cells) <= MANY_CELLS:
            return False
        found = self._observed(args, kwargs, MANY_CELLS if choice == "auto" else 0)
        if found.writes_weights:
            return False
        few = found.complete and found.cells <= MANY_CELLS
        if few and (choice == "auto" or found.step is None):
            return False
        if found.step is None:
            return True  # too many to be captured one by one: says so
        log.info("%s runs one segment: it is captured once for any number of them", found.step)
        self.__dict__["_step"] = found.step
        self._renew_step()
        return True

    def _observed(self, args: tuple, kwargs: dict, enough: int) -> Found:
        key = call_key(self._original, args, kwargs)
        found = self._found.get(key)
        if found is None:
            found = observe(self._original, args, kwargs, self._options.cells, enough)
            self._found[key] = found
        return found

    def _renew_step(self, **known: Any) -> None:
        step = self._original.get_submodule(self._step)
        source = _ROOT + submodule_source(self._step)
        session = StepSession(step, self._options, source=source, **known)
        self.__dict__.update(_rolled=session, _step_entry=None)

    def _must_run_plainly(self, key: tuple, args: tuple, kwargs: dict) -> bool:
        """Whether this call is known not to be deferrable; says so once."""
        refusal = self._refused.get(key)
        operator = self._found[key].higher_order if key in self._found else None
        if refusal is None and self._options.schedule == "sequential":
            refusal = Refusal("schedule='sequential' was asked for")
            self.__dict__["_last"] = self._sequential_report(refusal)
            return True
        if refusal is None and self._step is None:
            refusal = Refusal(
                "no module of the model runs one segment, and its cells are too many to capture one by one; "
                "put what the loop does for a segment in a module of its own, or set the option loop='flat'"
            )
        if refusal is None and operator is not None:
            refusal = Refusal(
                f"the loop around {self._step} runs {operator}, which is compiled where it is called; call "
                "it inside of the step"
            )
        if refusal is None and torch.is_grad_enabled():
            leaves = [*self._original.parameters(), *tree_leaves((args, kwargs))]
            if any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
                refusal = Refusal(
                    "gradients are recorded, and a rolled program has none; call it under torch.no_grad()"
                )
        if refusal is None:
            return False
        self._refuse_call(refusal, key)
        return True

    def _sequential_report(self, refusal: Refusal, run: OuterRun | None = None) -> Report:
        session = self._rolled or StepSession(self._original, self._options)
        return rolled_report(run, session, refusal, "sequential")

    def _refuse_because(self, stopped: Exception, key: tuple) -> None:
        """Remember why a call is not deferred; warn, or raise in strict mode."""
        refusal = getattr(stopped, "refusal", None)
        if refusal is None:
            if isinstance(stopped, CaptureFailed):
                text = f"the step {self._step} could not be captured as one graph: {stopped}"
                refusal = Refusal(text, CaptureError)
            else:
                refusal = Refusal(
                    f"the loop around {self._step} cannot be deferred: {stopped}", SequentialError
                )
        self._refuse_call(refusal, key)

    def _refuse_call(self, refusal: Refusal, key: tuple) -> None:
        self._refused[key] = refusal
        self.__dict__["_last"] = self._sequential_report(refusal)
        if self._options.strict:
            raise refusal.error(refusal.reason)
        if refusal.reason not in self._warned:
            self._warned.add(refusal.reason)
            warnings.warn(f"running sequentially: {refusal.reason}", DiagpassWarning, stacklevel=5)

    def _remember(self, run: OuterRun, ran: str | None) -> None:
        self.__dict__["_last"] = functools.partial(rolled_report, run, self._rolled, None, ran)
        for note in run.notes:
            if note not in self._warned:
                self._warned.add(note)
                warnings.warn(note, DiagpassWarning, stacklevel=4)

    # A call.

    def _deferred(self, args: tuple, kwargs: dict, max_width: int | None) -> tuple[Any, OuterRun]:
        """The call as a wavefront: its result and how it went.

        Raises
        ------
        CaptureFailed, Refused, Conflict
            It has to run as it stands; state may be half-written.
        """
        if len(self._rolled.programs) > MAX_PROGRAMS:
            log.info("dropped %d captured behaviours: too many", len(self._rolled.programs))
            self._renew_step(captures=self._rolled.captures)
        before = Snapshot(self._original, args, kwargs)
        warmed = False
        while True:
            run = OuterRun(self._rolled.kinds, max_width)
            run.undo = Undo(whole=False)
            outer = Outer(run, self._original)
            try:
                with self._recording(outer), outer.watching():
                    result = self._original(*args, **kwargs)
                if outer.failed is not None:  # and the model went on
                    raise outer.failed
                if not run.segments:
                    raise Conflict(f"{self._step} was not called")
                self._check_width(outer)
                outer.end()
                return result, run
            except BaseException as error:
                run.undo.restore()
                stopped = outer.failed or error
                if isinstance(stopped, NotAWeight):
                    before.restore(keep_setup=True)
                    log.info("%s: replaced by the step, so taken for state", ", ".join(stopped.names))
                    session = self._rolled
                    self._renew_step(captures=session.captures, changing={*session.changing, *stopped.names})
                    continue
                if isinstance(stopped, CaptureFailed) and not warmed and not run.segments:
                    warmed = True  # some libraries set themselves up at a first call
                    before.restore(keep_setup=True)
                    self._warm_up(args, kwargs)
                    before.restore(keep_setup=True)
                    continue
                raise stopped from None if stopped is not error else error.__cause__

    def _warm_up(self, args: tuple, kwargs: dict) -> None:
        """Run the step once as it stands."""
        with contextlib.suppress(_WarmedUp), torch.no_grad():
            step = self._original.get_submodule(self._step)
            handle = step.register_forward_hook(_stop)
            try:
                self._original(*args, **kwargs)
            finally:
                handle.remove()

    @contextlib.contextmanager
    def _recording(self, outer: Outer) -> Iterator[None]:
        """Have the step's calls recorded: its ``forward`` is another one for the time being."""
        step: nn.Module = self._original.get_submodule(self._step)
        own = vars(step).get("forward")
        thread = threading.get_ident()
        forward = step.forward

        @functools.wraps(forward)
        def record(*args: Any, **kwargs: Any) -> Any:
            if outer.failed is not None:
                raise outer.failed
            if threading.get_ident() != thread:
                outer.fail(f"{self._step} is called in a thread of its own")
            with outer.suspended():
                put_back()
                try:
                    return self._record(outer, args, kwargs)
                except (*_STOPS, Uncaptured) as stopped:
                    outer.failed = stopped
                    raise
                finally:
                    vars(step)["forward"] = record

        def put_back() -> None:
            vars(step).pop("forward", None)
            if own is not None:
                vars(step)["forward"] = own

        vars(step)["forward"] = record
        try:
            yield
        finally:
            put_back()

    def _record(self, outer: Outer, args: tuple, kwargs: dict) -> Any:
        """One segment."""
        run, session = outer.run, self._rolled
        say("segments", run.segments)
        self._check_width(outer)
        if self._step_entry is None:
            forward: Any = _from_root(self._original, self._step)  # type: ignore[arg-type]
            self.__dict__["_step_entry"] = forward, make_entry(forward, session)
        forward, entry = self.__dict__["_step_entry"]
        given = tree_leaves((args, kwargs))
        try:
            args, kwargs = tree_map(functools.partial(self._fixed, run), (args, kwargs))
        except TypeError as error:
            raise Conflict(f"an input of the step cannot be taken apart: {error}") from None
        pairs = zip(given, tree_leaves((args, kwargs)), strict=True)
        run.guard_inputs([leaf for before, leaf in pairs if leaf is not before])  # copies
        run.scope = {"model": forward, "args": args, "kwargs": kwargs}
        session.carried = args, kwargs
        if isinstance(run.undo, Undo):
            run.undo.roots = session.carried
        captures = session.captures
        config: Any = torch._dynamo.config
        learning = run.fresh_captures < MAX_FRESH
        session.run = run
        try:
            watching = contextlib.nullcontext() if learning else config.patch(error_on_recompile=True)
            with watching, dynamo.capturing():
                result = call_entry(entry, session, args, kwargs)
        except RecompileError as error:
            raise Conflict(
                f"the step is another one at each of {run.segments} segments, so there is nothing to repeat: "
                f"{dynamo.changed(error)}"
            ) from None
        finally:
            session.run, session.carried, run.scope = None, (), {}
        run.check_results(result)
        if run.has_own_memory(result):
            run.outputs(tree_leaves(result))
        fresh = session.captures > captures
        run.fresh_captures = run.fresh_captures + 1 if fresh else 0
        if not fresh:  # learn what comes next before anything is compiled
            run.advance()
        run.take()
        return result

    def _fixed(self, run: OuterRun, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, nn.Parameter):
            return leaf
        if run.waiting(leaf) is not None:
            return leaf
        run.seen[id(leaf)] = leaf
        return fixed_layout(leaf, False)

    def _check_width(self, outer: Outer) -> None:
        """Stop where nothing can run beside another, unless that was asked for, or pays all the same."""
        run = outer.run
        if (
            self._options.schedule != "auto"
            or run.fresh_captures
            or run.segments < 4
            or run.narrow is not None
        ):
            return
        if outer.forced >= run.segments - 1:
            where = f" ({outer.line})" if outer.line else ""
            raise Conflict(f"the loop reads a result of nearly each segment before the next one{where}")
        if run.steady_width() < LEAST_MEAN_WIDTH:
            run.narrow = accepted(run, self._options)


_ROOT = "L['model'].__closure__[0].cell_contents"  # what Dynamo calls `model` in the function below


def _from_root(model: nn.Module, path: str) -> Callable[..., Any]:
    """The step's ``forward``, reached from the model, so that Dynamo names modules as the model does."""
    names = tuple(path.split("."))

    def forward(*args: Any, **kwargs: Any) -> Any:
        module: Any = model
        for name in names:
            module = getattr(module, name)
        return module.forward(*args, **kwargs)

    return forward


def _undo(run: OuterRun | None) -> None:
    """Put back what the step changed in objects that it was given."""
    if run is not None and isinstance(run.undo, Undo):
        run.undo.restore()


class _WarmedUp(BaseException):
    """The step has run once."""


def _stop(*_: Any) -> None:
    raise _WarmedUp


def explain_model(model: nn.Module, args: tuple, kwargs: dict) -> Report | None:
    """What ``transform`` would do with a call that has many cells; None if it would be captured flat."""
    fast = TransformedModel(model, Options(compiler="eager", weights="copy"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DiagpassWarning)
        if not fast._is_rolled(args, kwargs):
            return None
        report = fast.capture(*args, **kwargs)
    return None if report is None else dataclasses.replace(report, ran=None)
