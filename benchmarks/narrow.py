"""What a model without width gains: an RMT, in which every cell waits for the one before.

All sides run the same model through its own loop: eager, the step under ``torch.compile`` (Inductor alone,
and with its CUDA graphs), and diagpass, which runs the cells one after the other, compiled and recorded.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

import diagpass
from benchmarks.measure import medians, milliseconds, relative_error, synchronize
from benchmarks.presets import Preset, make_ids, make_llama
from examples.rmt import RecurrentWrapper, wrap

MEMORY_TOKENS = 16


def measure_narrow(
    preset: Preset, segment: int, segments: Sequence[int], device: str, budget: float
) -> list[dict[str, Any]]:
    """A row for each number of segments.

    Parameters
    ----------
    preset
        The Llama; its head is left out.
    segment
        Tokens of a segment, memory tokens not counted.
    segments
        How many of them.
    device
        ``"cuda"`` or ``"cpu"``.
    budget
        Seconds of timing for a number of segments.

    Returns
    -------
    list of dict
        Milliseconds by side (medians), ``cold`` (seconds of diagpass's first call) and ``error`` (of diagpass
        against the eager run, relative).
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    llama = make_llama(preset, segment + 2 * MEMORY_TOKENS, device, dtype, head=False)
    model = wrap(llama, segment, MEMORY_TOKENS).eval().requires_grad_(False)
    compiled, graphed = _compiled(model), _compiled(model, "reduce-overhead")
    rows = []
    for count in segments:
        ids = make_ids(preset, count * segment, device)
        fast: Any = diagpass.transform(copy.deepcopy(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", diagpass.DiagpassWarning)
            begin = time.perf_counter()
            got = fast(ids).logits
            synchronize(device)
            cold = time.perf_counter() - begin
        sides: dict[str, Callable[[], Any]] = {
            "diagpass": lambda ids=ids, fast=fast: fast(ids),
            "eager": lambda ids=ids: model(ids),
            "compiled": lambda ids=ids: compiled(ids),
        }
        if device == "cuda":
            sides["graphed"] = lambda ids=ids: graphed(ids)
        for call in sides.values():
            for _ in range(4):
                call()
        times = medians(milliseconds(sides, device, budget))
        error = relative_error(got, model(ids).logits)
        rows.append({"segments": count, "ran": fast.report.ran, **times, "cold": cold, "error": error})
    return rows


def _compiled(model: RecurrentWrapper, mode: str | None = None) -> Callable[[torch.Tensor], Any]:
    """The model with its step under ``torch.compile``."""
    own = copy.deepcopy(model)
    step: Any = torch.compile(own.memory_cell.forward, mode=mode)

    def forward(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        if kwargs.get("memory_state") is not None:  # Inductor's graph writes over its last results
            kwargs["memory_state"] = kwargs["memory_state"].clone()
        out, memory = step(*args, **kwargs)
        return {"logits": out["logits"].clone()}, memory

    own.memory_cell.forward = forward  # type: ignore[method-assign]
    return own
