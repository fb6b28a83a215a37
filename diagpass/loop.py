"""The canonical loop around a module that handles one segment, in plain PyTorch.

Most segment-recurrent models are called this way by hand: cut the input, call the module on one segment
after the other, join what it returns. :class:`SegmentLoop` is that loop. It is a model like any other,
usable and testable without the rest of the library, and the sequential reference of the rolled program
that ``diagpass.transform`` makes of it.

Words: the *step* is the module for one segment; its *state* is what it leaves for the next segment, in
its own attributes and buffers or, with ``carries_state``, returned. A *pytree* is nested tuples, lists,
dicts and whatever else is registered with ``torch.utils._pytree`` (Hugging Face's ``ModelOutput`` is).

In and out: :func:`cut` makes a list of segments of the inputs, :func:`join` one output of the outputs of
the segments, :func:`steps` is the loop between the two: a generator of outputs that returns the final
state. :class:`SegmentStream` is what users hold of such a generator.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

from diagpass.errors import DiagpassError, OptionError

__all__ = ["SegmentLoop", "SegmentStream"]


class SegmentLoop(nn.Module):
    """Call a module on one segment after the other.

    Parameters
    ----------
    step
        Handles one segment: ``step(x) -> y``, keeping its state in attributes or buffers, or with
        ``carries_state`` ``step(x, state) -> (y, state)``.
    segment_size
        Length of a segment along ``dim``. The last segment may be shorter.
    dim
        The dimension that inputs are cut and outputs joined along.
    carries_state
        The step takes and returns its state, any pytree; None at the first segment unless given.
    reset
        What empties the state of the step at the start of each call and each stream: a callable that
        takes the step, or the name of one of the step's methods. With None the state goes on from call
        to call.

    Raises
    ------
    OptionError
        An argument of the wrong type or range, or ``reset`` together with ``carries_state``: there the
        caller decides, by passing a state or not.

    Notes
    -----
    Keys of the ``state_dict`` are those of the step under ``step.``.

    Examples
    --------
    >>> class Sum(nn.Module):
    ...     def forward(self, x, total):
    ...         total = x.sum(1, keepdim=True) + (0 if total is None else total)
    ...         return total, total
    >>> loop = SegmentLoop(Sum(), 2, carries_state=True)
    >>> y, total = loop(torch.ones(1, 5))
    >>> y, total
    (tensor([[2., 4., 5.]]), tensor([[5.]]))
    >>> [y.item() for y in loop.stream([torch.ones(1, 2), torch.ones(1, 3)], total)]
    [7.0, 10.0]
    """

    def __init__(
        self,
        step: nn.Module,
        segment_size: int,
        *,
        dim: int = 1,
        carries_state: bool = False,
        reset: Callable[[Any], Any] | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(step, nn.Module):
            raise OptionError(f"the step is a torch.nn.Module; got {type(step).__name__}")
        if type(segment_size) is not int or segment_size < 1:
            raise OptionError(f"segment_size is an int of at least 1; got {segment_size!r}")
        if type(dim) is not int:
            raise OptionError(f"dim is an int; got {dim!r}")
        if reset is not None and carries_state:
            raise OptionError(
                "reset is for a step that keeps its state itself; with carries_state=True "
                "a call without a state starts afresh: leave reset out"
            )
        if isinstance(reset, str) and not callable(getattr(step, reset, None)):
            raise OptionError(f"reset={reset!r} is not a method of {type(step).__name__}")
        if not (reset is None or isinstance(reset, str) or callable(reset)):
            raise OptionError(
                f"reset is None, a callable that takes the step, or the name of its method; got {reset!r}"
            )
        self.step = step
        self.segment_size = segment_size
        self.dim = dim
        self.carries_state = bool(carries_state)
        self.reset = reset
        self._runs = 0

    def forward(self, inputs: Any, /, state: Any = None, **kwargs: Any) -> Any:
        """Run all segments of an input.

        Parameters
        ----------
        inputs
            A tensor ``[B, N, ...]`` (for ``dim=1``), or a pytree of such tensors (None allowed among
            them) that are cut alike.
        state
            With ``carries_state``: what an earlier call returned, to go on from there.
        kwargs
            Passed to each step as they are, not cut.

        Returns
        -------
        Any
            The outputs of the segments, joined along ``dim``; with ``carries_state``
            ``(outputs, state)``.

        Raises
        ------
        DiagpassError
            Inputs that cannot be cut (:func:`cut`), outputs that cannot be joined (:func:`join`), or a
            state for a step that does not take one.
        """
        self.check_state(state)
        segments = cut(inputs, self.segment_size, self.dim)
        _start(self)
        return go_on(self, segments, state, kwargs)

    def stream(
        self, segments: Iterable[Any], state: Any = None, *, progress: bool = False, **kwargs: Any
    ) -> SegmentStream:
        """Run segments as they come, and hand out each one's output.

        Parameters
        ----------
        segments
            Any iterable, a generator that reads a file for instance. Each item, a tensor or a pytree, is
            given to the step as it is; a segment is asked for when its output is.
        state
            As in :meth:`forward`.
        progress
            Show on the standard error how many segments are done.
        kwargs
            Passed to each step.

        Returns
        -------
        SegmentStream
            An iterator over the outputs, with the ``final_state``.

        Raises
        ------
        DiagpassError
            ``segments`` is a single tensor or dict, or a state for a step that does not take one. While
            iterating: another call of the loop came between, and the step keeps its state itself.

        Notes
        -----
        The step is reset when the first output is asked for. Closing a stream midway leaves the state
        that the last segment left.
        """
        self.check_state(state)
        check_segments(segments)
        return SegmentStream(
            steps(self, segments, state, kwargs), progress=progress, total=length_of(segments)
        )

    def reset_step(self) -> None:
        """Empty the state of the step, in the way that ``reset`` says; with None nothing happens."""
        if isinstance(self.reset, str):
            getattr(self.step, self.reset)()
        elif self.reset is not None:
            self.reset(self.step)

    def check_state(self, state: Any) -> None:
        """Refuse a state that the step would not take.

        Raises
        ------
        DiagpassError
            A state without ``carries_state``.
        """
        if state is not None and not self.carries_state:
            raise DiagpassError(
                f"the step {type(self.step).__name__} keeps its state itself and takes none; "
                "make the loop with carries_state=True to pass one"
            )

    def extra_repr(self) -> str:
        """The loop's settings."""
        settings = f"segment_size={self.segment_size}, dim={self.dim}"
        if self.carries_state:
            settings += ", carries_state=True"
        if self.reset is not None:
            name = self.reset if isinstance(self.reset, str) else getattr(self.reset, "__name__", "...")
            settings += f", reset={name}"
        return settings


