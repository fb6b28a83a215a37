"""``transform`` and ``explain``: the faces that most users see.

``transform(model)`` returns a module with the model's signature, parameters and attributes whose calls
run as wavefronts. ``explain(model, ...)`` says what would be done and why, and runs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import os
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, RecompileError, TorchDynamoException
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from diagpass.backend import FoundCounters, OnlyAnalysed, OnlyCaptured, Session
from diagpass.capture import dynamo
from diagpass.errors import CaptureError, DiagpassError, OptionError, VerificationError
from diagpass.ir import Schedule
from diagpass.options import Options
from diagpass.pipeline import Analysis, Refusal
from diagpass.report import Report, make_report
from diagpass.state import Snapshot
from diagpass.verify import Reference

log = logging.getLogger(__name__)

__all__ = ["Transformed", "explain", "transform"]

_numbers = itertools.count()
_OWN = frozenset(("_original", "_options", "_session", "_entry", "_lock", "_failed", "_verified", "forward"))


def transform(
    model: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    strict: bool = False,
    verify: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Transformed:
    """Make a segment-recurrent model run as a wavefront, with the same results.

    Parameters
    ----------
    model
        Any module that Dynamo can capture; its loop over segments and layers is found in its dataflow.
    example_inputs
        A tuple of positional or a dict of keyword inputs: capture now instead of at the first call. The
        model's state is untouched.
    strict
        Raise instead of running sequentially.
    verify
        Compare with the sequential run once per plan.
    options
        See :class:`diagpass.options.Options`: ``compiler``, ``schedule``, ``weights``, ``cells``,
        ``max_width``.

    Returns
    -------
    Transformed
        A module with the model's signature; ``.original`` is the model, ``.report`` says what was done.

    Raises
    ------
    OptionError
        An unknown option.
    CaptureError, ChainError, SequentialError
        Under ``strict``, when ``example_inputs`` are given and the model would run sequentially.

    Notes
    -----
    The idea is diagonal batching (Sivtsov et al. 2025, arXiv 2506.05229), known for stacked LSTMs as the
    wavefront (Appleyard et al. 2016, arXiv 1604.01946).
    """
    if isinstance(model, Transformed):
        model = model.original
    if not isinstance(model, nn.Module):
        raise OptionError(f"transform takes a torch.nn.Module; got {type(model).__name__}")
    given = dict(options or {})
    given.setdefault("strict", strict)
    given.setdefault("verify", verify)
    from diagpass.loop import SegmentLoop
    from diagpass.rolled.face import TransformedLoop

    kind = TransformedLoop if isinstance(model, SegmentLoop) else Transformed
    fast = kind(model, Options.parse(given))
    if example_inputs is not None:
        args, kwargs = _as_call(example_inputs)
        fast.capture(*args, **kwargs)
    return fast


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Say what ``transform`` would do with this call and why; nothing is compiled or changed.

    Parameters
    ----------
    model
        The model, or what ``transform`` made of it.
    args, kwargs
        The inputs of one call.

    Returns
    -------
    Report
        With ``ran`` None. A model that cannot be captured gets the verdict ``"sequential"`` and the
        reason.
    """
    from diagpass.loop import SegmentLoop
    from diagpass.rolled.face import explain_loop

    if isinstance(model, Transformed):
        model = model.original
    if isinstance(model, SegmentLoop):
        return explain_loop(model, args, kwargs)
    session = Session(Options(), analyse_only=True)
    entry = _make_entry(model, session)
    before = Snapshot(model, args, kwargs)
    with torch.no_grad():
        try:
            try:
                _call(entry, session, args, kwargs)
            except _CaptureFailed:  # the library may set itself up at a first call
                model(*args, **kwargs)
                before.restore(keep_setup=True)
                _call(entry, session, args, kwargs)
        except OnlyAnalysed as found:
            return make_report(found.analysis)
        except _CaptureFailed as failed:
            refusal = Refusal(f"the model could not be captured as one graph: {failed}")
            return make_report(Analysis(None, Schedule(()), None, refusal))
        finally:
            before.restore()
    raise DiagpassError("the model's forward ran without a single tensor operation: nothing to do")


