"""Measure, merge and show: ``python -m benchmarks run``, ``table``, ``breakdown``.

A *shard* is one preset and segment size with all its lengths; it builds its model once, measures every
baseline itself, in turns with the wavefront, and appends a row of JSON for each length to a file. A shard
that was cut off goes on where it stopped. ``table`` merges any number of such files.

    python -m benchmarks run --preset 1B --segment 1024 --tokens 8192,32768,131072 --out results/1B-1024.json
    python -m benchmarks table results/*.json --markdown docs/performance.md
    python -m benchmarks breakdown --preset 1B --segment 1024
    python -m benchmarks run --preset cpu --segment 64 --tokens 4096 --device cpu --out results/cpu.json
    python -m benchmarks estimates results/*.json
    python -m benchmarks narrow --preset 160M --segment 128 --segments 1,4,16
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import diagpass
from benchmarks.baselines import FullAttention, StrongestSequential, compiled_step
from benchmarks.estimates import compare, report_of
from benchmarks.measure import (
    matmul_rate,
    medians,
    milliseconds,
    peak_bytes,
    relative_error,
    seconds,
    synchronize,
)
from benchmarks.narrow import measure_narrow
from benchmarks.presets import PRESETS, Preset, flops, make_cell, make_ids, make_llama
from benchmarks.table import as_markdown, print_rows
from examples.armt import AssociativeRecurrentWrapper

app = typer.Typer(add_completion=False, no_args_is_help=True)


def _logits(result: Any) -> torch.Tensor:
    return result["logits"] if isinstance(result, dict) else result


def _load(path: Path) -> list[dict]:
    return json.loads(path.read_text()) if path.exists() else []


HEADS = {"none", "all", "last"}


def _said(head: str) -> Any:
    """The head in a row."""
    return False if head == "none" else head


def _kept(shape: Preset, head: str) -> dict[str, int]:
    """What the model is told of the positions whose logits are wanted."""
    return {"logits_to_keep": 1 + shape.memory_tokens} if head == "last" else {}


@app.command()
def run(
    preset: Annotated[str, typer.Option(help="One of: " + ", ".join(PRESETS))] = "1B",
    segment: Annotated[int, typer.Option(help="Tokens of a segment, memory tokens not counted")] = 1024,
    tokens: Annotated[str, typer.Option(help="Lengths, with commas between")] = "8192,32768,131072",
    out: Annotated[Path, typer.Option(help="The file of rows to add to")] = Path("results.json"),
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    head: Annotated[
        str,
        typer.Option(help="none, all (logits of all positions), last (a segment's last one), all,last"),
    ] = "none",
    baselines: Annotated[str, typer.Option(help="Which baselines to run")] = "strongest,full,eager",
    budget: Annotated[float, typer.Option(help="Seconds of timing for a length")] = 5.0,
    form: Annotated[str, typer.Option(help="The option form of diagpass.transform")] = "auto",
    note: Annotated[str, typer.Option(help="What to say of the machine")] = "",
    workspace: Annotated[
        bool, typer.Option(help="cuBLAS with its workspace; without, CUBLAS_WORKSPACE_CONFIG=:0:0")
    ] = True,
    guards: Annotated[
        bool,
        typer.Option(help="Ask all of Dynamo's guards; without, the wavefront's calls skip most of them"),
    ] = True,
    own_loop: Annotated[
        bool, typer.Option(help="Transform the model with the loop of its own, in place of a SegmentLoop")
    ] = False,
) -> None:
    """Measure one shard."""
    if not workspace:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":0:0"
    heads = head.split(",")
    if own_loop and "last" in heads:
        raise typer.BadParameter("the model's own loop computes no or all logits", param_hint="--head")
    if not set(heads) <= HEADS or (len(heads) > 1 and "none" in heads):
        raise typer.BadParameter(f"{head!r}: it is none, all, last, or all,last", param_hint="--head")
    wanted = set(baselines.split(","))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = PRESETS[preset]
    rows = _load(out)
    done = {
        (
            *(row[key] for key in ("preset", "segment", "tokens", "head", "device")),
            row.get("workspace", True),
            row.get("guards", True),
            row.get("own_loop", False),
        )
        for row in rows
    }
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    name += f", {note}" if note else ""
    todo = [
        (head, length)
        for head in heads
        for length in map(int, tokens.split(","))
        if (preset, segment, length, _said(head), name, workspace, guards, own_loop) not in done
    ]
    if not todo:
        return
    torch.set_grad_enabled(False)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    cell = make_cell(shape, segment, device, dtype, heads != ["none"])
    model_bytes = sum(p.numel() * p.element_size() for p in cell.parameters())
    loop = diagpass.SegmentLoop(cell, segment, reset="zero_mem")
    model = AssociativeRecurrentWrapper(cell, segment) if own_loop else loop
    transformed = diagpass.transform(model, options={"form": form})
    head, longest = todo[-1]
    cold = seconds(lambda: transformed(make_ids(shape, longest, device), **_kept(shape, head)), device)
    transformed(make_ids(shape, longest, device), **_kept(shape, head))
    static = _static(before, device)
    rate = matmul_rate(device, dtype)
    machine = dataclasses.replace(
        diagpass.measure_machine(device, [dtype]), matmul={str(dtype).removeprefix("torch."): rate}
    )
    strongest: dict[str, StrongestSequential] = {}
    compiled: dict[str, Any] = {}
    seen = {todo[-1][0]}
    for head, length in todo:
        kept = _kept(shape, head)
        if head not in seen:  # the time of a new length is not that of a new head
            seen.add(head)
            transformed(make_ids(shape, longest, device), **kept)
        if "strongest" in wanted and head not in strongest:
            strongest = {head: StrongestSequential(cell, segment, **kept)}
        if "compiled" in wanted and head not in compiled:
            compiled = {head: compiled_step(cell, segment, **kept)}
        sides = Sides(
            functools.partial(transformed, **kept),
            functools.partial(loop, **kept) if "eager" in wanted and length <= 64 * segment else None,
            strongest.get(head),
            compiled.get(head),
            "wanted" if "full" in wanted and (device == "cuda" or length <= 8192) else None,
        )
        row = _measure(sides, shape, make_ids(shape, length, device), head, budget, guards)
        del sides
        row = {
            "case": f"{preset}, segment {segment}, {length} tokens"
            + ("" if workspace else ", no workspace")
            + ("" if guards else ", guards skipped")
            + (", own loop" if own_loop else ""),
            "preset": preset,
            "segment": segment,
            "tokens": length,
            "head": _said(head),
            "device": name,
            "torch": torch.__version__,
            "ran": transformed.report.ran,
            "workspace": workspace,
            "guards": guards,
            "own_loop": own_loop,
            "forms": sorted({f"{fact['width']}: {fact['form']}" for fact in transformed.report.forms}),
            "threads": torch.get_num_threads() if device == "cpu" else 0,
            **row,
            "matmul_flops": rate,
            "machine": dataclasses.asdict(machine),
            "estimate_ms": {name: 1e3 * took for name, took in transformed.report.estimate(machine).items()},
            "limit_ms": 1e3 * flops(shape, segment, length, head) / rate,
            "model_bytes": model_bytes,
            "static_bytes": static,
            "cold_s": cold,
            "measured": time.strftime("%Y-%m-%d"),
        }
        row["fraction_of_rate"] = row["limit_ms"] / row["ms"]
        rows.append(row)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1))
        print_rows([row])


@dataclasses.dataclass
class Sides:
    """What is measured against what; a baseline that is None is left out."""

    fast: Any
    loop: Any
    strongest: StrongestSequential | None
    compiled: Any
    full: Any = None

    def calls(self, ids: torch.Tensor) -> dict[str, Callable[[], Any]]:
        """A call of each side."""
        sides = {"wavefront": self.fast, "strongest": self.strongest, "compiled": self.compiled}
        sides |= {"eager": self.loop, "full": self.full}
        return {name: functools.partial(side, ids) for name, side in sides.items() if side is not None}


def _measure(
    sides: Sides, shape: Preset, ids: torch.Tensor, head: str, budget: float, guards: bool
) -> dict[str, Any]:
    """One length: times of all sides, memory, and the difference to the strongest sequential run."""
    device, length = ids.device.type, ids.shape[1]
    fast = functools.partial(sides.fast, ids)
    new = seconds(fast, device)
    if sides.full == "wanted":
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        sides.full = FullAttention(
            make_llama(shape, length, device, dtype, head != "none"), ids, last=head == "last"
        )
    calls = sides.calls(ids)
    for call in calls.values():
        call()
        call()
    if not guards:
        calls["wavefront"] = functools.partial(_without_guards, calls["wavefront"])
    measured = milliseconds(
        {name: call for name, call in calls.items() if name != "eager"},
        device,
        budget,
        most=15 if device == "cuda" else 60,
    )
    if "eager" in calls:  # apart: in turn with the others it would let the device cool down for one of them
        measured |= milliseconds({"eager": calls["eager"]}, device, budget, most=5)
    times, best = medians(measured), {name: min(found) for name, found in measured.items()}
    own, own_best = times.pop("wavefront"), best.pop("wavefront")
    errors = {}
    if sides.strongest is not None:
        exact = sides.strongest(ids)
        errors = {
            name: relative_error(_logits(calls[name]()), exact)
            for name in ("wavefront", "eager")
            if name in calls
        }
    return {
        "ms": own,
        "tokens_per_s": length / own * 1e3,
        "baselines_ms": times,
        "ratios": {name: value / own for name, value in times.items()},
        "best_ms": own_best,
        "ratios_of_best": {name: value / own_best for name, value in best.items()},
        "rounds": len(measured["wavefront"]),
        "peak_bytes": peak_bytes(fast, device),
        "new_length_s": new - own * 1e-3,
        "difference_to_strongest": errors.get("wavefront"),
        "difference_of_eager": errors.get("eager"),
    }


def _without_guards(call: Callable[[], Any]) -> Any:
    with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
        return call()


def _static(before: int, device: str) -> int:
    if device != "cuda":
        return 0
    synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() - before


@app.command()
def table(
    files: Annotated[list[Path], typer.Argument(help="Files of rows")],
    markdown: Annotated[Path | None, typer.Option(help="Write a page with the table here")] = None,
) -> None:
    """Merge rows and show them."""
    rows = [row for path in files for row in _load(path)]
    print_rows(rows)
    if markdown is not None:
        markdown.write_text(as_markdown(rows))


@app.command()
def estimates(
    files: Annotated[list[Path], typer.Argument(help="Files of rows")],
    start: Annotated[float | None, typer.Option(help="Seconds of a kernel, for the row's figure")] = None,
) -> None:
    """Compare the cost model with rows, as a table in Markdown."""
    reports: dict[tuple[str, int], diagpass.Report] = {}
    typer.echo(
        "| case | sequential, ms | estimated | | wavefront, ms | estimated | |\n|---|---|---|---|---|---|---|"
    )
    for row in (row for path in files for row in _load(path)):
        key = row["preset"], row["segment"]
        reports[key] = reports.get(key) or report_of(*key)
        sides = compare(reports[key], row, start).values()
        cells = (f"{s['measured']:.1f} | {s['estimated']:.1f} | {100 * s['error']:+.0f} %" for s in sides)
        typer.echo(f"| {row['case']} | {' | '.join(cells)} |")


@app.command()
def breakdown(
    preset: Annotated[str, typer.Option(help="One of: " + ", ".join(PRESETS))] = "1B",
    segment: Annotated[int, typer.Option(help="Tokens of a segment")] = 1024,
    segments: Annotated[int, typer.Option(help="Of the shorter call")] = 32,
    more: Annotated[int, typer.Option(help="How many the longer call has more")] = 16,
    top: Annotated[int, typer.Option(help="Kernels to show")] = 30,
) -> None:
    """Say which kernels take the time of a wave of the steady state, and how long the device waits.

    Each segment more makes a call longer by one full wave: what a longer call has more is divided by that.
    """
    torch.set_grad_enabled(False)
    shape = PRESETS[preset]
    cell = make_cell(shape, segment, "cuda", torch.bfloat16)
    fast = diagpass.transform(diagpass.SegmentLoop(cell, segment, reset="zero_mem"))
    both = [make_ids(shape, count * segment, "cuda") for count in (segments, segments + more)]
    for ids in (*both, *both, *both, *both):
        fast(ids)
    calls = {str(at): functools.partial(fast, ids) for at, ids in enumerate(both)}
    short, long = medians(milliseconds(calls, "cuda")).values()
    before, after = (_kernels(call) for call in calls.values())
    times = {name: (after[name][0] - before.get(name, (0, 0))[0]) / more for name in after}
    counts = {name: (after[name][1] - before.get(name, (0, 0))[1]) / more for name in after}
    wave, busy = 1e3 * (long - short) / more, sum(times.values())
    typer.echo(f"a wave of the steady state: {wave:.0f} us, its kernels one after the other {busy:.0f} us")
    for name in sorted(times, key=times.__getitem__, reverse=True)[:top]:
        typer.echo(
            f"{times[name]:9.1f} us {100 * times[name] / busy:5.1f} % {counts[name]:6.1f} x {name[:90]}"
        )


@app.command()
def narrow(
    preset: Annotated[str, typer.Option(help="One of: " + ", ".join(PRESETS))] = "160M",
    segment: Annotated[int, typer.Option(help="Tokens of a segment")] = 128,
    segments: Annotated[str, typer.Option(help="Numbers of segments, with commas between")] = "1,4,16",
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    budget: Annotated[float, typer.Option(help="Seconds of timing for a number of segments")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="A file of JSON to write")] = None,
) -> None:
    """Measure a model without width (an RMT) against its loop: eager, compiled, with CUDA graphs."""
    torch.set_grad_enabled(False)
    rows = measure_narrow(
        PRESETS[preset], segment, [int(each) for each in segments.split(",")], device, budget
    )
    for row in rows:
        ms = ", ".join(f"{name} {row[name]:.2f} ms" for name in _SIDES if name in row)
        said = f"{row['segments']} segments of {segment}: {ms}"
        typer.echo(f"{said}; ran {row['ran']}, cold {row['cold']:.1f} s, error {row['error']:.2g}")
    if out is not None:
        out.write_text(json.dumps({"preset": preset, "segment": segment, "rows": rows}, indent=1) + "\n")


_SIDES = ("diagpass", "eager", "compiled", "graphed")


def _kernels(call: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Microseconds and count of each kernel of a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return {item.key: (item.device_time_total, item.count) for item in found.key_averages()}


if __name__ == "__main__":
    app()
