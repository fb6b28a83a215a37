"""The main job, start to end, on the CPU: ``make demo`` or ``python -m examples.demo``.

Builds an associative recurrent memory transformer (ARMT) over a Hugging Face Llama with random
weights, shows what diagpass finds in it (the layer x segment grid, the waves), runs it as waves,
compares outputs and memories with the sequential run, and times both. The grid is also drawn to
``demo-grid.png``.

The comparison is in float64 so that what remains is rounding; the timings are in float32.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import diagpass
from diagpass.pictures import grid_text, plot_grid
from examples import armt

console = Console()


# ---------------------------------------------------------------------------------------------
# Comparing two runs


def tensors(value: Any, name: str = "output") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor in a model's output with a name for it."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from tensors(entry, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from tensors(entry, f"{name}[{index}]")


def state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a run leaves in a model: buffers, and tensors in plain attributes of its modules.

    ARMT keeps its memories in plain attributes that ``forward`` reassigns.
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, buffer in module.named_buffers(recurse=False):
            yield prefix + name, buffer
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        raise AssertionError(
            f"got {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        )
    if got.numel() == 0:
        return 0.0
    difference = (got.double() - expected.double()).abs().max()
    scale = expected.double().abs().max()
    return float(difference / scale) if scale > 0 else float(difference)


def largest_error(
    got: Iterator[tuple[str, torch.Tensor]], expected: Iterator[tuple[str, torch.Tensor]]
) -> tuple[int, float, str]:
    """Compare two lists of named tensors: how many, the largest relative error, and where."""
    got_by_name, expected_by_name = dict(got), dict(expected)
    if got_by_name.keys() != expected_by_name.keys():
        raise AssertionError(
            f"the two runs differ in names: {sorted(got_by_name.keys() ^ expected_by_name.keys())}"
        )
    worst, where = 0.0, "-"
    for name, tensor in expected_by_name.items():
        error = relative_error(got_by_name[name], tensor)
        # a NaN is never larger than anything, so ask the other way round
        if not error <= worst:
            worst, where = error, name
    return len(expected_by_name), worst, where


# ---------------------------------------------------------------------------------------------
# What the pass found


def cells_text(report: dict[str, Any], cells: list[int], most: int = 4) -> str:
    """Name the cells of a group as (segment, layer), the first few of them."""
    places = [f"({report['grid'][i]['segment']},{report['grid'][i]['layer']})" for i in cells]
    return " ".join(places[:most]) + (" ..." if len(places) > most else "")


def wave_table(report: Any) -> Table:
    """Make the table of waves: how wide each is, and which groups of one kind it runs."""
    data = report.to_dict()
    table = Table(title="waves", title_justify="left", title_style="bold")
    table.add_column("wave", justify="right")
    table.add_column("width", justify="right")
    table.add_column("groups: kind x cells (segment,layer)")
    for wave, groups in enumerate(data["schedule"]):
        width = sum(len(group["cells"]) for group in groups)
        lines = [
            f"kind {group['kind']} x {len(group['cells'])}: {cells_text(data, group['cells'])}"
            for group in groups
        ]
        table.add_row(str(wave), str(width), "\n".join(lines))
    return table


# ---------------------------------------------------------------------------------------------
# Timing


def median_seconds(
    runs: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, tuple[float, float, float]]:
    """Time several callables in turn, in one process: (median, fastest, slowest) of each.

    They take turns, so that a machine that slows down or speeds up meanwhile is fair to all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: (statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def has_compiler() -> bool:
    """Tell whether Inductor will find a C++ compiler; it needs one for the CPU."""
    from torch._inductor import config

    names = config.cpp.cxx
    for name in names if isinstance(names, list | tuple) else [names]:
        if name and shutil.which(name):
            return True
    return any(shutil.which(name) for name in ("g++", "c++", "clang++", "cl"))


# ---------------------------------------------------------------------------------------------
# The four parts of the demo


def show_plan(model: nn.Module, inputs: tuple[Any, ...], picture: Path) -> None:
    """Explain the model: the report, the grid in the terminal and as a PNG, the waves."""
    console.rule("[bold]1. what diagpass finds in the model[/]")
    start = time.perf_counter()
    report = diagpass.explain(model, *inputs)
    console.print(f"captured and analysed in {time.perf_counter() - start:.1f} s; nothing compiled")
    console.print()
    console.print(str(report), markup=False, highlight=False)
    console.print()
    console.print(grid_text(report))
    console.print()
    console.print(wave_table(report))
    plot_grid(report, picture)
    console.print(f"the same grid as a picture: {picture}")


def show_agreement(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Run the waves and compare outputs and memories with the model run as it stands."""
    console.rule("[bold]2. the same results[/]")
    reference = copy.deepcopy(model)
    expected = reference(*inputs)
    start = time.perf_counter()
    fast = diagpass.transform(model, options={"schedule": "wavefront", "compiler": "eager"})
    got = fast(*inputs)
    console.print(
        f"transform and first call, eager compiler: {time.perf_counter() - start:.1f} s; "
        f"ran: {fast.report.ran}; cells that ran in groups of two or more: "
        f"{fast.report.batched_cells} of {fast.report.cells}"
    )
    if fast.report.ran != "wavefront":
        raise SystemExit(f"the model did not run as waves: {fast.report.reason}")
    table = Table(title="wavefront against sequential, float64", title_style="bold")
    table.add_column("what")
    table.add_column("tensors", justify="right")
    table.add_column("largest relative error", justify="right")
    for what, error in (
        ("outputs", largest_error(tensors(got), tensors(expected))),
        ("state left in the model", largest_error(state(fast.original), state(reference))),
    ):
        table.add_row(what, str(error[0]), f"{error[1]:.1e}")
        if not error[1] <= 1e-9:
            raise SystemExit(f"{what}: the two runs differ by {error[1]:.1e} at {error[2]}")
    console.print(table)


def show_timings(build: Callable[[], tuple[nn.Module, tuple[Any, ...]]], repeats: int) -> None:
    """Time the sequential run and the waves, with the eager compiler and with Inductor."""
    console.rule("[bold]3. how long it takes here[/]")
    model, inputs = build()
    compilers = ["eager"]
    if has_compiler():
        compilers.append("inductor")
    else:
        console.print("no C++ compiler found: Inductor needs one on the CPU, so its row is left out")
    runs: dict[str, Callable[[], object]] = {"sequential": lambda: model(*inputs)}
    expected = dict(tensors(model(*inputs)))
    for compiler in compilers:
        fast = diagpass.transform(
            copy.deepcopy(model), options={"schedule": "wavefront", "compiler": compiler}
        )
        name = f"diagonal, {compiler}"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", diagpass.DiagpassWarning)
            start = time.perf_counter()
            _, error, _ = largest_error(tensors(fast(*inputs)), iter(expected.items()))
            first = time.perf_counter() - start
        ours = [w.message for w in said if issubclass(w.category, diagpass.DiagpassWarning)]
        for message in ours:
            first_line = str(message).splitlines()[0]
            console.print(f"{name}: {first_line}", style="yellow", markup=False)
        if ours:
            name += " (see warnings)"
        console.print(
            f"{name}: transform's first call {first:.1f} s, ran: {fast.report.ran}, "
            f"largest relative error {error:.0e}"
        )
        runs[name] = lambda fast=fast: fast(*inputs)
    seconds = median_seconds(runs, repeats)
    base = seconds["sequential"][0]
    table = Table(
        title=f"one call, float32, {torch.get_num_threads()} threads, {repeats} calls each",
        title_style="bold",
    )
    table.add_column("run")
    for column in ("median", "fastest", "slowest", "sequential / this"):
        table.add_column(column, justify="right")
    for name, (median, fastest, slowest) in seconds.items():
        times = (f"{1e3 * t:.1f} ms" for t in (median, fastest, slowest))
        table.add_row(name, *times, f"x{base / median:.2f}")
    console.print(table)
    console.print(
        "Above x1.00 the waves are faster. Sequential is the model as it stands. The eager row "
        "changes the order and batches, and runs a captured graph instead of Python; the Inductor "
        "row also has fused kernels, which a compiled sequential run would have too. The method "
        "is made for GPUs: a CPU that one cell keeps busy has little to gain from several at once.",
        style="dim",
    )


def main() -> None:
    """Read the command line and run the demo."""
    parser = argparse.ArgumentParser(description="the main job of diagpass on a small ARMT")
    parser.add_argument("--picture", type=Path, default=Path("demo-grid.png"))
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each run")
    parser.add_argument("--no-timings", action="store_true", help="leave out part 3")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    with torch.no_grad():
        model, inputs = armt.build(base="llama", layers=4, segments=6, batch=2, dtype=torch.float64)
        console.print(
            f"[bold]ARMT over a Hugging Face Llama[/], random weights, "
            f"{sum(p.numel() for p in model.parameters()):,} parameters"
        )
        show_plan(model, inputs, arguments.picture)
        show_agreement(model, inputs)
        if not arguments.no_timings:
            show_timings(
                lambda: armt.build(
                    base="llama",
                    layers=4,
                    segments=4,
                    batch=1,
                    segment_size=32,
                    d_model=256,
                    d_mem=16,
                    dtype=torch.float32,
                ),
                arguments.repeats,
            )


if __name__ == "__main__":
    main()
