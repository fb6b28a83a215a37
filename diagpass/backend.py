"""The ``diagonal`` backend of ``torch.compile``, and the builder of plans behind both faces.

    torch.compile(model, backend="diagonal", options={"compiler": "eager"})

Dynamo finds it by entry point: nothing need be imported. A *plan* is what one captured graph became:
its analysis and the program that runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch._guards import CompileContext

from diagpass import pipeline
from diagpass.capture import dynamo, functional
from diagpass.capture.marks import attribute_path
from diagpass.errors import CaptureError, DiagpassWarning
from diagpass.ir import Schedule
from diagpass.options import Options
from diagpass.pipeline import Analysis, Refusal, RunSequentially
from diagpass.report import Report, make_report
from diagpass.repro import script
from diagpass.runtime.compiled import get_ready
from diagpass.runtime.forms import Forms

log = logging.getLogger(__name__)

MAX_SHAPES = 16  # programs kept per captured graph with symbolic sizes


class FoundCounters(Exception):
    """Aborts a capture that read Python counters as constants; it is to be started anew."""

    def __init__(self, sources: set[str]) -> None:
        super().__init__(", ".join(sorted(sources)))
        self.sources = sources


_OVERWRITTEN = (
    "gradients are recorded, and state that is written in place overwrites what they need; "
    "call it under torch.no_grad() if none are wanted"
)


class OnlyAnalysed(Exception):
    """Carries the analysis out of a capture from which nothing is to be run."""

    def __init__(self, analysis: Analysis) -> None:
        super().__init__("analysed")
        self.analysis = analysis


class OnlyCaptured(Exception):
    """Raised in place of running a plan that was captured ahead of its first call."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one captured graph became: its program, the report, and what runs its groups."""

    program: Callable[..., Any]
    report: Report
    forms: Forms | None


