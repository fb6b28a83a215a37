"""``fast.measure(...)``: a call timed wave by wave, against the model as it stands.

Only what is asked for is measured. A call of its own tells when waves and groups begin and end
(:mod:`diagpass.runtime.clock`); the totals come from calls without that, in turns with the model as it
stands, so that a machine that slows down meanwhile is fair to both.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from diagpass.describe.measured import measured_facts
from diagpass.errors import DiagpassError
from diagpass.machine import matmul_rate, wait
from diagpass.report import Report
from diagpass.runtime.clock import measuring
from diagpass.stages import say
from diagpass.state import Snapshot

__all__ = ["device_and_dtype", "measure"]

BUDGET = 2.0  # seconds of timed rounds, of which there are LEAST (unless they are long) to MOST
LEAST, MOST = 3, 9
WARM = 6  # calls at most until nothing new is captured


def measure(fast: Any, args: tuple, kwargs: dict) -> Report:
    """Time a call of a :class:`~diagpass.transformed.Transformed`; see its ``measure``."""
    model = fast.original
    device, dtype = device_and_dtype(model, (args, kwargs))

    def timed(call: Callable[..., Any]) -> float:
        before = Snapshot(model, args, kwargs)
        try:
            wait(device)
            begin = time.perf_counter()
            call(*args, **kwargs)
            wait(device)
            return time.perf_counter() - begin
        finally:
            before.restore(keep_setup=True)

    with torch.no_grad():
        known = None
        for number in range(WARM):  # the third replays what the second has recorded
            say("warm up")
            timed(fast)
            if number >= 2 and known == _counts(fast):
                break
            known = _counts(fast)
        rounds: dict[str, list[float]] = {"sequential": [], "wavefront": []}
        begin = time.perf_counter()
        for number in range(MOST):
            say("time", number, MOST)
            rounds["sequential"].append(timed(model))
            rounds["wavefront"].append(timed(fast))
            took = time.perf_counter() - begin
            if took > (BUDGET if number >= LEAST - 1 else 10 * BUDGET):
                break
        report = _report(fast)
        times = {name: statistics.median(found) for name, found in rounds.items()}
        if report.ran != "wavefront":
            return report.timed(sequential=times["sequential"])
        before = Snapshot(model, args, kwargs)
        try:
            wait(device)
            with measuring(device) as clock:
                fast(*args, **kwargs)
            clock.seconds()
        finally:
            before.restore(keep_setup=True)
    report = _report(fast)
    rate = None if dtype is None else matmul_rate(device, dtype)
    facts = measured_facts(clock, report.kinds, times["wavefront"], rate, dtype)
    return dataclasses.replace(report.timed(**times), measured=facts)


def device_and_dtype(model: torch.nn.Module, inputs: Any) -> tuple[torch.device, torch.dtype | None]:
    """Where a model runs (a CUDA device if any) and the data type of most of its floating-point weights."""
    leaves = [*model.parameters(), *model.buffers(), *tree_leaves(inputs)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    devices = [tensor.device for tensor in tensors if tensor.is_cuda]
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    dtype = max(sizes, key=lambda each: sizes[each]) if sizes else None
    return (devices[0] if devices else torch.device("cpu")), dtype


def _counts(fast: Any) -> tuple[int, int]:
    report = _report(fast)
    return report.captures, report.plans


def _report(fast: Any) -> Report:
    report = fast.report
    if report is None:
        raise DiagpassError("nothing was captured, so there is nothing to measure: is DIAGPASS_DISABLE set?")
    return report
