"""A module that stands in for a model: the same signature and attributes, calls that run as wavefronts.

``make_entry`` and ``call_entry`` are how Dynamo is asked for a capture; :class:`Transformed` is what users
hold.
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
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, ClassVar, Protocol

import torch
import torch.fx as fx
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, RecompileError, TorchDynamoException
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from diagpass.backend import FoundCounters, OnlyAnalysed, OnlyCaptured, Session
from diagpass.capture import dynamo, stances
from diagpass.describe.places import line_of, module_at
from diagpass.errors import CaptureError, DiagpassError, VerificationError
from diagpass.ir import Schedule
from diagpass.measured import measure
from diagpass.options import Options
from diagpass.pipeline import Analysis, Refusal
from diagpass.report import Report, make_report
from diagpass.stages import say
from diagpass.state import Snapshot
from diagpass.verify import Reference

log = logging.getLogger(__name__)

__all__ = [
    "CaptureFailed",
    "Capturing",
    "Transformed",
    "call_entry",
    "call_key",
    "is_disabled",
    "make_entry",
    "not_captured",
    "with_signature",
]

_numbers = itertools.count()
_OWN = frozenset(("_original", "_options", "_session", "_entry", "_lock", "_failed", "_verified", "forward"))
_HOOKS: Any = tuple(  # that are registered for all modules
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward_pre", "forward", "backward_pre", "backward")
)


class Capturing(Protocol):
    """What is asked of a session: a backend for Dynamo, and what a capture has to know.

    ``answers``: no call may run as it stands; see :func:`diagpass.capture.dynamo.settings`.
    """

    symbols: set[str]
    modes: list[Any]
    captures: int
    answers: ClassVar[bool]

    def begin(self, device_types: Collection[str]) -> None:
        """The first capture is about to begin, of a call with tensors on these devices."""
        ...

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """A captured graph in, what runs it out."""
        ...

    def drop_guesses(self) -> bool:
        """A capture failed: forget symbols that are guesses; whether there were any."""
        ...


class CaptureFailed(Exception):
    """Dynamo could not capture the call; the text is its reason and the user's line."""


class Uncaptured(RuntimeError):
    """A stance of ``torch.compile`` forbids the capture that the call needs; the text is Dynamo's."""


def make_entry(model: nn.Module, session: Capturing) -> Callable[..., Any]:
    """The compiled call of one model: one for each structure of the arguments.

    Where Dynamo looks for what has changed it may read an argument that was there in another call (torch 2.11
    to 2.14), and fails if it is not there now.
    """
    made: dict[Hashable, Callable[..., Any]] = {}

    def entry(*args: Any, **kwargs: Any) -> Any:
        key = tuple(map(_structure, args)), tuple((name, _structure(kwargs[name])) for name in sorted(kwargs))
        found = made.get(key)
        if found is None:
            found = made[key] = _make_entry(model, session)
        return found(*args, **kwargs)

    return entry


def _structure(value: Any) -> Hashable:
    """What can be read from an argument, one level down."""
    if isinstance(value, dict):
        return tuple(value)
    return len(value) if isinstance(value, (tuple, list)) else None


def _make_entry(model: nn.Module, session: Capturing) -> Callable[..., Any]:
    """A compiled call with a code object of its own (Dynamo caches by code object)."""

    def call(*args: Any, **kwargs: Any) -> Any:
        for hooks in _HOOKS:  # Dynamo looks at these only where there are any
            len(hooks)
        return model(*args, **kwargs)

    code = call.__code__.replace(co_name=f"diagonal_{next(_numbers)}")
    own = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    return torch.compile(own, backend=session.compile, fullgraph=True, dynamic=False)