@dataclasses.dataclass
class Session:
    """What the plans of one transformed model have in common.

    ``symbols`` are sources of Python counters, kept symbolic; ``hold`` stops programs from running (the
    capture ahead of the first call).
    """

    options: Options
    captures: int = 0
    plans: int = 0
    last: Report | None = None
    last_forms: Forms | None = None
    symbols: set[str] = dataclasses.field(default_factory=set)
    hold: bool = False
    analyse_only: bool = False
    restart_for_counters: bool = False
    modes: list[Any] = dataclasses.field(default_factory=list)
    warned: set[str] = dataclasses.field(default_factory=set)
    answers: ClassVar[bool] = False

    def begin(self, device_types: Collection[str]) -> None:
        """Prepare what the capture that is about to begin leads to."""
        options = self.options
        if not self.analyse_only and options.compiler == "inductor" and options.schedule != "sequential":
            get_ready(device_types)

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Dynamo's call: a captured graph in, a program out."""
        self.captures += 1
        bounded = dynamo.bounded_deque()
        if bounded is not None:
            raise CaptureError(
                f"{bounded} is a deque with maxlen, which Dynamo captures wrongly when it is full; "
                "use a list, or a deque without maxlen and popleft"
            )
        owner = dynamo.accumulated_gradient(gm)
        if owner is not None:
            raise CaptureError(
                f"backward() inside the model leaves gradients, perhaps on {attribute_path(owner)}; compute "
                "them with torch.autograd.grad, which leaves nothing behind"
            )
        lost = dynamo.lost_write()
        if lost is not None:
            raise CaptureError(lost)
        if self.restart_for_counters:
            fresh = dynamo.counters() - self.symbols
            if fresh:
                raise FoundCounters(fresh)
        weights = [_is_weight(node, value) for node, value in _inputs(gm, inputs)]
        if any(_is_symbolic(value) for value in inputs):
            return self._run(_PerShape(self, gm, weights))
        return self._run(self.plan(gm, inputs, weights))

    def drop_guesses(self) -> bool:
        """Nothing is guessed; see :class:`diagpass.transformed.Capturing`."""
        return False

    def plan(self, gm: fx.GraphModule, inputs: Sequence[Any], weights: Sequence[bool]) -> Plan:
        """Analyse a captured graph and make its program, sequential where it must be."""
        found: list[Analysis] = []

        def lower(
            graph: fx.GraphModule,
            fake_inputs: Sequence[Any],
            written: Sequence[int],
            inference: bool = False,
        ) -> Callable[..., Any]:
            names, is_weight = _names(gm, graph), _functional_weights(graph, weights, written)
            repro = script(graph, is_weight)
            analysis = pipeline.analyse(graph, self.options)
            analysis = dataclasses.replace(analysis, names=names, repro=repro)
            if self.analyse_only:
                raise OnlyAnalysed(pipeline.predict(graph, analysis, is_weight, self.options))
            wanted = self.options.schedule != "sequential"
            if not wanted or (
                analysis.refusal is not None and not self._runs_narrow(analysis, fake_inputs, inference)
            ):
                raise RunSequentially(analysis)
            program, analysis = pipeline.lower(graph, analysis, is_weight, self.options, inference)
            found.append(analysis)
            return program

        self.plans += 1
        try:
            program = self._functionalize(gm, inputs, lower)
        except RunSequentially as stop:
            if self.analyse_only:
                raise OnlyAnalysed(stop.analysis) from None
            if self.options.schedule != "sequential":
                self.refuse(stop.analysis.refusal)
            return Plan(gm.forward, make_report(stop.analysis, "sequential"), None)
        for note in found[0].notes:
            self.warn(note)
        if found[0].refusal is not None and self.options.schedule != "wavefront":
            self.warn(found[0].refusal.note)
        return Plan(program, make_report(found[0], "wavefront"), found[0].forms)

    def _runs_narrow(self, analysis: Analysis, inputs: Sequence[Any], inference: bool) -> bool:
        """Whether cells run though none runs beside another: it was asked for, or pays all the same."""
        if not analysis.may_be_forced or self.options.schedule == "wavefront":
            return analysis.may_be_forced
        devices = {value.device.type for value in inputs if isinstance(value, torch.Tensor)}
        return inference and not self.options.strict and pipeline.records(self.options, devices)

    def _functionalize(
        self, gm: fx.GraphModule, inputs: Sequence[Any], lower: Callable[..., Callable[..., Any]]
    ) -> Callable[..., Any]:
        """Functionalise; if the gradients of all results together cannot be had, who knows which are wanted?

        Raises
        ------
        RunSequentially
            What backward would need is written in place. The model as it stands has those gradients that do
            not need it, and autograd's error for the others.
        """
        inference = functools.partial(lower, inference=True)
        try:
            return functional.functionalize(gm, inputs, lower, inference)
        except RuntimeError as error:
            if not torch.is_grad_enabled() or "modified by an inplace operation" not in str(error):
                raise
        raise RunSequentially(Analysis(None, Schedule(()), None, Refusal(_OVERWRITTEN)))

    def refuse(self, refusal: Refusal | None) -> None:
        """Warn, or raise in strict mode, that the model runs sequentially."""
        if refusal is None:
            return
        if self.options.strict:
            raise refusal.error(refusal.reason)
        self.warn(f"running sequentially: {refusal.reason}")

    def warn(self, message: str) -> None:
        """Warn once per message."""
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, DiagpassWarning, stacklevel=2)

    def report(self) -> Report | None:
        """The report of the plan that ran last, with today's counts."""
        if self.last is None:
            return None
        forms = self.last_forms.facts(int) if self.last_forms and self.last.ran == "wavefront" else []
        return dataclasses.replace(self.last, captures=self.captures, plans=self.plans, forms=forms)

    def _run(self, made: _PerShape | Plan) -> Callable[..., Any]:
        """A program that says, when it runs, that it is the last one."""

        def run(*args: Any) -> Any:
            plan = made(args) if isinstance(made, _PerShape) else made
            if self.hold:
                self.last, self.last_forms = plan.report, plan.forms
                raise OnlyCaptured
            with contextlib.ExitStack() as stack:
                for dispatch_mode in self.modes:
                    stack.enter_context(dispatch_mode)
                result = plan.program(*args)
            self.last, self.last_forms = plan.report, plan.forms
            return result

        return run


