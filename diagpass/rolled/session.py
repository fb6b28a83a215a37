"""What is known of one step: its captured programs, their kinds, and who is recording at present."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar

import torch
import torch.fx as fx

from diagpass.backend import FoundCounters
from diagpass.capture import dynamo
from diagpass.capture.foresight import foresee
from diagpass.capture.marks import attribute_path
from diagpass.errors import CaptureError
from diagpass.logs import artifact
from diagpass.options import Options
from diagpass.pipeline import Refusal
from diagpass.rolled.capture import capture
from diagpass.rolled.kinds import Kinds
from diagpass.rolled.program import Refused, StepProgram, make_program
from diagpass.rolled.run import Run
from diagpass.rolled.scores import Scores
from diagpass.runtime.compiled import get_ready
from diagpass.stages import say
from diagpass.state import Snapshot

log = logging.getLogger(__name__)


class OutsideWrite(Refused):
    """The step changes Python objects that are no part of it; ``objects`` are they."""

    def __init__(self, found: Sequence[tuple[str, Any]]) -> None:
        super().__init__(
            Refusal(
                f"the step cannot be captured soundly: {found[0][0]} is changed by the step and is no part "
                "of it, so it could not be put back after a failure; keep it in an attribute of the step",
                CaptureError,
            )
        )
        self.objects = [item for _, item in found]


@dataclasses.dataclass
class StepSession:
    """What is known of one step: its programs, and who is recording at present.

    It has what :func:`diagpass.transformed.call_entry` asks of a session: ``symbols``, the counters that stay
    symbolic, and ``modes``, dispatch modes of the caller. ``changing`` are buffers that the step replaces,
    ``carried`` is the state that it is given and may change: a cache, say. ``foreseen`` are the symbols that
    no capture has shown to be counters yet. ``source`` is what Dynamo calls the step.
    """

    step: torch.nn.Module
    options: Options
    symbols: set[str] = dataclasses.field(default_factory=set)
    modes: list[Any] = dataclasses.field(default_factory=list)
    captures: int = 0
    changing: set[str] = dataclasses.field(default_factory=set)
    programs: list[StepProgram] = dataclasses.field(default_factory=list)
    kinds: Kinds = dataclasses.field(init=False)
    run: Run | None = None
    carried: tuple[Any, ...] = ()
    foreseen: set[str] = dataclasses.field(default_factory=set)
    scores: Scores = dataclasses.field(default_factory=Scores)
    source: str = "L['model']"
    answers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.kinds = Kinds(self.options)
        self.foreseen = foresee(self.step, self.source) - self.symbols
        self.symbols |= self.foreseen

    def begin(self, device_types: Collection[str]) -> None:
        """Prepare what the capture that is about to begin leads to."""
        if self.options.compiler == "inductor" and self.run is not None and not self.run.dry:
            get_ready(device_types)

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Dynamo's call: one behaviour of the step in, what records a segment of it out."""
        self.captures += 1
        say(f"capture: behaviour {self.captures} of the step")
        obstacle = self._obstacle(gm)
        if obstacle is not None:
            raise Refused(Refusal(f"the step cannot be captured soundly: {obstacle}", CaptureError))
        self._check_outside()
        self._check_counters()
        try:
            step = capture(gm, inputs, self.changing | self._written())
        except CaptureError as error:
            raise Refused(Refusal(f"the step cannot be deferred: {error}", CaptureError)) from None
        artifact("diagpass_step", lambda: step.graph.print_readable(print_output=False))
        program = make_program(step, self.options)
        self.programs.append(program)
        log.info(
            "captured behaviour %d of the step: %d cells, %d units",
            len(self.programs),
            len(program.cells),
            len(program.units),
        )

        def record(*args: Any) -> Any:
            if self.run is None:
                raise AssertionError("a segment was recorded outside of a call")
            return self.run.step(program, args)

        return record

    def _check_counters(self) -> None:
        """Start anew where counters are not symbols, or what is no counter is one."""
        changed = dynamo.counters()
        self.foreseen -= changed
        wrong, fresh = self.foreseen & dynamo.symbols(), changed - self.symbols
        self.symbols -= wrong
        self.foreseen -= wrong
        if wrong and not fresh:  # a capture that nobody needed
            self.captures -= 1
        if wrong or fresh:
            raise FoundCounters(fresh)

    def drop_guesses(self) -> bool:
        """Take back what was foreseen and has not come; whether there is such."""
        guesses, self.foreseen = self.foreseen, set()
        self.symbols -= guesses
        return bool(guesses)

    def _written(self) -> set[str]:
        """Names of what the behaviours known so far write in place: state, where another only reads it."""
        return {program.step.names[at] for program in self.programs for at in program.step.written}

    def _obstacle(self, gm: fx.GraphModule) -> str | None:
        """What Dynamo captures wrongly, or what could not be put back if the call failed."""
        bounded = dynamo.bounded_deque()
        if bounded is not None:
            return (
                f"{bounded} is a deque with maxlen, which Dynamo captures wrongly when it is full; "
                "use a list, or a deque without maxlen and popleft"
            )
        owner = dynamo.accumulated_gradient(gm)
        if owner is not None:
            return (
                f"backward() inside leaves gradients, perhaps on {attribute_path(owner)}; compute them with "
                "torch.autograd.grad, which leaves nothing behind"
            )
        lost = dynamo.lost_write()
        if lost is not None:
            return lost
        number = dynamo.made_numbers()
        if number is not None:
            return f"{number}, which is read before its value is there; keep it in a tensor"
        iterator = dynamo.iterator()
        if iterator is not None:
            return f"{iterator} is an iterator, and capturing one would advance it; use a counter"
        return None

    def _check_outside(self) -> None:
        """Refuse a step that changes what is no part of it."""
        found = dynamo.outside_writes(Snapshot(self.step, *self.carried, values=False).holds)
        if found:
            raise OutsideWrite(found)
