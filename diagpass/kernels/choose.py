"""Which of several ways to compute the same is the fastest here: measured once, kept for the process.

A *candidate* is a way by name, and what runs it: a pure function of operands that it does not write. The
first candidate is the one taken unless another is clearly faster. A choice, once made, stands: what is
chosen decides the last bits of a result, and the same call must give the same bits.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

log = logging.getLogger(__name__)

CLEARLY = 0.95  # of the first candidate's time; timings on a busy machine differ by a few per cent
LEAST, MOST = 3, 20  # rounds
LONGEST = 10  # budgets after which the least number of rounds is given up: a machine that stalls

__all__ = ["Choice", "choose", "layout", "seconds"]

Candidates = Mapping[str, Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen, and the best time of every candidate in seconds."""

    name: str
    seconds: Mapping[str, float]


_made: dict[Hashable, Choice] = {}
_lock = threading.Lock()


def choose(
    key: Hashable,
    candidates: Candidates,
    device: torch.device,
    what: str,
    budget: float,
    clearly: float = CLEARLY,
) -> Choice:
    """The fastest candidate; timed if this key is met for the first time in this process.

    Parameters
    ----------
    key
        Everything that the times depend on: what is computed, shapes, strides, data types, device. The
        number of threads is added here.
    candidates
        At least one, the preferred one first. Each runs once to warm up (compilation is not timed), then they
        take turns.
    device
        Where they run.
    what
        What is computed, for the log.
    budget
        Seconds after which no further round begins once there were three; ten times as long stops at once.
    clearly
        Another than the first is taken if it needs less than this part of the first one's time.

    Returns
    -------
    Choice
        The same for the same key until the process ends.
    """
    key = (key, tuple(candidates), torch.get_num_threads())
    found = _made.get(key)
    if found is None:  # no lock while candidates run: they may wait for one that is held by who waits for us
        measured = _measure(candidates, device, what, budget, clearly)
        with _lock:  # of two threads that measured at the same time the first decides
            found = _made.setdefault(key, measured)
    return found


def layout(value: Any) -> Hashable:
    """What a kernel's time depends on in an operand."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    return type(value)


def seconds(name: str, run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of one run of the candidate ``name``, the device idle before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _measure(
    candidates: Candidates, device: torch.device, what: str, budget: float, clearly: float
) -> Choice:
    first = next(iter(candidates))
    if len(candidates) == 1:
        return Choice(first, {})
    begin = time.perf_counter()
    best = dict.fromkeys(candidates, float("inf"))
    with _disable_current_modes(), torch.no_grad():
        for run in candidates.values():
            run()
        warm = time.perf_counter()
        for number in range(MOST):
            for name, run in candidates.items():
                best[name] = min(best[name], seconds(name, run, device))
            spent = time.perf_counter() - warm
            if spent > budget and (number + 1 >= LEAST or spent > LONGEST * budget):
                break
    fastest = min(best, key=best.__getitem__)
    name = fastest if best[fastest] < clearly * best[first] else first
    log.debug(
        "%s: %s; %s is taken (compiling took %.2f s, timing %.2f s)",
        what,
        ", ".join(f"{each} {1e3 * best[each]:.3f} ms" for each in best),
        name,
        warm - begin,
        time.perf_counter() - warm,
    )
    return Choice(name, best)
