"""The commands of ``diagpass``.

Exit codes: 0 done, whatever the verdict; 1 an error, or results that differ; 2 wrong usage; 3 the verdict is
sequential under ``--strict``. An error is one readable paragraph; ``--debug`` adds the traceback.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import diagpass
from diagpass.cli import sample
from diagpass.cli.checks import check
from diagpass.cli.target import called, load
from diagpass.cli.timing import bench as run_bench
from diagpass.cli.timing import estimated
from diagpass.describe.figures import count
from diagpass.describe.progress import Progress
from diagpass.errors import DiagpassError, DiagpassWarning
from diagpass.report import Report

__all__ = ["app"]

ERROR, SEQUENTIAL = 1, 3

app = typer.Typer(
    name="diagpass",
    help="Segment-recurrent PyTorch models as batched wavefronts: what would be done, why, and how fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Target = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="A callable, importable from the current folder or PYTHONPATH, returning (model, inputs_tuple).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON, and nothing else, to standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Compiler = Annotated[str, typer.Option(help="inductor, or eager, which compiles nothing.")]


@contextlib.contextmanager
def _readable(debug: bool) -> Iterator[None]:
    """Errors as one paragraph, warnings of ours as a line, the rest of the noise nowhere."""
    with warnings.catch_warnings(), _quiet_logs(debug):
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", DiagpassWarning)
        shown = warnings.showwarning

        def show(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if issubclass(category, DiagpassWarning):
                _paragraph("warning", str(message), "yellow")
            else:
                shown(message, category, *where, **more)

        warnings.showwarning = show
        try:
            yield
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                traceback.print_exc(file=sys.stderr)
            known = isinstance(error, (DiagpassError, ImportError, ValueError, OSError))
            text = str(error).strip().split("\n\n")[0].replace("\n", " ")
            if isinstance(error, OSError) and error.filename and error.strerror:
                text = f"{error.filename}: {error.strerror}"
            if not known:
                text = f"{type(error).__name__}: {text}; run with --debug for the traceback"
            _paragraph("error", text or type(error).__name__, "red")
            raise typer.Exit(ERROR) from None


@contextlib.contextmanager
def _quiet_logs(debug: bool) -> Iterator[None]:
    """PyTorch logs the traceback of an error that it then raises; it is shown where somebody asks for it."""
    before = logging.root.manager.disable
    if not debug and "TORCH_LOGS" not in os.environ:
        logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _paragraph(kind: str, text: str, colour: str) -> None:
    console = Console(stderr=True)
    body = textwrap.fill(f"{kind}: {text}", min(console.width, 100), break_long_words=False)
    console.print(Text(body, style=colour))


def _out(value: Any) -> None:
    Console(soft_wrap=True).print(value, highlight=False)


@app.command(
    epilog="Example: [bold]diagpass explain examples.armt:build --plot grid.png --trace waves.json[/]\n\n"
    "Example: [bold]diagpass explain examples.armt:build --run --trace run.json[/]",
)
def explain(
    target: Target,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the layer x segment grid to this PNG.")] = None,
    gantt: Annotated[Path | None, typer.Option(help="Draw the schedule to this PNG.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the schedule, and with --run the run, as a Chrome trace.")
    ] = None,
    repro: Annotated[
        Path | None, typer.Option(help="Write a script for a bug report, which runs by itself.")
    ] = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Measure this machine for two seconds and estimate times.")
    ] = False,
    run: Annotated[
        bool, typer.Option("--run", help="Also run it, and say how long each width of wave took.")
    ] = False,
    compiler: Compiler = "inductor",
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if the verdict is sequential.")
    ] = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Say what would be done with a model, and why; nothing is compiled without --run."""
    with _readable(debug):
        with Progress("capture and analysis", silent=quiet):
            model, inputs = load(target)
            with called(target, model, inputs):
                report = _explained(model, inputs)
        if repro is not None:
            report.save_repro(repro)
        if run:
            with Progress("run and measurement", silent=quiet):
                report = diagpass.transform(model, options={"compiler": compiler}).measure(*inputs)
        if estimate:
            with Progress("measurement of the machine", silent=quiet):
                report = report.timed(**estimated(model, inputs, report))
        if plot is not None or gantt is not None:
            from diagpass.pictures import plot_gantt, plot_grid

            if plot is not None:
                plot_grid(report, plot)
            if gantt is not None:
                plot_gantt(report, gantt)
        if trace is not None:
            from diagpass.pictures import write_trace

            write_trace(report, trace)
        if as_json:
            sys.stdout.write(report.to_json() + "\n")
        else:
            _out(report)
            written = (("grid", plot), ("schedule", gantt), ("trace", trace), ("script", repro))
            for what, path in written:
                if path is not None:
                    _out(Text(f"{what}: {path}"))
        if strict and report.verdict == "sequential":
            raise typer.Exit(SEQUENTIAL)


