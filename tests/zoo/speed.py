"""Print how much faster a case's wavefront is than its loop: ``python -m tests.zoo.speed NAME``.

Both run SEGMENTS segments in float32 on one core, nothing compiled; sizes come from the environment.
"""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor

from diagpass import SegmentLoop
from tests.helpers import fast_copy
from tests.zoo import CASES
from tests.zoo.check import call

LAYERS, WIDTH, SEGMENTS = 12, 64, 32


def in_process(name: str) -> str:
    """The figure for a case at full size, measured in a process of its own; "-" if that fails."""
    sizes = {"DIAGPASS_ZOO_LAYERS": str(LAYERS), "DIAGPASS_ZOO_WIDTH": str(WIDTH)}
    command = [sys.executable, "-m", "tests.zoo.speed", name]
    done = subprocess.run(command, env={**os.environ, **sizes}, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else "-"


def measure(name: str) -> float:
    """The sequential time over the wavefront's, medians of a few runs."""
    case = CASES[name]
    model, inputs = case.make(torch.float32)
    if isinstance(model, SegmentLoop):
        inputs = tuple(_longer(x, case.segments) for x in inputs)
    times = []
    for runner in (copy.deepcopy(model), fast_copy(model)):
        call(runner, inputs)
        taken = []
        for _ in range(5):
            begin = time.perf_counter()
            call(runner, inputs)
            taken.append(time.perf_counter() - begin)
        times.append(statistics.median(taken))
    return times[0] / times[1]


def _longer(x: Any, segments: int) -> Any:
    """Inputs of SEGMENTS segments."""
    if not isinstance(x, Tensor):
        return x
    size = x.shape[1] // segments
    return torch.cat([x] * (SEGMENTS // segments + 1), dim=1)[:, : SEGMENTS * size]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{measure(sys.argv[1]):.1f}")
