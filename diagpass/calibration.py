"""What the machine at hand sustains.

machine = measure_machine()          # some two seconds
report.estimate(machine)
"""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch
from torch import nn

from diagpass.loop import SegmentLoop
from diagpass.machine import Machine, matmul_rate, seconds_of
from diagpass.transform import transform

__all__ = ["measure_machine"]


def measure_machine(
    device: torch.device | str | None = None, dtypes: Sequence[torch.dtype] | None = None, host: bool = True
) -> Machine:
    """Measure the machine at hand, in some two seconds.

    Parameters
    ----------
    device
        CUDA if there is one, else the CPU, unless given.
    dtypes
        Data types whose matrix products are measured; unless given float32, on CUDA also the 16-bit ones.
    host
        Whether to run a small loop to see what its Python costs, which takes half of the time.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = where.type == "cuda"
    if dtypes is None:
        dtypes = (torch.float32, torch.bfloat16, torch.float16) if cuda else (torch.float32,)
    with torch.no_grad():
        rates = {str(dtype).removeprefix("torch."): matmul_rate(where, dtype, 0.2) for dtype in dtypes}
        moved, start = _memory_rate(where), _start_seconds(where)
        call, cell = _host_seconds() if host else (0.0, 0.0)
    name = torch.cuda.get_device_name(where) if cuda else platform.processor() or platform.machine()
    units = torch.cuda.get_device_properties(where).multi_processor_count if cuda else 0
    return Machine(name, rates, moved, start, units, cell, call)


def _memory_rate(device: torch.device) -> float:
    """Bytes a second of an elementwise operation on far more than a cache holds."""
    count = 2**28 if device.type == "cuda" else 2**24
    a = torch.zeros(count, device=device)
    out = torch.empty_like(a)
    return 2 * a.nbytes / seconds_of(lambda: torch.add(a, 1.0, out=out), device, 0.1)


def _start_seconds(device: torch.device) -> float:
    """The time of a kernel with next to nothing to do, among others like it."""
    a = torch.zeros(1, device=device)
    repeats = 100

    def work() -> None:
        for _ in range(repeats):
            a.add_(1.0)

    if device.type != "cuda":
        return seconds_of(work, device, 0.05) / repeats
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return seconds_of(graph.replay, device, 0.05) / repeats


class _Layer(nn.Module):
    """As small as a layer with state gets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.state = torch.zeros(1, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state = torch.tanh(self.linear(x) + self.state)
        return self.state


def _host_seconds() -> tuple[float, float]:
    """What a call, and each cell, take the host: two lengths of a loop that computes next to nothing."""
    layers, few, many = 8, 8, 64
    model = nn.Sequential(*(_Layer() for _ in range(layers))).eval()
    options = {"compiler": "eager", "schedule": "wavefront"}
    fast = transform(SegmentLoop(model, segment_size=1, dim=0), options=options)
    inputs = {segments: torch.zeros(segments, 4) for segments in (few, many)}
    fast(inputs[many])
    cpu = torch.device("cpu")
    short, long = (seconds_of(lambda x=x: fast(x), cpu, 0.1) for x in inputs.values())
    cell = max(long - short, 0.0) / (layers * (many - few))
    return max(short - layers * few * cell, 0.0), cell