class SegmentStream(Iterator[Any]):
    """The outputs of segments, one by one; what ``stream`` returns.

    It knows nothing of how the outputs are made. That is the generator's part: it yields one output per
    segment, in order, *returns* the final state, and cleans up when it is closed. A loop and a wavefront
    differ in the generator only.

    Parameters
    ----------
    outputs
        The generator. It starts to run when the first output is asked for.
    progress
        Show on the standard error how many outputs there were: a bar if that is a terminal and rich is
        installed, else a line about every second.
    total
        The number of segments if it is known.

    Notes
    -----
    As a context manager it closes itself at the end of the block.
    """

    def __init__(
        self, outputs: Generator[Any, None, Any], *, progress: bool = False, total: int | None = None
    ) -> None:
        self._outputs = outputs
        self._progress = _Progress(total) if progress else None
        self._done = 0
        self._final_state: Any = None
        self._ended: str | None = None

    def __iter__(self) -> SegmentStream:
        return self

    def __next__(self) -> Any:
        try:
            output = next(self._outputs)
        except StopIteration as end:
            if self._ended is None:
                self._end("exhausted")
                self._final_state = end.value
            raise StopIteration from None
        except BaseException as error:
            self._end(f"ended by {type(error).__name__}")
            raise
        self._done += 1
        if self._progress is not None:
            self._progress.show(self._done)
        return output

    @property
    def final_state(self) -> Any:
        """The state after the last segment; None where the step keeps its state itself.

        Raises
        ------
        DiagpassError
            The stream is not exhausted: more outputs are to come, it was closed, or it failed.
        """
        if self._ended == "exhausted":
            return self._final_state
        how = f"was {self._ended}" if self._ended else "has not ended yet"
        raise DiagpassError(
            f"final_state is there when the stream is exhausted; it {how} after {self._done} segments"
        )

    def close(self) -> None:
        """End the stream here; nothing happens if it has ended already."""
        try:
            self._outputs.close()
        finally:
            if self._ended is None:
                self._end("closed")

    def __enter__(self) -> SegmentStream:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _end(self, how: str) -> None:
        self._ended = self._ended or how
        if self._progress is not None:
            self._progress.close(self._done)
            self._progress = None