class _PerShape:
    """One captured graph with symbolic sizes: a program per set of sizes, the latest few kept."""

    def __init__(self, session: Session, gm: fx.GraphModule, weights: Sequence[bool]) -> None:
        self._make = functools.partial(session.plan, gm, weights=weights)
        self._made: dict[tuple, Any] = {}

    def __call__(self, args: Sequence[Any]) -> Plan:
        key = tuple((arg.shape, arg.stride()) if isinstance(arg, torch.Tensor) else arg for arg in args)
        if key not in self._made:
            if len(self._made) >= MAX_SHAPES:
                self._made.pop(next(iter(self._made)))
                log.info("dropped the oldest of %d plans", MAX_SHAPES)
            self._made[key] = self._make(inputs=args)
        return self._made[key]


def _inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[tuple[fx.Node, Any]]:
    return list(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))


def _is_weight(node: fx.Node, value: Any) -> bool:
    if isinstance(value, torch.nn.Parameter):
        return True
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    return source is not None and isinstance(value, torch.Tensor) and "_buffers" in dynamo.source_name(source)


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(not isinstance(size, int) for size in value.shape)
    return False


def _names(gm: fx.GraphModule, graph: fx.GraphModule) -> dict[fx.Node, str]:
    """What the user calls the inputs of the functional graph."""
    captured = gm.graph.find_nodes(op="placeholder")
    placeholders = graph.graph.find_nodes(op="placeholder")
    if len(captured) != len(placeholders):
        return {}
    sources = [getattr(node.meta.get("grapharg"), "source", None) for node in captured]
    return {
        node: attribute_path(dynamo.source_name(source))
        for node, source in zip(placeholders, sources, strict=True)
        if source is not None
    }


def _functional_weights(graph: fx.GraphModule, weights: Sequence[bool], written: Sequence[int]) -> list[bool]:
    """Which inputs of the functional graph are weights: those of the captured graph, not mutated."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(weights):  # AOTAutograd regrouped the inputs: claim nothing
        return [False] * len(placeholders)
    return [is_weight and at not in written for at, is_weight in enumerate(weights)]


def diagonal(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend function that ``torch.compile(model, backend="diagonal")`` finds.

    Parameters
    ----------
    gm, example_inputs
        The captured graph and its inputs, from Dynamo.
    mode
        Accepted for the signature; diagpass has no modes.
    options
        As for :func:`diagpass.transform`; ``weights`` is ``"copy"`` unless given.

    Returns
    -------
    Callable
        Runs the graph.

    Raises
    ------
    DiagpassError
        With ``strict``; Dynamo makes it the ``inner_exception`` of its own error.
    """
    session = Session(Options.parse(options, weights="copy"))
    broken = dynamo.graph_break()
    if broken is not None:
        reason = f"the model could not be captured as one graph: {broken[0]} ({broken[1]})"
        if session.options.strict:
            raise CaptureError(reason)
        session.warn(f"running sequentially: {reason}")
        return gm.forward
    if dynamo.is_resumed():
        return gm.forward
    _watch_recompiles(session)
    return session.compile(gm, example_inputs)


def _watch_recompiles(session: Session) -> None:
    """Say so before Dynamo's limit makes it run the model eagerly with a log line of its own only."""
    limit = torch._dynamo.config.recompile_limit
    current = CompileContext.current_compile_id()
    if current is None or current.frame_compile_id is None:
        return
    if dynamo.counters() and not torch._dynamo.config.allow_unspec_int_on_nn_module:
        torch._dynamo.config.allow_unspec_int_on_nn_module = True
        log.info("set torch._dynamo.config.allow_unspec_int_on_nn_module: the model has counters")
    if current.frame_compile_id + 1 >= limit:
        session.warn(
            f"this is capture {current.frame_compile_id + 1} of the same code; at Dynamo's limit of {limit} "
            "(torch._dynamo.config.recompile_limit) it stops compiling and runs the model eagerly. Run "
            'with TORCH_LOGS="recompiles" to see what changes, or use diagpass.transform'
        )