class _CaptureFailed(Exception):
    """Dynamo could not capture the call; the text is its reason and the user's line."""


def _make_entry(model: nn.Module, session: Session) -> Callable[..., Any]:
    """The compiled call of one model, with a code object of its own (Dynamo caches by code object)."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = call.__code__.replace(co_name=f"diagonal_{next(_numbers)}")
    own = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    return torch.compile(own, backend=session.compile, fullgraph=True, dynamic=False)


def _call(entry: Callable[..., Any], session: Session, args: tuple, kwargs: dict) -> Any:
    """Call, capturing if need be; Dynamo's errors become ours.

    Raises
    ------
    _CaptureFailed
        The call could not be captured.
    DiagpassError
        Strict mode refused the plan.
    """
    while True:
        try:
            # Dynamo skips frames under a dispatch mode: the modes wait and are back when the program runs.
            with dynamo.settings(session.symbols), _disable_current_modes() as modes:
                session.modes = list(modes)
                return entry(*args, **kwargs)
        except BackendCompilerFailed as error:
            inner = error.inner_exception
            if isinstance(inner, FoundCounters):
                log.info("capturing again with counters as symbols: %s", inner)
                session.symbols |= inner.sources
                continue
            if isinstance(inner, CaptureError):
                raise _CaptureFailed(str(inner)) from None
            if isinstance(inner, (DiagpassError, OnlyAnalysed)):
                raise inner from None
            log.warning("internal error while planning", exc_info=inner)
            raise _CaptureFailed(
                f"internal error {type(inner).__name__}: {inner} (please report it)"
            ) from error
        except RecompileError:
            raise
        except TorchDynamoException as error:
            raise _CaptureFailed(dynamo.why(error)) from error


def _as_call(inputs: Sequence[Any] | Mapping[str, Any]) -> tuple[tuple, dict]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise OptionError(
        f"example_inputs is a tuple of positional or a dict of keyword inputs; got {type(inputs).__name__}"
    )


class Transformed(nn.Module):
    """A model whose calls run as wavefronts.

    It stands in for the model: same signature, parameters, buffers, ``state_dict`` keys, attributes and
    methods (what it does not have itself is the model's; attributes are set on the model). Calls are
    serialised by a lock, because the model's state is one.

    Attributes
    ----------
    original
        The model.
    report
        The :class:`~diagpass.report.Report` of the plan that ran last, or None.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[name] = getattr(model, name)
        hooks = nn.Module.__new__(nn.Module)
        nn.Module.__init__(hooks)
        for name, value in vars(hooks).items():
            if "hook" in name:
                self.__dict__[name] = value
        self.__dict__.update(
            _original=model,
            _options=options,
            _lock=threading.RLock(),
        )
        self._renew()

    def _renew(self) -> None:
        session = Session(self._options, restart_for_counters=True)
        self.__dict__.update(
            _session=session,
            _entry=_make_entry(self._original, session),
            _failed=set(),
            _verified=set(),
            forward=_with_signature(self._run, self._original.forward),
        )

    @property
    def original(self) -> nn.Module:
        """The model, as it was given."""
        return self._original

    @property
    def report(self) -> Report | None:
        """What the plan that ran last is and did; None before the first capture."""
        return self._session.report()

    def capture(self, *args: Any, **kwargs: Any) -> Report | None:
        """Capture and plan this call without running it.

        Returns
        -------
        Report or None
            The plan's report.
        """
        if _disabled():
            return None
        with self._lock:
            self._session.hold = True
            before = Snapshot(self._original, args, kwargs)
            try:
                try:
                    _call(self._entry, self._session, args, kwargs)
                except _CaptureFailed:
                    self._original(*args, **kwargs)
                    before.restore(keep_setup=True)
                    _call(self._entry, self._session, args, kwargs)
            except OnlyCaptured:
                pass
            except _CaptureFailed as failed:
                self._refuse(failed)
                self._failed.add(_call_key(self._original, args, kwargs))
            finally:
                self._session.hold = False
                before.restore()
        return self.report

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model."""
        if _disabled():
            return self._original(*args, **kwargs)
        with self._lock:
            key = _call_key(self._original, args, kwargs)
            if key in self._failed:
                return self._original(*args, **kwargs)
            if self._options.verify:
                return self._verified_call(args, kwargs)
            try:
                return _call(self._entry, self._session, args, kwargs)
            except _CaptureFailed:
                return self._after_warm_up(key, args, kwargs)

    def _after_warm_up(self, key: tuple, args: tuple, kwargs: dict) -> Any:
        """Run once as it stands, which sets some libraries up, and try to capture again.

        If that fails too, the sequential run was the call. What was captured is compared with it,
        because what the library set up is kept while the model's state is put back.
        """
        before = Snapshot(self._original, args, kwargs)
        result = self._original(*args, **kwargs)
        after = Snapshot(self._original, args, kwargs)
        reference = Reference.of(self._original, result)
        before.restore(keep_setup=True)
        try:
            captured = _call(self._entry, self._session, args, kwargs)
            reference.compare(self._original, captured)
            return captured
        except (_CaptureFailed, VerificationError) as failed:
            self._refuse(failed)
            self._failed.add(key)
            after.restore()
            return result

    def _refuse(self, failed: Exception) -> None:
        refusal = Refusal(f"the model could not be captured as one graph: {failed}", CaptureError)
        self._session.last = make_report(Analysis(None, Schedule(()), None, refusal), "sequential")
        self._session.refuse(refusal)

    def _verified_call(self, args: tuple, kwargs: dict) -> Any:
        """Compare with the sequential run at the first call of each plan."""
        self.capture(*args, **kwargs)
        if _call_key(self._original, args, kwargs) in self._failed:
            return self._original(*args, **kwargs)
        plan = self._session.last
        if plan is None or id(plan) in self._verified:
            return _call(self._entry, self._session, args, kwargs)
        reference = Reference.take(self._original, args, kwargs)
        result = _call(self._entry, self._session, args, kwargs)
        reference.compare(self._original, result)
        self._verified.add(id(plan))
        return result

    # What is the model's.

    def __getattr__(self, name: str) -> Any:
        if "_original" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_original"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            self.__dict__[name] = value
        else:
            setattr(self._original, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._original, name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self._original.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self._original.load_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Transformed:
        """Set the model's mode; the next call is planned for it."""
        self._original.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Transformed:
        self._original._apply(fn, recurse)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Transformed:
        """Apply a function to the model and its children."""
        self._original.apply(fn)
        return self

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self._original.named_modules(*args, **kwargs)

    def extra_repr(self) -> str:
        """One line about the plan that ran last."""
        report = self.report
        return f"diagpass: {'not run yet' if report is None else report.ran}"

    def __repr__(self) -> str:
        return f"Transformed({self.extra_repr()}, {self._original!r})"

    def __reduce__(self) -> Any:
        return Transformed, (self._original, self._options)

    def __deepcopy__(self, memo: dict) -> Transformed:
        import copy

        return Transformed(copy.deepcopy(self._original, memo), self._options)


def _disabled() -> bool:
    return os.environ.get("DIAGPASS_DISABLE", "") not in ("", "0")


def _with_signature(run: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` under the model's signature, for those who inspect it (Hugging Face does)."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    with contextlib.suppress(TypeError, ValueError):
        call.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return call


def _call_key(model: nn.Module, args: tuple, kwargs: dict) -> tuple:
    """What a failed capture is remembered by."""
    leaves = tree_leaves((args, kwargs))
    described = tuple(
        (tuple(leaf.shape), leaf.dtype, str(leaf.device))
        if isinstance(leaf, torch.Tensor)
        else (type(leaf), repr(leaf) if isinstance(leaf, (int, float, str, bool)) else id(leaf))
        for leaf in leaves
    )
    return described, tuple(sorted(kwargs)), model.training, torch.is_grad_enabled()
