"""A wavefront graph as one launch: on CUDA the whole program becomes one CUDA graph.

Launching group after group from Python takes longer than a GPU needs for a short input. The program is a
function: of its arguments, of the weight stacks, and of nothing else, and what it writes nobody has seen
before. So its launches can be recorded and repeated. A call is known by its *key*: all that decides what is
launched, and where. Weights are read where they lie, so that their addresses are part of the key. All other
tensors are *staged*: copied to memory that belongs to the recording. What a replay leaves is copied out, so
that no result is ever overwritten.

The first calls of a key run as they stand (which compiles, tunes and loads kernels); the one after them is
recorded, and from then on it is replayed. What cannot be recorded soundly runs as it stands.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import _get_current_dispatch_mode

from diagpass.capture.functional import is_random
from diagpass.runtime.layouts import like, overlaps
from diagpass.runtime.replay import CudaRecorder, Recorder, StreamOrder
from diagpass.stages import say

log = logging.getLogger(__name__)

PLAIN_CALLS = 2  # of a key, before it is recorded
MOST_KEYS = 8  # that are known at a time, recorded or not
MOST_BYTES = 2**28  # that are copied in and out

__all__ = ["Graphed", "graphed", "recorder_for"]

_UNSAFE = [
    getattr(torch.Tag, name)
    for name in ("data_dependent_output", "dynamic_output_shape", "cudagraph_unsafe")
    if hasattr(torch.Tag, name)
]


class _Unfit(Exception):
    """A call cannot be recorded soundly; the text says why."""


def recorder_for(device: torch.device) -> Callable[[], Recorder] | None:
    """What makes a recorder for programs on a device; None where there is nothing to gain."""
    return functools.partial(CudaRecorder, device) if device.type == "cuda" else None


def graphed(
    module: fx.GraphModule, source: fx.GraphModule, fixed: Sequence[bool]
) -> fx.GraphModule | Graphed:
    """A wavefront graph as a program that is recorded and replayed; the graph itself where it cannot be.

    Parameters
    ----------
    module
        The emitted graph.
    source
        The functional graph that it was made from.
    fixed
        Per input of ``module``, whether it is a tensor that mostly is the same at every call: a weight, or a
        stack of weights.
    """
    device = _only_device(module, source)
    make = None if device is None else recorder_for(device)
    if device is None or make is None:
        return module
    return Graphed(module, fixed, device, make)


class Graphed:
    """Runs a wavefront graph, by replay where it can; takes and returns what the graph does.

    It may be called from several threads and on several streams.

    Parameters
    ----------
    module, fixed
        As for :func:`graphed`.
    device
        Where all of it lies.
    make
        Makes the recorder, at the first recording.

    Attributes
    ----------
    plain, recorded, replayed
        How often a call ran as it stands, was recorded, was replayed.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        fixed: Sequence[bool],
        device: torch.device,
        make: Callable[[], Recorder],
    ) -> None:
        self._module, self._device, self._make = module, device, make
        self._fixed = tuple(fixed)
        placeholders = module.graph.find_nodes(op="placeholder")
        (output,) = module.graph.find_nodes(op="output")
        self._read = [any(user is not output for user in node.users) for node in placeholders]
        numbers = {node: at for at, node in enumerate(placeholders)}
        leaves = output.args[0] if isinstance(output.args[0], (list, tuple)) else ()
        self._passed = {
            at: numbers[leaf]
            for at, leaf in enumerate(leaves)
            if isinstance(leaf, fx.Node) and leaf in numbers
        }
        self._known: OrderedDict[Hashable, _Recording | int | None] = OrderedDict()
        self._recorder: Recorder | None = None
        self._order = StreamOrder(device)
        self._lock = threading.Lock()
        self._broken = False
        self.plain = self.recorded = self.replayed = 0

    def __call__(self, *args: Any) -> Any:
        """Run the program."""
        key = None if self._broken else self._key(args)
        if key is not None and not self._is_watched():
            with self._lock:
                recording = self._recording(key, args)
                if recording is not None:
                    self.replayed += 1
                    recording.follow(self._order.follow())
                    return recording.play(args)
        result = self._module(*args)
        if key is not None:
            with self._lock:  # counted when it is over: two threads may compile at a time
                self._count(key)
        return result

    def _recording(self, key: Hashable, args: Sequence[Any]) -> _Recording | None:
        """The recording of this key, made if it is time to; None if there is none."""
        known = self._known.get(key, 0)
        if known == PLAIN_CALLS:
            known = self._record(key, args)
        if not isinstance(known, _Recording):
            return None
        self._known.move_to_end(key)
        return known

    def _is_watched(self) -> bool:
        """Whether somebody looks at each operation: a dispatch mode, or the user captures a graph himself."""
        if _get_current_dispatch_mode() is not None:
            return True
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _key(self, args: Sequence[Any]) -> Hashable | None:
        """All that decides what is launched, and where; None for a call that is not to be recorded."""
        if torch._C._are_functorch_transforms_active():  # tensors of vmap and grad look like any other
            return None
        gradients = torch.is_grad_enabled()
        found: list[Hashable] = [_settings(self._device.type), gradients, torch.is_inference_mode_enabled()]
        for value, is_read, is_fixed in zip(args, self._read, self._fixed, strict=True):
            if not isinstance(value, torch.Tensor):
                number = _number(value)
                if number is None:
                    return None
                found.append(number)
            elif type(value) not in (torch.Tensor, torch.nn.Parameter) or (gradients and value.requires_grad):
                return None
            elif is_read:
                found.append((value.shape, value.stride(), value.dtype, value.device))
                if is_fixed:
                    found.append((value.data_ptr(), value.is_conj(), value.is_neg()))
        return tuple(found)

    def _count(self, key: Hashable) -> None:
        """A call of this key ran as it stands."""
        self.plain += 1
        known = self._known.get(key, 0)
        self._known[key] = min(known + 1, PLAIN_CALLS) if isinstance(known, int) else known
        self._known.move_to_end(key)
        if len(self._known) > MOST_KEYS:
            self._known.popitem(last=False)

    def _record(self, key: Hashable, args: Sequence[Any]) -> _Recording | None:
        """Record a call; None, now and later, if it cannot be."""
        say("record the waves as one CUDA graph", self.recorded)
        try:
            if self._recorder is None:
                self._recorder = self._make()
            stream = self._order.follow()
            staged = [at for at, is_fixed in enumerate(self._fixed) if self._read[at] and not is_fixed]
            recording = _Recording(self._module, args, staged, self._passed, self._recorder, stream)
        except _Unfit as why:
            log.info("a call is not recorded as a CUDA graph: %s", why)
            self._known[key] = None
            return None
        except RuntimeError as error:
            log.warning("CUDA graphs are off, since a program could not be captured: %s", error)
            self._broken, self._recorder = True, None
            self._known.clear()
            return None
        self.recorded += 1
        self._known[key] = recording
        return recording


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a result looks."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: torch.Tensor) -> _Layout:
        return cls(value.shape, value.stride(), int(value.storage_offset()), value.dtype, value.device)

    def empty(self) -> torch.Tensor:
        """Memory of its own that looks like it."""
        if self.offset == 0:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        span = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) + 1
        memory = torch.empty(self.offset + max(span, 0), dtype=self.dtype, device=self.device)
        return memory.as_strided(self.shape, self.stride, self.offset)


