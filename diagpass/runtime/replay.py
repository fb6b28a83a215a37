"""Work that is launched as one: a CUDA graph per sequence of kernels and addresses.

A piece of work is known by a key that names everything its kernels read and write. The first time it runs as
it stands (which loads and tunes kernels), the second time it is captured, from then on it is replayed. All
graphs share one memory pool for what lives only inside them.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Protocol

import torch

from diagpass.stages import say

log = logging.getLogger(__name__)

MOST = 512  # graphs that are kept; keys that were seen once count, too
STREAMS = 32  # that PyTorch has for a device

__all__ = ["CudaRecorder", "Recorder", "Replays", "StreamOrder"]


class Recorder(Protocol):
    """Turns work into something that repeats it."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work and also do it once; returns what does it again, at the same addresses."""
        ...

    def press(
        self, work: Callable[[], Sequence[torch.Tensor]]
    ) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """Record work that makes tensors of its own.

        Returns
        -------
        tuple
            What does it (it has not been done yet), and its tensors. They hold what it left until something
            else of this recorder runs, and keep no memory from that.
        """
        ...

    def beside(self, works: Sequence[Callable[[], None]]) -> None:
        """Do works that do not depend on each other; in a recording they may overlap."""
        ...


class Replays:
    """Pieces of work by their keys.

    Attributes
    ----------
    launched, recorded, replayed
        How often work ran as it stands, was recorded, was replayed.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._known: OrderedDict[Hashable, Callable[[], None] | None] = OrderedDict()
        self._broken = False
        self.launched = self.recorded = self.replayed = 0

    def run(self, key: Hashable, work: Callable[[], None]) -> Callable[[], None] | None:
        """Do the work, by replay if the key was met before; what does it again, or None if nothing does."""
        again = self._known.get(key)
        if again is not None:
            self._known.move_to_end(key)
            self.replayed += 1
            again()
            return again
        if self._broken or key not in self._known:
            self._known[key] = None
            if len(self._known) > MOST:
                self._known.popitem(last=False)
            self.launched += 1
            work()
            return None
        say("record waves as CUDA graphs", self.recorded)
        try:
            again = self._known[key] = self._recorder.record(work)
            self.recorded += 1
            return again
        except RuntimeError as error:
            self._broken = True
            log.warning("CUDA graphs are off, since a wave could not be captured: %s", error)
            self.launched += 1
            work()
            return None


class StreamOrder:
    """Work on the same memory from several streams, done in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Any = None

    def follow(self) -> Any:
        """On another stream than last time, wait for that one; the current stream, None if there are none."""
        if self._device.type != "cuda":
            return None
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
        self._last = stream
        return stream


class _Streams:
    """Two streams to capture on, with cuBLAS's workspaces for them in memory that stays.

    A graph has the address of its stream's workspace in its kernels. PyTorch keeps one for each stream, and
    frees it while graphs are alive that use it: when Inductor records graphs of its own, and since 2.12 when
    any graph is freed that was captured on the stream (https://github.com/pytorch/pytorch/issues/193402). In
    a pool that nobody else allocates from, its memory is left alone even then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.inference_mode(False), torch.cuda.device(device):
            self._pool = torch.cuda.MemPool()
            self._ones = [
                torch.ones(16, 16, device=device, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
            ]
            self._results = [torch.empty_like(one) for one in self._ones]
        self.main, self.lane = self._stream(), self._stream()

    def _stream(self) -> Any:
        """A stream whose workspace is in the pool, if there is one left."""
        stream: Any = None
        for _ in range(STREAMS):  # PyTorch hands out the same ones again
            stream, before = torch.cuda.Stream(self._device), self._bytes()
            self._hold(stream)
            if self._bytes() > before:
                break
        return stream

    def hold(self) -> None:
        """Have the workspaces in the pool, those of the calling thread, before something is captured."""
        for stream in (self.main, self.lane):
            self._hold(stream)

    def _hold(self, stream: Any) -> None:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with (
            torch.cuda.stream(stream),
            torch.cuda.use_mem_pool(self._pool, self._device),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            for one, result in zip(self._ones, self._results, strict=True):
                torch.mm(one, one, out=result)
                torch.addmm(one[0], one, one, out=result)
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def _bytes(self) -> int:
        return sum(segment["total_size"] for segment in self._pool.snapshot())


class _Lease:
    """The use of streams, by a recorder and by its graphs; another recorder gets them afterwards."""

    _free: ClassVar[dict[torch.device, list[_Streams]]] = {}

    def __init__(self, device: torch.device) -> None:
        free = self._free.setdefault(device, [])
        self.streams = free.pop() if free else _Streams(device)
        weakref.finalize(self, free.append, self.streams).atexit = False


class CudaRecorder:
    """Records into CUDA graphs that share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lease = _Lease(device)
        self._stream, self._lane = self._lease.streams.main, self._lease.streams.lane
        self._pool: Any = None

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the work and replay it once."""
        again, _ = self._capture(work)
        again()
        return again

    def press(
        self, work: Callable[[], Sequence[torch.Tensor]]
    ) -> tuple[Callable[[], None], list[torch.Tensor]]:
        """Capture the work; see :meth:`Recorder.press`."""
        again, found = self._capture(work)
        return again, [_alias(tensor) for tensor in found]

    def beside(self, works: Sequence[Callable[[], None]]) -> None:
        """Do works, the first beside all others; see :meth:`Recorder.beside`."""
        stream = torch.cuda.current_stream(self._device)
        if len(works) < 2 or stream != self._stream:
            for work in works:
                work()
            return
        self._lane.wait_stream(stream)
        with torch.cuda.stream(self._lane):
            for work in works[1:]:
                work()
        works[0]()
        stream.wait_stream(self._lane)

    def _capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        self._lease.streams.hold()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                found = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return _Replay(graph, self._lease), found


class _Replay:
    """Replays a graph; its workspace is its own as long as it may."""

    def __init__(self, graph: torch.cuda.CUDAGraph, lease: _Lease) -> None:
        self._graph, self._lease = graph, lease

    def __call__(self) -> None:
        self._graph.replay()


class _Memory:
    """Device memory by its address, for whoever reads ``__cuda_array_interface__``."""

    def __init__(self, tensor: torch.Tensor, size: int) -> None:
        place = tensor.data_ptr(), False
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": place, "version": 3}


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, held by nobody."""
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    raw = torch.as_tensor(_Memory(tensor, span * tensor.element_size()), device=tensor.device)
    return raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