def call_entry(
    entry: Callable[..., Any], session: Capturing, args: tuple, kwargs: dict, is_set: bool = False
) -> Any:
    """Call, capturing if need be; Dynamo's errors become ours.

    Parameters
    ----------
    entry, session
        What is called, and what its captures have to know.
    args, kwargs
        The arguments of the call.
    is_set
        Whether Dynamo has the session's settings already (:func:`diagpass.capture.dynamo.settings`).

    Raises
    ------
    CaptureFailed
        The call could not be captured.
    Uncaptured
        The call was not captured before, and may not be captured now.
    DiagpassError
        Strict mode refused the plan.
    """
    if not session.captures:
        say("capture")
        leaves = tree_leaves((args, kwargs))
        session.begin({leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)})
    while True:
        try:
            # Dynamo skips frames under a dispatch mode: the modes wait and are back when the program runs.
            settings = (
                contextlib.nullcontext() if is_set else dynamo.settings(session.symbols, session.answers)
            )
            is_set = False  # a capture that is tried again has other symbols
            collecting = contextlib.nullcontext() if session.captures else dynamo.capturing()
            with settings, collecting, _disable_current_modes() as modes:
                session.modes = list(modes)
                return entry(*args, **kwargs)
        except BackendCompilerFailed as error:
            inner = error.inner_exception
            if isinstance(inner, FoundCounters):
                log.info("capturing again with counters as symbols: %s", inner)
                session.symbols |= inner.sources
                continue
            if session.drop_guesses():
                continue
            if isinstance(inner, CaptureError):
                raise CaptureFailed(str(inner)) from None
            if isinstance(inner, (DiagpassError, OnlyAnalysed)):
                raise inner from None
            log.warning("internal error while planning", exc_info=inner)
            raise CaptureFailed(
                f"internal error {type(inner).__name__}: {inner} (please report it)"
            ) from error
        except RecompileError:
            raise
        except TorchDynamoException as error:
            if session.drop_guesses():
                continue
            raise CaptureFailed(dynamo.why(error)) from error
        except RuntimeError as error:
            if stances.is_forbidden(error):
                raise Uncaptured(str(error)) from None
            raise


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
            _entry=make_entry(self._original, session),
            _failed=set(),
            _verified=set(),
            forward=with_signature(self._run, self._original.forward),
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
        if is_disabled():
            return None
        with self._lock:
            self._session.hold = True
            before = Snapshot(self._original, args, kwargs)
            try:
                try:
                    call_entry(self._entry, self._session, args, kwargs)
                except CaptureFailed:
                    self._original(*args, **kwargs)
                    before.restore(keep_setup=True)
                    call_entry(self._entry, self._session, args, kwargs)
            except OnlyCaptured:
                pass
            except CaptureFailed as failed:
                self._refuse(failed)
                self._failed.add(call_key(self._original, args, kwargs))
            finally:
                self._session.hold = False
                before.restore()
        return self.report

    def measure(self, *args: Any, **kwargs: Any) -> Report:
        """Time a call wave by wave, and against the model as it stands; the state stays as it is.

        The call is made some times without a clock until all is compiled, some times for the totals in turns
        with the model as it stands, and once under a clock: the wall clock on the CPU, events on CUDA. Other
        calls are not slowed by this. No gradients are recorded.

        Parameters
        ----------
        args, kwargs
            The inputs of the call.

        Returns
        -------
        Report
            With ``times`` (medians of ``"sequential"`` and ``"wavefront"``) and ``measured``; for a call that
            runs sequentially with ``times["sequential"]`` alone. ``diagpass.pictures.write_trace`` draws it.

        Raises
        ------
        DiagpassError
            ``DIAGPASS_DISABLE`` is set, or the options are strict and the call is refused.
        """
        with self._lock:
            return measure(self, args, kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model."""
        if is_disabled():
            return self._original(*args, **kwargs)
        with self._lock:
            key = call_key(self._original, args, kwargs)
            if key in self._failed:
                return self._original(*args, **kwargs)
            if self._options.verify:
                return self._verified_call(args, kwargs)
            try:
                return call_entry(self._entry, self._session, args, kwargs)
            except CaptureFailed:
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
            captured = call_entry(self._entry, self._session, args, kwargs)
            reference.compare(self._original, captured)
            return captured
        except (CaptureFailed, VerificationError) as failed:
            self._refuse(failed)
            self._failed.add(key)
            after.restore()
            return result

    def _refuse(self, failed: Exception) -> None:
        refusal = not_captured(self._original, failed)
        self._session.last = make_report(Analysis(None, Schedule(()), None, refusal), "sequential")
        self._session.refuse(refusal)

    def _verified_call(self, args: tuple, kwargs: dict) -> Any:
        """Compare with the sequential run at the first call of each plan."""
        self.capture(*args, **kwargs)
        if call_key(self._original, args, kwargs) in self._failed:
            return self._original(*args, **kwargs)
        plan = self._session.last
        if plan is None or id(plan) in self._verified:
            return call_entry(self._entry, self._session, args, kwargs)
        reference = Reference.take(self._original, args, kwargs)
        result = call_entry(self._entry, self._session, args, kwargs)
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
        return type(self), (self._original, self._options)

    def __deepcopy__(self, memo: dict) -> Transformed:
        import copy

        return type(self)(copy.deepcopy(self._original, memo), self._options)


def not_captured(model: nn.Module, failed: Exception, what: str = "model") -> Refusal:
    """The refusal of a model (or step) that Dynamo could not capture: the reason, the module and the line."""
    line = line_of(str(failed))
    reason = f"the {what} could not be captured as one graph: {failed}"
    return Refusal(reason, CaptureError, module=module_at(model, line), line=line)


def is_disabled() -> bool:
    """Whether everything runs as it stands: the environment says so, or ``torch.compile`` is off."""
    return os.environ.get("DIAGPASS_DISABLE", "") not in ("", "0") or stances.is_off()


def with_signature(run: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` under the model's signature, for those who inspect it (Hugging Face does)."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    with contextlib.suppress(TypeError, ValueError):
        call.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return call


def call_key(model: nn.Module, args: tuple, kwargs: dict) -> tuple:
    """What a failed capture is remembered by."""
    plain = not kwargs and all(item is None or isinstance(item, torch.Tensor) for item in args)
    leaves = args if plain else tree_leaves((args, kwargs))
    described = tuple(
        (tuple(leaf.shape), leaf.dtype, str(leaf.device))
        if isinstance(leaf, torch.Tensor)
        else (type(leaf), repr(leaf) if isinstance(leaf, (int, float, str, bool)) else id(leaf))
        for leaf in leaves
    )
    hooks = tuple(number for hooks in _HOOKS for number in hooks)
    return described, tuple(sorted(kwargs)), model.training, torch.is_grad_enabled(), hooks