class _Recording:
    """One call of a program, recorded.

    Parameters
    ----------
    module
        What the program runs.
    args
        What it is called with.
    staged
        The numbers of the arguments that are copied in, if they are tensors.
    passed
        By the number of a result that is an argument itself, the number of that one.
    recorder
        What records.
    stream
        The stream that staged memory is made on; None if there are no streams.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        args: Sequence[Any],
        staged: Iterable[int],
        passed: dict[int, int],
        recorder: Recorder,
        stream: Any,
    ) -> None:
        given = {at: args[at] for at in staged if isinstance(args[at], torch.Tensor)}
        _check_given(given.values())
        with torch.inference_mode(False), torch.no_grad():
            self._stage = {at: like(value) for at, value in given.items()}
        self._stream = stream
        self._results: list[tuple[str, Any]] = []
        self._layouts: list[_Layout] = []
        self._container: type = tuple
        operands = [self._stage.get(at, value) for at, value in enumerate(args)]
        held = [value for value in operands if isinstance(value, torch.Tensor)]

        def work() -> list[torch.Tensor]:
            found = module(*operands)
            leaving = self._leaving(found, passed)
            _check_leaving(leaving, held, self._stage.values())
            self._layouts = [_Layout.of(value) for value in leaving]
            self._container = type(found)
            return leaving

        with torch.no_grad():
            self._copy_in(args)
            self._again, self._left = recorder.press(work)

    def _leaving(self, found: Any, passed: dict[int, int]) -> list[torch.Tensor]:
        """The tensors that are copied out, each once; notes where each result comes from."""
        if type(found) not in (list, tuple):
            raise _Unfit("its results are no flat sequence")
        self._results, numbers = [], {}
        leaving: list[torch.Tensor] = []
        for at, value in enumerate(found):
            if at in passed:
                self._results.append(("argument", passed[at]))
            elif isinstance(value, torch.Tensor):
                if id(value) not in numbers:
                    numbers[id(value)] = len(leaving)
                    leaving.append(value)
                self._results.append(("copy", numbers[id(value)]))
            else:
                self._results.append(("value", value))
        return leaving

    def follow(self, stream: Any) -> None:
        """Say on which stream the next call is: what is staged stays until it has been read there."""
        if stream != self._stream:
            for value in self._stage.values():
                value.record_stream(stream)

    def play(self, args: Sequence[Any]) -> Any:
        """Do what was recorded, for other arguments of the same key."""
        with torch.no_grad():
            self._copy_in(args)
            self._again()
            copies = [layout.empty() for layout in self._layouts]
            if copies:
                torch._foreach_copy_(copies, self._left)
        sources = {"argument": args, "copy": copies}
        return self._container(
            value if kind == "value" else sources[kind][value] for kind, value in self._results
        )

    def _copy_in(self, args: Sequence[Any]) -> None:
        if self._stage:
            torch._foreach_copy_(list(self._stage.values()), [args[at] for at in self._stage])


def _check_given(given: Iterable[torch.Tensor]) -> None:
    values = list(given)
    if any(value.layout is not torch.strided or overlaps(value) for value in values):
        raise _Unfit("it is given a tensor that is sparse, is empty, or overlaps itself")
    if sum(value.nbytes for value in values) > MOST_BYTES:
        raise _Unfit("it is given much")


def _check_leaving(
    leaving: Sequence[torch.Tensor], held: Iterable[torch.Tensor], stage: Iterable[torch.Tensor]
) -> None:
    """Refuse results of which a copy would not look the same, or would no longer share what it shared."""
    for value in leaving:
        if type(value) is not torch.Tensor or value.layout is not torch.strided:
            raise _Unfit(f"a result is a {type(value).__name__} of layout {value.layout}")
        if value.is_conj() or value.is_neg() or (value.numel() > 0 and overlaps(value)):
            raise _Unfit("a result is not in memory as it looks")
    taken = [_span(value) for value in held]
    for value in leaving:
        first, last = _span(value)
        if any(first < end and begin < last for begin, end in taken):
            raise _Unfit("a result shares memory with an argument or another result")
        taken.append((first, last))
    if sum(value.nbytes for value in (*leaving, *stage)) > MOST_BYTES:
        raise _Unfit("it is given, or returns, much")


def _span(value: torch.Tensor) -> tuple[int, int]:
    """Where the memory behind a tensor begins and ends."""
    storage = value.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _number(value: Any) -> Hashable | None:
    """A key for an argument that is no tensor; None if there is none."""
    if type(value) is float:
        return float, value.hex()
    return (type(value), value) if type(value) in (int, bool, str, type(None)) else None


def _settings(device_type: str) -> Hashable:
    """What else a kernel may be chosen by."""
    return (
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


def _only_device(module: fx.GraphModule, source: fx.GraphModule) -> torch.device | None:
    """The device that all values of both graphs lie on; None if there are more, or if one cannot be repeated.

    A value that lies elsewhere would be copied from memory that nobody keeps. An operation that looks at
    values, or that has an effect of its own, does more than launch.
    """
    if not all(_is_repeatable(node) for node in source.graph.nodes):
        return None
    graphs = [source, *(each for each in module.modules() if isinstance(each, fx.GraphModule))]
    devices = {value.device for graph in graphs for value in _values(graph)}
    devices |= {value.device for value in module.buffers()}
    return devices.pop() if len(devices) == 1 else None


def _values(graph: fx.GraphModule) -> Iterator[torch.Tensor]:
    """The tensors in a graph, as far as its nodes tell; what is read of a tuple has a node of its own."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(graph)
        if isinstance(value, torch.Tensor):
            yield value


def _is_repeatable(node: fx.Node) -> bool:
    """Whether an operation launches, always the same, and does nothing else."""
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    if not isinstance(node.target, OpOverload):
        return getattr(node.target, "__module__", None) in ("_operator", "math")
    if node.meta.get("val") is None or node.target._schema.is_mutable:
        return False
    return not is_random(node) and not any(tag in node.target.tags for tag in _UNSAFE)