def steps(
    loop: SegmentLoop, segments: Iterable[Any], state: Any, kwargs: Mapping[str, Any]
) -> Generator[Any, None, Any]:
    """The loop itself: yield the output of each segment, return the final state.

    Parameters
    ----------
    loop
        Whose step is called; it is reset first.
    segments, state, kwargs
        As in :meth:`SegmentLoop.stream`.

    Yields
    ------
    Any
        What the step returned, as :func:`own` keeps it.

    Raises
    ------
    DiagpassError
        Another call of the loop came between and the step keeps one state; the step did not return
        ``(y, state)`` although it should; the step wrote to an output that it had returned before.
    """
    run = _start(loop)
    last: list[Any] = []
    for at, segment in enumerate(segments):
        if loop._runs != run and not loop.carries_state:
            raise DiagpassError(
                f"another call of the loop came before segment {at} of this stream, and its step "
                f"{type(loop.step).__name__} keeps one state; finish one stream before the next call"
            )
        output, state = one_step(loop, segment, state, kwargs, last)
        last = [output]
        yield output
    return state


def _start(loop: SegmentLoop) -> int:
    """Reset the step; the number of this run of the loop."""
    loop.reset_step()
    if not torch.compiler.is_compiling():  # a number that changes would be a recompile per call
        loop._runs += 1
    return loop._runs


def go_on(loop: SegmentLoop, segments: Iterable[Any], state: Any, kwargs: dict) -> Any:
    """The call of a loop segment by segment, from the state that is there; its joined outputs."""
    outputs: list[Any] = []
    for segment in segments:
        output, state = one_step(loop, segment, state, kwargs, outputs[-1:])
        outputs.append(output)
    joined = join(outputs, loop.dim)
    return (joined, state) if loop.carries_state else joined


def one_step(
    loop: SegmentLoop, segment: Any, state: Any, kwargs: Mapping[str, Any], last: Sequence[Any] = ()
) -> tuple[Any, Any]:
    """Call the step once.

    Parameters
    ----------
    loop
        Whose step is called.
    segment, state, kwargs
        What it is given; the state only with ``carries_state``.
    last
        The output of the segment before, if there was one: it must not be written to.

    Returns
    -------
    tuple
        The output, as :func:`own` keeps it, and the new state (None without ``carries_state``).

    Raises
    ------
    DiagpassError
        The step did not return ``(y, state)`` although it should, or it wrote to ``last``.
    """
    before = _versions(last)
    if loop.carries_state:
        output, state = split_result(loop.step(segment, state, **kwargs), loop.step)
    else:
        output = loop.step(segment, **kwargs)
    if _versions(last) != before:
        _refuse_write(last[0], before)
    return own(output), state


def split_result(result: Any, step: nn.Module) -> tuple[Any, Any]:
    """What a step with ``carries_state`` returned, as output and state.

    Raises
    ------
    DiagpassError
        It is not a tuple of two.
    """
    if not (isinstance(result, tuple) and len(result) == 2):
        got = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise DiagpassError(
            f"with carries_state=True the step returns (output, state); {type(step).__name__} returned {got}"
        )
    return result[0], result[1]


def own(output: Any) -> Any:
    """The output of one segment, safe from later steps.

    A step may return a buffer that it writes to in place, and would then overwrite at the next segment
    what it returned for this one. So a tensor that was ever written in place is copied. So is every
    tensor where PyTorch does not say: under ``torch.inference_mode``, and while Dynamo traces.
    """
    return tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and _written(leaf) else leaf, output
    )


