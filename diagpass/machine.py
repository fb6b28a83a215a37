"""What a machine sustains: the figures that estimates and fractions of a rate are made with.

machine = measure_machine()          # some two seconds
report.estimate(machine)
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

__all__ = ["Machine", "matmul_rate", "measure_machine", "wait"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Figures of a machine.

    Attributes
    ----------
    name
        What it is.
    matmul
        FLOPs a second that large matrix products sustain, by data type (``"bfloat16"``).
    bytes_per_second
        What memory sustains, reads and writes together.
    start_seconds
        The shortest time from one kernel to the next that needs its result; on CUDA in a CUDA graph.
    units
        Processors that a product is divided among (a GPU's streaming multiprocessors); 0 where the shape of
        a product does not matter.
    cell_seconds, call_seconds
        What a cell, and a call, take the host in a rolled program; 0 leaves the host out.
    """

    name: str
    matmul: Mapping[str, float]
    bytes_per_second: float
    start_seconds: float = 0.0
    units: int = 0
    cell_seconds: float = 0.0
    call_seconds: float = 0.0


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


def matmul_rate(device: torch.device, dtype: torch.dtype, duration: float = 0.3) -> float:
    """FLOPs a second of large square matrix products, sustained over ``duration`` seconds."""
    size = 8192 if device.type == "cuda" else 1024
    with torch.no_grad():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.mm(a, b)
        return 2 * size**3 / _seconds_of(lambda: torch.mm(a, b, out=out), device, duration)


def _memory_rate(device: torch.device) -> float:
    """Bytes a second of an elementwise operation on far more than a cache holds."""
    count = 2**28 if device.type == "cuda" else 2**24
    a = torch.zeros(count, device=device)
    out = torch.empty_like(a)
    return 2 * a.nbytes / _seconds_of(lambda: torch.add(a, 1.0, out=out), device, 0.1)


def _start_seconds(device: torch.device) -> float:
    """The time of a kernel with next to nothing to do, among others like it."""
    a = torch.zeros(1, device=device)
    repeats = 100

    def work() -> None:
        for _ in range(repeats):
            a.add_(1.0)

    if device.type != "cuda":
        return _seconds_of(work, device, 0.05) / repeats
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return _seconds_of(graph.replay, device, 0.05) / repeats


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
    from diagpass.loop import SegmentLoop
    from diagpass.transform import transform

    layers, few, many = 8, 8, 64
    model = nn.Sequential(*(_Layer() for _ in range(layers))).eval()
    options = {"compiler": "eager", "schedule": "wavefront"}
    fast = transform(SegmentLoop(model, segment_size=1, dim=0), options=options)
    inputs = {segments: torch.zeros(segments, 4) for segments in (few, many)}
    fast(inputs[many])
    cpu = torch.device("cpu")
    short, long = (_seconds_of(lambda x=x: fast(x), cpu, 0.1) for x in inputs.values())
    cell = max(long - short, 0.0) / (layers * (many - few))
    return max(short - layers * few * cell, 0.0), cell


def _seconds_of(work: Callable[[], object], device: torch.device, duration: float) -> float:
    """Seconds of one, from as many as fit into ``duration``, at least one; the first is not counted."""
    work()
    wait(device)
    count, begin = 0, time.perf_counter()
    while True:
        batch = max(count, 1)
        for _ in range(batch):
            work()
        wait(device)
        count += batch
        if time.perf_counter() - begin >= duration / 2:
            return (time.perf_counter() - begin) / count


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
