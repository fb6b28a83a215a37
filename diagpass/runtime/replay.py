"""Work that is launched as one: a CUDA graph per sequence of kernels and addresses.

A piece of work is known by a key that names everything its kernels read and write. The first time it runs as
it stands (which loads and tunes kernels), the second time it is captured, from then on it is replayed. All
graphs share one memory pool for what lives only inside them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from diagpass.stages import say

log = logging.getLogger(__name__)

MOST = 512  # graphs that are kept; keys that were seen once count, too

__all__ = ["CudaRecorder", "Recorder", "Replays"]


class Recorder(Protocol):
    """Turns work into something that repeats it."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the work and also do it once; returns what does it again, at the same addresses."""
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


class CudaRecorder:
    """Records into CUDA graphs that share a memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        with torch.cuda.stream(self._stream), torch.inference_mode(False):
            for dtype in (torch.float32, torch.bfloat16):  # the libraries' workspaces outlive any graph
                one = torch.ones(16, 16, device=device, dtype=dtype)
                torch.mm(one, one)
        torch.cuda.current_stream(device).wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the work and replay it once."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph.replay()
        return graph.replay