def _explained(model: torch.nn.Module, inputs: tuple[Any, ...]) -> Report:
    with torch.no_grad():
        return diagpass.explain(model, *inputs)


@app.command(epilog="Example: [bold]diagpass verify examples.armt:build --tolerance 1e-4[/]")
def verify(
    target: Target,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest relative error; by default what rounding explains in each data type.", min=0.0
        ),
    ] = None,
    compiler: Compiler = "eager",
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Run a model sequentially and as a wavefront, and compare every output and state."""
    with _readable(debug):
        with Progress("sequential run and wavefront", silent=quiet):
            model, inputs = load(target)
            with called(target, model, inputs):
                found, report = check(model, inputs, tolerance, {"compiler": compiler})
        equal = all(each.equal for each in found)
        if as_json:
            figures = {
                "equal": equal,
                "ran": report.ran,
                "reason": report.reason,
                "values": [
                    {"name": each.name, "error": each.error, "bound": each.bound, "equal": each.equal}
                    for each in found
                ],
            }
            sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        else:
            table = Table("value", "relative error", "bound", "", box=None)
            for each in found:
                row = f"{each.error:.2e}", f"{each.bound:.0e}", "equal" if each.equal else "DIFFERS"
                table.add_row(Text(each.name), *row, style=None if each.equal else "red")
            _out(table)
            word = "equal" if equal else "not equal"
            values = "value" if len(found) == 1 else "values"
            _out(Text(f"{word}: {len(found)} {values} compared, the second run was {report.ran}"))
        if not equal:
            raise typer.Exit(ERROR)


@app.command(epilog="Example: [bold]diagpass bench examples.armt:build --repeats 20[/]")
def bench(
    target: Target,
    repeats: Annotated[int, typer.Option(help="Timed calls of each.", min=1)] = 7,
    compiler: Compiler = "inductor",
    as_json: Json = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Time a model as it stands, under torch.compile and as a wavefront."""
    with _readable(debug):
        model, inputs = load(target)
        with Progress("bench", silent=quiet) as progress, called(target, model, inputs):
            rows = run_bench(model, inputs, repeats, compiler, progress.show)
        base = rows[0].median
        if as_json:
            figures = [
                {
                    "name": row.name,
                    "ms": 1e3 * row.median,
                    "fastest_ms": 1e3 * row.fastest,
                    "slowest_ms": 1e3 * row.slowest,
                    "ratio": base / row.median if row.median and base else None,
                    "error": row.error,
                    "failed": row.failed,
                }
                for row in rows
            ]
            sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        else:
            table = Table(
                "run", "median", "fastest", "slowest", "sequential / this", "largest error", box=None
            )
            for row in rows:
                if row.failed:
                    table.add_row(row.name, Text(f"failed: {row.failed}", style="yellow"))
                    continue
                times = (f"{1e3 * t:.2f} ms" for t in (row.median, row.fastest, row.slowest))
                ratio = f"x{base / row.median:.2f}" if base else "-"
                table.add_row(row.name, *times, ratio, f"{row.error:.1e}")
            _out(table)
            calls = count(repeats, "call")
            _out(Text(f"{calls} each, in turns; above x1.00 is faster than the model as it stands"))
        if rows[-1].failed:
            raise DiagpassError(f"the wavefront could not be timed: {rows[-1].failed}")


@app.command(epilog="Example: [bold]diagpass demo[/]")
def demo(debug: Debug = False, quiet: Quiet = False) -> None:
    """Show all of it on a small built-in model: report, grid, comparison."""
    with _readable(debug):
        from diagpass.pictures import grid_text

        model, inputs = sample.build()
        with Progress("capture and analysis", silent=quiet):
            report = _explained(model, inputs)
        _out(report)
        _out("")
        _out(grid_text(report))
        with Progress("sequential run and wavefront", silent=quiet):
            found, _ = check(model, inputs, None, {"compiler": "eager"})
        _out("")
        worst = max(each.error for each in found)
        _out(Text(f"wavefront against sequential: largest relative error {worst:.1e}"))
        if not all(each.equal for each in found):
            raise typer.Exit(ERROR)


def _version(asked: bool) -> None:
    if asked:
        _out(f"diagpass {diagpass.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.captureWarnings(False)
