"""Work that is launched as one: a CUDA graph per sequence of kernels and addresses.

A piece of work is known by a key that names everything its kernels read and write. The first time it runs as
it stands (which loads and tunes kernels), the second time it is captured, from then on it is replayed. All
graphs share one memory pool for what lives only inside them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch

from diagpass.stages import say

log = logging.getLogger(__name__)

MOST = 512  # graphs that are kept; keys that were seen once count, too

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


class CudaRecorder:
    """Records into CUDA graphs that share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream, self._lane = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._pool: Any = None
        for stream in (self._stream, self._lane):
            with torch.cuda.stream(stream), torch.inference_mode(False):
                for dtype in (torch.float32, torch.bfloat16):  # the libraries' workspaces outlive any graph
                    one = torch.ones(16, 16, device=device, dtype=dtype)
                    torch.mm(one, one)
            torch.cuda.current_stream(device).wait_stream(stream)

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
        return graph.replay, found


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
