"""``transform`` and ``explain``: the faces that most users see.

``transform(model)`` returns a module with the model's signature, parameters and attributes whose calls
run as wavefronts. ``explain(model, ...)`` says what would be done and why, and runs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diagpass.backend import OnlyAnalysed, Session
from diagpass.capture import stances
from diagpass.errors import DiagpassError, OptionError
from diagpass.ir import Schedule
from diagpass.loop import SegmentLoop
from diagpass.options import Options
from diagpass.pipeline import Analysis
from diagpass.rebuild import model_script
from diagpass.report import Report, make_report
from diagpass.rolled.face import TransformedLoop, explain_loop
from diagpass.rolled.whole import TransformedModel, explain_model
from diagpass.state import Snapshot
from diagpass.transformed import CaptureFailed, Transformed, call_entry, make_entry, not_captured

__all__ = ["Transformed", "explain", "transform"]


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
        ``loop``, ``form``, ``max_width``.

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
    kind = TransformedLoop if isinstance(model, SegmentLoop) else TransformedModel
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
    if stances.is_off():
        raise DiagpassError(
            "torch.compile is switched off or has to take another backend: nothing is planned"
        )
    if isinstance(model, Transformed):
        model = model.original
    report = _explained(model, args, kwargs)
    if report.repro is None:
        report = dataclasses.replace(report, repro=functools.partial(model_script, model, args, kwargs))
    return report


def _explained(model: nn.Module, args: tuple, kwargs: dict) -> Report:
    if isinstance(model, SegmentLoop):
        return explain_loop(model, args, kwargs)
    rolled = explain_model(model, args, kwargs)
    if rolled is not None:
        return rolled
    session = Session(Options(), analyse_only=True)
    entry = make_entry(model, session)
    before = Snapshot(model, args, kwargs)
    with torch.no_grad():
        try:
            try:
                call_entry(entry, session, args, kwargs)
            except CaptureFailed:  # the library may set itself up at a first call
                model(*args, **kwargs)
                before.restore(keep_setup=True)
                call_entry(entry, session, args, kwargs)
        except OnlyAnalysed as found:
            return make_report(found.analysis)
        except CaptureFailed as failed:
            refusal = not_captured(model, failed)
            return make_report(Analysis(None, Schedule(()), None, refusal))
        finally:
            before.restore()
    raise DiagpassError("the model's forward ran without a single tensor operation: nothing to do")


def _as_call(inputs: Sequence[Any] | Mapping[str, Any]) -> tuple[tuple, dict]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise OptionError(
        f"example_inputs is a tuple of positional or a dict of keyword inputs; got {type(inputs).__name__}"
    )