def _written(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or tensor.is_inference() or tensor._version > 0


def _versions(tree: Any) -> list[int | None]:
    """How often each tensor was written in place, None where PyTorch does not say."""
    if torch.compiler.is_compiling():
        return []
    return [
        leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None
        for leaf in tree_leaves(tree)
    ]


def _refuse_write(output: Any, before: list[int | None]) -> None:
    """The step wrote to what it had returned before (:func:`own` cannot foresee a first write)."""
    found = zip(leaves_of(output), before, _versions(output), strict=True)
    path = next(path for (path, _), old, new in found if old != new)
    raise DiagpassError(
        f"the step wrote in place to output{path}, which it had returned for the segment before; "
        "outputs are kept until the end: let it return a clone"
    )


def cut(inputs: Any, segment_size: int, dim: int) -> list[Any]:
    """Cut tensors into segments.

    Parameters
    ----------
    inputs
        A tensor or a pytree of tensors, all of one length along ``dim``; None is handed to every segment.
    segment_size
        Length of all segments but the last, which may be shorter.
    dim
        The dimension to cut.

    Returns
    -------
    list
        For each segment the pytree of its tensors, which are views of the inputs.

    Raises
    ------
    DiagpassError
        There is no tensor, something is neither tensor nor None, a tensor has no dimension ``dim``, the
        lengths differ, or they are zero. The message names the input.
    """
    leaves, spec = tree_flatten(inputs)
    lengths = []
    for at, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            _check_dim(leaf, dim, "input", inputs, at)
            lengths.append(leaf.shape[dim])
        elif leaf is not None:
            raise DiagpassError(
                f"{_name('input', inputs, at)} is a {type(leaf).__name__}, and inputs are tensors to be "
                "cut: pass other things by keyword"
            )
    if not lengths:
        raise DiagpassError("there is no tensor among the inputs, so nothing to cut into segments")
    total = lengths[0]
    if any(length != total for length in lengths):
        told = ", ".join(
            f"input{path} has {leaf.shape[dim]}" for path, leaf in leaves_of(inputs) if leaf is not None
        )
        raise DiagpassError(f"inputs are cut alike and must have one length along dim {dim}: {told}")
    if total == 0:
        raise DiagpassError(f"the input has length 0 along dim {dim}: there is no segment to run")
    spans = [(start, min(segment_size, total - start)) for start in range(0, total, segment_size)]
    if isinstance(inputs, Tensor):
        return [inputs.narrow(dim, *span) for span in spans]
    parts = [[leaf if leaf is None else leaf.narrow(dim, *span) for leaf in leaves] for span in spans]
    return [tree_unflatten(part, spec) for part in parts]


def join(outputs: Sequence[Any], dim: int) -> Any:
    """Join the outputs of the segments into one.

    Parameters
    ----------
    outputs
        One pytree per segment, all of the same structure.
    dim
        The dimension along which tensors are concatenated.

    Returns
    -------
    Any
        The same structure; tensors are new ones, other leaves are what all segments returned.

    Raises
    ------
    DiagpassError
        There are none, the structures differ, a tensor has no dimension ``dim`` or does not fit to the
        others, or a leaf that is no tensor differs between segments. The message names the output.
    """
    if not outputs:
        raise DiagpassError("there is no segment, so no output to join")
    _, spec = tree_flatten(outputs[0])
    rows = []
    for at, output in enumerate(outputs):
        leaves, found = tree_flatten(output)
        if found != spec:
            raise DiagpassError(
                f"the outputs of segments 0 and {at} differ in structure: {spec} and {found}; "
                "a loop can join only what all segments return"
            )
        rows.append(leaves)
    joined = [
        _join_leaf(list(leaves), dim, outputs[0], at) for at, leaves in enumerate(zip(*rows, strict=True))
    ]
    return tree_unflatten(joined, spec)


def _join_leaf(leaves: list[Any], dim: int, tree: Any, place: int) -> Any:
    """Join one leaf over the segments; ``place`` is its number in ``tree``, for messages."""
    first = leaves[0]
    if isinstance(first, Tensor) and all(isinstance(leaf, Tensor) for leaf in leaves):
        for leaf in leaves:
            _check_dim(leaf, dim, "output", tree, place)
        _check_shapes(leaves, dim, tree, place)
        return torch.cat(leaves, dim)
    for at, leaf in enumerate(leaves):
        if not _same(first, leaf):
            raise DiagpassError(
                f"{_name('output', tree, place)} is {_say(first)} for segment 0 and {_say(leaf)} for segment "
                f"{at}; only tensors can be joined, anything else must be the same for all segments"
            )
    return first


def _check_shapes(leaves: Sequence[Tensor], dim: int, tree: Any, place: int) -> None:
    shapes = [tuple(leaf.shape) for leaf in leaves]
    at = dim % leaves[0].ndim
    if any(shape[:at] + shape[at + 1 :] != shapes[0][:at] + shapes[0][at + 1 :] for shape in shapes):
        told = ", ".join(dict.fromkeys(map(str, shapes)))
        raise DiagpassError(
            f"{_name('output', tree, place)} cannot be joined along dim {dim}: its segments have the "
            f"shapes {told}"
        )


def _same(left: Any, right: Any) -> bool:
    """Equality that holds for NaN, too, and that odd ``__eq__`` methods cannot break."""
    if left is right:
        return True
    if type(left) is not type(right) or isinstance(left, Tensor):
        return False
    try:
        return bool(left == right) or bool(left != left and right != right)
    except Exception:
        return False


def _say(leaf: Any) -> str:
    return f"a tensor {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


def _check_dim(tensor: Tensor, dim: int, what: str, tree: Any, place: int) -> None:
    if not -tensor.ndim <= dim < tensor.ndim:
        raise DiagpassError(
            f"{_name(what, tree, place)} has the shape {tuple(tensor.shape)} and no dimension {dim} along "
            "which segments lie"
        )


def _name(what: str, tree: Any, place: int) -> str:
    return what + leaves_of(tree)[place][0]


def leaves_of(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a pytree, each with its path as text (``""`` for a tree that is one leaf)."""
    try:
        return [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]
    except ValueError:  # a node that was registered without names for its parts
        leaves, _ = tree_flatten(tree)
        return [(f"<leaf {at}>", leaf) for at, leaf in enumerate(leaves)]


def check_segments(segments: Any) -> None:
    """Refuse what is easily mistaken for an iterable of segments.

    Raises
    ------
    DiagpassError
        A tensor (it would be taken apart along its batch), a dict, a string, or no iterable at all.
    """
    if isinstance(segments, (Tensor, Mapping, str)) or not isinstance(segments, Iterable):
        raise DiagpassError(
            f"stream takes an iterable of segments; got one {type(segments).__name__}: "
            "cut it first, or call the loop with it"
        )


def length_of(segments: Iterable[Any]) -> int | None:
    """How many segments there are, if the iterable says so."""
    return len(segments) if isinstance(segments, Sized) else None


class _Progress:
    """How many segments are done, on the standard error."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._bar: Any = None
        self._task: Any = None
        self._start: float | None = None
        self._said = 0.0

    def show(self, done: int) -> None:
        """Say that ``done`` segments are done; a line appears at most once a second."""
        now = time.monotonic()
        if self._start is None:
            self._start = self._said = now
            self._open_bar()
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif now - self._said >= 1.0:
            self._said = now
            self._line(done, now)

    def close(self, done: int) -> None:
        """Leave the last state of the bar, or a last line."""
        if self._bar is not None:
            self._bar.stop()
        elif self._start is not None:
            self._line(done, time.monotonic())

    def _open_bar(self) -> None:
        if not sys.stderr.isatty():
            return
        with contextlib.suppress(ImportError):
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("segments"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
            )
            self._bar = progress.Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("segments", total=self._total)
            self._bar.start()

    def _line(self, done: int, now: float) -> None:
        of = "" if self._total is None else f" of {self._total:,}"
        elapsed = now - (now if self._start is None else self._start)
        sys.stderr.write(f"{done:,}{of} segments, {elapsed:.1f} s\n")
        sys.stderr.flush()
