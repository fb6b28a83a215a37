"""``diagpass bench``: the user's own model against its baselines, in medians.

Every run starts from the same state, results are compared before anything is timed, and the runs take turns,
so that a machine that slows down meanwhile is fair to all.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diagpass.calibration import measure_machine
from diagpass.measured import device_and_dtype
from diagpass.report import Report
from diagpass.state import Snapshot
from diagpass.transform import transform
from diagpass.verify import TOLERANCE, Reference, differences

__all__ = ["Timed", "bench"]

Say = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Timed:
    """One way to run the model: seconds a call, and the largest relative error against sequential eager.

    ``failed`` says why there are no figures.
    """

    name: str
    median: float = 0.0
    fastest: float = 0.0
    slowest: float = 0.0
    error: float = 0.0
    failed: str | None = None


def bench(
    model: nn.Module,
    inputs: tuple[Any, ...],
    repeats: int,
    compiler: str,
    say: Say = lambda name, done, total: None,
) -> list[Timed]:
    """Time the model as it stands, under ``torch.compile`` and as a wavefront.

    Parameters
    ----------
    model, inputs
        What a factory returned.
    repeats
        Timed calls of each.
    compiler
        ``"inductor"`` or ``"eager"``, for the compiled baseline and the wavefront.
    say
        Called with what is being done, and steps done and in all.
    """
    backend = "inductor" if compiler == "inductor" else "aot_eager"
    with torch.no_grad():
        reference = Reference.take(model, inputs, {})
        ways: dict[str, Callable[[nn.Module], Callable[..., Any]]] = {
            "sequential, eager": lambda own: own,
            f"sequential, torch.compile ({backend})": lambda own: torch.compile(own, backend=backend),
            f"wavefront ({compiler})": lambda own: transform(
                own, options={"schedule": "wavefront", "compiler": compiler}
            ),
        }
        total = len(ways) * (1 + repeats)
        runs: dict[str, tuple[nn.Module, Callable[..., Any]]] = {}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        errors: dict[str, float] = {}
        failed: dict[str, str] = {}
        done = 0
        for name, make in ways.items():
            say(f"first call: {name}", done, total)
            own = copy.deepcopy(model)
            try:
                errors[name] = _first(own, run := make(own), inputs, reference)
                runs[name] = own, run
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
            done += 1
        for _ in range(repeats):
            for name, (own, run) in runs.items():
                say(f"timing: {name}", done, total)
                seconds[name].append(_once(own, run, inputs))
                done += 1
        say("done", total, total)
    return [
        Timed(name, failed=failed[name])
        if name in failed
        else Timed(
            name, statistics.median(seconds[name]), min(seconds[name]), max(seconds[name]), errors[name]
        )
        for name in ways
    ]


def estimated(model: nn.Module, inputs: tuple[Any, ...], report: Report) -> dict[str, float]:
    """Seconds that the cost model gives for this machine, by names for a report."""
    device, _ = device_and_dtype(model, inputs)
    work = [*report.kinds, report.glue]
    dtypes = {each["dtype"]: None for part in work for each in part["products"]}
    machine = measure_machine(device, [getattr(torch, dtype) for dtype in dtypes])
    found = report.estimate(machine)
    return {f"{name}, estimated": found[name] for name in ("sequential", "wavefront")}


def _first(own: nn.Module, run: Callable[..., Any], inputs: tuple, reference: Reference) -> float:
    before = Snapshot(own, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(*inputs)
    found = differences(reference, own, result)
    before.restore(keep_setup=True)
    for name, error, dtype in found:
        if not error <= TOLERANCE.get(dtype, 0.0):
            raise AssertionError(f"{name} differs from the sequential run by {error:.1e}")
    return max((error for _, error, _ in found), default=0.0)


def _once(own: nn.Module, run: Callable[..., Any], inputs: tuple) -> float:
    before = Snapshot(own, inputs)
    _synchronize()
    begin = time.perf_counter()
    run(*inputs)
    _synchronize()
    took = time.perf_counter() - begin
    before.restore()
    return took


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
